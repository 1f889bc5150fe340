"""Requests, plans of prompts, and whole runs with tiny models on tiny sets."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epic_rag.demonstrations import Demonstration, DemonstrationBank
from epic_rag.encoder import EpicEncoder
from epic_rag.errors import BankError, ConfigError, DataError, MissingExtraError, PromptError, TaskError
from epic_rag.evaluation.datasets import (
    CATALOGUE,
    ClassificationData,
    entry_for,
    load_local_set,
    normalize_text,
)
from epic_rag.evaluation.runner import (
    COLLECTIONS,
    EvaluationRequest,
    ModelSpec,
    PromptPlan,
    parse_banks,
    parse_choices,
    parse_ks,
    parse_models,
    plan_prompts,
    run_evaluation,
    split_names,
    training_demonstrations,
)
from epic_rag.query_prompt import QueryPrompt
from epic_rag.tasks import list_tasks


@pytest.mark.parametrize(
    ("specs", "expected"),
    [
        ([], [("epic-minilm", "epic-minilm", "auto")]),
        (["epic-minilm", "runs/a/final"], [("epic-minilm", "epic-minilm", "auto"), ("runs/a/final", "final", "auto")]),
        (
            ["runs/a/final", "runs/b/final"],
            [("runs/a/final", "runs/a/final", "auto"), ("runs/b/final", "runs/b/final", "auto")],
        ),
        (
            ["a=runs/x/final:prompted", "b=runs/x/final:plain"],
            [("runs/x/final", "a", "prompted"), ("runs/x/final", "b", "plain")],
        ),
        (["runs/lr=1e-4/final"], [("runs/lr=1e-4/final", "final", "auto")]),
        (
            ["sentence-transformers/all-MiniLM-L6-v2:plain"],
            [("sentence-transformers/all-MiniLM-L6-v2", "all-MiniLM-L6-v2", "plain")],
        ),
        (["bm25", "words=bm25"], [("bm25", "bm25", "bm25"), ("bm25", "words", "bm25")]),
        (["./bm25", "a/bm25:prompted"], [("./bm25", "./bm25", "auto"), ("a/bm25", "a/bm25", "prompted")]),
    ],
)
def test_models(specs: list[str], expected: list[tuple[str, str, Any]]) -> None:
    assert parse_models(specs) == tuple(ModelSpec(*item) for item in expected)


@pytest.mark.parametrize("specs", [["a=x", "a=y"], ["x", "x"], ["a="], [":plain"]])
def test_models_with_equal_or_missing_names(specs: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"Two models are called|names no model"):
        parse_models(specs)


def test_options_with_several_values() -> None:
    assert parse_ks("8, 0,1,8") == (0, 1, 8)
    assert parse_banks(["Cranfield=papers", "x=a=b"]) == {"Cranfield": "papers", "x": "a=b"}
    assert split_names(" a, b,,") == ("a", "b")
    assert parse_choices(["pooled, own", "pooled"], COLLECTIONS, "--x") == ("pooled", "own")
    for text in ("", "a", "-1", "1.5"):
        with pytest.raises(ConfigError, match="not a list of numbers"):
            parse_ks(text)
    for text in ("Cranfield", "=papers", "Cranfield="):
        with pytest.raises(ConfigError, match="is not SET=SOURCE"):
            parse_banks([text])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"models": ()}, "No model to evaluate"),
        ({"num_demonstrations": ()}, "numbers of demonstrations"),
        ({"num_demonstrations": (-1,)}, "numbers of demonstrations"),
        ({"strategy": "magic"}, "Unknown strategy 'magic'. Choose one of reader, task-vector"),
        ({"draws": 0}, "draws is 0"),
        ({"data": None}, "Nothing to evaluate on"),
        ({"kinds": ("retrieval", "poems")}, '--kinds names "poems". Use one or more of retrieval, reranking'),
        ({"heldout_collections": ()}, "--heldout-collection names nothing. Use one or more of own, pooled"),
        ({"heldout_instructions": ("mine",)}, '--heldout-instruction names "mine". Use one or more of own, default'),
    ],
)
def test_requests_that_cannot_work(changes: dict[str, Any], said: str) -> None:
    good: dict[str, Any] = {"models": (ModelSpec("m", "m"),), "data": Path("data")}
    assert EvaluationRequest(**good).record()["data"] == "data"
    with pytest.raises((ConfigError, PromptError), match=said):
        EvaluationRequest(**{**good, **changes})


LABELLED = st.lists(
    st.tuples(st.sampled_from(["one", "One ", "two", "three", "four", "five", "six", " "]), st.integers(0, 2)),
    max_size=20,
)


@settings(max_examples=200, deadline=None)
@given(train=LABELLED, test=LABELLED, labels=st.booleans(), count=st.integers(0, 6), seed=st.integers(0, 3))
def test_training_demonstrations_are_no_test_texts(
    train: list[tuple[str, int]], test: list[tuple[str, int]], labels: bool, count: int, seed: int
) -> None:
    data = ClassificationData(tuple(train), tuple(test), ("a", "b", "c"))
    drawn = training_demonstrations(data, labels=labels, count=count, seed=seed)
    assert len(drawn) <= count
    forbidden = {normalize_text(text) for text, _ in test}
    rows = {text: {label for other, label in train if other == text} for text, _ in train}
    for shown in drawn:
        assert normalize_text(shown.query) not in forbidden
        if labels:
            assert "abc".index(shown.passage) in rows[shown.query]
        else:
            assert normalize_text(shown.passage) not in forbidden
            assert rows[shown.query] & rows[shown.passage]
    assert drawn == training_demonstrations(data, labels=labels, count=count, seed=seed)


def test_training_demonstrations_go_round_the_labels() -> None:
    rows = tuple((f"text {number} of {label}", label) for number in range(6) for label in range(3))
    data = ClassificationData(rows, (("other", 0),), ("a", "b", "c"))
    drawn = training_demonstrations(data, labels=True, count=6)
    assert sorted(item.passage for item in drawn[:3]) == ["a", "b", "c"]
    assert len({item.query for item in drawn}) == 6
    assert drawn[:3] == training_demonstrations(data, labels=True, count=3)


def test_a_plan_gives_the_first_k() -> None:
    shown = tuple(Demonstration(f"q{number}", f"p{number}") for number in range(3))
    plan = PromptPlan("find it", "bank", shown, symmetric=True)
    assert plan.prompt(0) == QueryPrompt(instruction="find it")
    prompt = plan.prompt(2, strategy="text")
    bank = prompt.resolve_bank()
    assert bank is not None
    assert (bank.instruction, bank.demonstrations, bank.symmetric) == ("find it", shown[:2], True)
    assert (prompt.num_demonstrations, prompt.strategy) == (2, "text")
    with pytest.raises(PromptError, match=r"bank has 3 demonstrations, and k is 4. Lower --num-demonstrations"):
        plan.prompt(4)


def test_a_source_is_a_bank_a_file_or_the_training_split(sets: Path, tmp_path: Path) -> None:
    requests = load_local_set(sets / "requests")
    entry = entry_for("requests", "classification")
    plan = plan_prompts(requests, entry.instruction, entry.demonstrations, max_k=4)
    assert plan.source == "requests/train"
    assert plan.symmetric
    assert len(plan.demonstrations) == 4
    labels = plan_prompts(requests, "", "train-labels", max_k=2)
    assert {item.passage for item in labels.demonstrations} == {"pay", "lost"}
    assert not labels.symmetric

    built_in = plan_prompts(requests, "mine", "intent", max_k=2)
    bank = DemonstrationBank.load("intent")
    assert built_in.instruction == "mine"
    assert built_in.demonstrations == bank.demonstrations
    assert built_in.symmetric == bank.symmetric

    file = tmp_path / "pairs.jsonl"
    file.write_text('{"query": "q", "positive": "p"}\n', encoding="utf-8")
    from_file = plan_prompts(requests, "", str(file), max_k=1)
    assert from_file.demonstrations == (Demonstration("q", "p"),)
    DemonstrationBank([("q", "p")], symmetric=True).save(tmp_path / "bank")
    assert plan_prompts(requests, "", str(tmp_path / "bank"), max_k=1).symmetric
    with pytest.raises(BankError, match="no demonstration bank nothing"):
        plan_prompts(requests, "", "nothing", max_k=1)
    assert plan_prompts(requests, "", "nothing", max_k=0).source is None
    with pytest.raises(DataError, match=r"library has no training split for --bank SET=train"):
        plan_prompts(load_local_set(sets / "library"), "", "train", max_k=1)


@pytest.mark.parametrize("row", ['{"query": "Ask  ONE", "passage": "p"}', '{"query": "q", "passage": "ask one"}'])
def test_a_demonstration_may_not_be_a_test_text(sets: Path, tmp_path: Path, row: str) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text(row + "\n", encoding="utf-8")
    with pytest.raises(
        DataError, match=r'(?i)"ask +one" is a demonstration of .*pairs\.jsonl and a test text of library'
    ):
        plan_prompts(load_local_set(sets / "library"), "find", str(file), max_k=1)


def test_the_catalogue_names_banks_that_are_there() -> None:
    known = {task.bank for task in list_tasks()}
    for name, entry in CATALOGUE.items():
        assert entry.instruction, name
        assert entry.demonstrations in known | {"train", "train-labels"}, name
    for kind in ("retrieval", "reranking", "sts", "classification", "clustering"):
        assert entry_for("unheard of", kind).instruction
    assert entry_for("Cranfield", "retrieval").demonstrations == "papers"


@pytest.fixture
def bank(tmp_path: Path) -> Path:
    """Two demonstrations in a folder."""
    DemonstrationBank([("shown one", "passage one"), ("shown two", "passage two")]).save(tmp_path / "bank")
    return tmp_path / "bank"


@pytest.fixture
def pairs(tmp_path: Path, jsonl: Callable[[Path, Any], Path]) -> Path:
    """A file to hold out, with its instruction."""
    rows = [{"query": f"term {number}", "positive": f"definition of the term {number}"} for number in range(24)]
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "instructions.json").write_text('{"terms": "Find the term"}', encoding="utf-8")
    return jsonl(tmp_path / "train" / "terms.jsonl.gz", rows)


@pytest.fixture
def trained_checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """The tiny checkpoint with a training record."""
    folder = tmp_path / "trained"
    shutil.copytree(tiny_checkpoint, folder)
    record = json.loads((folder / "epic.json").read_text(encoding="utf-8"))
    (folder / "epic.json").write_text(json.dumps({**record, "training": {"steps": 1}}), encoding="utf-8")
    return folder


def _request(checkpoint: Path, sets: Path, bank: Path, **changes: Any) -> EvaluationRequest:
    fields: dict[str, Any] = {
        "models": (ModelSpec(str(checkpoint), "tiny", "prompted"),),
        "data": sets,
        "num_demonstrations": (0, 2),
        "banks": {name: str(bank) for name in ("library", "candidates", "likeness", "topics")},
    }
    return EvaluationRequest(**{**fields, **changes})


def test_a_run_over_all_kinds(tiny_checkpoint: Path, sets: Path, bank: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    seen: list[int] = []
    request = _request(tiny_checkpoint, sets, bank, mteb_output=tmp_path / "mteb", cache_dir=tmp_path / "cache")
    report = run_evaluation(request, progress=lines.append, on_update=lambda report: seen.append(len(report.sets)))
    names = ["library", "candidates", "likeness", "requests", "topics"]
    assert [(score.set_name, score.k) for score in report.sets] == [(name, k) for name in names for k in (0, 2)]
    assert seen == [*range(1, 11), 10]
    assert len(lines) == 11
    sources = {score.set_name: score.demonstrations for score in report.sets if score.k}
    assert sources["requests"] == "requests/train"
    assert sources["library"] == str(bank)
    assert all(score.instruction for score in report.sets)
    assert len(list((tmp_path / "mteb").rglob("library.json"))) == 2
    table = report.to_markdown()
    assert "tiny, k = 0" in table
    assert "tiny, k = 2" in table


def test_the_second_run_encodes_nothing(
    tiny_checkpoint: Path, sets: Path, bank: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = _request(tiny_checkpoint, sets, bank, tasks=("library", "likeness"), cache_dir=tmp_path / "cache")
    run_evaluation(request)

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("encoded again")

    monkeypatch.setattr(EpicEncoder, "_embed", refuse)
    run_evaluation(request)


def test_documents_are_encoded_once_for_all_k(
    tiny_checkpoint: Path, sets: Path, bank: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[str] = []
    original = EpicEncoder.encode_document

    def counted(self: EpicEncoder, texts: Any, **options: Any) -> Any:
        encoded.extend(texts)
        return original(self, texts, **options)

    monkeypatch.setattr(EpicEncoder, "encode_document", counted)
    run_evaluation(_request(tiny_checkpoint, sets, bank, tasks=("library",), num_demonstrations=(0, 1, 2)))
    # The bank's passages and queries are encoded, too.
    documents = sorted(text for text in encoded if not text.startswith(("passage", "shown")))
    assert documents == ["Alpha first", "second", "third"]


def test_a_model_without_a_training_record_is_plain(
    tiny_checkpoint: Path, trained_checkpoint: Path, sets: Path, bank: Path
) -> None:
    models = (
        ModelSpec(str(tiny_checkpoint), "untrained"),
        ModelSpec(str(trained_checkpoint), "trained"),
        ModelSpec(str(trained_checkpoint), "bare", "plain"),
    )
    report = run_evaluation(_request(tiny_checkpoint, sets, bank, models=models, tasks=("library",)))
    assert [(model.label, model.plain) for model in report.models] == [
        ("untrained", True),
        ("trained", False),
        ("bare", True),
    ]
    assert [(score.model, score.k, bool(score.instruction)) for score in report.sets] == [
        ("untrained", 0, False),
        ("trained", 0, True),
        ("trained", 2, True),
        ("bare", 0, False),
    ]
    scores = {(score.model, score.k): score.score for score in report.sets}
    assert scores["bare", 0] == scores["untrained", 0]


def test_a_checkpoint_that_compares_texts_of_one_kind_bare(trained_checkpoint: Path, sets: Path, bank: Path) -> None:
    file = trained_checkpoint / "epic.json"
    record = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**record, "symmetric_as_documents": True}), encoding="utf-8")
    path = str(trained_checkpoint)
    models = (ModelSpec(path, "auto"), ModelSpec(path, "prompted", "prompted"), ModelSpec(path, "plain", "plain"))
    report = run_evaluation(_request(trained_checkpoint, sets, bank, models=models))
    behind = {(score.model, score.kind): bool(score.instruction) for score in report.sets if score.k == 0}
    for kind in ("retrieval", "reranking"):
        assert [behind[name, kind] for name in ("auto", "prompted", "plain")] == [True, True, False]
    for kind in ("sts", "classification", "clustering"):
        assert [behind[name, kind] for name in ("auto", "prompted", "plain")] == [False, True, False]
    scores = {(score.model, score.set_name): score.score for score in report.sets if score.k == 0}
    assert scores["auto", "likeness"] == scores["plain", "likeness"]


def test_checks_before_a_model_is_loaded(sets: Path, bank: Path, pairs: Path) -> None:
    nowhere = Path("no-such-model")
    with pytest.raises(PromptError, match=r"bank has 2 demonstrations, and k is 3"):
        run_evaluation(_request(nowhere, sets, bank, num_demonstrations=(0, 3)))
    with pytest.raises(TaskError, match='"bookshop" is neither a local evaluation set'):
        run_evaluation(_request(nowhere, sets, bank, tasks=("bookshop",)))
    with pytest.raises(DataError, match=r"is an evaluation set, .* Use --data .*sets --tasks library"):
        run_evaluation(_request(nowhere, sets / "library", bank))
    with pytest.raises(DataError, match="No evaluation set in"):
        run_evaluation(_request(nowhere, sets / "empty", bank))
    with pytest.raises(DataError, match="None of topics is of the kinds retrieval, sts"):
        run_evaluation(_request(nowhere, sets, bank, tasks=("topics",), kinds=("retrieval", "sts")))
    symmetric = pairs.rename(pairs.with_name("snips_same_intent.jsonl.gz"))
    request = _request(nowhere, sets, bank, data=None, heldout=(symmetric,), heldout_collections=("pooled",))
    with pytest.raises(ConfigError, match=r"of snips_same_intent are encoded like queries and cannot be in a pooled"):
        run_evaluation(replace(request, instructions={"snips_same_intent": "x"}))
    with pytest.raises(DataError, match=r"other.jsonl cannot be read"):
        run_evaluation(
            _request(nowhere, sets, bank, heldout=(pairs.with_name("other.jsonl"),), instructions={"other": "x"})
        )


def test_a_set_without_demonstrations_is_scored_without(
    tiny_checkpoint: Path, sets: Path, bank: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        report = run_evaluation(_request(tiny_checkpoint, sets, bank, banks={}, tasks=("library",)))
    assert [score.k for score in report.sets] == [0]
    assert "--bank library=SOURCE" in caplog.text


def test_held_out_files_need_no_mteb(
    tiny_checkpoint: Path, pairs: Path, jsonl: Callable[[Path, Any], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = jsonl(pairs.with_name("commands.jsonl"), [{"query": f"do {n}", "positive": f"run -{n}"} for n in range(24)])
    monkeypatch.setitem(sys.modules, "mteb", None)
    request = EvaluationRequest(
        models=(ModelSpec(str(tiny_checkpoint), "tiny", "prompted"),),
        heldout=(pairs, other),
        heldout_queries=6,
        heldout_documents=10,
        num_demonstrations=(0, 3),
        draws=2,
        controls=True,
        instructions={"commands": "Find the command"},
    )
    report = run_evaluation(request)
    assert [(result.name, result.instruction, result.queries, result.documents) for _, result in report.heldout] == [
        ("terms", "Find the term", 6, 10),
        ("commands", "Find the command", 6, 10),
    ]
    for _, result in report.heldout:
        assert [score.condition for score in result.scores] == ["none", "own", "shuffled", "foreign"]
        assert all(0 <= score.ndcg_at_10 <= 1 for score in result.scores)
    assert "mean of 2 files" in report.to_markdown()


def test_every_combination_of_collection_and_instruction(
    trained_checkpoint: Path, pairs: Path, jsonl: Callable[[Path, Any], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[str] = []
    original = EpicEncoder.encode_document

    def counted(self: EpicEncoder, texts: Any, **options: Any) -> Any:
        if len(texts) > 2:  # and not a bank's passages
            encoded.extend(texts)
        return original(self, texts, **options)

    monkeypatch.setattr(EpicEncoder, "encode_document", counted)
    record = json.loads((trained_checkpoint / "epic.json").read_text(encoding="utf-8"))
    record["default_instruction"] = "Find what fits"
    (trained_checkpoint / "epic.json").write_text(json.dumps(record), encoding="utf-8")
    other = jsonl(pairs.with_name("commands.jsonl"), [{"query": f"do {n}", "positive": f"run -{n}"} for n in range(24)])
    request = EvaluationRequest(
        models=(
            ModelSpec(str(trained_checkpoint), "tiny"),
            ModelSpec(str(trained_checkpoint), "bare", "plain"),
            ModelSpec("bm25", "BM25", "bm25"),
        ),
        heldout=(pairs, other),
        heldout_queries=6,
        heldout_documents=10,
        heldout_collections=("own", "pooled", "pooled-with-queries"),
        heldout_instructions=("own", "default", "none"),
        num_demonstrations=(0, 2),
        draws=1,
        instructions={"commands": "Find the command"},
    )
    report = run_evaluation(request)
    found = [
        (label, result.name, result.collection, result.instruction, result.documents)
        for label, result in report.heldout
    ]
    sizes = {"own": 10, "pooled": 20, "pooled-with-queries": 40}
    own = {"terms": "Find the term", "commands": "Find the command"}
    assert [item for item in found if item[0] == "tiny"] == [
        ("tiny", name, collection, instruction, size)
        for collection, size in sizes.items()
        for name in own
        for instruction in (own[name], "Find what fits", "")
    ]
    for label in ("bare", "BM25"):
        assert [item for item in found if item[0] == label] == [
            (label, name, collection, None, size) for collection, size in sizes.items() for name in own
        ]
    assert len(encoded) == len({*encoded}) * 2, "once by each of the two encoders"
    table = report.to_markdown()
    for cells in (
        "| BM25  | pooled-with-queries | plain       |",
        "| tiny  | own                 | default     |",
        "| **mean of 2 files** | tiny  | pooled              | none        |",
    ):
        assert cells in table
    assert table.count("mean of 2 files") == 3 * 3 * 2 + 3 + 3


def test_kinds_and_bm25(tiny_checkpoint: Path, sets: Path, bank: Path, tmp_path: Path) -> None:
    models = (ModelSpec("bm25", "BM25", "bm25"), ModelSpec(str(tiny_checkpoint), "tiny", "prompted"))
    kinds: Any = ("retrieval", "reranking", "sts")
    request = _request(tiny_checkpoint, sets, bank, models=models, kinds=kinds, mteb_output=tmp_path / "mteb")
    report = run_evaluation(request)
    assert [(score.set_name, score.k) for score in report.sets if score.model == "BM25"] == [
        ("library", 0),
        ("candidates", 0),
    ]
    assert [score.set_name for score in report.sets if score.model == "tiny" and score.k == 0] == [
        "library",
        "candidates",
        "likeness",
    ]
    assert [model.lexical for model in report.models] == [True, False]
    assert "| **mean of the 2 in all columns** |" in report.to_markdown()
    again = run_evaluation(replace(request, models=models[:1]))
    assert [score.score for score in again.sets] == [score.score for score in report.sets[:2]]


def test_missing_mteb_names_the_extra(
    tiny_checkpoint: Path, sets: Path, bank: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mteb", None)
    with pytest.raises(
        MissingExtraError, match=r"needs mteb, which is not installed. Run `pip install 'epic-rag\[eval\]'`"
    ):
        run_evaluation(_request(tiny_checkpoint, sets, bank))
