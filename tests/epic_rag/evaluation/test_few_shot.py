"""The few-shot evaluation: its tasks, the methods and controls, and the report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from epic_rag.errors import ConfigError, DataError
from epic_rag.evaluation import few_shot
from epic_rag.evaluation.bm25 import Bm25Index
from epic_rag.evaluation.datasets import normalize_text
from epic_rag.evaluation.embedding_store import EmbeddingStore
from epic_rag.evaluation.few_shot import evaluate_few_shot, load_few_shot_tasks
from epic_rag.evaluation.few_shot_collections import CollectionFamily, TaskRanking
from epic_rag.evaluation.few_shot_methods import METHODS, Centred, moved_queries
from epic_rag.evaluation.few_shot_report import WORDINGS, FewShotRequest
from epic_rag.evaluation.few_shot_tasks import few_shot_task_of_pairs, few_shot_task_of_set, parse_pairs_source
from epic_rag.evaluation.heldout import HeldoutSplit, passage_key
from epic_rag.evaluation.runner import EvaluationRequest, ModelSpec, run_few_shot
from epic_rag.metrics import ndcg_of_scores, unit_rows
from epic_rag.query_prompt import QueryPrompt
from epic_rag.reader import DemonstrationReader
from epic_rag_chroma.search.fusion import fuse

DIM = 24


class NumberedEncoder:
    """Vectors of "q 7" and "p 7" are near each other, and passages lie in one direction from their queries."""

    fingerprint = "numbered"
    dimension = DIM

    def encode_query(self, texts: Sequence[str], prompt: QueryPrompt | None = None, **_: Any) -> Any:
        return self._vectors(texts)

    def encode_document(self, texts: Sequence[str], **_: Any) -> Any:
        return self._vectors(texts)

    def _vectors(self, texts: Sequence[str]) -> Any:
        rows = []
        for text in texts:
            kind, _, number = text.partition(" ")
            base = np.random.default_rng(int(number)).standard_normal(DIM)
            shift = np.ones(DIM) * (2.0 if kind.startswith("p") else 0.0)
            rows.append(base + shift + 0.1 * np.random.default_rng(int(number) + 10**6).standard_normal(DIM))
        return unit_rows(np.array(rows, dtype=np.float32).reshape(-1, DIM))


def write_pairs(path: Path, numbers: Sequence[int], **more: str) -> Path:
    lines = [json.dumps({"query": f"q {number}", "positive": f"p {number}", **more}) for number in numbers]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def tasks(tmp_path: Path) -> list[HeldoutSplit]:
    files = [
        write_pairs(tmp_path / "one.jsonl", range(120)),
        write_pairs(tmp_path / "two.jsonl", range(200, 320)),
    ]
    return [few_shot_task_of_pairs(file, queries=20, pool=60, documents=80) for file in files]


def share_nothing(task: HeldoutSplit) -> None:
    tested = {normalize_text(query) for query in task.queries}
    answers = {passage_key(task.documents[row]) for rows in task.relevant for row in rows}
    assert task.pool
    assert not tested & {normalize_text(pair.query) for pair in task.pool}
    assert not answers & {passage_key(pair.passage) for pair in task.pool}
    assert not tested & {normalize_text(query) for query in task.other_queries}
    assert {passage_key(pair.passage) for pair in task.pool} <= {passage_key(text) for text in task.documents}


ROWS = st.lists(
    st.builds(
        lambda query, passage: {"query": query, "positive": passage},
        st.sampled_from([f"query {number}" for number in range(14)]),
        st.sampled_from([f"passage {number}" for number in range(14)]),
    ),
    min_size=1,
    max_size=30,
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=ROWS, queries=st.integers(1, 6), pool=st.integers(1, 12), seed=st.integers(0, 3))
def test_demonstrations_share_nothing_with_test_queries(
    tmp_path: Path, rows: list[dict[str, str]], queries: int, pool: int, seed: int
) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    try:
        task = few_shot_task_of_pairs(path, queries=queries, pool=pool, documents=5, seed=seed)
    except DataError as error:
        if "too few rows" not in str(error):
            raise
        return
    share_nothing(task)
    assert len(task.queries) <= queries
    assert len(task.pool) <= pool


def test_a_source_is_a_task(tmp_path: Path) -> None:
    path = tmp_path / "manuals.jsonl"
    lines = [{"query": f"q {n}", "positive": f"p {n}", "source": "a" if n % 2 else "b"} for n in range(60)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    assert parse_pairs_source(f"{path}#a") == (path, "a")
    assert parse_pairs_source(str(path)) == (path, None)
    task = few_shot_task_of_pairs(path, "a", queries=5, pool=50, documents=10)
    assert task.name == "a"
    assert all(int(pair.query.split()[1]) % 2 for pair in task.pool)
    with pytest.raises(DataError, match='no row with the source "c"'):
        few_shot_task_of_pairs(path, "c")


def test_labels_become_messages_of_the_same_label(tmp_path: Path) -> None:
    folder = tmp_path / "Intents"
    folder.mkdir()
    for split, count in (("train", 30), ("test", 8)):
        rows = [{"text": f"{split} {n}", "label": f"label {n % 3}"} for n in range(count)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    task = few_shot_task_of_set(folder, queries=5, pool=20, documents=25)
    assert (len(task.queries), len(task.documents), len(task.pool)) == (5, 25, 20)
    for query, rows in zip(task.queries, task.relevant, strict=True):
        assert {int(task.documents[row].split()[1]) % 3 for row in rows} == {int(query.split()[1]) % 3}
    assert all(int(pair.query.split()[1]) % 3 == int(pair.passage.split()[1]) % 3 for pair in task.pool)
    assert all(pair.query != pair.passage and pair.query.startswith("train") for pair in task.pool)


def test_judged_queries_are_parted(tmp_path: Path) -> None:
    folder = tmp_path / "Judged"
    (folder / "qrels").mkdir(parents=True)
    corpus = [{"_id": f"d{n}", "title": "", "text": f"p {n}"} for n in range(40)]
    queries = [{"_id": f"q{n}", "text": f"q {n}"} for n in range(20)]
    for name, rows in (("corpus", corpus), ("queries", queries)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    judged = "".join(f"q{n}\td{n}\t1\nq{n}\td{(n + 1) % 40}\t0\n" for n in range(20))
    (folder / "qrels/test.tsv").write_text("query-id\tcorpus-id\tscore\n" + judged, encoding="utf-8")
    task = few_shot_task_of_set(folder, queries=50, pool=50, documents=30)
    share_nothing(task)
    assert (len(task.queries), len(task.pool), len(task.documents)) == (10, 10, 30)
    for query, rows in zip(task.queries, task.relevant, strict=True):
        assert [task.documents[row] for row in rows] == [query.replace("q", "p")]


def test_documents_with_a_prefix_are_a_task(tmp_path: Path) -> None:
    folder = tmp_path / "Manuals"
    (folder / "qrels").mkdir(parents=True)
    corpus = [{"_id": f"{'git' if n % 2 else 'httpd'}-{n}", "title": "", "text": f"p {n}"} for n in range(40)]
    queries = [{"_id": f"q{n}", "text": f"q {n}"} for n in range(20)]
    for name, rows in (("corpus", corpus), ("queries", queries)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    judged = "".join(f"q{n}\t{corpus[n]['_id']}\t1\n" for n in range(20))
    (folder / "qrels/test.tsv").write_text("query-id\tcorpus-id\tscore\n" + judged, encoding="utf-8")
    task = few_shot_task_of_set(folder, "git", queries=50, pool=50, documents=30)
    share_nothing(task)
    assert (task.name, len(task.queries), len(task.documents)) == ("Manuals-git", 5, 20)
    assert {int(text.split()[1]) % 2 for text in (*task.queries, *task.documents)} == {1}
    with pytest.raises(DataError, match='begins with "svn"'):
        few_shot_task_of_set(folder, "svn")


def test_sentence_pairs_are_no_task(tmp_path: Path) -> None:
    folder = tmp_path / "Pairs"
    folder.mkdir()
    (folder / "test.tsv").write_text("sentence1\tsentence2\tscore\na\tb\t1\nc\td\t2\n", encoding="utf-8")
    with pytest.raises(DataError, match="set of sentence pairs"):
        few_shot_task_of_set(folder)


def test_gains_of_methods_and_controls(tasks: list[HeldoutSplit]) -> None:
    request = FewShotRequest(
        sizes=(1, 16, 40, 1000),
        draws=2,
        collections=("own", "pooled-with-queries"),
        controls=("none", "shuffled", "foreign", "wrong-25"),
        bm25=False,
    )
    report = evaluate_few_shot(EmbeddingStore(NumberedEncoder()), tasks, request)
    assert {cell.n for cell in report.cells} == {1, 16, 40}
    assert {cell.method for cell in report.cells} == set(METHODS) - {"universal"}
    for cell in report.cells:
        assert (len(cell.gains), len(cell.by_draw)) == (20, 2)
        assert cell.gain == pytest.approx(np.mean(cell.gains))

    def mean(**wanted: Any) -> float:
        return float(np.mean([cell.gain for cell in report.select(collection="pooled-with-queries", **wanted)]))

    # Other queries hide the passages from zero-shot; a move towards passages finds them.
    assert mean(method="task-vector", control="none", n=40) > 5
    assert mean(method="reader", control="none", n=40) > 5
    # What the demonstrations are ranked among is known to one of the readers.
    whole = mean(method="reader-against", control="none", n=40)
    assert whole > mean(method="reader", control="none", n=40) - 1
    assert abs(mean(method="reader-against", control="shuffled", n=40)) < 0.2 * whole
    assert mean(method="reader-against", control="wrong-25", n=40) > 0.7 * whole
    assert not report.select(method="reader", control="shuffled")
    again = evaluate_few_shot(EmbeddingStore(NumberedEncoder()), tasks, request)
    assert again.cells == report.cells


def test_fused_rankings_are_compared_with_fused_zero_shot(tasks: list[HeldoutSplit]) -> None:
    where = "pooled-with-queries"
    request = FewShotRequest(sizes=(8,), draws=1, collections=(where,), methods=("reader", "memory"))
    report = evaluate_few_shot(EmbeddingStore(NumberedEncoder()), tasks, request)
    assert {cell.ranking for cell in report.cells} == {"dense", "hybrid"}
    assert set(report.zero_shot) == {
        f"{name}/{where}/{kind}" for name in ("one", "two") for kind in ("dense", "hybrid")
    }
    # The number is a word of both texts, so BM25 alone is right.
    assert report.zero_shot[f"one/{where}/hybrid"] > report.zero_shot[f"one/{where}/dense"]


def test_the_report(tasks: list[HeldoutSplit], tmp_path: Path) -> None:
    request = FewShotRequest(sizes=(4, 16), draws=2, collections=("own",), methods=("reader", "ridge"), bm25=False)
    report = evaluate_few_shot(EmbeddingStore(NumberedEncoder()), tasks, request)
    cells = report.select(method="reader", n=16)
    summary = report.summary(cells)
    assert summary["tasks"] == 2
    assert summary["low"] <= summary["gain"] <= summary["high"]
    assert summary["worst"] == min(cell.gain for cell in cells)
    report.write(tmp_path / "out" / "gains.json")
    stored = json.loads((tmp_path / "out" / "gains.json").read_text())
    assert len(stored["cells"]) == len(report.cells)
    tables = (tmp_path / "out" / "gains.md").read_text()
    assert f"| reader | {report.select(method='reader', n=4)[0].gain:+.2f}"[:9] in tables
    assert "n = 16" in tables


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), documents=st.integers(2, 150), queries=st.integers(1, 5))
def test_rankings_are_those_of_the_product(seed: int, documents: int, queries: int) -> None:
    """nDCG@10 by cosine and after fusion equals the plain computation with `fuse`, which `epic-rag query` uses."""
    chance = np.random.default_rng(seed)
    names = [f"q {number}" for number in range(queries)]
    texts = [f"p {number} {chance.integers(3)}" for number in range(documents)]
    relevant = tuple(tuple(sorted({int(row) for row in chance.integers(documents, size=3)})) for _ in names)
    skipped = tuple(tuple({int(chance.integers(documents))} - set(rows)) for rows in relevant)
    split = HeldoutSplit("t", "", "", tuple(names), tuple(texts), relevant, skipped, pool=())
    keywords = Bm25Index(texts)
    scores = chance.standard_normal((queries, documents)).astype(np.float32)
    family = CollectionFamily(Centred(scores), {"own": TaskRanking(split, np.arange(documents), keywords)})
    lexical, attainable = np.stack(list(keywords.scores(names))), keywords.attainable(names)
    [(_, found)] = family.ndcg(scores.copy())
    for query, skip in enumerate(skipped):
        rankings = []
        for row in (scores[query].copy(), lexical[query]):
            row[list(skip)] = -np.inf
            best = [int(place) for place in np.argsort(-row, kind="stable") if np.isfinite(row[place])]
            rankings.append([(f"{place:05}", float(row[place])) for place in best[:100]])
        fused = [int(name) for name, _ in fuse(*rankings, attainable=float(attainable[query]))]
        for kind, ranking in (("dense", [int(name) for name, _ in rankings[0]]), ("hybrid", fused)):
            plain = np.full((1, documents), -np.inf, dtype=np.float32)
            plain[0, ranking] = -np.arange(len(ranking))
            assert found[kind][query] == pytest.approx(ndcg_of_scores(plain, [relevant[query]])[0])


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), documents=st.integers(2, 150), more=st.integers(0, 150), queries=st.integers(1, 4))
def test_a_larger_collection_is_ranked_with_the_smaller_one(seed: int, documents: int, more: int, queries: int) -> None:
    """Ranking both at once gives what ranking each by itself gives."""
    chance = np.random.default_rng(seed)
    names = [f"q {number}" for number in range(queries)]
    relevant = tuple(tuple(sorted({int(row) for row in chance.integers(documents, size=3)})) for _ in names)
    skipped = tuple(tuple({int(chance.integers(documents))} - set(rows)) for rows in relevant)
    rankings: dict[Any, TaskRanking] = {}
    for name, count in (("pooled", documents), ("pooled-with-queries", documents + more)):
        texts = tuple(f"p {number} {number % 3}" for number in range(count))
        split = HeldoutSplit("t", "", "", tuple(names), texts, relevant, skipped, pool=())
        rankings[name] = TaskRanking(split, np.arange(documents), Bm25Index(texts))
    scores = chance.standard_normal((queries, documents + more)).astype(np.float32)
    family = CollectionFamily(Centred(scores), rankings)
    for name, found in family.ndcg(scores.copy()):
        alone = family.ndcg_in(name, scores[:, : rankings[name].documents].copy())
        for kind, values in found.items():
            np.testing.assert_allclose(values, alone[kind])


def test_a_stopped_run_continues_and_keeps_baselines(
    tasks: list[HeldoutSplit], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = FewShotRequest(sizes=(4, 16), draws=2, methods=("reader", "llama-index-tuned"), bm25=False)
    store = EmbeddingStore(NumberedEncoder(), folder=tmp_path)
    first = evaluate_few_shot(store, tasks, request)
    asked: list[str] = []
    moved_queries = few_shot.moved_queries

    def counted(method: str, *arguments: Any) -> Any:
        asked.append(method)
        return moved_queries(method, *arguments)

    monkeypatch.setattr(few_shot, "moved_queries", counted)
    assert evaluate_few_shot(store, tasks, request).cells == first.cells
    assert asked == []
    trained = DemonstrationReader(0.5 * DemonstrationReader.universal().gains)
    other = evaluate_few_shot(store, tasks, request, reader=trained)
    assert set(asked) == {"reader"}
    assert other.select(method="llama-index-tuned") == first.select(method="llama-index-tuned")
    for file in tmp_path.rglob("few-shot/*.json"):
        file.write_text("[{]")
    assert evaluate_few_shot(store, tasks, request).cells == first.cells


def test_the_adapter_of_llama_index() -> None:
    """One epoch at a rate of 2e-5 leaves queries where they are; tuned, it learns a map, and never from ten pairs."""
    chance = np.random.default_rng(0)
    queries = unit_rows(chance.standard_normal((200, 16)).astype(np.float32))
    turned = unit_rows(queries @ np.linalg.qr(np.eye(16) + 0.3 * chance.standard_normal((16, 16)))[0])
    pairs = np.stack([queries, turned], axis=1).astype(np.float32)
    shipped, tuned = (moved_queries(name, {}, queries, pairs) for name in ("llama-index", "llama-index-tuned"))
    assert shipped is not None
    assert tuned is not None
    assert 0 < np.abs(shipped - queries).max() < 1e-2
    own = [float((moved * turned).sum(axis=1).mean()) for moved in (queries, tuned)]
    assert own[1] > own[0] + 0.05
    few = moved_queries("llama-index-tuned", {}, queries, pairs[:9])
    np.testing.assert_allclose(few, queries, atol=1e-6)


def test_wordings_of_the_instruction(tasks: list[HeldoutSplit]) -> None:
    request = FewShotRequest(sizes=(8,), draws=1, collections=("own",), methods=("reader",), bm25=False, wordings=True)
    report = evaluate_few_shot(EmbeddingStore(NumberedEncoder()), tasks, request)
    # This encoder ignores instructions, so each wording gives the same.
    gains = [cell.gain for cell in report.select(method="reader", n=8)]
    for number in range(1, len(WORDINGS) + 1):
        cells = report.select(method=f"wording-{number}")
        assert {cell.n for cell in cells} == {0, 8}
        assert [cell.gain for cell in cells if cell.n == 0] == [0.0, 0.0]
        assert [cell.gain for cell in cells if cell.n == 8] == pytest.approx(gains)
    tables = report.to_markdown()
    assert f"| {WORDINGS[0]} " in tables
    assert "| (none)" in tables


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sizes": ()}, "Use 1 or more"),
        ({"sizes": (0, 1)}, "Use 1 or more"),
        ({"draws": 0}, "draws is 0"),
        ({"methods": ("magic",)}, "Unknown name 'magic'"),
        ({"controls": ("wrong",)}, "Unknown name 'wrong'"),
    ],
)
def test_settings_that_cannot_work(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FewShotRequest(**settings)


def test_tasks_of_an_evaluation(tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "one.jsonl", range(40))
    common: dict[str, Any] = {
        "queries": 5,
        "documents": 10,
        "sizes": (2,),
        "instruction": "default",
        "default_instruction": "Find it",
    }
    task = load_few_shot_tasks([path], None, None, **common)[0]
    assert task.instruction == "Find it"
    with pytest.raises(DataError, match="Two tasks are called one"):
        load_few_shot_tasks([path, path], None, None, **common)
    with pytest.raises(DataError, match="There is no task"):
        load_few_shot_tasks([], None, None, **common)


def test_one_encoder_at_a_time(tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "one.jsonl", range(40))
    request = EvaluationRequest((ModelSpec("a", "a"), ModelSpec("b", "b")), heldout=(path,))
    with pytest.raises(ConfigError, match="takes one model"):
        run_few_shot(request)
    with pytest.raises(ConfigError, match="takes no demonstrations"):
        run_few_shot(EvaluationRequest((ModelSpec("bm25", "bm25", "bm25"),), heldout=(path,)))
