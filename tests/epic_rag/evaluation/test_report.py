from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from epic_rag.evaluation.heldout import Comparison, HeldoutResult, HeldoutScore
from epic_rag.evaluation.report import EvaluationReport, ModelRecord, SetScore, versions, write_json


def _model(label: str, plain: bool = False) -> ModelRecord:
    return ModelRecord(label, f"runs/{label}", "abc", 384, plain, 256, 256, "cpu", "float32")


def _score(model: str, name: str, kind: str, k: int, score: float) -> SetScore:
    return SetScore(model, name, kind, "1", "ndcg_at_10", k, score, "find it", None, "f00", {"x": 1.0}, 2.0)


def _heldout(name: str, own: float) -> HeldoutResult:
    scores = (
        HeldoutScore("none", 0, 0.5, (0.5,), 0.0),
        HeldoutScore(
            "own", 8, own, (own - 0.01, own + 0.01), 0.0141, Comparison(own - 0.5, 0.003), Comparison(0.02, 0.004)
        ),
        HeldoutScore("shuffled", 8, own - 0.02, (own - 0.02,) * 2, 0.0, Comparison(own - 0.52, 0.004)),
    )
    return HeldoutResult(name, "1", "find it", 100, 500, 40, scores, 3.0)


@pytest.fixture
def report() -> EvaluationReport:
    return EvaluationReport(
        settings={"seed": 0},
        command=("epic-rag", "eval"),
        started="2026-01-01T00:00:00+00:00",
        models=[_model("base", plain=True), _model("ours")],
        sets=[
            _score("base", "library", "retrieval", 0, 0.5),
            _score("base", "manual", "retrieval", 0, 0.3),
            _score("base", "a|b", "sts", 0, 0.8),
            _score("ours", "library", "retrieval", 0, 0.6),
            _score("ours", "library", "retrieval", 8, 0.65),
            _score("ours", "manual", "retrieval", 0, 0.4),
            _score("ours", "a|b", "sts", 0, 0.81234),
        ],
    )


def test_the_table(report: EvaluationReport) -> None:
    assert report.to_markdown().splitlines() == [
        "| set                    | score      | base, plain | ours, k = 0 | ours, k = 8 |",
        "| ---------------------- | ---------- | ----------: | ----------: | ----------: |",
        "| library                | ndcg_at_10 |       50.00 |       60.00 |       65.00 |",
        "| manual                 | ndcg_at_10 |       30.00 |       40.00 |           – |",
        "| **mean retrieval (2)** |            |   **40.00** |   **50.00** |           – |",
        "| a\\|b                   | ndcg_at_10 |       80.00 |       81.23 |           – |",
        "| **mean of all 3 sets** |            |   **53.33** |   **60.41** |           – |",
    ]


def test_a_last_line_compares_what_all_columns_have(report: EvaluationReport) -> None:
    assert report.shared_sets() == ["library"], "one set is no mean"
    report.sets.append(_score("ours", "a|b", "sts", 8, 0.79))
    report.models.append(dataclasses.replace(_model("BM25", plain=True), lexical=True))
    lines = report.to_markdown().splitlines()
    assert lines[0].endswith("| base, plain | ours, k = 0 | ours, k = 8 |")
    assert lines[-1] == "| **mean of the 2 in all columns** |            |   **65.00** |   **70.62** |   **72.00** |"
    report.sets.append(_score("BM25", "library", "retrieval", 0, 0.4))
    report.sets.append(_score("BM25", "manual", "retrieval", 0, 0.5))
    lines = report.to_markdown().splitlines()
    assert lines[0].endswith("| ours, k = 8 |      BM25 |")
    assert next(line for line in lines if "mean retrieval (2)" in line).endswith("|           – | **45.00** |")
    assert lines[-1].startswith("| **mean of all 3 sets** "), "library alone is in all columns now"
    assert lines[-1].endswith("|         – |")


def test_a_mean_is_over_the_same_sets_or_none(report: EvaluationReport) -> None:
    assert report.mean("ours", 0, "retrieval") == pytest.approx(0.5)
    assert report.mean("ours", 8, "retrieval") is None
    assert report.mean("base", 0) == pytest.approx((0.5 + 0.3 + 0.8) / 3)


def test_the_table_of_held_out_files(report: EvaluationReport) -> None:
    report.sets = []
    report.heldout = [("ours", _heldout("terms", 0.53)), ("ours", _heldout("commands", 0.51))]
    lines = report.to_markdown().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[3] == ["terms", "ours", "own", "8", "53.00", "1.41", "+3.00 ± 0.30", ""]
    assert cells[4] == ["terms", "ours", "own, passages shuffled", "8", "51.00", "0.00", "+1.00 ± 0.40", "+2.00 ± 0.40"]
    # Means of differences on two files: 3 and 1; the error is sqrt(0.3² + 0.3²) / 2.
    assert cells[-2] == ["**mean of 2 files**", "ours", "own", "8", "52.00", "", "+2.00 ± 0.21", ""]
    assert cells[-1][-3:] == ["", "+0.00 ± 0.28", "+2.00 ± 0.28"], "the mean of what the right ones add to a control"


def test_json_has_everything_and_is_written_whole(report: EvaluationReport, tmp_path: Path) -> None:
    report.heldout = [("ours", _heldout("terms", 0.53))]
    path = tmp_path / "deep" / "results.json"
    write_json(report, path)
    assert [item.name for item in path.parent.iterdir()] == ["results.json"]
    data = json.loads(path.read_text(encoding="utf-8"))
    assert data["command"] == ["epic-rag", "eval"]
    assert data["sets"][4] == {
        "model": "ours",
        "set_name": "library",
        "kind": "retrieval",
        "revision": "1",
        "metric": "ndcg_at_10",
        "k": 8,
        "score": 0.65,
        "instruction": "find it",
        "demonstrations": None,
        "prompt": "f00",
        "scores": {"x": 1.0},
        "seconds": 2.0,
    }
    assert data["models"][0]["fingerprint"] == "abc"
    assert {"model": "ours", "k": 8, "kind": "retrieval", "score": None} in data["means"]
    assert data["heldout"][0]["scores"][1]["versus_zero"] == {
        "difference": pytest.approx(0.03),
        "standard_error": 0.003,
    }
    assert data["versions"]["torch"] == versions()["torch"] is not None
