"""The prompt of each evaluation set: its instruction, and demonstrations that are none of its test texts."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from epic_rag.demonstrations import Demonstration, DemonstrationBank
from epic_rag.errors import DataError, PromptError
from epic_rag.evaluation.catalogue import TRAIN_LABELS, TRAIN_PAIRS, SetEntry
from epic_rag.evaluation.embedding import QueryPrompt
from epic_rag.evaluation.local_sets import ClassificationData, LocalSet
from epic_rag.task_vector import QueryStrategy

__all__ = ["PromptPlan", "load_demonstrations", "normalised", "plan_prompts", "training_demonstrations"]


def normalised(text: str) -> str:
    """A text without regard to case and spacing, for asking whether two texts are the same one."""
    return " ".join(text.split()).casefold()


@dataclass(frozen=True)
class PromptPlan:
    """A set's instruction and its demonstrations, from which every k takes the first k.

    Args:
        instruction: The task in words.
        source: Where the demonstrations come from, as the report names it; None when there are none.
        demonstrations: In the order in which they are used up.
        symmetric: Whether their passages are encoded like queries.
    """

    instruction: str
    source: str | None = None
    demonstrations: tuple[Demonstration, ...] = ()
    symmetric: bool = False

    def prompt(self, k: int, *, plain: bool = False, strategy: QueryStrategy = "epic") -> QueryPrompt:
        """Return the prompt with the first k demonstrations.

        Args:
            k: Number of demonstrations.
            plain: Leave the instruction out too (for models that were never trained with one).
            strategy: How demonstrations are shown.

        Raises:
            PromptError: There are fewer than k demonstrations, or `plain` and k > 0 are asked together.
        """
        if plain and k:
            raise PromptError(f"a plain model has no prompt, {k} demonstrations were asked; use k = 0 for it")
        if k > len(self.demonstrations):
            raise PromptError(
                f"{k} demonstrations were asked, {self.source or 'this set'} has {len(self.demonstrations)}; "
                "lower --num-demonstrations, or name a larger source with --bank SET=SOURCE"
            )
        if plain:
            return QueryPrompt()
        return QueryPrompt(self.instruction, self.demonstrations[:k], self.symmetric, strategy)


def training_demonstrations(
    data: ClassificationData, *, labels: bool, count: int, seed: int = 0
) -> tuple[Demonstration, ...]:
    """Draw demonstrations from a classification set's training split, one label after the other.

    Args:
        data: The set. Training texts that are also test texts are left out.
        labels: Show a text with its label's name; otherwise with another text of the same label.
        count: How many at most.
        seed: Of the draw.

    Returns:
        At most `count` demonstrations, the first ones with labels as different as possible.
    """
    test = {normalised(text) for text in data.test_texts}
    by_label: dict[int, list[str]] = {}
    for text, label in data.train:
        if text.strip() and normalised(text) not in test:
            by_label.setdefault(label, []).append(text)
    rng = random.Random(seed)
    order = sorted(by_label)
    rng.shuffle(order)
    for texts in by_label.values():
        rng.shuffle(texts)
    drawn: list[Demonstration] = []
    needed = 1 if labels else 2
    while len(drawn) < count and any(len(by_label[label]) >= needed for label in order):
        for label in order:
            texts = by_label[label]
            if len(texts) >= needed and len(drawn) < count:
                query = texts.pop()
                drawn.append(Demonstration(query, data.label_names[label] if labels else texts.pop()))
    return tuple(drawn)


def load_demonstrations(source: str, local_set: LocalSet | None, *, count: int, seed: int = 0) -> PromptPlan:
    """Return the demonstrations that a source names, with the instruction that came with them or "".

    Args:
        source: A built-in bank's name, a bank folder, a JSONL file, `train` or `train-labels`.
        local_set: The set they are for; needed for `train` and `train-labels`.
        count: How many are needed at most (only drawn sources look at it).
        seed: Of a draw from a training split.

    Raises:
        DataError: `train` was asked of a set without a training split.
    """
    if source in (TRAIN_PAIRS, TRAIN_LABELS):
        if local_set is None or not isinstance(local_set.data, ClassificationData):
            name = local_set.name if local_set else "a set of the hub"
            raise DataError(
                f'demonstrations from "{source}" were asked for {name}, which has no training split here; '
                f"name a bank with --bank {name}=BANK"
            )
        drawn = training_demonstrations(local_set.data, labels=source == TRAIN_LABELS, count=count, seed=seed)
        # Texts of one class stand on the same side; a label's name is the passage that a text asks for.
        return PromptPlan("", f"{local_set.name}/{source}", drawn, symmetric=source == TRAIN_PAIRS)
    path = Path(source)
    bank = DemonstrationBank.from_jsonl(path) if path.is_file() else DemonstrationBank.load(source)
    return PromptPlan(bank.instruction or "", source, bank.demonstrations, bank.symmetric)


def plan_prompts(
    local_set: LocalSet,
    entry: SetEntry,
    *,
    max_k: int,
    instructions: Mapping[str, str] | None = None,
    banks: Mapping[str, str] | None = None,
    seed: int = 0,
) -> PromptPlan:
    """Settle a local set's instruction and demonstrations.

    Args:
        local_set: The set.
        entry: Its entry in the catalogue.
        max_k: The most demonstrations that will be asked for; with 0 no source is opened.
        instructions: Instructions by set name that take precedence over the catalogue's.
        banks: Sources by set name that take precedence over the catalogue's.
        seed: Of a draw from a training split.

    Raises:
        DataError: A demonstration is one of the set's test texts.
    """
    instruction = (instructions or {}).get(local_set.name, entry.instruction)
    source = (banks or {}).get(local_set.name, entry.demonstrations)
    if max_k == 0 or source is None:
        return PromptPlan(instruction)
    found = load_demonstrations(source, local_set, count=max_k, seed=seed)
    test = {normalised(text) for text in local_set.data.test_texts}
    for demonstration in found.demonstrations:
        for text in (demonstration.query, demonstration.passage):
            if normalised(text) in test:
                raise DataError(
                    f'"{text}" is a demonstration of {found.source} and a test text of {local_set.name}, '
                    f"its score would mean nothing; name another source: --bank {local_set.name}=SOURCE"
                )
    return replace(found, instruction=instruction)
