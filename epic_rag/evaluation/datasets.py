"""Evaluation sets in local folders, and the catalogue of their instructions and demonstrations.

A folder's kind is known from its files:

    retrieval       corpus.jsonl[.gz], queries.jsonl[.gz], qrels/test.tsv     (the BEIR layout)
    sts             test.tsv with sentence1, sentence2, score
    classification  train.jsonl[.gz], test.jsonl[.gz] with text, label
    clustering      clustering.jsonl[.gz] with text, label
    reranking       reranking.jsonl[.gz] with query, positive (list), negative (list)

This module does not need mteb; `epic_rag.evaluation.mteb` turns the contents into mteb tasks.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

from epic_rag.errors import DataError
from epic_rag.files import read_jsonl
from epic_rag.tasks import get_task

__all__ = [
    "CATALOGUE",
    "KINDS",
    "SYMMETRIC_PAIRS",
    "TRAIN_LABELS",
    "TRAIN_PAIRS",
    "ClassificationData",
    "ClusteringData",
    "Document",
    "JsonRow",
    "Kind",
    "LocalSet",
    "RerankingData",
    "RetrievalData",
    "SetData",
    "SetEntry",
    "StsData",
    "content_revision",
    "entry_for",
    "evaluated_texts",
    "find_local_sets",
    "load_local_set",
    "normalize_text",
    "read_mapping",
    "read_rows",
    "read_tsv",
    "set_kind",
]

Kind = Literal["retrieval", "reranking", "sts", "classification", "clustering"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""All kinds, in the order in which reports list them."""


def normalize_text(text: str) -> str:
    """Return a text without case and with single blanks, for comparing texts."""
    return " ".join(text.split()).casefold()


@dataclass(frozen=True)
class JsonRow:
    """A line of a JSON lines file; its accessors raise a `DataError` that names the file and the line."""

    values: Mapping[str, Any]
    path: Path
    line: int

    def error(self, problem: str) -> DataError:
        """Return a `DataError` that names the file and the line."""
        return DataError(f"{self.path}:{self.line} {problem}")

    def text(self, key: str, default: str | None = None) -> str:
        """Return a string field; `default` where it is missing."""
        value = self.values.get(key, default)
        if not isinstance(value, str):
            raise self.error(f'has {value!r} as "{key}". Write a string.')
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        """Return a field that holds a list of strings."""
        value = self.values.get(key)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.error(f'has {value!r} as "{key}". Write a list of strings.')
        return tuple(cast("list[str]", value))

    def label(self, key: str) -> str | int:
        """Return a class label: a string or an integer."""
        value = self.values.get(key)
        if not isinstance(value, (str, int)) or isinstance(value, bool):
            raise self.error(f'has {value!r} as "{key}". Write a string or an integer.')
        return value


def read_rows(path: Path) -> Iterator[JsonRow]:
    """Yield the rows of a `.jsonl` or `.jsonl.gz` file; skip blank lines.

    Raises:
        DataError: The file cannot be read, or a line is not a JSON object.
    """
    for number, values in read_jsonl(path):
        yield JsonRow(values, path, number)


def read_tsv(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Yield line number (from 1) and the wanted columns of a tab-separated file with a header line.

    Quotes are ordinary characters, as in BEIR's and the STS files. Blank lines are skipped.

    Raises:
        DataError: The file cannot be read, a column is missing, or a line is short.
    """
    positions: list[int] = []
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as lines:
            for number, line in enumerate(lines, start=1):
                cells = line.rstrip("\r\n").split("\t")
                if not positions:
                    missing = [name for name in columns if name not in cells]
                    if missing:
                        raise DataError(f"{path}:{number} has the header {cells}. Add the columns {missing}.")
                    positions = [cells.index(name) for name in columns]
                elif line.strip():
                    if len(cells) <= max(positions):
                        raise DataError(
                            f"{path}:{number} has {len(cells)} columns. Write {max(positions) + 1} or more."
                        )
                    yield number, tuple(cells[position] for position in positions)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error}). Check the path and the file.") from error


def read_mapping(path: Path) -> dict[str, str]:
    """Read a JSON file that maps names to strings, such as `instructions.json`.

    Raises:
        DataError: The file cannot be read or holds something else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as JSON ({error}). Check the path and the file.") from error
    if not isinstance(values, dict) or not all(isinstance(value, str) for value in values.values()):
        raise DataError(f"{path} does not map names to strings. Write one JSON object with strings as values.")
    return cast("dict[str, str]", values)


def content_revision(paths: Sequence[Path]) -> str:
    """Return a short hash over the bytes of some files, which identifies the data of a result."""
    digest = hashlib.sha256()
    for path in paths:
        try:
            digest.update(hashlib.sha256(path.read_bytes()).digest())
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error}). Check the path.") from error
    return digest.hexdigest()[:16]


