"""Reranking: a model that reads query and passage together puts the best hits in order."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from epic_rag.errors import CheckpointError, ConfigError, MissingExtraError

__all__ = ["RERANK_POOL", "Reranker", "load_reranker", "scores"]


Reranker = Callable[[str, Sequence[str]], Sequence[float]]
"""A query and passages in, one number for each passage out; the higher, the better."""

# How many of the best hits are read again: a cross-encoder reads each with the query, and that takes its time.
RERANK_POOL = 50


def load_reranker(given: str | os.PathLike[str] | Reranker) -> Reranker:
    """Load a cross-encoder.

    Args:
        given: A folder or a name that `sentence_transformers.CrossEncoder` opens, or a reranker itself. Weights are
            read from safetensors only, and no code from the folder runs.

    Raises:
        CheckpointError: If there is no such model, or it is no cross-encoder with one output.
        MissingExtraError: If sentence-transformers is not installed.
    """
    if callable(given):
        return given
    name = os.fspath(given)
    if os.sep in name and not Path(name).is_dir() and (Path(name).is_absolute() or name.startswith(".")):
        raise CheckpointError(f"there is no folder {name}; name the folder or the hub name of a cross-encoder")
    try:
        from sentence_transformers import CrossEncoder
    except ImportError as error:
        raise MissingExtraError("sentence-transformers", "rerank", "reranking") from error
    try:
        model: Any = CrossEncoder(name, model_kwargs={"use_safetensors": True})
    except Exception as error:  # whatever transformers and the hub raise: a missing file, a bad config, no network
        why = " ".join(str(error).split())[:160]
        raise CheckpointError(
            f"{name} cannot be loaded as a cross-encoder ({why}); name a folder or a hub name with config.json, "
            "model.safetensors and a tokenizer"
        ) from error
    outputs = int(getattr(model, "num_labels", 1) or 1)
    if outputs != 1:
        raise CheckpointError(
            f"{name} gives {outputs} numbers for a pair, a reranker gives one; name a cross-encoder that was made for "
            "ranking"
        )

    def rerank(query: str, passages: Sequence[str]) -> Sequence[float]:
        predicted = model.predict([(query, passage) for passage in passages], show_progress_bar=False)
        return [float(score) for score in predicted]

    return rerank


def scores(reranker: Reranker, query: str, passages: Sequence[str]) -> list[float]:
    """Ask a reranker.

    Raises:
        ConfigError: If it does not give one number for each passage.
    """
    given = [float(score) for score in reranker(query, passages)] if passages else []
    if len(given) != len(passages) or any(score != score for score in given):
        raise ConfigError(
            f"the reranker gave {len(given)} scores for {len(passages)} passages, or one that is no number; it must "
            "give one number for each"
        )
    return given
