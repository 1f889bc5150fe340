"""Read HTML: the text of the main part, in lines that carry the source lines they come from. Nothing is executed."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from epic_rag_chroma.reading.containers import requires
from epic_rag_chroma.reading.document import Document, Heading, RepeatedHeader, SplitCost, clean_title
from epic_rag_chroma.reading.encoding import decode, is_utf16

if TYPE_CHECKING:
    from bs4 import Tag

__all__ = ["read_html"]


_DROPPED = ("script", "style", "noscript", "template", "svg", "math", "iframe", "nav", "head", "title", "select")
_HEADINGS = {f"h{level}": level for level in range(1, 7)}
_BLOCK_NAMES = (
    "p div section article main aside header footer ul ol li dl dt dd table thead tbody tr pre blockquote figure "
    "figcaption details summary form fieldset address hr h1 h2 h3 h4 h5 h6 body html caption"
)
_BLOCKS = frozenset(_BLOCK_NAMES.split())
_KEPT_TOGETHER = ("table", "li")


class _Lines:
    """Collects text into lines; the span of a line is that of the source lines of its words."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.costs: list[SplitCost] = []
        self.spans: list[tuple[int, int]] = []
        self.keep_together: list[tuple[int, int]] = []
        self.repeated_headers: list[RepeatedHeader] = []
        self._opened: list[tuple[int, bool]] = []
        self._words: list[str] = []
        self._span: tuple[int, int] | None = None
        self._next = SplitCost.BLOCK

    def add(self, text: str, source: int) -> None:
        """Add running text that begins on a source line."""
        leading = len(text) - len(text.lstrip())
        if text.strip():
            first = source + text[:leading].count("\n")
            last = first + text.strip().count("\n")
            self._span = (first, last) if self._span is None else (self._span[0], max(last, self._span[1]))
        self._words.append(text)

    def add_marker(self, text: str, *, inside: bool = False) -> None:
        """Add a bullet or separator, which alone is not a line; `inside`: only after other text."""
        if not inside or self._span is not None:
            self._words.append(text)

    def end(self, following: SplitCost = SplitCost.BLOCK) -> None:
        """End the line, if it has text; `following` is the split cost of the next one."""
        text = " ".join("".join(self._words).split())
        if text and self._span is not None:
            self._append(text, self._span, self._next)
            self._next = following
        else:
            self._next = min(self._next, following)
        self._words, self._span = [], None

    def open(self, node: Tag) -> None:
        """Open a table or list item, after `end`."""
        outermost = node.name == "table" and not self._opened
        row = node.find("tr") if outermost and node.find("caption") is None else None
        self._opened.append((len(self.lines), row is not None and row.find("th") is not None))

    def close(self) -> None:
        """Close the innermost table or list item, after `end`."""
        first, has_header = self._opened.pop()
        if first and first < len(self.lines) and not self.lines[first]:
            first += 1  # the empty line before the block
        end = len(self.lines)
        if end - first > 1:
            self.keep_together.append((first, end))
            if has_header:
                self.costs[first + 1] = SplitCost.INSIDE
                self.repeated_headers.append(RepeatedHeader(first + 1, end, self.lines[first]))

    def preformatted(self, text: str, source: int) -> None:
        """Add the lines of a <pre> with their indentation."""
        self.end()
        following = SplitCost.BLOCK
        for offset, line in enumerate(text.rstrip().split("\n")):
            if line.strip() or following is not SplitCost.BLOCK:
                self._append(line.rstrip(), (source + offset, source + offset), following)
                following = SplitCost.INSIDE
        self._next = SplitCost.BLOCK

    def _append(self, text: str, span: tuple[int, int], cost: SplitCost) -> None:
        if self.lines and cost is SplitCost.BLOCK:
            # Blocks are separated by an empty line.
            self.lines.append("")
            self.costs.append(SplitCost.BLOCK)
            self.spans.append((self.spans[-1][1], self.spans[-1][1]))
        self.lines.append(text)
        self.costs.append(cost)
        self.spans.append(span)


def read_html(data: bytes) -> Document:
    """Extract the text of a page: its main part if it is marked, without scripts, navigation and markup."""
    with requires("beautifulsoup4", "reading HTML files"):
        from bs4 import BeautifulSoup
    with warnings.catch_warnings():
        # bs4 warns about XML, about markup that looks like a file name, and the like.
        warnings.simplefilter("ignore")
        source = decode(data).encode() if is_utf16(data) else data
        soup = BeautifulSoup(source.replace(b"\r\n", b"\n").replace(b"\r", b"\n"), "html.parser")
    title = clean_title(soup.title.get_text()) if soup.title is not None else ""
    for tag in soup.find_all(_DROPPED):
        tag.extract()
    main = soup.find("main") or soup.find(role="main") or soup.find("article") or soup.body or soup
    collected = _Lines()
    headings = _collect(main, collected)
    if title and collected.lines and not any(heading.level == 1 for heading in headings):
        headings.insert(0, Heading(0, 0, title, 0))
    return Document(
        collected.lines,
        collected.costs,
        headings,
        spans=collected.spans,
        keep_together=collected.keep_together,
        repeated_headers=collected.repeated_headers,
    )


def _collect(main: Tag, out: _Lines) -> list[Heading]:
    """Walk the tree, without recursion because of its depth, and return the headings."""
    from bs4.element import NavigableString, Tag

    headings: list[Heading] = []
    line = main.sourceline or 1
    stack: list[object] = [main]
    while stack:
        node = stack.pop()
        if isinstance(node, str) and not isinstance(node, NavigableString):
            out.end(SplitCost.ITEM if node in ("li", "dt", "dd", "tr") else SplitCost.BLOCK)
            if node in _KEPT_TOGETHER:
                out.close()
        elif isinstance(node, Tag):
            line = node.sourceline or line
            if node.name in _HEADINGS:
                out.end()
                text = clean_title(node.get_text(" ", strip=True))
                if text:
                    at = len(out.lines) + (1 if out.lines else 0)
                    out.add(text, line)
                    out.end()
                    headings.append(Heading(at, _HEADINGS[node.name], text))
                continue
            if node.name == "pre":
                text = node.get_text()
                out.preformatted(text, line)
                line += text.count("\n")
                continue
            if node.name == "br":
                out.end(SplitCost.LINE)
            elif node.name in ("td", "th"):
                out.add_marker(" | ", inside=True)
            elif node.name in _BLOCKS:
                out.end(SplitCost.ITEM if node.name in ("li", "dt", "dd", "tr") else SplitCost.BLOCK)
                if node.name in _KEPT_TOGETHER:
                    out.open(node)
                if node.name == "li":
                    out.add_marker("- ")
                stack.append(str(node.name))
            stack.extend(reversed(list(node.children)))
        elif isinstance(node, NavigableString):
            if type(node) is NavigableString:
                out.add(str(node), line)
            line += str(node).count("\n")
    out.end()
    return headings
