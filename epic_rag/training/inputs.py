"""Forward passes of a step: rows in chunks of like length, slots filled from a table of vectors, autocast."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch

from epic_rag.backbone import Backbone
from epic_rag.batching import token_batches
from epic_rag.prompt import Batch, EncoderInput, Prefix, PromptBuilder, Strategy, collate
from epic_rag.training.config import TrainingConfig
from epic_rag.training.data import Pair, TaskRows, TrainingBatch
from epic_rag.training.losses import asked_elsewhere, negatives_mask, own_negatives

__all__ = ["Forward", "SlotTable", "StepInputs", "build_inputs", "draw_negatives", "zero_shot_rows"]


# --- from _inputs
# What a step feeds the model: token ids of its three groups of rows, and which vectors fill which slots.


@dataclass(frozen=True)
class StepInputs:
    """The rows of a step.

    Attributes:
        pairs: Pairs of the batch.
        counted: Documents that the loss compares queries with: the positives, then the hard negatives.
        queries: Zero-shot queries: one a pair, then those of a bank's demonstrations.
        documents: `counted` documents, then the passages of a bank's demonstrations.
        prompted: The pairs' queries with demonstrations; empty for strategy "none".
        shown: For each of `prompted`, which of [queries; documents] fill its slots.
        mask: (pairs, counted) bool, True where a document is no negative of a query.
        elsewhere: (pairs, counted) bool, True where a document answers the query under another task of the batch.
        bare: (pairs, 1) bool, True for rows of `prompted` that show nothing.
        own: (pairs, counted) bool, True at a row's own hard negatives.
        mismatched: Rows whose demonstrations are deliberately wrong.
    """

    pairs: int
    counted: int
    queries: list[EncoderInput]
    documents: list[EncoderInput]
    prompted: list[EncoderInput]
    shown: list[list[int]]
    mask: torch.Tensor
    elsewhere: torch.Tensor
    bare: torch.Tensor
    own: torch.Tensor
    mismatched: tuple[int, ...] = ()

    @property
    def tokens(self) -> int:
        """Real tokens of all rows, padding not counted."""
        return sum(len(row.ids) for rows in (self.queries, self.documents, self.prompted) for row in rows)


def build_inputs(
    batch: TrainingBatch,
    prompt: PromptBuilder,
    config: TrainingConfig,
    bank: Sequence[Sequence[Pair]] | None = None,
) -> StepInputs:
    """The model's input for a batch.

    Args:
        batch: The pairs, with the positions of their demonstrations.
        prompt: Tokenizer, template and limits.
        config: The run.
        bank: For each of the batch's tasks what its rows are shown; None for other rows of the batch.
    """
    strategy = cast("Strategy", config.strategy)
    queries, documents = zero_shot_rows(batch, prompt)
    pairs, counted = len(queries), len(documents)
    texts = [row.query for task in batch.tasks for row in task.rows]
    passages = [row.positive for task in batch.tasks for row in task.rows]
    prompted: list[EncoderInput] = []
    shown: list[list[int]] = []
    bare: list[bool] = []
    if strategy != "none":
        extra = _with_bank(batch, prompt, bank, queries, documents) if bank is not None else None
        prefixes: dict[tuple[str | None, int], Prefix] = {}
        offset = 0
        for part, task in enumerate(batch.tasks):
            for index, row in enumerate(task.rows):
                if bank is not None and extra is not None:
                    demonstrations = [(pair.query, pair.positive) for pair in bank[part]]
                    positions = extra[part]
                else:
                    chosen = _chosen(task, index, offset)
                    demonstrations = [(texts[query], passages[document]) for query, document in chosen]
                    positions = [at for query, document in chosen for at in (query, len(queries) + document)]
                if strategy == "epic":
                    key = (task.instruction, len(demonstrations))
                    if key not in prefixes:
                        prefixes[key] = prompt.prefix(task.instruction, num_slots=len(demonstrations))
                    prefix = prefixes[key]
                else:
                    prefix = prompt.prefix(task.instruction, demonstrations=demonstrations, strategy=strategy)
                prompted.extend(prompt.queries(prefix, [row.query]))
                shown.append(positions if strategy == "epic" else [])
                bare.append(not demonstrations)
            offset += len(task.rows)
    return StepInputs(
        pairs=pairs,
        counted=counted,
        queries=queries,
        documents=documents,
        prompted=prompted,
        shown=shown,
        mask=negatives_mask(batch, config),
        elsewhere=asked_elsewhere(batch),
        bare=torch.tensor(bare, dtype=torch.bool).unsqueeze(1),
        own=own_negatives(batch),
        mismatched=_mismatched(batch) if bank is None else (),
    )


def zero_shot_rows(
    batch: TrainingBatch, prompt: PromptBuilder, *, instructions: bool = True
) -> tuple[list[EncoderInput], list[EncoderInput]]:
    """The batch's queries and documents without demonstrations.

    Args:
        batch: The pairs.
        prompt: Tokenizer, template and limits.
        instructions: Whether queries get their task's instruction.

    Returns:
        Queries, one a pair; documents: one positive a pair, then all hard negatives, pair by pair.
    """
    queries: list[EncoderInput] = []
    documents: list[EncoderInput] = []
    for task in batch.tasks:
        prefix = prompt.prefix(task.instruction if instructions else None)
        queries.extend(prompt.queries(prefix, [row.query for row in task.rows]))
        documents.extend(_passages(prompt, task, prefix, [row.positive for row in task.rows]))
    for task in batch.tasks:
        # Like the positives, or the way of encoding alone would tell the two apart.
        negatives = [text for row in task.rows for text in row.negatives]
        documents.extend(_passages(prompt, task, prompt.prefix(task.instruction if instructions else None), negatives))
    return queries, documents


def draw_negatives(batch: TrainingBatch, count: int, seed: int, step: int) -> TrainingBatch:
    """The batch with at most `count` hard negatives a row, a draw that seed and step decide."""
    rng = random.Random(f"{seed}-{step}-negatives")

    def drawn(row: Pair) -> Pair:
        if len(row.negatives) <= count:
            return row
        return replace(row, negatives=tuple(rng.sample(row.negatives, count)))

    return replace(
        batch, tasks=tuple(replace(task, rows=tuple(drawn(row) for row in task.rows)) for task in batch.tasks)
    )


def _chosen(task: TaskRows, index: int, offset: int) -> list[tuple[int, int]]:
    """Positions in the whole batch of a row's demonstrations: query, positive."""
    if task.mismatched and task.mismatched[index]:
        return list(task.mismatched[index])
    return [(offset + other, offset + other) for other in task.demonstrations[index]]


