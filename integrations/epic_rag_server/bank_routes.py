"""Routes of banks: list, create, show, add and remove examples, undo, expected gain."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from epic_rag import Demonstration
from epic_rag.bank_report import LEAST_PAIRS, evaluate_pairs
from epic_rag_server.banks import example_id
from epic_rag_server.messages import json_response, read
from epic_rag_server.schemas import BankRequest, EvaluationRequest, Example, ExamplesRequest, NoFields
from epic_rag_server.service import Service

if TYPE_CHECKING:
    from epic_rag import EpicEncoder
    from epic_rag.reader import DemonstrationReader

__all__ = ["BankRoutes"]


class BankRoutes:
    """Handlers of the routes of banks.

    Args:
        service: The banks, and the encoder that embeds their examples.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._banks = service.banks

    def routes(self) -> list[Route]:
        """Return the routes."""
        return [
            Route("/v1/banks", self.list),
            Route("/v1/banks", self.create, methods=["POST"]),
            Route("/v1/banks/{bank}", self.show),
            Route("/v1/banks/{bank}/examples", self.add, methods=["POST"]),
            Route("/v1/banks/{bank}/examples/{example}", self.remove, methods=["DELETE"]),
            Route("/v1/banks/{bank}/undo", self.undo, methods=["POST"]),
            Route("/v1/banks/{bank}/evaluate", self.evaluate, methods=["POST"]),
        ]

    async def list(self, request: Request) -> Response:
        """`GET /v1/banks`."""
        return json_response({"object": "list", "data": [self._banks.describe(name) for name in self._banks.names()]})

    async def show(self, request: Request) -> Response:
        """`GET /v1/banks/{bank}`: a bank with its examples."""
        return json_response(self._banks.describe(request.path_params["bank"], examples=True))

    async def create(self, request: Request) -> Response:
        """`POST /v1/banks`."""
        asked = await read(request, BankRequest)
        right, wrong = _pairs(asked.examples)
        await self._service.queue.call(
            lambda encoder: self._banks.create(
                asked.name, right, encoder, negatives=wrong, task=asked.task, instruction=asked.instruction
            )
        )
        return json_response(self._banks.describe(asked.name, examples=True), status=201)

    async def add(self, request: Request) -> Response:
        """`POST /v1/banks/{bank}/examples`; queries use them at once, and nothing is indexed again."""
        name, asked = request.path_params["bank"], await read(request, ExamplesRequest)
        right, wrong = _pairs(asked.examples)
        await self._service.queue.call(lambda encoder: self._banks.add(name, right, encoder, negatives=wrong))
        added = [example_id(Demonstration(each.query, each.passage)) for each in asked.examples]
        return json_response(_changed(self._banks.describe(name), examples=added), status=201)

    async def remove(self, request: Request) -> Response:
        """`DELETE /v1/banks/{bank}/examples/{example}`."""
        name = request.path_params["bank"]
        await run_in_threadpool(self._banks.remove, name, request.path_params["example"])
        return json_response(_changed(self._banks.describe(name)))

    async def undo(self, request: Request) -> Response:
        """`POST /v1/banks/{bank}/undo`: take back the last addition or removal."""
        name, _ = request.path_params["bank"], await read(request, NoFields)
        await self._service.queue.call(lambda encoder: self._banks.undo(name, encoder))
        return json_response(_changed(self._banks.describe(name)))

    async def evaluate(self, request: Request) -> Response:
        """`POST /v1/banks/{bank}/evaluate`: the gain to be expected in an index, by cross-validation."""
        name, asked = request.path_params["bank"], await read(request, EvaluationRequest)
        bank = self._banks.get(name)
        answer = {
            "object": "bank_evaluation",
            "id": name,
            "num_examples": len(bank),
            "num_negatives": len(bank.negatives),
            "can_undo": self._banks.can_undo(name),
        }
        if len(bank) < LEAST_PAIRS:
            text = f"{name} has {len(bank)} of the {LEAST_PAIRS} examples that an estimate of its gain needs."
            return json_response({**answer, "report": None, "description": text})

        def prepare(encoder: EpicEncoder) -> tuple[Any, DemonstrationReader | None]:
            reader = None if encoder.strategy == "task-vector" else encoder.reader
            return encoder.embedded(bank).embeddings_for(encoder.fingerprint), reader

        pairs, reader = await self._service.queue.call(prepare)
        corpus = None
        if self._service.indexes:
            _, indexer = self._service.index(asked.index)
            if await run_in_threadpool(lambda: indexer.fingerprint) == self._service.fingerprint:
                corpus = await run_in_threadpool(indexer.passage_vectors)
        report = await run_in_threadpool(
            evaluate_pairs,
            pairs,
            [each.query for each in bank.demonstrations],
            [each.passage for each in bank.demonstrations],
            reader=reader,
            corpus=corpus,
        )
        text = (
            f"Expected gain in nDCG@10 by the {report.pairs} examples of {name}: {report.gain:+.1f} (95% interval "
            f"{report.low:+.1f} to {report.high:+.1f}; cross-validated among {report.passages:,} passages). "
            f"{report.verdict}"
        )
        return json_response({**answer, "report": dataclasses.asdict(report), "description": text})


def _pairs(examples: Sequence[Example]) -> tuple[Sequence[Demonstration], Sequence[Demonstration]]:
    """Return the relevant examples, and the others."""
    right = [Demonstration(each.query, each.passage) for each in examples if each.relevant]
    return right, [Demonstration(each.query, each.passage) for each in examples if not each.relevant]


def _changed(bank: dict[str, Any], **more: Any) -> dict[str, Any]:
    kept = ("object", "id", "num_examples", "num_negatives", "can_undo")
    return {**{name: bank[name] for name in kept}, **more}
