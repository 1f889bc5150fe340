"""`epic-rag mine`: rows, report, errors, interrupts. tests/epic_rag/training/test_train_command.py tests `train`."""

from __future__ import annotations

import gzip
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from epic_rag.training import mining as mining_files
from epic_rag.training.mining import MiningOptions, mine_file

ROWS = [
    {"query": "red cat", "positive": "a red cat", "group": 7, "source": "zoo", "id": "x\u2028y"},
    {"query": "red dog", "passage": "a red dog", "negatives": ["a pen"]},
    {"query": "blue cat", "positive": "a blue cat"},
    {"query": "sun", "positive": "the sun"},
]
NOTE = re.compile(
    r"note: 4 rows, (\d+) negatives? added from 4 passages; (\d) rows? with fewer than (\d); "
    r"([\d.]+)% of (\d+) candidates? dropped as likely false negatives\.\n"
)


@pytest.fixture
def file() -> Path:
    """Four rows, in the working directory."""
    path = Path("rows.jsonl")
    path.write_text("\ufeff" + "\n\n".join(json.dumps(row) for row in ROWS), encoding="utf-8")
    return path


def read(path: Path) -> list[dict[str, Any]]:
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.loads(line) for line in raw.decode("utf-8").split("\n") if line]


BM25 = ("--method", "bm25", "--no-margin")


def test_rows(cli: Any, file: Path) -> None:
    result = cli("mine", file, "--out", "new/mined.jsonl", *BM25, "-n", 2)
    assert (result.status, result.out) == (0, "new/mined.jsonl\n")
    assert NOTE.fullmatch(result.err), result.err
    red_cat, red_dog, blue_cat, sun = read(Path("new/mined.jsonl"))
    assert red_cat == {**ROWS[0], "negatives": ["a red dog", "a blue cat"]}
    assert red_dog == {**ROWS[1], "negatives": ["a pen", "a red cat"]}
    assert blue_cat == {**ROWS[2], "negatives": ["a red cat"]}
    assert sun == ROWS[3]
    assert [path.name for path in Path("new").iterdir()] == ["mined.jsonl"]


def test_report(cli: Any, file: Path, tiny_checkpoint: Path) -> None:
    result = cli("mine", file, "-o", "mined.jsonl", "--model", tiny_checkpoint, "-n", 3, "--margin", 1, "--json")
    assert result.status == 0, result.err
    data = json.loads(result.out)
    assert sorted(data) == ["candidates", "documents", "dropped_share", "file", "mined", "rows", "short"]
    assert (data["file"], data["rows"], data["documents"]) == ("mined.jsonl", 4, 4)
    mined, short, wanted, share, candidates = NOTE.fullmatch(result.err).groups()  # type: ignore[union-attr]
    assert (data["mined"], data["short"], 3, data["candidates"]) == (
        int(mined),
        int(short),
        int(wanted),
        int(candidates),
    )
    assert f"{data['dropped_share']:.1%}" == f"{share}%"
    counts = [len(row.get("negatives", [])) for row in read(Path("mined.jsonl"))]
    assert (sum(counts) - 1, sum(count < 3 for count in counts)) == (data["mined"], data["short"])


