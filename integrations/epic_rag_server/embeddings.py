"""Routes that encode texts: OpenAI's, TEI's and Cohere's embeddings, reranking by cosine, the list of models."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Sequence
from typing import Any
from uuid import uuid4

import numpy as np
import numpy.typing as npt
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from epic_rag import __version__
from epic_rag.metrics import unit_rows
from epic_rag_server.errors import ApiError
from epic_rag_server.messages import json_response, read, unless_disconnected
from epic_rag_server.schemas import (
    MAX_ITEMS,
    CohereEmbedRequest,
    EmbeddingsRequest,
    PromptFields,
    RerankRequest,
    Role,
    TeiEmbedRequest,
    TeiRerankRequest,
)
from epic_rag_server.service import Service

__all__ = ["EmbeddingRoutes"]

Vectors = npt.NDArray[np.float32]


class EmbeddingRoutes:
    """Handlers of the routes that encode texts.

    Args:
        service: The model and its queue.
        role_prefixes: Beginnings of texts that mark queries and passages, for clients that can neither send a field
            nor choose a model; removed before encoding.
    """

    def __init__(self, service: Service, role_prefixes: tuple[str, str] | None = None) -> None:
        self._service = service
        self._role_prefixes = role_prefixes
        self._created = int(time.time())

    def routes(self) -> list[Route]:
        """Return the routes."""
        return [
            Route("/v1/models", self.models),
            Route("/v1/models/{model:path}", self.model),
            Route("/v1/embeddings", self.embeddings, methods=["POST"]),
            Route("/embed", self.tei_embed, methods=["POST"]),
            Route("/info", self.info),
            Route("/rerank", self.tei_rerank, methods=["POST"]),
            Route("/v1/rerank", self.rerank, methods=["POST"]),
            Route("/v2/embed", self.cohere_embed, methods=["POST"]),
        ]

    async def models(self, request: Request) -> Response:
        """`GET /v1/models`: names, each with its role."""
        listed = [self._describe(name) for name in self._service.model_names()]
        return json_response({"object": "list", "data": listed})

    async def model(self, request: Request) -> Response:
        """`GET /v1/models/{model}`."""
        name = request.path_params["model"]
        self._service.prompt(name, None, PromptFields())
        return json_response(self._describe(name))

    async def embeddings(self, request: Request) -> Response:
        """`POST /v1/embeddings` in OpenAI's shape."""
        asked = await read(request, EmbeddingsRequest)
        role, texts = asked.input_type, asked.input
        if role is None and asked.model in (None, self._service.name):
            role, texts = self._strip_prefixes(texts)
        prompt = self._service.prompt(asked.model, role, asked)
        self._check_width(asked.dimensions, "dimensions")
        vectors, tokens = await unless_disconnected(request, self._service.encode(texts, prompt))
        rows = _encoded(_narrow(vectors, asked.dimensions), asked.encoding_format)
        return self._answer(
            {
                "object": "list",
                "data": [{"object": "embedding", "index": index, "embedding": row} for index, row in enumerate(rows)],
                "model": asked.model or self._service.name,
                "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
            }
        )

    async def tei_embed(self, request: Request) -> Response:
        """`POST /embed` in TEI's shape; `prompt_name` is query, passage, document or query@BANK."""
        asked = await read(request, TeiEmbedRequest)
        name = asked.prompt_name
        if name in (None, "passage", "document"):
            prompt = None
        elif name == "query" or str(name).startswith("query@"):
            prompt = self._service.prompt(f"{self._service.name}-{name}", None, PromptFields())
        else:
            raise ApiError(400, "Unknown prompt_name. Use query, passage or query@BANK.", param="prompt_name")
        self._check_width(asked.dimensions, "dimensions")
        vectors, _ = await unless_disconnected(request, self._service.encode(asked.inputs, prompt))
        return self._answer(list(_narrow(vectors, asked.dimensions)))

    async def cohere_embed(self, request: Request) -> Response:
        """`POST /v2/embed` in Cohere's shape."""
        asked = await read(request, CohereEmbedRequest)
        prompt = self._service.prompt(asked.model, asked.input_type, asked)
        self._check_width(asked.output_dimension, "output_dimension")
        vectors, tokens = await unless_disconnected(request, self._service.encode(asked.texts, prompt))
        vectors = _narrow(vectors, asked.output_dimension)
        return self._answer(
            {
                "id": str(uuid4()),
                "embeddings": {kind: _encoded(vectors, kind) for kind in asked.embedding_types or ["float"]},
                "texts": asked.texts,
                "meta": {"api_version": {"version": "2"}, "billed_units": {"input_tokens": tokens}},
            }
        )

    async def rerank(self, request: Request) -> Response:
        """`POST /v1/rerank` in Cohere's shape; the score is the cosine of query and document."""
        asked = await read(request, RerankRequest)
        ranked, tokens = await self._ranked(request, asked.model, asked, asked.query, asked.documents)
        results: list[dict[str, Any]] = [
            {"index": index, "relevance_score": score} for index, score in ranked[: asked.top_n]
        ]
        if asked.return_documents:
            for result in results:
                result["document"] = {"text": asked.documents[result["index"]]}
        return self._answer(
            {
                "id": str(uuid4()),
                "model": asked.model or self._service.name,
                "results": results,
                "usage": {"total_tokens": tokens},
            }
        )

    async def tei_rerank(self, request: Request) -> Response:
        """`POST /rerank` in TEI's shape; the score is the cosine of query and text."""
        asked = await read(request, TeiRerankRequest)
        ranked, _ = await self._ranked(request, None, PromptFields(), asked.query, asked.texts)
        return self._answer(
            [
                {"index": index, "score": score, **({"text": asked.texts[index]} if asked.return_text else {})}
                for index, score in ranked
            ]
        )

    async def info(self, request: Request) -> Response:
        """`GET /info` in TEI's shape."""
        service = self._service
        limits = await service.queue.call(
            lambda encoder: {
                "model_dtype": str(encoder.dtype).removeprefix("torch."),
                "max_input_length": encoder.max_document_tokens,
            }
        )
        return json_response(
            {
                "model_id": service.name,
                "model_sha": service.fingerprint,
                **limits,
                "model_type": {"embedding": {"pooling": "model"}},
                "max_batch_tokens": service.queue.batch_tokens,
                "max_client_batch_size": MAX_ITEMS,
                "dimension": service.dimension,
                "version": __version__,
            }
        )

    async def _ranked(
        self, request: Request, model: str | None, fields: PromptFields, query: str, texts: list[str]
    ) -> tuple[list[tuple[int, float]], int]:
        """Return indices and cosines of texts, best first, and the number of tokens."""
        prompt = self._service.prompt(model, "query", fields)
        (vectors, tokens), (passages, more) = await unless_disconnected(
            request, asyncio.gather(self._service.encode([query], prompt), self._service.encode(texts, None))
        )
        scores = passages @ vectors[0]
        order = np.argsort(-scores, kind="stable")
        return [(int(index), float(scores[index])) for index in order], tokens + more

    def _strip_prefixes(self, texts: list[str]) -> tuple[Role | None, list[str]]:
        roles: tuple[Role, Role] = ("query", "passage")
        for role, prefix in zip(roles, self._role_prefixes or (), strict=False):
            if all(text.startswith(prefix) for text in texts):
                return role, [text.removeprefix(prefix) for text in texts]
        return None, texts

    def _check_width(self, width: int | None, param: str) -> None:
        if width is not None and width > self._service.dimension:
            raise ApiError(400, f"{param} is {width}. Use 1 to {self._service.dimension}.", param=param)

    def _describe(self, name: str) -> dict[str, Any]:
        is_query = name.startswith(f"{self._service.name}-query")
        _, _, bank = name.rpartition("@") if is_query else ("", "", "")
        described = "queries" if is_query else "passages"
        if is_query and "@" in name:
            described += f", with the demonstrations of the bank {bank}"
        if name == self._service.name:
            described += f"; for queries use {name}-query or input_type"
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "epic-rag",
            "description": f"Encodes {described}.",
            "dimension": self._service.dimension,
            "fingerprint": self._service.fingerprint,
        }

    def _answer(self, content: Any) -> Response:
        return json_response(content, headers={"x-epic-fingerprint": self._service.fingerprint})


def _narrow(vectors: Vectors, width: int | None) -> Vectors:
    if width is None or width >= vectors.shape[1]:
        return vectors
    return np.ascontiguousarray(unit_rows(vectors[:, :width]))


def _encoded(vectors: Vectors, form: str) -> Sequence[Any]:
    """Return rows as arrays, or as base64 of little-endian float32."""
    if form == "base64":
        return [base64.b64encode(row.astype("<f4").tobytes()).decode() for row in vectors]
    return list(vectors)