# Evaluation sets bring test queries and nothing else, and a demonstration may never be a test query. So each set names
# one of the built-in banks (made of other data), or, where it has a training split, that split. The command line
# overrides both: `--instructions FILE.json`, `--bank SET=SOURCE`.

TRAIN_PAIRS = "train"
"""Demonstrations from a classification set's training split: two texts with the same label."""
TRAIN_LABELS = "train-labels"
"""Demonstrations from a classification set's training split: a text and the name of its label."""

SYMMETRIC_PAIRS = frozenset({"coco_captions_val2017", "newsgroup_same_topic", "snips_same_intent"})
"""Files of training pairs whose two sides are of one kind, both encoded as queries."""


@dataclass(frozen=True)
class SetEntry:
    """Instruction and demonstrations of an evaluation set.

    Args:
        instruction: The task in words.
        demonstrations: A built-in bank's name, the path of a bank folder or of a JSONL file, `TRAIN_PAIRS`,
            `TRAIN_LABELS`, or None when there are none.
    """

    instruction: str
    demonstrations: str | None


def _of_task(name: str) -> SetEntry:
    """Return a known task's instruction and bank."""
    task = get_task(name)
    return SetEntry(task.instruction, task.bank)


CATALOGUE: dict[str, SetEntry] = {
    # retrieval
    "manuals_git_apache": _of_task("docs"),
    "Cranfield": _of_task("papers"),
    "acl_title_abstract": SetEntry("Given the title of a paper, retrieve its abstract", "papers"),
    "nq_open_gold": _of_task("qa"),
    "wikitablequestions": SetEntry("Given a question, retrieve the table that answers it", "qa"),
    "LIMITSmall": _of_task("qa"),
    # reranking
    "TrecQA": SetEntry("Given a question, retrieve the sentence that answers it", "qa"),
    # semantic similarity
    "STSBenchmark": _of_task("sts"),
    "STS12": _of_task("sts"),
    "STS13": _of_task("sts"),
    "STS15": _of_task("sts"),
    "SICK-R": _of_task("sts"),
    # classification
    "Banking77": _of_task("intent"),
    "CLINC150": _of_task("intent"),
    "AmazonCounterfactual": SetEntry(
        "Given a sentence of a product review, identify whether it says what would have been but was not",
        TRAIN_PAIRS,
    ),
    # clustering
    "StackOverflowTitles_clustering": SetEntry("Given a message, retrieve a message on the same topic", "intent"),
}

_BY_KIND: dict[Kind, SetEntry] = {
    "retrieval": SetEntry(get_task("qa").instruction, None),
    "reranking": SetEntry(get_task("qa").instruction, None),
    "sts": _of_task("sts"),
    "classification": SetEntry("Given a text, identify its category", TRAIN_PAIRS),
    "clustering": SetEntry("Given a message, retrieve a message on the same topic", None),
}


def entry_for(name: str, kind: Kind) -> SetEntry:
    """Return a set's entry in the catalogue, or the default of its kind."""
    return CATALOGUE.get(name, _BY_KIND[kind])


@dataclass(frozen=True)
class Document:
    """Document of a retrieval corpus; encoded as title, a space, text."""

    id: str
    title: str
    text: str


@dataclass(frozen=True)
class RetrievalData:
    """Corpus, queries by id, and relevance grades of documents by query."""

    corpus: tuple[Document, ...]
    queries: Mapping[str, str]
    relevant: Mapping[str, Mapping[str, int]]


@dataclass(frozen=True)
class StsData:
    """Sentence pairs with a similarity score."""

    first: tuple[str, ...]
    second: tuple[str, ...]
    scores: tuple[float, ...]


