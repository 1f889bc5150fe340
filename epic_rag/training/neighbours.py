"""Groups of rows that share words, for batches with hard negatives that need no mining.

Most passages of a random batch are unrelated to a query. Here the rows of a task are split in two, again and again,
along the direction in which their texts differ most (a principal direction tree on 48 dimensions of latent semantic
analysis), until a part has as many rows as a group. A step takes a few whole groups.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from epic_rag.training.data import PairDataset

__all__ = ["group_rows", "neighbour_groups"]

_DIMENSIONS = 48
# Beginning of a text that counts, in characters.
_CHARACTERS = 600


def group_rows(datasets: Sequence[PairDataset], size: int, seed: int) -> None:
    """Fill `groups` of tasks: of the whole file, or of each source if steps draw sources.

    Label-like and symmetric tasks are left out: their neighbours have the same label, or mean the same.

    Args:
        datasets: Loaded tasks.
        size: Rows in a group.
        seed: Decides the groups.
    """
    for dataset in datasets:
        if dataset.label_like or dataset.symmetric:
            continue
        sources: list[str | None] = [*dataset.by_source] if dataset.sources_per_batch else [None]
        for source in sources:
            rows = dataset.rows if source is None else dataset.by_source[source]
            groups = neighbour_groups([f"{row.query}\n{row.positive[:_CHARACTERS]}" for row in rows], size, seed)
            dataset.groups[source] = [[rows[index] for index in group] for group in groups]


def neighbour_groups(texts: Sequence[str], size: int, seed: int) -> list[list[int]]:
    """Split texts into groups with words in common.

    Args:
        texts: The texts.
        size: Texts in a group; at most one group of them has fewer.
        seed: Decides the groups.

    Returns:
        Positions of each group's texts.
    """
    from sklearn.decomposition import TruncatedSVD  # type: ignore[import-untyped]
    from sklearn.feature_extraction.text import TfidfVectorizer  # type: ignore[import-untyped]

    words = TfidfVectorizer(sublinear_tf=True, max_features=50_000, dtype=np.float32, token_pattern=r"\w+")
    # The words of a few texts, or of texts without any, say nothing of neighbours.
    if len(texts) <= max(size, _DIMENSIONS) or not any(map(words.build_analyzer(), texts)):
        order = np.random.default_rng(seed).permutation(len(texts)).tolist()
        return [order[at : at + size] for at in range(0, len(order), size)]
    matrix = words.fit_transform(texts)
    dimensions = min(_DIMENSIONS, matrix.shape[1] - 1)
    if dimensions < 1:
        points = np.zeros((len(texts), 1), dtype=np.float32)
    else:
        points = TruncatedSVD(dimensions, n_iter=2, random_state=seed).fit_transform(matrix)
    points /= np.maximum(np.linalg.norm(points, axis=1, keepdims=True), np.float32(1e-9))
    return [part.tolist() for part in _split(points, np.arange(len(points)), size, np.random.default_rng(seed))]


def _split(
    points: npt.NDArray[np.float32], part: npt.NDArray[np.intp], size: int, rng: np.random.Generator
) -> list[npt.NDArray[np.intp]]:
    """Split a part at the middle of its first principal direction, until it is a group."""
    if len(part) <= size:
        return [part]
    centred = points[part] - points[part].mean(axis=0)
    direction = np.asarray(rng.standard_normal(points.shape[1]), dtype=np.float32)
    # Power iteration; a rough direction is enough.
    for _ in range(6):
        direction = centred.T @ (centred @ direction)
        direction /= max(float(np.linalg.norm(direction)), 1e-12)
    groups = -(-len(part) // size)
    order = part[np.argsort(centred @ direction, kind="stable")]
    middle = size * (groups // 2)
    return [*_split(points, order[:middle], size, rng), *_split(points, order[middle:], size, rng)]
