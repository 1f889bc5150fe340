"""Running one mteb task with one prompt, quietly."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import datasets  # type: ignore[import-untyped]
import mteb
from mteb.abstasks import AbsTask
from mteb.types import EncodeKwargs, PromptType
from sklearn.exceptions import ConvergenceWarning, UndefinedMetricWarning  # type: ignore[import-untyped]

from epic_rag.errors import TaskError
from epic_rag.evaluation.embedding import EmbeddingStore, QueryPrompt
from epic_rag.evaluation.mteb_bm25 import Bm25Search
from epic_rag.evaluation.mteb_encoder import EpicMtebEncoder

__all__ = ["hub_instruction", "hub_task", "run_model", "run_task"]


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
            f"({str(error.args[0]).splitlines()[0]}); name a folder of --data, or one of mteb's tasks"
        ) from error


def hub_instruction(task: AbsTask) -> str:
    """Return the instruction that mteb itself gives a task's queries."""
    prompt = task.metadata.prompt
    if isinstance(prompt, dict):
        prompt = prompt.get(PromptType.query.value)
    return prompt or task.abstask_prompt


def run_task(
    task: AbsTask,
    store: EmbeddingStore,
    prompt: QueryPrompt,
    *,
    model_name: str,
    output: Path | None = None,
) -> tuple[float, dict[str, float]]:
    """Run a task with an encoder, or read its result where `output` has it.

    Args:
        task: A task that has not run yet.
        store: The model.
        prompt: What stands before queries.
        model_name: What mteb's files call the model.
        output: Folder for mteb's result files.

    Returns:
        As `run_model`.
    """
    return run_model(task, EpicMtebEncoder(store, prompt, name=model_name), output=output)


def run_model(
    task: AbsTask, model: EpicMtebEncoder | Bm25Search, *, output: Path | None = None
) -> tuple[float, dict[str, float]]:
    """Run a task with a model of mteb's protocols, or read its result where `output` has it.

    Args:
        task: A task that has not run yet.
        model: The model.
        output: Folder for mteb's result files.

    Returns:
        The main score, and every number among mteb's scores (of the first language subset, where there are
        more).
    """
    cache = mteb.ResultCache(output) if output is not None else None
    # mteb's protocols ask for a constructor from a model's name; a model that is handed over needs none.
    ready: Any = model
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


def _is_current(cache: mteb.ResultCache | None, task: AbsTask, model: EpicMtebEncoder | Bm25Search) -> bool:
    """Whether a stored result is of this data and this mteb; mteb itself compares neither when one is complete."""
    stored = cache.load_task_result(task.metadata.name, model.mteb_model_meta) if cache is not None else None
    return (
        stored is not None
        and stored.dataset_revision == task.metadata.revision
        and stored.mteb_version == mteb.__version__
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars from datasets, which draws one for every table, no remarks on what mteb's protocol fixes."""
    drawing = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            # A label that a poor classifier never predicts, and the 100 steps that mteb allows it.
            warnings.simplefilter("ignore", UndefinedMetricWarning)
            warnings.simplefilter("ignore", ConvergenceWarning)
            yield
    finally:
        if drawing:
            datasets.enable_progress_bars()
