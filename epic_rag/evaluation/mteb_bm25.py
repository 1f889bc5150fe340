"""BM25 as a search model that mteb can evaluate on retrieval and reranking tasks."""

from __future__ import annotations

from typing import Any

import numpy as np
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models.model_meta import ModelMeta
from mteb.types import (
    CorpusDatasetType,
    EncodeKwargs,
    QueryDatasetType,
    RetrievalOutputType,
    TopRankedDocumentsType,
)

from epic_rag.evaluation.bm25 import Bm25Index
from epic_rag.evaluation.mteb_encoder import meta_name

__all__ = ["Bm25Search"]


class Bm25Search:
    """BM25 behind mteb's protocol for models that search by themselves.

    Args:
        name: What to call it.
        revision: What decides its scores; mteb reuses a stored result under the same one alone.
    """

    mteb_model_meta: ModelMeta

    def __init__(self, *, name: str, revision: str) -> None:
        self.mteb_model_meta = ModelMeta.create_empty(
            overwrites={"name": meta_name(name), "revision": revision, "modalities": ["text"]}
        )
        self._ids: list[str] = []
        self._index: Bm25Index | None = None

    def index(
        self,
        corpus: CorpusDatasetType,
        *,
        task_metadata: TaskMetadata,
        hf_split: str,
        hf_subset: str,
        encode_kwargs: EncodeKwargs,
        num_proc: int | None,
        **kwargs: Any,
    ) -> None:
        """Index a corpus; a document is its title, a space and its text, as for encoders.

        Args:
            corpus: Rows with "id", "text" and perhaps "title".
            task_metadata: Not used.
            hf_split: Not used.
            hf_subset: Not used.
            encode_kwargs: Not used.
            num_proc: Not used.
            **kwargs: Not used.
        """
        self._ids = [row["id"] for row in corpus]
        self._index = Bm25Index([f"{row.get('title') or ''} {row['text']}".strip() for row in corpus])

    def search(
        self,
        queries: QueryDatasetType,
        *,
        task_metadata: TaskMetadata,
        hf_split: str,
        hf_subset: str,
        top_k: int,
        encode_kwargs: EncodeKwargs,
        top_ranked: TopRankedDocumentsType | None = None,
        num_proc: int | None,
        **kwargs: Any,
    ) -> RetrievalOutputType:
        """Rank the corpus, or each query's candidates, for every query.

        Args:
            queries: Rows with "id" and "text".
            task_metadata: Not used.
            hf_split: Not used.
            hf_subset: Not used.
            top_k: Most documents for a query.
            encode_kwargs: Not used.
            top_ranked: Candidates by query id, of a reranking task.
            num_proc: Not used.
            **kwargs: Not used.

        Returns:
            Document id to score, by query id. Documents without a word in common are left out of a retrieval
            task's ranking; all candidates of a reranking task are ranked.

        Raises:
            RuntimeError: `index` was not called.
        """
        if self._index is None:
            raise RuntimeError("search was called before index; call index with the corpus first")
        rows = {document: row for row, document in enumerate(self._ids)}
        found: RetrievalOutputType = {}
        for query, scores in zip(queries, self._index.scores([row["text"] for row in queries]), strict=True):
            if top_ranked is not None:
                best = np.array([rows[document] for document in top_ranked[query["id"]]], dtype=np.intp)
            else:
                best = np.flatnonzero(scores > 0)
            best = best[np.argsort(-scores[best], kind="stable")[:top_k]]
            found[query["id"]] = {self._ids[row]: float(scores[row]) for row in best}
        return found
