"""`EpicEmbeddings`: an epic-rag encoder as an embedding model of LangChain."""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from typing import TYPE_CHECKING

from langchain_core.embeddings import Embeddings

from epic_rag.demonstrations import DemonstrationBank
from epic_rag.encoder import EpicEncoder
from epic_rag.errors import ConfigError
from epic_rag.lazy_encoder import LazyEncoder, encoder_settings, is_symmetric, load_prompt
from epic_rag.query_prompt import QueryPrompt

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from epic_rag.demonstrations import Selection
    from epic_rag.query_prompt import PromptSettings, QueryStrategy

__all__ = ["EpicEmbeddings"]


class EpicEmbeddings(Embeddings):
    """A LangChain embedding model that adapts to demonstrations.

    Documents are embedded bare; one that is longer than the model reads is embedded in windows whose vectors are
    averaged, and a warning says so once. Queries are embedded with an instruction and, if there is a bank, with its
    demonstrations, so a bank can be changed at any time over an existing vector store.

    The model is loaded at once; copies share it, and a pickle has the settings only. Calls from several threads wait
    for each other, and async methods use a thread of the object.

    Args:
        model: A shipped checkpoint, a folder, a hub name, a remote model, or a loaded encoder; None for the default.
        prompt: Prompt for queries. Alternatively, give its fields as keyword arguments.
        max_query_tokens: Longest query in tokens; None for the model's limit.
        max_document_tokens: Longest document in tokens; None for the model's limit.
        truncate_dim: Keep the first N dimensions and renormalise.
        device: "cpu", "cuda", ...; None takes a GPU if there is one.
        dtype: "float32", "bfloat16", "float16" or "auto".
        **settings: Fields of `QueryPrompt`: `task`, `bank`, `instruction`, `num_demonstrations`, `strategy`,
            `selection`.

    Raises:
        CheckpointError: If there is no such checkpoint or it does not load.
        ConfigError: If settings of the model are given for a loaded encoder, or a setting cannot work.
        TaskError: If the task is unknown.
        BankError: If the bank is missing or malformed.
        PromptError: If the prompt's settings do not fit together.
        FingerprintError: By the first text of a pickled copy, if its checkpoint has changed.

    Example:
        >>> from epic_rag_langchain import EpicEmbeddings
        >>> embeddings = EpicEmbeddings(task="docs")
        >>> adapted = embeddings.with_bank("docs")
        >>> adapted.document_fingerprint == embeddings.document_fingerprint
        True
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | EpicEncoder | None = None,
        prompt: QueryPrompt | None = None,
        *,
        max_query_tokens: int | None = None,
        max_document_tokens: int | None = None,
        truncate_dim: int | None = None,
        device: str | None = None,
        dtype: str | None = None,
        **settings: Unpack[PromptSettings],
    ) -> None:
        self._prompt = load_prompt(QueryPrompt.of(prompt, settings))
        options = {
            "max_query_tokens": max_query_tokens,
            "max_document_tokens": max_document_tokens,
            "truncate_dim": truncate_dim,
            "device": device,
            "dtype": dtype,
        }
        if isinstance(model, EpicEncoder):
            given = ", ".join(name for name, value in options.items() if value is not None)
            if given:
                raise ConfigError(f"The encoder is loaded already. Leave out {given}, or pass its name.")
            self._lazy = LazyEncoder(encoder_settings(model), model)
        else:
            self._lazy = LazyEncoder({"model": None if model is None else os.fspath(model), **options})
            self._lazy.load()

    @property
    def encoder(self) -> EpicEncoder:
        """The encoder. It is not thread-safe: use it only while this object is idle."""
        return self._lazy.load()

    @property
    def prompt(self) -> QueryPrompt:
        """The prompt of queries, with its bank loaded."""
        return self._prompt

    @property
    def document_fingerprint(self) -> str:
        """Identifies everything that changes a document's vector: a namespace for LangChain's caches.

        It is the encoder's fingerprint. In a symmetric task, documents are embedded like queries, and it depends on the
        prompt as well.
        """
        if not is_symmetric(self._prompt):
            return self.encoder.fingerprint
        bank = self._prompt.bank
        facts = replace(self._prompt, bank=bank.fingerprint if isinstance(bank, DemonstrationBank) else None)
        digest = hashlib.sha256(repr((facts, self.encoder.query_fingerprint)).encode()).hexdigest()
        return f"{self.encoder.fingerprint}-{digest[:8]}"

    def with_bank(
        self,
        bank: DemonstrationBank | str | os.PathLike[str] | None,
        *,
        num_demonstrations: int | None = None,
        selection: Selection = "first",
        strategy: QueryStrategy | None = None,
    ) -> EpicEmbeddings:
        """Return embeddings with other demonstrations that share the model; stored document vectors stay valid.

        Args:
            bank: A bank, a bank folder or a built-in name; None for no demonstrations.
            num_demonstrations: How many to use; None for all.
            selection: Which ones.
            strategy: How they reach a query; None for the checkpoint's default.

        Raises:
            BankError: If the bank is missing or malformed.
            PromptError: If the settings do not fit together.
        """
        other = object.__new__(type(self))
        other._lazy = self._lazy
        other._prompt = load_prompt(
            replace(
                self._prompt,
                bank=bank,
                num_demonstrations=num_demonstrations,
                selection=selection,
                strategy=strategy,
            )
        )
        return other

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Embed documents; a unit vector for each."""
        return self._lazy.embed("document", texts, self._prompt)

    def embed_query(self, text: str) -> list[float]:
        """Embed a query with instruction and demonstrations; a unit vector."""
        return self._lazy.embed("query", [text], self._prompt)[0]

    async def aembed_documents(self, texts: list[str]) -> list[list[float]]:
        """Embed documents in another thread."""
        return await self._lazy.aembed("document", texts, self._prompt)

    async def aembed_query(self, text: str) -> list[float]:
        """Embed a query in another thread."""
        return (await self._lazy.aembed("query", [text], self._prompt))[0]

    def __repr__(self) -> str:
        """Return the model's name and the prompt."""
        return f"{type(self).__name__}(model={self._lazy.settings['model']!r}, prompt={self._prompt!r})"
