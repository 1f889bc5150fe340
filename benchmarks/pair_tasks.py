"""Files of pairs as retrieval tasks, for the benchmarks of demonstrations: splits, vectors, collections, scores."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from epic_rag import EpicEncoder
from epic_rag.evaluation.embedding_store import EmbeddingStore
from epic_rag.evaluation.few_shot import load_few_shot_tasks
from epic_rag.evaluation.few_shot_collections import CollectionFamily, TaskVectors, families_of_tasks
from epic_rag.evaluation.heldout import Collection, HeldoutSplit

__all__ = ["COLLECTIONS", "embed_tasks", "gains_over", "mean_scores", "pair_tasks"]

COLLECTIONS: dict[Collection, str] = {"own": "own documents", "pooled-with-queries": "mixed, with queries"}
"""Collections that are searched, and their names in tables."""


def pair_tasks(
    files: Sequence[str], encoder: EpicEncoder, *, queries: int, documents: int, sizes: Sequence[int]
) -> list[HeldoutSplit]:
    """Split files of pairs into test queries, documents and a pool of demonstrations.

    Args:
        files: The files.
        encoder: Its default instruction is that of the queries.
        queries: Most test queries of a file.
        documents: Documents of a file, if it has as many.
        sizes: Numbers of demonstrations; pools hold a few more than the largest.
    """
    return load_few_shot_tasks(
        files,
        None,
        None,
        queries=queries,
        documents=documents,
        sizes=sizes,
        instruction="default",
        default_instruction=encoder.default_instruction,
    )


def embed_tasks(
    splits: Sequence[HeldoutSplit], encoder: EpicEncoder
) -> tuple[list[TaskVectors], list[list[CollectionFamily]]]:
    """Return the vectors of all tasks, and each task's collections with its scores without demonstrations."""
    store = EmbeddingStore(encoder, precision=str(encoder.dtype).removeprefix("torch."))
    vectors = [TaskVectors(store, split) for split in splits]
    return vectors, list(families_of_tasks(vectors, tuple(COLLECTIONS), bm25=False))


def mean_scores(families: Sequence[CollectionFamily]) -> dict[Collection, float]:
    """Return the mean nDCG@10 without demonstrations in each collection, times 100."""
    return {
        name: float(100 * ranking.zero["dense"].mean())
        for family in families
        for name, ranking in family.rankings.items()
    }


def gains_over(families: Sequence[CollectionFamily], moved: npt.NDArray[np.float32]) -> dict[Collection, float]:
    """Return what moved queries, (n, dim) unit rows, gain in mean nDCG@10 in each collection, times 100."""
    return {
        name: float(100 * (found["dense"] - family.rankings[name].zero["dense"]).mean())
        for family in families
        for name, found in family.ndcg(np.asarray(moved @ family.documents.documents.T, dtype=np.float32))
    }
