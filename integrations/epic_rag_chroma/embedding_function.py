"""`EpicEmbeddingFunction`: an epic-rag encoder as an embedding function of Chroma.

Chroma stores an embedding function's configuration with the collection and builds the function from it for every
text. So building one costs nothing (the model is loaded with the first text), and loaded models are cached.
"""

from __future__ import annotations

import copy
import os
import threading
from dataclasses import fields, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from chromadb.api.types import Documents, EmbeddingFunction, Embeddings, Space
from chromadb.utils.embedding_functions import register_embedding_function

from epic_rag.checkpoints import EPIC_FILE, check_width, read_epic_file, resolve
from epic_rag.embedding_model import is_remote, split_onnx
from epic_rag.errors import ConfigError, FingerprintError, PromptError
from epic_rag.query_prompt import QueryPrompt
from epic_rag.tasks import get_task
from epic_rag_chroma.store.paths import absolute_source

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from epic_rag import EpicEncoder
    from epic_rag.query_prompt import PromptSettings

__all__ = ["EpicEmbeddingFunction"]

_NAME = "epic-rag"
# Settings that releases without them refuse in a configuration: left out unless they are set.
_OPTIONAL = ("instruction", "strategy", "selection")
_KEYS = ("model", "task", "bank", "num_demonstrations", *_OPTIONAL, "truncate_dim", "fingerprint")
_CACHED_ENCODERS = 2
_loading = threading.Lock()


@lru_cache(maxsize=_CACHED_ENCODERS)
def _load(
    source: str | None, truncate_dim: int | None, device: str | None, dtype: str | None
) -> tuple[EpicEncoder, threading.Lock]:
    """Return an encoder and a lock for it, since encoders are not thread-safe."""
    from epic_rag import EpicEncoder

    encoder = EpicEncoder.from_pretrained(source, truncate_dim=truncate_dim, device=device, dtype=dtype)
    return encoder, threading.Lock()


def _absolute_bank(bank: str | os.PathLike[str]) -> str:
    """Return a built-in bank's name unchanged (even beside a folder of that name), a folder as an absolute path."""
    text = os.fspath(bank)
    if os.path.isdir(text):
        from epic_rag.demonstrations import built_in_banks

        if text in built_in_banks():
            return text
    return absolute_source(text)


