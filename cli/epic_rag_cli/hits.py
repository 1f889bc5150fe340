"""Hits as lines for people: where a passage is, what it scored, and the part of it that says most."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING
from urllib.parse import quote

from epic_rag_cli.locate import display_path
from epic_rag_cli.output import terminal_width
from epic_rag_cli.text import printable

if TYPE_CHECKING:
    from rich.style import Style
    from rich.text import Text

    from epic_rag_chroma import Hit, SearchMode
    from epic_rag_cli.highlight import QueryWords

__all__ = ["file_of", "file_uri", "hit_lines", "location", "passage_lines"]

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

    from epic_rag_cli.highlight import QueryWords

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

    from epic_rag_cli.highlight import QueryWords

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
        shown = f"bm25 {hit.score:.2f}"
    else:
        shown = f"cosine {hit.score:.3f}"
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

    from epic_rag_cli.snippets import snippet

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
