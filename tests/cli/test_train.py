"""`epic-rag mine`: files in, a file out, and nothing half done."""

from __future__ import annotations

import gzip
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from epic_rag.errors import DataError
from epic_rag.training import mining
from epic_rag.training.mining import MiningOptions, mine_file

ROWS = [
    {"query": "red cat", "positive": "a red cat", "group": 7, "source": "zoo", "id": "x\u2028y"},
    {"query": "red dog", "passage": "a red dog", "negatives": ["a pen"]},
    {"query": "blue cat", "positive": "a blue cat"},
    {"query": "sun", "positive": "the sun"},
]
NOTE = re.compile(r"note: 4 rows, (\d+) negatives? added from 4 passages, (\d) rows? with fewer than (\d)\.\n")


@pytest.fixture
def file() -> Path:
    """Four rows, in the working directory."""
    path = Path("rows.jsonl")
    path.write_text("\ufeff" + "\n\n".join(json.dumps(row) for row in ROWS), encoding="utf-8")
    return path


def read(path: Path) -> list[dict[str, Any]]:
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.loads(line) for line in raw.decode("utf-8").split("\n") if line]


@pytest.fixture
def model(tiny_checkpoint: Path) -> tuple[str, ...]:
    """Options for the tiny model."""
    return ("--model", str(tiny_checkpoint), "--no-margin")


def test_rows_keep_all_their_keys(cli: Any, file: Path, model: tuple[str, ...]) -> None:
    result = cli("mine", file, "--out", "new/mined.jsonl", *model, "-n", 2)
    assert (result.status, result.out) == (0, "new/mined.jsonl\n")
    assert NOTE.fullmatch(result.err), result.err
    rows = read(Path("new/mined.jsonl"))
    for before, after in zip(ROWS, rows, strict=True):
        assert {**after, "negatives": None} == {**before, "negatives": None}
        assert len(after["negatives"]) == 2
    assert rows[1]["negatives"][0] == "a pen"
    assert [path.name for path in Path("new").iterdir()] == ["mined.jsonl"]


def test_json_and_the_report(cli: Any, file: Path, tiny_checkpoint: Path) -> None:
    result = cli("mine", file, "-o", "mined.jsonl", "--model", tiny_checkpoint, "-n", 3, "--margin", 1, "--json")
    assert result.status == 0, result.err
    data = json.loads(result.out)
    assert sorted(data) == ["documents", "file", "mined", "rows", "short"]
    assert (data["file"], data["rows"], data["documents"]) == ("mined.jsonl", 4, 4)
    found = NOTE.fullmatch(result.err)
    assert found, result.err
    assert tuple(map(int, found.groups())) == (data["mined"], data["short"], 3)
    counts = [len(row.get("negatives", [])) for row in read(Path("mined.jsonl"))]
    assert (sum(counts) - 1, sum(count < 3 for count in counts)) == (data["mined"], data["short"])


@pytest.mark.parametrize("name", ["mined.jsonl", "mined.jsonl.gz"])
def test_the_same_bytes_again_and_in_place(cli: Any, file: Path, tiny_checkpoint: Path, name: str) -> None:
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
    assert cli(*arguments).status == 0
    assert Path(name).read_bytes() == first
    assert cli("mine", name, "--out", name, *arguments[4:]).status == 0
    assert read(Path(name)) == read(Path(name))
    assert Path(name).read_bytes() == first
    assert cli(*arguments, "--seed", 5).status == 0
    assert Path(name).read_bytes() != first


