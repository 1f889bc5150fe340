"""A query's vector that comes from something else than its text: other texts, or a vector that the caller has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from epic_rag.errors import ConfigError

__all__ = ["Embedded", "Encode", "instead_of"]

Encode: TypeAlias = Callable[[Sequence[str]], npt.NDArray[np.float32]]
Embedded: TypeAlias = "Sequence[str] | npt.NDArray[np.float32]"


def instead_of(encode: Encode, embedded: Embedded, dimension: int) -> Encode:
    """A function that gives one query the vector of what stands for it.

    Args:
        encode: Turns queries into unit vectors (n, dim).
        embedded: Texts, at least one, whose vectors are averaged; or a vector (dim,) of any length.
        dimension: The dimension of the index.

    Raises:
        ConfigError: If there is no text, or the vector has another dimension or no direction.
    """
    if isinstance(embedded, str):
        embedded = [embedded]
    if isinstance(embedded, np.ndarray):
        if embedded.shape != (dimension,):
            shown = f"{embedded.size} numbers" if embedded.ndim == 1 else f"the shape {embedded.shape}"
            raise ConfigError(
                f"the query's vector has {shown}, the vectors of the index have {dimension}; embed the query with the "
                "model of the index, or give its text"
            )
        given = _unit(embedded)
        return lambda _: given[None, :]
    texts = list(embedded)
    if not texts:
        raise ConfigError("there is no text to embed for the query; give at least one")
    return lambda _: _unit(encode(texts).mean(axis=0))[None, :]


def _unit(vector: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    length = float(np.linalg.norm(vector))
    if not 0 < length < np.inf:
        raise ConfigError(f"the query's vector has length {length}; it must have a direction")
    return (vector / length).astype(np.float32)
