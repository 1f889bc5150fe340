"""Read Jupyter notebooks (.ipynb): Markdown cells with their headings, code cells whole, no outputs.

Lines refer to the file: a line of a cell is a string in the notebook's JSON. `json` does not return the positions of
values, so the strings are also tokenised with their lines.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from epic_rag_chroma.reading.containers import DocumentBuilder, parsing, printable
from epic_rag_chroma.reading.document import BrokenFileError, Document, SplitCost, split_lines
from epic_rag_chroma.reading.encoded_data import without_encoded_data
from epic_rag_chroma.reading.escapes import code_escapes
from epic_rag_chroma.reading.markdown import read_markdown
from epic_rag_chroma.reading.text import read_text

__all__ = ["read_notebook"]


_FORMAT = "notebook"
_TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{}:,]|[^\s\[\]{}:,"]+', re.DOTALL)
_Path = tuple[str | int, ...]


@dataclass
class _Cell:
    kind: str = "code"
    source: list[tuple[str, int]] = field(default_factory=list)  # its strings, each with its line in the file


def read_notebook(data: bytes) -> Document:
    """Read an .ipynb file."""
    out = DocumentBuilder(_FORMAT)
    with parsing(_FORMAT):
        # Line ends inside a JSON string are always escaped.
        text = "\n".join(split_lines(data.decode("utf-8-sig")))
        notebook = json.loads(text)
        if not isinstance(notebook, dict) or not ("cells" in notebook or "worksheets" in notebook):
            raise BrokenFileError(f"not a {_FORMAT}")
        for cell in _cells(text):
            lines, spans = _lines(cell)
            lines = without_encoded_data(lines)
            if lines:
                if cell.kind in ("markdown", "heading"):
                    document = read_markdown(lines)
                elif cell.kind == "raw":
                    document = read_text(lines)
                else:
                    inside = [SplitCost.INSIDE if before.strip() else SplitCost.LINE for before in lines[:-1]]
                    document = Document(lines, [SplitCost.BLOCK, *inside], substitutions=code_escapes(lines))
                out.add_document(replace(document, spans=spans))
    return out.document(paged=False)


def _lines(cell: _Cell) -> tuple[list[str], list[tuple[int, int]]]:
    """Return the lines of a cell, without empty ones at either end, and their spans in the file."""
    lines: list[list[str]] = [[]]
    spans = [(0, 0)]
    for text, place in cell.source:
        for number, part in enumerate(printable(text).split("\n")):
            if number:
                lines.append([])
                spans.append((place, place))
            if part:
                first = spans[-1][0] if lines[-1] else place
                lines[-1].append(part)
                spans[-1] = (first, place)
    joined = ["".join(parts) for parts in lines]
    full = [number for number, line in enumerate(joined) if line.strip()]
    if not full:
        return [], []
    return joined[full[0] : full[-1] + 1], spans[full[0] : full[-1] + 1]


def _cells(text: str) -> Iterator[_Cell]:
    """Yield the cells in order, including those of notebooks before version 4 (worksheets, "input")."""
    cell = _Cell()
    current: _Path = ()
    for path, value, line in _strings(text):
        at = next((place for place in (1, 3) if len(path) > place + 1 and path[place - 1] == "cells"), None)
        if at is None:
            continue
        if path[: at + 1] != current:
            if cell.source:
                yield cell
            cell, current = _Cell(), path[: at + 1]
        rest = path[at + 1 :]
        if rest == ("cell_type",):
            cell.kind = value
        elif rest[0] in ("source", "input") and len(rest) <= 2:
            cell.source.append((value, line))
    if cell.source:
        yield cell


def _strings(text: str) -> Iterator[tuple[_Path, str, int]]:
    """Yield path, value and line of the strings of valid JSON that may be a cell's type or source."""
    path: list[str | int] = []
    line, counted = 1, 0
    key_next = False
    for match in _TOKEN.finditer(text):
        token = match.group()
        if token in ("{", "["):
            path.append("" if token == "{" else 0)
            key_next = token == "{"
        elif token in ("}", "]"):
            path.pop()
            key_next = False
        elif token == ",":
            last = path[-1]
            key_next = isinstance(last, str)
            if isinstance(last, int):
                path[-1] = last + 1
        elif token.startswith('"'):
            if key_next:
                path[-1] = str(json.loads(token))
                key_next = False
            elif len(path) <= 6 and not {"outputs", "attachments", "metadata"}.intersection(path):
                line += text.count("\n", counted, match.start())
                counted = match.start()
                yield tuple(path), str(json.loads(token)), line
