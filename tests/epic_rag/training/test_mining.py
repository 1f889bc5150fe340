"""Hard negatives: candidates, margins, exclusions, choice."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from epic_rag.encoder import EpicEncoder
from epic_rag.errors import ConfigError, DataError, MissingExtraError
from epic_rag.training.data import Pair
from epic_rag.training.mining import MiningOptions, MiningReport, mine_negatives

WORDS = ["cat", "dog", "pen", "cup", "hat", "sun", "map", "key"]


class Angles:
    """An encoder in the plane: a text is "angle in degrees" or "angle in degrees: words"; records its calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def encode_query(self, texts: Sequence[str], *, instruction: str | None, show_progress: bool) -> Any:
        self.calls.append(("query", instruction))
        return self._vectors(texts)

    def encode_document(self, texts: Sequence[str], *, show_progress: bool) -> Any:
        self.calls.append(("document", None))
        return self._vectors(texts)

    @staticmethod
    def _vectors(texts: Sequence[str]) -> Any:
        angles = np.radians([float(text.split(":")[0]) for text in texts])
        return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def mine(
    pairs: Sequence[Pair], encoder: Any = None, corpus: Any = (), **options: Any
) -> tuple[list[tuple[str, ...]], MiningReport]:
    return mine_negatives(pairs, encoder or Angles(), MiningOptions(**options), corpus=corpus)


def nearest(pairs: Sequence[Pair], corpus: Any = (), **options: Any) -> list[tuple[str, ...]]:
    return mine(pairs, corpus=corpus, **{"margin": None, "negatives": 3, **options})[0]


# Exclusions


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        # The positive, however it is spelled.
        ([Pair("0", "5: A cat"), Pair("90", "5:  a CAT"), Pair("91", "20")], ("20",)),
        # A positive of a row with the same query, in another spelling too.
        ([Pair("0: q", "5"), Pair("0:  Q", "10"), Pair("91", "20")], ("20",)),
        # A positive of a row with the same group.
        ([Pair("0", "5", group="g"), Pair("90", "10", group="g"), Pair("91", "20")], ("20",)),
        ([Pair("0", "5", group="g"), Pair("90", "10", group="h")], ("10",)),
        ([Pair("0", "5"), Pair("90", "10")], ("10",)),
        # The query itself.
        ([Pair("0: old", "5"), Pair("90", "0: Old"), Pair("91", "20")], ("20",)),
        # Nothing is left.
        ([Pair("0", "5")], ()),
    ],
)
def test_what_never_becomes_a_negative(pairs: list[Pair], expected: tuple[str, ...]) -> None:
    assert nearest(pairs)[0] == expected


def test_existing_negatives_are_kept_and_count() -> None:
    rows = [Pair("0", "5", ("20: Pen", "x")), Pair("90", "20: pen"), Pair("91", "30"), Pair("92", "40")]
    assert nearest(rows)[0] == ("20: Pen", "x", "30")
    # They are kept where they are more than wanted.
    assert nearest(rows, negatives=1)[0] == ("20: Pen", "x")
    # Mining again adds nothing.
    again = [Pair(row.query, row.positive, found) for row, found in zip(rows, nearest(rows), strict=True)]
    assert nearest(again) == nearest(rows)


def test_a_corpus() -> None:
    rows = [Pair("0", "5: fish"), Pair("90", "100")]
    corpus = ["30", ("20: cats", "5: fish"), ("25: food", "y"), "25: FOOD  y"]
    # With a title before it, a row's positive is excluded still; equal texts count once.
    assert nearest(rows, corpus)[0] == ("25: food y", "30", "100")
    assert mine(rows, corpus=corpus, margin=None)[1].documents == 5
    assert "20: cats 5: fish" in nearest([Pair("0", "7"), *rows[1:]], corpus)[0]


# Ranks


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ("20", "30", "40")),
        ({"depth": 3}, ("20", "30", "40")),
        ({"depth": 4, "skip_top": 1}, ("30", "40", "50")),
        ({"skip_top": 4}, ("60",)),
        ({"skip_top": 9}, ()),
    ],
)
def test_depth_and_skip_top(options: dict[str, int], expected: tuple[str, ...]) -> None:
    # 5 and 10 are positives of the query: they take no rank.
    rows = [Pair("0", "5"), Pair("0", "10"), *(Pair("180", str(angle)) for angle in (20, 60, 40, 30, 50))]
    assert nearest(rows, **options)[0] == expected