@pytest.mark.parametrize("name", ["mined.jsonl", "mined.jsonl.gz"])
def test_repeated_runs(cli: Any, file: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    arguments = (
        "mine",
        file,
        "--out",
        name,
        "--model",
        tiny_checkpoint,
        "--sampling",
        "random",
        "-n",
        2,
        "--no-margin",
    )
    assert cli(*arguments).status == 0
    first = Path(name).read_bytes()
    monkeypatch.setattr(time, "time", lambda: 1e9)  # gzip stores the time in seconds
    assert cli(*arguments).status == 0
    assert Path(name).read_bytes() == first
    assert cli("mine", name, "--out", name, *arguments[4:]).status == 0
    assert read(Path(name)) == read(Path(name))
    assert Path(name).read_bytes() == first
    assert cli(*arguments, "--seed", 5).status == 0
    assert Path(name).read_bytes() != first


def test_instruction(cli: Any, file: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[MiningOptions] = []
    mine_negatives = mining_files.mine_negatives

    def watched(pairs: Any, options: MiningOptions, **others: Any) -> Any:
        seen.append(options)
        return mine_negatives(pairs, options, **others)

    monkeypatch.setattr(mining_files, "mine_negatives", watched)
    arguments = ("mine", file, "--out", "mined.jsonl", "--model", tiny_checkpoint)
    Path("instructions.json").write_text('{"other": "No"}')
    assert cli(*arguments, "--symmetric").status == 0
    Path("instructions.json").write_text('{"rows": "Find the animal"}')
    assert cli(*arguments).status == 0
    assert cli(*arguments, "--instruction", "Find it", "--absolute-margin", 0.1).status == 0
    assert [(item.instruction, item.symmetric) for item in seen] == [
        (None, True),
        ("Find the animal", False),
        ("Find it", False),
    ]
    assert (seen[2].margin, seen[2].absolute_margin) == (0.95, 0.1)


def test_a_corpus(cli: Any, file: Path) -> None:
    documents = [
        {"_id": "1", "title": "Cats", "text": "a red cat"},
        {"text": "a  BLUE cat"},
        {"title": "x", "text": ""},
    ]
    Path("corpus.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    assert cli("mine", file, "--out", "mined.jsonl", "--corpus", "corpus.jsonl", *BM25).status == 0
    found = [row.get("negatives") for row in read(Path("mined.jsonl"))]
    assert found == [["a  BLUE cat"], ["a pen", "Cats a red cat"], ["Cats a red cat"], None]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["none.jsonl", "-o", "o"], r"none\.jsonl cannot be read \(.*\); check .*"),
        (["bad.jsonl", "-o", "o"], r"bad\.jsonl:1 is not \{\"query\": .*; mend or delete the line"),
        (["rows.jsonl", "-o", "folder"], r"folder is a folder, and the result is a file; give --out a name such as .*"),
        (
            ["rows.jsonl", "-o", "rows.jsonl/o"],
            r"no folder can be made at rows\.jsonl \(.*\); write the result elsewhere",
        ),
        (["rows.jsonl", "-o", "o", "--method", "x"], r"method is 'x', known are bm25, dense, both; choose one of them"),
        (["rows.jsonl", "-o", "o", "--depth", "3"], r"depth is 3 and skip_top 0, too few places for 7 .* to 7 or more"),
        (["rows.jsonl", "-o", "o", "--margin", "2"], r"margin is 2\.0; give a share of the positive's score, .*"),
        (["rows.jsonl", "-o", "o", "--model", "nowhere"], r".*nowhere.*"),
        (["rows.jsonl", "-o", "o", "--corpus", "c"], r".*\bc\b.*"),
        (["rows.jsonl", "-o", "o", "--corpus", "empty.jsonl"], r"empty\.jsonl has no documents; each line is .*"),
        (["rows.jsonl", "-o", "o", "--corpus", "bad.jsonl"], r"bad\.jsonl:1 has None as .*text.*"),
    ],
)
def test_errors(cli: Any, file: Path, arguments: list[str], expected: str) -> None:
    Path("bad.jsonl").write_text('{"query": "a"}\n')
    Path("empty.jsonl").write_text('{"text": " "}\n')
    Path("folder").mkdir()
    before = sorted(Path().rglob("*"))
    result = cli("mine", *arguments)
    assert (result.status, result.out) == (1, "")
    assert re.fullmatch(f"error: {expected}\n", result.err), result.err
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["rows.jsonl"], r"Missing option '--out' / '-o'\. See `epic-rag mine --help`\."),
        (
            ["rows.jsonl", "-o", "o", "--no-margin", "--absolute-margin", "1"],
            r"--no-margin and --absolute-margin exclude each other\. .*",
        ),
    ],
)
def test_wrong_command_line(cli: Any, arguments: list[str], expected: str) -> None:
    result = cli("mine", *arguments)
    assert (result.status, result.out) == (2, "")
    assert re.fullmatch(f"error: {expected}\n", result.err), result.err


def test_missing_extra(cli: Any, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bm25s", None)
    result = cli("mine", file, "-o", "o", *BM25)
    assert result.status == 1
    assert (
        result.err
        == "error: Mining with BM25 needs bm25s, which is not installed. Run `pip install 'epic-rag[train]'`.\n"
    )


def test_full_disk(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("mined.jsonl").write_text("before")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(mining_files, "_write_lines", full)
    options = MiningOptions(method="bm25", margin=None)
    with pytest.raises(mining_files.DataError, match=r"mined\.jsonl cannot be written .*No space left.*; make room"):
        mine_file(file, "mined.jsonl", options)
    assert Path("mined.jsonl").read_text() == "before"
    assert not list(Path().glob("*.tmp"))


def test_other_keys_are_kept(file: Path) -> None:
    file.write_text('{"query": "cat", "positive": "a", "id": "\\ud800\\u2028"}\n{"query": "b", "positive": "a cat"}\n')
    mine_file(file, "mined.jsonl", MiningOptions(method="bm25", margin=None))
    assert read(Path("mined.jsonl"))[0] == {
        "query": "cat",
        "positive": "a",
        "id": "\ud800\u2028",
        "negatives": ["a cat"],
    }


@pytest.mark.parametrize("at", ["mine_negatives", "_write_lines"])
def test_interrupted(cli: Any, file: Path, monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    def interrupted(output: Any, *_: Any, **__: Any) -> None:
        if at == "_write_lines":
            output.write(b'{"query": "red')
            output.flush()
        raise KeyboardInterrupt

    Path("mined.jsonl").write_text("before")
    monkeypatch.setattr(mining_files, at, interrupted)
    result = cli("mine", file, "--out", "mined.jsonl", *BM25)
    assert (result.status, result.out) == (130, "")
    assert result.err == "error: Interrupted. mined.jsonl is unchanged. Run the same command again to start over.\n"
    assert Path("mined.jsonl").read_text() == "before"
    assert sorted(path.name for path in Path().iterdir()) == ["mined.jsonl", "rows.jsonl"]
