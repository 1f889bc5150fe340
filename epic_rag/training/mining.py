"""Hard negatives for training pairs: passages that resemble the answer but are not one.

    rank the corpus for each query by the encoder's cosine
    drop likely false negatives: a score close to, or above, the positive's
    drop known answers: own positive, positives of the same query or group, equal texts, the query
    take the best of the rest, or draw among them

The first two steps are `sentence_transformers.util.mine_hard_negatives`. The second is positive-aware mining
(NV-Retriever, arXiv 2407.15831): many of the highest-ranked passages are unlabelled answers, and a model that is
trained against them learns to reject answers.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import ConfigDict, Field, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from epic_rag.encoder import EpicEncoder
from epic_rag.errors import ConfigError, DataError, MissingExtraError
from epic_rag.files import read_jsonl, write_atomically
from epic_rag.training.config import first_problem
from epic_rag.training.data import Pair, load_instructions, load_pairs

__all__ = ["MiningOptions", "MiningReport", "mine_file", "mine_negatives"]

_Count = Annotated[int, Field(ge=1)]


@dataclass(frozen=True, config=ConfigDict(allow_inf_nan=False))
class MiningOptions:
    """Settings of mining.

    Attributes:
        negatives: Negatives that a row should have; existing ones count, and are kept.
        depth: Number of ranks that are looked at.
        skip_top: Number of first ranks to skip.
        margin: Drop candidates whose cosine exceeds this share of the positive's; None keeps them.
        absolute_margin: Drop candidates whose cosine exceeds the positive's minus this; None keeps them. Where both
            are set, the stricter one holds.
        sampling: "top" takes the best candidates, "random" draws among all of them.
        seed: Of the draws.
        symmetric: True if documents are encoded like queries.
        instruction: Instruction of the queries, as in training; None takes the encoder's default, "" none.

    Raises:
        ConfigError: If a value cannot work.
    """

    negatives: _Count = 7
    depth: _Count = 100
    skip_top: Annotated[int, Field(ge=0)] = 0
    margin: Annotated[float, Field(gt=0, le=1)] | None = 0.95
    absolute_margin: Annotated[float, Field(ge=0, le=2)] | None = None
    sampling: Literal["top", "random"] = "top"
    seed: int = 0
    symmetric: bool = False
    instruction: str | None = None

    @model_validator(mode="wrap")
    @classmethod
    def _one_line(cls, values: Any, handler: Any) -> Any:
        try:
            return handler(values)
        except ValidationError as error:
            raise ConfigError(first_problem(error)) from None

    @model_validator(mode="after")
    def _check(self) -> MiningOptions:
        if self.depth - self.skip_top < self.negatives:
            raise ConfigError(
                f"depth is {self.depth} and skip_top {self.skip_top}, too few ranks for {self.negatives} negatives. "
                f"Raise depth to {self.skip_top + self.negatives} or more."
            )
        return self


@dataclass(frozen=True)
class MiningReport:
    """Counts of mining.

    Attributes:
        rows: Number of rows.
        documents: Number of different texts in the corpus.
        mined: Number of negatives added.
        short: Number of rows with fewer negatives than wanted.
    """

    rows: int
    documents: int
    mined: int
    short: int

    def to_dict(self) -> dict[str, int]:
        """Return plain values, for JSON."""
        return asdict(self)


def mine_negatives(
    pairs: Sequence[Pair],
    encoder: EpicEncoder,
    options: MiningOptions | None = None,
    *,
    corpus: Sequence[str | tuple[str, str]] = (),
    show_progress: bool = False,
) -> tuple[list[tuple[str, ...]], MiningReport]:
    """Find hard negatives.

    A negative of a row is never its positive, a positive of a row with the same query or group, the query itself, or
    a text that equals one of these but for case and spacing.

    Args:
        pairs: Rows of one task.
        encoder: Ranks the documents.
        options: Settings; None takes the defaults.
        corpus: Candidates besides the positives of all rows: texts, or (title, text) tuples, which are encoded as
            title, a space, text.
        show_progress: True to draw progress bars.

    Returns:
        For each row its negatives (existing ones, then the mined ones by rank), and counts. The same arguments give
        the same negatives.

    Raises:
        DataError: If there are no rows.
        MissingExtraError: If sentence-transformers or datasets is not installed.
    """
    options = options or MiningOptions()
    if not pairs:
        raise DataError("There are no rows to mine for. Give pairs of a query and its positive.")
    # A document with a title is also known by its bare text: a pair's positive may lack the title.
    bare: dict[str, str] = {}
    texts: dict[str, str] = {}
    for entry in [*(pair.positive for pair in pairs), *corpus]:
        title, text = ("", entry) if isinstance(entry, str) else entry
        whole = f"{title} {text}".strip()
        texts.setdefault(_key(whole), whole)
        bare.setdefault(_key(whole), _key(text))
    ranked = _rank(pairs, list(texts.values()), encoder, options, show_progress)

    of_query: dict[str, set[str]] = {}
    of_group: dict[str | None, set[str]] = {}
    for pair in pairs:
        of_query.setdefault(_key(pair.query), {_key(pair.query)}).add(_key(pair.positive))
        of_group.setdefault(pair.group, set()).add(_key(pair.positive))
    of_group[None] = set()
    negatives: list[tuple[str, ...]] = []
    for row, pair in enumerate(pairs):
        excluded = of_query[_key(pair.query)] | of_group[pair.group] | {_key(text) for text in pair.negatives}
        found = [
            text
            for text in ranked.get(pair.query, ())
            if _key(text) not in excluded and bare[_key(text)] not in excluded
        ]
        wanted = max(0, options.negatives - len(pair.negatives))
        if options.sampling == "random" and len(found) > wanted:
            places = random.Random(f"{options.seed}-{row}").sample(range(len(found)), wanted)
            found = [found[place] for place in sorted(places)]
        negatives.append((*pair.negatives, *found[:wanted]))
    report = MiningReport(
        rows=len(pairs),
        documents=len(texts),
        mined=sum(map(len, negatives)) - sum(len(pair.negatives) for pair in pairs),
        short=sum(len(found) < options.negatives for found in negatives),
    )
    return negatives, report


def _key(text: str) -> str:
    """Return a text without regard to case and spacing."""
    return " ".join(text.split()).casefold()


def _rank(
    pairs: Sequence[Pair], texts: list[str], encoder: EpicEncoder, options: MiningOptions, show_progress: bool
) -> dict[str, list[str]]:
    """Return for each query all candidates between `skip_top` and `depth` that the margins keep, best first."""
    try:
        from datasets import Dataset  # type: ignore[import-untyped]
        from sentence_transformers.util import mine_hard_negatives
    except ImportError as error:
        raise MissingExtraError(error.name or "sentence-transformers", "train", "mining hard negatives") from error
    rows = Dataset.from_dict({"query": [pair.query for pair in pairs], "positive": [pair.positive for pair in pairs]})
    with contextlib.ExitStack() as stack:
        if not show_progress:
            # The function draws progress bars on stderr whatever its arguments.
            stack.enter_context(contextlib.redirect_stderr(stack.enter_context(open(os.devnull, "w"))))
        mined = mine_hard_negatives(
            rows,
            _SentenceTransformer(encoder, options, show_progress),  # type: ignore[arg-type]
            corpus=texts,
            range_min=options.skip_top,
            range_max=options.depth,
            num_negatives=options.depth - options.skip_top,
            relative_margin=None if options.margin is None else 1 - options.margin,
            absolute_margin=options.absolute_margin,
            output_format="labeled-list",
            verbose=False,
        )
    ranked: dict[str, list[str]] = {}
    for row in mined:
        # The first text of a list is the positive.
        ranked.setdefault(row["query"], row["positive"][1:])
    return ranked


class _SentenceTransformer:
    """The methods of a SentenceTransformer that mining calls, on an `EpicEncoder`."""

    device = torch.device("cpu")

    def __init__(self, encoder: EpicEncoder, options: MiningOptions, show_progress: bool) -> None:
        self._encoder = encoder
        self._options = options
        self._show_progress = show_progress

    def encode_query(self, texts: list[str], **_: Any) -> npt.NDArray[np.float32]:
        return self._encoder.encode_query(
            texts, instruction=self._options.instruction, show_progress=self._show_progress
        )

    def encode_document(self, texts: list[str], **_: Any) -> npt.NDArray[np.float32]:
        if self._options.symmetric:
            return self.encode_query(texts)
        return self._encoder.encode_document(texts, show_progress=self._show_progress)

    def similarity(self, left: Any, right: Any) -> torch.Tensor:
        return torch.as_tensor(left) @ torch.as_tensor(right).T

    def similarity_pairwise(self, left: Any, right: Any) -> torch.Tensor:
        return (torch.as_tensor(left) * torch.as_tensor(right)).sum(dim=-1)


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

    Rows stay in order and keep all their keys; only "negatives" grows. `out` may be `path` itself; it is replaced when
    all rows are mined.

    Args:
        path: JSON lines as for training, gzipped or not.
        out: The file to write; gzipped if its name ends in `.gz`.
        options: Settings; None takes the defaults. Without an instruction, the one in `instructions.json` beside the
            file counts, as in training.
        model: An encoder, or an argument of `EpicEncoder.from_pretrained`.
        corpus: JSON lines of {"text": ...} with an optional "title", such as a BEIR corpus: candidates besides the
            positives of all rows.
        show_progress: True to draw progress bars.

    Raises:
        DataError: If a file is missing or malformed, or `out` cannot be written.
        CheckpointError: If the model does not load.
        MissingExtraError: If sentence-transformers or datasets is not installed.
    """
    source, target = Path(path).expanduser(), Path(out).expanduser()
    options = options or MiningOptions()
    # All files are checked before hours of work.
    pairs, _ = load_pairs(source)
    documents = [] if corpus is None else list(_read_corpus(Path(corpus).expanduser()))
    _require_writable(target)
    if options.instruction is None:
        name = source.name.removesuffix(".gz").removesuffix(".jsonl")
        options = replace(options, instruction=load_instructions(source.parent).get(name))
    encoder = model if isinstance(model, EpicEncoder) else EpicEncoder.from_pretrained(model)
    mined, report = mine_negatives(pairs, encoder, options, corpus=documents, show_progress=show_progress)
    lines = []
    for (_, row), negatives in zip(read_jsonl(source), mined, strict=True):
        line = json.dumps({**row, "negatives": list(negatives)} if negatives else row, ensure_ascii=False)
        # Half a surrogate pair, which other keys may hold, has no UTF-8; its escape is valid JSON.
        lines.append(f"{line}\n".encode("utf-8", "backslashreplace"))
    data = b"".join(lines)
    try:
        # Without a time: the same rows are the same bytes.
        write_atomically(target, gzip.compress(data, mtime=0) if target.suffix == ".gz" else data)
    except OSError as error:
        raise DataError(f"{target} cannot be written ({error}). Free disk space, or write elsewhere.") from error
    return report


def _read_corpus(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (title, text) of every document with a text."""
    empty = True
    for number, row in read_jsonl(path):
        title, text = row.get("title") or "", row.get("text")
        if not isinstance(text, str) or not isinstance(title, str):
            raise DataError(f'{path}:{number} has no "text". Each line is {{"text": "..."}}, with an optional "title".')
        if text.strip():
            empty = False
            yield title, text
    if empty:
        raise DataError(f'{path} has no documents. Each line is {{"text": "..."}}, with an optional "title".')


def _require_writable(path: Path) -> None:
    if path.is_dir():
        raise DataError(f"{path} is a folder. Name a file, such as {path / 'mined.jsonl'}.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{path.parent} cannot be created ({error}). Write the result elsewhere.") from error
    if not os.access(path.parent, os.W_OK):
        raise DataError(f"{path} cannot be written, because its folder is read-only. Write the result elsewhere.")
