"""mteb: local sets as mteb tasks, `EpicEncoder` as an mteb encoder, and runs of one task.

Protocols and metrics of evaluation sets are mteb's, and nothing is downloaded for a local set:

| kind | mteb class | main score |
|---|---|---|
| retrieval | AbsTaskRetrieval | ndcg_at_10 |
| reranking | AbsTaskRetrieval over each query's candidates | map_at_1000 |
| sts | AbsTaskSTS | cosine_spearman |
| classification | AbsTaskClassification: logistic regression on 8 rows a label, 10 draws | accuracy |
| clustering | AbsTaskClustering: mini-batch k-means on 10 samples | v_measure |
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import datasets  # type: ignore[import-untyped]
import mteb
from datasets import Dataset, DatasetDict
from mteb.abstasks import AbsTask, AbsTaskClassification, AbsTaskClustering, AbsTaskRetrieval
from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
from mteb.abstasks.sts import AbsTaskSTS
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ModelMeta, ScoringFunction
from mteb.models.models_protocols import SearchProtocol
from mteb.types import EncodeKwargs, PromptType
from sklearn.exceptions import ConvergenceWarning, UndefinedMetricWarning  # type: ignore[import-untyped]

from epic_rag.errors import TaskError
from epic_rag.evaluation.bm25 import require_bm25
from epic_rag.evaluation.datasets import (
    ClassificationData,
    ClusteringData,
    Kind,
    LocalSet,
    RerankingData,
    RetrievalData,
    StsData,
)
from epic_rag.evaluation.embedding_store import EmbeddingStore, Vectors, prompt_fingerprint
from epic_rag.query_prompt import QueryPrompt

__all__ = [
    "EpicMtebEncoder",
    "bm25_model",
    "hub_instruction",
    "hub_task",
    "make_task",
    "run_task",
]


# mteb expects the metadata on the task's class, so `make_task` derives a class for each set.


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


_KINDS: dict[Kind, tuple[type[AbsTask], Any, str]] = {
    "retrieval": (_Retrieval, "Retrieval", "ndcg_at_10"),
    "reranking": (_Reranking, "Reranking", "map_at_1000"),
    "sts": (_Sts, "STS", "cosine_spearman"),
    "classification": (_Classification, "Classification", "accuracy"),
    "clustering": (_Clustering, "Clustering", "v_measure"),
}
"""Base class, mteb's name and main score of each kind."""


def make_task(local_set: LocalSet) -> AbsTask:
    """Return a new mteb task over a local set.

    A task has a generator of samples with a state. Make a new task for each run, so that every model and k is scored
    on the same samples.
    """
    base, mteb_type, main_score = _KINDS[local_set.kind]
    metadata = TaskMetadata(
        name=local_set.name,
        type=mteb_type,
        main_score=main_score,
        description=f"The local {local_set.kind} set {local_set.name}.",
        # mteb reuses a stored result only under the same revision, so it is a hash of the data.
        dataset={"path": f"local/{local_set.name}", "revision": local_set.revision},
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        category="t2t",
    )
    attributes = {"metadata": metadata, "source": local_set.data, "__module__": __name__}
    task_class: type[AbsTask] = type(f"Local_{local_set.kind}", (base,), attributes)
    return task_class()


MtebModel = AbsEncoder | SearchProtocol
"""Models that mteb can evaluate: of vectors, or a search method."""


