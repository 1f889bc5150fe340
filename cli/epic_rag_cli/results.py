"""Results as text and JSON: index folders and paths, hits with highlighted snippets, reports of `index`.

A snippet is the part of a chunk around the sentence with the most query words, cut to a width in terminal cells.
"""

from __future__ import annotations

import dataclasses
import os
import re
import socket
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from rich.cells import cell_len, get_character_cell_size

from epic_rag_chroma import IndexNotFoundError, QueryWords
from epic_rag_cli.terminal import (
    Verbosity,
    columns,
    emit,
    emit_json,
    message,
    plural,
    printable,
    terminal_width,
    usage_error,
    verbosity,
)

if TYPE_CHECKING:
    from rich.style import Style
    from rich.text import Text

    from epic_rag_chroma import Hit, IndexPlan, IndexReport, SearchMode, SkippedFile, Span

__all__ = [
    "INDEX_FOLDER",
    "Snippet",
    "display_path",
    "file_of",
    "file_uri",
    "find_index",
    "find_indexes",
    "hit_lines",
    "location",
    "print_plan",
    "print_skipped",
    "report_json",
    "report_summary",
    "snippet",
]

INDEX_FOLDER = ".epic-rag"
"""Name of the index folder in the folder that it indexes."""

MAX_SKIPPED_SHOWN = 10
"""Skipped files that `index` names; of more, it prints the number for each reason."""


def find_index(given: Sequence[Path] | None) -> Path:
    """Return the index folder of a command that takes one; see `find_indexes`."""
    folders = find_indexes(given)
    if len(folders) > 1:
        shown = ", ".join(map(str, folders))
        raise usage_error(f"--index-dir names {len(folders)} folders ({shown}), this command takes one")
    return folders[0]


def find_indexes(given: Sequence[Path] | None) -> list[Path]:
    """Return the index folders of a command.

    Args:
        given: The values of `--index-dir`: indexes, or folders that have one as `.epic-rag`. None finds `.epic-rag` in
            the working directory or its parents.

    Raises:
        IndexNotFoundError: If none is given or found.
    """
    if given:
        return [folder / INDEX_FOLDER if (folder / INDEX_FOLDER).is_dir() else folder for folder in given]
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / INDEX_FOLDER).is_dir():
            return [folder / INDEX_FOLDER]
    raise IndexNotFoundError(
        f"No index: neither {here} nor a folder above it has {INDEX_FOLDER}. Run `epic-rag index .` to index this "
        "folder, or pass --index-dir."
    )


def display_path(path: str | os.PathLike[str]) -> str:
    """Return `path` relative to the working directory if it is below it, absolute otherwise."""
    absolute = os.path.abspath(path)
    relative = os.path.relpath(absolute)
    return absolute if relative.startswith("..") else relative


# Sentence ends of scripts that put no space after them.
_STOPS = "\u3002\uff01\uff1f\uff1b"
# Boundaries: after sentence ends, between paragraphs and before list items.
_BOUNDARY = re.compile(
    rf"(?<=[.!?:;…])\s+|(?<=[.!?…][\"')\]])\s+|(?<=[{_STOPS}])|\n[ \t]*\n\s*|\n(?=[ \t]*(?:[-*+#>|]|\d+[.)]) )"
)
_LINE_END = re.compile(r"\n\s*")
_ELLIPSIS = "…"


class Snippet:
    """Part of a chunk as one printable line, with the spans of the query's words.

    Args:
        pieces: Consecutive pieces of text, each with whether it is a query word.
        before: Whether text before it is left out.
        after: Whether text after it is left out.
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
    """Return the sentence of `text` with the most different query words, and as many sentences around it as fit.

    Args:
        text: The chunk's text.
        words: The words of the query.
        width: Maximum terminal cells of the text; ellipses and escapes of control characters are added to it.
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
    """Make a piece printable and keep the space at its ends."""
    left = " " if piece[:1] == " " else ""
    right = " " if piece[-1:] == " " and piece != " " else ""
    return left + printable(piece) + right


def _sentences(text: str, by_line: bool) -> tuple[str, list[Span]]:
    """Return `text` with single spaces, and the spans of its sentences."""
    parts = (_LINE_END if by_line else _BOUNDARY).split(text.strip())
    flat, spans = "", []
    for part in (" ".join(part.split()) for part in parts):
        if part:
            # No space after a sentence end of a script without spaces.
            start = len(flat) + (1 if flat and flat[-1] not in _STOPS else 0)
            flat = flat.ljust(start) + part
            spans.append((start, len(flat)))
    return flat, spans or [(0, 0)]


