"""Inputs of a step and their forward passes: token ids, slots and masks; vectors in length-sorted chunks."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from epic_rag.backbone import Backbone
from epic_rag.batching import token_batches
from epic_rag.prompt import Batch, EncoderInput, Prefix, PromptBuilder, collate
from epic_rag.training.config import TrainingConfig
from epic_rag.training.data import Pair, TaskRows, TrainingBatch

__all__ = [
    "Forward",
    "SlotTable",
    "StepInputs",
    "build_inputs",
    "draw_hard_negatives",
    "false_negatives",
    "hard_negatives_mask",
    "negatives_mask",
    "with_frozen_documents",
    "zero_shot_rows",
]


@dataclass(frozen=True)
class StepInputs:
    """The rows of a step.

    Attributes:
        pairs: Number of pairs in the batch.
        counted: Number of documents in the loss: the positives, then the hard negatives.
        queries: Zero-shot queries: one a pair, then those of a bank's demonstrations.
        documents: `counted` documents, then the passages of a bank's demonstrations.
        prompted: The pairs' queries with demonstrations; empty for strategy "none".
        shown: For each of `prompted`, the positions in [queries; documents] that fill its slots.
        mask: (pairs, counted) bool, True where a document is not a negative of a query.
        hard: (pairs, counted) bool, True at a row's own hard negatives.
        document_vectors: (counted, dim) vectors of documents that are not trained; None if `documents` are encoded.
    """

    pairs: int
    counted: int
    queries: list[EncoderInput]
    documents: list[EncoderInput]
    prompted: list[EncoderInput]
    shown: list[list[int]]
    mask: torch.Tensor
    hard: torch.Tensor
    document_vectors: torch.Tensor | None = None

    @property
    def tokens(self) -> int:
        """Number of tokens in all rows, without padding."""
        return sum(len(row.ids) for rows in (self.queries, self.documents, self.prompted) for row in rows)


def build_inputs(
    batch: TrainingBatch,
    prompt: PromptBuilder,
    config: TrainingConfig,
    bank: Sequence[Sequence[Pair]] | None = None,
) -> StepInputs:
    """Tokenize a batch.

    Args:
        batch: The pairs, with the positions of their demonstrations.
        prompt: Tokenizer, template and limits.
        config: The run.
        bank: For each of the batch's tasks the demonstrations of all its rows; None for other rows of the batch.
    """
    queries, documents = zero_shot_rows(batch, prompt, symmetric_as_documents=config.symmetric_as_documents)
    pairs, counted = len(queries), len(documents)
    prompted: list[EncoderInput] = []
    shown: list[list[int]] = []
    if config.strategy != "none":
        bank_positions = _append_bank(batch, prompt, bank, queries, documents) if bank is not None else []
        prefixes: dict[tuple[str | None, int], Prefix] = {}
        offset = 0
        for part, task in enumerate(batch.tasks):
            for index, row in enumerate(task.rows):
                if bank is not None:
                    demonstrations, positions = list(bank[part]), bank_positions[part]
                else:
                    chosen = task.demonstrations[index]
                    demonstrations = [task.rows[other] for other in chosen]
                    positions = [at for other in chosen for at in (offset + other, len(queries) + offset + other)]
                if config.strategy == "epic":
                    key = (task.instruction, len(demonstrations))
                    if key not in prefixes:
                        prefixes[key] = prompt.prefix(task.instruction, num_slots=len(demonstrations))
                    prefix = prefixes[key]
                else:
                    texts = [(pair.query, pair.positive) for pair in demonstrations]
                    prefix = prompt.prefix(task.instruction, demonstrations=texts, strategy=config.strategy)
                prompted.extend(prompt.queries(prefix, [row.query]))
                shown.append(positions if config.strategy == "epic" else [])
            offset += len(task.rows)
    return StepInputs(
        pairs=pairs,
        counted=counted,
        queries=queries,
        documents=documents,
        prompted=prompted,
        shown=shown,
        mask=negatives_mask(batch, config),
        hard=hard_negatives_mask(batch),
    )


def zero_shot_rows(
    batch: TrainingBatch, prompt: PromptBuilder, *, instructions: bool = True, symmetric_as_documents: bool = False
) -> tuple[list[EncoderInput], list[EncoderInput]]:
    """Tokenize the batch's queries and documents without demonstrations.

    Args:
        batch: The pairs.
        prompt: Tokenizer, template and limits.
        instructions: True to give queries their task's instruction.
        symmetric_as_documents: True to read both sides of symmetric tasks as documents.

    Returns:
        Queries, one a pair; documents: one positive a pair, then all hard negatives, pair by pair.
    """
    queries: list[EncoderInput] = []
    positives: list[EncoderInput] = []
    negatives: list[EncoderInput] = []
    for task in batch.tasks:
        texts = [row.query for row in task.rows]
        if task.symmetric and symmetric_as_documents:
            queries.extend(prompt.symmetric(texts))
            positives.extend(prompt.symmetric([row.positive for row in task.rows]))
            negatives.extend(prompt.symmetric([text for row in task.rows for text in row.negatives]))
            continue
        prefix = prompt.prefix(task.instruction if instructions else None)
        queries.extend(prompt.queries(prefix, texts))
        positives.extend(_documents(prompt, task, prefix, [row.positive for row in task.rows]))
        # Encoded like the positives, or the two could be told apart by their encoding.
        negatives.extend(_documents(prompt, task, prefix, [text for row in task.rows for text in row.negatives]))
    return queries, [*positives, *negatives]


def _documents(prompt: PromptBuilder, task: TaskRows, prefix: Prefix, texts: Sequence[str]) -> list[EncoderInput]:
    return prompt.queries(prefix, texts) if task.symmetric else prompt.documents(texts)


def _append_bank(
    batch: TrainingBatch,
    prompt: PromptBuilder,
    bank: Sequence[Sequence[Pair]],
    queries: list[EncoderInput],
    documents: list[EncoderInput],
) -> list[list[int]]:
    """Append the bank's demonstrations to the rows; return their positions in [queries; documents], by task."""
    starts = []
    for task, pairs in zip(batch.tasks, bank, strict=True):
        prefix = prompt.prefix(task.instruction)
        starts.append((len(queries), len(documents)))
        queries.extend(prompt.queries(prefix, [pair.query for pair in pairs]))
        documents.extend(_documents(prompt, task, prefix, [pair.positive for pair in pairs]))
    return [
        [at for index in range(len(pairs)) for at in (query + index, len(queries) + document + index)]
        for (query, document), pairs in zip(starts, bank, strict=True)
    ]


