"""Hard negatives for training pairs: passages that look like the answer and are not.

    rank the corpus for each query (BM25, the encoder's cosine, or both)
    leave out what may be no negative: own positive, positives of the same query or group, equal texts, the query
    leave out likely false negatives: a score close to, or above, the positive's
    take the best of the rest, or draw among them

The third step is positive-aware mining (NV-Retriever, arXiv 2407.15831, section 3): of the highest-ranked passages many
are unlabelled answers, and a model trained against them learns to push answers away.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest

import numpy as np
import numpy.typing as npt
from tqdm.auto import tqdm

from epic_rag.encoder import EpicEncoder
from epic_rag.errors import ConfigError, DataError
from epic_rag.training._rankings import Scores, best, blocks, bm25_scorer, cosine_scorer
from epic_rag.training.data import Pair

__all__ = ["METHODS", "SAMPLINGS", "MinedNegatives", "MiningOptions", "mine_negatives"]

METHODS = ("bm25", "dense", "both")
SAMPLINGS = ("top", "random")


@dataclass(frozen=True)
class MiningOptions:
    """How negatives are found and chosen.

    Attributes:
        method: "bm25" ranks by words, "dense" by the encoder's cosine, "both" takes from the two rankings in turn.
        negatives: How many negatives a row should have; those that it has already count, and are kept.
        depth: How many places of a ranking are looked at.
        skip_top: How many of the first places are passed over.
        margin: Leave out candidates whose cosine is above this share of the positive's; None for no such limit.
        absolute_margin: Leave out candidates whose cosine is above the positive's minus this; None for no such limit.
            Where both are set, the stricter one holds.
        sampling: "top" takes the best candidates that are left, "random" draws among all of them.
        seed: Of the draws.
        symmetric: Whether documents are encoded like queries.
        instruction: What to retrieve, as in training; None takes the encoder's own, "" none at all.
    """

    method: str = "both"
    negatives: int = 7
    depth: int = 100
    skip_top: int = 0
    margin: float | None = 0.95
    absolute_margin: float | None = None
    sampling: str = "top"
    seed: int = 0
    symmetric: bool = False
    instruction: str | None = None

    def __post_init__(self) -> None:
        for name, known in (("method", METHODS), ("sampling", SAMPLINGS)):
            if getattr(self, name) not in known:
                raise ConfigError(
                    f"{name} is {getattr(self, name)!r}, known are {', '.join(known)}; choose one of them"
                )
        if self.negatives < 1:
            raise ConfigError(f"negatives is {self.negatives}; ask for at least 1")
        if self.skip_top < 0:
            raise ConfigError(f"skip_top is {self.skip_top}; give 0 or more")
        if self.depth - self.skip_top < self.negatives:
            raise ConfigError(
                f"depth is {self.depth} and skip_top {self.skip_top}, too few places for {self.negatives} negatives; "
                f"raise depth to {self.skip_top + self.negatives} or more"
            )
        # Written so that nan fails, too.
        if self.margin is not None and not 0 < self.margin <= 1:
            raise ConfigError(f"margin is {self.margin}; give a share of the positive's score, above 0 and at most 1")
        if self.absolute_margin is not None and not 0 <= self.absolute_margin <= 2:
            raise ConfigError(f"absolute_margin is {self.absolute_margin}; cosines differ by 0 to 2, give such a value")

    @property
    def needs_encoder(self) -> bool:
        """Whether vectors are needed, to rank by or for a margin."""
        return self.method != "bm25" or self.margin is not None or self.absolute_margin is not None


@dataclass(frozen=True)
class MinedNegatives:
    """Negatives of every row, and what mining them was like.

    Attributes:
        negatives: For each row its negatives: those that it had, then the mined ones by rank.
        documents: Different texts in the corpus.
        mined: How many negatives were added.
        short: Rows that have fewer than asked for.
        candidates: Documents that were looked at, over all rows.
        dropped: How many of them were left out as likely false negatives.
    """

    negatives: tuple[tuple[str, ...], ...]
    documents: int
    mined: int
    short: int
    candidates: int
    dropped: int

    @property
    def dropped_share(self) -> float:
        """Share of the candidates that were left out as likely false negatives, 0 to 1."""
        return self.dropped / self.candidates if self.candidates else 0.0


def mine_negatives(
    pairs: Sequence[Pair],
    options: MiningOptions | None = None,
    *,
    encoder: EpicEncoder | None = None,
    corpus: Sequence[str | tuple[str, str]] | None = None,
    show_progress: bool = False,
) -> MinedNegatives:
    """Find hard negatives.

    A negative of a row is never its positive, a positive of a row with the same query or group, the query itself, or
    a text that equals one of these but for case and spacing.

    Args:
        pairs: Rows of one task.
        options: How; None takes the defaults.
        encoder: Ranks and measures the margin; not needed for BM25 without a margin.
        corpus: Where negatives come from: texts, or (title, text) tuples, which are read as title, a space, text;
            None takes the positives of all rows.
        show_progress: Whether to draw progress bars.

    Returns:
        The negatives; the same ones for the same arguments.

    Raises:
        ConfigError: If an encoder is needed and there is none.
        DataError: If there are no rows, or no documents.
        MissingExtraError: If BM25 is asked for and bm25s is not installed.

    Example:
        >>> options = MiningOptions(method="bm25", margin=None, negatives=1)
        >>> rows = [Pair("red cat", "a red cat"), Pair("red dog", "a red dog")]
        >>> mine_negatives(rows, options).negatives
        (('a red dog',), ('a red cat',))
    """
    options = options or MiningOptions()
    if not pairs:
        raise DataError("there are 0 rows, and mining needs at least 1; give pairs of a query and its positive")
    if options.needs_encoder and encoder is None:
        raise ConfigError(
            f"method is {options.method!r}, margin {options.margin} and absolute_margin {options.absolute_margin}, "
            "which need an encoder; give one, or take method 'bm25' without margins"
        )
    table = _Documents(pairs, corpus)
    queries = [pair.query for pair in pairs]
    vectors = (
        _Vectors(encoder, pairs, table.texts, options, show_progress) if options.needs_encoder and encoder else None
    )
    scorers = []
    if vectors is not None and options.method != "bm25":
        scorers.append(cosine_scorer(vectors.queries, vectors.documents))
    if options.method != "dense":
        scorers.append(bm25_scorer(queries, table.texts))
    mined: list[tuple[str, ...]] = []
    candidates = dropped = 0
    with tqdm(total=len(pairs), desc="Mining", unit="row", disable=not show_progress) as bar:
        for block in blocks(len(pairs), len(table.texts)):
            scored = [score(block) for score in scorers]
            for row in block:
                ranked = _candidates([scores[row - block.start] for scores in scored], table.excluded(row), options)
                kept = ranked if vectors is None else ranked[vectors.below_margin(row, ranked, options)]
                candidates += len(ranked)
                dropped += len(ranked) - len(kept)
                mined.append(tuple(table.texts[document] for document in _chosen(kept, pairs[row], row, options)))
            bar.update(len(block))
    negatives = tuple(pair.negatives + found for pair, found in zip(pairs, mined, strict=True))
    return MinedNegatives(
        negatives=negatives,
        documents=len(table.texts),
        mined=sum(map(len, mined)),
        short=sum(len(texts) < options.negatives for texts in negatives),
        candidates=candidates,
        dropped=dropped,
    )


class _Documents:
    """The corpus, equal texts once, and which documents are no negatives of a row."""

    def __init__(self, pairs: Sequence[Pair], corpus: Sequence[str | tuple[str, str]] | None) -> None:
        self._pairs = pairs
        self.texts: list[str] = []
        # A document with a title is known by its bare text, too: a pair's positive may come without the title.
        self._by_key: dict[str, set[int]] = {}
        seen: dict[str, int] = {}
        for entry in [pair.positive for pair in pairs] if corpus is None else corpus:
            title, text = ("", entry) if isinstance(entry, str) else entry
            whole = f"{title} {text}".strip()
            number = seen.setdefault(_key(whole), len(self.texts))
            if number == len(self.texts):
                self.texts.append(whole)
            for key in (_key(whole), _key(text)):
                self._by_key.setdefault(key, set()).add(number)
        if not self.texts:
            raise DataError("the corpus has 0 documents, and negatives come from it; give texts, or None for positives")
        self._of_query: dict[str, set[int]] = {}
        self._of_group: dict[str, set[int]] = {}
        for pair in pairs:
            found = self._with_text(pair.positive)
            self._of_query.setdefault(_key(pair.query), set()).update(found)
            if pair.group is not None:
                self._of_group.setdefault(pair.group, set()).update(found)

    def excluded(self, row: int) -> npt.NDArray[np.intp]:
        """Numbers of the documents that may not become negatives of a row, or are already."""
        pair = self._pairs[row]
        found = self._of_query[_key(pair.query)] | self._with_text(pair.query)
        if pair.group is not None:
            found = found | self._of_group[pair.group]
        for text in pair.negatives:
            found = found | self._with_text(text)
        return np.fromiter(found, dtype=np.intp, count=len(found))

    def _with_text(self, text: str) -> set[int]:
        return self._by_key.get(_key(text), set())


class _Vectors:
    """Unit vectors of queries and documents, and the cosine of every row with its positive."""

    def __init__(
        self,
        encoder: EpicEncoder,
        pairs: Sequence[Pair],
        documents: Sequence[str],
        options: MiningOptions,
        show_progress: bool,
    ) -> None:
        positives = [pair.positive for pair in pairs]
        # A corpus of its own need not hold the positives, which are scored all the same.
        numbers = {text: number for number, text in enumerate(dict.fromkeys([*documents, *positives]))}

        def as_queries(texts: Sequence[str]) -> Scores:
            vectors: Scores = encoder.encode_query(texts, instruction=options.instruction, show_progress=show_progress)
            return vectors

        self.queries = as_queries([pair.query for pair in pairs])  # (rows, dim)
        texts = list(numbers)
        encoded = (
            as_queries(texts) if options.symmetric else encoder.encode_document(texts, show_progress=show_progress)
        )
        self.documents = encoded[: len(documents)]  # (documents, dim)
        of_row = [numbers[text] for text in positives]
        self._positive = np.array(
            [query @ encoded[number] for query, number in zip(self.queries, of_row, strict=True)], dtype=np.float32
        )  # (rows,)

    def below_margin(self, row: int, documents: npt.NDArray[np.intp], options: MiningOptions) -> npt.NDArray[np.bool_]:
        """Which documents score low enough to be true negatives of a row."""
        positive = float(self._positive[row])
        limit = np.inf
        if options.margin is not None:
            # The share of a positive score; as far below a negative one.
            limit = positive - (1 - options.margin) * abs(positive)
        if options.absolute_margin is not None:
            limit = min(limit, positive - options.absolute_margin)
        result: npt.NDArray[np.bool_] = self.documents[documents] @ self.queries[row] <= limit
        return result


def _candidates(
    scored: Sequence[Scores], excluded: npt.NDArray[np.intp], options: MiningOptions
) -> npt.NDArray[np.intp]:
    """The documents that a row's rankings have between `skip_top` and `depth`, best first, rankings in turn."""
    rankings = []
    for scores in scored:
        scores[excluded] = -np.inf
        rankings.append(best(scores, options.depth).tolist())
    # What one ranking has at its top is passed over in the other one, too.
    skipped = set(chain.from_iterable(ranking[: options.skip_top] for ranking in rankings))
    in_turn = chain.from_iterable(zip_longest(*(ranking[options.skip_top :] for ranking in rankings)))
    merged = dict.fromkeys(document for document in in_turn if document is not None and document not in skipped)
    return np.array(list(merged), dtype=np.intp)


def _chosen(documents: npt.NDArray[np.intp], pair: Pair, row: int, options: MiningOptions) -> list[int]:
    """The documents that become a row's negatives, by rank."""
    found: list[int] = documents.tolist()
    wanted = max(0, options.negatives - len(pair.negatives))
    if options.sampling == "top" or len(found) <= wanted:
        return found[:wanted]
    drawn = random.Random(f"{options.seed}-{row}").sample(range(len(found)), wanted)
    return [found[place] for place in sorted(drawn)]


def _key(text: str) -> str:
    """A text without regard to case and spacing."""
    return " ".join(text.split()).casefold()