@pytest.mark.parametrize(
    ("positive", "options", "expected"),
    [
        # Cosines of the candidates: 30 -> 0.866, 45 -> 0.707, 60 -> 0.5, 100 -> -0.174; of the positive -29 -> 0.875.
        ("-29", {"margin": None}, ("30", "45", "60", "100")),
        ("-29", {"margin": 1.0}, ("30", "45", "60", "100")),
        ("-29", {}, ("45", "60", "100")),
        ("-29", {"margin": 0.8}, ("60", "100")),
        ("-29", {"margin": None, "absolute_margin": 0.1}, ("45", "60", "100")),
        ("-29", {"margin": None, "absolute_margin": 0.3}, ("60", "100")),
        # The stricter of the two.
        ("-29", {"margin": 0.95, "absolute_margin": 0.3}, ("60", "100")),
        ("-29", {"margin": 0.5, "absolute_margin": 0.1}, ("100",)),
        # A positive that scores below 0: the limit is below it.
        ("-99", {"margin": 1.0}, ("100",)),
        ("-100", {}, ()),
    ],
)
def test_margins(positive: str, options: dict[str, float], expected: tuple[str, ...]) -> None:
    rows = [Pair("0", positive), *(Pair("180", angle) for angle in ("30", "45", "60", "100"))]
    assert mine(rows, negatives=4, **options)[0][0] == expected


def test_counts() -> None:
    rows = [Pair("0", "10", ("x",)), Pair("180", "170"), Pair("90", "80")]
    negatives, report = mine(rows, negatives=2)
    assert report == MiningReport(rows=3, documents=3, mined=sum(map(len, negatives)) - 1, short=0)
    assert mine(rows, negatives=4)[1].short == 3


# Choice


def test_random_sampling_draws_by_seed_and_row() -> None:
    rows = [*(Pair(str(-n / 100), "1") for n in range(5)), *(Pair("180", str(angle)) for angle in range(20, 80))]
    options: dict[str, Any] = {"negatives": 5, "depth": 40, "sampling": "random"}
    draws = [nearest(rows, seed=seed, **options)[0] for seed in range(8)]
    assert draws[0] == nearest(rows, seed=0, **options)[0]
    assert len(set(draws)) == 8
    for draw in draws:
        angles = [int(text) for text in draw]
        assert angles == sorted(set(angles))
        assert (len(angles), max(angles) < 60) == (5, True)
    assert max(int(text) for draw in draws for text in draw) > 40
    assert len(set(nearest(rows, **options)[:5])) == 5


# Encoding


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"instruction": "Find it"}, [("document", None), ("query", "Find it")]),
        ({}, [("document", None), ("query", None)]),
        ({"instruction": "Same", "symmetric": True}, [("query", "Same"), ("query", "Same")]),
    ],
)
def test_texts_are_encoded_as_in_training(options: dict[str, Any], expected: list[Any]) -> None:
    encoder = Angles()
    mine([Pair("0", "1"), Pair("2", "3")], encoder, **options)
    assert encoder.calls == expected


def test_with_a_real_encoder(tiny_encoder: EpicEncoder, capfd: pytest.CaptureFixture[str]) -> None:
    rows = [Pair(f"what is a {word}", f"a {word} is a thing") for word in WORDS]
    options = {"instruction": "Say what it is", "negatives": 3, "margin": None}
    result = mine(rows, tiny_encoder, **options)
    assert result == mine(rows, tiny_encoder, **options)
    cosines = tiny_encoder.similarity(
        tiny_encoder.encode_query([rows[0].query], instruction="Say what it is"),
        tiny_encoder.encode_document([row.positive for row in rows]),
    )[0]
    assert result[0][0] == tuple(rows[number + 1].positive for number in np.argsort(-cosines[1:])[:3])
    assert mine(rows, tiny_encoder, **options, symmetric=True) != result
    # Nothing is printed.
    assert capfd.readouterr() == ("", "")


# Errors


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"sampling": "last"}, r"sampling is 'last'\. It must be 'top' or 'random'\."),
        ({"negatives": 0}, r"negatives is 0\. It must be greater than or equal to 1\."),
        ({"skip_top": -1}, r"skip_top is -1\. It must be greater than or equal to 0\."),
        ({"depth": 10, "skip_top": 4}, r"depth is 10 and skip_top 4, too few ranks for 7 negatives\. Raise .* 11"),
        ({"margin": 0.0}, r"margin is 0.0\. It must be greater than 0\."),
        ({"margin": 1.5}, r"margin is 1.5\. It must be less than or equal to 1\."),
        ({"margin": float("nan")}, r"margin is nan\. It must be"),
        ({"absolute_margin": -0.1}, r"absolute_margin is -0.1\. It must be greater than or equal to 0\."),
    ],
)
def test_options_that_cannot_work(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        MiningOptions(**options)


def test_no_rows() -> None:
    with pytest.raises(DataError, match="There are no rows"):
        mine([])


def test_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"Mining hard negatives needs datasets, .* 'epic-rag\[train\]'"):
        mine([Pair("0", "1")])
