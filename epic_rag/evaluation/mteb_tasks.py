"""Local evaluation sets as mteb tasks, so that protocol and metrics are mteb's own and nothing is downloaded.

| kind | mteb class | main score |
|---|---|---|
| retrieval | AbsTaskRetrieval | ndcg_at_10 |
| reranking | AbsTaskRetrieval over each query's candidates | map_at_1000 |
| sts | AbsTaskSTS | cosine_spearman |
| classification | AbsTaskClassification: logistic regression on 8 rows a label, 10 draws | accuracy |
| clustering | AbsTaskClustering: mini-batch k-means on 10 samples | v_measure |
"""

from __future__ import annotations

from typing import Any, Literal

from datasets import Dataset, DatasetDict  # type: ignore[import-untyped]
from mteb.abstasks import AbsTask, AbsTaskClassification, AbsTaskClustering, AbsTaskRetrieval
from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
from mteb.abstasks.sts import AbsTaskSTS
from mteb.abstasks.task_metadata import TaskMetadata

from epic_rag.evaluation.local_sets import (
    ClassificationData,
    ClusteringData,
    Kind,
    LocalSet,
    RerankingData,
    RetrievalData,
    StsData,
)

__all__ = ["MAIN_SCORES", "make_task"]

_MtebType = Literal["Retrieval", "Reranking", "STS", "Classification", "Clustering"]
_TYPES: dict[Kind, _MtebType] = {
    "retrieval": "Retrieval",
    "reranking": "Reranking",
    "sts": "STS",
    "classification": "Classification",
    "clustering": "Clustering",
}
MAIN_SCORES: dict[Kind, str] = {
    "retrieval": "ndcg_at_10",
    "reranking": "map_at_1000",
    "sts": "cosine_spearman",
    "classification": "accuracy",
    "clustering": "v_measure",
}
"""The score of each kind that tables show."""


def _metadata(local_set: LocalSet) -> TaskMetadata:
    return TaskMetadata(
        name=local_set.name,
        type=_TYPES[local_set.kind],
        main_score=MAIN_SCORES[local_set.kind],
        description=f"The local {local_set.kind} set {local_set.name}.",
        # mteb reuses a stored result only under the same revision, so it is a hash of the data.
        dataset={"path": f"local/{local_set.name}", "revision": local_set.revision},
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        category="t2t",
    )


# mteb wants the metadata of a task on its class; each set has its own, so `make_task` derives a class for it.


class _Retrieval(AbsTaskRetrieval):
    source: RetrievalData

    def load_data(self, num_proc: int | None = None, **kwargs: Any) -> None:
        corpus = [{"id": item.id, "title": item.title, "text": item.text} for item in self.source.corpus]
        queries = [{"id": query, "text": text} for query, text in self.source.queries.items()]
        split = RetrievalSplitData(
            corpus=Dataset.from_list(corpus),
            queries=Dataset.from_list(queries),
            relevant_docs={query: dict(grades) for query, grades in self.source.relevant.items()},
            top_ranked=None,
        )
        self.dataset = {"default": {"test": split}}
        self.data_loaded = True


class _Reranking(AbsTaskRetrieval):
    source: RerankingData

    def load_data(self, num_proc: int | None = None, **kwargs: Any) -> None:
        data = self.source
        ids = [f"q{number}" for number in range(len(data.queries))]
        corpus: list[dict[str, str]] = []
        relevant: dict[str, dict[str, int]] = {}
        candidates: dict[str, list[str]] = {}
        for query, positives, negatives in zip(ids, data.positives, data.negatives, strict=True):
            relevant[query], candidates[query] = {}, []
            for number, text in enumerate((*positives, *negatives)):
                document = f"{query}-{number}"
                corpus.append({"id": document, "title": "", "text": text})
                candidates[query].append(document)
                relevant[query][document] = int(number < len(positives))
        split = RetrievalSplitData(
            corpus=Dataset.from_list(corpus),
            queries=Dataset.from_list([{"id": id_, "text": text} for id_, text in zip(ids, data.queries, strict=True)]),
            relevant_docs=relevant,
            top_ranked=candidates,
        )
        self.dataset = {"default": {"test": split}}
        self.data_loaded = True


class _Sts(AbsTaskSTS):
    source: StsData

    def load_data(self, num_proc: int | None = None, **kwargs: Any) -> None:
        data = self.source
        columns = {"sentence1": list(data.first), "sentence2": list(data.second), "score": list(data.scores)}
        self.dataset = {"default": DatasetDict({"test": Dataset.from_dict(columns)})}
        self.data_loaded = True


class _Classification(AbsTaskClassification):
    source: ClassificationData

    def load_data(self, num_proc: int | None = None, **kwargs: Any) -> None:
        splits = {
            name: Dataset.from_dict({"text": [text for text, _ in rows], "label": [label for _, label in rows]})
            for name, rows in (("train", self.source.train), ("test", self.source.test))
        }
        self.dataset = {"default": DatasetDict(splits)}
        self.data_loaded = True


class _Clustering(AbsTaskClustering):
    source: ClusteringData
    # The local sets are small: all of their texts are embedded.
    max_fraction_of_documents_to_embed = None

    def load_data(self, num_proc: int | None = None, **kwargs: Any) -> None:
        columns = {"sentences": list(self.source.texts), "labels": list(self.source.labels)}
        # A sample of more rows than there are would only repeat them.
        self.max_documents_per_cluster = min(AbsTaskClustering.max_documents_per_cluster, len(self.source.texts))
        self.dataset = {"default": DatasetDict({"test": Dataset.from_dict(columns)})}
        self.data_loaded = True


def make_task(local_set: LocalSet) -> AbsTask:
    """Return a new mteb task over a local set.

    A task draws its samples from a generator that it carries along, so a task that runs twice draws twice:
    make a new one for each run, and every model and k sees the same samples.
    """
    bases: dict[Kind, type[AbsTask]] = {
        "retrieval": _Retrieval,
        "reranking": _Reranking,
        "sts": _Sts,
        "classification": _Classification,
        "clustering": _Clustering,
    }
    attributes = {"metadata": _metadata(local_set), "source": local_set.data, "__module__": __name__}
    task_class: type[AbsTask] = type(f"Local_{local_set.kind}", (bases[local_set.kind],), attributes)
    return task_class()