@dataclass(frozen=True)
class ClassificationData:
    """Labelled texts of a training and a test split; labels are numbered, `label_names` has their names."""

    train: tuple[tuple[str, int], ...]
    test: tuple[tuple[str, int], ...]
    label_names: tuple[str, ...]


@dataclass(frozen=True)
class ClusteringData:
    """Texts with the number of their true cluster."""

    texts: tuple[str, ...]
    labels: tuple[int, ...]


@dataclass(frozen=True)
class RerankingData:
    """For each query its candidates: first the relevant ones, then the others."""

    queries: tuple[str, ...]
    positives: tuple[tuple[str, ...], ...]
    negatives: tuple[tuple[str, ...], ...]


SetData = RetrievalData | StsData | ClassificationData | ClusteringData | RerankingData


def evaluated_texts(data: SetData) -> frozenset[str]:
    """Return the texts of a set's test split, which may not be demonstrations."""
    if isinstance(data, RetrievalData):
        return frozenset(data.queries.values())
    if isinstance(data, StsData):
        return frozenset({*data.first, *data.second})
    if isinstance(data, ClassificationData):
        return frozenset(text for text, _ in data.test)
    return frozenset(data.texts if isinstance(data, ClusteringData) else data.queries)


@dataclass(frozen=True)
class LocalSet:
    """Evaluation set: the folder's name, its kind, a hash of its files, and its contents."""

    name: str
    kind: Kind
    revision: str
    data: SetData


def _either(folder: Path, stem: str) -> Path | None:
    """Return `stem.jsonl.gz` or `stem.jsonl` of a folder, whichever is there."""
    for name in (f"{stem}.jsonl.gz", f"{stem}.jsonl"):
        if (folder / name).is_file():
            return folder / name
    return None


def _detect(folder: Path) -> tuple[Kind, tuple[Path, ...]] | None:
    """Return a folder's kind and the files that make it up, or None."""
    corpus, queries = _either(folder, "corpus"), _either(folder, "queries")
    qrels = folder / "qrels" / "test.tsv"
    if corpus and queries and qrels.is_file():
        return "retrieval", (corpus, queries, qrels)
    train, test = _either(folder, "train"), _either(folder, "test")
    if train and test:
        return "classification", (train, test)
    clustering = _either(folder, "clustering")
    if clustering:
        return "clustering", (clustering,)
    reranking = _either(folder, "reranking")
    if reranking:
        return "reranking", (reranking,)
    if (folder / "test.tsv").is_file():
        return "sts", (folder / "test.tsv",)
    return None


def set_kind(folder: Path) -> Kind | None:
    """Return the kind of an evaluation set from its file names, or None for another folder."""
    found = _detect(folder)
    return found[0] if found else None


def find_local_sets(folder: Path) -> list[str]:
    """Return the names of the evaluation sets in a folder, by kind in the order of `KINDS`, then by name.

    Raises:
        DataError: The folder does not exist, or is an evaluation set itself.
    """
    if not folder.is_dir():
        raise DataError(f"No folder {folder}. Give --data the folder that holds the evaluation sets.")
    if _detect(folder):
        home = folder.resolve()
        raise DataError(
            f"{folder} is an evaluation set, not the folder that holds the sets. "
            f"Use --data {home.parent} --tasks {home.name}."
        )
    kinds = {entry.name: set_kind(entry) for entry in folder.iterdir() if entry.is_dir()}
    found = [(KINDS.index(kind), name) for name, kind in kinds.items() if kind is not None]
    return [name for _, name in sorted(found)]


def load_local_set(folder: Path) -> LocalSet:
    """Read an evaluation set.

    Args:
        folder: A folder in one of the layouts of this module's docstring.

    Raises:
        DataError: The folder has none of the layouts, or a file in it is malformed.
    """
    found = _detect(folder)
    if found is None:
        raise DataError(
            f"{folder} is not an evaluation set. It needs corpus, queries and qrels/test.tsv, or test.tsv, or train "
            "and test, or clustering, or reranking (.jsonl or .jsonl.gz)."
        )
    kind, paths = found
    loaders: dict[Kind, Callable[..., SetData]] = {
        "retrieval": _load_retrieval,
        "sts": _load_sts,
        "classification": _load_classification,
        "clustering": _load_clustering,
        "reranking": _load_reranking,
    }
    data = loaders[kind](*paths)
    return LocalSet(folder.resolve().name, kind, content_revision(paths), data)


