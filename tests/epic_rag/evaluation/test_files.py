from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import pytest

from epic_rag.errors import DataError
from epic_rag.evaluation.datasets import JsonRow, content_revision, read_jsonl, read_mapping, read_tsv


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_jsonl_rows_know_their_lines(tmp_path: Path, name: str) -> None:
    # U+2028 is a line separator for str.splitlines, and plain text in JSON.
    content = '\ufeff{"text": "a\u2028b", "label": 3}\n\n{"text": "c", "label": "x", "many": ["d"]}\r\n'.encode()
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    rows = list(read_jsonl(path))
    assert [(row.line, row.text("text"), row.label("label")) for row in rows] == [(1, "a\u2028b", 3), (3, "c", "x")]
    assert rows[1].texts("many") == ("d",)
    assert rows[1].text("title", "") == ""


@pytest.mark.parametrize(
    ("content", "read", "said"),
    [
        ('{"text": "a"}\n{"text": \n', lambda row: row, "line 2: no valid JSON"),
        ("[1]\n", lambda row: row, "line 1: expected a JSON object, found list"),
        ('{"text": 1}\n', lambda row: row.text("text"), 'line 1: "text" must be a string, found 1'),
        ("{}\n", lambda row: row.text("text"), 'line 1: "text" must be a string, found None'),
        ('{"label": true}\n', lambda row: row.label("label"), '"label" must be a string or an integer'),
        ('{"many": "a"}\n', lambda row: row.texts("many"), '"many" must be a list of strings'),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, content: str, read: Callable[[JsonRow], object], said: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError) as caught:
        [read(row) for row in read_jsonl(path)]
    assert str(path) in str(caught.value)
    assert said in str(caught.value)


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no file .*none\.jsonl; check"):
        list(read_jsonl(tmp_path / "none.jsonl"))
    broken = tmp_path / "rows.jsonl.gz"
    broken.write_bytes(gzip.compress(b'{"text": "a"}\n' * 1000)[:-20])
    with pytest.raises(DataError, match=r"rows\.jsonl\.gz cannot be read after line"):
        list(read_jsonl(broken))
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes('{"text": "é"}\n'.encode("latin-1"))
    with pytest.raises(DataError, match=r"latin\.jsonl cannot be read"):
        list(read_jsonl(latin))


def test_tsv_takes_columns_by_name_and_quotes_as_text(tmp_path: Path) -> None:
    path = tmp_path / "test.tsv"
    path.write_text('score\tb\ta\n1\tsays "x\ty\n\n2\t\tz\n', encoding="utf-8")
    assert list(read_tsv(path, ("a", "b"))) == [(2, ("y", 'says "x')), (4, ("z", ""))]
    with pytest.raises(DataError, match=r"line 1: the header .* lacks \['c'\]"):
        list(read_tsv(path, ("a", "c")))
    path.write_text("a\tb\n1\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"line 2: 1 columns, needs 2"):
        list(read_tsv(path, ("a", "b")))


def test_a_mapping_maps_names_to_strings(tmp_path: Path) -> None:
    path = tmp_path / "instructions.json"
    path.write_text('{"a": "b"}', encoding="utf-8")
    assert read_mapping(path) == {"a": "b"}
    for content, said in (('{"a": 1}', "maps names to strings"), ("{", "no valid JSON")):
        path.write_text(content, encoding="utf-8")
        with pytest.raises(DataError, match=said):
            read_mapping(path)


def test_the_revision_follows_the_content(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(b"x")
    two.write_bytes(b"y")
    before = content_revision([one, two])
    assert content_revision([two, one]) != before
    two.write_bytes(b"z")
    assert content_revision([one, two]) != before
    with pytest.raises(DataError, match="cannot be read"):
        content_revision([tmp_path / "none"])
