"""`benchmarks/results.py`: stages, resuming, and the report between the markers of a document."""

from __future__ import annotations

import importlib
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from epic_rag.errors import ConfigError, DataError, EpicError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("results")


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The report's module."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("results_report")


def test_every_stage_can_be_read_and_filled(results: Any) -> None:
    for stage in results.STAGES:
        for step in results.load_stage(stage):
            words = results.fill(step.command, results.SHOWN, [("", "epic-minilm"), ("b", "runs/b")], stage)
            assert (words[0], words[1]) in results.PLUMBING
            assert not [word for word in words if "{" in word]
            assert shlex.split(step.quick) is not None
    words = results.fill("epic-rag eval {shipped} --data {data}/eval", {"data": "d"}, [("", "x"), ("b", "y")], "s")
    assert words == ["epic-rag", "eval", "--model", "x", "--model", "b=y", "--data", "d/eval"]


@pytest.mark.parametrize(
    ("place", "said"),
    [("minilm", "needs path/to/all-MiniLM-L6-v2.* pass --minilm DIR"), ("data", "needs data.* pass --data DIR")],
)
def test_a_folder_that_was_not_given(results: Any, place: str, said: str) -> None:
    with pytest.raises(ConfigError, match=f"the stage heldout {said}"):
        results.fill(f"epic-rag eval --model {{{place}}}:plain", {place: None}, [], "heldout")


def test_stages_that_there_are_not(results: Any, tmp_path: Path) -> None:
    assert results.chosen_stages("report, heldout") == ["heldout", "report"]
    assert results.chosen_stages(None)[-1] == "report"
    for only in ("poems", " , "):
        with pytest.raises(ConfigError, match="use one or more of ablations, efficiency"):
            results.chosen_stages(only)
    (tmp_path / "poems.yaml").write_text("steps:\n  one:\n    command: x\n    colour: red\n")
    with pytest.raises(ConfigError, match=r"poems.yaml, step one: unknown \['colour'\]"):
        results.load_stage("poems", tmp_path)


