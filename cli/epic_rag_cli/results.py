"""What `index` says of a run, or of what a run would do: for people, and as JSON."""

from __future__ import annotations

import dataclasses
import os
import re
import socket
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from rich.cells import get_character_cell_size

from epic_rag_chroma import IndexNotFoundError, QueryWords
from epic_rag_cli.options import INDEX_FOLDER, MAX_SKIPPED_SHOWN
from epic_rag_cli.terminal import Verbosity, message, plural, printable, terminal_width, verbosity

if TYPE_CHECKING:
    from rich.style import Style
    from rich.text import Text

    from epic_rag_chroma import Hit, IndexPlan, IndexReport, SearchMode, SkippedFile, Span

__all__ = [
    "Snippet",
    "display_path",
    "file_of",
    "file_uri",
    "find_index",
    "hit_lines",
    "index_dir_for",
    "location",
    "passage_lines",
    "plan_json",
    "plan_lines",
    "plan_summary",
    "report_json",
    "report_summary",
    "snippet",
    "tell_skipped",
]


# --- from locate
# Which index folder a command means.


def find_index(given: Path | None) -> Path:
    """Return the index folder that a reading command works on.

    Args:
        given: What `--index-dir` or `EPIC_RAG_INDEX` says; None looks for `.epic-rag` in the working
            directory and its parents, as git does for its own folder.

    Raises:
        IndexNotFoundError: None is given and none is found.
    """
    if given is not None:
        return given
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / INDEX_FOLDER).is_dir():
            return folder / INDEX_FOLDER
    raise IndexNotFoundError(
        f"no index: neither {here} nor a folder above it holds {INDEX_FOLDER}, and --index-dir is not given; "
        "run `epic-rag index .` to index this folder"
    )


def index_dir_for(given: Path | None, first: Path) -> Path:
    """Return the index folder that `index` writes: the given one, or `.epic-rag` beside the first path."""
    if given is not None:
        return given
    return (first if first.is_dir() else first.parent) / INDEX_FOLDER


def display_path(path: str | os.PathLike[str]) -> str:
    """Return `path` as a person in the working directory would write it."""
    absolute = os.path.abspath(path)
    relative = os.path.relpath(absolute)
    return absolute if relative.startswith("..") else relative


# --- from snippets
# The part of a passage that is shown for a query: around its best sentence, cut to a width in terminal cells.

# The full stops, exclamation marks, question marks and semicolons of scripts that put no space after them.
_STOPS = "\u3002\uff01\uff1f\uff1b"
# After a full stop and the like, between paragraphs, and before list items.
_BOUNDARY = re.compile(
    rf"(?<=[.!?:;…])\s+|(?<=[.!?…][\"')\]])\s+|(?<=[{_STOPS}])|\n[ \t]*\n\s*|\n(?=[ \t]*(?:[-*+#>|]|\d+[.)]) )"
)
_LINE_END = re.compile(r"\n\s*")
_ELLIPSIS = "…"


class Snippet:
    """A part of a passage as one printable line, and where the query's words are in it.

    Args:
        pieces: Text of the passage, each piece with whether it is a word of the query.
        before: Whether something was left out before it.
        after: Whether something was left out after it.
    """

    def __init__(self, pieces: Sequence[tuple[str, bool]], *, before: bool, after: bool) -> None:
        parts = [(_safe(piece), marked) for piece, marked in pieces]
        if before:
            parts.insert(0, (f"{_ELLIPSIS} ", False))
        if after:
            parts.append((f" {_ELLIPSIS}", False))
        self.text = "".join(part for part, _ in parts)
        ends = list(accumulate(len(part) for part, _ in parts))
        self.spans: list[Span] = [
            (end - len(part), end) for (part, marked), end in zip(parts, ends, strict=True) if marked and part
        ]


def snippet(text: str, words: QueryWords, width: int, *, by_line: bool = False) -> Snippet:
    """Return the part of `text` that says most about a query.

    The sentence with the most different words of the query is in it, with as much as there is room for of what stands
    around it, whole sentences first. An ellipsis stands where something was left out.

    Args:
        text: The passage.
        words: The words of the query.
        width: The most terminal cells of the passage to take; escapes of control characters come on top.
        by_line: Whether a line is a sentence, as in source code.
    """
    flat, sentences = _sentences(text, by_line)
    found = words.find(flat)
    line = _Line(flat, width)
    start, end = line.around(sentences, _best(sentences, found), found)
    pieces, place = [], start
    for first, last in _merged([span for span, _ in found]):
        first, last = max(first, start), min(last, end)
        if first < last:
            pieces += [(flat[place:first], False), (flat[first:last], True)]
            place = last
    pieces.append((flat[place:end], False))
    return Snippet(pieces, before=start > 0, after=end < len(flat))


