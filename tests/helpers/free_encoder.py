"""A model that costs nothing, logs what it embeds, and takes its time if asked to: for tests of pipelines."""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from epic_rag import EpicEncoder
from epic_rag.embedding_model import EmbeddingModel, Fact, Role, Vectors


class FreeModel(EmbeddingModel):
    """Counts of hashed words as vectors.

    Args:
        log: A file that gets a line for each call: process and texts.
        seconds: Time that a call takes.
        broken: A word in texts for which the vector is not finite.
    """

    kind = "free"
    name = "free"
    dimension = 16
    max_query_tokens = 256
    max_document_tokens = 256

    def __init__(self, log: str = "", seconds: float = 0.0, broken: str = "") -> None:
        self._log, self._seconds, self._broken = log, seconds, broken

    def embed(
        self,
        texts: Sequence[str],
        role: Role,
        *,
        instruction: str | None = None,
        batch_size: int | None = None,
        show_progress: bool = False,
    ) -> Vectors:
        if self._log:
            with Path(self._log).open("a") as log:
                log.write(f"{os.getpid()} {len(texts)}\n")
        time.sleep(self._seconds)
        vectors = np.full((len(texts), self.dimension), 0.01, np.float32)
        for row, text in enumerate(texts):
            for word in text.lower().split():
                vectors[row, zlib.crc32(word.encode()) % self.dimension] += 1
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        if self._broken:
            vectors[[self._broken in text for text in texts]] = np.nan
        return vectors

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        return [len(text.split()) for text in texts]

    def identity(self) -> dict[str, Any]:
        return {"kind": self.kind, "version": 1}

    def describe(self) -> list[Fact]:
        return []


def free_encoder(log: str = "", seconds: float = 0.0, broken: str = "") -> EpicEncoder:
    return EpicEncoder(FreeModel(log, seconds, broken), None, name="free", source="free")


def calls(log: Path) -> list[tuple[int, int]]:
    """Return process and number of texts of each call."""
    lines = log.read_text().splitlines() if log.exists() else []
    return [(int(line.split()[0]), int(line.split()[1])) for line in lines]
