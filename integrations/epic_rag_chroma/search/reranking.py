"""Reranking: a cross-encoder, which reads query and text together, orders the best hits."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from epic_rag.errors import CheckpointError, ConfigError, MissingExtraError

__all__ = ["RERANK_DEPTH", "Reranker", "load_reranker", "rerank_scores"]

Reranker = Callable[[str, Sequence[str]], Sequence[float]]
"""Query and texts in, one score for each text out; higher is better."""

RERANK_DEPTH = 50
"""Number of hits that are reranked; a cross-encoder is slow."""


def load_reranker(name: str) -> Reranker:
    """Load a cross-encoder.

    Args:
        name: A folder, or a name on the hub, that `sentence_transformers.CrossEncoder` opens. Weights are read from
            safetensors only, and no code from the folder runs.

    Raises:
        CheckpointError: If there is no such model, or it is not a cross-encoder with one output.
        MissingExtraError: If sentence-transformers is not installed.
    """
    if os.sep in name and not Path(name).is_dir() and (Path(name).is_absolute() or name.startswith(".")):
        raise CheckpointError(f"There is no folder {name}. Give the folder or the hub name of a cross-encoder.")
    try:
        from sentence_transformers import CrossEncoder
    except ImportError as error:
        raise MissingExtraError("sentence-transformers", "rerank", "reranking") from error
    try:
        model: Any = CrossEncoder(name, model_kwargs={"use_safetensors": True})
    except Exception as error:  # anything from transformers and the hub: missing file, bad config, no network
        why = " ".join(str(error).split())[:160]
        raise CheckpointError(
            f"{name} cannot be loaded as a cross-encoder ({why}). Give a folder or a hub name with config.json, "
            "model.safetensors and a tokenizer."
        ) from error
    outputs = int(getattr(model, "num_labels", 1) or 1)
    if outputs != 1:
        raise CheckpointError(
            f"{name} has {outputs} outputs for a pair, a reranker has one. Give a cross-encoder trained for ranking."
        )

    def rerank(query: str, texts: Sequence[str]) -> Sequence[float]:
        predicted = model.predict([(query, text) for text in texts], show_progress_bar=False)
        return [float(score) for score in predicted]

    return rerank


def rerank_scores(reranker: Reranker, query: str, texts: Sequence[str]) -> list[float]:
    """Return a reranker's scores.

    Raises:
        ConfigError: If there is not one number for each text.
    """
    scores = [float(score) for score in reranker(query, texts)] if texts else []
    if len(scores) != len(texts) or any(math.isnan(score) for score in scores):
        raise ConfigError(
            f"The reranker returned {len(scores)} scores for {len(texts)} texts, or a score that is not a number. "
            "It must return one number for each text."
        )
    return scores
