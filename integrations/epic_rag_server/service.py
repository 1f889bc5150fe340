"""The parts of a server that its routes share: the encoder's queue, models by name, banks, indexes, metrics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from epic_rag import QueryPrompt
from epic_rag_server.banks import BankStore
from epic_rag_server.batching import EncodingQueue
from epic_rag_server.errors import ApiError
from epic_rag_server.metrics import Metrics
from epic_rag_server.schemas import PromptFields, Role

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from epic_rag import EpicEncoder
    from epic_rag_chroma import ChromaIndexer

__all__ = ["Service"]


class Service:
    """One model and what is served with it.

    Args:
        encoder: The encoder; from now on used by the queue alone.
        indexes: Indexes by name.
        banks: Banks of demonstrations.
        batch_tokens: See `EncodingQueue`.
        max_texts: See `EncodingQueue`.
    """

    def __init__(
        self,
        encoder: EpicEncoder,
        indexes: Mapping[str, ChromaIndexer],
        banks: BankStore,
        *,
        batch_tokens: int | None = None,
        max_texts: int = 16_384,
    ) -> None:
        self.name = encoder.name
        self.fingerprint = encoder.fingerprint
        self.dimension = encoder.dimension
        self.indexes = indexes
        self.banks = banks
        self.metrics = Metrics()
        self.queue = EncodingQueue(encoder, batch_tokens=batch_tokens, max_texts=max_texts, on_batch=self.metrics.batch)
        self.metrics.queued.set_function(lambda: self.queue.texts)

    async def encode(self, texts: list[str], prompt: QueryPrompt | None) -> tuple[npt.NDArray[np.float32], int]:
        """Encode texts and count their tokens; see `EncodingQueue.encode`."""
        vectors, tokens = await self.queue.encode(texts, prompt)
        self.metrics.tokens.inc(tokens)
        return vectors, tokens

    def index(self, name: str | None) -> tuple[str, ChromaIndexer]:
        """Return an index and its name; None for the first.

        Raises:
            ApiError: 404 if there is none of this name.
        """
        if not self.indexes:
            raise ApiError(404, "This server has no index. Start it with --index-dir.", code="index_not_found")
        chosen = next(iter(self.indexes)) if name is None else name
        if chosen not in self.indexes:
            raise ApiError(
                404,
                f"There is no index {chosen[:80]!r}. Known are {', '.join(self.indexes)}.",
                param="index",
                code="index_not_found",
            )
        return chosen, self.indexes[chosen]

    def model_names(self) -> list[str]:
        """Return the names of models: plain, for queries, for passages, and for queries with each bank."""
        banks = [f"{self.name}-query@{bank}" for bank in self.banks.names()]
        return [self.name, f"{self.name}-query", f"{self.name}-passage", *banks]

    def prompt(self, model: str | None, role: Role | None, fields: PromptFields) -> QueryPrompt | None:
        """Return the prompt of queries, or None for passages.

        Args:
            model: A name of `model_names`; None for the plain name.
            role: The role by a field of the request.
            fields: The prompt's fields; only queries have a prompt.

        Raises:
            ApiError: 404 for an unknown model or bank, 400 for a contradiction.
        """
        named: str | None = None
        bank = fields.bank
        if model is not None and model != self.name:
            kind, _, of_name = model.removeprefix(f"{self.name}-").partition("@")
            named = {"query": "query", "passage": "passage"}.get(kind)
            if not model.startswith(f"{self.name}-") or named is None or (of_name and named == "passage"):
                known = ", ".join(self.model_names()[:3])
                raise ApiError(
                    404,
                    f"There is no model {model[:80]!r}. Use {known}, or {self.name}-query@BANK.",
                    param="model",
                    code="model_not_found",
                )
            if of_name and bank is not None and bank != of_name:
                raise ApiError(400, "Two banks are named. Use the model's name or the field.", param="bank")
            bank = of_name or bank
        by_field = None if role is None else ("query" if role in ("query", "search_query") else "passage")
        if named and by_field and named != by_field:
            raise ApiError(
                400, f"The model's name is for a {named}, input_type for a {by_field}. Use one.", param="input_type"
            )
        if (named or by_field) != "query":
            given = [name for name in PromptFields.model_fields if getattr(fields, name) is not None]
            if given:
                raise ApiError(
                    400,
                    f"{given[0]} applies to queries. Use the model {self.name}-query, or input_type query.",
                    param=given[0],
                )
            return None
        return QueryPrompt(
            task=fields.task,
            instruction=fields.instruction,
            bank=None if bank is None else self.banks.resolve(bank),
            num_demonstrations=fields.num_demonstrations,
        )

    def close(self) -> None:
        """Answer waiting requests, and close the indexes."""
        self.queue.close()
        for indexer in self.indexes.values():
            indexer.close()
