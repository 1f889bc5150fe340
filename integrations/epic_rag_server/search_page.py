"""The search page: HTML of searches and documents, and the files of the folder `page/`.

Every state of the page has an address, and the server renders it whole, so that it works without JavaScript. `page.js`
fetches the same addresses, replaces parts of the page, and writes marks through the routes of banks. The page loads
nothing from elsewhere, and its Content-Security-Policy allows no inline script or style.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from epic_rag import BankError, Demonstration, DemonstrationBank, EpicError
from epic_rag_chroma import Hit, Mark, QueryWords
from epic_rag_server.banks import example_id
from epic_rag_server.errors import ApiError, error_of
from epic_rag_server.messages import read_body
from epic_rag_server.schemas import SearchQuery, parse
from epic_rag_server.search import SearchRoutes
from epic_rag_server.security import AccessPolicy
from epic_rag_server.service import Service

__all__ = ["PageRoutes"]

_FOLDER = Path(__file__).with_name("page")
_TYPES = {"page.css": "text/css", "page.js": "text/javascript", "icon.svg": "image/svg+xml"}
_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "form-action 'self'",
        "base-uri 'none'",
        "frame-ancestors 'none'",
    )
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "same-origin",
    "X-Frame-Options": "DENY",
}
_MODES = (("hybrid", "meaning and words"), ("dense", "meaning"), ("keyword", "words"))
_FIELDS = ("q", "index", "mode", "bank", "path", "where", "since")
_DOCUMENT_FIELDS = ("path", "index", "line", "last", "from", "to")
_KNOWN: Mapping[Mark, str] = {"right": "first by an example of the bank", "wrong": "last by a mark in the bank"}
_AROUND = 12
"""Lines before and after a hit that its document shows."""
_PART = 60
_MOST_LINES = 2000


class PageRoutes:
    """Handlers of the page's addresses.

    Args:
        service: The model, the indexes, the banks.
        search: Searches, and reads documents.
        policy: With an API key, the page without it shows a field for the key and nothing else.
    """

    def __init__(self, service: Service, search: SearchRoutes, policy: AccessPolicy) -> None:
        self._service = service
        self._search = search
        self._policy = policy
        self._template = Environment(
            loader=FileSystemLoader(_FOLDER), autoescape=True, undefined=StrictUndefined, trim_blocks=True
        ).get_template("page.html")

    def routes(self) -> list[Route]:
        """Return the routes."""
        return [
            Route("/", self.page),
            Route("/document", self.document),
            Route("/page/{file}", self.asset),
        ]

    async def page(self, request: Request) -> Response:
        """`GET /?q=&index=&mode=&bank=&path=&where=&since=`: the page, with hits if there is a query."""
        if not self._policy.has_key(request.headers):
            return self._answer({}, locked=True, status=401 if request.query_params else 200)
        asked = dict.fromkeys(_FIELDS, "")
        try:
            asked |= _fields(request, _FIELDS)
            await read_body(request)  # so that the next message is that of a client that leaves
            context = await self._found(request, asked) if asked["q"].strip() else {}
        except (ApiError, EpicError) as error:
            shown = error if isinstance(error, ApiError) else error_of(error)
            return self._answer({"asked": asked, "error": shown.message}, status=shown.status)
        return self._answer({"asked": asked, **context})

    async def document(self, request: Request) -> Response:
        """`GET /document?path=&index=&line=&last=&from=&to=`: lines of an indexed file, by default around a hit."""
        asked = dict.fromkeys(_DOCUMENT_FIELDS, "")
        try:
            asked |= _fields(request, _DOCUMENT_FIELDS)
            line, last = _number(asked["line"], "line"), _number(asked["last"] or asked["line"], "last")
            first = _number(asked["from"] or str(max(1, line - _AROUND)), "from")
            until = _number(asked["to"] or str(max(line, last) + _AROUND), "to")
            name, lines = await self._search.lines(asked["index"] or None, asked["path"])
        except (ApiError, EpicError) as error:
            shown = error if isinstance(error, ApiError) else error_of(error)
            return self._answer({"error": shown.message}, status=shown.status)
        first = min(first, max(1, len(lines)))
        until = min(max(first, until), len(lines), first + _MOST_LINES)
        link = partial(_document_link, name, asked["path"], line, last)
        document = {
            "path": asked["path"],
            "first": first,
            "last": until,
            "total": len(lines),
            "lines": [
                {"number": number, "text": lines[number - 1], "is_hit": line <= number <= last}
                for number in range(first, until + 1)
            ],
            "before": link(max(1, first - _PART), first - 1) if first > 1 else None,
            "after": link(until + 1, min(len(lines), until + _PART)) if until < len(lines) else None,
        }
        return self._answer({"document": document, "asked": {**dict.fromkeys(_FIELDS, ""), "index": name}})

    async def asset(self, request: Request) -> Response:
        """`GET /page/{file}`: style, script, icon."""
        name = request.path_params["file"]
        if name not in _TYPES:
            raise ApiError(404, f"There is no file {name[:80]!r} here. Open the page at /.", code="not_found")
        headers = {"Cache-Control": "no-cache", "Cross-Origin-Resource-Policy": "same-origin"}
        return Response((_FOLDER / name).read_bytes(), 200, headers, _TYPES[name])

    async def _found(self, request: Request, asked: Mapping[str, str]) -> dict[str, Any]:
        given: dict[str, Any] = {name: value for name, value in asked.items() if value.strip() and name != "q"}
        query = parse(SearchQuery, {"query": asked["q"], **given})
        bank = self._service.banks.get(query.bank) if query.bank else None
        name, hits, _ = await self._search.find(request, query)
        words, examples = QueryWords(query.query), _marked(bank)
        return {
            "asked": {**asked, "q": query.query, "index": name},
            "hits": [_shown(hit, name, query.query, words, examples) for hit in hits],
        }

    def _answer(self, context: Mapping[str, Any], *, locked: bool = False, status: int = 200) -> Response:
        indexes = [] if locked else list(self._service.indexes)
        known: dict[str, Any] = {
            "asked": {**dict.fromkeys(_FIELDS, ""), "index": indexes[0] if indexes else ""},
            "banks": [] if locked else self._banks(),
            "indexes": indexes,
            "modes": _MODES,
            "locked": locked,
            "error": None,
            "document": None,
            "hits": [],
        }
        html = self._template.render({**known, **context})
        # A file's name may have half a surrogate pair, for a byte that cannot be decoded.
        headers = {**_HEADERS, "Cache-Control": "no-store"}
        return Response(html.encode("utf-8", "replace"), status, headers, "text/html; charset=utf-8")

    def _banks(self) -> list[dict[str, Any]]:
        """Return the banks for the page's menu, one's own first; broken ones are left out."""
        found = []
        for name in self._service.banks.names():
            try:
                found.append(self._service.banks.describe(name))
            except (ApiError, BankError):  # removed or broken meanwhile
                continue
        return sorted(found, key=lambda bank: bank["built_in"])


def _fields(request: Request, known: Sequence[str]) -> dict[str, str]:
    """Return the fields of an address.

    Raises:
        ApiError: 400 for a field that is unknown or repeated.
    """
    given = request.query_params.multi_items()
    names = [name for name, _ in given]
    for name in names:
        if name not in known or names.count(name) > 1:
            fact = "is repeated" if name in known else "is unknown"
            raise ApiError(400, f"The field {name[:80]!r} {fact}. Known are {', '.join(known)}.", param=name[:80])
    return dict(given)


def _number(text: str, name: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise ApiError(400, f"{name} is not the number of a line. Use the link of a hit.", param=name)
    return max(1, int(text))


def _document_link(index: str, path: str, line: int, last: int, first: int = 0, until: int = 0) -> str:
    fields: dict[str, Any] = {"path": path, "index": index, "line": line, "last": last}
    if first:
        fields |= {"from": first, "to": until}
    return "/document?" + urlencode(fields, quote_via=quote, errors="replace")


def _marked(bank: DemonstrationBank | None) -> dict[str, str]:
    """Return the ids of a bank's examples, each with "right" or "wrong"."""
    if bank is None:
        return {}
    right = {example_id(each): "right" for each in bank.demonstrations}
    return right | {example_id(each): "wrong" for each in bank.negatives}


