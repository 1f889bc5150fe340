"""Passages: chunks that are joined, places of a file, whole sections, and lines around a hit."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epic_rag import ConfigError
from epic_rag_chroma import ChromaIndexer, FederatedIndex, Hit, IndexSettings, IndexStateError, SearchRequest
from epic_rag_chroma.chunking import chunk_document
from epic_rag_chroma.reading.reader import read_document
from epic_rag_chroma.search.passages import Candidate, choose, join
from epic_rag_chroma.store.database import Record
from tests.helpers.fork_server import HashEncoder

VECTOR = np.zeros(2, np.float32)


def row(path: str, position: int | None, first: int | None = None, last: int | None = None, **metadata: Any) -> Record:
    values = {"path": path, "root": "r", "position": position, "first_line": first, "last_line": last, **metadata}
    text = metadata.pop("text", "\n".join(f"line {number}" for number in range(first or 0, (last or first or 0) + 1)))
    return Record(f"{path}-{position}", text, {name: each for name, each in values.items() if each is not None}, VECTOR)


def chosen(rows: list[Record], k: int, per_file: int = 0, merge: bool = True) -> list[list[str]]:
    candidates = [Candidate(each, 1 / rank, None, None) for rank, each in enumerate(rows, 1)]
    passages, _ = choose(candidates, k, per_file=per_file, merge=merge)
    assert [each.best.score for each in passages] == sorted((each.best.score for each in passages), reverse=True)
    return [[each.id for each in passage.rows] for passage in passages]


def test_neighbours_of_a_section_are_one_passage() -> None:
    rows = [row("a", 3, 20, 29), row("b", 1, 1, 9), row("a", 4, 28, 35), row("a", 2, 10, 18), row("a", 9, 90, 95)]
    assert chosen(rows, 5) == [["a-2", "a-3", "a-4"], ["b-1"], ["a-9"]]
    assert chosen(rows, 5, merge=False) == [["a-3"], ["b-1"], ["a-4"], ["a-2"], ["a-9"]]


def test_a_chunk_between_two_passages_joins_them() -> None:
    assert chosen([row("a", 1, 1, 2), row("a", 3, 5, 6), row("a", 2, 3, 4)], 5) == [["a-1", "a-2", "a-3"]]


@pytest.mark.parametrize(
    "other",
    [
        row("a", 2, 3, 4, heading_path="Other"),
        row("a", 2, page=2),
        row("b", 2, 3, 4),
        row("a", 3, 5, 6),
        row("a", None, 3, 4),
    ],
)
def test_chunks_of_other_sections_pages_and_files_are_apart(other: Record) -> None:
    first = row("a", 1, 1, 2) if "page" not in other.metadata else row("a", 1, page=1)
    assert len(chosen([first, other], 5)) == 2


@pytest.mark.parametrize("kind", ["csv", "jsonl", "bibtex", "mailbox"])
def test_records_are_documents_of_their_own(kind: str) -> None:
    rows = [row("a", position, position, position, kind=kind) for position in range(1, 8)]
    assert chosen(rows, 5, per_file=1) == [[f"a-{position}"] for position in range(1, 6)]


def test_a_file_gets_a_few_places_before_its_others() -> None:
    rows = [*(row("a", 2 * number) for number in range(1, 6)), row("b", 1), row("c", 1), row("a", 20), row("d", 1)]
    assert chosen(rows, 4, per_file=2) == [["a-2"], ["a-4"], ["b-1"], ["c-1"]]
    # The places that no other file takes are those of the best others.
    assert chosen(rows, 7, per_file=2) == [["a-2"], ["a-4"], ["a-6"], ["a-8"], ["b-1"], ["c-1"], ["d-1"]]
    assert chosen(rows, 4, per_file=0) == [["a-2"], ["a-4"], ["a-6"], ["a-8"]]
    assert len(chosen(rows[:5], 4, per_file=1)) == 4


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 12)), unique=True, max_size=30),
    st.integers(1, 6),
    st.integers(0, 3),
    st.booleans(),
)
@settings(deadline=None)
def test_no_place_is_lost_and_none_is_doubled(found: list[tuple[str, int]], k: int, per_file: int, merge: bool) -> None:
    rows = [row(path, position, 2 * position, 2 * position + 1) for path, position in found]
    passages = chosen(rows, k, per_file, merge)
    ids = [each for passage in passages for each in passage]
    assert len(ids) == len(set(ids))
    if not merge:
        assert len(passages) == min(k, len(rows))
    if rows:
        assert rows[0].id in passages[0]
    if merge:
        for path in "abc":
            places = sorted(int(each[2:]) for passage in passages for each in passage if each[0] == path)
            runs = 1 + sum(later - earlier > 1 for earlier, later in pairwise(places))
            assert len([passage for passage in passages if passage[0][0] == path]) <= runs * bool(places)


WORDS = st.lists(st.sampled_from(["alpha", "beta", "gamma.", "}", "| a b c |", "", "    x = 1", "- item"]), max_size=80)


@given(WORDS, st.integers(4, 30), st.integers(0, 10))
@settings(deadline=None, max_examples=60)
def test_joined_chunks_are_the_lines_of_the_file(lines: list[str], size: int, overlap: int) -> None:
    """All chunks of a text, joined, are its lines from the first with text to the last."""
    lines = ["first", *lines]
    document = read_document("a.txt", "\n".join(lines).encode())

    def count(texts: Any) -> list[int]:
        return [len(text.split()) for text in texts]

    chunks = chunk_document(document, max_tokens=size, overlap=min(overlap, size - 1), count_tokens=count)
    rows = [row("a", number, c.first_line, c.last_line, text=c.text) for number, c in enumerate(chunks, 1)]
    rows = [Record(each.id, c.text, each.metadata, VECTOR) for each, c in zip(rows, chunks, strict=True)]
    text, spans = join(rows)
    end = rows[-1].metadata["last_line"]
    # Of a line that is divided, a word that is there twice may be taken for the overlap.
    assert [line.split() for line in text.split("\n")] == [line.split() for line in lines[:end]]
    assert not "".join(lines[end:]).strip()
    for each, (first, last) in zip(rows, spans, strict=True):
        assert text[first:last] == each.text


# -- an index ---------------------------------------------------------------------------------------------------------

LONG = "\n".join(
    f"Step {number}: turn the valve, wait, and look at gauge {number} of the boiler." for number in range(40)
)
FILES = {
    "boiler.md": f"# Boiler\n\nAbout boilers.\n\n## Steps\n\n{LONG}\n\n## End\n\nThe last line.\n",
    "notes.txt": "A boiler note.\nThe boiler valve is old.\n",
    "other.txt": "Gauge and valve and boiler, in another file.\n",
}


@pytest.fixture(scope="module")
def indexer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ChromaIndexer]:
    folder = tmp_path_factory.mktemp("files")
    for name, text in FILES.items():
        (folder / name).write_text(text, encoding="utf-8")
    with ChromaIndexer(folder / ".epic-rag", encoder=HashEncoder(), chroma="none") as indexer:
        indexer.index([folder], settings=IndexSettings(chunk_tokens=60, chunk_overlap=15))
        yield indexer


def lines_of(hit: Hit) -> list[str]:
    assert hit.first_line is not None
    return FILES[hit.path].split("\n")[hit.first_line - 1 : hit.last_line]


def test_hits_are_joined_and_hold_the_lines_that_they_name(indexer: ChromaIndexer) -> None:
    hits = indexer.query("valve gauge boiler", k=5, mode="keyword")
    assert all(hit.text.split("\n") == lines_of(hit) for hit in hits)
    places = sorted((hit.first_line or 0, hit.last_line or 0) for hit in hits if hit.path == "boiler.md")
    assert all(last < first - 1 for (_, last), (first, _) in pairwise(places))
    apart = indexer.query("valve gauge boiler", k=20, mode="keyword", collapse=False)
    assert len(apart) > len(hits)
    # The best score of the joined ones.
    assert hits[0].score == apart[0].score


def test_other_files_come_before_a_fourth_hit(indexer: ChromaIndexer) -> None:
    request = SearchRequest(k=5, mode="keyword", merge=False)
    assert {hit.path for hit in indexer.query("valve gauge boiler", request)} == set(FILES)
    only = indexer.query("valve gauge boiler", request.with_settings(per_file=0, k=3))
    assert len(only) == 3
    assert len(indexer.query("valve gauge boiler", request.with_settings(per_file=1, k=9))) == 9


def test_a_whole_section(indexer: ChromaIndexer) -> None:
    (hit,) = [
        each for each in indexer.query("gauge 17", k=3, mode="keyword", full_section=True) if each.path == "boiler.md"
    ]
    assert hit.heading_path == ("Boiler", "Steps")
    assert hit.text == f"## Steps\n\n{LONG}"
    assert hit.text.split("\n") == lines_of(hit)


@pytest.mark.parametrize(("before", "after"), [(0, 2), (2, 0), (3, 3), (100, 100)])
def test_lines_around_a_hit(indexer: ChromaIndexer, before: int, after: int) -> None:
    lines = FILES["boiler.md"].rstrip("\n").split("\n")
    for hit in indexer.query("valve gauge boiler", k=9, mode="keyword", merge=False, before=before, after=after):
        if hit.path != "boiler.md":
            continue
        assert hit.first_line is not None
        assert hit.last_line is not None
        above, below = lines[: hit.first_line - 1][-before:] if before else [], lines[hit.last_line :][:after]
        assert hit.before.split("\n") == (above or [""])
        assert hit.after.split("\n") == (below or [""])


def test_lowest_scores(indexer: ChromaIndexer) -> None:
    for mode in ("keyword", "dense", "hybrid"):
        request = SearchRequest(k=20, mode=mode, collapse=False)  # type: ignore[arg-type]
        every = indexer.query("valve gauge boiler", request)
        scores = [hit.bm25 if mode == "keyword" else hit.cosine for hit in every]
        middle = sorted(score for score in scores if score is not None)[len(every) // 2]
        expected = [hit.id for hit, score in zip(every, scores, strict=True) if score is not None and score >= middle]
        found = indexer.query("valve gauge boiler", request.with_settings(min_score=middle))
        assert [hit.id for hit in found] == expected
        assert indexer.query("valve gauge boiler", request.with_settings(min_score=1e6)) == []


def test_several_indexes(indexer: ChromaIndexer, tmp_path: Path) -> None:
    (tmp_path / "more.md").write_text(FILES["boiler.md"].replace("Step", "Move"), encoding="utf-8")
    with ChromaIndexer(tmp_path / ".epic-rag", encoder=HashEncoder(), chroma="none") as other:
        other.index([tmp_path], settings=IndexSettings(chunk_tokens=60, chunk_overlap=15))
    with FederatedIndex([indexer._index_dir, tmp_path / ".epic-rag"], encoder=HashEncoder()) as both:
        hits = both.query("step 17", k=4, mode="keyword", full_section=True, after=1)
        assert {hit.path: hit.text for hit in hits}["boiler.md"] == f"## Steps\n\n{LONG}"
        hits = both.query("move 17", k=1, mode="keyword", full_section=True, before=3)
    moves = f"## Moves\n\n{LONG.replace('Step', 'Move')}"
    assert [(hit.path, hit.text, hit.before) for hit in hits] == [("more.md", moves, "\nAbout boilers.\n")]


def test_an_index_without_positions_says_what_to_do(indexer: ChromaIndexer, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("One line.\n", encoding="utf-8")
    with ChromaIndexer(tmp_path / ".epic-rag", encoder=HashEncoder(), chroma="none") as old:
        old.index([tmp_path])
        old.close()
        import sqlite3
        from contextlib import closing

        with closing(sqlite3.connect(tmp_path / ".epic-rag" / "index.sqlite")) as database, database:
            database.execute("UPDATE chunks SET metadata = json_remove(metadata, '$.position')")
        assert len(old.query("line", mode="keyword")) == 1
        with pytest.raises(IndexStateError, match="Run `epic-rag index`"):
            old.query("line", mode="keyword", before=1)


@pytest.mark.parametrize("values", [{"per_file": -1}, {"before": -1}, {"after": -2}, {"min_score": float("nan")}])
def test_numbers_without_meaning_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(values))):
        SearchRequest(**values)
