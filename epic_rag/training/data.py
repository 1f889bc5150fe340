"""Training pairs: files and tasks, and what a batch of them is (`epic_rag.training.sampling` draws one).

A file is JSON lines of {"query", "positive", "negatives"?, "group"?}, gzipped or not, one file a task. "passage" will
do for "positive", as in a bank's file. Rows with one group, or with one positive, are no negatives of each other.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from epic_rag.errors import DataError
from epic_rag.training.config import TrainingConfig

__all__ = [
    "SOURCES",
    "Pair",
    "PairDataset",
    "Source",
    "TaskRows",
    "TrainingBatch",
    "drawn_demonstrations",
    "load_datasets",
    "load_pairs",
    "take_banks",
]


# A source with fewer rows would show the same demonstrations again and again.
_SOURCE_ROWS = 32


@dataclass(frozen=True)
class Pair:
    """One training row."""

    query: str
    positive: str
    negatives: tuple[str, ...] = ()
    group: str | None = None
    source: str | None = None


@dataclass
class PairDataset:
    """The rows of one task.

    Attributes:
        name: Name of the task.
        rows: Training rows.
        instruction: What to retrieve.
        symmetric: Whether positives are encoded like queries.
        weight: Multiplies the task's share of the mix.
        held_out: Rows that are kept for evaluation, never trained on.
        label_like: Whether rows share a few targets (labels, topics). See `sampling.allowed`.
        sha256: Hash of the file, for the training record.
        sources: How many sources share a task's part of a step; 0 draws its rows as one.
        by_source: Rows of each source that is large enough to demonstrate for itself; made by `load_datasets`.
    """

    name: str
    rows: list[Pair]
    instruction: str | None = None
    symmetric: bool = False
    weight: float = 1.0
    held_out: list[Pair] = field(default_factory=list)
    sha256: str = ""
    sources: int = 0
    by_source: dict[str, list[Pair]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        targets = {row.group if row.group is not None else row.positive for row in [*self.rows, *self.held_out]}
        self.label_like = len(targets) * 10 <= len(self.rows)


@dataclass(frozen=True)
class TaskRows:
    """One task's part of a batch.

    Attributes:
        name: Name of the task.
        instruction: The instruction of these rows; None for none.
        symmetric: Whether positives are encoded like queries.
        rows: The pairs.
        demonstrations: For each row, positions (within `rows`) of its demonstrations, k of them.
        mismatched: For each row, demonstrations that are deliberately wrong, as (query, positive) positions in the
            whole batch; empty where they are right. Empty for a batch without any.
    """

    name: str
    instruction: str | None
    symmetric: bool
    rows: tuple[Pair, ...]
    demonstrations: tuple[tuple[int, ...], ...]
    mismatched: tuple[tuple[tuple[int, int], ...], ...] = ()


@dataclass(frozen=True)
class TrainingBatch:
    """The tasks of one step."""

    tasks: tuple[TaskRows, ...]

    @property
    def pairs(self) -> int:
        """Number of pairs."""
        return sum(len(task.rows) for task in self.tasks)


def load_pairs(path: Path) -> tuple[list[Pair], str]:
    """Read a file of pairs.

    Returns:
        The pairs and the SHA-256 of the file.

    Raises:
        DataError: If the file is missing or a line is malformed; names file and line.
    """
    pairs: list[Pair] = []
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error}); check the data folder of the configuration") from error
    # Not splitlines(): a text may hold U+2028 and its kin, which JSON does not escape.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            pairs.append(_parse(line, path, number))
    if not pairs:
        raise DataError(f'{path} has no rows; each line is {{"query": "...", "positive": "..."}}')
    return pairs, hashlib.sha256(raw).hexdigest()


def load_datasets(config: TrainingConfig) -> tuple[list[PairDataset], list[PairDataset]]:
    """Load the mix and the evaluation tasks.

    Held-out rows are the first `evaluation_rows` queries of a shuffle by task name; every row that shares a positive
    or a group with one of them leaves training too (label-like tasks excepted, where all rows do).

    Returns:
        Training datasets; evaluation datasets (those with held-out rows), which are the former where a task is in
        both.

    Raises:
        DataError: If a file is missing or malformed, or has too few rows to train on.
    """
    folder = Path(config.data)
    instructions = _instructions(folder)
    loaded: dict[str, PairDataset] = {}
    for name in dict.fromkeys([*config.tasks, *config.evaluation_tasks]):
        entry = config.tasks.get(name)
        rows, digest = load_pairs(_find(folder, name))
        dataset = PairDataset(
            name=name,
            rows=rows,
            instruction=(entry.instruction if entry else None) or instructions.get(name, config.default_instruction),
            symmetric=entry.symmetric if entry else False,
            weight=entry.weight if entry else 0.0,
            sha256=digest,
            sources=entry.sources if entry else 0,
        )
        if name in config.evaluation_tasks and config.evaluation_rows:
            _hold_out(dataset, config.evaluation_rows)
        if name in config.tasks and len(dataset.rows) < 2:
            raise DataError(
                f"{name} has {len(rows)} rows, of which {len(dataset.rows)} are left for training beside "
                f"{len(dataset.held_out)} held-out ones; in-batch negatives need at least 2: add rows, or take it out "
                "of evaluation_tasks"
            )
        if dataset.sources:
            _group_by_source(dataset)
        loaded[name] = dataset
    evaluated = [loaded[name] for name in config.evaluation_tasks]
    return [loaded[name] for name in config.tasks], [dataset for dataset in evaluated if dataset.held_out]


def _hold_out(dataset: PairDataset, count: int) -> None:
    order = list(range(len(dataset.rows)))
    random.Random(f"held-out-{dataset.name}").shuffle(order)
    held = order[: min(count, len(order) // 2)]
    dataset.held_out = [dataset.rows[row] for row in held]
    taken = set(held)
    if not dataset.label_like:
        positives = {row.positive for row in dataset.held_out}
        groups = {row.group for row in dataset.held_out if row.group is not None}
        taken |= {index for index, row in enumerate(dataset.rows) if row.positive in positives or row.group in groups}
    dataset.rows = [row for index, row in enumerate(dataset.rows) if index not in taken]


def _group_by_source(dataset: PairDataset) -> None:
    groups: dict[str, list[Pair]] = {}
    for row in dataset.rows:
        if row.source is not None:
            groups.setdefault(row.source, []).append(row)
    dataset.by_source = {name: rows for name, rows in sorted(groups.items()) if len(rows) >= _SOURCE_ROWS}
    if len(dataset.by_source) < dataset.sources:
        raise DataError(
            f"{dataset.name} has {len(dataset.by_source)} sources of {_SOURCE_ROWS} rows or more, `sources` asks for "
            f'{dataset.sources} in a step; give its rows a "source", or set `sources` to 0'
        )


def _instructions(folder: Path) -> Mapping[str, str]:
    file = folder / "instructions.json"
    if not file.is_file():
        return {}
    try:
        data = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file} is not valid JSON ({error}); mend it") from error
    if not isinstance(data, dict):
        raise DataError(f'{file} holds a {type(data).__name__}; write {{"task": "instruction", ...}}')
    return {str(key): str(value) for key, value in data.items()}


def _find(folder: Path, name: str) -> Path:
    for suffix in (".jsonl.gz", ".jsonl"):
        if (folder / f"{name}{suffix}").is_file():
            return folder / f"{name}{suffix}"
    there = sorted(file.name.split(".")[0] for file in folder.glob("*.jsonl*")) if folder.is_dir() else []
    raise DataError(
        f"no file {name}.jsonl or {name}.jsonl.gz in {folder}, which has {', '.join(there) or 'none'}; "
        "check `tasks` and `data` of the configuration"
    )


def _parse(line: str, path: Path, number: int) -> Pair:
    try:
        row: dict[str, Any] = json.loads(line)
        query, positive = row["query"], row["positive"] if "positive" in row else row["passage"]
        negatives, group = row.get("negatives") or [], row.get("group")
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f'{path}:{number} is not {{"query": "...", "positive": "..."}} ({type(error).__name__}: {error}); '
            "mend or delete the line"
        ) from error
    # A string would pass for a sequence of one-letter texts.
    if not isinstance(negatives, list):
        raise DataError(f'{path}:{number} has "negatives" that are no list; write {{"negatives": ["..."]}}')
    if not all(_is_text(text) for text in (query, positive, *negatives)):
        raise DataError(
            f"{path}:{number} has a text that is empty, no string or no valid Unicode; mend or delete the line"
        )
    source = row.get("source")
    return Pair(
        query,
        positive,
        tuple(negatives),
        None if group is None else str(group),
        None if source is None else str(source),
    )


def _is_text(value: object) -> bool:
    if not isinstance(value, str) or not value.strip():
        return False
    try:
        # JSON can spell half of a surrogate pair, which no tokenizer takes.
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


# --- from sources
# Where the training files of the shipped recipes come from, for the model card.


@dataclass(frozen=True)
class Source:
    """A training file.

    Attributes:
        content: What a row is.
        origin: Where the texts come from.
        licence: Licence of the texts, as their publisher states it.
    """

    content: str
    origin: str
    licence: str


_MANUALS = "217 documentation packages of Debian 12 main"
_EACH_ITS_OWN = (
    "each package's own: BSD, MIT, Apache, PSF, PostgreSQL, GPL, LGPL, MPL, CC BY-SA, GFDL without invariant sections"
)
_NEWSGROUPS = "20 Newsgroups, training part of the split by date"

SOURCES = {
    "acl_title_abstract": Source(
        "paper title → abstract", "ACL Anthology", "CC BY 4.0 from 2016 on, CC BY-NC-SA 3.0 before"
    ),
    "climate_fever": Source("claim → evidence sentence, with hard negatives", "Climate-FEVER", "not stated"),
    "coco_captions_val2017": Source("caption → caption of the same picture", "MS COCO val2017", "CC BY 4.0"),
    "debian_descriptions": Source("short → long package description", "Debian 12 package metadata", "free"),
    "docs_questions": Source("templated question → documentation section", _MANUALS, _EACH_ITS_OWN),
    "docs_sections": Source("heading path → documentation section", _MANUALS, _EACH_ITS_OWN),
    "foldoc": Source("computing term → definition", "Free On-line Dictionary of Computing", "GFDL"),
    "imdb_sentiment": Source("review → sentiment", "Large Movie Review Dataset, training part", "research use"),
    "medquad": Source("medical question → answer", "MedQuAD", "CC BY 4.0"),
    "newsgroup_same_topic": Source("message → message of the topic", _NEWSGROUPS, "public"),
    "newsgroup_topic": Source("message → name of its topic", _NEWSGROUPS, "public"),
    "nl2bash": Source("description → shell command", "NL2Bash", "MIT"),
    "python_docstring_code": Source(
        "first docstring paragraph → Python function", "48 PyPI packages", "BSD, MIT, Apache-2.0"
    ),
    "scitldr": Source("one-sentence summary → abstract", "SciTLDR-A", "Apache-2.0"),
    "snips_intent": Source("command → intent", "SNIPS", "CC0"),
    "snips_same_intent": Source("command → command with the intent", "SNIPS", "CC0"),
    "squad_sentence": Source(
        "question → sentence with the answer, lower-cased", "SQuAD 1.1, nqg split", "CC BY-SA 4.0"
    ),
    "tldr_pages": Source("description → command", "tldr-pages", "CC BY 4.0"),
    "wiki_title_passage": Source("article title → passage", "Wikipedia, sample of 2WikiMultiHop", "CC BY-SA"),
    "wikitablequestions": Source("question → table as text", "WikiTableQuestions", "CC BY-SA 4.0"),
    "wordnet_gloss": Source("words of a synset → gloss", "WordNet 3.0", "WordNet licence"),
}


# --- from bank
# Demonstrations from a fixed pool: `demonstration_source: bank`.
#
# Each task's pool is a few of its rows, drawn once by the seed and taken out of the training pairs. A step encodes the
# ones that it shows beside the batch and shows the same ones, in the same order, to all rows of the task: what a user
# does with a bank. With `demonstration_source: batch` every row is shown other rows of the batch instead, at no cost.


def take_banks(datasets: Sequence[PairDataset], config: TrainingConfig) -> dict[str, tuple[Pair, ...]]:
    """Take each task's pool out of its training rows.

    Rows that share a query, a positive or a group with one of the pool leave training too, because the pool would show
    their answer. In label-like tasks they stay, as do demonstrations with the row's own label there.

    Args:
        datasets: Loaded tasks; their `rows` shrink.
        config: Its seed decides which rows.

    Returns:
        Task -> its pool, `bank_size` rows.

    Raises:
        DataError: If fewer than two rows would be left to train on.
    """
    banks: dict[str, tuple[Pair, ...]] = {}
    for dataset in datasets:
        order = list(range(len(dataset.rows)))
        random.Random(f"{config.seed}-bank-{dataset.name}").shuffle(order)
        taken = set(order[: config.bank_size])
        bank = tuple(dataset.rows[index] for index in order[: config.bank_size])
        if not dataset.label_like:
            known = {key for row in bank for key in _keys(row)}
            taken |= {index for index, row in enumerate(dataset.rows) if not known.isdisjoint(_keys(row))}
        left = [row for index, row in enumerate(dataset.rows) if index not in taken]
        if len(left) < 2:
            raise DataError(
                f"{dataset.name} has {len(dataset.rows)} rows, of which a bank of {config.bank_size} leaves "
                f"{len(left)} for training, and in-batch negatives need at least 2; lower bank_size, add rows, or set "
                "demonstration_source to batch"
            )
        dataset.rows = left
        banks[dataset.name] = bank
    return banks


def drawn_demonstrations(
    banks: Mapping[str, Sequence[Pair]], batch: TrainingBatch, config: TrainingConfig, step: int
) -> list[tuple[Pair, ...]]:
    """What a step shows: for each task's part of the batch k ~ Uniform{0..K} rows of its pool.

    A function of configuration and step alone, as the batch is.
    """
    rng = random.Random(f"{config.seed}-{step}-bank")
    shown = []
    for task in batch.tasks:
        pool = banks[task.name]
        k = min(rng.randint(0, config.max_demonstrations), len(pool)) if config.strategy != "none" else 0
        shown.append(tuple(rng.sample(pool, k)))
    return shown


def _keys(row: Pair) -> list[tuple[str, str]]:
    keys = [("query", row.query), ("positive", row.positive)]
    return keys if row.group is None else [*keys, ("group", row.group)]