def _safe(piece: str) -> str:
    """Make a piece printable without losing the space at its ends."""
    left = " " if piece[:1] == " " else ""
    right = " " if piece[-1:] == " " and piece != " " else ""
    return left + printable(piece) + right


def _sentences(text: str, by_line: bool) -> tuple[str, list[Span]]:
    """Return `text` with single spaces, and where its sentences are in that."""
    parts = (_LINE_END if by_line else _BOUNDARY).split(text.strip())
    flat, spans = "", []
    for part in (" ".join(part.split()) for part in parts):
        if part:
            # What follows a stop of a script without spaces had none before it, either.
            start = len(flat) + (1 if flat and flat[-1] not in _STOPS else 0)
            flat = flat.ljust(start) + part
            spans.append((start, len(flat)))
    return flat, spans or [(0, 0)]


def _best(sentences: Sequence[Span], found: Sequence[tuple[Span, str]]) -> int:
    """Return the number of the first sentence with the most different words of the query."""
    starts = [start for start, _ in sentences]
    kinds: list[set[str]] = [set() for _ in sentences]
    for (start, _), stem in found:
        kinds[bisect_right(starts, start) - 1].add(stem)
    return max(range(len(sentences)), key=lambda number: len(kinds[number]))


def _merged(spans: Sequence[Span]) -> list[Span]:
    merged: list[Span] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