def _mismatched(batch: TrainingBatch) -> tuple[int, ...]:
    """Positions in the whole batch of the rows whose demonstrations are wrong."""
    wrong = [
        bool(task.mismatched) and bool(task.mismatched[index])
        for task in batch.tasks
        for index in range(len(task.rows))
    ]
    return tuple(row for row, flag in enumerate(wrong) if flag)


def _with_bank(
    batch: TrainingBatch,
    prompt: PromptBuilder,
    bank: Sequence[Sequence[Pair]],
    queries: list[EncoderInput],
    documents: list[EncoderInput],
) -> list[list[int]]:
    """Add the bank's demonstrations to the rows; for each task the positions of its own in [queries; documents]."""
    starts = []
    for task, pairs in zip(batch.tasks, bank, strict=True):
        prefix = prompt.prefix(task.instruction)
        starts.append((len(queries), len(documents)))
        queries.extend(prompt.queries(prefix, [pair.query for pair in pairs]))
        documents.extend(_passages(prompt, task, prefix, [pair.positive for pair in pairs]))
    return [
        [at for index in range(len(pairs)) for at in (query + index, len(queries) + document + index)]
        for (query, document), pairs in zip(starts, bank, strict=True)
    ]


def _passages(prompt: PromptBuilder, task: TaskRows, prefix: Prefix, texts: Sequence[str]) -> list[EncoderInput]:
    """Positives as the model reads them: bare, or like queries in a symmetric task."""
    return prompt.queries(prefix, texts) if task.symmetric else prompt.documents(texts)


