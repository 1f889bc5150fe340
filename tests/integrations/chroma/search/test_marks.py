"""Marks: known answers first, known misses last, for the same query and for nearly the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from epic_rag import DemonstrationBank, EpicEncoder
from epic_rag_chroma import NO_CHROMA, ChromaIndexer, FederatedIndex, SearchMode, parse_filters
from epic_rag_chroma.search.marks import MarkedRanking, Marks, find_marks, same_query_key
from tests.conftest import make_encoder

QUERY = "how do I take back the last commit"
FILES = {
    "undo.md": "# Undo\n\nTo undo the last commit and keep its changes, reset softly to the one before it.\n",
    "cats.md": "# Cats\n\nThey sleep most of the day and wake up for food in the early evening hours.\n",
    "train.md": "# Trains\n\nBook second class for up to four hours, and first class for anything beyond that.\n",
    "bread.md": "# Bread\n\nMix flour, water and salt, let the dough rise overnight and bake it until brown.\n",
}
MODES: list[SearchMode] = ["hybrid", "dense", "keyword"]


@pytest.fixture(scope="module")
def encoder() -> EpicEncoder:
    return make_encoder(causal=False)


@pytest.fixture(scope="module")
def indexer(encoder: EpicEncoder, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ChromaIndexer]:
    folder = tmp_path_factory.mktemp("marks") / "docs"
    folder.mkdir()
    for name, text in FILES.items():
        (folder / name).write_text(text, encoding="utf-8")
    with ChromaIndexer(folder / ".epic-rag", encoder=encoder, chroma=NO_CHROMA) as opened:
        opened.index([folder])
        yield opened


def text_of(indexer: ChromaIndexer, path: str) -> str:
    (text,) = {hit.text for hit in indexer.query(QUERY, k=10, mode="dense") if hit.path == path}
    return text


@pytest.mark.parametrize("mode", MODES)
def test_known_answers_are_first_and_known_misses_last(indexer: ChromaIndexer, mode: SearchMode) -> None:
    plain = indexer.query(QUERY, k=10, mode=mode)
    last, first = plain[-1], plain[0]
    bank = DemonstrationBank([(QUERY.upper().replace(" ", "  "), last.text)], negatives=[(QUERY, first.text)])
    hits = indexer.query(QUERY, k=10, mode=mode, bank=bank)
    if len(plain) > 1:
        assert (hits[0].id, hits[0].marked) == (last.id, "right")
        assert (hits[-1].id, hits[-1].marked) == (first.id, "wrong")
    assert [hit.rank for hit in hits] == list(range(1, len(hits) + 1))
    assert {hit.marked for hit in hits[1:-1]} <= {None}
    off = indexer.query(QUERY, k=10, mode=mode, bank=bank, num_demonstrations=0)
    assert {hit.marked for hit in off} == {None}
    bank.enabled = False
    assert {hit.marked for hit in indexer.query(QUERY, k=10, mode=mode, bank=bank)} == {None}


def test_marks_keep_to_filters_and_to_the_number_of_hits(indexer: ChromaIndexer) -> None:
    bank = DemonstrationBank([(QUERY, text_of(indexer, "cats.md")), (QUERY, text_of(indexer, "train.md"))])
    found = indexer.query(QUERY, k=1, bank=bank)
    assert [(hit.path, hit.marked) for hit in found] == [("cats.md", "right")]
    filtered = indexer.query(QUERY, k=5, bank=bank, filters=parse_filters([], ["*.md", "!cats.md"], None))
    assert filtered[0].path == "train.md"
    assert "cats.md" not in [hit.path for hit in filtered]


def test_a_reranker_does_not_undo_marks(indexer: ChromaIndexer) -> None:
    bank = DemonstrationBank([(QUERY, text_of(indexer, "bread.md"))], negatives=[(QUERY, text_of(indexer, "undo.md"))])
    hits = indexer.query(QUERY, k=4, bank=bank, reranker=lambda query, texts: [float("undo" in each) for each in texts])
    assert (hits[0].path, hits[-1].path) == ("bread.md", "undo.md")


def test_several_indexes(indexer: ChromaIndexer, encoder: EpicEncoder, tmp_path: Path) -> None:
    (tmp_path / "more.md").write_text("# More\n\nA second folder with a text about something else entirely.\n")
    with ChromaIndexer(tmp_path / ".epic-rag", encoder=encoder, chroma=NO_CHROMA) as second:
        second.index([tmp_path])
    bank = DemonstrationBank([(QUERY, "A second folder with a text about something else entirely.")])
    with FederatedIndex([indexer._index_dir, tmp_path / ".epic-rag"], encoder=encoder) as both:
        hits = both.query(QUERY, k=3, bank=bank)
    assert (hits[0].path, hits[0].marked) == ("more.md", "right")


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("How do I undo a commit?", "how to undo the commit", False),
        ("How do I undo a commit?", "how can we undo the commit", True),
        ("undo commit", " Undo   COMMIT. ", True),
        ("C++ compiler", "C compiler", False),
        ("test if it exists ([)", "test if it exists ([[)", False),
        ("treatments for ataxia 31", "treatments for ataxia 34", False),
        ("who built it", "when did they build it", False),
        ("convert pdf to docx", "convert docx to pdf", False),
        ("with retries", "without retries", False),
        ("do it", "can you", False),
        ("?", "?", True),
        ("?", "!", False),
        ("猫はどこ？", "猫はどこ", True),
    ],
)
def test_same_queries(one: str, other: str, same: bool) -> None:
    assert (same_query_key(one) == same_query_key(other)) is same


def test_marks_of_a_query() -> None:
    bank = DemonstrationBank(
        [("first query", "one"), ("another", "two"), ("The first query?", "three")],
        negatives=[("First  Query", "four")],
    )
    assert find_marks("first query", bank) == Marks(("one", "three"), ("four",))
    assert find_marks("another", bank) == Marks(("two",))
    assert not find_marks("a third", bank)
    assert not find_marks("a", DemonstrationBank([]))


TEXTS = {
    str(number): f"chunk number {number} has words of its own: {'x' * (number + 1)} and {number * 7}"
    for number in range(12)
}


@given(
    st.permutations(sorted(TEXTS)), st.lists(st.sampled_from(sorted(TEXTS))), st.lists(st.sampled_from(sorted(TEXTS)))
)
def test_others_keep_their_order(order: list[str], right: list[str], wrong: list[str]) -> None:
    ranking = [(row_id, 1.0 - place / 100) for place, row_id in enumerate(order[:9])]
    marks = Marks(tuple(TEXTS[each] for each in right), tuple(TEXTS[each] for each in wrong))

    def texts(ids: Sequence[str]) -> Mapping[str, str]:
        return {row_id: TEXTS[row_id] for row_id in ids}

    def match(passage: str, k: int) -> list[tuple[str, float]]:
        return [(row_id, 1.0) for row_id, text in TEXTS.items() if text == passage]

    marked = MarkedRanking(marks, texts)
    found = [row_id for row_id, _ in marked.reorder(ranking, match)]
    first = list(dict.fromkeys(right))
    assert found[: len(first)] == first  # also those that the ranking lacks
    last = [row_id for row_id, _ in ranking if row_id in wrong and row_id not in right]
    assert found == first + [row_id for row_id, _ in ranking if row_id not in {*right, *wrong}] + last
    assert marked.marked == {**dict.fromkeys(last, "wrong"), **dict.fromkeys(first, "right")}


@pytest.mark.parametrize(
    ("chunk", "passage", "belongs"),
    [
        ("To undo it, reset softly to the parent.", "to undo it reset softly to the parent", True),
        ("# Undo\n\nTo undo it, reset softly to the parent.", "To undo it, reset softly to the parent.", True),
        ("reset softly to the parent of it", "To undo it, reset softly to the parent of it. Then push.", True),
        ("To undo it, reset softly", "To undo it, reset hard", False),
        ("yes", "yes", True),
        ("yes, and more words than that follow here", "yes", False),  # a label is in too many texts
        ("", "", False),
        ("---", "---", False),
    ],
)  # fmt: skip
def test_a_chunk_and_a_passage_have_the_same_words(chunk: str, passage: str, belongs: bool) -> None:
    marked = MarkedRanking(Marks((passage,)), lambda ids: dict.fromkeys(ids, chunk))
    marked.reorder([("a", 1.0)], lambda passage, k: [])
    assert marked.marked == ({"a": "right"} if belongs else {})
