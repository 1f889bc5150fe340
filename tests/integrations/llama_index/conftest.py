"""Embeddings, an index of five files, and retrievers over it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from epic_rag import EpicEncoder
from epic_rag_chroma import ChromaIndexer
from llama_index.embeddings.epic import EpicEmbedding
from llama_index.retrievers.epic import EpicRetriever

FILES: dict[str, str] = {
    "guide.md": "# Guide\n\n## Install\n\nRun the installer, then read the manual.\n\n## Remove\n\nDelete the folder.\n",
    "notes.txt": "Cats sleep most of the day.\nThey wake up for food.\n",
    "src/tool.py": "def encode(texts):\n    return texts\n\n\ndef decode(texts):\n    return texts\n",
    "src/paint.py": "def paint(wall):\n    wall.colour = 'white'\n",
}
Nearest = Callable[[Sequence[str]], list[str]]


@pytest.fixture(scope="session")
def loaded_embedding(tiny_checkpoint: Path) -> EpicEmbedding:
    return EpicEmbedding(model=str(tiny_checkpoint))


@pytest.fixture
def embedding(loaded_embedding: EpicEmbedding) -> EpicEmbedding:
    """A copy, which shares the weights."""
    return loaded_embedding.model_copy()


@pytest.fixture(scope="session")
def index_dir(
    tmp_path_factory: pytest.TempPathFactory,
    tree: Callable[[Path, dict[str, Any]], Path],
    pdf: Callable[[list[str]], bytes],
    tiny_checkpoint: Path,
) -> Path:
    """An index of five files that names its model. Read-only."""
    folder = tmp_path_factory.mktemp("retriever")
    docs = tree(folder / "docs", {**FILES, "paper.pdf": pdf(["first page of results", "second page about cats"])})
    with ChromaIndexer(folder / "index", encoder=EpicEncoder.from_pretrained(tiny_checkpoint)) as indexer:
        indexer.index([docs])
    return folder / "index"


@pytest.fixture
def retriever(index_dir: Path, tiny_encoder: EpicEncoder) -> Iterator[EpicRetriever]:
    with EpicRetriever(index_dir, encoder=tiny_encoder, similarity_top_k=4) as made:
        yield made


@pytest.fixture
def dense(retriever: EpicRetriever) -> EpicRetriever:
    return retriever.with_settings(mode="dense", collapse=False)


@pytest.fixture
def nearest(index_dir: Path, tiny_encoder: EpicEncoder, rows: Callable[[Path], dict[str, Any]]) -> Nearest:
    """Brute force: ids of the four rows nearest to the mean of the texts' vectors."""

    def find(texts: Sequence[str]) -> list[str]:
        vector = tiny_encoder.encode_query(list(texts)).mean(axis=0)
        vectors = {row: np.asarray(values) for row, (_, _, values) in rows(index_dir).items()}
        return sorted(vectors, key=lambda row: -float(vectors[row] @ vector))[:4]

    return find
