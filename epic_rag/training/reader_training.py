"""Training of a demonstration reader: gains of `epic_rag.reader`, fitted on tasks with many pairs.

A task is a file of pairs, or the pairs of one `source` of it (a manual). Its texts are embedded once, under a folder of
vectors, and a run that was stopped continues with the next task. An *episode* draws n demonstrations of a task (n
log-uniform) and some of its other queries, and ranks the right passages in a collection: the task's own passages, those
of several tasks, or those and other queries. Gains minimise InfoNCE over all episodes; near-duplicates of the right
passage are masked.

The moved query is linear in the gains, so an episode is stored as products of its directions with its candidates, and
fitting takes seconds.
"""

from __future__ import annotations

import hashlib
import io
import math
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from epic_rag.errors import DataError
from epic_rag.files import write_atomically
from epic_rag.reader import FEATURES, KNOTS, DemonstrationReader, prepare_features
from epic_rag.training.data import Pair, load_pairs

if TYPE_CHECKING:
    from epic_rag.encoder import EpicEncoder

__all__ = [
    "Episode",
    "ReaderTask",
    "ReaderTrainingOptions",
    "build_episodes",
    "fit_gains",
    "read_tasks",
    "train_reader",
]

Vectors = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]

_QUERIES = 48
_LEAST_ROWS = 8
_LEAST_PASSAGES = 100
_CANDIDATES = 200
_NEAR_DUPLICATE = 0.97
_TEMPERATURE = 0.04
_LARGE = 0.6
_FILE_WEIGHT = 2.5
_OTHER_TASKS = 4
_DOCUMENTS_OF_OTHERS = 300
_QUERIES_OF_OTHERS = 150


@dataclass(frozen=True)
class ReaderTrainingOptions:
    """Settings of a reader's training.

    Args:
        rows: Most pairs of a task that is a file.
        source_rows: Most pairs of a task that is one `source` of a file.
        sources: Tasks that are made of one file by its rows' `source`.
        least_rows: Pairs that a source needs to be a task.
        episodes: Number of episodes.
        largest: Most demonstrations in an episode.
        own: Share of episodes that are ranked in the task's own passages; half of the others have other queries in the
            collection, too.
        wrong: Share of episodes in which some pairs are wrong.
        steps: Steps of Adam.
        learning_rate: Its learning rate, which falls to zero along a cosine.
        smoothness: Weight of the squared differences of gains at neighbouring knots.
        decay: Weight of the squared gains of maps.
        harm: Factor of a loss that rises in an episode.
        seed: Seed of all draws.
    """

    rows: int = 1200
    source_rows: int = 320
    sources: int = 6
    least_rows: int = 300
    episodes: int = 700
    largest: int = 1400
    own: float = 0.3
    wrong: float = 0.15
    steps: int = 400
    learning_rate: float = 0.05
    smoothness: float = 0.1
    decay: float = 0.003
    harm: float = 1.5
    seed: int = 0


@dataclass(frozen=True)
class ReaderTask:
    """Vectors of a task's pairs.

    Attributes:
        name: The file, or the source.
        queries: (n, dim) zero-shot vectors of the queries.
        passages: (n, dim) vectors of the passages.
        bare_queries: (n, dim) vectors of the queries as documents.
        query_ids: (n,) equal for equal queries.
        passage_ids: (n,) equal for equal passages.
        groups: (n,) equal for rows of one group; None for a task without groups.
        weight: Share of episodes, relative to other tasks.
    """

    name: str
    queries: Vectors
    passages: Vectors
    bare_queries: Vectors
    query_ids: Labels
    passage_ids: Labels
    groups: Labels | None
    weight: float = 1.0

    def __len__(self) -> int:
        return len(self.queries)


@dataclass(frozen=True)
class Episode:
    """Products of directions and candidates: all that a loss needs.

    Attributes:
        scores: (queries, 1 + features, candidates): the query and each direction times each candidate; the right
            passage is candidate 0.
        gram: (queries, 1 + features, 1 + features): products of the query and the directions.
        masked: (queries, candidates): true where a candidate is right, too.
        n: Number of demonstrations.
        task: The task's name.
    """

    scores: Vectors
    gram: Vectors
    masked: npt.NDArray[np.bool_]
    n: int
    task: str


