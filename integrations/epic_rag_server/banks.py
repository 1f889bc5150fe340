"""Banks of demonstrations by name: the built-in ones, and those in a folder, which requests may create and change."""

from __future__ import annotations

import hashlib
import re
import threading
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from epic_rag import BankError, Demonstration, DemonstrationBank, get_task
from epic_rag.demonstrations import built_in_banks, merged_bank
from epic_rag_server.errors import ApiError

if TYPE_CHECKING:
    from epic_rag.demonstrations import BankEncoder

__all__ = ["BankStore", "example_id"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_FILE = "bank.json"
_MAX_EXAMPLES = 10_000
_MOST_UNDONE = 100

_Texts: TypeAlias = tuple[tuple[Demonstration, ...], tuple[Demonstration, ...]]


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
        # Texts before and after each change, so that a change by another program is noticed.
        self._history: dict[str, deque[tuple[_Texts, _Texts]]] = {}

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
        self,
        name: str,
        examples: Sequence[Demonstration],
        *encoders: BankEncoder,
        negatives: Sequence[Demonstration] = (),
        task: str | None,
        instruction: str | None,
    ) -> DemonstrationBank:
        """Create a bank.

        Args:
            name: Its name.
            examples: Its pairs.
            encoders: Encoders whose vectors it gets.
            negatives: Pairs of a query and a passage that does not answer it.
            task: Its task.
            instruction: Its instruction; None for that of the task.

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
            empty = DemonstrationBank([], task=task, instruction=instruction, negatives=negatives)
            self._history.pop(name, None)
            return self._save(name, empty.add(examples, *encoders))

    def add(
        self,
        name: str,
        examples: Sequence[Demonstration],
        *encoders: BankEncoder,
        negatives: Sequence[Demonstration] = (),
    ) -> DemonstrationBank:
        """Add examples at the end of a bank; those that it has already are not added again.

        A pair cannot be both: an example replaces a negative of the same texts, and a negative an example.

        Args:
            name: The bank.
            examples: Pairs of a query and a passage that answers it.
            encoders: Encoders that embed them; vectors of others are dropped.
            negatives: Pairs of a query and a passage that does not answer it.

        Raises:
            ApiError: 404 if there is no such bank, 403 if it is built in, 400 if it would be too large.
            BankError: If it cannot be read or written.
        """
        with self._lock:
            bank = self._own(name)
            refused = set(negatives)
            kept = bank.subset([row for row, each in enumerate(bank.demonstrations) if each not in refused])
            changed = kept.add([each for each in examples if each not in refused], *encoders)
            added = set(examples)
            changed = changed.with_negatives([*(each for each in bank.negatives if each not in added), *negatives])
            if len(changed) + len(changed.negatives) > _MAX_EXAMPLES:
                raise ApiError(400, f"A bank holds at most {_MAX_EXAMPLES:,} examples. Create another one.")
            return self._change(name, bank, changed)

    def remove(self, name: str, example: str) -> DemonstrationBank:
        """Remove an example or a negative by its id.

        Raises:
            ApiError: 404 if there is no such bank or example, 403 if the bank is built in.
            BankError: If it cannot be read or written.
        """
        with self._lock:
            bank = self._own(name)
            kept = [row for row, each in enumerate(bank.demonstrations) if example_id(each) != example]
            negatives = [each for each in bank.negatives if example_id(each) != example]
            if len(kept) == len(bank) and len(negatives) == len(bank.negatives):
                raise ApiError(404, f"The bank {name!r} has no example {example[:80]!r}. List its examples.")
            return self._change(name, bank, bank.subset(kept).with_negatives(negatives))

    def undo(self, name: str, *encoders: BankEncoder) -> DemonstrationBank:
        """Take back the last addition or removal that this process made in a bank.

        Raises:
            ApiError: 404 if there is no such bank, 403 if it is built in, 409 if there is nothing to take back, or
                another program has changed the bank since.
            BankError: If it cannot be read or written.
        """
        with self._lock:
            bank = self._own(name)
            history = self._history.get(name)
            if not history:
                raise ApiError(409, f"There is nothing to undo in the bank {name!r}. Remove examples by their ids.")
            before, after = history[-1]
            if after != _texts(bank):
                del self._history[name]
                raise ApiError(409, f"Another program has changed the bank {name!r}. Remove examples by their ids.")
            pairs, negatives = before
            wanted = set(pairs)
            kept = bank.subset([row for row, each in enumerate(bank.demonstrations) if each in wanted])
            restored = kept.add(pairs, *encoders)
            places = {each: row for row, each in enumerate(restored.demonstrations)}
            history.pop()
            return self._save(name, restored.subset([places[each] for each in pairs]).with_negatives(negatives))

    def can_undo(self, name: str) -> bool:
        """Return whether this process has changed a bank and can take it back."""
        return bool(self._history.get(name))

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
            "num_negatives": len(bank.negatives),
            "built_in": self.is_built_in(name),
            "can_undo": self.can_undo(name),
        }
        if examples:
            summary["examples"] = [
                {"id": example_id(each), "query": each.query, "passage": each.passage, "relevant": relevant}
                for relevant, pairs in ((True, bank.demonstrations), (False, bank.negatives))
                for each in pairs
            ]
        return summary

    def _own(self, name: str) -> DemonstrationBank:
        bank = self.get(name)
        if self.is_built_in(name):
            raise ApiError(403, f"The bank {name!r} ships with epic-rag. Create a bank of your own.", param="bank")
        return bank

    def _change(self, name: str, before: DemonstrationBank, after: DemonstrationBank) -> DemonstrationBank:
        if _texts(before) == _texts(after):
            return before
        saved = self._save(name, after)
        self._history.setdefault(name, deque(maxlen=_MOST_UNDONE)).append((_texts(before), _texts(after)))
        return saved

    def _save(self, name: str, bank: DemonstrationBank) -> DemonstrationBank:
        try:
            bank.save(self._folder / name)
        except OSError as error:
            raise BankError(f"{self._folder / name} cannot be written ({error}).") from error
        self._loaded.pop(name, None)
        return bank


def _texts(bank: DemonstrationBank) -> _Texts:
    return bank.demonstrations, bank.negatives
