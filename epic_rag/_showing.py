"""Model inputs of queries behind demonstrations, as vectors or as texts."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from epic_rag.demonstrations import DemonstrationBank, Selection
from epic_rag.prompt import EncoderInput, Prefix, PromptBuilder, Strategy
from epic_rag.task_vector import QueryStrategy

if TYPE_CHECKING:
    from epic_rag.encoder import EpicEncoder

__all__ = ["count_shown", "rows_behind", "rows_to_choose_by"]


logger = logging.getLogger(__name__)


def count_shown(encoder: EpicEncoder, bank: DemonstrationBank, asked: int | None, strategy: QueryStrategy) -> int:
    """How many demonstrations of a bank to show: as many as were asked for, or as many as the encoder can use."""
    if strategy == "task-vector":  # a mean has no length that was trained
        return len(bank) if asked is None else asked
    trained = int(encoder.settings.get("max_demonstrations") or len(bank))
    if asked is None:
        return min(len(bank), trained)
    if asked > trained:
        logger.warning("asked for %d demonstrations, %s was trained with up to %d", asked, encoder.name, trained)
    return asked


def rows_to_choose_by(
    prompt: PromptBuilder, texts: Sequence[str], instruction: str | None, selection: Selection
) -> list[EncoderInput]:
    """The queries' rows without demonstrations, if these are chosen for each query; else none."""
    if selection not in ("nearest", "nearest-early"):
        return []
    return prompt.queries(prompt.prefix(instruction), texts)


def rows_behind(
    prompt: PromptBuilder,
    banks: Sequence[DemonstrationBank],
    texts: Sequence[str],
    zero_shot: Sequence[EncoderInput],
    instruction: str | None,
    strategy: Strategy,
    fingerprint: str,
) -> tuple[list[EncoderInput], list[torch.Tensor] | None]:
    """Each text behind its own bank's demonstrations; all banks have one size.

    Args:
        prompt: Makes the rows.
        banks: A bank for each text.
        texts: The queries.
        zero_shot: The texts' rows without demonstrations if they are tokenised already, or none.
        instruction: What stands before everything.
        strategy: "epic" for vectors, else texts.
        fingerprint: The encoder's.

    Returns:
        The rows, and for "epic" each row's (2k, dim) slot vectors: one tensor for a bank that is shown to all, which
        is how it is seen that the prompt is shared.

    Raises:
        PromptError: If the prompt does not fit.
        FingerprintError: If a bank has no vectors of this encoder.
    """
    if strategy == "epic":
        prefix = prompt.prefix(instruction, num_slots=len(banks[0]))
        tokenised = bool(zero_shot) and bool(instruction)
        rows = prompt.behind(prefix, zero_shot) if tokenised else prompt.queries(prefix, texts)
        vectors = {id(bank): torch.from_numpy(bank.require(fingerprint)).flatten(0, 1) for bank in banks}
        return rows, [vectors[id(bank)] for bank in banks]
    prefixes: dict[int, Prefix] = {}
    rows = []
    for bank, text in zip(banks, texts, strict=True):
        if id(bank) not in prefixes:
            pairs = [(item.query, item.passage) for item in bank.demonstrations]
            prefixes[id(bank)] = prompt.prefix(instruction, demonstrations=pairs, strategy=strategy)
        rows.extend(prompt.queries(prefixes[id(bank)], [text]))
    return rows, None
