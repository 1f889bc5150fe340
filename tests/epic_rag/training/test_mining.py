"""Hard negatives: what may become one, what is left out, and in which order they are taken."""

from __future__ import annotations

import doctest
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from epic_rag.encoder import EpicEncoder
from epic_rag.errors import ConfigError, DataError, MissingExtraError
from epic_rag.training import mining
from epic_rag.training import mining as _rankings
from epic_rag.training.data import Pair
from epic_rag.training.mining import MiningOptions, mine_negatives

WORDS = ["cat", "dog", "pen", "cup", "hat", "sun", "map", "key"]


class Angles:
    """An encoder in the plane: a text is "angle in degrees" or "angle in degrees: words"; notes what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Any]] = []

    def encode_query(self, texts: Sequence[str], *, instruction: str | None, show_progress: bool) -> Any:
        self.asked.append(("query", instruction))
        return self._vectors(texts)

    def encode_document(self, texts: Sequence[str], *, show_progress: bool) -> Any:
        self.asked.append(("document", None))
        return self._vectors(texts)

    @staticmethod
    def _vectors(texts: Sequence[str]) -> Any:
        angles = np.radians([float(text.split(":")[0]) for text in texts])
        return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def mine(pairs: Sequence[Pair], encoder: Any = None, corpus: Any = None, **options: Any) -> Any:
    return mine_negatives(pairs, MiningOptions(**options), encoder=encoder, corpus=corpus)


def by_words(pairs: Sequence[Pair], corpus: Any = None, **options: Any) -> Any:
    return mine(pairs, corpus=corpus, **{"method": "bm25", "margin": None, "negatives": 2, **options}).negatives


# What may become a negative


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        # The own positive never, however it is spelled.
        ([Pair("cat", "a cat"), Pair("dog", "A  Cat"), Pair("pen", "cat pen")], ("cat pen",)),
        # Nor a positive of a row with the query, in another spelling too.
        ([Pair("cat", "a cat"), Pair(" CAT", "old cat"), Pair("pen", "cat pen")], ("cat pen",)),
        # Nor a positive of a row with the group.
        ([Pair("cat", "a cat", group="g"), Pair("dog", "old cat", group="g"), Pair("pen", "cat pen")], ("cat pen",)),
        ([Pair("cat", "a cat", group="g"), Pair("dog", "old cat", group="h")], ("old cat",)),
        ([Pair("cat", "a cat"), Pair("dog", "old cat")], ("old cat",)),
        # Nor the query itself.
        ([Pair("old cat", "a cat"), Pair("dog", "Old cat"), Pair("pen", "cat pen")], ("cat pen",)),
        # Nothing has a word in common: BM25 finds nothing.
        ([Pair("cat", "a cat"), Pair("dog", "a dog")], ()),
        # No text has a word at all.
        ([Pair("!", "-"), Pair("?", "+")], ()),
    ],
)
def test_what_never_becomes_a_negative(pairs: list[Pair], expected: tuple[str, ...]) -> None:
    assert by_words(pairs)[0] == expected


def test_negatives_of_the_file_are_kept_and_count() -> None:
    rows = [
        Pair("cat", "a cat", negatives=("Cat  pen", "x")),
        Pair("dog", "cat pen"),
        Pair("sun", "cat sun"),
        Pair("map", "cat map"),
    ]
    assert by_words(rows, negatives=3)[0] == ("Cat  pen", "x", "cat sun")
    # They are kept where they are more than asked for.
    assert by_words(rows, negatives=1)[0] == ("Cat  pen", "x")
    # What was mined once is not mined again.
    again = [Pair(row.query, row.positive, found) for row, found in zip(rows, by_words(rows), strict=True)]
    assert by_words(again) == by_words(rows)


def test_a_corpus_takes_the_place_of_the_positives() -> None:
    rows = [Pair("cat food", "cats eat fish"), Pair("cat bed", "cats sleep")]
    corpus = ["cat map", ("Cats", "cats eat fish"), ("Food", "for a cat"), "FOOD for a  cat"]
    assert by_words(rows, corpus, negatives=3)[0] == ("Food for a cat", "cat map")
    # With a title before it, a row's positive is its positive still, and for no other row.
    assert by_words([*rows, Pair("fish cats", "x")], corpus, negatives=3)[2] == ("Cats cats eat fish",)


# Rankings


def test_bm25_ranks_by_rare_words() -> None:
    rows = [Pair("red cat", "-"), Pair("1", "red dog"), Pair("2", "red hat"), Pair("3", "black cat")]
    assert by_words(rows, negatives=3)[0] == ("black cat", "red dog", "red hat")


def test_bm25_knows_no_language() -> None:
    rows = [Pair("où est le CAFÉ", "-"), Pair("1", "le café"), Pair("2", "le thé"), Pair("3", "C")]
    assert by_words(rows, negatives=3)[0] == ("le café", "le thé")
    assert by_words([Pair("written in c", "-"), Pair("1", "the C language")])[0] == ("the C language",)


def test_dense_ranks_by_the_cosine() -> None:
    rows = [Pair("0", "5"), *(Pair("180", str(angle)) for angle in (60, 20, 90, 40))]
    assert mine(rows, Angles(), method="dense", negatives=3).negatives[0] == ("20", "40", "60")


def test_both_take_turns_and_name_nothing_twice() -> None:
    rows = [
        Pair("0: cat", "1"),
        *(Pair(f"18{number}", text) for number, text in enumerate(["30: cat", "40", "50", "60: cat cat", "70: cat"])),
    ]
    assert mine(rows, Angles(), method="dense", negatives=5).negatives[0][:2] == ("30: cat", "40")
    words = by_words(rows, negatives=3)[0]
    assert words[0] == "60: cat cat"
    found = mine(rows, Angles(), method="both", negatives=5).negatives[0]
    assert found[:3] == ("30: cat", "60: cat cat", "40")
    assert sorted(found) == ["30: cat", "40", "50", "60: cat cat", "70: cat"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"depth": 3}, ("20", "30", "40")),
        ({"depth": 4, "skip_top": 1}, ("30", "40", "50")),
        ({"skip_top": 4}, ("60",)),
        ({"skip_top": 9}, ()),
    ],
)
def test_depth_and_skip_top(options: dict[str, int], expected: tuple[str, ...]) -> None:
    # 5 and 10 are its own: they take no place in the ranking.
    rows = [Pair("0", "5"), Pair("0", "10"), *(Pair("180", str(angle)) for angle in (20, 30, 40, 50, 60))]
    assert mine(rows, Angles(), method="dense", negatives=3, **options).negatives[0] == expected


def test_what_one_ranking_passes_over_the_other_does_not_bring_back() -> None:
    rows = [Pair("0: cat", "1"), Pair("180", "30: cat"), Pair("181", "40"), Pair("182", "50")]
    assert mine(rows, Angles(), negatives=2, skip_top=1).negatives[0] == ("40", "50")


# Likely false negatives


@pytest.mark.parametrize(
    ("positive", "options", "expected"),
    [
        # Cosines of the candidates: 30 -> 0.866, 45 -> 0.707, 60 -> 0.5, 100 -> -0.174; of the positive 30 -> 0.866.
        ("-30", {"margin": None}, ("30", "45", "60", "100")),
        ("-30", {"margin": 1.0}, ("30", "45", "60", "100")),
        ("-30", {}, ("45", "60", "100")),
        ("-30", {"margin": 0.8}, ("60", "100")),
        ("-30", {"margin": None, "absolute_margin": 0.1}, ("45", "60", "100")),
        ("-30", {"margin": None, "absolute_margin": 0.3}, ("60", "100")),
        # The stricter of the two.
        ("-30", {"margin": 0.95, "absolute_margin": 0.3}, ("60", "100")),
        ("-30", {"margin": 0.5, "absolute_margin": 0.1}, ("100",)),
        # A positive that scores below 0: still below it.
        ("-100", {"margin": 1.0}, ("100",)),
        ("-100", {}, ()),
    ],
)
def test_margins(positive: str, options: dict[str, float], expected: tuple[str, ...]) -> None:
    rows = [Pair("0", positive), *(Pair("180", angle) for angle in ("30", "45", "60", "100"))]
    result = mine(rows, Angles(), method="dense", negatives=4, **options)
    # Float32 decides nothing here: 30 and -30 have one cosine, and `margin: 1` keeps what does not score above.
    assert result.negatives[0] == expected


def test_a_margin_holds_for_bm25_too_and_the_report_counts() -> None:
    rows = [Pair("0: cat", "10"), Pair("180: dog", "11: cat"), Pair("181: hat", "50: cat")]
    result = mine(rows, Angles(), method="bm25", negatives=2)
    assert result.negatives == (("50: cat",), (), ())
    assert (result.candidates, result.dropped, result.dropped_share) == (2, 1, 0.5)
    assert (result.documents, result.mined, result.short) == (3, 1, 3)
    assert mine(rows, method="bm25", negatives=2, margin=None).dropped_share == 0.0


def test_the_positive_is_scored_where_the_corpus_lacks_it() -> None:
    found = mine([Pair("0", "50")], Angles(), corpus=["40", "60", "70"], method="dense", negatives=3).negatives
    assert found == (("60", "70"),)


# Choosing


def test_random_draws_among_all_survivors_by_seed_and_keeps_their_order() -> None:
    rows = [Pair("0", "1"), *(Pair("180", str(angle)) for angle in range(20, 80))]
    options: dict[str, Any] = {"method": "dense", "negatives": 5, "depth": 40, "sampling": "random"}
    draws = [mine(rows, Angles(), seed=seed, **options).negatives[0] for seed in range(8)]
    assert draws[0] == mine(rows, Angles(), seed=0, **options).negatives[0]
    assert len(set(draws)) == 8
    for draw in draws:
        angles = [int(text) for text in draw]
        assert angles == sorted(set(angles))
        assert max(angles) < 60
        assert len(angles) == 5
    assert max(int(text) for draw in draws for text in draw) > 40


def test_rows_draw_differently() -> None:
    rows = [Pair(str(-number / 100), "1") for number in range(5)] + [Pair("180", str(angle)) for angle in range(20, 80)]
    found = mine(rows, Angles(), method="dense", negatives=5, sampling="random").negatives[:5]
    assert len(set(found)) == 5


# How texts are encoded


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"instruction": "Find it"}, [("query", "Find it"), ("document", None)]),
        ({}, [("query", None), ("document", None)]),
        ({"instruction": "Same", "symmetric": True}, [("query", "Same"), ("query", "Same")]),
        ({"instruction": "Find it", "method": "bm25"}, [("query", "Find it"), ("document", None)]),
        ({"method": "bm25", "margin": None}, []),
    ],
)
def test_texts_are_encoded_as_in_training(options: dict[str, Any], expected: list[Any]) -> None:
    encoder = Angles()
    mine([Pair("0", "1"), Pair("2", "3")], encoder, **{"method": "dense", **options})
    assert encoder.asked == expected


def test_with_a_real_encoder(tiny_encoder: EpicEncoder) -> None:
    rows = [Pair(f"what is a {word}", f"a {word} is a thing") for word in WORDS]
    options = {"instruction": "Say what it is", "negatives": 3, "margin": None}
    result = mine(rows, tiny_encoder, **options)
    assert result == mine(rows, tiny_encoder, **options)
    for row, found in zip(rows, result.negatives, strict=True):
        assert len(set(found)) == 3
        assert row.positive not in found
    cosines = tiny_encoder.similarity(
        tiny_encoder.encode_query([rows[0].query], instruction="Say what it is"),
        tiny_encoder.encode_document([row.positive for row in rows]),
    )[0]
    dense = mine(rows, tiny_encoder, **options, method="dense").negatives[0]
    assert dense == tuple(rows[number + 1].positive for number in np.argsort(-cosines[1:])[:3])
    assert mine(rows, tiny_encoder, **options, symmetric=True).negatives != result.negatives


# Blocks


def test_a_block_never_has_more_scores_than_fit() -> None:
    for queries, documents in ((100_000, 100_000), (1, 50_000_000), (7, 1), (0, 10)):
        ranges = list(_rankings.blocks(queries, documents))
        assert [number for block in ranges for number in block] == list(range(queries))
        assert all(len(block) * documents <= 2**24 or len(block) == 1 for block in ranges)
    assert len(list(_rankings.blocks(100_000, 100_000))) == 599


def test_small_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [Pair(f"{angle}: {WORDS[angle % 8]}", f"{angle + 0.5}: {WORDS[angle % 5]}") for angle in range(0, 200, 3)]
    whole = mine(rows, Angles(), negatives=4)
    sizes = []
    cosines = mining.cosine_scorer

    def watched(queries: Any, documents: Any) -> Callable[[range], Any]:
        score = cosines(queries, documents)

        def sized(block: range) -> Any:
            sizes.append(len(block))
            return score(block)

        return sized

    monkeypatch.setattr(mining, "cosine_scorer", watched)
    monkeypatch.setattr(_rankings, "_BLOCK_SCORES", 5 * len(rows))
    assert mine(rows, Angles(), negatives=4) == whole
    assert max(sizes) == 5


@hypothesis_settings(deadline=None, max_examples=80)
@given(st.lists(st.sampled_from([-np.inf, 0.0, 1.0, 2.0, 3.0]), max_size=30), st.integers(1, 12))
def test_best_sorts_by_score_then_place(values: list[float], count: int) -> None:
    found = _rankings.best(np.array(values, dtype=np.float32), count)
    places = sorted((place for place, value in enumerate(values) if value > -np.inf), key=lambda at: (-values[at], at))
    assert found.tolist() == places[:count]


# Errors


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"method": "words"}, r"method is 'words', known are bm25, dense, both; choose one"),
        ({"sampling": "last"}, r"sampling is 'last', known are top, random; choose one"),
        ({"negatives": 0}, r"negatives is 0; ask for at least 1"),
        ({"skip_top": -1}, r"skip_top is -1; give 0 or more"),
        ({"depth": 10, "skip_top": 4}, r"depth is 10 and skip_top 4, too few places for 7 negatives; raise .* 11"),
        ({"margin": 0.0}, r"margin is 0.0; give a share of the positive's score"),
        ({"margin": 1.5}, r"margin is 1.5; give a share"),
        ({"margin": float("nan")}, r"margin is nan; give a share"),
        ({"absolute_margin": -0.1}, r"absolute_margin is -0.1; cosines differ by 0 to 2"),
    ],
)
def test_options_that_cannot_work(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        MiningOptions(**options)


def test_arguments_that_cannot_work() -> None:
    with pytest.raises(ConfigError, match=r"method is 'both', margin 0\.95 and absolute_margin None, which need an"):
        mine_negatives([Pair("a", "b")])
    with pytest.raises(DataError, match="there are 0 rows"):
        mine_negatives([])
    with pytest.raises(DataError, match="the corpus has 0 documents"):
        by_words([Pair("a", "b")], [])


def test_bm25s_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(MissingExtraError, match=r"mining with BM25 needs bm25s, .* 'epic-rag\[train\]'"):
        by_words([Pair("a", "b")])
    assert mine([Pair("0", "1"), Pair("2", "50")], Angles(), method="dense").mined == 1


def test_the_example_in_the_docstring() -> None:
    result = doctest.testmod(mining)
    assert result.attempted
    assert not result.failed
