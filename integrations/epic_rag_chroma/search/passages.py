"""Passages: ranked chunks become hits; chunks next to each other are joined, and a file gets a few places at most.

Ranked chunks of one section that overlap or follow one another become one passage, so that a reader sees a text once
and in order. Of one file, `per_file` passages come before the others of it; these fill the places that no other file
takes. A line of JSON lines or a row of CSV is a document of its own, since whole collections are kept in such files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from epic_rag_chroma.reading.document import HEADING_SEPARATOR
from epic_rag_chroma.types import Mark, StaleState

if TYPE_CHECKING:
    from epic_rag_chroma.store.database import Record

__all__ = [
    "JOINED_DEPTH",
    "OTHER_FILES_DEPTH",
    "Candidate",
    "Passage",
    "add_context",
    "choose",
    "is_same_section",
    "join",
    "number_of",
    "section",
]

JOINED_DEPTH = 2
"""Times k: how many of the best chunks are joined. Later ones next to a hit are left out."""
OTHER_FILES_DEPTH = 8
"""Times k: among how many of the best chunks other files are looked for."""

# Formats whose files are collections of records: each is a document of its own.
_RECORD_KINDS = frozenset({"bibtex", "csv", "jsonl", "mailbox"})
_SHORTEST_OVERLAP = 8

Neighbours = Callable[[str, int, int], "list[Record]"]
"""The chunks of a chunk's file from one position to another; see `IndexDatabase.neighbours`."""


@dataclass
class Candidate:
    """A ranked chunk; fields as in `Hit`."""

    row: Record
    score: float
    cosine: float | None
    bm25: float | None
    rerank_score: float | None = None
    duplicates: list[str] = field(default_factory=list)
    marked: Mark | None = None

    @property
    def headings(self) -> tuple[str, ...]:
        """The headings above it, outermost first."""
        path = str(self.row.metadata.get("heading_path", ""))
        return tuple(path.split(HEADING_SEPARATOR)) if path else ()

    @property
    def location(self) -> str:
        """Path with line or page."""
        path = str(self.row.metadata.get("path", ""))
        page, line = number_of(self.row, "page"), number_of(self.row, "first_line")
        if page is not None:
            return f"{path}:page {page}"
        return path if line is None else f"{path}:{line}"


@dataclass
class Passage:
    """A hit: its best chunk, and all of its chunks in the order of the file.

    Args:
        best: The best chunk, which gives the passage its scores and its place in the ranking.
        rows: Its chunks in order, without gaps.
        duplicates: Locations of near-duplicates.
        before: The lines before it that were asked for.
        after: The lines after it that were asked for.
        stale: See `Hit`.
    """

    best: Candidate
    rows: list[Record]
    cosine: float | None
    bm25: float | None
    duplicates: list[str]
    before: str = ""
    after: str = ""
    stale: StaleState | None = None

    @property
    def unit(self) -> tuple[str, ...]:
        """The file, or the record of a collection; `per_file` limits its passages."""
        metadata = self.best.row.metadata
        file = (str(metadata.get("root", "")), str(metadata.get("path", "")))
        return (*file, self.best.row.id) if metadata.get("kind") in _RECORD_KINDS else file

    def adjoins(self, row: Record) -> bool:
        """Return whether a chunk is one of this passage's section that overlaps it, or is right before or after it."""
        place = number_of(row, "position")
        if place is None or row.metadata.get("kind") in _RECORD_KINDS or not is_same_section(row, self.best.row):
            return False
        for key_of_first, key_of_last in (("position", "position"), ("first_line", "last_line")):
            first, last = number_of(self.rows[0], key_of_first), number_of(self.rows[-1], key_of_last)
            own_first, own_last = number_of(row, key_of_first), number_of(row, key_of_last)
            if first is None or last is None or own_first is None or own_last is None:
                continue
            if own_first <= last + 1 and own_last >= first - 1:
                return True
        return False

    def take(self, other: Passage) -> None:
        """Join a worse passage next to this one."""
        by_place = {number_of(row, "position"): row for row in (*self.rows, *other.rows)}
        self.rows = [by_place[place] for place in sorted(place for place in by_place if place is not None)]
        self.cosine = max((each for each in (self.cosine, other.cosine) if each is not None), default=None)
        self.bm25 = max((each for each in (self.bm25, other.bm25) if each is not None), default=None)
        self.duplicates += [place for place in other.duplicates if place not in self.duplicates]


def choose(
    candidates: Sequence[Candidate],
    k: int,
    *,
    per_file: int,
    merge: bool,
    section_of: Callable[[Record], list[Record]] | None = None,
) -> tuple[list[Passage], bool]:
    """Choose the passages of a query.

    Args:
        candidates: The best chunks in order.
        k: Number of passages.
        per_file: Number of passages of a file that come before its others; 0 for no limit.
        merge: Whether chunks next to each other are joined.
        section_of: Returns all chunks of a chunk's section, if passages are whole sections.

    Returns:
        At most k passages, best first, and whether no further candidate would change them.
    """
    passages: list[Passage] = []
    for number, candidate in enumerate(candidates):
        same = [each for each in passages if each.best.marked == candidate.marked] if merge else []
        neighbours = [each for each in same if each.adjoins(candidate.row)]
        if neighbours and number >= JOINED_DEPTH * k:
            continue
        rows = [candidate.row] if neighbours or section_of is None else section_of(candidate.row)
        passage = Passage(candidate, rows, candidate.cosine, candidate.bm25, list(candidate.duplicates))
        if not neighbours:
            passages.append(passage)
            continue
        neighbours[0].take(passage)
        for other in neighbours[1:]:  # the chunk closes the gap between two passages
            neighbours[0].take(other)
            passages.remove(other)
    counts: Counter[tuple[str, ...]] = Counter()
    within: list[int] = []
    beyond: list[int] = []
    for number, passage in enumerate(passages):
        counts[passage.unit] += 1
        (beyond if per_file and counts[passage.unit] > per_file else within).append(number)
    chosen = sorted([*within[:k], *beyond[: max(0, k - len(within))]])
    is_final = len(within) >= k or (len(chosen) >= k and len(candidates) >= OTHER_FILES_DEPTH * k)
    return [passages[number] for number in chosen], is_final


