"""`benchmarks/results.py`: stages, skipping of finished steps, and the report between the markers of a document."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import results
import results_few_shot
import results_report

from epic_rag.errors import ConfigError, DataError, EpicError
from epic_rag.evaluation.few_shot_report import CONTROLS, FewShotCell, FewShotReport, FewShotRequest

ROOT = Path(__file__).resolve().parents[2]


def test_every_stage_can_be_read_and_filled() -> None:
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
    [("minilm", "needs path/to/all-MiniLM-L6-v2.* Pass --minilm DIR"), ("data", "needs data.* Pass --data DIR")],
)
def test_a_folder_that_was_not_given(place: str, said: str) -> None:
    with pytest.raises(ConfigError, match=f"The stage heldout {said}"):
        results.fill(f"epic-rag eval --model {{{place}}}:plain", {place: None}, [], "heldout")


def test_stages_that_there_are_not(tmp_path: Path) -> None:
    steps, report = results.chosen_steps("report, heldout, fewshot-gains")
    assert ({step.stage for step in steps}, report) == ({"heldout", "fewshot"}, True)
    assert [step.name for step in steps if step.stage == "fewshot"] == ["gains"]
    assert results.chosen_steps(None)[1]
    assert not results.chosen_steps("heldout")[1]
    for only in ("poems", " , "):
        with pytest.raises(ConfigError, match="Use one or more of ablations, efficiency"):
            results.chosen_steps(only)
    (tmp_path / "poems.yaml").write_text("steps:\n  one:\n    command: x\n    colour: red\n")
    with pytest.raises(ConfigError, match=r"poems.yaml, step one: unknown \['colour'\]"):
        results.load_stage("poems", tmp_path)


def _run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> tuple[Any, Any]:
    """Return a step whose program is a few lines of code, and a run."""
    script = tmp_path / "script.py"
    script.write_text(code)
    monkeypatch.setattr(results, "interpreter", lambda words: [sys.executable, str(script), *words])
    step = results.Step("heldout", "one", "epic-rag eval --data {data} --draws 2", quick="--draws 1")
    (tmp_path / "data").mkdir(exist_ok=True)
    places = {"data": str(tmp_path / "data"), "minilm": None, "llm": None, "int8": None, "default": "x"}
    return step, results.Run(tmp_path / "output", places, [])


COUNTS = """\
import pathlib, sys
log = pathlib.Path(__file__).with_name("calls.txt")
log.write_text((log.read_text() if log.exists() else "") + " ".join(sys.argv[1:]) + "\\n")
print("| a |\\n| --- |\\n| 1 |")
"""


def test_a_finished_step_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step, run = _run(tmp_path, monkeypatch, COUNTS)
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


def test_a_failed_step_is_not_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step, run = _run(tmp_path, monkeypatch, "print('half')\nraise SystemExit(3)\n")
    with pytest.raises(EpicError, match="heldout-one ended with status 3"):
        results.run_step(step, run)
    folder = tmp_path / "output" / "heldout" / "one"
    assert not (folder / "state.json").exists()
    assert not (folder / "table.md").exists()
    step, run = _run(tmp_path, monkeypatch, COUNTS)
    results.run_step(step, run)
    assert (folder / "state.json").is_file()


def test_only_the_place_between_markers_changes() -> None:
    text = "before\n<!-- begin a -->\nold\n<!-- end a -->\nafter <!-- begin b --> x <!-- end b -->\n"
    new = results_report.replace_between(text, "a", "new\nlines\n")
    assert new == text.replace("old", "new\nlines")
    assert results_report.replace_between(new, "a", "new\nlines") == new
    assert results_report.replace_between(text, "c", "new") is None
    for wrong in (
        "<!-- end a --><!-- begin a -->",
        "<!-- begin a -->",
        "<!-- begin a --><!-- end a --><!-- begin a --><!-- end a -->",
    ):
        with pytest.raises(DataError, match="Write one of each, in this order"):
            results_report.replace_between(wrong, "a", "new")


def test_a_long_command_is_broken_before_options() -> None:
    words = ["epic-rag", "eval", *(part for number in range(9) for part in ("--heldout", f"data/file {number}.jsonl"))]
    text = results_report.wrapped([*words, "--controls"])
    assert shlex.split(text.replace("\\\n", "")) == [*words, "--controls"]
    lines = text.splitlines()
    assert len(lines) > 1
    assert all(line.startswith("  --") for line in lines[1:])
    assert max(map(len, lines)) <= 112


def _heldout_json() -> dict[str, Any]:
    def score(condition: str, k: int, value: float, difference: float | None) -> dict[str, Any]:
        versus = None if difference is None else {"difference": difference, "standard_error": 0.003}
        return {"condition": condition, "k": k, "ndcg_at_10": value, "versus_zero": versus}

    def entry(model: str, source: str, gain: float | None) -> dict[str, Any]:
        scores = [score("none", 0, 0.5, None)]
        if gain is not None:
            scores += [score("own", 8, 0.5 + gain, gain), score("shuffled", 8, 0.5, 0.0)]
        return {"model": model, "collection": "pooled", "instruction_source": source, "scores": scores}

    return {"heldout": [entry("ours", "own", 0.01), entry("ours", "own", 0.03), entry("bm25", "plain", None)]}


def test_the_short_table_of_held_out_scores() -> None:
    assert results_report.heldout_table(_heldout_json()).splitlines() == [
        "| model | collection | instruction | k = 0 |   own, k = 8 | passages shuffled, k = 8 |",
        "| ----- | ---------- | ----------- | ----: | -----------: | -----------------------: |",
        "| ours  | pooled     | own         | 50.00 | +2.00 ± 0.21 |             +0.00 ± 0.21 |",
        "| bm25  | pooled     | plain       | 50.00 |              |                          |",
    ]


def test_the_report(tmp_path: Path) -> None:
    document = tmp_path / "results.md"
    document.write_text(results_report.placeholder_document(["heldout-one", "heldout-three"]) + "\nWords.\n")
    folder = tmp_path / "step"
    folder.mkdir()
    (folder / "result.json").write_text(json.dumps(_heldout_json()))
    (folder / "table.md").write_text("| a |\n| --- |\n")
    command = ("epic-rag", "eval", "--controls")
    steps = [results_report.Finished(f"heldout-{name}", command, folder) for name in ("one", "two")]
    steps.append(results_report.Finished("heldout-three", command, folder, "heldout"))
    said = results_report.write_report(steps, [document])
    text = document.read_text()
    assert "-->\n```text\nepic-rag eval --controls\n```\n\n| a |\n| --- |\n<!-- end heldout-one -->" in text
    assert "| ours  | pooled     | own         | 50.00 |" in text
    assert text.endswith("<!-- end heldout-three -->\n\nWords.\n")
    assert "has no place for heldout-two, which is <!-- begin heldout-two -->" in said[1]
    results_report.write_report(steps, [document])
    assert document.read_text() == text
    with pytest.raises(DataError, match="No document"):
        results_report.write_report(steps, [document, tmp_path / "none.md"])


def test_quick(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = (ROOT / "docs" / "results.md").read_bytes()
    monkeypatch.chdir(tmp_path)
    # One step of each kind of table.
    load_stage = results.load_stage
    monkeypatch.setattr(results, "load_stage", lambda name: load_stage(name)[:1])
    assert results.main(["--quick", "--only", "heldout,quantisation,report"]) == 0
    written = capsys.readouterr().out
    assert "| epic-minilm      | pooled              | own " in written
    assert "<!-- end quantisation-sets -->" in written
    assert (ROOT / "docs" / "results.md").read_bytes() == before
    assert list(tmp_path.iterdir()) == []


def test_training_beside_demonstrations(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The steps that train: on the demonstrations themselves, and on prompts of them."""
    assert results.main(["--quick", "--only", "fewshot-training,fewshot-prompt-arms,report"]) == 0
    written = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in written.splitlines() if line.startswith("|")]
    assert ["task", "collection", "n", "n = 0", "reader", "trained: queries", "trained: everything"] in rows
    assert ["**mean**", "own documents", "4"] in [row[:3] for row in rows]
    arms = [row[0] for row in rows if row[1] == "own documents"]
    assert arms[-5:] == ["before", "random", "nearest", "warm", "warm-nearest"]


