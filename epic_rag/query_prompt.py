"""The prompt of a query: an instruction, demonstrations, and how the encoder takes them.

A `QueryPrompt` is made once, by a command, an integration or a caller, and passed on to `EpicEncoder.encode_query`.
Importing this module loads neither torch nor transformers.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, TypedDict, get_args

from epic_rag.errors import ConfigError, PromptError
from epic_rag.tasks import get_task

if TYPE_CHECKING:
    from epic_rag.demonstrations import DemonstrationBank, Selection

    OneBank = DemonstrationBank | str | os.PathLike[str]

__all__ = ["QUERY_STRATEGIES", "PromptSettings", "QueryPrompt", "QueryStrategy"]

QueryStrategy = Literal["reader", "task-vector", "epic", "text"]
"""Way of demonstrations to a query: moving its vector, or before it in the prompt as embeddings or as texts."""
QUERY_STRATEGIES: tuple[QueryStrategy, ...] = get_args(QueryStrategy)


class PromptSettings(TypedDict, total=False):
    """The fields of `QueryPrompt` as keyword arguments."""

    task: str | None
    bank: OneBank | Sequence[OneBank] | None
    instruction: str | None
    num_demonstrations: int | None
    strategy: QueryStrategy | None
    selection: Selection


@dataclass(frozen=True)
class QueryPrompt:
    """An instruction and demonstrations for queries.

    The instruction is the first of these that is given: `instruction`, that of `task`, that of `bank`, the
    checkpoint's default.

    Args:
        task: Name of a known task, for its instruction.
        bank: Demonstrations: a bank, a bank folder, the name of a built-in bank, or several of them, whose
            demonstrations are used together with the first one's instruction.
        instruction: An instruction in words; "" for none at all.
        num_demonstrations: How many demonstrations of `bank` to use. None uses all, or none of a bank that is off;
            before a query in the prompt, at most as many as the checkpoint was trained with. 0 uses none.
        strategy: "reader" moves the query's vector by what the demonstrations show about queries like it,
            "task-vector" by the mean difference of passages and queries, "epic" puts the demonstrations' embeddings
            before the query, "text" their texts. None takes the checkpoint's default.
        selection: Which demonstrations are used: the "first" ones, "random" ones (seed 0), the most "diverse" ones,
            or those "nearest" to each query.

    Raises:
        PromptError: If the strategy or the selection is unknown, or the number is negative or has no bank.
    """

    task: str | None = None
    bank: OneBank | Sequence[OneBank] | None = None
    instruction: str | None = None
    num_demonstrations: int | None = None
    strategy: QueryStrategy | None = None
    selection: Selection = "first"

    def __post_init__(self) -> None:
        if self.strategy is not None and self.strategy not in QUERY_STRATEGIES:
            raise PromptError(f"Unknown strategy {self.strategy!r}. Choose one of {', '.join(QUERY_STRATEGIES)}.")
        if self.selection != "first":
            from epic_rag.demonstrations import check_selection

            check_selection(self.selection)
        number = self.num_demonstrations
        if number is not None and number < 0:
            raise PromptError(f"num_demonstrations is {number}. Use 0 or more.")
        if number and self.bank is None:
            raise PromptError(
                f"num_demonstrations is {number}, but there is no bank. Pass a bank, for instance 'docs'."
            )

    @classmethod
    def of(cls, prompt: QueryPrompt | None, settings: PromptSettings) -> QueryPrompt:
        """Return `prompt`, or one made of keyword settings.

        Raises:
            ConfigError: If both are given, or a setting is unknown.
        """
        if prompt is None:
            unknown = ", ".join(sorted(set(settings) - set(PromptSettings.__annotations__)))
            if unknown:
                raise ConfigError(f"Unknown setting {unknown}. Known are {', '.join(PromptSettings.__annotations__)}.")
            return cls(**settings)
        if settings:
            raise ConfigError(f"Both a prompt and {', '.join(settings)} are given. Put them into the prompt.")
        return prompt

    def without_demonstrations(self) -> QueryPrompt:
        """Return the prompt with the same instruction and no demonstrations."""
        return replace(self, num_demonstrations=0)

    def resolve_bank(self) -> DemonstrationBank | None:
        """Load the bank, if demonstrations or its instruction are needed; several become one.

        Raises:
            BankError: If the bank is missing or malformed, or banks do not fit together.
        """
        from epic_rag.demonstrations import DemonstrationBank, merged_bank

        if self.bank is None or isinstance(self.bank, DemonstrationBank):
            return self.bank
        if isinstance(self.bank, (str, os.PathLike)):
            return DemonstrationBank.load(self.bank)
        loaded = [bank if isinstance(bank, DemonstrationBank) else DemonstrationBank.load(bank) for bank in self.bank]
        return merged_bank(*loaded)

    def is_symmetric(self, bank: DemonstrationBank | None) -> bool:
        """Return True if the task, or without one the bank, is about texts of one kind.

        Args:
            bank: The loaded bank.

        Raises:
            TaskError: If the task is unknown.
        """
        if self.task is not None:
            return get_task(self.task).symmetric
        return bank is not None and bank.symmetric

    def is_bare(self, bank: DemonstrationBank | None) -> bool:
        """Return True for texts of one kind without an instruction in words: some models read them as documents.

        Args:
            bank: The loaded bank.

        Raises:
            TaskError: If the task is unknown.
        """
        return self.instruction is None and self.is_symmetric(bank)

    def resolve_instruction(self, bank: DemonstrationBank | None, default: str | None) -> str | None:
        """Return the instruction that holds.

        Args:
            bank: The loaded bank.
            default: The checkpoint's default instruction.

        Raises:
            TaskError: If the task is unknown.
        """
        of_task = None if self.task is None else get_task(self.task).instruction
        if self.instruction is not None:
            return self.instruction
        if of_task is not None:
            return of_task
        return default if bank is None or bank.instruction is None else bank.instruction