def section(row: Record, neighbours: Neighbours, limit: int) -> list[Record]:
    """Return the chunks of a chunk's section in order: at most `limit` before it and after it."""
    place = number_of(row, "position")
    if place is None:
        return [row]
    around = neighbours(row.id, place - limit, place + limit)
    middle = next((number for number, each in enumerate(around) if each.id == row.id), None)
    if middle is None:
        return [row]
    first = last = middle
    while first > 0 and is_same_section(around[first - 1], row):
        first -= 1
    while last + 1 < len(around) and is_same_section(around[last + 1], row):
        last += 1
    return around[first : last + 1]


def add_context(passage: Passage, neighbours: Neighbours, before: int, after: int) -> None:
    """Set the lines before and after a passage.

    Args:
        passage: The passage.
        neighbours: Reads chunks.
        before: Number of lines before it.
        after: Number of lines after it.
    """
    first, last = number_of(passage.rows[0], "position"), number_of(passage.rows[-1], "position")
    if first is None or last is None:
        return
    rows = neighbours(passage.best.row.id, first - before, last + after)
    text, spans = join(rows)
    own = [span for row, span in zip(rows, spans, strict=True) if first <= (number_of(row, "position") or 0) <= last]
    if not own:
        return
    head, tail = text[: own[0][0]], text[own[-1][1] :]
    passage.before = "\n".join(head.removesuffix("\n").split("\n")[-before:]) if before and head else ""
    passage.after = "\n".join(tail.removeprefix("\n").split("\n")[:after]) if after and tail else ""


def join(rows: Sequence[Record]) -> tuple[str, list[tuple[int, int]]]:
    """Join consecutive chunks of a file into one text, in which each line is once.

    Returns:
        The text, and where in it each chunk begins and ends. Blank lines between chunks are there, where the lines of
        the chunks are those of the file.
    """
    text = rows[0].text if rows else ""
    spans = [(0, len(text))]
    for previous, row in pairwise(rows):
        shared, between = _seam(previous, row)
        start = len(text) - shared if shared else len(text) + len(between)
        text = text + row.text[shared:] if shared else text + between + row.text
        spans.append((start, start + len(row.text)))
    return text, spans[: len(rows)]


def _seam(previous: Record, row: Record) -> tuple[int, str]:
    """Return how many characters two chunks share, and what stands between them if they share none."""
    last, first = number_of(previous, "last_line"), number_of(row, "first_line")
    is_exact = _has_its_lines(previous) and _has_its_lines(row)
    if last is not None and first is not None and first > last:
        return 0, "\n" * (first - last if is_exact else 1)
    # Lines that are the same do not make more of them shared.
    most = last - first if is_exact and last is not None and first is not None else len(row.text)
    is_same_line = last is not None and first == last
    for length in range(min(len(previous.text), len(row.text)), 0, -1):
        breaks = row.text.count("\n", 0, length)
        if breaks <= most and previous.text.endswith(row.text[:length]):
            before, after = previous.text[-length - 1 : -length], row.text[length : length + 1]
            # Chunks share whole lines, sentences or words; of texts without lines, a few letters are equal by chance.
            is_whole = (not before or before.isspace()) and (not after or after.isspace())
            is_long = is_same_line or length >= _SHORTEST_OVERLAP or 0 < breaks == most
            if is_whole and (is_long or before in ("", "\n")):
                return length, ""
    if is_same_line:  # parts of one long line, divided at white space if there is any
        ends = previous.text.rpartition("\n")[2] + row.text.partition("\n")[0]
        return 0, " " if " " in ends else ""
    return 0, "\n"


def _has_its_lines(row: Record) -> bool:
    first, last = number_of(row, "first_line"), number_of(row, "last_line")
    return first is not None and last is not None and row.text.count("\n") == last - first


def is_same_section(row: Record, other: Record) -> bool:
    """Return whether chunks of one file are under the same headings, on the same page, and of the same record."""
    mine, others = row.metadata, other.metadata
    if any(mine.get(key) != others.get(key) for key in ("root", "path", "heading_path", "page")):
        return False
    if mine.get("kind") not in _RECORD_KINDS:
        return True
    lines = [number_of(each, key) or 0 for each in (row, other) for key in ("first_line", "last_line")]
    return lines[0] <= lines[3] and lines[2] <= lines[1]


def number_of(row: Record, key: str) -> int | None:
    """Return an integer of a chunk's metadata."""
    value: Any = row.metadata.get(key)
    return int(value) if isinstance(value, (int, float)) else None