def test_errors_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert results.main(["--only", "poems"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: --only names poems. Use one or more of ablations")
    assert captured.err.count("\n") == 1


def _few_shot_json(**gains: float) -> dict[str, Any]:
    """Return the JSON of two tasks, whose gains depend on method and control alone."""
    methods = ("reader-against", "reader", "task-vector", "llama-index")
    request = FewShotRequest(
        sizes=(8, 128), draws=2, collections=("own", "pooled-with-queries"), methods=methods, wordings=True
    )
    tasks: list[dict[str, object]] = [{"name": "a"}, {"name": "b"}]
    report = FewShotReport(dataclasses.replace(request, controls=CONTROLS), "m", tasks)
    arms: list[tuple[str, Any]] = [(method, "none") for method in methods]
    arms += [("reader-against", control) for control in CONTROLS[1:]] + [("wording-1", "none")]
    for task in ("a", "b"):
        for collection in request.collections:
            for ranking in ("dense", "hybrid"):
                report.zero_shot[f"{task}/{collection}/{ranking}"] = 50.0
                for method, control in arms:
                    gain = gains.get(method if control == "none" else control, 1.0)
                    for n in (8, 128):
                        by_query = (gain, gain + (task == "b"))
                        cell = FewShotCell(task, collection, ranking, method, control, n, by_query, (by_query[1],) * 2)
                        report.cells.append(cell)
    result: dict[str, Any] = json.loads(json.dumps(report.to_json()))
    return result


def test_the_short_tables_of_a_few_shot_evaluation() -> None:
    result = _few_shot_json(
        **{"reader-against": 4.0, "reader": 3.0, "shuffled": 0.0, "wrong-25": 2.0, "llama-index": 5}
    )
    tables = results_few_shot.few_shot_tables(result)
    assert "2 tasks. `reader-against`, mean of tasks" in tables
    lines = {tuple(cell.strip() for cell in line.split("|")[1:-1]) for line in tables.splitlines()}
    assert ("reader-against", "own documents", "+4.50", "+4.50") in lines
    assert ("reader", "mixed, with queries", "+3.50", "+3.50") in lines
    assert ("reader-against, foreign", "own documents", "+1.50", "+1.50") in lines
    assert ("b", "own documents", "50.00", "+5.00", "+5.00") in lines
    assert ("own documents, n = 8", "≥ 0.4", "+4.50 (n = 8)", "met") in lines
    assert ("mixed, with queries, n = 128", "≥ 6", "+4.50 (n = 128)", "missed by 1.50") in lines
    assert ("own documents: shuffled (size)", "≤ 0.2", "+0.50 (n = 8)", "missed by 0.30") in lines
    assert (
        "own documents: share of the gain with 25% wrong pairs",
        "≥ 0.7",
        "+0.56 (n = 128)",
        "missed by 0.14",
    ) in lines
    assert (
        "own documents: lead over LlamaIndex's adapter, n = 128",
        "≥ 0.5",
        "-1.00 (llama-index)",
        "missed by 1.50",
    ) in lines
    assert "Given a query, retrieve the text that belongs to it" in tables
    summary = results_few_shot.few_shot_summary(result).splitlines()
    assert [cell.strip() for cell in summary[2].split("|")[1:-1]] == ["own documents", "50.00", "+4.50", "+4.50"]
    assert "passages shuffled" in summary[-1]


def test_a_few_shot_evaluation_goes_into_two_documents(tmp_path: Path) -> None:
    step = tmp_path / "step"
    step.mkdir()
    (step / "result.json").write_text(json.dumps(_few_shot_json()))
    (step / "result.svg").write_text("<svg/>")
    long, short = tmp_path / "results.md", tmp_path / "README.md"
    long.write_text(results_report.placeholder_document(["fewshot-gains"]))
    short.write_text(results_report.placeholder_document(["fewshot-gains-summary"]))
    steps = [results_report.Finished("fewshot-gains", ("epic-rag", "eval"), step, "fewshot")]
    said = results_report.write_report(steps, [long, short])
    assert said == [f"fewshot-gains is in {long}", f"fewshot-gains-summary is in {short}"]
    assert "(images/fewshot-gains.svg)" in long.read_text()
    assert (tmp_path / "images" / "fewshot-gains.svg").read_text() == "<svg/>"
    assert short.read_text().count("|") > 10
