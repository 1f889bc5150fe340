"""Dynamic batching: texts of many requests wait in a queue, and the thread that owns the model takes batches of them.

    requests -> tokenizer thread: lengths -> queue, sorted by length -> model thread: batches by tokens -> vectors

The model takes what is there as soon as it is idle; there is no fixed wait. A batch holds texts of similar length with
one prompt. Full batches, which contain a text of the oldest request, alternate with small ones for the request with the
fewest tokens, so that a single query waits for the batch in progress and at most one more, and no request for ever.
"""

from __future__ import annotations

import asyncio
import ctypes
import sys
import threading
import time
from bisect import insort
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from epic_rag import EpicError

if TYPE_CHECKING:
    from epic_rag import EpicEncoder, QueryPrompt

__all__ = ["EncodingQueue", "QueueClosedError", "QueueFullError"]

Vectors = npt.NDArray[np.float32]
Result = TypeVar("Result")

# Texts that are tokenised at a time; a short request need not wait for a long one.
_SLICE = 64
# Share of a batch's tokens that the batch of the smallest request has at most.
_EXPRESS_SHARE = 8
_LONGEST_WAIT = 60
# Seconds between two releases of freed memory, each of which takes 0.1 s at most.
_RELEASE_INTERVAL = 5.0


class QueueClosedError(EpicError):
    """The server is stopping."""


class QueueFullError(EpicError):
    """Too many texts are waiting.

    Args:
        retry_after: After how many seconds to try again.
    """

    def __init__(self, retry_after: int) -> None:
        super().__init__("Too many texts are waiting. Try again later, or send fewer texts at a time.")
        self.retry_after = retry_after


@dataclass(eq=False)
class _Job:
    """A request's texts; `rows` counts those without a vector."""

    texts: Sequence[str]
    prompt: QueryPrompt | None
    tokens: int
    future: asyncio.Future[Vectors]
    vectors: Vectors
    rows: int
    since: float = field(default_factory=time.monotonic)


class _Row(NamedTuple):
    length: int
    order: int
    place: int
    job: _Job


