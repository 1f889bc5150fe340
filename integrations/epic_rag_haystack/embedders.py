"""Embedders of Haystack: components with the inputs, outputs and settings of Haystack's own.

`EpicTextEmbedder` embeds a query with instruction and demonstrations, `EpicDocumentEmbedder` embeds documents bare. A
pipeline that is written to YAML holds settings and the texts of a bank, never weights.
"""
# Haystack reads the types of `run` at runtime: annotations of this module are no strings.

import os
from dataclasses import replace
from typing import Any

from haystack import Document, component, default_from_dict, default_to_dict
from haystack.utils import ComponentDevice

from epic_rag.demonstrations import DemonstrationBank, Selection
from epic_rag.encoder import EpicEncoder
from epic_rag.lazy_encoder import LazyEncoder, load_prompt
from epic_rag.query_prompt import QueryPrompt, QueryStrategy

__all__ = ["EpicDocumentEmbedder", "EpicTextEmbedder"]

Bank = DemonstrationBank | str | os.PathLike[str]


class _Embedder:
    """Settings, encoder and serialisation of both components."""

    def __init__(
        self,
        *,
        model: str | os.PathLike[str] | None,
        task: str | None,
        bank: Bank | None,
        instruction: str | None,
        num_demonstrations: int | None,
        strategy: QueryStrategy | None,
        selection: Selection,
        max_query_tokens: int | None,
        max_document_tokens: int | None,
        truncate_dim: int | None,
        device: str | ComponentDevice | None,
        dtype: str | None,
        **others: Any,
    ) -> None:
        prompt: dict[str, Any] = {
            "task": task,
            "bank": os.fspath(bank) if isinstance(bank, os.PathLike) else bank,
            "instruction": instruction,
            "num_demonstrations": num_demonstrations,
            "strategy": strategy,
            "selection": selection,
        }
        encoder = {
            "model": os.fspath(model) if isinstance(model, os.PathLike) else model,
            "max_query_tokens": max_query_tokens,
            "max_document_tokens": max_document_tokens,
            "truncate_dim": truncate_dim,
            "device": device.to_torch_str() if isinstance(device, ComponentDevice) else device,
            "dtype": dtype,
        }
        self._settings: dict[str, Any] = {**encoder, **prompt, **others}
        self._prompt = load_prompt(QueryPrompt(**prompt))
        self._lazy = LazyEncoder(encoder)

    @property
    def encoder(self) -> EpicEncoder:
        """The encoder; loaded first if necessary. It is not thread-safe: use it only while no pipeline runs."""
        return self._lazy.load()

    def warm_up(self) -> None:
        """Load the model; `run` does so, too, if this was not called.

        Raises:
            CheckpointError: If there is no such checkpoint or it does not load.
        """
        self._lazy.load()

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain values."""
        bank = self._settings["bank"]
        values = {**self._settings, "bank": bank.to_dict() if isinstance(bank, DemonstrationBank) else bank}
        result: dict[str, Any] = default_to_dict(self, **values)
        return result

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "_Embedder":
        """Make a component of what `to_dict` returned."""
        settings = dict(data["init_parameters"])
        if isinstance(settings.get("bank"), dict):
            settings["bank"] = DemonstrationBank.from_dict(settings["bank"])
        result: _Embedder = default_from_dict(cls, {**data, "init_parameters": settings})
        return result

    def _get_telemetry_data(self) -> dict[str, Any]:
        return {}


@component
class EpicTextEmbedder(_Embedder):
    """Embed a query with an instruction and, if there is a bank, with its demonstrations.

    Use the same model in `EpicDocumentEmbedder`. The bank can be changed at any time over stored documents.

    Args:
        model: A shipped checkpoint, a folder, a hub name or a remote model; None for the default.
        task: A known task, for its instruction.
        bank: Demonstrations: a bank, a bank folder or a built-in name.
        instruction: Replaces the instruction of task and bank; "" for none.
        num_demonstrations: How many demonstrations of the bank to use; None for all.
        strategy: How they reach the query; None for the checkpoint's default.
        selection: Which ones.
        max_query_tokens: Longest query in tokens; None for the model's limit.
        truncate_dim: Keep the first N dimensions and renormalise; as in the document embedder.
        device: "cpu", "cuda", ..., or Haystack's ComponentDevice; None takes a GPU if there is one.
        dtype: "float32", "bfloat16", "float16" or "auto".

    Raises:
        TaskError: If the task is unknown.
        BankError: If the bank is missing or malformed.
        PromptError: If the settings of the prompt do not fit together.

    Example:
        >>> from epic_rag_haystack import EpicTextEmbedder
        >>> embedder = EpicTextEmbedder(task="docs", bank="docs")
        >>> len(embedder.run("how do I undo this?")["embedding"])
        384
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        *,
        task: str | None = None,
        bank: Bank | None = None,
        instruction: str | None = None,
        num_demonstrations: int | None = None,
        strategy: QueryStrategy | None = None,
        selection: Selection = "first",
        max_query_tokens: int | None = None,
        max_document_tokens: int | None = None,
        truncate_dim: int | None = None,
        device: str | ComponentDevice | None = None,
        dtype: str | None = None,
    ) -> None:
        _Embedder.__init__(  # `super()` does not know the class that `component` makes
            self,
            model=model,
            task=task,
            bank=bank,
            instruction=instruction,
            num_demonstrations=num_demonstrations,
            strategy=strategy,
            selection=selection,
            max_query_tokens=max_query_tokens,
            max_document_tokens=max_document_tokens,
            truncate_dim=truncate_dim,
            device=device,
            dtype=dtype,
        )

    @component.output_types(embedding=list[float])
    def run(self, text: str) -> dict[str, list[float]]:
        """Embed a query.

        Returns:
            `embedding`: a unit vector.

        Raises:
            TypeError: If the input is no string.
        """
        return {"embedding": self._lazy.embed("query", [_one_text(text)], self._prompt)[0]}

    @component.output_types(embedding=list[float])
    async def run_async(self, text: str) -> dict[str, list[float]]:
        """Embed a query in another thread; see `run`."""
        return {"embedding": (await self._lazy.aembed("query", [_one_text(text)], self._prompt))[0]}