def test_the_instruction_is_the_one_of_training(
    cli: Any, file: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[MiningOptions] = []
    mine_negatives = mining.mine_negatives

    def watched(pairs: Any, encoder: Any, options: MiningOptions, **others: Any) -> Any:
        seen.append(options)
        return mine_negatives(pairs, encoder, options, **others)

    monkeypatch.setattr(mining, "mine_negatives", watched)
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


def test_a_corpus(cli: Any, file: Path, model: tuple[str, ...]) -> None:
    documents = [
        {"_id": "1", "title": "Cats", "text": "a red cat"},
        {"text": "a  BLUE cat"},
        {"title": "x", "text": ""},
    ]
    Path("corpus.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    assert cli("mine", file, "--out", "mined.jsonl", "--corpus", "corpus.jsonl", *model).status == 0
    found = [set(row["negatives"]) for row in read(Path("mined.jsonl"))]
    assert found == [
        {"a red dog", "a blue cat", "the sun"},  # the own positive never, with a title neither
        {"a pen", "a red cat", "a blue cat", "the sun", "Cats a red cat"},
        {"a red cat", "a red dog", "the sun", "Cats a red cat"},
        {"a red cat", "a red dog", "a blue cat", "Cats a red cat"},
    ]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["none.jsonl", "-o", "o"], r"none\.jsonl cannot be read \(.*\)\. Check .*"),
        (["bad.jsonl", "-o", "o"], r"bad\.jsonl:1 has no text for \"positive\"\. .*"),
        (["rows.jsonl", "-o", "folder"], r"folder is a folder\. Name a file, such as .*"),
        (
            ["rows.jsonl", "-o", "rows.jsonl/o"],
            r"rows\.jsonl cannot be created \(.*\)\. Write the result elsewhere\.",
        ),
        (["rows.jsonl", "-o", "o", "--sampling", "x"], r"sampling is 'x'\. It must be 'top' or 'random'\."),
        (
            ["rows.jsonl", "-o", "o", "--depth", "3"],
            r"depth is 3 and skip_top 0, too few ranks for 7 .* to 7 or more\.",
        ),
        (["rows.jsonl", "-o", "o", "--margin", "2"], r"margin is 2\.0\. It must be less than or equal to 1\."),
        (["rows.jsonl", "-o", "o", "--model", "nowhere"], r"There is no checkpoint nowhere\. .*"),
        (["rows.jsonl", "-o", "o", "--corpus", "c"], r"c cannot be read \(.*\)\. Check .*"),
        (["rows.jsonl", "-o", "o", "--corpus", "empty.jsonl"], r"empty\.jsonl has no documents\. Each line is .*"),
        (["rows.jsonl", "-o", "o", "--corpus", "bad.jsonl"], r"bad\.jsonl:1 has no \"text\"\. .*"),
    ],
)
def test_errors_are_one_line_and_nothing_is_written(cli: Any, file: Path, arguments: list[str], expected: str) -> None:
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


def test_a_missing_extra_is_named(
    cli: Any, file: Path, model: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    result = cli("mine", file, "-o", "o", *model)
    assert result.status == 1
    assert "Mining hard negatives needs datasets" in result.err
    assert "pip install 'epic-rag[train]'" in result.err


def test_a_full_disk_leaves_the_old_file(file: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("mined.jsonl").write_text("before")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(mining, "write_atomically", full)
    with pytest.raises(DataError, match=r"mined\.jsonl cannot be written .*No space left.*\. Free disk space"):
        mine_file(file, "mined.jsonl", model=tiny_checkpoint)
    assert Path("mined.jsonl").read_text() == "before"


def test_other_keys_may_hold_anything(file: Path, tiny_checkpoint: Path) -> None:
    file.write_text('{"query": "cat", "positive": "a", "id": "\\ud800\\u2028"}\n{"query": "b", "positive": "a cat"}\n')
    mine_file(file, "mined.jsonl", MiningOptions(margin=None), model=tiny_checkpoint)
    assert read(Path("mined.jsonl"))[0] == {
        "query": "cat",
        "positive": "a",
        "id": "\ud800\u2028",
        "negatives": ["a cat"],
    }


@pytest.mark.parametrize("at", ["mine_negatives", "write_atomically"])
def test_interrupted(cli: Any, file: Path, model: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(mining, at, interrupted)
    result = cli("mine", file, "--out", "mined.jsonl", *model)
    assert (result.status, result.out) == (130, "")
    assert result.err.startswith("error: Interrupted. mined.jsonl is unchanged.")
    assert [path.name for path in Path().iterdir()] == ["rows.jsonl"]


def test_the_real_command(process: Any, file: Path, tiny_checkpoint: Path) -> None:
    result = process("mine", file, "--out", "mined.jsonl.gz", "--model", tiny_checkpoint, "--json")
    assert result.status == 0, result.err
    assert NOTE.fullmatch(result.err), result.err
    assert json.loads(result.out)["rows"] == len(read(Path("mined.jsonl.gz"))) == 4
