"""Embedding models of other libraries and services, as `EpicEncoder` uses them.

An epic-rag checkpoint is run by `epic_rag.backbone`. All other models are an `EmbeddingModel`: texts in, unit vectors
out, with the prompts of the model's authors. Demonstrations move such a model's query vectors (strategies "reader" and
"task-vector"); they cannot stand in a prompt that the model was not trained to read.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from epic_rag.errors import ConfigError
from epic_rag.long_texts import SPECIAL_TOKENS
from epic_rag.model_conventions import has_instruction

__all__ = [
    "REMOTE_KINDS",
    "EmbeddingModel",
    "Fact",
    "Role",
    "Vectors",
    "is_remote",
    "join_unique",
    "refuse_options",
    "split_onnx",
]

Vectors = npt.NDArray[np.float32]
Role = Literal["query", "document"]
# Prefixes of model names that are not folders or hub names.
REMOTE_KINDS = ("openai", "ollama", "tei", "cohere")
_ONNX = "onnx:"


@dataclass(frozen=True)
class Fact:
    """A setting of a model, and where it was found.

    Attributes:
        name: Name of the setting.
        value: Its value, for people.
        source: File or table that states it; "guessed" in it where nothing states it.
    """

    name: str
    value: str
    source: str


class EmbeddingModel(ABC):
    """A model that embeds queries and documents.

    Attributes:
        kind: "sentence-transformers", "onnx", "openai", ...
        name: Name in messages.
        dimension: Width of its vectors.
        truncate_dim: Width that the model's files ask for; None for all.
        query_prompt: Text before a query.
        document_prompt: Text before a document.
        max_query_tokens: Longest query in tokens, prompt and special tokens counted.
        max_document_tokens: Longest document in tokens, counted the same way.
    """

    kind: ClassVar[str]
    name: str
    dimension: int
    truncate_dim: int | None = None
    query_prompt: str = ""
    document_prompt: str = ""
    max_query_tokens: int
    max_document_tokens: int

    @property
    def takes_instructions(self) -> bool:
        """True if the query prompt holds an instruction, which that of a task or a bank replaces."""
        return has_instruction(self.query_prompt)

    @abstractmethod
    def embed(
        self,
        texts: Sequence[str],
        role: Role,
        *,
        instruction: str | None = None,
        batch_size: int | None = None,
        show_progress: bool = False,
    ) -> Vectors:
        """Embed texts.

        Args:
            texts: The texts.
            role: What they are.
            instruction: Replaces the one in the query's prompt; None keeps it.
            batch_size: Most texts in a batch; None lets the model choose.
            show_progress: Whether to draw a progress bar.

        Returns:
            float32 unit rows (n, dimension), in order.
        """

    @abstractmethod
    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Return the token count of each text without special tokens; an estimate where there is no tokenizer."""

    def token_counter(self) -> Callable[[Sequence[str], bool], list[int]]:
        """Return a function of texts and whether they are documents: their lengths in tokens, special ones included."""

        def count(texts: Sequence[str], is_document: bool) -> list[int]:
            limit = self.max_document_tokens if is_document else self.max_query_tokens
            return [min(tokens + SPECIAL_TOKENS, limit) for tokens in self.count_tokens(texts)]

        return count

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Return everything that decides a vector, for the fingerprint: JSON values that do not name a place."""

    @abstractmethod
    def describe(self) -> list[Fact]:
        """Return what was understood of the model, for people."""

    @property
    def precision(self) -> str:
        """Number format that the model computes in."""
        return "float32"

    @property
    def device(self) -> str:
        """Device or address that the model runs on."""
        return "cpu"


def is_remote(name: object) -> bool:
    """Return whether a name is that of a remote model, `openai:NAME@URL` for instance."""
    return isinstance(name, str) and name.split(":", 1)[0] in REMOTE_KINDS and ":" in name


def refuse_options(what: str, name: object, options: Mapping[str, object]) -> None:
    """Check that no option is given that only a checkpoint of epic-rag takes.

    Raises:
        ConfigError: If one is.
    """
    given = ", ".join(key for key, value in options.items() if value is not None and value is not False)
    if given:
        raise ConfigError(f"{given}: {what} ({name}) does not take it. Leave it out.")


def split_onnx(name: object) -> tuple[str, str | None] | None:
    """Split `onnx:MODEL` or `onnx:MODEL@FILE` into the model and its file; None for other names."""
    if not isinstance(name, str) or not name.startswith(_ONNX):
        return None
    model, mark, file = name.removeprefix(_ONNX).partition("@")
    return model, file if mark else None


def join_unique(texts: Sequence[str]) -> tuple[list[str], list[int]]:
    """Return the different texts in their first order, and the place of each text among them."""
    places: dict[str, int] = {}
    index = [places.setdefault(text, len(places)) for text in texts]
    return list(places), index
