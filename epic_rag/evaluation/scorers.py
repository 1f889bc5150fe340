"""What is evaluated: an encoder, or BM25. Both score planned sets and held-out splits."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from epic_rag.evaluation.bm25 import bm25_fingerprint
from epic_rag.evaluation.collection import with_instruction
from epic_rag.evaluation.embedding import EmbeddingStore
from epic_rag.evaluation.heldout import HeldoutSplit
from epic_rag.evaluation.heldout_scores import HeldoutResult, score_heldout, score_heldout_bm25
from epic_rag.evaluation.pairs import Pair
from epic_rag.evaluation.report import ModelRecord, SetScore
from epic_rag.evaluation.request import EvaluationRequest, ModelSpec
from epic_rag.evaluation.set_plans import PlannedSet

if TYPE_CHECKING:
    from mteb.abstasks import AbsTask

    from epic_rag.encoder import EpicEncoder

__all__ = ["Bm25Scorer", "EncoderScorer", "Scorer", "load_scorer"]

logger = logging.getLogger(__name__)


class Scorer(Protocol):
    """Something that a run evaluates."""

    @property
    def record(self) -> ModelRecord:
        """How the report describes it."""

    def values_of_k(self, item: PlannedSet) -> list[int]:
        """The numbers of demonstrations at which it can be scored on a set; none for a set it cannot do."""

    def score_set(self, item: PlannedSet, k: int) -> SetScore:
        """Score it on a set with k demonstrations."""

    def score_split(self, split: HeldoutSplit, foreign_pool: Sequence[Pair] | None) -> list[HeldoutResult]:
        """Score it on held-out pairs, with every instruction that was asked for."""


class EncoderScorer:
    """An encoder, its vectors remembered.

    Args:
        encoder: The model.
        spec: What was asked for.
        request: The run.
        plain: Whether its queries go bare.
    """

    def __init__(self, encoder: EpicEncoder, spec: ModelSpec, request: EvaluationRequest, plain: bool) -> None:
        self._strategy = request.strategy or encoder.strategy
        self.record = ModelRecord(
            label=spec.label,
            source=spec.source,
            fingerprint=encoder.fingerprint,
            dimension=encoder.dimension,
            plain=plain,
            max_query_tokens=encoder.max_query_tokens,
            max_document_tokens=encoder.max_document_tokens,
            device=",".join(map(str, encoder.devices)),
            dtype=str(encoder.dtype).removeprefix("torch."),
            strategy=self._strategy,
        )
        self._default_instruction = encoder.default_instruction
        self._request = request
        self._plain = plain
        self._store = EmbeddingStore(
            encoder,
            folder=request.cache_dir,
            precision=self.record.dtype,
            batch_size=request.batch_size,
            show_progress=sys.stderr.isatty(),
        )

    def values_of_k(self, item: PlannedSet) -> list[int]:
        """K = 0 alone for a plain model and for a set without demonstrations."""
        if self._plain:
            return [0]
        return [k for k in self._request.num_demonstrations if k == 0 or item.plan.source is not None]

    def score_set(self, item: PlannedSet, k: int) -> SetScore:
        """Score the model on a set with its first k demonstrations."""
        from epic_rag.evaluation.mteb_runs import run_task

        started = time.monotonic()
        task = _new_task(item)
        prompt = item.plan.prompt(k, plain=self._plain, strategy=self._strategy)
        score, numbers = run_task(
            task, self._store, prompt, model_name=self.record.label, output=self._request.mteb_output
        )
        return SetScore(
            model=self.record.label,
            set_name=item.name,
            kind=item.kind,
            revision=str(task.metadata.revision),
            metric=task.metadata.main_score,
            k=k,
            score=score,
            instruction=prompt.instruction,
            demonstrations=item.plan.source if k else None,
            prompt=prompt.fingerprint,
            scores=numbers,
            seconds=time.monotonic() - started,
        )

    def score_split(self, split: HeldoutSplit, foreign_pool: Sequence[Pair] | None) -> list[HeldoutResult]:
        """Score the model with each instruction; a plain model has one result, because it gets none."""
        request = self._request
        sources = request.heldout_instructions[:1] if self._plain else request.heldout_instructions
        return [
            score_heldout(
                self._store,
                with_instruction(split, source, default=self._default_instruction),
                ks=request.num_demonstrations,
                draws=request.draws,
                controls=request.controls,
                foreign_pool=foreign_pool,
                plain=self._plain,
                strategy=self._strategy,
            )
            for source in sources
        ]


class Bm25Scorer:
    """BM25 at k = 0, on sets of documents: it has no vectors, so it has no score on STS and the like.

    Args:
        spec: What was asked for.
        request: The run.
    """

    def __init__(self, spec: ModelSpec, request: EvaluationRequest) -> None:
        self._request = request
        self.record = ModelRecord(
            label=spec.label,
            source=spec.source,
            fingerprint=bm25_fingerprint(),
            dimension=0,
            plain=True,
            max_query_tokens=0,
            max_document_tokens=0,
            device="cpu",
            dtype="float32",
            lexical=True,
        )

    def values_of_k(self, item: PlannedSet) -> list[int]:
        """K = 0 on retrieval and reranking sets."""
        return [0] if item.kind in ("retrieval", "reranking") else []

    def score_set(self, item: PlannedSet, k: int) -> SetScore:
        """Score BM25 on a set of documents; `k` is 0."""
        from epic_rag.evaluation.mteb_bm25 import Bm25Search
        from epic_rag.evaluation.mteb_runs import run_model

        started = time.monotonic()
        task = _new_task(item)
        search = Bm25Search(name=self.record.label, revision=self.record.fingerprint)
        score, numbers = run_model(task, search, output=self._request.mteb_output)
        return SetScore(
            model=self.record.label,
            set_name=item.name,
            kind=item.kind,
            revision=str(task.metadata.revision),
            metric=task.metadata.main_score,
            k=k,
            score=score,
            instruction=None,
            demonstrations=None,
            prompt="",
            scores=numbers,
            seconds=time.monotonic() - started,
        )

    def score_split(self, split: HeldoutSplit, foreign_pool: Sequence[Pair] | None) -> list[HeldoutResult]:
        """Score BM25 on held-out pairs, once."""
        return [score_heldout_bm25(split)]


def load_scorer(spec: ModelSpec, request: EvaluationRequest) -> Scorer:
    """Load what a specification names.

    Raises:
        CheckpointError: There is no such model.
        MissingExtraError: bm25s is missing and BM25 was named.
    """
    if spec.mode == "bm25":
        return Bm25Scorer(spec, request)
    from epic_rag.encoder import EpicEncoder

    encoder = EpicEncoder.from_pretrained(
        spec.source,
        device=request.device,
        dtype=request.dtype,
        max_document_tokens=request.max_document_tokens,
    )
    plain = spec.mode == "plain" or (spec.mode == "auto" and not encoder.settings.get("training"))
    if plain and spec.mode == "auto":
        logger.info("%s has no training record: no instructions and no demonstrations for it", spec.label)
    return EncoderScorer(encoder, spec, request, plain)


def _new_task(item: PlannedSet) -> AbsTask:
    from epic_rag.evaluation.mteb_runs import hub_task
    from epic_rag.evaluation.mteb_tasks import make_task

    return make_task(item.local) if item.local is not None else hub_task(item.name)