def _best(sentences: Sequence[Span], found: Sequence[tuple[Span, str]]) -> int:
    """Return the index of the first sentence with the most different query words."""
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
    """Text that is cut to a width in terminal cells."""

    def __init__(self, text: str, width: int) -> None:
        self._text = text
        self._width = width
        self._cells = [0, *accumulate(map(get_character_cell_size, text))]

    def around(self, sentences: Sequence[Span], best: int, found: Sequence[tuple[Span, str]]) -> Span:
        """Return the span of the best sentence with the sentences around it that fit."""
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
            # Keep the best sentence in the middle.
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
        """Return the start in a long sentence that shows the most query words; the middle one of several."""
        inside = [(span, stem) for span, stem in found if start <= span[0] < end]
        starts = [start, *(place + 1 for place in range(start, end) if self._text[place] == " ")]
        # Where there are no spaces, a query word itself is a start.
        starts += [span[0] for span, _ in inside]
        # Later starts would leave room unused.
        starts = [place for place in sorted(set(starts)) if not self._fits(place, end)] or [start]

        def shown(place: int) -> int:
            return len({stem for span, stem in inside if span[0] >= place and self._fits(place, span[1])})

        counts = [shown(place) for place in starts]
        if not max(counts):
            return start
        best = [place for place, count in zip(starts, counts, strict=True) if count == max(counts)]
        return best[len(best) // 2]

    def _end(self, start: int, limit: int) -> int:
        """Return the end of the last word that fits; within the word if it is the only one."""
        end = bisect_right(self._cells, self._cells[start] + self._width) - 1
        if end >= limit:
            return limit
        if self._text[end] != " ":
            space = self._text.rfind(" ", start, end)
            end = space if space > start else end
        return max(end, start + 1)

    def _start(self, end: int) -> int:
        """Return the start of the first word that fits before `end`."""
        start = next(place for place in range(end + 1) if self._fits(place, end))
        if start == 0 or self._text[start - 1] == " ":
            return start
        space = self._text.find(" ", start, end)
        return space + 1 if space >= 0 else start


_INDENT = "    "
_SNIPPET_LINES = 3
# Lines of code or of a table that a snippet shows.
_KEPT_LINES = 5
# Formats whose lines are records or settings.
_LINE_KINDS = frozenset({"csv", "ini", "json", "jsonl", "properties", "toml", "xlsx", "yaml"})
_CODE, _FENCED, _TABLE = "code", "fenced code", "table"
_FENCE = re.compile(r"\s*(`{3,}|~{3,})")
_RULE = re.compile(r"[\s|:=+-]*")
# Cells lost to line breaks between words.
_RAGGED = 20


def hit_lines(hits: Sequence[Hit], query: str, mode: SearchMode, *, links: bool, whole: bool = False) -> list[Text]:
    """Return hits as lines of text, separated by empty lines: scores, location, headings, snippet, duplicates.

    Args:
        hits: The hits, best first.
        query: The query.
        mode: The search mode.
        links: Whether locations are hyperlinks.
        whole: Whether all lines of a hit are shown, with the lines around it, instead of a snippet.
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
        if hit.stale is not None:
            head.append(f"  {hit.stale} since the last run", style="not dim yellow")
        if hit.heading_path:
            head.append("  " + printable(" > ".join(hit.heading_path)), style="not dim magenta")
        lines.append(head)
        lines += _whole_lines(hit, words) if whole else _snippet_lines(hit, words)
        places = ", ".join(_duplicate_places(hit))
        if places:
            lines.append(Text(f"{_INDENT}also in {printable(places)}", style="dim"))
    return lines


def location(hit: Hit) -> str:
    """Return `path:first-last`, `path:line`, `path:page 3` or the path alone, relative to the working directory."""
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
    """Return the file URI of an absolute path, with this host's name: the terminal may run on another host."""
    if os.name == "nt":
        path = "/" + path.replace("\\", "/")
    # Bytes, since a name need not be UTF-8.
    try:
        encoded = os.fsencode(path)
    except UnicodeEncodeError:  # not a possible file name on this system
        encoded = path.encode("utf-8", "replace")
    return f"file://{quote(socket.gethostname())}{quote(encoded)}"


def _scores(hit: Hit, mode: SearchMode) -> str:
    """Return the scores that decide a hit's rank, with their names: the reranker's, then those of the search."""
    scores = {"rerank": hit.rerank_score, "cosine": hit.cosine, "bm25": hit.bm25}
    if mode == "keyword":
        del scores["cosine"]
    elif mode == "dense":
        del scores["bm25"]
    digits = {"rerank": 3, "cosine": 3, "bm25": 2}
    shown = [f"{name} {score:.{digits[name]}f}" for name, score in scores.items() if score is not None]
    # FTS5 gives a term in more than half of the chunks the weight 0.000001.
    shown = ["bm25 <0.01" if each == "bm25 0.00" else each for each in shown]
    return ", ".join(shown) or f"score {hit.score:.3f}"


def _place_style(hit: Hit, links: bool) -> Style:
    from rich.style import Style

    style = Style(bold=True, dim=False, color="cyan")
    return style + Style(link=file_uri(file_of(hit))) if links and hit.root else style


def _snippet_lines(hit: Hit, words: QueryWords) -> list[Text]:
    """Return the lines of a hit's snippet: running text as one wrapped piece, code and tables as they are."""
    from rich.console import Console
    from rich.text import Text

    width = terminal_width() - len(_INDENT)
    lines = hit.text.split("\n")
    blocks = [_CODE] * len(lines) if hit.lang or hit.kind in _LINE_KINDS else _blocks(lines)
    first, end = _part(lines, blocks, words)
    if blocks[first] is not None:
        return [_styled(_cut(line, words, width), words) for line in _kept(lines, blocks, first, end, words)]
    shown = snippet("\n".join(lines[first:end]), words, width * _SNIPPET_LINES - _RAGGED)
    text = Text(shown.text)
    for start, stop in shown.spans:
        text.stylize("bold yellow", start, stop)
    wrapped = text.wrap(Console(width=width), width, overflow="fold")
    for line in wrapped:
        line.rstrip()
    found = [Text(_INDENT).append_text(line) for line in wrapped]
    room = _SNIPPET_LINES - len(found)
    if end < len(lines) and room > 0:  # what the text introduces
        after = next((number for number in range(end, len(lines)) if blocks[number] != blocks[end]), len(lines))
        kept = _kept(lines, blocks, end, after, words)[:room]
        found += [_styled(_cut(line, words, width), words) for line in kept]
    return found


def _part(lines: Sequence[str], blocks: Sequence[str | None], words: QueryWords) -> Span:
    """Return the block of lines in which a line has the most different query words; the first one if none has any."""
    filled = [number for number, line in enumerate(lines) if line.strip() and not _FENCE.match(line)] or [0]
    kinds = {number: len({stem for _, stem in words.find(lines[number])}) for number in filled}
    best = max(filled, key=lambda number: kinds[number])
    first = end = best
    while first > 0 and blocks[first - 1] == blocks[best]:
        first -= 1
    while end < len(lines) and blocks[end] == blocks[best]:
        end += 1
    return first, end


def _kept(lines: Sequence[str], blocks: Sequence[str | None], first: int, end: int, words: QueryWords) -> list[str]:
    """Return the lines of a block around the one with the most query words, with the header of a table."""
    inside = [number for number in range(first, end) if lines[number].strip() and not _RULE.fullmatch(lines[number])]
    inside = [number for number in inside if not _FENCE.match(lines[number])]
    if not inside:
        return []
    kinds = [len({stem for _, stem in words.find(lines[number])}) for number in inside]
    place = kinds.index(max(kinds))
    start = max(0, min(place - _KEPT_LINES // 2, len(inside) - _KEPT_LINES))
    chosen = inside[start : start + _KEPT_LINES]
    if blocks[first] == _TABLE and inside[0] not in chosen:
        chosen = [inside[0], *(chosen[:-1] if chosen[-1] != inside[place] else chosen[1:])]
    kept = [_printable_line(lines[number]) for number in chosen]
    indent = min(len(line) - len(line.lstrip(" ")) for line in kept)
    return [line[indent:] for line in kept]


def _whole_lines(hit: Hit, words: QueryWords) -> list[Text]:
    """Return all lines of a hit, and those before and after it."""
    from rich.text import Text

    def around(text: str) -> list[Text]:
        return [Text(_INDENT + _printable_line(line), style="dim") for line in text.split("\n")] if text else []

    own = [_styled(_printable_line(line), words) for line in hit.text.split("\n")]
    return [*around(hit.before), *own, *around(hit.after)]


def _blocks(lines: Sequence[str]) -> list[str | None]:
    """Return for each line of Markdown or extracted text the block of code or the table that it is in."""
    blocks: list[str | None] = []
    fence = ""
    for number, line in enumerate(lines):
        mark = _FENCE.match(line)
        if fence:
            blocks.append(_FENCED)
            if mark is not None and mark[1].startswith(fence):
                fence = ""
        elif mark is not None:
            fence = mark[1]
            blocks.append(_FENCED)
        elif line.strip() and (line.lstrip().startswith("|") or line.count(" | ") or "\t" in line.strip()):
            blocks.append(_TABLE)
        elif line.startswith(("    ", "\t")) and (number == 0 or not lines[number - 1].strip() or blocks[-1] == _CODE):
            blocks.append(_CODE)
        else:
            blocks.append(None)
    for number, line in enumerate(lines):  # a line with a bar alone is no table
        around = blocks[max(0, number - 1) : number + 2]
        if blocks[number] == _TABLE and around.count(_TABLE) == 1 and not line.lstrip().startswith("|"):
            blocks[number] = None
    return blocks


def _printable_line(line: str) -> str:
    """Make a line printable and keep its white space."""
    expanded = line.expandtabs(4)
    return " " * (len(expanded) - len(expanded.lstrip(" "))) + _spaced(expanded)


def _spaced(line: str) -> str:
    return " ".join(printable(word) if word else "" for word in line.strip().split(" "))


def _cut(line: str, words: QueryWords, width: int) -> str:
    """Cut a line to a width, to the part with the most query words."""
    if cell_len(line) <= width:
        return line
    indent = min(len(line) - len(line.lstrip(" ")), width // 2)
    return " " * indent + snippet(line, words, max(1, width - indent - 2 * len(_ELLIPSIS) - 2), by_line=True).text


def _styled(line: str, words: QueryWords) -> Text:
    from rich.text import Text

    text = Text(line)
    for (start, end), _ in words.find(line):
        text.stylize("bold yellow", start, end)
    return Text(_INDENT).append_text(text)


def _duplicate_places(hit: Hit) -> list[str]:
    """Return the distinct locations of near-duplicates, relative to the working directory if the file exists."""
    own = f"{hit.path}:{hit.first_line if hit.page is None else f'page {hit.page}'}"
    shown = []
    for place in dict.fromkeys(hit.duplicates):
        path, colon, line = place.rpartition(":")
        file = os.path.join(hit.root, path)
        if place != own:
            # The file may be in another root than the hit's.
            shown.append(display_path(file) + colon + line if hit.root and colon and os.path.exists(file) else place)
    return shown


def report_json(report: IndexReport) -> dict[str, Any]:
    """Return the report of a run as JSON has it, with the rate."""
    return {**dataclasses.asdict(report), "chunks_per_second": _rate(report)}


def report_summary(report: IndexReport) -> str:
    """Return the summary line of a run."""
    counts = (
        f"{report.added:,} added, {report.changed:,} changed, {report.renamed:,} renamed, {report.deleted:,} deleted, "
        f"{report.unchanged:,} unchanged, {len(report.skipped):,} skipped"
    )
    reused = f", {report.chunks_reused:,} reused" if report.chunks_reused else ""
    embedded = f"{plural(report.chunks_embedded, 'chunk')} embedded{reused} in {report.seconds:.1f} s"
    rate = f" ({_rate(report):,.1f} a second)" if report.chunks_embedded else ""
    return f"{counts}; {embedded}{rate}"


def print_plan(plan: IndexPlan, folder: Path, *, as_json: bool) -> None:
    """Print what a run would do: a line for each file and a summary, or JSON."""
    if as_json:
        renamed = [{"from": old, "to": new} for old, new in plan.renamed]
        emit_json({"index_dir": str(folder), "dry_run": True, **dataclasses.asdict(plan), "renamed": renamed})
        return
    print_skipped(plan.skipped, hint=True)
    rows = [("add", path) for path in plan.added]
    rows += [("change", path) for path in plan.changed]
    rows += [("rename", f"{old} -> {new}") for old, new in plan.renamed]
    rows += [("delete", path) for path in plan.deleted]
    summary = (
        f"would add {len(plan.added):,}, change {len(plan.changed):,}, rename {len(plan.renamed):,}, "
        f"delete {len(plan.deleted):,}, leave {plan.unchanged:,} unchanged, skip {len(plan.skipped):,}"
    )
    emit([*(columns(rows, styles=("bold",)) if rows else ()), summary])


def print_skipped(skipped: Sequence[SkippedFile], *, hint: bool) -> None:
    """Print skipped files on stderr: a few by name (all with --verbose), many by reason.

    Args:
        skipped: The files.
        hint: Whether to mention that --json lists all.
    """
    if len(skipped) <= MAX_SKIPPED_SHOWN or verbosity() is Verbosity.VERBOSE:
        for file in skipped:
            message("skipped", f"{file.path}: {file.reason}")
        return
    # A reason may continue with details of the single file after a colon.
    reasons = Counter(file.reason.partition(":")[0] for file in skipped)
    ordered = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
    counted = ", ".join(f"{count:,} {reason}" for reason, count in ordered)
    message("skipped", f"{plural(len(skipped), 'file')}: {counted}." + (" --json lists all." if hint else ""))


def _rate(report: IndexReport) -> float:
    return round(report.chunks_embedded / max(report.seconds, 1e-9), 1)