class EncodingQueue:
    """Requests to an encoder, which is used by one thread only.

    Args:
        encoder: The encoder; nothing else may use it.
        batch_tokens: Tokens of a batch; None for four batches of the encoder. It uses its second worker from two on,
            and a batch of whole texts is always a little short of its limit.
        max_texts: Most texts of requests that are not answered; a single request is always accepted.
        on_batch: Called with the number of tokens of each batch and the seconds that its oldest text waited.
    """

    def __init__(
        self,
        encoder: EpicEncoder,
        *,
        batch_tokens: int | None = None,
        max_texts: int = 16_384,
        on_batch: Callable[[int, float], None] = lambda tokens, waited: None,
    ) -> None:
        self.batch_tokens = 4 * encoder.max_batch_tokens if batch_tokens is None else batch_tokens
        self.texts = 0
        self._encoder = encoder
        self._max_texts = max_texts
        self._on_batch = on_batch
        self._lengths = encoder.token_counter()
        self._tokenizer = ThreadPoolExecutor(1, thread_name_prefix="epic-rag-lengths")
        self._changed = threading.Condition()
        self._rows: dict[QueryPrompt | None, list[_Row]] = {}
        self._jobs: dict[_Job, None] = {}
        self._calls: deque[Callable[[], None]] = deque()
        self._order = 0
        self._express_turn = False
        self._seconds_per_token = 1e-4
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="epic-rag-model", daemon=True)
        self._thread.start()

    async def encode(self, texts: Sequence[str], prompt: QueryPrompt | None = None) -> tuple[Vectors, int]:
        """Encode texts; a cancelled call leaves the queue.

        Args:
            texts: The texts.
            prompt: Instruction and demonstrations of queries; None for documents.

        Returns:
            float32 unit rows (n, dimension), and the number of tokens of the texts as the model reads them.

        Raises:
            QueueFullError: If too many texts are waiting.
            QueueClosedError: If the server is stopping.
            EpicError: See `EpicEncoder.encode_query`.
        """
        if self.texts and self.texts + len(texts) > self._max_texts:
            with self._changed:
                tokens = sum(row.length for rows in self._rows.values() for row in rows)
            raise QueueFullError(min(_LONGEST_WAIT, 1 + int(tokens * self._seconds_per_token)))
        self.texts += len(texts)
        try:
            lengths: list[int] = []
            loop = asyncio.get_running_loop()
            for start in range(0, len(texts), _SLICE):
                part = texts[start : start + _SLICE]
                lengths += await loop.run_in_executor(self._tokenizer, self._lengths, part, prompt is None)
            vectors = np.empty((len(texts), self._encoder.dimension), np.float32)
            job = _Job(texts, prompt, sum(lengths), loop.create_future(), vectors, len(texts))
            self._put(job, lengths)
            try:
                return await job.future, job.tokens
            finally:
                self._drop(job)
        finally:
            self.texts -= len(texts)

    async def call(self, function: Callable[[EpicEncoder], Result]) -> Result:
        """Call a function with the encoder in the thread that owns it, between two batches.

        Raises:
            QueueClosedError: If the server is stopping.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Result] = loop.create_future()

        def run() -> None:
            try:
                result = function(self._encoder)
            except Exception as error:
                _settle(future, error=error)
            else:
                _settle(future, result)

        with self._changed:
            self._check_open()
            self._calls.append(run)
            self._changed.notify()
        return await future

    @property
    def is_alive(self) -> bool:
        """True while texts are accepted."""
        return self._thread.is_alive() and not self._is_closed

    def close(self) -> None:
        """Accept no more texts, encode those that wait, and end the threads."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join()
        self._tokenizer.shutdown()

    def _check_open(self) -> None:
        if self._is_closed:
            raise QueueClosedError("The server is stopping. Try again later.")

    def _put(self, job: _Job, lengths: Sequence[int]) -> None:
        with self._changed:
            self._check_open()
            self._jobs[job] = None
            rows = self._rows.setdefault(job.prompt, [])
            for place, length in enumerate(lengths):
                # The order makes rows comparable, and orders those of one length by age.
                insort(rows, _Row(length, self._order, place, job))
                self._order += 1
            self._changed.notify()

    def _drop(self, job: _Job) -> None:
        with self._changed:
            if self._jobs.pop(job, self) is None:
                self._rows[job.prompt] = [row for row in self._rows[job.prompt] if row.job is not job]
                self._tidy(job.prompt)

    def _tidy(self, prompt: QueryPrompt | None) -> None:
        if not self._rows[prompt]:
            del self._rows[prompt]

    def _take(self) -> list[_Row]:
        """Take the next batch: the longest text of a request, and texts of similar length with its prompt.

        The request is the oldest one, or, in every second batch, the one with the fewest tokens; that batch is small.
        """
        limit = self.batch_tokens // _EXPRESS_SHARE
        chosen = min(self._jobs, key=lambda job: job.tokens) if self._express_turn else None
        self._express_turn = chosen is None
        if chosen is None or chosen.tokens > limit:
            chosen, limit = next(iter(self._jobs)), self.batch_tokens
        rows = self._rows[chosen.prompt]
        end = 1 + max(number for number, row in enumerate(rows) if row.job is chosen)
        start, tokens = end - 1, rows[end - 1].length
        while start > 0 and tokens + rows[start - 1].length <= limit:
            start -= 1
            tokens += rows[start].length
        while start == 0 and end < len(rows) and tokens + rows[end].length <= limit:
            tokens += rows[end].length
            end += 1
        batch = rows[start:end]
        del rows[start:end]
        self._tidy(chosen.prompt)
        for job, count in Counter(row.job for row in batch).items():
            job.rows -= count
            if job.rows == 0:
                del self._jobs[job]
        return batch

    def _run(self) -> None:
        released = time.monotonic()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or self._calls or self._is_closed)
                call = self._calls.popleft() if self._calls else None
                batch = self._take() if self._jobs else []
            if call is None and not batch:
                return
            if call is not None:
                call()
            if batch:
                self._encode(batch)
            if time.monotonic() - released > _RELEASE_INTERVAL:
                _release_memory()
                released = time.monotonic()

    def _encode(self, batch: Sequence[_Row]) -> None:
        start = time.monotonic()
        tokens = sum(row.length for row in batch)
        prompt = batch[0].job.prompt
        texts = [row.job.texts[row.place] for row in batch]
        encoder = self._encoder
        try:
            vectors = encoder.encode_document(texts) if prompt is None else encoder.encode_query(texts, prompt)
        except Exception as error:
            for job in {row.job for row in batch}:
                self._drop(job)
                _settle(job.future, error=error)
            return
        for row, vector in zip(batch, vectors, strict=True):
            row.job.vectors[row.place] = vector
        # Counted after the vectors are stored: the batch with a job's last rows is also the last that is encoded.
        for job in {row.job for row in batch}:
            if job.rows == 0:
                _settle(job.future, job.vectors)
        self._seconds_per_token += 0.2 * ((time.monotonic() - start) / max(1, tokens) - self._seconds_per_token)
        self._on_batch(tokens, start - min(row.job.since for row in batch))


def _release_memory() -> None:
    """Return freed memory to the system.

    Batches of ever new shapes leave gaps in the heaps of glibc, and a server under load would grow for hours.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc alone has it
        if trim is not None:
            trim(0)


def _settle(future: asyncio.Future[Any], result: Any = None, *, error: Exception | None = None) -> None:
    """Set a future's result or error from another thread; nothing happens if it was cancelled."""

    def settle() -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)

    try:
        future.get_loop().call_soon_threadsafe(settle)
    except RuntimeError:  # the loop is closed: nobody waits any more
        return