def draw_hard_negatives(batch: TrainingBatch, count: int, seed: int, step: int) -> TrainingBatch:
    """Return the batch with at most `count` hard negatives a row, drawn by seed and step."""
    rng = random.Random(f"{seed}-{step}-negatives")

    def drawn(row: Pair) -> Pair:
        if len(row.negatives) <= count:
            return row
        return replace(row, negatives=tuple(rng.sample(row.negatives, count)))

    return TrainingBatch(tuple(replace(task, rows=tuple(map(drawn, task.rows))) for task in batch.tasks))


def negatives_mask(batch: TrainingBatch, config: TrainingConfig) -> torch.Tensor:
    """Return `false_negatives`, plus every other row's document in tasks without in-batch negatives."""
    mask = false_negatives(batch)
    alone = [
        task.name in config.tasks and not config.tasks[task.name].in_batch_negatives
        for task in batch.tasks
        for _ in task.rows
    ]
    if any(alone):
        mask |= torch.tensor(alone).unsqueeze(1) & ~hard_negatives_mask(batch)
    return mask


def false_negatives(batch: TrainingBatch) -> torch.Tensor:
    """Mark the documents that are not negatives of a query.

    Columns are the batch's positives, row by row, and then its hard negatives. Excluded for a row are the texts of its
    positive, of the positives of its task's rows with its group or query, and, in a symmetric task, its query itself.

    Returns:
        (pairs, pairs + hard negatives) bool. True at a row's own positive, too.
    """
    rows = [(task, row) for task in batch.tasks for row in task.rows]
    texts = [row.positive for _, row in rows] + [text for _, row in rows for text in row.negatives]
    columns: dict[str, list[int]] = {}
    for column, text in enumerate(texts):
        columns.setdefault(text, []).append(column)
    related: dict[tuple[str, str, str], set[str]] = {}
    for task, row in rows:
        for kind, value in (("query", row.query), ("group", row.group)):
            if value is not None:
                related.setdefault((task.name, kind, value), set()).add(row.positive)
    mask = torch.zeros((len(rows), len(texts)), dtype=torch.bool)
    for index, (task, row) in enumerate(rows):
        excluded = {row.positive} | related[task.name, "query", row.query]
        if row.group is not None:
            excluded |= related[task.name, "group", row.group]
        if task.symmetric:
            excluded.add(row.query)
        for text in excluded:
            for column in columns.get(text, ()):
                mask[index, column] = True
    return mask


def hard_negatives_mask(batch: TrainingBatch) -> torch.Tensor:
    """Return (pairs, pairs + hard negatives) bool, True at a row's own hard negatives."""
    rows = [row for task in batch.tasks for row in task.rows]
    hard = torch.zeros((len(rows), len(rows) + sum(len(row.negatives) for row in rows)), dtype=torch.bool)
    column = len(rows)
    for index, row in enumerate(rows):
        hard[index, column : column + len(row.negatives)] = True
        column += len(row.negatives)
    return hard


