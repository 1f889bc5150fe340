"""Keyword index: ranking, ties, filters, common words, any text and any query."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epic_rag_chroma.store.database import IndexDatabase, Record
from epic_rag_chroma.store.keyword_index import KeywordIndex, KeywordsUnavailableError

TEXTS = {
    "a": "To undo the last commit, reset softly.",
    "b": "Commits are snapshots of the whole tree; a commit has parents.",
    "c": "def getUserName(self): return self.user_name",
    "d": "検索エンジンを作る",
    "e": "Cats sleep most of the day.",
}
HEADINGS = {"a": "Guide > Undo"}


def put(database: IndexDatabase, texts: Mapping[str, str]) -> None:
    with database.transaction():
        database.put(
            [
                Record(
                    name,
                    text,
                    {"doc_id": "doc", "embedded_hash": name, "heading_path": HEADINGS.get(name, "")},
                    np.zeros(2, np.float32),
                )
                for name, text in texts.items()
            ]
        )


def delete(database: IndexDatabase, *ids: str) -> None:
    with database.transaction():
        database.delete(ids)


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., IndexDatabase]]:
    """Make databases of texts."""
    made: list[IndexDatabase] = []

    def make_database(texts: Mapping[str, str]) -> IndexDatabase:
        made.append(IndexDatabase.open(tmp_path / f"{len(made)}.sqlite"))
        put(made[-1], texts)
        return made[-1]

    yield make_database
    for each in made:
        each.close()


@pytest.fixture
def database(make: Callable[..., IndexDatabase]) -> IndexDatabase:
    return make(TEXTS)


def found(database: IndexDatabase, query: str, k: int = 10) -> list[str]:
    return [row_id for row_id, _ in database.match(query, k)]


@pytest.mark.parametrize(
    ("query", "ids"),
    [
        ("undo a commit", ["a", "b"]),
        ("COMMITTING", ["b", "a"]),
        ("guide", ["a"]),
        ("user name", ["c"]),
        ("get_user_name", ["c"]),
        ("エンジン", ["d"]),
        ("sleeping cat", ["e"]),
        ("the", ["a", "b", "e"]),
        ("zebra", []),
        ("", []),
        ('"', []),
        ("undo AND NOT commit* OR (terms: NEAR(x, 5)) ^\"'; DROP TABLE chunks; --", ["a", "b"]),
    ],
)
def test_search(database: IndexDatabase, query: str, ids: list[str]) -> None:
    assert sorted(found(database, query)) == sorted(ids)
    assert set(found(database, query, k=1)) <= set(ids)


def test_scores_fall(database: IndexDatabase) -> None:
    ranked = database.match("undo the commits", 10)
    assert [row_id for row_id, _ in ranked] == ["a", "b"]
    assert ranked[0][1] > ranked[1][1] > 0
    assert database.match("undo the commits", 1) == ranked[:1]


@pytest.mark.parametrize("few", [1, 3, 900])
def test_ties_and_filters_at_every_k(make: Callable[..., IndexDatabase], few: int) -> None:
    texts = ["cat", "cat cat dog", "dog", "cat", "cat", "a dog and a cat", "cat", "cat cat dog"]
    database = make({f"{(7 * number) % 8}": text for number, text in enumerate(texts)})  # not written in this order
    with closing(sqlite3.connect(database.path)) as connection:
        keywords = KeywordIndex(connection, max_variables=few)
        every = keywords.search("cat dog", 8)
        assert every == sorted(every, key=lambda row: (-row[1], row[0]))
        assert len({score for _, score in every}) < len(every) == 8
        numbers = database.numbers_of(["0", "3", "5", "6"])
        some = [row for row in every if row[0] in ("0", "3", "5", "6")]
        for k in range(9):
            assert keywords.search("cat dog", k) == every[:k]
            assert keywords.search("cat dog", k, numbers) == some[:k]
            assert keywords.search("cat dog", k, {*numbers, 99}) == some[:k]
        assert keywords.search("cat dog", 8, []) == []


def test_history_does_not_change_the_ranking(database: IndexDatabase, make: Callable[..., IndexDatabase]) -> None:
    put(database, {"f": "undo undo undo", "g": "other", "b": "something else"})
    assert found(database, "something") == ["b"]
    delete(database, "f", "g", "unknown")
    put(database, {"b": TEXTS["b"]})
    with database.transaction():
        database.update_metadata(["a"], [{"doc_id": "moved", "embedded_hash": "a", "heading_path": HEADINGS["a"]}])
    fresh = make(TEXTS)
    for query in ("undo a commit", "user", "cats and commits", "guide"):
        assert database.match(query, 9) == fresh.match(query, 9)


def test_common_words_do_not_change_the_first_hits(database: IndexDatabase) -> None:
    put(database, {f"n{n}": f"text about topic{n} text" for n in range(20)})
    query = "text about topic7 text undo commits"
    expected = found(database, query, 2)
    with closing(sqlite3.connect(database.path)) as connection:
        pruning = KeywordIndex(connection, min_chunks_to_prune=0)
        assert [row_id for row_id, _ in pruning.search(query, 2)] == expected
        assert len(pruning.search("text about", 30)) == 20  # no rarer word


def test_very_long_query(database: IndexDatabase) -> None:
    every = " ".join(TEXTS.values())
    unknown = " ".join(f"w{n}x" for n in range(5000))
    assert found(database, f"{unknown} {every}") == []  # its first thousand words are unknown
    assert set(found(database, f"{every} {unknown}")) == set(TEXTS)
    assert len(found(database, "commit " * 5000)) == 2


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text(max_size=60), min_size=1, max_size=4), st.text(max_size=60))
def test_any_text_and_any_query(tmp_path_factory: pytest.TempPathFactory, texts: list[str], query: str) -> None:
    with closing(IndexDatabase.open(tmp_path_factory.mktemp("words") / "index.sqlite")) as database:
        put(database, {str(number): text for number, text in enumerate(texts)})
        ids = [str(number) for number in range(len(texts))]
        assert set(found(database, query)) <= set(ids)
        for row_id, text in zip(ids, texts, strict=True):
            if text.isascii() and any(map(str.isalnum, text)):
                assert row_id in found(database, text)
        delete(database, *ids)
        assert found(database, query) == []


def test_words_change_with_the_metadata(database: IndexDatabase) -> None:
    metadata = {"doc_id": "doc", "embedded_hash": "e", "heading_path": ""}
    with database.transaction():
        database.update_metadata(["e"], [{**metadata, "words": "Dogs bark."}])
    assert (found(database, "dogs"), found(database, "cats")) == (["e"], [])
    with database.transaction():
        database.update_metadata(["e"], [{**metadata, "page": 2}])
    assert (found(database, "dogs"), found(database, "cats")) == ([], ["e"])


def put_files(database: IndexDatabase, files: Mapping[str, str]) -> None:
    with database.transaction():
        database.put(
            [
                Record(path, text, {"doc_id": path, "embedded_hash": path, "path": path}, np.zeros(2, np.float32))
                for path, text in files.items()
            ]
        )


@pytest.mark.parametrize(
    ("query", "first"),
    [
        ("vpn setup", "notes/vpn-setup.md"),
        ("vpn-setup.md", "notes/vpn-setup.md"),
        ("Steuerberater", "2024-03-15 Steuerberater.md"),
        ("2024-03-15", "2024-03-15 Steuerberater.md"),
        ("ubersicht", "U\u0308bersicht.txt"),
    ],
)
def test_file_names_are_searched(make: Callable[..., IndexDatabase], query: str, first: str) -> None:
    database = make({"x": "The setup of a printer.", "y": "Nothing about it.", "z": "Bring the folder in March."})
    paths = ("notes/vpn-setup.md", "2024-03-15 Steuerberater.md", "U\u0308bersicht.txt")
    put_files(database, {path: f"Text number {place}." for place, path in enumerate(paths)})
    assert found(database, query)[0] == first


def test_a_renamed_file_is_found_by_its_new_name(make: Callable[..., IndexDatabase]) -> None:
    database = make({})
    put_files(database, {"old.md": "Text."})
    with database.transaction():
        database.update_metadata(["old.md"], [{"doc_id": "d", "embedded_hash": "e", "path": "new.md"}])
    assert (found(database, "old"), found(database, "new")) == ([], ["old.md"])


def test_a_heading_counts_more_than_the_text(make: Callable[..., IndexDatabase]) -> None:
    database = make({"t": "Printers need paper.", "u": "Something else.", "v": "Another text."})
    record = Record("h", "They need it.", {"heading_path": "Printers", "embedded_hash": "h"}, np.zeros(2, np.float32))
    with database.transaction():
        database.put([record])
    assert found(database, "printer") == ["h", "t"]


SENTENCES = {
    "log": "The monitor wrote: connection reset by peer.",
    "scattered": "Reset the peer list, then the connection; a peer connection may be reset by hand.",
    "plural": "Connections reset by peers.",
    "car": "The jaguar is a fast car.",
    "cat": "The jaguar is a big cat, and cats sleep.",
    "option": "Use rm -rf with care.",
    "tokyo": "\u6771\u4eac\u306e\u5929\u6c17",
}


@pytest.mark.parametrize(
    ("query", "ids"),
    [
        ('"connection reset by peer"', ["log"]),
        ('"Connection RESET" peer', ["log"]),
        ('"peer connection reset"', []),
        ('"reset by"', ["log", "plural", "scattered"]),
        ("jaguar -car", ["cat"]),
        ("jaguar -cats", ["car"]),
        ('jaguar -"big cat"', ["car"]),
        ('"jaguar is" -"big cat" -"fast car"', []),
        ("rm -rf", ["option"]),
        ("\u6771\u4eac", ["tokyo"]),
        ('"\u4eac\u306e\u5929"', ["tokyo"]),
        ("\u5929\u6c17 -\u6771\u4eac", []),
    ],
)
def test_phrases_and_excluded_words(make: Callable[..., IndexDatabase], query: str, ids: list[str]) -> None:
    database = make(SENTENCES)
    assert sorted(found(database, query)) == ids
    required, excluded = database.restrict(database.parsed(query))
    every = set(map(int, database.numbers()))
    allowed = (every if required is None else required) - excluded
    assert set(ids) <= {*database.ids(allowed).values()}
    assert {row_id for row_id, _ in database.match(query, 9, sorted(every))} == set(ids)


@pytest.mark.parametrize(
    ("texts", "query", "first"),
    [
        (["Take 500mg daily.", "Take 250mg daily.", "500 people"], "500 mg", 0),
        (["Take 500 mg daily.", "Take 250 mg daily."], "500mg", 0),
        (["A case for the iPhone15.", "The iPhone14 case."], "iPhone 15", 0),
        (["v1.1.11", "v11.1.1", "v1.11.1", "v1.1.1"], "1.1.11", 0),
        (["numpy==1.26.4", "numpy==1.24.6"], "numpy 1.26", 0),
        (["192.168.1.10", "192.168.1.1", "192.168.11.0"], "192.168.1.1", 1),
        (["Total: 12,500", "Total: 500", "Total: 12"], "12500", 0),
        (["Use C.", "Use C++.", "Use C#."], "C++", 1),
        (["git commit --no-verify", "no, verify it", "verify"], "--no-verify", 0),
        (["Write to john.doe@example.com", "John Doe has no mail", "example.com"], "john.doe@example.com", 0),
        (["def getUserName", "the name of the user", "user"], "get_user_name", 0),
        (["Die Kündigung der Wohnung ist da.", "Die Miete ist da."], "kundigungen", 0),
    ],
)
def test_the_best_text_is_first(make: Callable[..., IndexDatabase], texts: list[str], query: str, first: int) -> None:
    fillers = {f"f{n}": f"Nothing of that kind, text {chr(97 + n)}." for n in range(8)}
    database = make({**{str(number): text for number, text in enumerate(texts)}, **fillers})
    assert found(database, query)[0] == str(first)


def test_words_of_another_version(database: IndexDatabase) -> None:
    """A reader reports words of another version; the writer makes them again from the chunks."""
    expected = database.match("undo a commit guide", 9)
    with closing(sqlite3.connect(database.path)) as connection, connection:
        connection.execute("UPDATE settings SET value = 'other' WHERE name = 'keywords'")
        connection.execute("DELETE FROM keywords WHERE rowid <= 2")
    unavailable = pytest.raises(KeywordsUnavailableError, match=r"another version of epic-rag\. Run `epic-rag index`")
    with closing(IndexDatabase.open_reading(database.path)) as reader, unavailable:
        reader.match("undo", 9)
    version = database.version()
    with closing(IndexDatabase.open(database.path)) as writer:
        assert writer.match("undo a commit guide", 9) == expected
        assert writer.version() == version