@register_embedding_function
class EpicEmbeddingFunction(EmbeddingFunction[Documents]):
    """Embed documents and queries with an epic-rag checkpoint.

    Documents are embedded bare; one that is longer than the model reads is embedded in windows whose vectors are
    averaged, and a warning says so once. Queries get the prompt's instruction and demonstrations, which can be changed
    at any time: the documents of a collection stay as they are.

    A copy shares the loaded model. A pickle has the settings only, and the other process loads the model.

    Args:
        model: Name or folder of a checkpoint, or a loaded encoder; None for the default checkpoint.
        prompt: Prompt for queries; its bank must be a name or a folder. Alternatively, give its fields as keyword
            arguments.
        truncate_dim: Number of dimensions that are kept of the vectors.
        fingerprint: Required fingerprint of the checkpoint; None for any.
        device: Where the model runs; see `EpicEncoder.from_pretrained`. Device and data type belong to the machine and
            are not stored with a collection: pass the function to `get_collection` again to use them.
        dtype: Data type of the model's computations.
        **settings: See `QueryPrompt`: `task`, `bank`, `instruction`, `num_demonstrations`, `strategy`, `selection`.

    Raises:
        CheckpointError: If there is no such checkpoint. (A name of the Hugging Face hub is looked up with the first
            text.)
        ConfigError: If a setting cannot be stored in a collection's configuration, `truncate_dim` is wider than the
            model, or `device` or `dtype` are given for a loaded encoder.
        TaskError: If the task is unknown.
        BankError: If there is no such bank.
        PromptError: If the prompt's settings do not fit together.
        FingerprintError: When the first text is embedded, if the checkpoint has another fingerprint.
    """

    _source: str | None
    _prompt: QueryPrompt
    _truncate_dim: int | None
    _fingerprint: str | None
    _device: str | None
    _dtype: str | None

    def __init__(
        self,
        model: str | os.PathLike[str] | EpicEncoder | None = None,
        prompt: QueryPrompt | None = None,
        *,
        truncate_dim: int | None = None,
        fingerprint: str | None = None,
        device: str | None = None,
        dtype: str | None = None,
        **settings: Unpack[PromptSettings],
    ) -> None:
        prompt = QueryPrompt.of(prompt, settings)
        if prompt.bank is not None and not isinstance(prompt.bank, (str, os.PathLike)):
            raise ConfigError(
                f"bank is a {type(prompt.bank).__name__}, but a collection can only store a bank's name or folder. "
                "Save it with `bank.save(folder)` and pass the folder."
            )
        if prompt.bank is not None:
            prompt = replace(prompt, bank=_absolute_bank(prompt.bank))
        if prompt.task is not None:
            get_task(prompt.task)
        bank, wanted = prompt.resolve_bank(), prompt.num_demonstrations
        if bank is not None and wanted is not None and wanted > len(bank):
            raise PromptError(f"num_demonstrations is {wanted}, but the bank has {len(bank)}. Use at most {len(bank)}.")
        encoder: EpicEncoder | None = None
        if model is None or isinstance(model, (str, os.PathLike)):
            source = None if model is None else absolute_source(model)
            _check_checkpoint(source, truncate_dim)
        else:
            if device is not None or dtype is not None:
                raise ConfigError("The encoder is loaded already. Leave out device and dtype, or pass its name.")
            encoder = model
            check_width(truncate_dim, model.dimension if model.truncate_dim is None else model.truncate_dim)
            if truncate_dim is not None and truncate_dim != model.truncate_dim:
                # The width is part of the fingerprint. A shallow copy keeps the caller's object unchanged.
                encoder = copy.copy(model)
                encoder.truncate_dim = truncate_dim
            source, truncate_dim = absolute_source(model.source), encoder.truncate_dim
        self.__setstate__(
            {
                "_source": source,
                "_prompt": prompt,
                "_truncate_dim": truncate_dim,
                "_fingerprint": fingerprint,
                "_device": device,
                "_dtype": dtype,
            }
        )
        if encoder is not None:
            self.__dict__["_encoder"] = self._checked(encoder)

    def __call__(self, input: Documents) -> Embeddings:
        """Embed documents.

        Args:
            input: Texts, at least one (Chroma refuses an empty list).

        Returns:
            A float32 unit vector for each.

        Raises:
            ConfigError: If `input` is a single text.
        """
        texts, encoder = _texts(input), self._loaded()
        with self._lock:
            vectors = encoder.encode_document(texts, long_texts="windows")
        return _rows(vectors)

    def embed_query(self, input: Documents) -> Embeddings:
        """Embed queries with the instruction and the demonstrations of the prompt.

        Raises:
            ConfigError: If `input` is a single text.
        """
        texts, encoder = _texts(input), self._loaded()
        with self._lock:
            vectors = encoder.encode_query(texts, self._prompt)
        return _rows(vectors)

    def __getstate__(self) -> dict[str, Any]:
        """Return the settings without the model."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_encoder", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the settings; the first text loads the model."""
        self.__dict__.update(state)
        self._encoder: EpicEncoder | None = None
        self._lock = threading.Lock()

    def __copy__(self) -> EpicEmbeddingFunction:
        """Return a copy that shares the loaded model."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> EpicEmbeddingFunction:
        """Return a copy as `__copy__` does: settings are immutable, and weights are read-only."""
        return copy.copy(self)

    @staticmethod
    def name() -> str:
        """Return the name under which Chroma registers the function."""
        return _NAME

    def default_space(self) -> Space:
        """Return "cosine"."""
        return "cosine"

    def supported_spaces(self) -> list[Space]:
        """Return all three spaces, which rank unit vectors alike."""
        return ["cosine", "l2", "ip"]

    def get_config(self) -> dict[str, Any]:
        """Return the settings as plain values, with the checkpoint's fingerprint (which loads the model)."""
        if self._fingerprint is None:
            self._loaded()
        default = QueryPrompt()
        prompt = {
            field.name: getattr(self._prompt, field.name)
            for field in fields(self._prompt)
            if field.name not in _OPTIONAL or getattr(self._prompt, field.name) != getattr(default, field.name)
        }
        return {
            "model": self._source,
            **prompt,
            "truncate_dim": self._truncate_dim,
            "fingerprint": self._fingerprint,
        }

    @staticmethod
    def build_from_config(config: dict[str, Any]) -> EpicEmbeddingFunction:
        """Build the function from `get_config`'s values, also those of older releases; loads nothing yet."""
        EpicEmbeddingFunction.validate_config(config)
        prompt = {key: config[key] for key in QueryPrompt.__dataclass_fields__ if config.get(key) is not None}
        if prompt.get("strategy") == "none":  # older releases
            del prompt["strategy"]
            prompt["num_demonstrations"] = 0
        if prompt.get("num_demonstrations") and "bank" not in prompt:  # older releases: the task's built-in bank
            prompt["bank"] = prompt.get("task")
        # Not by the constructor: what it checks may be missing on this machine, and the collection be needed without.
        function = object.__new__(EpicEmbeddingFunction)
        function.__setstate__(
            {
                "_source": config.get("model"),
                "_prompt": QueryPrompt(**prompt),
                "_truncate_dim": config.get("truncate_dim"),
                "_fingerprint": config.get("fingerprint"),
                "_device": None,
                "_dtype": None,
            }
        )
        return function

    @staticmethod
    def validate_config(config: dict[str, Any]) -> None:
        """Check a configuration.

        Raises:
            ConfigError: If this version does not know one of its settings.
        """
        unknown = sorted(set(config) - set(_KEYS))
        if unknown:
            raise ConfigError(
                f"The configuration of embedding function {_NAME} has unknown settings: {', '.join(unknown)}. "
                "Run `pip install --upgrade epic-rag`."
            )

    def validate_config_update(self, old_config: dict[str, Any], new_config: dict[str, Any]) -> None:
        """Refuse another model for existing vectors; the prompt may change.

        Raises:
            FingerprintError: If the fingerprints differ.
        """
        old, new = old_config.get("fingerprint"), new_config.get("fingerprint")
        if old != new:
            raise FingerprintError(
                f"The collection's vectors were made by {old_config.get('model')} ({old}), the new configuration has "
                f"{new_config.get('model')} ({new}). Create a new collection and add the documents again."
            )

    def _loaded(self) -> EpicEncoder:
        if self._encoder is None:
            with _loading:
                encoder, lock = _load(self._source, self._truncate_dim, self._device, self._dtype)
            self._encoder = self._checked(encoder)
            self._lock = lock
        return self._encoder

    def _checked(self, encoder: EpicEncoder) -> EpicEncoder:
        if self._fingerprint is not None and encoder.fingerprint != self._fingerprint:
            raise FingerprintError(
                f"The vectors were made by a checkpoint with fingerprint {self._fingerprint}, {encoder.name} has "
                f"{encoder.fingerprint}. Use the former, or create a new collection and add the documents again."
            )
        self._fingerprint = encoder.fingerprint
        return encoder


def _check_checkpoint(source: str | None, truncate_dim: int | None) -> None:
    """Check a checkpoint without loading it: that a name or folder exists, and the width where it is recorded.

    Raises:
        CheckpointError: If there is none.
        ConfigError: If `truncate_dim` is not one of its widths.
    """
    if truncate_dim is not None and truncate_dim < 1:
        raise ConfigError(f"truncate_dim is {truncate_dim}. Use 1 or more.")
    if is_remote(source):
        return  # asked with the first text, as a server may start later
    onnx = split_onnx(source)
    source = source if onnx is None else onnx[0]
    if source is not None and source.count("/") == 1 and not os.path.isdir(source):
        return  # a name of the hub, which may have to be downloaded
    folder = resolve(source)
    if truncate_dim is not None and (folder / EPIC_FILE).is_file():
        dimension = read_epic_file(folder).get("dimension")
        if isinstance(dimension, int):
            check_width(truncate_dim, dimension)


def _texts(input: Documents) -> list[str]:
    if isinstance(input, str):
        raise ConfigError("The input is one text. Pass a list of texts.")
    return list(input)


def _rows(vectors: Any) -> Embeddings:
    return [np.asarray(row, dtype=np.float32) for row in vectors]