class EpicMtebEncoder(AbsEncoder):
    """One model under one prompt, as an encoder for mteb.

    Documents are always bare: mteb's generic prompt for documents is ignored. Everything else (both sides of
    symmetric tasks too) is encoded as a query behind the prompt.

    k, strategy and a hash of the prompt are in the model's `experiment_kwargs`, so that mteb's stored results
    of different prompts do not collide; the model's fingerprint is its revision.

    Args:
        store: The model's embeddings.
        prompt: The queries' prompt.
        name: The model's name in mteb's files.
    """

    mteb_model_meta: ModelMeta

    def __init__(self, store: EmbeddingStore, prompt: QueryPrompt, *, name: str = "model") -> None:
        self.model = store
        self._prompt = prompt
        experiment: dict[str, Any] = {"k": prompt.num_demonstrations or 0, "prompt": prompt_fingerprint(prompt)}
        if prompt.bank is not None:
            experiment["strategy"] = prompt.strategy
        self.mteb_model_meta = ModelMeta.create_empty(
            overwrites={
                "name": _model_name(name),
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
        """Encode batches of texts.

        Args:
            inputs: Batches with a "text" list each; a document's text is its title and text already.
            task_metadata: Ignored.
            hf_split: Ignored.
            hf_subset: Ignored.
            prompt_type: Document, query, or None for symmetric tasks.
            **kwargs: mteb's batch size and progress flag are ignored; the store has its own.

        Returns:
            (n, dim) float32, unit rows, in order.
        """
        texts = [text for batch in inputs for text in batch["text"]]
        store: EmbeddingStore = self.model
        if prompt_type == PromptType.document:
            return store.documents(texts)
        return store.queries(texts, self._prompt)


def _model_name(label: str) -> str:
    """Return a label in the form of mteb's model names, "organisation/model", which become folders."""
    return f"epic-rag/{re.sub(r'[^A-Za-z0-9._-]+', '_', label).strip('_.') or 'model'}"


def bm25_model() -> SearchProtocol:
    """Return mteb's BM25 baseline: bm25s with k1 = 1.5, b = 0.75, English stems, no stop words.

    Raises:
        MissingExtraError: bm25s is not installed.
    """
    require_bm25()
    with _quiet():
        return cast("SearchProtocol", mteb.get_model("mteb/baseline-bm25s"))


def hub_task(name: str) -> AbsTask:
    """Return one of mteb's own tasks; its data is downloaded when it runs.

    Raises:
        TaskError: mteb has no such task.
    """
    try:
        return mteb.get_task(name)
    except KeyError as error:
        raise TaskError(
            f'"{name}" is neither a local evaluation set nor a task of mteb {mteb.__version__} '
            f"({str(error.args[0]).splitlines()[0]}). Name a folder of --data, or one of mteb's tasks."
        ) from error


def hub_instruction(task: AbsTask) -> str:
    """Return mteb's instruction for a task's queries."""
    prompt = task.metadata.prompt
    if isinstance(prompt, dict):
        prompt = prompt.get(PromptType.query.value)
    return prompt or task.abstask_prompt


def run_task(task: AbsTask, model: MtebModel, *, output: Path | None = None) -> tuple[float, dict[str, float]]:
    """Run a task, or read its result where `output` has it.

    Args:
        task: A task that has not run yet.
        model: The model.
        output: Folder for mteb's result files.

    Returns:
        The main score, and every number among mteb's scores (of the first language subset, where there are
        more).
    """
    cache = mteb.ResultCache(output) if output is not None else None
    ready: Any = model  # mteb's protocol includes a constructor, which a finished model does not need
    with _quiet():
        results = mteb.evaluate(
            ready,
            task,
            cache=cache,
            overwrite_strategy="only-missing" if _is_current(cache, task, model) else "always",
            co2_tracker=False,
            show_progress_bar=False,
            encode_kwargs=cast("EncodeKwargs", {"batch_size": 256, "show_progress_bar": False}),
        )
    result = results.task_results[0]
    scores = next(iter(result.scores.values()))[0]
    numbers = {
        key: float(value)
        for key, value in scores.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    }
    return float(result.get_score()), numbers


def _is_current(cache: mteb.ResultCache | None, task: AbsTask, model: Any) -> bool:
    """Return whether a stored result is of this data and this version; mteb does not compare them."""
    stored = cache.load_task_result(task.metadata.name, model.mteb_model_meta) if cache is not None else None
    return (
        stored is not None
        and stored.dataset_revision == task.metadata.revision
        and stored.mteb_version == mteb.__version__
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide the progress bars of datasets and warnings about settings that mteb's protocol fixes."""
    drawing = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            # A label that a poor classifier never predicts, and its limit of 100 steps.
            warnings.simplefilter("ignore", UndefinedMetricWarning)
            warnings.simplefilter("ignore", ConvergenceWarning)
            yield
    finally:
        if drawing:
            datasets.enable_progress_bars()