@component
class EpicDocumentEmbedder(_Embedder):
    """Embed documents bare; one that is longer than the model reads in windows whose vectors are averaged.

    Settings of the prompt change documents only in a symmetric task (paraphrases, intents), where documents are
    embedded like queries.

    Args:
        model: See `EpicTextEmbedder`.
        meta_fields_to_embed: Metadata before the text, for instance `["title"]`.
        embedding_separator: Stands between metadata and text.
        task: See `EpicTextEmbedder`.
        bank: The same.
        instruction: The same.
        num_demonstrations: The same.
        strategy: The same.
        selection: The same.
        max_query_tokens: The same; for symmetric tasks.
        max_document_tokens: Longest document in tokens; None for the model's limit.
        truncate_dim: Keep the first N dimensions and renormalise; as in the text embedder.
        device: See `EpicTextEmbedder`.
        dtype: The same.

    Raises:
        TaskError: If the task is unknown.
        BankError: If the bank is missing or malformed.
        PromptError: If the settings of the prompt do not fit together.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        *,
        meta_fields_to_embed: list[str] | None = None,
        embedding_separator: str = "\n",
        task: str | None = None,
        bank: Bank | None = None,
        instruction: str | None = None,
        num_demonstrations: int | None = None,
        strategy: QueryStrategy | None = None,
        selection: Selection = "first",
        max_query_tokens: int | None = None,
        max_document_tokens: int | None = None,
        truncate_dim: int | None = None,
        device: str | ComponentDevice | None = None,
        dtype: str | None = None,
    ) -> None:
        _Embedder.__init__(  # `super()` does not know the class that `component` makes
            self,
            model=model,
            task=task,
            bank=bank,
            instruction=instruction,
            num_demonstrations=num_demonstrations,
            strategy=strategy,
            selection=selection,
            max_query_tokens=max_query_tokens,
            max_document_tokens=max_document_tokens,
            truncate_dim=truncate_dim,
            device=device,
            dtype=dtype,
            meta_fields_to_embed=list(meta_fields_to_embed or ()),
            embedding_separator=embedding_separator,
        )

    @component.output_types(documents=list[Document])
    def run(self, documents: list[Document]) -> dict[str, list[Document]]:
        """Embed documents.

        Returns:
            `documents`: copies with a unit vector each, in order.

        Raises:
            TypeError: If the input is no list of documents.
        """
        return _with(documents, self._lazy.embed("document", self._texts(documents), self._prompt))

    @component.output_types(documents=list[Document])
    async def run_async(self, documents: list[Document]) -> dict[str, list[Document]]:
        """Embed documents in another thread; see `run`."""
        return _with(documents, await self._lazy.aembed("document", self._texts(documents), self._prompt))

    def _texts(self, documents: list[Document]) -> list[str]:
        if not isinstance(documents, list) or not all(isinstance(each, Document) for each in documents):
            raise TypeError("EpicDocumentEmbedder takes a list of Documents. Pass a text to EpicTextEmbedder.")
        names: list[str] = self._settings["meta_fields_to_embed"]
        separator: str = self._settings["embedding_separator"]
        return [
            separator.join([*(str(each.meta[name]) for name in names if each.meta.get(name)), each.content or ""])
            for each in documents
        ]


def _one_text(text: object) -> str:
    if not isinstance(text, str):
        raise TypeError("EpicTextEmbedder takes one text. Pass a list of Documents to EpicDocumentEmbedder.")
    return text


def _with(documents: list[Document], vectors: list[list[float]]) -> dict[str, list[Document]]:
    return {
        "documents": [replace(document, embedding=vector) for document, vector in zip(documents, vectors, strict=True)]
    }
