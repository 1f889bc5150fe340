"""`epic-rag eval`, through the command line's own entry point."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from epic_rag_cli.main import run


@pytest.fixture(autouse=True)
def _working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EPIC_RAG_MODEL", raising=False)
    monkeypatch.chdir(tmp_path)
    rows = [{"query": f"term {number}", "passage": f"what {number} means"} for number in range(12)]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_table_json_and_file(
    tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["eval", "--heldout", "pairs.jsonl", "-n", "0,2", "--controls", "--draws", "2"]
    assert run([*command, "--model", f"{tiny_checkpoint}:prompted", "--output", "out/scores.json"]) == 0
    captured = capsys.readouterr()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in captured.out.splitlines()]
    assert [row[:4] for row in rows[2:]] == [
        ["pairs", "tiny", "none", "0"],
        ["pairs", "tiny", "own", "2"],
        ["pairs", "tiny", "own, passages shuffled", "2"],
    ]
    written = json.loads(Path("out/scores.json").read_text(encoding="utf-8"))
    assert written["settings"]["draws"] == 2

    monkeypatch.setenv("EPIC_RAG_MODEL", str(tiny_checkpoint))
    assert run(["eval", "--heldout", "pairs.jsonl", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["models"][0]["source"] == str(tiny_checkpoint)
    assert printed["models"][0]["plain"] is True
    assert [score["k"] for score in printed["heldout"][0]["scores"]] == [0]


def test_collections_instructions_and_bm25(tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("other.jsonl").write_text(Path("pairs.jsonl").read_text().replace("term", "name").replace("what", "whose"))
    command = ["eval", "--heldout", "pairs.jsonl", "--heldout", "other.jsonl", "-n", "0,1"]
    command += ["--heldout-collection", "own", "--heldout-collection", "pooled,pooled-with-queries"]
    command += ["--heldout-instruction", "own,none", "--model", f"{tiny_checkpoint}:prompted", "--model", "bm25"]
    assert run(command) == 0
    printed = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in printed.splitlines()]
    assert rows[0][:6] == ["held-out file", "model", "collection", "instruction", "demonstrations", "k"]
    # Two files and their mean, three collections; two instructions with k = 0 and 1, and BM25 once.
    assert len(rows) - 2 == 3 * 3 * (2 * 2 + 1)
    assert ["pairs", "bm25", "pooled", "plain", "none", "0"] in [row[:6] for row in rows]


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        ([], 1, "Nothing to evaluate on. Add --data"),
        (["--data", "nowhere"], 1, "No folder nowhere"),
        (["--heldout", "none.jsonl"], 1, "none.jsonl cannot be read"),
        (["--heldout", "pairs.jsonl", "-n", "many"], 1, '"many" is not a list of numbers'),
        (["--heldout", "pairs.jsonl", "--strategy", "magic"], 2, "'magic' is not one of 'reader'"),
        (["--heldout", "pairs.jsonl", "--model", "a=b", "--model", "a=c"], 1, "Two models are called"),
        (["--heldout", "pairs.jsonl", "--draws", "0"], 2, "--draws"),
        (["--heldout", "pairs.jsonl", "--heldout-collection", "both"], 1, '--heldout-collection names "both"'),
        (["--heldout", "pairs.jsonl", "--heldout-instruction", ","], 1, "--heldout-instruction names nothing"),
        (["--data", ".", "--kinds", "poems"], 1, '--kinds names "poems"'),
    ],
)
def test_errors_are_one_line(arguments: list[str], status: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["eval", *arguments]) == status
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert said in line
