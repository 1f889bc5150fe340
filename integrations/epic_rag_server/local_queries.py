"""Queries of `epic-rag query` on the same machine, answered with the model that is in memory.

The answer is what the command would find by itself, so a query is encoded alone and in the same arithmetic, not in a
batch with others. See `epic_rag_chroma.query_server` for the client.
"""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import hmac
import json
import logging
import secrets
import threading
from collections.abc import AsyncIterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from epic_rag import EpicError
from epic_rag_chroma import LOCAL_QUERY_PATH, ChromaIndexer, ServedModel, announce_server, search_request_of
from epic_rag_server.errors import ApiError
from epic_rag_server.service import Service

if TYPE_CHECKING:
    from epic_rag import EpicEncoder, QueryPrompt

__all__ = ["LocalQueries"]

_PACKAGES = ("epic_rag", "epic_rag_chroma")


class LocalQueries:
    """The route for `epic-rag query`, and the files that name it.

    Args:
        service: The service, whose queue encodes the queries unless there is an encoder.
        folders: The index folders.
        model: The options that the model was opened with.
        encoder: An encoder without torch: what the command would use. None if it would load the service's model.
    """

    def __init__(
        self, service: Service, folders: list[Path], model: ServedModel, encoder: EpicEncoder | None = None
    ) -> None:
        self._service = service
        self._model = model
        self._token = secrets.token_urlsafe(32)
        self._light = encoder
        self._loop: asyncio.AbstractEventLoop | None = None
        # One query after the other, so that a warning is known to be of this one.
        self._turn = threading.Lock()
        self._announced = ExitStack()
        self._indexers: Mapping[str, ChromaIndexer] = {
            str(folder.resolve()): ChromaIndexer(folder, encoder=cast(Any, _Encoder(self))) for folder in folders
        }

    def routes(self) -> list[Route]:
        """Return the route."""
        return [Route(LOCAL_QUERY_PATH, self.query, methods=["POST"])]

    def announce(self, url: str) -> None:
        """Write the server's address into the index folders, until `close`."""
        url = url.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")
        folders = [Path(folder) for folder in self._indexers]
        self._announced.enter_context(
            announce_server(folders, url, self._service.fingerprint, self._token, self._model)
        )

    def close(self) -> None:
        """Remove the address, and close the indexes."""
        self._announced.close()
        for indexer in self._indexers.values():
            indexer.close()

    async def query(self, request: Request) -> Response:
        """`POST /local/query`: the first byte at once, then an object with the hits, or an empty one after an error."""
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(given.encode("utf-8", "replace"), self._token.encode()):
            raise ApiError(403, "This address is for `epic-rag query`. Use /v1/search.", code="local")
        body = await request.body()
        self._loop = asyncio.get_running_loop()

        async def answer() -> AsyncIterator[bytes]:
            yield b" "
            yield await run_in_threadpool(self._answer, body)

        return StreamingResponse(answer(), media_type="application/json")

    def _answer(self, body: bytes) -> bytes:
        seen = _Warnings()
        try:
            asked = json.loads(body)
            indexer = self._indexers[asked["index_dir"]]
            if asked["fingerprint"] != self._service.fingerprint:
                return b"{}"
            with self._turn, seen:
                hits = indexer.query(asked["text"], search_request_of(asked["request"]))
                stale = indexer.stale_files(max_files=asked["max_files"])
        except (EpicError, KeyError, ValueError, TypeError, AttributeError):
            return b"{}"  # the command finds the same error, or no error
        if seen.count:
            return b"{}"  # the command prints them
        # As ASCII: a file's name may have bytes that are not UTF-8.
        return json.dumps({"hits": [dataclasses.asdict(hit) for hit in hits], "stale": stale}).encode()

    def encode(self, texts: Any, prompt: QueryPrompt | None) -> Any:
        """Encode queries, as a new process would; called in a thread of the pool."""
        if self._light is not None:
            # The copy loads torch if a bank is long; the next query is again encoded without.
            return copy.copy(self._light).encode_query(texts, prompt)
        assert self._loop is not None
        work = self._service.queue.call(lambda encoder: encoder.encode_query(texts, prompt))
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


class _Encoder:
    """The part of an encoder that a search needs."""

    def __init__(self, queries: LocalQueries) -> None:
        self.encode_query = queries.encode
        self.fingerprint = queries._service.fingerprint
        self.name = self.source = queries._service.name

    def encode_document(self, *_: Any) -> Any:
        raise NotImplementedError  # nothing is indexed here


class _Warnings(logging.Handler):
    """Counts warnings of epic-rag's packages while it is entered."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.count += 1

    def __enter__(self) -> None:
        for name in _PACKAGES:
            logging.getLogger(name).addHandler(self)

    def __exit__(self, *_: object) -> None:
        for name in _PACKAGES:
            logging.getLogger(name).removeHandler(self)
