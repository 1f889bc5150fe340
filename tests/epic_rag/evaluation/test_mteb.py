"""Each kind of set through mteb, with vectors and scores that can be checked by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mteb.types import PromptType

from epic_rag.demonstrations import Demonstration
from epic_rag.errors import TaskError
from epic_rag.evaluation.datasets import load_local_set
from epic_rag.evaluation.embedding_store import EmbeddingStore, make_prompt
from epic_rag.evaluation.mteb import (
    EpicMtebEncoder,
    bm25_model,
    hub_instruction,
    hub_task,
    make_task,
    run_task,
)
from epic_rag.query_prompt import QueryPrompt

LIBRARY = {
    "Alpha first": (1.0, 0.0),
    "first": (0.0, -1.0),  # the document without its title would come last
    "second": (0.866, 0.5),
    "third": (0.5, 0.866),
    "ask one": (1.0, -0.1),  # ranks d1, d2, d3
    "ask two": (0.62, 0.78),  # ranks d3, d2, d1
}
SHOWN = (Demonstration("shown query", "shown passage"),)


def _run(sets: Path, name: str, encoder: Any, prompt: QueryPrompt | None = None, **options: Any) -> Any:
    task = make_task(load_local_set(sets / name))
    return run_task(task, EpicMtebEncoder(EmbeddingStore(encoder), prompt or make_prompt("find it")), **options)


def test_retrieval(sets: Path, written: Any) -> None:
    encoder = written(LIBRARY)
    score, numbers = _run(sets, "library", encoder)
    second = (1 + 2 / math.log2(4)) / (2 + 1 / math.log2(3))
    assert score == pytest.approx((1 / math.log2(3) + second) / 2, abs=1e-4)
    assert numbers["ndcg_at_10"] == score
    assert numbers["recall_at_1"] == pytest.approx((0 + 1 / 2) / 2)
    by_role = {call.role: call for call in encoder.calls}
    assert set(by_role["document"].texts) == {"Alpha first", "second", "third"}, "title, a space, text; bare"
    assert set(by_role["query"].texts) == {"ask one", "ask two"}
    assert by_role["query"].instruction == "find it"


def test_documents_are_encoded_once_for_all_k(sets: Path, written: Any) -> None:
    encoder = written(LIBRARY, with_demonstrations={"ask one": (0.866, 0.5), "ask two": (1.0, 0.1)})
    store = EmbeddingStore(encoder)
    local = load_local_set(sets / "library")
    scores = [
        run_task(make_task(local), EpicMtebEncoder(store, prompt))[0]
        for prompt in (make_prompt("find it"), make_prompt("find it", SHOWN, strategy="epic"))
    ]
    assert [call.role for call in encoder.calls].count("document") == 1
    assert [call.demonstrations for call in encoder.calls if call.role == "query"] == [
        (),
        (("shown query", "shown passage"),),
    ]
    # Now d2 comes first for q1; and for q2 d1, d2, d3.
    second = (2 + 1 / math.log2(4)) / (2 + 1 / math.log2(3))
    assert scores[1] == pytest.approx((1 + second) / 2, abs=1e-4)
    assert scores[1] > scores[0]


def test_reranking_ranks_each_querys_own_candidates(sets: Path, written: Any) -> None:
    score, _ = _run(sets, "candidates", written(LIBRARY))
    # q1: Alpha first (relevant), second (relevant), third. q2: third, second (relevant), Alpha first.
    assert score == pytest.approx((1.0 + 0.5) / 2)


def test_sts(sets: Path, written: Any) -> None:
    angles = {"b1": 80, "b2": 40, "b3": 60, "b4": 10}  # gold order 1 2 3 4, found 1 3 2 4
    vectors = {name: (math.cos(math.radians(angle)), math.sin(math.radians(angle))) for name, angle in angles.items()}
    encoder = written({**dict.fromkeys(["a1", "a2", 'a"3', "a4"], (1.0, 0.0)), **vectors})
    score, _ = _run(sets, "likeness", encoder, make_prompt("same meaning", SHOWN, strategy="epic"))
    assert score == pytest.approx(1 - 6 * 2 / (4 * 15))
    assert {call.role for call in encoder.calls} == {"query"}, "both sides of a symmetric task are queries"
    assert all(call.demonstrations for call in encoder.calls)


def test_classification(sets: Path, written: Any) -> None:
    vectors = {}
    for split, count in (("train", 10), ("test", 2)):
        for number in range(count):
            vectors[f"pay {split} {number}"] = (1.0, 0.01 * number)
            vectors[f"lost {split} {number}"] = (0.01 * number, 1.0)
    vectors["lost test 1"] = (1.0, 0.0)  # one of four stands on the wrong side
    score, numbers = _run(sets, "requests", written(vectors))
    assert score == pytest.approx(0.75)
    # "pay": precision 2/3, recall 1, F1 0.8; "lost": precision 1, recall 1/2, F1 2/3.
    assert numbers["f1"] == pytest.approx((0.8 + 2 / 3) / 2)


def test_clustering(sets: Path, written: Any) -> None:
    def vectors(split_by_label: bool) -> dict[str, tuple[float, float]]:
        return {
            f"topic {label} text {number}": (
                (1.0, 0.001 * number) if (label == 3 if split_by_label else number % 2) else (0.001 * number, 1.0)
            )
            for label in (3, 7)
            for number in range(20)
        }

    assert _run(sets, "topics", written(vectors(True)))[0] == pytest.approx(1.0)
    assert _run(sets, "topics", written(vectors(False)))[0] < 0.2


def test_every_run_draws_the_same_samples(sets: Path, written: Any) -> None:
    rng = np.random.default_rng(0)
    texts = [f"topic {label} text {number}" for label in (3, 7) for number in range(20)]
    vectors = {text: tuple(rng.normal(size=4)) for text in texts}
    first, second = (_run(sets, "topics", written(vectors)) for _ in range(2))
    assert first == second


def test_results_of_different_prompts_do_not_collide(sets: Path, written: Any, tmp_path: Path) -> None:
    output = tmp_path / "mteb"
    better = {"ask one": (0.866, 0.5), "ask two": (1.0, 0.1)}
    prompts = [make_prompt("find it"), make_prompt("find it", SHOWN, strategy="epic"), make_prompt("look for it")]
    scores = [
        _run(sets, "library", written(LIBRARY, with_demonstrations=better), prompt, output=output)[0]
        for prompt in prompts
    ]
    files = sorted(output.rglob("library.json"))
    assert len(files) == 3
    assert all("written" in file.parts for file in files), "the fingerprint is the revision"
    assert sum("k_1" in str(file) for file in files) == 1
    # What is stored is read and not computed again, unless the data has changed.
    for prompt, score in zip(prompts, scores, strict=True):
        encoder = written(LIBRARY)
        assert _run(sets, "library", encoder, prompt, output=output)[0] == score
        assert encoder.calls == []
    path = sets / "library" / "qrels" / "test.tsv"
    path.write_text(path.read_text(encoding="utf-8").replace("q1\td2", "q1\td1"), encoding="utf-8")
    assert _run(sets, "library", written(LIBRARY), prompts[0], output=output)[0] > scores[0]


def test_documents_are_bare_and_names_are_folders(sets: Path, written: Any) -> None:
    encoder = written({"a": (1.0, 0.0)})
    task = make_task(load_local_set(sets / "likeness"))
    model = EpicMtebEncoder(EmbeddingStore(encoder), make_prompt("find it"), name="./runs/my model!")
    assert model.mteb_model_meta.name == "epic-rag/runs_my_model"
    common = {"task_metadata": task.metadata, "hf_split": "test", "hf_subset": "default"}
    model.encode([{"text": ["a"]}], **common)
    model.encode([{"text": ["a"]}, {"text": ["a"]}], prompt_type=PromptType.document, **common)
    assert [(call.role, call.instruction) for call in encoder.calls] == [("query", "find it"), ("document", None)]


def test_mtebs_own_tasks_by_name() -> None:
    assert (
        hub_instruction(hub_task("SciFact"))
        == "Given a scientific claim, retrieve documents that support or refute the claim"
    )
    assert hub_instruction(hub_task("STS12"))
    with pytest.raises(TaskError, match=r'"SciFakt" is neither a local evaluation set nor a task of mteb 2'):
        hub_task("SciFakt")


def test_bm25_ranks_by_words(tmp_path: Path, jsonl: Any, capfd: pytest.CaptureFixture[str]) -> None:
    corpus = [("d1", "red", "apples"), ("d2", "", "a green pear"), ("d3", "", "the red wine of the cellar")]
    jsonl(tmp_path / "garden" / "corpus.jsonl", [{"_id": i, "title": title, "text": text} for i, title, text in corpus])
    jsonl(tmp_path / "garden" / "queries.jsonl", [{"_id": "q1", "text": "red apple"}, {"_id": "q2", "text": "wine"}])
    (tmp_path / "garden" / "qrels").mkdir()
    judged = "query-id\tcorpus-id\tscore\nq1\td1\t1\nq2\td1\t1\n"
    (tmp_path / "garden" / "qrels" / "test.tsv").write_text(judged)
    score, numbers = run_task(make_task(load_local_set(tmp_path / "garden")), bm25_model())
    assert numbers["ndcg_at_1"] == pytest.approx(1 / 2)
    assert score < 1
    assert capfd.readouterr().err == "", "no progress bars"


def test_bm25_ranks_candidates(tmp_path: Path, jsonl: Any) -> None:
    rows = [
        {"query": "red apple", "positive": ["the red apples"], "negative": ["a green pear", "red wine"]},
        {"query": "blue plum", "positive": ["nothing shared"], "negative": ["a blue plum"]},
    ]
    jsonl(tmp_path / "fruit" / "reranking.jsonl", rows)
    score, _ = run_task(make_task(load_local_set(tmp_path / "fruit")), bm25_model())
    assert score == pytest.approx((1 + 1 / 2) / 2)