def _load_retrieval(corpus_path: Path, queries_path: Path, qrels_path: Path) -> RetrievalData:
    corpus: dict[str, Document] = {}
    for row in read_rows(corpus_path):
        document = Document(row.text("_id"), row.text("title", ""), row.text("text"))
        if document.id in corpus:
            raise row.error(f'repeats the document id "{document.id}". Give every document its own id.')
        corpus[document.id] = document
    texts = {row.text("_id"): row.text("text") for row in read_rows(queries_path)}
    relevant: dict[str, dict[str, int]] = {}
    for number, (query, document_id, grade) in read_tsv(qrels_path, ("query-id", "corpus-id", "score")):
        if query not in texts or document_id not in corpus:
            raise DataError(f'{qrels_path}:{number} names an unknown query or document: "{query}", "{document_id}".')
        try:
            relevant.setdefault(query, {})[document_id] = int(grade)
        except ValueError:
            raise DataError(f'{qrels_path}:{number} has the score "{grade}". Write a whole number.') from None
    if not relevant:
        raise DataError(f"{qrels_path} has no judgements. Add a line below the header.")
    # Queries without a judgement have no score; leaving them out here saves encoding them.
    return RetrievalData(
        tuple(corpus.values()), {query: texts[query] for query in texts if query in relevant}, relevant
    )


def _load_sts(path: Path) -> StsData:
    first: list[str] = []
    second: list[str] = []
    scores: list[float] = []
    for number, (sentence1, sentence2, cell) in read_tsv(path, ("sentence1", "sentence2", "score")):
        try:
            score = float(cell)
        except ValueError:
            score = math.nan
        if not math.isfinite(score):
            raise DataError(f'{path}:{number} has the score "{cell}". Write a finite number.')
        first.append(sentence1)
        second.append(sentence2)
        scores.append(score)
    if len(scores) < 2:
        raise DataError(f"{path} has {len(scores)} pairs. A rank correlation needs at least 2.")
    return StsData(tuple(first), tuple(second), tuple(scores))


def _load_classification(train_path: Path, test_path: Path) -> ClassificationData:
    splits = [[(row.text("text"), row.label("label")) for row in read_rows(path)] for path in (train_path, test_path)]
    for rows, path in zip(splits, (train_path, test_path), strict=True):
        if not rows:
            raise DataError(f"{path} is empty. A classification set needs rows in both splits.")
    train_rows, test_rows = splits
    # Sorted as text, so that the numbers of labels do not depend on the order of the rows.
    names = sorted({str(label) for _, label in train_rows})
    numbers = {name: number for number, name in enumerate(names)}
    unknown = sorted({str(label) for _, label in test_rows} - numbers.keys())
    if unknown:
        raise DataError(f"{test_path} has labels that {train_path.name} lacks: {unknown}. Add training rows for them.")
    if len(names) < 2:
        raise DataError(f"{train_path} has one label, {names}. A classifier needs at least two.")
    train = tuple((text, numbers[str(label)]) for text, label in train_rows)
    test = tuple((text, numbers[str(label)]) for text, label in test_rows)
    return ClassificationData(train, test, tuple(names))


def _load_clustering(path: Path) -> ClusteringData:
    rows = [(row.text("text"), row.label("label")) for row in read_rows(path)]
    names = sorted({str(label) for _, label in rows})
    if len(names) < 2:
        raise DataError(f"{path} has {len(names)} labels. A clustering set needs at least two.")
    numbers = {name: number for number, name in enumerate(names)}
    return ClusteringData(tuple(text for text, _ in rows), tuple(numbers[str(label)] for _, label in rows))


def _load_reranking(path: Path) -> RerankingData:
    queries: list[str] = []
    positives: list[tuple[str, ...]] = []
    negatives: list[tuple[str, ...]] = []
    for row in read_rows(path):
        queries.append(row.text("query"))
        positives.append(row.texts("positive"))
        negatives.append(row.texts("negative"))
        if not positives[-1]:
            raise row.error('has an empty "positive". Give every query a relevant passage.')
    if not queries:
        raise DataError(f"{path} is empty. A reranking set needs at least one query.")
    return RerankingData(tuple(queries), tuple(positives), tuple(negatives))
