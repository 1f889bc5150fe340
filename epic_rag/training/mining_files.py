"""Hard negatives for a file of pairs: read, mine, write aside, rename."""

from __future__ import annotations

import gzip
import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from epic_rag.encoder import EpicEncoder
from epic_rag.errors import DataError
from epic_rag.evaluation.files import read_jsonl, read_mapping
from epic_rag.training.data import load_pairs
from epic_rag.training.mining import MiningOptions, mine_negatives

__all__ = ["MiningReport", "mine_file"]


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
    rows = [row.values for row in read_jsonl(source)]
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
    documents = [(row.text("title", ""), row.text("text")) for row in read_jsonl(path)]
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
