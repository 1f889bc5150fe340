"""Banks of demonstrations by name: the built-in ones, and those in a folder, which requests may create and change."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from epic_rag import BankError, Demonstration, DemonstrationBank, get_task
from epic_rag.demonstrations import built_in_banks, merged_bank
from epic_rag_server.errors import ApiError
from epic_rag_server.messages import json_response, read
from epic_rag_server.schemas import BankRequest, Example, ExamplesRequest

__all__ = ["BankRoutes", "BankStore", "example_id"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_FILE = "bank.json"
_MAX_EXAMPLES = 10_000


def example_id(example: Demonstration) -> str:
    """Return a short hash of an example's texts."""
    return hashlib.sha256(f"{example.query}\0{example.passage}".encode()).hexdigest()[:12]


class BankStore:
    """Banks by name. Thread-safe.

    Args:
        folder: The folder of banks that can be changed, one folder a bank; made when the first one is created.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._loaded: dict[str, tuple[int, DemonstrationBank]] = {}
        self._built_in = built_in_banks()

    def names(self) -> list[str]:
        """Return the names of all banks, sorted."""
        own = {file.parent.name for file in self._folder.glob(f"*/{_FILE}") if _NAME.fullmatch(file.parent.name)}
        return sorted(own | set(self._built_in))

    def is_built_in(self, name: str) -> bool:
        """Return whether a bank ships with the package; such a bank cannot be changed."""
        return name in self._built_in

    def get(self, name: str) -> DemonstrationBank:
        """Return a bank; the same object until its file changes.

        Raises:
            ApiError: 404 if there is no bank of this name.
            BankError: If its file is broken.
        """
        folder = self._built_in.get(name, self._folder / name)
        try:
            if not _NAME.fullmatch(name):
                raise FileNotFoundError
            changed = (folder / _FILE).stat().st_mtime_ns
        except (OSError, ValueError):
            known = ", ".join(self.names())
            raise ApiError(
                404, f"There is no bank {name[:80]!r}. Known are {known}.", param="bank", code="bank_not_found"
            ) from None
        known_at, bank = self._loaded.get(name, (-1, None))
        if bank is None or known_at != changed:
            # An absolute path is never the name of a built-in bank.
            bank = DemonstrationBank.load(folder.absolute())
            self._loaded[name] = (changed, bank)
        return bank

    def resolve(self, names: str) -> DemonstrationBank:
        """Return the bank of a name, or several with commas between as one; see `DemonstrationBank.merge`.

        Raises:
            ApiError: 404 if there is no bank of a name, 400 if only some are symmetric.
            BankError: If a file is broken.
        """
        banks = [self.get(name.strip()) for name in names.split(",")]
        if len({bank.symmetric for bank in banks}) > 1:
            raise ApiError(400, "Banks of symmetric tasks and others are named. Name banks of one kind.", param="bank")
        return merged_bank(*banks)

    def create(
        self, name: str, examples: Sequence[Demonstration], *, task: str | None, instruction: str | None
    ) -> DemonstrationBank:
        """Create a bank.

        Raises:
            ApiError: 409 if the name is taken.
            TaskError: If the task is unknown.
            BankError: If it cannot be written.
        """
        with self._lock:
            if name in self.names():
                raise ApiError(409, f"There is a bank {name!r} already. Choose another name.", param="name")
            if task is not None:
                get_task(task)
            return self._save(name, DemonstrationBank(examples, task=task, instruction=instruction))

    def add(self, name: str, examples: Sequence[Demonstration]) -> DemonstrationBank:
        """Add examples at the end of a bank; those that it has already are not added again.

        Raises:
            ApiError: 404 if there is no such bank, 403 if it is built in, 400 if it would be too large.
            BankError: If it cannot be read or written.
        """
        with self._lock:
            bank = self._own(name)
            merged = dict.fromkeys((*bank.demonstrations, *examples))
            if len(merged) > _MAX_EXAMPLES:
                raise ApiError(400, f"A bank holds at most {_MAX_EXAMPLES:,} examples. Create another one.")
            return self._save(name, _with_examples(bank, list(merged)))

    def remove(self, name: str, example: str) -> DemonstrationBank:
        """Remove an example by its id.

        Raises:
            ApiError: 404 if there is no such bank or example, 403 if the bank is built in.
            BankError: If it cannot be read or written.
        """
        with self._lock:
            bank = self._own(name)
            kept = [row for row, each in enumerate(bank.demonstrations) if example_id(each) != example]
            if len(kept) == len(bank):
                raise ApiError(404, f"The bank {name!r} has no example {example[:80]!r}. List its examples.")
            return self._save(name, bank.subset(kept))

    def describe(self, name: str, *, examples: bool = False) -> dict[str, Any]:
        """Return a bank as JSON.

        Raises:
            ApiError: 404 if there is no such bank.
            BankError: If its file is broken.
        """
        bank = self.get(name)
        summary: dict[str, Any] = {
            "id": name,
            "object": "bank",
            "task": bank.task,
            "instruction": bank.instruction,
            "num_examples": len(bank),
            "built_in": self.is_built_in(name),
        }
        if examples:
            summary["examples"] = [
                {"id": example_id(each), "query": each.query, "passage": each.passage} for each in bank.demonstrations
            ]
        return summary

    def _own(self, name: str) -> DemonstrationBank:
        bank = self.get(name)
        if self.is_built_in(name):
            raise ApiError(403, f"The bank {name!r} ships with epic-rag. Create a bank of your own.", param="bank")
        return bank

    def _save(self, name: str, bank: DemonstrationBank) -> DemonstrationBank:
        try:
            bank.save(self._folder / name)
        except OSError as error:
            raise BankError(f"{self._folder / name} cannot be written ({error}).") from error
        self._loaded.pop(name, None)
        return bank


def _with_examples(bank: DemonstrationBank, examples: Sequence[Demonstration]) -> DemonstrationBank:
    return DemonstrationBank(
        examples, task=bank.task, instruction=bank.instruction, symmetric=bank.symmetric, origin=bank.origin
    )


class BankRoutes:
    """Handlers of the routes of banks.

    Args:
        banks: The banks.
    """

    def __init__(self, banks: BankStore) -> None:
        self._banks = banks

    def routes(self) -> list[Route]:
        """Return the routes."""
        return [
            Route("/v1/banks", self.list),
            Route("/v1/banks", self.create, methods=["POST"]),
            Route("/v1/banks/{bank}", self.show),
            Route("/v1/banks/{bank}/examples", self.add, methods=["POST"]),
            Route("/v1/banks/{bank}/examples/{example}", self.remove, methods=["DELETE"]),
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
        await run_in_threadpool(
            self._banks.create, asked.name, _pairs(asked.examples), task=asked.task, instruction=asked.instruction
        )
        return json_response(self._banks.describe(asked.name, examples=True), status=201)

    async def add(self, request: Request) -> Response:
        """`POST /v1/banks/{bank}/examples`; queries use them at once, and nothing is indexed again."""
        name, asked = request.path_params["bank"], await read(request, ExamplesRequest)
        examples = _pairs(asked.examples)
        bank = await run_in_threadpool(self._banks.add, name, examples)
        added = [example_id(each) for each in examples]
        return json_response({"object": "bank", "id": name, "num_examples": len(bank), "examples": added}, status=201)

    async def remove(self, request: Request) -> Response:
        """`DELETE /v1/banks/{bank}/examples/{example}`."""
        name = request.path_params["bank"]
        bank = await run_in_threadpool(self._banks.remove, name, request.path_params["example"])
        return json_response({"object": "bank", "id": name, "num_examples": len(bank)})


def _pairs(examples: Sequence[Example]) -> Sequence[Demonstration]:
    return [Demonstration(each.query, each.passage) for each in examples]
