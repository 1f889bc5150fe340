"""Routes of indexes: search, the lines of a document, the list of indexes."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from epic_rag import DataError, QueryPrompt
from epic_rag.tasks import DEFAULT_TASK
from epic_rag_chroma import Hit, IndexMismatchError, SearchRequest, parse_filters
from epic_rag_server.errors import ApiError
from epic_rag_server.messages import json_response, read, unless_disconnected
from epic_rag_server.schemas import SearchQuery
from epic_rag_server.service import Service

__all__ = ["SearchRoutes"]

_LINES = re.compile(r"(\d{1,9})(?:-(\d{1,9}))?")
_MAX_LINES = 2000


class SearchRoutes:
    """Handlers of the routes of indexes.

    Args:
        service: The model and the indexes.
    """

    def __init__(self, service: Service) -> None:
        self._service = service

    def routes(self) -> list[Route]:
        """Return the routes."""
        return [
            Route("/v1/search", self.search, methods=["POST"]),
            Route("/v1/indexes", self.indexes),
            Route("/v1/documents/{path:path}", self.document),
        ]

    async def search(self, request: Request) -> Response:
        """`POST /v1/search`: the chunks that answer a query, best first."""
        asked = await read(request, SearchQuery)
        name, hits, tokens = await self.find(request, asked)
        return json_response(
            {
                "object": "list",
                "index": name,
                "mode": asked.mode,
                "data": [_hit(hit) for hit in hits],
                "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
            },
            headers={"x-epic-fingerprint": self._service.fingerprint},
        )

    async def find(self, request: Request, asked: SearchQuery) -> tuple[str, Sequence[Hit], int]:
        """Search, unless the client leaves.

        Returns:
            The name of the index, hits, best first, and the number of tokens that were encoded.

        Raises:
            ApiError: 404 for an unknown index or bank.
            EpicError: See `ChromaIndexer.query`.
        """
        name, indexer = self._service.index(asked.index)
        filters = (
            parse_filters(asked.where, asked.path, asked.since) if asked.where or asked.path or asked.since else None
        )
        if asked.task is None and asked.bank is None and asked.instruction is None:
            asked.task = DEFAULT_TASK  # as `epic-rag query`
        prompt = self._service.prompt(None, "query", asked) or QueryPrompt()
        settings = SearchRequest(
            prompt,
            k=asked.top_k,
            mode=asked.mode,
            filters=filters,
            collapse=asked.collapse,
            per_file=asked.per_file,
            min_score=asked.min_score,
            before=asked.before,
            after=asked.after,
            full_section=asked.full_section,
        )

        async def find() -> tuple[Sequence[Hit], int]:
            embedded, tokens = None, 0
            if asked.mode != "keyword":
                fingerprint = await run_in_threadpool(lambda: indexer.fingerprint)
                if fingerprint != self._service.fingerprint:
                    raise IndexMismatchError(f"{name} has vectors of {fingerprint}, not {self._service.fingerprint}.")
                vectors, tokens = await self._service.encode([asked.query], prompt)
                embedded = vectors[0]
            return await run_in_threadpool(indexer.query, asked.query, settings, embedded=embedded), tokens

        hits, tokens = await unless_disconnected(request, find())
        return name, hits, tokens

    async def indexes(self, request: Request) -> Response:
        """`GET /v1/indexes`: names and contents."""
        listed = []
        for name, indexer in self._service.indexes.items():
            status = await run_in_threadpool(indexer.status)
            listed.append(
                {
                    "id": name,
                    "object": "index",
                    "model": status.model,
                    "fingerprint": status.fingerprint,
                    "files": status.files,
                    "chunks": status.chunks,
                    "kinds": status.kinds,
                    "updated_at": status.updated_at,
                    "state": status.state,
                }
            )
        return json_response({"object": "list", "data": listed})

    async def document(self, request: Request) -> Response:
        """`GET /v1/documents/{path}?index=&lines=10-40`: current lines of an indexed file."""
        query, path = request.query_params, request.path_params["path"]
        unknown = sorted(set(query) - {"index", "lines"})
        if unknown:
            raise ApiError(400, f"Unknown parameter {unknown[0][:80]}. Known are index, lines.", param=unknown[0][:80])
        wanted = _LINES.fullmatch(query.get("lines", "1"))
        if wanted is None:
            raise ApiError(400, "lines is not a range. Write it as 10 or 10-40.", param="lines")
        first = max(1, int(wanted[1]))
        last = int(wanted[2]) if wanted[2] else (first if "lines" in query else _MAX_LINES)
        name, lines = await self.lines(query.get("index"), path)
        part = lines[first - 1 : min(last, first - 1 + _MAX_LINES)]
        return json_response(
            {
                "object": "document",
                "index": name,
                "path": path,
                "first_line": first,
                "last_line": first - 1 + len(part),
                "total_lines": len(lines),
                "lines": part,
            }
        )

    async def lines(self, index: str | None, path: str) -> tuple[str, list[str]]:
        """Return the name of the index, and the current lines of an indexed file.

        Raises:
            ApiError: 404 for an unknown index, or a path that is not an indexed file's.
        """
        name, indexer = self._service.index(index)
        try:
            return name, await run_in_threadpool(indexer.read_lines, path)
        except (DataError, ValueError) as error:
            known = isinstance(error, DataError)
            message = str(error) if known else "The path cannot be a file's. Use the path of a hit."
            raise ApiError(404, message, param="path", code="document_not_found") from None


def _hit(hit: Hit) -> dict[str, Any]:
    """Return a hit as JSON; where the indexed folder lies on this machine is left out."""
    fields = dataclasses.asdict(hit)
    del fields["root"]
    return fields
