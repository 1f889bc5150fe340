"""Embedding cache of an evaluation: each text is encoded once per model and prompt.

Only queries see a prompt, so the documents of a corpus have the same vectors for every k, and documents are nearly all
of the cost. mteb's `CachedEmbeddingWrapper` keys its files by task and prompt and would encode a corpus again for every
k; and held-out files do not go through mteb.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from epic_rag.demonstrations import Demonstration, DemonstrationBank
from epic_rag.files import write_atomically
from epic_rag.query_prompt import QueryPrompt, QueryStrategy

__all__ = ["EmbeddingStore", "TextEncoder", "Vectors", "make_prompt", "prompt_fingerprint"]

logger = logging.getLogger(__name__)

Vectors = npt.NDArray[np.float32]


class TextEncoder(Protocol):
    """The part of `EpicEncoder` that evaluation uses."""

    @property
    def fingerprint(self) -> str:
        """Short hash of everything that decides the vectors."""

    @property
    def dimension(self) -> int:
        """Length of a vector."""

    def encode_query(
        self,
        texts: Sequence[str],
        prompt: QueryPrompt | None = None,
        *,
        batch_size: int | None = None,
        show_progress: bool = False,
    ) -> Vectors:
        """Encode queries: (n, dim) float32, unit rows."""

    def encode_document(
        self, texts: Sequence[str], *, batch_size: int | None = None, show_progress: bool = False
    ) -> Vectors:
        """Encode documents: (n, dim) float32, unit rows."""


def make_prompt(
    instruction: str | None,
    demonstrations: Sequence[Demonstration] = (),
    *,
    symmetric: bool = False,
    strategy: QueryStrategy | None = None,
) -> QueryPrompt:
    """Return the prompt of an evaluation, which never falls back on the checkpoint's default instruction.

    Args:
        instruction: The task in words; None for a model that was never trained with one.
        demonstrations: All of them are used, in this order.
        symmetric: Whether the demonstrations' passages are encoded like queries.
        strategy: How the demonstrations are used.
    """
    if not demonstrations:
        return QueryPrompt(instruction=instruction or "")
    bank = DemonstrationBank(demonstrations, instruction=instruction or "", symmetric=symmetric)
    return QueryPrompt(bank=bank, num_demonstrations=len(bank), strategy=strategy)


def prompt_fingerprint(prompt: QueryPrompt) -> str:
    """Hash everything that decides a prompt; without demonstrations, only the instruction."""
    bank = prompt.resolve_bank()
    instruction = prompt.resolve_instruction(bank, None) or ""
    content: list[object] = [["symmetric", instruction] if prompt.is_bare(bank) else instruction]
    if bank is not None and prompt.num_demonstrations != 0:
        shown = bank.demonstrations[: prompt.num_demonstrations]
        content += [prompt.strategy, bank.symmetric, *([item.query, item.passage] for item in shown)]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]


class EmbeddingStore:
    """Encoder with a cache of vectors, in memory and, given a folder, on disk.

    Args:
        encoder: The model.
        folder: Where vectors are kept between runs; None keeps them in memory only. The model's fingerprint is
            part of every path in it, so one folder serves any number of models.
        precision: Precision of the model, which its fingerprint does not cover; vectors differ slightly.
        batch_size: Passed on to the encoder; None lets it choose.
        show_progress: Whether the encoder draws progress bars.

    Attributes:
        revision: The model's fingerprint, and the precision where it is not float32.
        folder: The model's folder; None if nothing is kept.
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
        self.revision = encoder.fingerprint if precision == "float32" else f"{encoder.fingerprint}-{precision}"
        self.folder = folder / self.revision if folder else None
        self._batch_size = batch_size
        self._show_progress = show_progress
        self._vectors: dict[str, Vectors] = {}

    def documents(self, texts: Sequence[str]) -> Vectors:
        """Encode documents, bare: (n, dim) float32, in the order of `texts`."""
        return self._cached("documents", texts, None)

    def queries(self, texts: Sequence[str], prompt: QueryPrompt) -> Vectors:
        """Encode queries behind a prompt: (n, dim) float32, in the order of `texts`."""
        key = f"queries-{prompt_fingerprint(prompt)}"
        reader = getattr(self.encoder, "reader", None)
        if prompt.strategy == "reader" and reader is not None:
            key = f"{key}-{reader.fingerprint}"
        return self._cached(key, texts, prompt)

    def _cached(self, role: str, texts: Sequence[str], prompt: QueryPrompt | None) -> Vectors:
        # Equal texts have equal vectors: SICK-R has 9,854 sentences, 6,076 of them different.
        unique = list(dict.fromkeys(texts))
        key = f"{role}-{_texts_key(unique)}"
        if key not in self._vectors:
            vectors = self._load(key, len(unique))
            if vectors is None:
                vectors = self._encode(unique, prompt)
                self._save(key, vectors)
            self._vectors[key] = vectors
        vectors = self._vectors[key]
        if len(unique) == len(texts):
            return vectors
        rows = {text: row for row, text in enumerate(unique)}
        return vectors[[rows[text] for text in texts]]

    def _encode(self, texts: list[str], prompt: QueryPrompt | None) -> Vectors:
        if not texts:
            return np.zeros((0, self.encoder.dimension), dtype=np.float32)
        if prompt is None:
            return self.encoder.encode_document(texts, batch_size=self._batch_size, show_progress=self._show_progress)
        return self.encoder.encode_query(texts, prompt, batch_size=self._batch_size, show_progress=self._show_progress)

    def _load(self, key: str, rows: int) -> Vectors | None:
        if self.folder is None:
            return None
        path = self.folder / f"{key}.npy"
        try:
            vectors: Vectors = np.load(path, allow_pickle=False)
        except FileNotFoundError:
            return None
        except (OSError, EOFError, ValueError) as error:
            logger.warning("Cached vectors in %s cannot be read (%s). They are computed again.", path, error)
            return None
        if vectors.shape != (rows, self.encoder.dimension) or vectors.dtype != np.float32:
            logger.warning("Cached vectors in %s have an unexpected shape. They are computed again.", path)
            return None
        return vectors

    def _save(self, key: str, vectors: Vectors) -> None:
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            stream = io.BytesIO()
            np.save(stream, vectors, allow_pickle=False)
            write_atomically(self.folder / f"{key}.npy", stream.getvalue())


def _texts_key(texts: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        body = text.encode("utf-8", "surrogatepass")
        digest.update(f"{len(body)}:".encode())
        digest.update(body)
    return digest.hexdigest()[:24]