def _run(results: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> tuple[Any, Any]:
    """A step whose program is a few lines that see where their output goes; and a run."""
    script = tmp_path / "script.py"
    script.write_text(code)
    monkeypatch.setattr(results, "interpreter", lambda words: [sys.executable, str(script), *words])
    step = results.Step("heldout", "one", "epic-rag eval --data {data} --draws 2", quick="--draws 1")
    (tmp_path / "data").mkdir(exist_ok=True)
    places = {"data": str(tmp_path / "data"), "minilm": None, "llm": None, "float": None, "default": "x"}
    return step, results.Run(tmp_path / "output", places, [])


COUNTS = """\
import pathlib, sys
log = pathlib.Path(__file__).with_name("calls.txt")
log.write_text((log.read_text() if log.exists() else "") + " ".join(sys.argv[1:]) + "\\n")
print("| a |\\n| --- |\\n| 1 |")
"""


def test_a_finished_step_is_not_run_again(results: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step, run = _run(results, tmp_path, monkeypatch, COUNTS)
    calls = tmp_path / "calls.txt"
    for _ in range(2):
        finished = results.run_step(step, run)
    assert len(calls.read_text().splitlines()) == 1
    assert f"--output {tmp_path}/output/heldout/one/result.json" in calls.read_text()
    assert finished.command == ("epic-rag", "eval", "--data", "data", "--draws", "2"), "what a reader would type"
    assert (finished.folder / "table.md").read_text() == "| a |\n| --- |\n| 1 |\n"
    # Other data, another command: run again.
    (tmp_path / "data" / "new.jsonl").write_text("{}\n")
    results.run_step(step, run)
    results.run_step(results.Step("heldout", "one", step.command + " --seed 1"), run)
    assert len(calls.read_text().splitlines()) == 3
    assert json.loads((finished.folder / "state.json").read_text())["settings"]["command"][-1] == "1"


def test_a_failed_step_is_not_finished(results: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step, run = _run(results, tmp_path, monkeypatch, "print('half')\nraise SystemExit(3)\n")
    with pytest.raises(EpicError, match="heldout-one ended with status 3"):
        results.run_step(step, run)
    folder = tmp_path / "output" / "heldout" / "one"
    assert not (folder / "state.json").exists()
    assert not (folder / "table.md").exists()
    step, run = _run(results, tmp_path, monkeypatch, COUNTS)
    results.run_step(step, run)
    assert (folder / "state.json").is_file()


def test_only_the_place_between_markers_changes(report: Any) -> None:
    text = "before\n<!-- begin a -->\nold\n<!-- end a -->\nafter <!-- begin b --> x <!-- end b -->\n"
    new = report.replace_between(text, "a", "new\nlines\n")
    assert new == text.replace("old", "new\nlines")
    assert report.replace_between(new, "a", "new\nlines") == new
    assert report.replace_between(text, "c", "new") is None
    for wrong in (
        "<!-- end a --><!-- begin a -->",
        "<!-- begin a -->",
        "<!-- begin a --><!-- end a --><!-- begin a --><!-- end a -->",
    ):
        with pytest.raises(DataError, match="it needs one of each, in this order"):
            report.replace_between(wrong, "a", "new")


def test_a_long_command_is_broken_before_options(report: Any) -> None:
    words = ["epic-rag", "eval", *(part for number in range(9) for part in ("--heldout", f"data/file {number}.jsonl"))]
    text = report.wrapped([*words, "--controls"])
    assert shlex.split(text.replace("\\\n", "")) == [*words, "--controls"]
    lines = text.splitlines()
    assert len(lines) > 1
    assert all(line.startswith("  --") for line in lines[1:])
    assert max(map(len, lines)) <= 112


def _finished(report: Any, folder: Path, **changes: Any) -> Any:
    folder.mkdir(exist_ok=True)
    table = "| file | x |\n| --- | --: |\n| one | 1 |\n| two | 3 |\n| **mean of 2 files** | 2 |\n"
    (folder / "table.md").write_text(table)
    return report.Finished("heldout-one", ("epic-rag", "eval", "--controls"), folder, **changes)


def _heldout_json() -> dict[str, Any]:
    def score(condition: str, k: int, difference: float | None) -> dict[str, Any]:
        versus = None if difference is None else {"difference": difference, "standard_error": 0.003}
        return {"condition": condition, "k": k, "versus_zero": versus}

    def entry(model: str, source: str, gain: float | None) -> dict[str, Any]:
        scores = [score("none", 0, None)]
        if gain is not None:
            scores += [score("own", 1, 9.0), score("own", 8, gain), score("shuffled", 8, 0.0)]
        return {"model": model, "collection": "pooled", "instruction_source": source, "scores": scores}

    return {"heldout": [entry("ours", "own", 0.01), entry("ours", "own", 0.03), entry("bm25", "plain", None)]}


def test_the_report(report: Any, tmp_path: Path) -> None:
    document = tmp_path / "docs" / "results.md"
    document.parent.mkdir()
    document.write_text("# R\n\n<!-- begin heldout-one -->\n<!-- end heldout-one -->\n\nWords.\n")
    step = _finished(report, tmp_path / "step", table="means", plot=True)
    (step.folder / "result.json").write_text(json.dumps(_heldout_json()))
    (step.folder / "other plot.svg").write_text("<svg/>")
    said = report.write_report([step, report.Finished("heldout-two", (), tmp_path)], document)
    text = document.read_text()
    assert text.endswith("<!-- end heldout-one -->\n\nWords.\n")
    assert (
        "```text\nepic-rag eval --controls\n```\n\n| file | x |\n| --- | --: |\n| **mean of 2 files** | 2 |\n" in text
    )
    assert "| one |" not in text
    images = sorted(path.name for path in (document.parent / "images").iterdir())
    assert images == ["heldout-one-differences.svg", "heldout-one-other-plot.svg"]
    assert all(f"](images/{name})" in text for name in images)
    assert "has no place for heldout-two" in said[1]
    assert "<!-- begin heldout-two -->" in said[1]
    # The same again changes nothing, and a plot that is no longer made goes.
    drawn = (document.parent / "images" / images[0]).read_bytes()
    (step.folder / "other plot.svg").unlink()
    report.write_report([step], document)
    assert [path.name for path in (document.parent / "images").iterdir()] == images[:1]
    assert (document.parent / "images" / images[0]).read_bytes() == drawn
    with pytest.raises(DataError, match="there is no document"):
        report.write_report([step], tmp_path / "none.md")


def test_what_is_drawn(report: Any) -> None:
    differences = report.mean_differences(_heldout_json())
    assert differences == {
        ("ours", "pooled", "own", "own"): pytest.approx((2.0, 0.3 / 2**0.5)),
        ("ours", "pooled", "own", "shuffled"): pytest.approx((0.0, 0.3 / 2**0.5)),
    }


def test_quick_in_a_process_of_its_own(tmp_path: Path) -> None:
    before = (ROOT / "docs" / "results.md").read_bytes()
    command = [sys.executable, str(ROOT / "benchmarks" / "results.py"), "--quick", "--only", "heldout,report"]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "| **mean of 4 files** | epic-minilm" in done.stdout
    assert "![heldout-pooled-differences](images/heldout-pooled-differences.svg)" in done.stdout
    assert (ROOT / "docs" / "results.md").read_bytes() == before
    assert list(tmp_path.iterdir()) == []


def test_errors_are_one_line(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "results.py"), "--only", "poems"]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: --only names poems; use one or more of ablations")
    assert done.stderr.count("\n") == 1
