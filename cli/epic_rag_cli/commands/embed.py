"""`epic-rag embed`: vectors of texts, as JSON lines or a numpy file."""

from __future__ import annotations

import io
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO, Literal, NamedTuple

import typer

from epic_rag.errors import ConfigError, DataError
from epic_rag.files import default_mode, describe_os_error, read_jsonl
from epic_rag.query_prompt import QueryPrompt
from epic_rag_cli.options import (
    DEFAULT_DTYPE,
    DEFAULT_TASK,
    Bank,
    Device,
    Dtype,
    Model,
    NumDemonstrations,
    Quiet,
    Strategy,
    Task,
    Verbose,
    bank_setting,
)
from epic_rag_cli.terminal import emit_bytes, emit_json, encodable, json_text, stdin_bytes, usage_error

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Vectors = npt.NDArray[np.float32]

__all__ = ["embed"]

_GROUP = 256  # texts that are encoded together
_MOST_BYTES = 2**22  # of a file that is one text; no model reads more
_STDIN = "standard input"


class _Text(NamedTuple):
    text: str
    id: Any = None


def embed(
    context: typer.Context,
    files: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="FILE", help="Files of texts; `-` is standard input, as is no file at all.", show_default=False
        ),
    ] = None,
    role: Annotated[
        Literal["document", "query"],
        typer.Option("--role", metavar="ROLE", help="Role of the texts: document or query."),
    ] = "document",
    read: Annotated[
        Literal["lines", "jsonl", "file"] | None,
        typer.Option(
            "--read",
            metavar="UNIT",
            help='What is a text: lines (each line), jsonl ("text" of each JSON line; its "id" comes back) or file '
            "(each file).",
            show_default="jsonl for names in .jsonl and .jsonl.gz, else lines",
        ),
    ] = None,
    task: Task = None,
    bank: Bank = None,
    num_demonstrations: NumDemonstrations = None,
    strategy: Strategy = None,
    dims: Annotated[
        int | None,
        typer.Option("--dims", metavar="N", min=1, help="Keep the first N dimensions.", show_default="all"),
    ] = None,
    form: Annotated[
        Literal["jsonl", "npy"] | None,
        typer.Option(
            "--format",
            metavar="FORMAT",
            help="jsonl (a line for each text) or npy (float32, a row for each text).",
            show_default="npy if the name of --output ends so, else jsonl",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="File to write.", show_default="standard output"),
    ] = None,
    model: Model = None,
    dtype: Dtype = DEFAULT_DTYPE,
    device: Device = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Print the vectors of texts.

    A text is a line, unless --read says otherwise; empty lines are texts, too, so that rows and lines match. Vectors
    have length 1. Texts are read and encoded in groups, so the input may be of any length. Queries take demonstrations
    (--bank) and a task, documents have neither.

    Examples:
        epic-rag embed passages.txt -o passages.npy
        echo 'how do I undo the last commit?' | epic-rag embed --role query --bank docs
    """
    given = {"--task": "task", "--bank": "bank", "--num-demonstrations": "num_demonstrations", "--strategy": "strategy"}
    if role == "document":
        for option, name in given.items():
            source = context.get_parameter_source(name)
            if source is not None and source.name == "COMMANDLINE":
                raise usage_error(f"{option} applies to queries. Add --role query")
    elif num_demonstrations and not bank:
        raise usage_error("--num-demonstrations needs --bank")
    form = form or ("npy" if output is not None and output.suffix == ".npy" else "jsonl")
    if form == "npy" and output is None and sys.stdout.isatty():
        raise usage_error("A numpy file is not for a terminal. Pass --output FILE, or pipe it")
    names = files or ["-"]
    missing = next((name for name in names if name != "-" and not os.path.exists(name)), None)
    if missing is not None:
        raise DataError(f"{missing} does not exist. Check the path.")
    texts = (text for name in names for text in _texts(name, read))
    from epic_rag import EpicEncoder

    encoder = EpicEncoder.from_pretrained(model, dtype=dtype, device=device, truncate_dim=dims)
    prompt = QueryPrompt(
        task=DEFAULT_TASK if task is None and not bank else task,
        bank=bank_setting(bank),
        num_demonstrations=num_demonstrations,
        strategy=strategy,
    )

    def encoded() -> Iterator[tuple[list[_Text], Vectors]]:
        while group := list(islice(texts, _GROUP)):
            plain = [each.text for each in group]
            yield group, encoder.encode_query(plain, prompt) if role == "query" else encoder.encode_document(plain)

    if form == "npy":
        _write_npy(encoded(), encoder.dimension, output)
    else:
        _write_lines(encoded(), output)


def _texts(name: str, unit: str | None) -> Iterator[_Text]:
    """Yield the texts of a file.

    Raises:
        DataError: If it cannot be read, is not UTF-8, or a line of JSON has no text.
    """
    shown = _STDIN if name == "-" else name
    unit = unit or ("jsonl" if name.endswith((".jsonl", ".jsonl.gz")) else "lines")
    if unit == "jsonl":
        for number, row in read_jsonl(shown, stream=stdin_bytes() if name == "-" else None):
            text = row.get("text")
            if not isinstance(text, str):
                raise DataError(f'{shown}:{number}: "text" must be a string. Write a line like {{"text": "..."}}.')
            yield _Text(encodable(text), row.get("id"))
        return
    try:
        with nullcontext(stdin_bytes()) if name == "-" else open(name, "rb") as stream:
            if unit == "file":
                content = stream.read(_MOST_BYTES + 1)
                # The last character may be cut.
                text = (
                    content.decode("utf-8-sig")
                    if len(content) <= _MOST_BYTES
                    else content.decode("utf-8-sig", "ignore")
                )
                yield _Text(text, name)
                return
            for number, line in enumerate(stream, 1):
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    raise DataError(f"{shown}:{number} is not UTF-8 (byte {error.start}). Save it as UTF-8.") from None
                yield _Text(text.removesuffix("\n").removesuffix("\r"))
    except UnicodeDecodeError as error:
        raise DataError(f"{shown} is not UTF-8 (byte {error.start}). Save it as UTF-8.") from None
    except OSError as error:
        raise DataError(f"{describe_os_error(error)}. Check the path.") from error


def _write_lines(groups: Iterable[tuple[list[_Text], Vectors]], output: Path | None) -> None:
    """Write a JSON object for each text: its place, its id if it has one, its vector."""
    place = 0
    with nullcontext() if output is None else _replacing(output) as file:
        for texts, vectors in groups:
            for text, vector in zip(texts, vectors, strict=True):
                # The shortest decimals that are the same float32.
                row: dict[str, Any] = {"index": place, "embedding": [float(str(value)) for value in vector]}
                if text.id is not None:
                    row["id"] = text.id
                place += 1
                if file is None:
                    emit_json(row, one_line=True)
                else:
                    file.write(json_text(row, ascii_only=True, one_line=True).encode() + b"\n")


def _write_npy(groups: Iterable[tuple[list[_Text], Vectors]], dimension: int, output: Path | None) -> None:
    """Write float32 rows behind numpy's header; the number of rows is put into it at the end."""
    import numpy as np

    def header(rows: int) -> bytes:
        buffer = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            buffer, {"descr": "<f4", "fortran_order": False, "shape": (rows, dimension)}
        )
        return buffer.getvalue()

    with tempfile.TemporaryFile() if output is None else _replacing(output) as file:
        rows, size = 0, len(header(0))
        file.seek(size)
        for texts, vectors in groups:
            file.write(vectors.astype("<f4", copy=False).tobytes())
            rows += len(texts)
        start = header(rows)
        assert len(start) == size  # numpy leaves room for growth
        file.seek(0)
        file.write(start)
        file.seek(0)
        if output is None:
            emit_bytes(iter(lambda: file.read(2**20), b""))


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a new file that replaces `path` when the block ends without an error.

    Raises:
        ConfigError: If it cannot be written.
    """
    try:
        if path.is_dir():
            raise ConfigError(f"{path} is a folder. Pass a file to --output.")
        mode = path.stat().st_mode & 0o777 if path.exists() else default_mode()
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            try:
                yield file  # type: ignore[misc]
                file.flush()
                os.chmod(file.name, mode)
            except BaseException:
                file.close()
                os.unlink(file.name)
                raise
        os.replace(file.name, path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror}). Pass another --output.") from error