@dataclass(frozen=True)
class SlotTable:
    """What goes into the slots of some rows.

    Attributes:
        vectors: (vectors, dim) all that may be shown: the batch's queries and then its documents.
        shown: For each row, the positions in `vectors` that fill its slots, in order (query, passage, query, ...).
    """

    vectors: torch.Tensor
    shown: Sequence[Sequence[int]]

    def take(self, rows: Sequence[int]) -> torch.Tensor:
        """(slots, dim) the vectors of some rows' slots, row by row."""
        wanted = torch.tensor([position for row in rows for position in self.shown[row]], dtype=torch.long)
        return self.vectors.index_select(0, wanted.to(self.vectors.device))


class Forward:
    """Embeds rows in training.

    Args:
        backbone: The model.
        pad_id: Token id of the padding.
        max_tokens: Most padded tokens in one forward pass.
        dtype: What matrix products are computed in; float32 for no autocast.
    """

    def __init__(self, backbone: Backbone, *, pad_id: int, max_tokens: int, dtype: torch.dtype = torch.float32) -> None:
        self.backbone = backbone
        self.pad_id = pad_id
        self.max_tokens = max_tokens
        self.dtype = dtype

    def __call__(self, rows: Sequence[EncoderInput], slots: SlotTable | None = None) -> torch.Tensor:
        """(rows, dim) float32 unit vectors in order, with the graphs of all chunks."""
        chunks = self.chunks(rows, range(len(rows)))
        return self.in_order([self.chunk(rows, chunk, slots) for chunk in chunks], chunks, len(rows))

    def chunks(self, rows: Sequence[EncoderInput], share: Sequence[int]) -> list[list[int]]:
        """Positions of some of the rows, in chunks of at most `max_tokens` padded tokens."""
        batches = token_batches([len(rows[index].ids) for index in share], max_tokens=self.max_tokens)
        return [[share[index] for index in batch] for batch in batches]

    def chunk(self, rows: Sequence[EncoderInput], chunk: Sequence[int], slots: SlotTable | None = None) -> torch.Tensor:
        """(chunk, dim) float32 unit vectors of some rows, in one forward pass."""
        device = self.backbone.device
        batch = _moved(collate([rows[index] for index in chunk], pad_id=self.pad_id), device)
        with torch.autocast(device.type, dtype=self.autocast_dtype, enabled=self.dtype != torch.float32):
            vectors: torch.Tensor = self.backbone(batch, None if slots is None else slots.take(chunk))
        return vectors

    def pooled(self, rows: Sequence[EncoderInput]) -> torch.Tensor:
        """(rows, width) float32 states behind the pooling, in order: what a head is given."""
        chunks = self.chunks(rows, range(len(rows)))
        parts = []
        for chunk in chunks:
            batch = _moved(collate([rows[index] for index in chunk], pad_id=self.pad_id), self.backbone.device)
            with torch.autocast(batch.ids.device.type, dtype=self.autocast_dtype, enabled=self.dtype != torch.float32):
                parts.append(self.backbone(batch, pooled_only=True))
        order = torch.tensor([index for chunk in chunks for index in chunk])
        return torch.cat(parts)[order.argsort().to(parts[0].device)]

    @property
    def autocast_dtype(self) -> torch.dtype:
        """A dtype that autocast takes, whether it is on or not."""
        return torch.bfloat16 if self.dtype == torch.float32 else self.dtype

    def in_order(self, parts: Sequence[torch.Tensor], chunks: Sequence[Sequence[int]], count: int) -> torch.Tensor:
        """(count, dim) the chunks' vectors at their rows' positions; every row must be in a chunk."""
        if not parts:
            return torch.zeros((count, self.backbone.dimension), device=self.backbone.device)
        order = torch.tensor([index for chunk in chunks for index in chunk])
        return torch.cat(list(parts))[order.argsort().to(parts[0].device)]


def _moved(batch: Batch, device: torch.device) -> Batch:
    """The batch on the model's device; a GPU copies from pinned memory while the CPU goes on."""
    if device.type != "cuda":
        return batch.to(device)
    tensors = (getattr(batch, name) for name in batch.__dataclass_fields__)
    return Batch(*(tensor.pin_memory().to(device, non_blocking=True) for tensor in tensors))
