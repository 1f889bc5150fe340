"""One loaded encoder, the lock that guards it and the thread that async callers use.

`EpicEmbedding` is a bag of settings that LlamaIndex copies, pickles and hashes; the weights are none of that.
They live here, shared by all copies of an embedding, and never travel to another process: a copy that was
unpickled there loads them again at its first use.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from epic_rag.encoder import EpicEncoder


@dataclass(frozen=True)
class EngineSettings:
    """What an encoder is loaded from; two equal ones can share one encoder."""

    model: str | None
    max_query_tokens: int | None
    max_document_tokens: int | None
    device: str | None
    dtype: str | None
    truncate_dim: int | None


class Engine:
    """An encoder that is loaded when it is first asked for.

    Args:
        settings: What to load.
        encoder: The encoder itself, when there is one already.
    """

    def __init__(self, settings: EngineSettings, encoder: EpicEncoder | None = None) -> None:
        self.settings = settings
        # Re-entrant: whoever encodes holds it, and loading happens inside. EpicEncoder is not thread-safe.
        self.lock = threading.RLock()
        self._encoder = encoder
        # For async callers, and of one thread. Not `asyncio.to_thread`: LlamaIndex starts all batches at
        # once, and each would hold a thread of the event loop's shared pool while it waits for the lock,
        # until the application's own `to_thread` calls queue behind an indexing run. One thread also keeps
        # torch to one team of OpenMP workers. It starts with the first call.
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="epic-embedding")

    @property
    def loaded(self) -> bool:
        """Whether the weights are in memory."""
        return self._encoder is not None

    @property
    def encoder(self) -> EpicEncoder:
        """The encoder, loaded now if need be.

        Raises:
            CheckpointError: There is no such checkpoint, or it is broken.
        """
        with self.lock:
            if self._encoder is None:
                self._encoder = EpicEncoder.from_pretrained(
                    self.settings.model,
                    device=self.settings.device,
                    dtype=self.settings.dtype,
                    max_query_tokens=self.settings.max_query_tokens,
                    max_document_tokens=self.settings.max_document_tokens,
                    truncate_dim=self.settings.truncate_dim,
                )
            return self._encoder

    def __deepcopy__(self, memo: dict[int, Any]) -> Engine:
        # Weights are only ever read: a deep copy of an embedding must not double them.
        return self


_SHARED: ContextVar[Engine | None] = ContextVar("epic_embedding_engine", default=None)


@contextmanager
def share(engine: Engine) -> Iterator[None]:
    """Let the embeddings that are constructed inside use `engine`, when their settings are the same."""
    token = _SHARED.set(engine)
    try:
        yield
    finally:
        _SHARED.reset(token)


def engine_for(settings: EngineSettings) -> Engine:
    """The shared engine if it fits, else a new one."""
    shared = _SHARED.get()
    return shared if shared is not None and shared.settings == settings else Engine(settings)
