from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from epic_rag.errors import DataError
from epic_rag.evaluation.datasets import (
    ClassificationData,
    ClusteringData,
    Document,
    RerankingData,
    RetrievalData,
    StsData,
    find_local_sets,
    load_local_set,
)


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
    assert library.test_texts == {"ask one", "ask two"}, "a query without judgements is left out"
    likeness = load_local_set(sets / "likeness").data
    assert isinstance(likeness, StsData)
    assert likeness.first[2] == 'a"3'
    assert likeness.scores == (0.5, 1.5, 3.0, 5.0)
    assert "b4" in likeness.test_texts
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
    with pytest.raises(DataError, match=r"empty is no evaluation set: .*`ls "):
        load_local_set(sets / "empty")
    with pytest.raises(DataError, match=r"there is no folder .*nowhere"):
        find_local_sets(sets / "nowhere")


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("library/qrels/test.tsv", "query-id\tcorpus-id\tscore\nq1\td9\t1\n", 'line 2: no such .*"q1", "d9"'),
        ("library/qrels/test.tsv", "query-id\tcorpus-id\tscore\nq1\td1\tone\n", 'line 2: the score "one"'),
        ("library/qrels/test.tsv", "query-id\tcorpus-id\tscore\n", "judges no query"),
        ("likeness/test.tsv", "sentence1\tsentence2\tscore\na\tb\tnan\n", 'line 2: the score "nan"'),
        ("likeness/test.tsv", "sentence1\tsentence2\tscore\na\tb\t1\n", "has 1 pairs"),
        ("requests/test.jsonl", '{"text": "a", "label": "new"}\n', r"lacks: \['new'\]"),
        ("requests/test.jsonl", "", "is empty"),
        ("candidates/reranking.jsonl", '{"query": "q", "positive": [], "negative": []}\n', 'line 1: "positive" is'),
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
    with pytest.raises(DataError, match=r'line 2: the document id "d1" was used before'):
        load_local_set(sets / "library")