def build_episodes(tasks: Sequence[ReaderTask], options: ReaderTrainingOptions) -> Iterator[Episode]:
    """Draw episodes of tasks.

    Raises:
        DataError: If no task has pairs for queries and demonstrations.
    """
    usable = [task for task in tasks if len(task) >= _LEAST_ROWS]
    if not usable:
        raise DataError(f"No task has {_LEAST_ROWS} pairs. Give more pairs to train a reader on.")
    rng = np.random.default_rng(options.seed)
    share = np.array([task.weight for task in usable])
    made = 0
    while made < options.episodes:
        number = int(rng.choice(len(usable), p=share / share.sum()))
        others = [usable[other] for other in rng.permutation(len(usable))[:_OTHER_TASKS] if other != number]
        episode = _episode(usable[number], others, options, rng)
        if episode is not None:
            made += 1
            yield episode


def _episode(
    task: ReaderTask, others: Sequence[ReaderTask], options: ReaderTrainingOptions, rng: np.random.Generator
) -> Episode | None:
    order = rng.permutation(len(task))
    asked = min(_QUERIES, len(task) // 2)
    rows, rest = np.resize(order[:asked], _QUERIES), order[asked:]  # a small task's queries count several times
    n = int(math.exp(rng.uniform(0, math.log(min(options.largest, len(rest))))))
    shown = rest[:n]
    shown = shown[~np.isin(task.query_ids[shown], task.query_ids[rows])]
    if task.groups is None:
        shown = shown[~np.isin(task.passage_ids[shown], task.passage_ids[rows])]
    if not len(shown):
        return None
    queries, passages = task.queries[rows], task.passages[shown].copy()
    if len(shown) >= 8 and rng.random() < options.wrong:
        wrong = rng.permutation(len(shown))[: max(2, int(rng.choice([0.1, 0.25]) * len(shown)))]
        passages[wrong] = passages[np.roll(wrong, 1)]
    features, evidence = prepare_features(
        np.stack([task.queries[shown], passages, task.bare_queries[shown]], axis=1), leave_out=False
    )
    directions = np.zeros((len(rows), 1 + len(FEATURES), queries.shape[1]), dtype=np.float32)
    directions[:, 0] = queries
    directions[:, 1] = features.mean
    directions[:, 2] = -features.middle
    for place, linear in enumerate(features.maps, start=3):
        directions[:, place] = (queries - features.middle) @ linear
    directions[:, 1:] *= evidence.confidence

    collection = [task.passages]
    if rng.random() >= options.own and others:
        collection += [other.passages[rng.permutation(len(other))[:_DOCUMENTS_OF_OTHERS]] for other in others]
        if rng.random() < 0.5:
            collection += [other.bare_queries[rng.permutation(len(other))[:_QUERIES_OF_OTHERS]] for other in others]
            collection.append(task.bare_queries[rest[n : n + _QUERIES_OF_OTHERS]])
    documents = np.concatenate(collection)
    right = task.passages[rows] @ documents.T > _NEAR_DUPLICATE
    right[:, : len(task)] |= task.query_ids[rows][:, None] == task.query_ids
    if task.groups is not None:
        right[:, : len(task)] |= task.groups[rows][:, None] == task.groups
    # Candidates are what zero-shot and the mean difference rank first, and the right passage before them.
    moved = queries + 0.7 * directions[:, 1]
    moved /= np.linalg.norm(moved, axis=1, keepdims=True)
    cosines = np.maximum(queries @ documents.T, moved @ documents.T)
    cosines[right] = -2.0
    cosines[np.arange(len(rows)), rows] = 2.0
    width = min(_CANDIDATES, len(documents))
    kept = np.argpartition(-cosines, width - 1, axis=1)[:, :width]
    first = kept == rows[:, None]
    kept[first] = kept[:, 0]
    kept[:, 0] = rows
    masked = np.take_along_axis(right, kept, axis=1)
    masked[:, 0] = False
    scores = np.einsum("qkd,qcd->qkc", directions, documents[kept], optimize=True)
    if width < _CANDIDATES:
        extra = ((0, 0), (0, _CANDIDATES - width))
        scores, masked = np.pad(scores, ((0, 0), *extra)), np.pad(masked, extra, constant_values=True)
    gram = np.einsum("qkd,qld->qkl", directions, directions, optimize=True)
    return Episode(scores.astype(np.float32), gram.astype(np.float32), masked, len(shown), task.name)


def fit_gains(episodes: Sequence[Episode], options: ReaderTrainingOptions) -> tuple[DemonstrationReader, float, float]:
    """Fit gains by InfoNCE.

    Returns:
        The reader, and the mean losses without demonstrations and with the fitted gains.
    """
    scores = torch.from_numpy(np.stack([episode.scores for episode in episodes]))  # (e, q, 1 + k, c)
    gram = torch.from_numpy(np.stack([episode.gram for episode in episodes]))
    masked = torch.from_numpy(np.stack([episode.masked for episode in episodes]))
    places = np.log(np.array(KNOTS, dtype=np.float64))
    # Each row interpolates the gains at the knots for one episode's n.
    mixing = np.stack([[np.interp(np.log(e.n), places, unit) for unit in np.eye(len(KNOTS))] for e in episodes])
    weights = torch.from_numpy(mixing.astype(np.float32))  # (e, knots)

    def loss_of(gains: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        factors = torch.cat([torch.ones(len(rows), 1), weights[rows] @ gains.T], dim=1)  # (e, 1 + k)
        length = torch.einsum("ek,eqkl,el->eq", factors, gram[rows], factors).clamp(min=1e-6).sqrt()
        cosines = torch.einsum("ek,eqkc->eqc", factors, scores[rows]) / length[..., None]
        logits = (cosines / _TEMPERATURE).masked_fill(masked[rows], -1e4)
        return (torch.logsumexp(logits, dim=2) - logits[..., 0]).mean(dim=1)  # (e,)

    generator = torch.Generator().manual_seed(options.seed)
    gains = torch.zeros(len(FEATURES), len(KNOTS))
    parts = [torch.arange(start, min(start + 64, len(episodes))) for start in range(0, len(episodes), 64)]
    with torch.no_grad():
        before = torch.cat([loss_of(gains, part) for part in parts])
        gains[0] = 0.5
    gains.requires_grad_(True)
    optimizer = torch.optim.Adam([gains], lr=options.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    for _ in range(options.steps):
        rows = torch.randperm(len(episodes), generator=generator)[:64]
        rough = (gains[:, 1:] - gains[:, :-1]).square().mean()
        change = loss_of(gains, rows) - before[rows]
        # A reader that is safe to switch on: harm counts several times, and no easy task decides alone.
        worth = torch.where(change > 0, options.harm * change, _LARGE * torch.tanh(change / _LARGE)).mean()
        loss = worth + options.smoothness * rough + options.decay * gains[1:].square().mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        after = torch.cat([loss_of(gains, part) for part in parts])
    return DemonstrationReader(gains.detach().numpy()), float(before.mean()), float(after.mean())


def read_tasks(
    data: Path, options: ReaderTrainingOptions, *, tasks: Sequence[str] | None = None, excluded: Sequence[str] = ()
) -> dict[str, tuple[list[Pair], float]]:
    """Read the pairs of a folder's files, or of one file; nothing is embedded.

    A file whose rows name two or more sources with enough pairs is one task for each of its largest sources.

    Args:
        data: A folder of `.jsonl` and `.jsonl.gz` files, or one such file.
        options: The settings.
        tasks: Files to use, by name; None for all.
        excluded: Files and sources to leave out, by name.

    Returns:
        Task -> its pairs (at most `options.rows`, drawn by the seed) and its weight.

    Raises:
        DataError: If there is no file, or a line is malformed.
    """
    files = sorted(data.glob("*.jsonl*")) if data.is_dir() else [data]
    by_name = {path.name.removesuffix(".gz").removesuffix(".jsonl"): path for path in files}
    missing = [name for name in tasks or () if name not in by_name]
    if missing or not by_name:
        raise DataError(f"{data} has no file {missing[0] if missing else '*.jsonl'}. Check --data and --tasks.")
    found: dict[str, tuple[list[Pair], float]] = {}

    def take(name: str, rows: list[Pair], most: int, weight: float) -> None:
        found[name] = random.Random(f"{options.seed}-{name}").sample(rows, min(len(rows), most)), weight

    for name, path in by_name.items():
        if name in excluded or (tasks is not None and name not in tasks):
            continue
        rows = load_pairs(path)[0]
        counts = Counter(row.source for row in rows if row.source is not None)
        sources = [source for source, count in counts.most_common() if count >= options.least_rows]
        sources = [source for source in sources if source not in excluded][: options.sources]
        if len(sources) >= 2:
            for source in sources:
                take(f"{name}#{source}", [row for row in rows if row.source == source], options.source_rows, 1.0)
        elif len({row.positive for row in rows}) >= min(_LEAST_PASSAGES, len(rows)):
            take(name, rows, options.rows, _FILE_WEIGHT)
    return found


def embed_task(
    encoder: EpicEncoder, name: str, rows: Sequence[Pair], weight: float, *, instruction: str, cache: Path | None
) -> ReaderTask:
    """Embed a task's texts, or read their vectors from a folder that an earlier run has filled.

    Args:
        encoder: The model.
        name: The task's name.
        rows: Its pairs.
        weight: Its share of episodes.
        instruction: Instruction of the queries; "" for none.
        cache: Folder of vectors; None keeps nothing.
    """
    content = hashlib.sha256(instruction.encode())
    for row in rows:
        content.update(hashlib.sha256(row.query.encode()).digest() + hashlib.sha256(row.positive.encode()).digest())
    precision = str(encoder.dtype).removeprefix("torch.")
    file = None if cache is None else cache / f"{encoder.fingerprint}-{precision}" / f"{content.hexdigest()[:24]}.npz"
    vectors: dict[str, Vectors] = {}
    if file is not None and file.is_file():
        with np.load(file, allow_pickle=False) as stored:
            vectors = {key: stored[key].astype(np.float32) for key in stored.files}
    if not vectors:
        queries, positives = [row.query for row in rows], [row.positive for row in rows]
        # Equal texts are embedded once: a label can be the passage of a thousand rows.
        unique = list(dict.fromkeys(positives))
        place = {text: number for number, text in enumerate(unique)}
        width = encoder.width
        vectors = {
            "queries": encoder.encode_query(queries, instruction=instruction, truncate_dim=width),
            "passages": encoder.encode_document(unique, truncate_dim=width)[[place[text] for text in positives]],
            "bare_queries": encoder.encode_document(queries, truncate_dim=width),
        }
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            stream = io.BytesIO()
            np.savez(stream, **{key: value.astype(np.float16) for key, value in vectors.items()})  # type: ignore[arg-type]
            write_atomically(file, stream.getvalue())
    groups = None if all(row.group is None for row in rows) else _numbered([row.group for row in rows])
    return ReaderTask(
        name,
        vectors["queries"],
        vectors["passages"],
        vectors["bare_queries"],
        _numbered([" ".join(row.query.split()).casefold() for row in rows]),
        _numbered([" ".join(row.positive.split()) for row in rows]),
        groups,
        weight,
    )


def _numbered(keys: Sequence[str | None]) -> Labels:
    """Return the same number for equal keys; None is equal to nothing."""
    numbers: dict[str, int] = {}
    return np.array(
        [-1 - row if key is None else numbers.setdefault(key, len(numbers)) for row, key in enumerate(keys)],
        dtype=np.int64,
    )


def train_reader(
    encoder: EpicEncoder,
    data: Path,
    options: ReaderTrainingOptions,
    *,
    tasks: Sequence[str] | None = None,
    excluded: Sequence[str] = (),
    cache: Path | None = None,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> tuple[DemonstrationReader, dict[str, object]]:
    """Fit a reader for an encoder.

    Args:
        encoder: The model; its weights do not change.
        data: As in `read_tasks`.
        options: The settings.
        tasks: As in `read_tasks`.
        excluded: As in `read_tasks`.
        cache: Folder of vectors, from which a stopped run continues.
        progress: Called with a stage, the units done and the units in all.

    Returns:
        The reader, and a record: names of the tasks, mean InfoNCE without demonstrations and with the reader.

    Raises:
        DataError: If the data cannot be used.
    """
    planned = read_tasks(data, options, tasks=tasks, excluded=excluded)
    embedded = []
    progress("embed", 0, len(planned))
    for number, (name, (rows, weight)) in enumerate(planned.items(), start=1):
        # Users of a bank without an instruction get the default one, and gains differ little with another.
        instruction = encoder.default_instruction or ""
        embedded.append(embed_task(encoder, name, rows, weight, instruction=instruction, cache=cache))
        progress("embed", number, len(planned))
    episodes = []
    for number, episode in enumerate(build_episodes(embedded, options), start=1):
        episodes.append(episode)
        progress("episodes", number, options.episodes)
    reader, before, after = fit_gains(episodes, options)
    return reader, {"tasks": list(planned), "loss_without": before, "loss": after}
