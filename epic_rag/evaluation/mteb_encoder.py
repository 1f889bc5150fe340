"""`EpicEncoder` as an encoder that mteb can evaluate: prompts on queries, none on documents."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ModelMeta, ScoringFunction
from mteb.types import PromptType

from epic_rag.evaluation.embedding import EmbeddingStore, QueryPrompt, Vectors

__all__ = ["EpicMtebEncoder", "meta_name"]


def meta_name(label: str) -> str:
    """A label as mteb wants a model's name, "organisation/model", which becomes a folder's name."""
    return f"epic-rag/{re.sub(r'[^A-Za-z0-9._-]+', '_', label).strip('_.') or 'model'}"


class EpicMtebEncoder(AbsEncoder):
    """One model under one prompt.

    mteb would give documents a generic prompt where a task has none of its own; here documents are always
    bare. Everything else (both sides of symmetric tasks, too) is encoded as a query behind the prompt.

    k, strategy and a hash of the prompt are in the model's `experiment_kwargs`, so that mteb's stored results
    of different prompts do not collide; the model's fingerprint is its revision.

    Args:
        store: Encodes and remembers.
        prompt: What stands before queries: a prompt, or a function from a task's metadata to one.
        name: What to call the model.
    """

    mteb_model_meta: ModelMeta

    def __init__(
        self,
        store: EmbeddingStore,
        prompt: QueryPrompt | Callable[[TaskMetadata], QueryPrompt],
        *,
        name: str = "model",
    ) -> None:
        self.model = store
        self._prompt = prompt
        experiment: dict[str, Any] | None = None
        if isinstance(prompt, QueryPrompt):
            experiment = {"k": len(prompt.demonstrations), "prompt": prompt.fingerprint}
            if prompt.demonstrations:
                experiment["strategy"] = prompt.strategy
        self.mteb_model_meta = ModelMeta.create_empty(
            overwrites={
                "name": meta_name(name),
                "revision": store.revision,
                "similarity_fn_name": ScoringFunction.COSINE,
                "embed_dim": store.encoder.dimension,
                "modalities": ["text"],
                "experiment_kwargs": experiment,
            }
        )

    def encode(
        self,
        inputs: Iterable[Any],
        *,
        task_metadata: TaskMetadata,
        hf_split: str,
        hf_subset: str,
        prompt_type: PromptType | None = None,
        **kwargs: Any,
    ) -> Vectors:
        """Encode what mteb hands over.

        Args:
            inputs: Batches with a "text" list each; a document's text is its title and text already.
            task_metadata: Of the task; a prompt function gets it.
            hf_split: Not used.
            hf_subset: Not used.
            prompt_type: Document, query, or None for symmetric tasks.
            **kwargs: mteb's batch size and progress flag; the store has its own.

        Returns:
            (n, dim) float32, unit rows, in order.
        """
        texts = [text for batch in inputs for text in batch["text"]]
        store: EmbeddingStore = self.model
        if prompt_type == PromptType.document:
            return store.documents(texts)
        prompt = self._prompt if isinstance(self._prompt, QueryPrompt) else self._prompt(task_metadata)
        return store.queries(texts, prompt)
