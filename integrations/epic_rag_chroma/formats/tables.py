"""Tables as text (.csv, .tsv): cut between records; the model reads the header with every chunk."""

from __future__ import annotations

import csv

from epic_rag_chroma.document import Break, Document, Repeat

__all__ = ["read"]

_DELIMITERS = ",;\t|"
# A quote that is not closed within so many lines is a sign for inches, or a mistake.
_MAX_RECORD_LINES = 100
_MAX_NAME = 100


def read(lines: list[str]) -> Document:
    """Read a table. A record may have several lines, where a field in quotes has."""
    breaks = [Break.ITEM] * len(lines)
    wholes = []
    number = 0
    header: tuple[int, int] | None = None
    searched = False
    while number < len(lines):
        end = _record_end(lines, number)
        for line in range(number + 1, end):
            breaks[line] = Break.INSIDE
        if end - number > 1:
            wholes.append((number, end))
        if not searched and lines[number].strip() and not lines[number].startswith("#"):
            searched = True
            if _is_header("\n".join(lines[number:end])):
                header = (number, end)
        number = end
    if header is None:
        return Document(lines, breaks, wholes=wholes)
    first, rows = header
    repeats = []
    if rows < len(lines):
        breaks[rows] = Break.INSIDE
        repeats.append(Repeat(rows, len(lines), "\n".join(lines[first:rows])))
    return Document(lines, breaks, wholes=wholes, repeats=repeats)


def _record_end(lines: list[str], first: int) -> int:
    """The line after a record."""
    if lines[first].count('"') % 2 == 0:
        return first + 1
    for number in range(first + 1, min(first + _MAX_RECORD_LINES, len(lines))):
        if lines[number].count('"') % 2:
            return number + 1
    return first + 1


def _is_header(record: str) -> bool:
    """Whether the first record names columns: short, different, not empty, and none a number."""
    delimiter = max(_DELIMITERS, key=record.count)
    try:
        names = [name.strip() for name in next(csv.reader(record.split("\n"), delimiter=delimiter), [])]
    except csv.Error:  # a field beyond the module's limit, say
        return False
    if not names or any(not name or len(name) > _MAX_NAME or _is_number(name) for name in names):
        return False
    return len(set(names)) == len(names)


def _is_number(text: str) -> bool:
    try:
        float(text.replace(",", "."))
    except ValueError:
        return False
    return True
