from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from epic_rag.errors import DataError
from epic_rag.evaluation.datasets import (
    ClassificationData,
    ClusteringData,
    Document,
    JsonRow,
    RerankingData,
    RetrievalData,
    StsData,
    content_revision,
    evaluated_texts,
    find_local_sets,
    load_local_set,
    read_mapping,
    read_rows,
    read_tsv,
)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_jsonl_rows_know_their_lines(tmp_path: Path, name: str) -> None:
    # U+2028 is a line separator for str.splitlines, and plain text in JSON.
    content = '\ufeff{"text": "a\u2028b", "label": 3}\n\n{"text": "c", "label": "x", "many": ["d"]}\r\n'.encode()
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    rows = list(read_rows(path))
    assert [(row.line, row.text("text"), row.label("label")) for row in rows] == [(1, "a\u2028b", 3), (3, "c", "x")]
    assert rows[1].texts("many") == ("d",)
    assert rows[1].text("title", "") == ""


@pytest.mark.parametrize(
    ("content", "read", "said"),
    [
        ('{"text": "a"}\n{"text": \n', lambda row: row, ":2 is not valid JSON"),
        ("[1]\n", lambda row: row, ":1 is not a JSON object (list)"),
        ('{"text": 1}\n', lambda row: row.text("text"), ':1 has 1 as "text". Write a string.'),
        ("{}\n", lambda row: row.text("text"), ':1 has None as "text". Write a string.'),
        ('{"label": true}\n', lambda row: row.label("label"), 'has True as "label". Write a string or an integer.'),
        ('{"many": "a"}\n', lambda row: row.texts("many"), 'as "many". Write a list of strings.'),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, content: str, read: Callable[[JsonRow], object], said: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError) as caught:
        [read(row) for row in read_rows(path)]
    assert str(path) in str(caught.value)
    assert said in str(caught.value)


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.jsonl cannot be read .* Check the path"):
        list(read_rows(tmp_path / "none.jsonl"))
    broken = tmp_path / "rows.jsonl.gz"
    broken.write_bytes(gzip.compress(b'{"text": "a"}\n' * 1000)[:-20])
    with pytest.raises(DataError, match=r"rows\.jsonl\.gz cannot be read"):
        list(read_rows(broken))
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes('{"text": "é"}\n'.encode("latin-1"))
    with pytest.raises(DataError, match=r"latin\.jsonl:1 is not UTF-8"):
        list(read_rows(latin))


def test_tsv_takes_columns_by_name_and_quotes_as_text(tmp_path: Path) -> None:
    path = tmp_path / "test.tsv"
    path.write_text('score\tb\ta\n1\tsays "x\ty\n\n2\t\tz\n', encoding="utf-8")
    assert list(read_tsv(path, ("a", "b"))) == [(2, ("y", 'says "x')), (4, ("z", ""))]
    with pytest.raises(DataError, match=r":1 has the header .* Add the columns \['c'\]"):
        list(read_tsv(path, ("a", "c")))
    path.write_text("a\tb\n1\n", encoding="utf-8")
    with pytest.raises(DataError, match=r":2 has 1 columns. Write 2 or more"):
        list(read_tsv(path, ("a", "b")))


def test_a_mapping_maps_names_to_strings(tmp_path: Path) -> None:
    path = tmp_path / "instructions.json"
    path.write_text('{"a": "b"}', encoding="utf-8")
    assert read_mapping(path) == {"a": "b"}
    for content, said in (('{"a": 1}', "does not map names to strings"), ("{", "cannot be read as JSON")):
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


def test_folders_are_known_by_their_files(sets: Path) -> None:
    names = find_local_sets(sets)
    assert names == ["library", "candidates", "likeness", "requests", "topics"]
    kinds = [load_local_set(sets / name).kind for name in names]
    assert kinds == ["retrieval", "reranking", "sts", "classification", "clustering"]


def test_contents_of_each_kind(sets: Path) -> None:
    library = load_local_set(sets / "library").data
    assert isinstance(library, RetrievalData)
    assert library.corpus[0] == Document("d1", "Alpha", "first")
    assert library.relevant == {"q1": {"d2": 1}, "q2": {"d1": 2, "d3": 1}}
    assert evaluated_texts(library) == {"ask one", "ask two"}, "a query without judgements is left out"
    likeness = load_local_set(sets / "likeness").data
    assert isinstance(likeness, StsData)
    assert likeness.first[2] == 'a"3'
    assert likeness.scores == (0.5, 1.5, 3.0, 5.0)
    assert "b4" in evaluated_texts(likeness)
    requests = load_local_set(sets / "requests").data
    assert isinstance(requests, ClassificationData)
    assert requests.label_names == ("lost", "pay")
    assert requests.test == (("pay test 0", 1), ("pay test 1", 1), ("lost test 0", 0), ("lost test 1", 0))
    topics = load_local_set(sets / "topics").data
    assert isinstance(topics, ClusteringData)
    assert set(topics.labels) == {0, 1}
    candidates = load_local_set(sets / "candidates").data
    assert isinstance(candidates, RerankingData)
    assert candidates.positives == (("second", "Alpha first"), ("second",))


def test_the_revision_changes_with_the_data(sets: Path) -> None:
    before = load_local_set(sets / "likeness")
    assert load_local_set(sets / "likeness").revision == before.revision
    path = sets / "likeness" / "test.tsv"
    path.write_text(path.read_text(encoding="utf-8").replace("3.0", "3.1"), encoding="utf-8")
    assert load_local_set(sets / "likeness").revision != before.revision


def test_no_set_no_folder(sets: Path) -> None:
    with pytest.raises(DataError, match=r"empty is not an evaluation set. It needs"):
        load_local_set(sets / "empty")
    with pytest.raises(DataError, match=r"No folder .*nowhere"):
        find_local_sets(sets / "nowhere")


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("library/qrels/test.tsv", "query-id\tcorpus-id\tscore\nq1\td9\t1\n", ':2 names an unknown .*"q1", "d9"'),
        ("library/qrels/test.tsv", "query-id\tcorpus-id\tscore\nq1\td1\tone\n", ':2 has the score "one"'),
        ("library/qrels/test.tsv", "query-id\tcorpus-id\tscore\n", "has no judgements"),
        ("likeness/test.tsv", "sentence1\tsentence2\tscore\na\tb\tnan\n", ':2 has the score "nan"'),
        ("likeness/test.tsv", "sentence1\tsentence2\tscore\na\tb\t1\n", "has 1 pairs"),
        ("requests/test.jsonl", '{"text": "a", "label": "new"}\n', r"lacks: \['new'\]"),
        ("requests/test.jsonl", "", "is empty"),
        (
            "candidates/reranking.jsonl",
            '{"query": "q", "positive": [], "negative": []}\n',
            ':1 has an empty "positive"',
        ),
        ("candidates/reranking.jsonl", "", "is empty"),
        ("topics/clustering.jsonl", '{"text": "a", "label": 1}\n', "has 1 labels"),
    ],
)
def test_malformed_data_names_the_file(sets: Path, file: str, content: str, said: str) -> None:
    path = sets / file
    for packed in path.parent.glob(f"{path.stem}*.gz"):
        packed.unlink()
    path.write_text(content, encoding="utf-8")
    folder = sets / file.partition("/")[0]
    with pytest.raises(DataError, match=said) as caught:
        load_local_set(folder)
    assert str(path) in str(caught.value)


def test_a_document_id_may_be_used_once(sets: Path, jsonl: Callable[[Path, Any], Path]) -> None:
    jsonl(sets / "library" / "corpus.jsonl.gz", [{"_id": "d1", "text": "a"}, {"_id": "d1", "text": "b"}])
    with pytest.raises(DataError, match=r':2 repeats the document id "d1"'):
        load_local_set(sets / "library")
