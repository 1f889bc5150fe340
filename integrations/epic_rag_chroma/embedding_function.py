"""`EpicEmbeddingFunction`: an epic-rag encoder as an embedding function of Chroma.

Chroma keeps an embedding function's configuration with the collection and makes the function again from it whenever
it embeds, so making one must cost nothing (the model is loaded when the first text comes) and loading the same model
again must cost nothing either (it is kept).
"""

from __future__ import annotations

import copy
import os
import threading
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from chromadb.api.types import Documents, EmbeddingFunction, Embeddings, Space
from chromadb.utils.embedding_functions import register_embedding_function

from epic_rag.errors import ConfigError, FingerprintError

if TYPE_CHECKING:
    from epic_rag import EpicEncoder
    from epic_rag.task_vector import QueryStrategy

__all__ = ["EpicEmbeddingFunction", "plain_source"]

_NAME = "epic-rag"
_KEYS = ("model", "task", "bank", "num_demonstrations", "strategy", "truncate_dim", "fingerprint")
_ENCODERS_KEPT = 2
_loading = threading.Lock()


@lru_cache(maxsize=_ENCODERS_KEPT)
def _load(source: str | None, truncate_dim: int | None) -> tuple[EpicEncoder, threading.Lock]:
    """An encoder and the lock for it: an encoder is not safe to use from two threads at once."""
    from epic_rag import EpicEncoder

    return EpicEncoder.from_pretrained(source, truncate_dim=truncate_dim), threading.Lock()


def plain_source(source: str | os.PathLike[str]) -> str:
    """A checkpoint's name as it is, a checkpoint's folder as an absolute path, so that it is found from anywhere."""
    text = os.fspath(source)
    return os.path.abspath(text) if os.path.isdir(text) else text


def _known(strategy: str | None) -> QueryStrategy | None:
    if strategy is None:
        return None
    from epic_rag.query_prompt import QueryPrompt

    return QueryPrompt(strategy=strategy).strategy  # type: ignore[return-value]


def _plain_bank(bank: str | os.PathLike[str]) -> str:
    """A built-in bank's name as it is, even beside a folder of that name, which DemonstrationBank.load passes over."""
    text = os.fspath(bank)
    if os.path.isdir(text):
        from epic_rag.demonstrations import built_in_banks

        if text in built_in_banks():
            return text
    return plain_source(text)


