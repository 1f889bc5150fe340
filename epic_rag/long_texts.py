"""Long texts: windows that a model reads one at a time, and the vector of a text from theirs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from epic_rag.metrics import unit_rows

__all__ = ["SPECIAL_TOKENS", "divide", "mean_of_windows"]

Vectors = npt.NDArray[np.float32]

SPECIAL_TOKENS = 2
"""Tokens at the beginning and the end of a text that are not its own."""


def divide(text: str, longest: int, count_tokens: Callable[[Sequence[str]], list[int]]) -> list[str]:
    """Divide a text at white space into windows of like length.

    Args:
        text: The text.
        longest: Most tokens of a window, special tokens among them.
        count_tokens: Token counts of texts, without special tokens.

    Returns:
        The windows; the text alone if it is no longer than one.
    """
    room = max(1, longest - SPECIAL_TOKENS)
    count = -(-count_tokens([text])[0] // room)
    while count > 1:
        edges = [0]
        for place in range(1, count):
            edge = len(text) * place // count
            space = max(text.rfind(" ", edges[-1], edge), text.rfind("\n", edges[-1], edge))
            edges.append(space + 1 if space > edges[-1] else edge)
        parts = [text[first:end] for first, end in pairwise([*edges, len(text)])]
        if count >= len(text) or max(count_tokens(parts)) <= room:
            return parts
        count += 1
    return [text]


def mean_of_windows(vectors: Vectors, tokens: Sequence[int], windows: Sequence[int]) -> Vectors:
    """Return the vectors of texts from those of their windows.

    Args:
        vectors: (sum of `windows`, dim) unit rows, text by text.
        tokens: Token count of each window, its weight.
        windows: Number of windows of each text.

    Returns:
        (texts, dim) float32 unit rows: weighted means, and for a text in one window that window's very vector.
    """
    starts = np.cumsum([0, *windows[:-1]])
    weights = np.maximum(np.array(tokens, np.float32)[:, None], 1)
    means: Vectors = unit_rows(np.add.reduceat(vectors * weights, starts))
    alone = np.array(windows) == 1
    means[alone] = vectors[starts[alone]]
    return means
