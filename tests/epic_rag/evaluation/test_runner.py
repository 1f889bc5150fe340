"""Whole runs with tiny models on tiny sets."""

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

from epic_rag.demonstrations import DemonstrationBank
from epic_rag.encoder import EpicEncoder
from epic_rag.errors import ConfigError, DataError, MissingExtraError, PromptError, TaskError
from epic_rag.evaluation.__main__ import main
from epic_rag.evaluation.runner import EvaluationRequest, ModelSpec, run_evaluation


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
    assert sorted(text for text in encoded if not text.startswith("passage")) == ["Alpha first", "second", "third"]


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


def test_everything_is_checked_before_a_model_is_loaded(sets: Path, bank: Path, pairs: Path) -> None:
    nowhere = Path("no-such-model")
    with pytest.raises(PromptError, match=r"3 demonstrations were asked, .*bank has 2"):
        run_evaluation(_request(nowhere, sets, bank, num_demonstrations=(0, 3)))
    with pytest.raises(TaskError, match='"bookshop" is neither a local evaluation set'):
        run_evaluation(_request(nowhere, sets, bank, tasks=("bookshop",)))
    with pytest.raises(DataError, match=r"is an evaluation set, .* write --data .*sets --tasks library"):
        run_evaluation(_request(nowhere, sets / "library", bank))
    with pytest.raises(DataError, match="holds no evaluation set"):
        run_evaluation(_request(nowhere, sets / "empty", bank))
    with pytest.raises(DataError, match="none of topics is of the kinds retrieval, sts"):
        run_evaluation(_request(nowhere, sets, bank, tasks=("topics",), kinds=("retrieval", "sts")))
    symmetric = pairs.rename(pairs.with_name("snips_same_intent.jsonl.gz"))
    request = _request(nowhere, sets, bank, data=None, heldout=(symmetric,), heldout_collections=("pooled",))
    with pytest.raises(ConfigError, match=r"of snips_same_intent are encoded like queries, those of a pooled coll"):
        run_evaluation(replace(request, instructions={"snips_same_intent": "x"}))
    with pytest.raises(DataError, match="there is no file"):
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
        MissingExtraError, match=r"needs mteb, which is not installed; run `pip install 'epic-rag\[eval\]'`"
    ):
        run_evaluation(_request(tiny_checkpoint, sets, bank))


def test_the_module_command(
    tiny_checkpoint: Path, sets: Path, bank: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "results.json"
    instructions = tmp_path / "mine.json"
    instructions.write_text('{"library": "Find the book"}', encoding="utf-8")
    arguments = [
        "--model",
        f"tiny={tiny_checkpoint}:prompted",
        "--data",
        sets,
        "--tasks",
        "library",
        "--bank",
        f"library={bank}",
    ]
    arguments += ["--num-demonstrations", "0,1", "--instructions", instructions, "--output", output]
    arguments += ["--heldout", pairs, "--heldout-queries", "4", "--heldout-documents", "8", "--draws", "1"]
    arguments += ["--heldout-instruction", "own", "--heldout-collection", "own,pooled", "--kinds", "retrieval"]
    status = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert status == 0
    assert "tiny, k = 1" in captured.out
    assert "terms" in captured.out
    assert "tiny, library, k = 1:" in captured.err
    data = json.loads(output.read_text(encoding="utf-8"))
    assert data["sets"][0]["instruction"] == "Find the book"
    assert data["command"][:2] == ["--model", f"tiny={tiny_checkpoint}:prompted"]
    assert len(data["heldout"][0]["scores"]) == 2
    assert [result["collection"] for result in data["heldout"]] == ["own", "pooled"]

    assert main(["--model", "x", "--data", str(tmp_path / "nowhere")]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: there is no folder")
    assert captured.err.count("\n") == 1