def with_frozen_documents(inputs: StepInputs, vectors: torch.Tensor, mask: torch.Tensor) -> StepInputs:
    """Return inputs whose documents are given as vectors, with more negatives behind them.

    Args:
        inputs: Inputs of the batch.
        vectors: (counted + more, dim) unit vectors.
        mask: (pairs, more) bool, True where one of the further documents is not a negative of a query.
    """
    return replace(
        inputs,
        counted=len(vectors),
        documents=[],
        mask=torch.cat([inputs.mask, mask], dim=1),
        hard=torch.cat([inputs.hard, torch.zeros_like(mask)], dim=1),
        document_vectors=vectors,
    )


@dataclass(frozen=True)
class SlotTable:
    """Vectors for the slots of some rows.

    Attributes:
        vectors: (vectors, dim) the batch's queries and then its documents.
        shown: For each row, the positions in `vectors` that fill its slots, in order (query, passage, query, ...).
    """

    vectors: torch.Tensor
    shown: Sequence[Sequence[int]]

    def take(self, rows: Sequence[int]) -> torch.Tensor:
        """Return (slots, dim) the vectors of some rows' slots, row by row."""
        wanted = torch.tensor([position for row in rows for position in self.shown[row]], dtype=torch.long)
        return self.vectors.index_select(0, wanted.to(self.vectors.device))


class Forward:
    """Forward passes in training: chunks of like length, slots filled from a table, autocast.

    Args:
        backbone: The model.
        pad_id: Token id of the padding.
        max_tokens: Most padded tokens in one forward pass.
        dtype: Dtype of matrix products; float32 for no autocast.
    """

    def __init__(self, backbone: Backbone, *, pad_id: int, max_tokens: int, dtype: torch.dtype = torch.float32) -> None:
        self.backbone = backbone
        self.pad_id = pad_id
        self.max_tokens = max_tokens
        self.dtype = dtype

    def __call__(self, rows: Sequence[EncoderInput], slots: SlotTable | None = None) -> torch.Tensor:
        """Return (rows, dim) float32 unit vectors in order, with the graphs of all chunks."""
        if not rows:
            return torch.zeros((0, self.backbone.dimension), device=self.backbone.device)
        chunks = self.chunks(rows, range(len(rows)))
        return _in_order([self.chunk(rows, chunk, slots) for chunk in chunks], chunks)

    def chunks(self, rows: Sequence[EncoderInput], shard: Sequence[int]) -> list[list[int]]:
        """Split positions of rows into chunks of at most `max_tokens` padded tokens, queries apart from other rows."""
        chunks = []
        for is_query in (True, False):
            part = [index for index in shard if rows[index].is_query is is_query]
            batches = token_batches([len(rows[index].ids) for index in part], max_tokens=self.max_tokens)
            chunks += [[part[index] for index in batch] for batch in batches]
        return chunks

    def chunk(self, rows: Sequence[EncoderInput], chunk: Sequence[int], slots: SlotTable | None = None) -> torch.Tensor:
        """Return (chunk, dim) float32 unit vectors of some rows, from one forward pass."""
        batch = self._collate(rows, chunk)
        with self._autocast():
            vectors: torch.Tensor = self.backbone(batch, None if slots is None else slots.take(chunk))
        return vectors

    def pooled(self, rows: Sequence[EncoderInput]) -> torch.Tensor:
        """Return (rows, width) float32 states after pooling, in order: the input of a head."""
        chunks = self.chunks(rows, range(len(rows)))
        with self._autocast():
            return _in_order([self.backbone(self._collate(rows, chunk), pooled_only=True) for chunk in chunks], chunks)

    def _collate(self, rows: Sequence[EncoderInput], chunk: Sequence[int]) -> Batch:
        batch = collate([rows[index] for index in chunk], pad_id=self.pad_id)
        return batch.to(self.backbone.device, pinned=self.backbone.device.type == "cuda")

    def _autocast(self) -> torch.autocast:
        enabled = self.dtype != torch.float32
        # autocast rejects float32, even if it is disabled.
        dtype = self.dtype if enabled else torch.bfloat16
        return torch.autocast(self.backbone.device.type, dtype=dtype, enabled=enabled)


def _in_order(parts: Sequence[torch.Tensor], chunks: Sequence[Sequence[int]]) -> torch.Tensor:
    """Return the chunks' vectors at their rows' positions; every row must be in a chunk."""
    order = torch.tensor([index for chunk in chunks for index in chunk])
    return torch.cat(list(parts))[order.argsort().to(parts[0].device)]