@register_embedding_function
class EpicEmbeddingFunction(EmbeddingFunction[Documents]):
    """Embed documents and queries with an epic-rag checkpoint.

    Documents are embedded bare. Queries get the task's (or the bank's) instruction and demonstrations, which a
    collection can be given at any time: its documents stay as they are.

    Args:
        model: Name or folder of a checkpoint, or a loaded encoder; None for the default checkpoint.
        task: A known task, for queries.
        bank: Name or folder of a demonstration bank, for queries.
        num_demonstrations: How many demonstrations of the bank; see `EpicEncoder.encode_query`.
        strategy: How they reach a query; None for the checkpoint's own.
        truncate_dim: Keep only so many dimensions of the vectors.
        fingerprint: What the checkpoint's fingerprint must be; None for any.

    Raises:
        ConfigError: If a setting cannot be written into a collection's configuration.
        PromptError: If the strategy is unknown.
        FingerprintError: When the first text is embedded, if the checkpoint's fingerprint is another one.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | EpicEncoder | None = None,
        *,
        task: str | None = None,
        bank: str | os.PathLike[str] | None = None,
        num_demonstrations: int | None = None,
        strategy: QueryStrategy | None = None,
        truncate_dim: int | None = None,
        fingerprint: str | None = None,
    ) -> None:
        if bank is not None and not isinstance(bank, (str, os.PathLike)):
            raise ConfigError(
                f"bank is a {type(bank).__name__}, and a collection can only keep a bank's name or folder; "
                "save it with `bank.save(folder)` and give the folder"
            )
        self._task = task
        self._bank = None if bank is None else _plain_bank(bank)
        self._num_demonstrations = num_demonstrations
        self._strategy = _known(strategy)
        self._truncate_dim = truncate_dim
        self._fingerprint = fingerprint
        self._encoder: EpicEncoder | None = None
        self._lock = threading.Lock()
        if model is None or isinstance(model, (str, os.PathLike)):
            self._source = None if model is None else plain_source(model)
        else:
            if truncate_dim is not None and truncate_dim != model.truncate_dim:
                # The width is part of the fingerprint. A shallow copy shares the weights and leaves the caller's alone.
                model = copy.copy(model)
                model.truncate_dim = truncate_dim
            self._source = plain_source(model.source)
            self._truncate_dim = model.truncate_dim
            self._encoder = self._checked(model)

    def __call__(self, input: Documents) -> Embeddings:
        """Embed documents.

        Args:
            input: Texts, at least one (Chroma refuses an empty list).

        Returns:
            A float32 unit vector for each.
        """
        encoder = self._loaded()
        with self._lock:
            vectors = encoder.encode_document(list(input))
        return _rows(vectors)

    def embed_query(self, input: Documents) -> Embeddings:
        """Embed queries, with the instruction and the demonstrations that were asked for."""
        encoder = self._loaded()
        with self._lock:
            vectors = encoder.encode_query(
                list(input),
                task=self._task,
                bank=self._bank,
                num_demonstrations=self._num_demonstrations,
                strategy=self._strategy,
            )
        return _rows(vectors)

    @staticmethod
    def name() -> str:
        """The name under which Chroma keeps it."""
        return _NAME

    def default_space(self) -> Space:
        """Cosine: the vectors are made for it."""
        return "cosine"

    def supported_spaces(self) -> list[Space]:
        """All three: on unit vectors they rank alike."""
        return ["cosine", "l2", "ip"]

    def get_config(self) -> dict[str, Any]:
        """The settings as plain values, the checkpoint's fingerprint among them (the model is loaded for it)."""
        if self._fingerprint is None:
            self._loaded()
        return {
            "model": self._source,
            "task": self._task,
            "bank": self._bank,
            "num_demonstrations": self._num_demonstrations,
            # Left out unless it is set: releases that do not know it refuse a configuration that has it.
            **({} if self._strategy is None else {"strategy": self._strategy}),
            "truncate_dim": self._truncate_dim,
            "fingerprint": self._fingerprint,
        }

    @staticmethod
    def build_from_config(config: dict[str, Any]) -> EpicEmbeddingFunction:
        """Make it again from `get_config`'s values; nothing is loaded yet."""
        EpicEmbeddingFunction.validate_config(config)
        return EpicEmbeddingFunction(
            config.get("model"),
            task=config.get("task"),
            bank=config.get("bank"),
            num_demonstrations=config.get("num_demonstrations"),
            strategy=config.get("strategy"),
            truncate_dim=config.get("truncate_dim"),
            fingerprint=config.get("fingerprint"),
        )

    @staticmethod
    def validate_config(config: dict[str, Any]) -> None:
        """Check a configuration.

        Raises:
            ConfigError: If it has a setting that this version does not know.
        """
        unknown = sorted(set(config) - set(_KEYS))
        if unknown:
            raise ConfigError(
                f"the configuration of embedding function {_NAME} has {', '.join(unknown)}, known are "
                f"{', '.join(_KEYS)}; run `pip install --upgrade epic-rag`"
            )

    def validate_config_update(self, old_config: dict[str, Any], new_config: dict[str, Any]) -> None:
        """Refuse another model for vectors that are there; query settings may change.

        Raises:
            FingerprintError: If the fingerprints differ.
        """
        old, new = old_config.get("fingerprint"), new_config.get("fingerprint")
        if old != new:
            raise FingerprintError(
                f"the collection's vectors were made by {old_config.get('model')} ({old}), the new configuration has "
                f"{new_config.get('model')} ({new}); make a new collection and add the documents again"
            )

    def _loaded(self) -> EpicEncoder:
        if self._encoder is None:
            with _loading:
                encoder, lock = _load(self._source, self._truncate_dim)
            self._encoder = self._checked(encoder)
            self._lock = lock
        return self._encoder

    def _checked(self, encoder: EpicEncoder) -> EpicEncoder:
        if self._fingerprint is not None and encoder.fingerprint != self._fingerprint:
            raise FingerprintError(
                f"the vectors were made by a checkpoint with fingerprint {self._fingerprint}, {encoder.name} has "
                f"{encoder.fingerprint}; give the checkpoint they were made with, or make a new collection and add "
                "the documents again"
            )
        self._fingerprint = encoder.fingerprint
        return encoder


def _rows(vectors: Any) -> Embeddings:
    return [np.asarray(row, dtype=np.float32) for row in vectors]