def _shown(hit: Hit, index: str, query: str, words: QueryWords, examples: Mapping[str, str]) -> dict[str, Any]:
    """Return a hit as the template takes it."""
    place, link = hit.path, None
    if hit.page is not None:
        place += f", page {hit.page}"
    elif hit.first_line is not None and hit.last_line is not None:
        place += f":{hit.first_line}-{hit.last_line}"
        link = _document_link(index, hit.path, hit.first_line, hit.last_line)
    facts = [_KNOWN[hit.marked]] if hit.marked else []
    if hit.cosine is not None:
        facts.append(f"cosine {hit.cosine:.3f}")
    if hit.bm25 is not None:
        facts.append(f"BM25 {hit.bm25:.2f}")
    if hit.duplicates:
        facts.append(f"also in {', '.join(hit.duplicates[:3])}")
    if hit.stale:
        facts.append(f"{hit.stale} since it was indexed")
    example = example_id(Demonstration(query, hit.text.strip()))
    return {
        "rank": hit.rank,
        "id": hit.id,
        "place": place,
        "link": link,
        "headings": hit.heading_path,
        "parts": _parts(hit.text, words),
        "facts": facts,
        "example": example,
        "marked": examples.get(example),
    }


def _parts(text: str, words: QueryWords) -> list[tuple[bool, str]]:
    """Return the pieces of a text in order, each with whether it is a word of the query."""
    parts, end = [], 0
    for (start, stop), _ in words.find(text):
        if start >= end:
            parts += [(False, text[end:start]), (True, text[start:stop])]
            end = stop
    return [(is_match, part) for is_match, part in (*parts, (False, text[end:])) if part]
