"""The words of an index: incremental, safe against any query and any crash, readable while they are written."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sqlite3
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epic_rag_chroma.errors import IndexStateError
from epic_rag_chroma.store.keyword_index import KeywordIndex, KeywordsUnavailableError

TEXTS = {
    "a": "Guide > Undo\nTo undo the last commit, reset softly.",
    "b": "Commits are snapshots of the whole tree; a commit has parents.",
    "c": "def getUserName(self): return self.user_name",
    "d": "検索エンジンを作る",
    "e": "Cats sleep most of the day.",
}
FILE = "keywords-one.sqlite"


@pytest.fixture
def words(tmp_path: Path) -> Iterator[KeywordIndex]:
    with_texts = KeywordIndex.open(tmp_path, "one")
    with_texts.upsert(list(TEXTS), list(TEXTS.values()), ["doc"] * len(TEXTS))
    yield with_texts
    with_texts.close()


def found(words: KeywordIndex, query: str, k: int = 10) -> list[str]:
    return [each for each, _ in words.search(query, k)]


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
def test_search(words: KeywordIndex, query: str, ids: list[str]) -> None:
    assert sorted(found(words, query)) == sorted(ids)
    assert set(found(words, query, k=1)) <= set(ids)


def test_the_best_is_first_and_scores_fall(words: KeywordIndex) -> None:
    ranked = words.search("undo the commits", 10)
    assert [each for each, _ in ranked] == ["a", "b"]
    assert ranked[0][1] > ranked[1][1] > 0
    assert words.search("undo the commits", 1) == ranked[:1]


def test_equal_scores_are_in_the_order_of_the_ids(words: KeywordIndex) -> None:
    words.upsert(["z", "y", "x"], ["same words here"] * 3, ["doc"] * 3)
    assert found(words, "same words") == ["x", "y", "z"]


@pytest.mark.parametrize("few", [1, 3, 900])
def test_every_cut_of_a_ranking_is_its_beginning(tmp_path: Path, few: int) -> None:
    words = KeywordIndex.open(tmp_path, "ties", max_ids=few)
    texts = ["cat", "cat cat dog", "dog", "cat", "cat", "a dog and a cat", "cat", "cat cat dog"]
    ids = [f"{(7 * number) % 8}" for number in range(8)]  # not in the order in which they are written
    words.upsert(ids, texts, ["doc"] * 8)
    every = words.search("cat dog", 8)
    assert every == sorted(every, key=lambda row: (-row[1], row[0]))
    assert len({score for _, score in every}) < len(every) == 8
    for k in range(9):
        assert words.search("cat dog", k) == every[:k]
    words.close()


@pytest.mark.parametrize("few", [900, 1])
def test_only_allowed_chunks_are_found(words: KeywordIndex, few: int, tmp_path: Path) -> None:
    words.close()
    words = KeywordIndex.open(tmp_path, "one", max_ids=few)
    assert [each for each, _ in words.search("commit", 10, {"a", "e", "unknown"})] == ["a"]
    assert words.search("commit", 10, set()) == []
    everything = words.search("commit", 10)
    assert words.search("commit", 10, frozenset(TEXTS)) == everything
    assert words.search("commit", 1, ["a", "b"]) == everything[:1]


def test_writing_replaces_and_deletes(words: KeywordIndex) -> None:
    words.upsert(["a"], ["Bees make honey."], ["doc"])
    assert (found(words, "undo"), found(words, "honey")) == ([], ["a"])
    words.delete(["a", "unknown"])
    assert found(words, "honey") == []
    assert words.ids() == set(TEXTS) - {"a"}
    assert words.count() == len(TEXTS) - 1
    words.upsert([], [], [])
    words.delete([])
    assert words.count() == len(TEXTS) - 1


def test_a_batch_is_written_whole_or_not_at_all(words: KeywordIndex) -> None:
    with pytest.raises(ValueError, match="zip"):
        words.upsert(["f", "g"], ["one", "two"], ["doc"])
    assert words.count() == len(TEXTS)
    words.upsert(["f"], ["afterwards"], ["doc"])
    assert found(words, "afterwards") == ["f"]


def test_an_incremental_index_ranks_like_a_new_one(words: KeywordIndex, tmp_path: Path) -> None:
    words.upsert(["f", "g"], ["undo undo undo", "other"], ["doc"] * 2)
    words.delete(["f", "g"])
    words.upsert(["b"], ["something else"], ["doc"])
    words.upsert(["b"], [TEXTS["b"]], ["doc"])
    fresh = KeywordIndex.open(tmp_path, "fresh")
    fresh.upsert(list(TEXTS), list(TEXTS.values()), ["doc"] * len(TEXTS))
    for query in ("undo a commit", "user", "cats and commits"):
        assert words.search(query, 9) == fresh.search(query, 9)
    fresh.close()


def test_frequent_words_do_not_change_the_ranking(words: KeywordIndex, tmp_path: Path) -> None:
    words.upsert([f"n{n}" for n in range(20)], [f"text about topic{n} text" for n in range(20)], ["doc"] * 20)
    query = "text about topic7 text undo commits"
    expected = words.search(query, 2)
    words.close()
    words = KeywordIndex.open(tmp_path, "one", min_chunks_to_prune=0)
    assert [each for each, _ in words.search(query, 2)] == [each for each, _ in expected]
    assert len(words.search("text about", 30)) == 20  # nothing rarer to go by


def test_a_query_of_a_whole_book_is_cut_to_its_rarest_words(words: KeywordIndex) -> None:
    book = " ".join(f"w{n}x" for n in range(5000)) + " " + " ".join(TEXTS.values())
    assert words.search(book, 10) == []  # its first thousand words are unknown
    assert found(words, " ".join(TEXTS.values()) + " " + book, k=1)
    assert len(found(words, "commit " * 5000)) == 2


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(max_size=60), min_size=1, max_size=4), st.text(max_size=60))
def test_no_text_and_no_query_is_an_error(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], query: str
) -> None:
    words = KeywordIndex.open(tmp_path_factory.mktemp("words"), "x")
    ids = [str(number) for number in range(len(texts))]
    words.upsert(ids, texts, ids)
    assert {each for each, _ in words.search(query, 10)} <= set(ids)
    for each, text in zip(ids, texts, strict=True):
        if text.isascii() and any(map(str.isalnum, text)):
            assert each in found(words, text)
    words.delete(ids)
    assert words.search(query, 10) == []
    words.close()


def test_a_reader_sees_what_is_committed_and_writes_nothing(words: KeywordIndex, tmp_path: Path) -> None:
    reader = KeywordIndex.open_reading(tmp_path, "one")
    assert found(reader, "undo") == ["a"]
    words.upsert(["f"], ["undo this"], ["doc"])
    assert sorted(found(reader, "undo")) == ["a", "f"]
    with pytest.raises(IndexStateError, match="cannot be written"):
        reader.delete(["f"])
    assert sorted(found(words, "undo")) == ["a", "f"]
    reader.close()


def test_readers_and_a_writer_do_not_wait_for_each_other(words: KeywordIndex, tmp_path: Path) -> None:
    reader = KeywordIndex.open_reading(tmp_path, "one")
    words._connection.execute("BEGIN IMMEDIATE")
    assert found(reader, "undo") == ["a"]  # while a transaction is open
    words._connection.execute("ROLLBACK")
    failures: list[BaseException] = []
    done = threading.Event()

    def read() -> None:
        mine = KeywordIndex.open_reading(tmp_path, "one")
        try:
            while not done.is_set():
                assert "e" in found(mine, "cats sleep")
        except BaseException as error:  # for the main thread
            failures.append(error)
        mine.close()

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    for number in range(60):
        words.upsert([f"n{number}"], [f"cats {number}"], ["doc"])
        words.delete([f"n{number - 1}"])
    done.set()
    for thread in threads:
        thread.join()
    reader.close()
    assert failures == []


@pytest.mark.skipif(os.name != "posix", reason="file permissions")
def test_a_folder_that_cannot_be_written_to_can_be_searched(tmp_path: Path) -> None:
    folder = tmp_path / "locked"
    folder.mkdir()
    words = KeywordIndex.open(folder, "one")
    words.upsert(["a"], ["undo"], ["doc"])
    words.close()
    (folder / FILE).chmod(stat.S_IRUSR)
    folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        before = sorted(path.name for path in folder.iterdir())
        reader = KeywordIndex.open_reading(folder, "one")
        assert found(reader, "undo") == ["a"]
        reader.close()
        if os.geteuid() != 0:  # for whom everything can be written to
            assert sorted(path.name for path in folder.iterdir()) == before
            with pytest.raises(IndexStateError, match=r"cannot be written .* run `epic-rag index` again"):
                KeywordIndex.open(folder, "two")
    finally:
        folder.chmod(stat.S_IRWXU)


def garbage(path: Path) -> None:
    path.write_bytes(b"no database at all" * 500)


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def another_version(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE meta SET version = 'other'")
    connection.close()


def another_database(path: Path) -> None:
    path.unlink()
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE words (x)")
    connection.close()


def words_overwritten(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE words_data SET block = CAST(hex(block) AS BLOB) WHERE id > 10")
    connection.close()


def open_and_search(folder: Path) -> None:
    reader = KeywordIndex.open_reading(folder, "one")
    try:
        reader.search("text", 5)
    finally:
        reader.close()


@pytest.mark.parametrize("damage", [garbage, cut_off, empty, another_version, another_database])
def test_a_broken_file_is_said_by_readers_and_replaced_by_the_writer(
    words: KeywordIndex, tmp_path: Path, damage
) -> None:
    words.upsert([f"n{n}" for n in range(300)], [f"text {n} of many" for n in range(300)], ["doc"] * 300)
    words.close()
    damage(tmp_path / FILE)
    with pytest.raises(KeywordsUnavailableError, match=r"Keyword search is not available: .* Run `epic-rag index`"):
        open_and_search(tmp_path)
    again = KeywordIndex.open(tmp_path, "one")
    assert again.count() == 0
    again.upsert(["a"], ["undo"], ["doc"])
    assert found(again, "undo") == ["a"]
    again.close()


def test_damage_inside_is_found_when_it_is_opened_for_writing(words: KeywordIndex, tmp_path: Path) -> None:
    words.upsert([f"n{n}" for n in range(300)], [f"text {n} of many" for n in range(300)], ["doc"] * 300)
    words.close()
    words_overwritten(tmp_path / FILE)
    with pytest.raises(KeywordsUnavailableError, match=r"malformed|corrupt"):
        open_and_search(tmp_path)
    again = KeywordIndex.open(tmp_path, "one")
    assert again.count() == 0
    again.close()


def test_damage_that_is_met_while_writing_removes_the_file(words: KeywordIndex, tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / FILE) as connection:
        connection.execute(
            "UPDATE words_data SET block = x'ffffffffffffffffffff' WHERE id = 10"
        )  # the list of segments
    connection.close()
    with pytest.raises(IndexStateError, match=r"cannot be written .* run `epic-rag index` again"):
        words.delete(["a"])
    assert not (tmp_path / FILE).exists()
    again = KeywordIndex.open(tmp_path, "one")
    assert again.count() == 0
    again.close()


def test_a_folder_in_the_place_of_the_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / FILE).mkdir()
    with pytest.raises(KeywordsUnavailableError, match="it is missing"):
        KeywordIndex.open_reading(tmp_path, "one")
    with pytest.raises(IndexStateError, match="cannot be written"):
        KeywordIndex.open(tmp_path, "one")


def test_the_words_of_other_collections_are_deleted(words: KeywordIndex, tmp_path: Path) -> None:
    other = KeywordIndex.open(tmp_path, "two")
    other.upsert(["a"], ["undo"], ["doc"])
    other.close()
    (tmp_path / "keywords.txt").write_text("mine")
    KeywordIndex.delete_others(tmp_path, "one")
    names = {path.name for path in tmp_path.iterdir()}
    assert FILE in names
    assert not [name for name in names if "two" in name]
    assert found(words, "undo") == ["a"]
    words.close()
    KeywordIndex.delete_others(tmp_path, None)
    assert [path.name for path in tmp_path.iterdir()] == ["keywords.txt"]


def _write_for_ever(folder: Path, ready: multiprocessing.synchronize.Event) -> None:
    words = KeywordIndex.open(folder, "one")
    number = 0
    while True:
        batch = [f"n{number * 40 + n}" for n in range(40)]
        words.upsert(batch, [f"text {each} of cats" for each in batch], ["doc"] * 40)
        number += 1
        ready.set()


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_a_killed_writer_leaves_whole_batches(words: KeywordIndex, tmp_path: Path) -> None:
    words.close()
    context = multiprocessing.get_context("spawn")
    for _ in range(2):
        ready = context.Event()
        process = context.Process(target=_write_for_ever, args=(tmp_path, ready))
        process.start()
        assert ready.wait(60)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        reader = KeywordIndex.open_reading(tmp_path, "one")
        assert "e" in found(reader, "cats sleep")
        reader.close()
        again = KeywordIndex.open(tmp_path, "one")
        assert (again.count() - len(TEXTS)) % 40 == 0
        assert len(again.search("text", 10**6)) == again.count() - len(TEXTS)
        again.close()
