"""Hard negatives for training pairs: passages that look like the answer and are not.

    rank the corpus for each query (BM25, the encoder's cosine, or both)
    leave out what may be no negative: own positive, positives of the same query or group, equal texts, the query
    leave out likely false negatives: a score close to, or above, the positive's
    take the best of the rest, or draw among them

The third step is positive-aware mining (NV-Retriever, arXiv 2407.15831, section 3): of the highest-ranked passages many
are unlabelled answers, and a model trained against them learns to push answers away.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm.auto import tqdm

from epic_rag.encoder import EpicEncoder
from epic_rag.errors import ConfigError, DataError, MissingExtraError
from epic_rag.evaluation.datasets import read_mapping, read_rows
from epic_rag.training.data import Pair, load_pairs

__all__ = [
    "METHODS",
    "SAMPLINGS",
    "MinedNegatives",
    "MiningOptions",
    "MiningReport",
    "Scores",
    "best",
    "blocks",
    "bm25_scorer",
    "cosine_scorer",
    "mine_file",
    "mine_negatives",
]


# --- from _rankings
# Scores of documents for queries, a block of queries at a time: BM25 over words, cosines over vectors.
#
# A matrix of all queries and all documents of a large file would not fit memory; a block of it does.

Scores = npt.NDArray[np.float32]
Scorer = Callable[[range], Scores]

# 64 MB of float32; two methods hold one such block each.
_BLOCK_SCORES = 2**24
# Every word, one letter long or more, in any script that separates words. No stop words and no stemming: both would be
# one language's.
_WORD = re.compile(r"\w+")


def blocks(queries: int, documents: int) -> Iterator[range]:
    """Ranges of queries, each with at most 16 million scores against all documents.

    Args:
        queries: Number of queries.
        documents: Number of documents.
    """
    size = max(1, _BLOCK_SCORES // max(1, documents))
    for start in range(0, queries, size):
        yield range(start, min(start + size, queries))


def best(scores: npt.NDArray[np.float32], count: int) -> npt.NDArray[np.intp]:
    """Positions of the highest scores, best first; equal scores in their order, -inf never.

    Args:
        scores: (documents,) of one query.
        count: How many at most.
    """
    found = np.flatnonzero(scores > -np.inf)
    if len(found) > count:
        values = scores[found]
        # Everything that ties with the last place stays in, so that the order below decides and not the partition.
        lowest = np.partition(values, len(values) - count)[len(values) - count]
        found = found[values >= lowest]
    order = np.lexsort((found, -scores[found]))[:count]
    result: npt.NDArray[np.intp] = found[order]
    return result


def cosine_scorer(queries: Scores, documents: Scores) -> Scorer:
    """Cosines of unit vectors.

    Args:
        queries: (n, dim).
        documents: (m, dim).

    Returns:
        A function from a block of queries to its (block, m) scores.
    """

    def score(block: range) -> Scores:
        result: Scores = queries[block.start : block.stop] @ documents.T
        return result

    return score


def bm25_scorer(queries: Sequence[str], documents: Sequence[str]) -> Scorer:
    """BM25 (k1 1.5, b 0.75, Lucene's idf) by bm25s.

    Args:
        queries: n texts.
        documents: m texts.

    Returns:
        A function from a block of queries to its (block, m) scores; -inf for a document that shares no word.

    Raises:
        MissingExtraError: If bm25s is not installed.
    """
    try:
        import bm25s  # type: ignore[import-untyped]
    except ImportError as error:
        raise MissingExtraError("bm25s", "train", "mining with BM25") from error

    # Numbers instead of words: a list of strings for each document would take many times the texts' own memory.
    vocabulary: dict[str, int] = {}
    ids = [[vocabulary.setdefault(word, len(vocabulary)) for word in _words(text)] for text in documents]
    index = bm25s.BM25()
    if vocabulary:
        index.index((ids, vocabulary), create_empty_token=False, show_progress=False)

    def score(block: range) -> Scores:
        out = np.full((len(block), len(documents)), -np.inf, dtype=np.float32)
        for row, query in enumerate(block):
            known = [vocabulary[word] for word in _words(queries[query]) if word in vocabulary]
            if known:
                scores = index.get_scores_from_ids(known)
                out[row] = np.where(scores > 0, scores, -np.inf)
        return out

    return score


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())


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


# --- from mining_files
# Hard negatives for a file of pairs: read, mine, write aside, rename.


@dataclass(frozen=True)
class MiningReport:
    """What became of a file.

    Attributes:
        rows: Rows of the file.
        documents: Different texts in the corpus.
        mined: How many negatives were added.
        short: Rows that have fewer negatives than asked for.
        candidates: Documents that were looked at, over all rows.
        dropped_share: Share of the candidates that were left out as likely false negatives, 0 to 1.
    """

    rows: int
    documents: int
    mined: int
    short: int
    candidates: int
    dropped_share: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def mine_file(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    options: MiningOptions | None = None,
    *,
    model: EpicEncoder | str | os.PathLike[str] | None = None,
    corpus: str | os.PathLike[str] | None = None,
    show_progress: bool = False,
) -> MiningReport:
    """Add hard negatives to a file of pairs.

    Rows stay in order and keep everything that they have; only "negatives" grows. The result is written under another
    name and renamed, so that `out` is never half a file; it may be `path` itself.

    Args:
        path: JSON lines as for training, gzipped or not.
        out: The file to write; gzipped if its name ends in `.gz`.
        options: How; None takes the defaults. Without an instruction, the one in `instructions.json` beside the file
            counts, as in training.
        model: An encoder, or what `EpicEncoder.from_pretrained` takes; loaded only where it is needed.
        corpus: JSON lines of {"text": ...} with an optional "title", such as a BEIR corpus; None takes the positives
            of all rows.
        show_progress: Whether to draw progress bars.

    Raises:
        DataError: If a file is missing or malformed, or `out` cannot be written.
        CheckpointError: If the model does not load.
        MissingExtraError: If BM25 is asked for and bm25s is not installed.
    """
    source, target = Path(path).expanduser(), Path(out).expanduser()
    options = options or MiningOptions()
    # Everything that can be wrong with files is found before hours of work.
    pairs, _ = load_pairs(source)
    rows = [row.values for row in read_rows(source)]
    documents = None if corpus is None else _read_corpus(Path(corpus).expanduser())
    _check_target(target)
    if options.instruction is None:
        options = replace(options, instruction=_instruction_beside(source))
    encoder = None
    if options.needs_encoder:
        encoder = model if isinstance(model, EpicEncoder) else EpicEncoder.from_pretrained(model)
    found = mine_negatives(pairs, options, encoder=encoder, corpus=documents, show_progress=show_progress)
    _write(
        target,
        (
            {**row, "negatives": list(negatives)} if negatives else row
            for row, negatives in zip(rows, found.negatives, strict=True)
        ),
    )
    return MiningReport(
        rows=len(pairs),
        documents=found.documents,
        mined=found.mined,
        short=found.short,
        candidates=found.candidates,
        dropped_share=found.dropped_share,
    )


def _read_corpus(path: Path) -> Sequence[tuple[str, str]]:
    """(title, text) of every document; documents without text are left out."""
    documents = [(row.text("title", ""), row.text("text")) for row in read_rows(path)]
    documents = [(title, text) for title, text in documents if text.strip()]
    if not documents:
        raise DataError(f'{path} has no documents; each line is {{"text": "..."}}, with a "title" if there is one')
    return documents


def _instruction_beside(path: Path) -> str | None:
    file = path.parent / "instructions.json"
    name = path.name.removesuffix(".gz").removesuffix(".jsonl")
    return read_mapping(file).get(name) if file.is_file() else None


def _check_target(path: Path) -> None:
    if path.is_dir():
        raise DataError(
            f"{path} is a folder, and the result is a file; give --out a name such as {path / 'mined.jsonl'}"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"no folder can be made at {path.parent} ({error}); write the result elsewhere") from error
    if not os.access(path.parent, os.W_OK):
        raise DataError(f"{path} cannot be written, its folder is read-only; write the result elsewhere")


def _write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with aside.open("wb") as file:
            if path.suffix == ".gz":
                # Neither a time nor a name in it: the same rows are the same bytes.
                with gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0) as packed:
                    _write_lines(packed, rows)
            else:
                _write_lines(file, rows)
        os.replace(aside, path)
    except OSError as error:
        raise DataError(f"{path} cannot be written ({error}); make room, or write the result elsewhere") from error
    finally:
        # After the renaming there is none.
        aside.unlink(missing_ok=True)


def _write_lines(file: io.BufferedIOBase | gzip.GzipFile, rows: Iterable[Mapping[str, Any]]) -> None:
    for row in rows:
        # Half a surrogate pair, which a key that is not read may hold, has no UTF-8; written as its escape it is JSON.
        file.write((json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace"))