class _Line:
    """A line of text that is longer than a width, perhaps."""

    def __init__(self, text: str, width: int) -> None:
        self._text = text
        self._width = width
        self._cells = [0, *accumulate(map(get_character_cell_size, text))]

    def around(self, sentences: Sequence[Span], best: int, found: Sequence[tuple[Span, str]]) -> Span:
        """Return the part with the best sentence, and what fits of its neighbourhood."""
        if self._fits(0, len(self._text)):
            return 0, len(self._text)
        start, end = sentences[best]
        if not self._fits(start, end):
            start = self._best_start(start, end, found)
            return start, self._end(start, end)
        first = last = best
        while True:
            after = self._fits(start, sentences[last + 1][1]) if last + 1 < len(sentences) else False
            before = self._fits(sentences[first - 1][0], end) if first > 0 else False
            if not after and not before:
                break
            # The best sentence stays in the middle.
            if after and (not before or end - sentences[best][1] <= sentences[best][0] - start):
                last += 1
                end = sentences[last][1]
            else:
                first -= 1
                start = sentences[first][0]
        end = max(end, self._end(start, len(self._text)))
        if end == len(self._text):
            start = min(start, self._start(end))
        return start, end

    def _fits(self, start: int, end: int) -> bool:
        return self._cells[end] - self._cells[start] <= self._width

    def _best_start(self, start: int, end: int, found: Sequence[tuple[Span, str]]) -> int:
        """Return the word of a long sentence from which most different words of the query follow; the middle one of
        such words.
        """
        inside = [(span, stem) for span, stem in found if start <= span[0] < end]
        starts = [start, *(place + 1 for place in range(start, end) if self._text[place] == " ")]
        # The first words before a word of the query; where there are no spaces, the word itself.
        starts += [span[0] for span, _ in inside]
        # A later start would show less text than there is room for.
        starts = [place for place in sorted(set(starts)) if not self._fits(place, end)] or [start]

        def shown(place: int) -> int:
            return len({stem for span, stem in inside if span[0] >= place and self._fits(place, span[1])})

        counts = [shown(place) for place in starts]
        if not max(counts):
            return start
        best = [place for place, count in zip(starts, counts, strict=True) if count == max(counts)]
        return best[len(best) // 2]

    def _end(self, start: int, limit: int) -> int:
        """Return where the last word that fits ends; in the middle of it if there is no other."""
        end = bisect_right(self._cells, self._cells[start] + self._width) - 1
        if end >= limit:
            return limit
        if self._text[end] != " ":
            space = self._text.rfind(" ", start, end)
            end = space if space > start else end
        return max(end, start + 1)

    def _start(self, end: int) -> int:
        """Return where the first word that fits before `end` begins."""
        start = next(place for place in range(end + 1) if self._fits(place, end))
        if start == 0 or self._text[start - 1] == " ":
            return start
        space = self._text.find(" ", start, end)
        return space + 1 if space >= 0 else start


# --- from hits
# Hits as lines for people: where a passage is, what it scored, and the part of it that says most.

_INDENT = "    "
_SNIPPET_LINES = 3
# Room that is lost where lines break between words.
_RAGGED = 20


def hit_lines(hits: Sequence[Hit], query: str, mode: SearchMode, *, links: bool) -> list[Text]:
    """Return hits as lines, an empty one between two.

    Args:
        hits: The hits, best first.
        query: What was asked for.
        mode: How the index was searched.
        links: Whether places are hyperlinks.
    """
    from rich.text import Text

    words = QueryWords(query)
    rank_width = len(str(hits[-1].rank)) if hits else 0
    lines: list[Text] = []
    for hit in hits:
        if lines:
            lines.append(Text())
        # Text objects, never markup: "[red]" in a document is four letters in brackets.
        head = Text(f"{hit.rank:>{rank_width}}  ", style="dim")
        head.append(f"{_scores(hit, mode)}  ", style="not dim green")
        head.append(printable(location(hit)), style=_place_style(hit, links))
        if hit.heading_path:
            head.append("  " + printable(" > ".join(hit.heading_path)), style="not dim magenta")
        lines.append(head)
        lines += _snippet_lines(hit, words)
        places = ", ".join(_duplicate_places(hit))
        if places:
            lines.append(Text(f"{_INDENT}also in {printable(places)}", style="dim"))
    return lines


def passage_lines(hit: Hit, query: str) -> list[Text]:
    """Return the whole text of a hit, line by line, with the words of the query marked."""
    from rich.text import Text

    words = QueryWords(query)
    lines = [Text(printable(location(hit)), style="bold cyan")]
    for number, raw in enumerate(hit.text.splitlines(), start=hit.first_line or 1):
        indent = len(raw) - len(raw.lstrip(" \t"))
        text = " " * len(raw[:indent].expandtabs(4)) + printable(raw)
        line = Text(_INDENT if hit.first_line is None else f"{number:>6}  ", style="dim")
        start = len(line)
        line.append(text, style="not dim")
        for (first, last), _ in words.find(text):
            line.stylize("bold yellow", start + first, start + last)
        lines.append(line)
    return lines


def location(hit: Hit) -> str:
    """Return where a passage is: `path:first-last`, `path:line`, `path:page 3` or the path alone.

    The path is one that can be opened from the working directory.
    """
    path = display_path(file_of(hit)) if hit.root else hit.path
    if hit.page is not None:
        return f"{path}:page {hit.page}"
    if hit.first_line is None:
        return path
    if hit.last_line is None or hit.last_line == hit.first_line:
        return f"{path}:{hit.first_line}"
    return f"{path}:{hit.first_line}-{hit.last_line}"


def file_of(hit: Hit) -> str:
    """Return the absolute path of a hit's file."""
    return os.path.abspath(os.path.join(hit.root, hit.path))


def file_uri(path: str) -> str:
    """Return the file URI of an absolute path, with this machine's name: a terminal may show another's output."""
    if os.name == "nt":
        path = "/" + path.replace("\\", "/")
    # The bytes, since a name need not be UTF-8; everything but unreserved characters is escaped.
    try:
        encoded = os.fsencode(path)
    except UnicodeEncodeError:  # a name that no file on this system can have
        encoded = path.encode("utf-8", "replace")
    return f"file://{quote(socket.gethostname())}{quote(encoded)}"


def _scores(hit: Hit, mode: SearchMode) -> str:
    """Return the numbers that a hit is ranked by, each with its name."""
    if mode == "keyword":
        shown = f"bm25 {hit.bm25 or hit.score:.2f}"
    else:
        shown = f"cosine {hit.score if hit.cosine is None else hit.cosine:.3f}"
        if mode == "hybrid" and hit.bm25 is not None:
            shown += f", bm25 {hit.bm25:.2f}"
    return shown if hit.rerank_score is None else f"rerank {hit.rerank_score:.3f}, {shown}"


def _place_style(hit: Hit, links: bool) -> Style:
    from rich.style import Style

    style = Style(bold=True, dim=False, color="cyan")
    return style + Style(link=file_uri(file_of(hit))) if links and hit.root else style


def _snippet_lines(hit: Hit, words: QueryWords) -> list[Text]:
    from rich.console import Console
    from rich.text import Text

    width = terminal_width() - len(_INDENT)
    shown = snippet(hit.text, words, width * _SNIPPET_LINES - _RAGGED, by_line=bool(hit.lang))
    text = Text(shown.text)
    for start, end in shown.spans:
        text.stylize("bold yellow", start, end)
    wrapped = text.wrap(Console(width=width), width, overflow="fold")
    for line in wrapped:
        line.rstrip()
    return [Text(_INDENT).append_text(line) for line in wrapped]


def _duplicate_places(hit: Hit) -> list[str]:
    """Return where near-duplicates are, each place once, as paths from the working directory where that is known."""
    own = f"{hit.path}:{hit.first_line if hit.page is None else f'page {hit.page}'}"
    shown = []
    for place in dict.fromkeys(hit.duplicates):
        path, colon, line = place.rpartition(":")
        file = os.path.join(hit.root, path)
        if place != own:  # a passage that starts on the same line says nothing new
            # Where there are several roots, it may be in another one than the hit.
            shown.append(display_path(file) + colon + line if hit.root and colon and os.path.exists(file) else place)
    return shown


def report_json(report: IndexReport) -> dict[str, Any]:
    """Return a report with its rate."""
    return {**dataclasses.asdict(report), "chunks_per_second": _rate(report)}


def report_summary(report: IndexReport) -> str:
    """Return the last line of a run."""
    counts = (
        f"{report.added:,} added, {report.changed:,} changed, {report.renamed:,} renamed, {report.deleted:,} deleted, "
        f"{report.unchanged:,} unchanged, {len(report.skipped):,} skipped"
    )
    reused = f", {report.chunks_reused:,} reused" if report.chunks_reused else ""
    embedded = f"{plural(report.chunks_embedded, 'passage')} embedded{reused} in {report.seconds:.1f} s"
    rate = f" ({_rate(report):,.1f} a second)" if report.chunks_embedded else ""
    return f"{counts}; {embedded}{rate}"


def plan_json(plan: IndexPlan) -> dict[str, Any]:
    """Return a plan; a renamed file has its two names."""
    return {
        **dataclasses.asdict(plan),
        "renamed": [{"from": old, "to": new} for old, new in plan.renamed],
    }


def plan_lines(plan: IndexPlan) -> list[tuple[str, str]]:
    """Return what would happen to each file: the verb and the path."""
    lines = [("add", path) for path in plan.added]
    lines += [("change", path) for path in plan.changed]
    lines += [("rename", f"{old} -> {new}") for old, new in plan.renamed]
    lines += [("delete", path) for path in plan.deleted]
    return lines


def plan_summary(plan: IndexPlan) -> str:
    """Return the last line of a plan."""
    return (
        f"would add {len(plan.added):,}, change {len(plan.changed):,}, rename {len(plan.renamed):,}, "
        f"delete {len(plan.deleted):,}, leave {plan.unchanged:,} as they are, skip {len(plan.skipped):,}"
    )


def tell_skipped(skipped: Sequence[SkippedFile], *, hint: bool) -> None:
    """Say on stderr what was skipped: a few by name (all with --verbose), many by reason.

    Args:
        skipped: The files.
        hint: Whether to say that --json lists all.
    """
    if len(skipped) <= MAX_SKIPPED_SHOWN or verbosity() is Verbosity.VERBOSE:
        for file in skipped:
            message("skipped", f"{file.path}: {file.reason}")
        return
    counted = ", ".join(f"{count:,} {reason}" for reason, count in _by_reason(skipped))
    message("skipped", f"{plural(len(skipped), 'file')}: {counted}" + ("; --json lists all" if hint else ""))


def _by_reason(skipped: Iterable[SkippedFile]) -> list[tuple[str, int]]:
    """Return how often each reason occurs, without what it says of the single file, the most frequent first."""
    counts = Counter(file.reason.partition(":")[0] for file in skipped)
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def _rate(report: IndexReport) -> float:
    return round(report.chunks_embedded / max(report.seconds, 1e-9), 1)
