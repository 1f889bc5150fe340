"""Embeddings for evaluation: each text once per model and prompt, however often a score needs it.

Only queries see a prompt, so the documents of a corpus have the same vectors for every k; they are nearly all
of the cost. `EmbeddingStore` keeps every list of vectors it has made, in memory and, given a folder, on disk.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from epic_rag.demonstrations import Demonstration, DemonstrationBank
from epic_rag.task_vector import QueryStrategy

__all__ = ["EmbeddingStore", "QueryPrompt", "TextEncoder", "Vectors"]

logger = logging.getLogger(__name__)

Vectors = npt.NDArray[np.float32]


class TextEncoder(Protocol):
    """The part of `EpicEncoder` that evaluation uses."""

    @property
    def fingerprint(self) -> str:
        """A short hash of everything that decides the vectors."""

    @property
    def dimension(self) -> int:
        """Length of a vector."""

    def encode_query(
        self,
        texts: Sequence[str],
        *,
        bank: DemonstrationBank | None = None,
        instruction: str | None = None,
        num_demonstrations: int | None = None,
        strategy: QueryStrategy | None = None,
        batch_size: int | None = None,
        show_progress: bool = False,
    ) -> Vectors:
        """Encode queries: (n, dim) float32, unit rows."""

    def encode_document(
        self, texts: Sequence[str], *, batch_size: int | None = None, show_progress: bool = False
    ) -> Vectors:
        """Encode documents: (n, dim) float32, unit rows."""


@dataclass(frozen=True)
class QueryPrompt:
    """What stands before a query.

    Args:
        instruction: The task in words; None for a model that was never trained with one.
        demonstrations: Shown in this order.
        symmetric: Whether the demonstrations' passages are encoded like queries.
        strategy: How they are shown.
    """

    instruction: str | None = None
    demonstrations: tuple[Demonstration, ...] = ()
    symmetric: bool = False
    strategy: QueryStrategy = "epic"

    @property
    def fingerprint(self) -> str:
        """A hash over what decides the prompt; without demonstrations that is the instruction alone."""
        content: list[object] = [self.instruction or ""]
        if self.demonstrations:
            content += [self.strategy, self.symmetric]
            content += [[demonstration.query, demonstration.passage] for demonstration in self.demonstrations]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]


def _texts_key(texts: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        body = text.encode("utf-8", "surrogatepass")
        digest.update(f"{len(body)}:".encode())
        digest.update(body)
    return digest.hexdigest()[:24]


class EmbeddingStore:
    """Encodes lists of texts with one model and remembers the result.

    Args:
        encoder: The model.
        folder: Where vectors are kept between runs; None keeps them in memory alone. The model's fingerprint
            is part of every path in it, so one folder serves any number of models.
        precision: In which precision the model runs. A fingerprint does not know it, and vectors differ a little.
        batch_size: Passed on to the encoder; None lets it choose.
        show_progress: Whether the encoder draws progress bars.

    Attributes:
        revision: The model's fingerprint, and the precision where it is not float32.
        texts_encoded: How many texts the model has really encoded.
    """

    def __init__(
        self,
        encoder: TextEncoder,
        *,
        folder: Path | None = None,
        precision: str = "float32",
        batch_size: int | None = None,
        show_progress: bool = False,
    ) -> None:
        self.encoder = encoder
        self.texts_encoded = 0
        self.revision = encoder.fingerprint if precision == "float32" else f"{encoder.fingerprint}-{precision}"
        self._folder = folder / self.revision if folder else None
        self._batch_size = batch_size
        self._show_progress = show_progress
        self._vectors: dict[str, Vectors] = {}
        self._banks: dict[str, DemonstrationBank] = {}

    def documents(self, texts: Sequence[str]) -> Vectors:
        """Encode documents, bare.

        Returns:
            (n, dim) float32, in the order of `texts`.
        """
        return self._remembered("documents", texts, None)

    def queries(self, texts: Sequence[str], prompt: QueryPrompt) -> Vectors:
        """Encode queries behind a prompt.

        Returns:
            (n, dim) float32, in the order of `texts`.
        """
        return self._remembered(f"queries-{prompt.fingerprint}", texts, prompt)

    def _remembered(self, role: str, texts: Sequence[str], prompt: QueryPrompt | None) -> Vectors:
        # Equal texts have equal vectors: SICK-R has 9,854 sentences, 6,076 of them different.
        unique = list(dict.fromkeys(texts))
        key = f"{role}-{_texts_key(unique)}"
        vectors = self._vectors.get(key)
        if vectors is None:
            vectors = self._load(key, len(unique))
            if vectors is None:
                vectors = self._encode(unique, prompt)
                self.texts_encoded += len(unique)
                self._save(key, vectors)
            self._vectors[key] = vectors
        if len(unique) == len(texts):
            return vectors
        rows = {text: row for row, text in enumerate(unique)}
        return vectors[[rows[text] for text in texts]]

    def _encode(self, texts: list[str], prompt: QueryPrompt | None) -> Vectors:
        if not texts:
            return np.zeros((0, self.encoder.dimension), dtype=np.float32)
        if prompt is None:
            return self.encoder.encode_document(texts, batch_size=self._batch_size, show_progress=self._show_progress)
        if not prompt.demonstrations:
            return self.encoder.encode_query(
                texts,
                # "" and not None, which would let the model put its own default before the text.
                instruction=prompt.instruction or "",
                batch_size=self._batch_size,
                show_progress=self._show_progress,
            )
        bank = self._bank(prompt)
        return self.encoder.encode_query(
            texts,
            bank=bank,
            num_demonstrations=len(bank),
            strategy=prompt.strategy,
            batch_size=self._batch_size,
            show_progress=self._show_progress,
        )

    def _bank(self, prompt: QueryPrompt) -> DemonstrationBank:
        """The prompt's demonstrations as a bank; the encoder embeds it when it first reads it."""
        if prompt.fingerprint not in self._banks:
            self._banks[prompt.fingerprint] = DemonstrationBank(
                prompt.demonstrations, instruction=prompt.instruction or "", symmetric=prompt.symmetric
            )
        return self._banks[prompt.fingerprint]

    def _load(self, key: str, rows: int) -> Vectors | None:
        if self._folder is None:
            return None
        path = self._folder / f"{key}.npy"
        try:
            stored = np.load(path, allow_pickle=False)
        except FileNotFoundError:
            return None
        except (OSError, EOFError, ValueError) as error:
            logger.warning("the cached vectors %s cannot be read (%s); they are made again", path, error)
            return None
        if stored.shape != (rows, self.encoder.dimension) or stored.dtype != np.float32:
            logger.warning("the cached vectors %s have another shape than expected; they are made again", path)
            return None
        vectors: Vectors = stored
        return vectors

    def _save(self, key: str, vectors: Vectors) -> None:
        if self._folder is None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"{key}.npy"
        # Written beside and moved into place, so that a killed run leaves no half file behind.
        draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        with draft.open("wb") as stream:
            np.save(stream, vectors, allow_pickle=False)
        os.replace(draft, path)
