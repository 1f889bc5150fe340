"""Frozen documents: vectors of the model before training, for all passages, so that a step encodes only its queries.

The passages of the training rows are embedded once, before the first step, in blocks of files that a stopped run finds
again. A step then costs a few tokens a pair instead of a passage, and takes thousands of passages as negatives for the
price of one matrix product. Queries have weights of their own (`Backbone.separate_queries`), so documents keep their
vectors.
"""

from __future__ import annotations

import copy
import hashlib
import io
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from tqdm.auto import tqdm

from epic_rag.encoder import EpicEncoder
from epic_rag.files import write_atomically
from epic_rag.training.config import TrainingConfig
from epic_rag.training.data import Pair, PairDataset, TrainingBatch

__all__ = ["FrozenDocuments", "StepDocuments"]

# Texts in a file of vectors.
_BLOCK = 4096

_Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class StepDocuments:
    """The documents of a step.

    Attributes:
        vectors: (documents, dim) float32 unit vectors: the positives, the rows' hard negatives, the drawn passages.
        mask: (pairs, drawn) bool, True where a drawn passage is not a negative of a row.
    """

    vectors: torch.Tensor
    mask: torch.Tensor


class FrozenDocuments:
    """All passages of the training rows, with vectors that no step changes.

    Args:
        datasets: The rows.
        config: Model, lengths, dtype, and the number of negatives.
        folder: Folder of vectors; is made.
        encoder: The model, whose weights of documents stay; None loads `config.model` in the run's dtype.
        device: Device of a model that is loaded; None chooses.

    Attributes:
        texts: The passages, each once.
    """

    def __init__(
        self,
        datasets: Sequence[PairDataset],
        config: TrainingConfig,
        folder: Path,
        encoder: EpicEncoder | None = None,
        device: str | None = None,
    ) -> None:
        self._config, self._folder, self._encoder, self._device = config, folder, encoder, device
        texts = {text: None for dataset in datasets for row in dataset.rows for text in (row.positive, *row.negatives)}
        self.texts = list(texts)
        self._ids = {text: number for number, text in enumerate(self.texts)}
        self._vectors: npt.NDArray[np.float16] | None = None
        self._pools: dict[tuple[str, str | None], _Ids] = {}
        self._answers: dict[tuple[str, str, str], set[int]] = {}
        for dataset in datasets:
            self._pools[dataset.name, None] = self._passages(dataset.rows)
            for source, rows in dataset.by_source.items():
                self._pools[dataset.name, source] = self._passages(rows)
            for row in dataset.rows:
                for key in _keys(dataset.name, row):
                    self._answers.setdefault(key, set()).add(self._ids[row.positive])

    def embed(self, *, show_progress: bool = False) -> npt.NDArray[np.float16]:
        """Embed all passages with the model as it is before training, or read the vectors of an earlier run.

        Args:
            show_progress: True to draw a progress bar.

        Returns:
            (passages, dim) float16 unit vectors.

        Raises:
            CheckpointError: If the model does not load.
        """
        if self._vectors is None:
            encoder = self._load() if self._encoder is None else copy.copy(self._encoder)
            if self._config.inference_tokens is not None:
                encoder.prompt.max_document_tokens = self._config.inference_tokens
            blocks = [self.texts[start : start + _BLOCK] for start in range(0, len(self.texts), _BLOCK)]
            self._folder.mkdir(parents=True, exist_ok=True)
            with tqdm(total=len(self.texts), desc="Documents", unit="text", disable=not show_progress) as bar:
                parts = []
                for block in blocks:
                    parts.append(_block_vectors(encoder, block, self._folder))
                    bar.update(len(block))
            self._vectors = np.concatenate(parts)
        return self._vectors

    def _load(self) -> EpicEncoder:
        config = self._config
        return EpicEncoder.from_pretrained(
            config.model,
            device=self._device,
            dtype=config.dtype,
            num_layers=config.num_layers,
            gguf_file=config.gguf_file,
            pooling=config.pooling,
            backend="native",
        )

    def of_step(self, batch: TrainingBatch, step: int) -> StepDocuments:
        """Return the vectors of a batch's documents and of the passages that are drawn as further negatives."""
        rows = [(task.name, row) for task in batch.tasks for row in task.rows]
        own = [self._ids[row.positive] for _, row in rows]
        own += [self._ids[text] for _, row in rows for text in row.negatives]
        drawn = self.draw(batch, step)
        drawn = drawn[~np.isin(drawn, own)]
        columns: Mapping[int, int] = {int(number): column for column, number in enumerate(drawn)}
        mask = torch.zeros((len(rows), len(drawn)), dtype=torch.bool)
        for index, (name, row) in enumerate(rows):
            known = {number for key in _keys(name, row) for number in self._answers.get(key, ())}
            mask[index, [columns[number] for number in known if number in columns]] = True
        vectors = self.embed()[np.concatenate([np.array(own, dtype=np.int64), drawn])]
        return StepDocuments(torch.from_numpy(vectors.astype(np.float32)), mask)

    def _passages(self, rows: Sequence[Pair]) -> _Ids:
        return np.array(sorted({self._ids[row.positive] for row in rows}), dtype=np.int64)

    def draw(self, batch: TrainingBatch, step: int) -> _Ids:
        """Return positions in `texts` of a step's further negatives, those of the rows' sources first.

        Half are drawn from the sources of the batch's rows, where sources are drawn, and the others from all passages
        of its tasks: a function of configuration and step alone.
        """
        config = self._config
        rng = random.Random(f"{config.seed}-{step}-documents")
        budget = config.document_negatives
        near: list[int] = []
        for task in batch.tasks:
            source = task.rows[0].source
            if config.tasks[task.name].sources_per_batch and (pool := self._pools.get((task.name, source))) is not None:
                near.extend(_sample(pool, budget // (2 * len(batch.tasks)), rng))
        names = list(dict.fromkeys(task.name for task in batch.tasks))
        far = [number for name in names for number in _sample(self._pools[name, None], budget // len(names), rng)]
        return np.array(list(dict.fromkeys([*near, *far]))[:budget], dtype=np.int64)


def _sample(pool: _Ids, count: int, rng: random.Random) -> list[int]:
    chosen: list[int] = pool[rng.sample(range(len(pool)), min(count, len(pool)))].tolist()
    return chosen


def _keys(task: str, row: Pair) -> list[tuple[str, str, str]]:
    keys = [(task, "query", row.query), (task, "positive", row.positive)]
    return keys if row.group is None else [*keys, (task, "group", row.group)]


def _block_vectors(encoder: EpicEncoder, texts: Sequence[str], folder: Path) -> npt.NDArray[np.float16]:
    digest = hashlib.sha256(f"{encoder.fingerprint}-{encoder.dtype}".encode())
    for text in texts:
        digest.update(text.encode() + b"\0")
    file = folder / f"{digest.hexdigest()[:24]}.npy"
    if file.is_file():
        loaded: npt.NDArray[np.float16] = np.load(file, allow_pickle=False)
        return loaded
    vectors = encoder.encode_document(texts).astype(np.float16)
    buffer = io.BytesIO()
    np.save(buffer, vectors)
    write_atomically(file, buffer.getvalue())
    return vectors
