"""Tools for assistants over the Model Context Protocol: search, get, status and, if allowed, add_example.

Results have text with `file:line` in a budget of characters, and the same as structured content. Indexes are read in
this process; a model is loaded with the first search that needs one.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

import anyio
from mcp.server import MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp.server.stdio import stdio_server
from mcp.server.transport_security import TransportSecuritySettings
from mcp.types import CallToolResult, JSONRPCRequest, TextContent, ToolAnnotations
from pydantic import BaseModel, Field
from starlette.applications import Starlette

from epic_rag import DataError, Demonstration, EpicError, QueryPrompt, __version__
from epic_rag.tasks import DEFAULT_TASK
from epic_rag_chroma import DEFAULT_PER_FILE, Hit, SearchRequest, parse_filters
from epic_rag_server.banks import BankStore
from epic_rag_server.errors import ApiError
from epic_rag_server.security import AccessPolicy, RequestGuard

if TYPE_CHECKING:
    from epic_rag_chroma import ChromaIndexer

__all__ = ["Tools", "http_app", "mcp_server", "run_stdio"]

_BUDGET = 16_000
_MAX_LINES = 2_000
_PARAGRAPH_LINES = 40
_SUGGESTIONS = 5
_DRAIN_SECONDS = 60.0
_MAX_BODY = 2**20
_PLACE = re.compile(r"(.+?):(\d{1,9})(?:-(\d{1,9}))?")
_READ_ONLY = ToolAnnotations(read_only_hint=True, open_world_hint=False)
_ADDS = ToolAnnotations(read_only_hint=False, destructive_hint=False, idempotent_hint=True, open_world_hint=False)


class Found(BaseModel):
    """A hit: `file` as `get` takes it; lines are 0 for formats without lines."""

    file: str
    first_line: int
    last_line: int
    page: int
    heading: str
    score: float
    text: str


class SearchResult(BaseModel):
    """Hits of a search, best first."""

    index: str
    hits: list[Found]


class Lines(BaseModel):
    """Lines of a file."""

    index: str
    file: str
    first_line: int
    last_line: int
    total_lines: int
    text: str


class IndexSummary(BaseModel):
    """An index: the folders it covers and its contents."""

    name: str
    roots: list[str]
    files: int
    chunks: int
    kinds: dict[str, int]
    updated_at: str
    state: str


class Status(BaseModel):
    """All indexes and banks."""

    indexes: list[IndexSummary]
    banks: list[str]


class Added(BaseModel):
    """An example that a bank has from now on."""

    bank: str
    examples: int
    passage: str


class Tools:
    """The tools as methods; the names, types and docstrings of their parameters are what an assistant reads.

    Args:
        indexes: Indexes by name; the first is the default.
        banks: Banks by name.
        bank: The bank that `add_example` writes to; None if no examples may be added.
    """

    def __init__(self, indexes: Mapping[str, ChromaIndexer], banks: BankStore, bank: str | None = None) -> None:
        self._indexes = indexes
        self._banks = banks
        self._bank = bank

    def search(
        self,
        query: Annotated[str, Field(description="What to find, in natural language or as keywords")],
        index: Annotated[str, Field(description="Name of an index from status; empty for the first")] = "",
        top_k: Annotated[int, Field(description="Number of hits", ge=1, le=50)] = 10,
        path: Annotated[str, Field(description="Only files that match, as in .gitignore: guide/** or *.md")] = "",
        where: Annotated[str, Field(description="Only this metadata: lang=python, kind!=pdf, page>=3")] = "",
        since: Annotated[str, Field(description="Only files changed since: 12h, 7d or 2026-01-31")] = "",
        mode: Annotated[Literal["hybrid", "dense", "keyword"], Field(description="Way of ranking")] = "hybrid",
        bank: Annotated[str, Field(description="Bank of examples from status to adapt the query by")] = "",
        per_file: Annotated[
            int, Field(description="Hits of a file before its others; 0: no limit", ge=0)
        ] = DEFAULT_PER_FILE,
        full_section: Annotated[bool, Field(description="Return whole sections instead of passages")] = False,
    ) -> Annotated[CallToolResult, SearchResult]:
        """Search the indexed documents. Returns passages with file:line; read more around one with get."""
        name, indexer = self._index(index)
        try:
            filters = parse_filters([where] if where else [], [path] if path else [], since or None)
            prompt = QueryPrompt(bank=self._banks.resolve(bank)) if bank else QueryPrompt(task=DEFAULT_TASK)
            request = SearchRequest(
                prompt, k=top_k, mode=mode, filters=filters or None, per_file=per_file, full_section=full_section
            )
            hits = indexer.query(query, request)
        except (EpicError, ApiError) as error:
            raise ToolError(str(error)) from None
        shown: list[Found] = []
        left = _BUDGET
        for hit in hits:
            text = _cut(hit.text, max(200, left // max(1, len(hits) - len(shown))))
            left -= len(text)
            shown.append(_found(hit, text))
        blocks = [f"{rank}. {_heading(hit)}\n{hit.text}" for rank, hit in enumerate(shown, 1)]
        return _result(
            "\n\n".join(blocks) or "No hits. Use other words or fewer filters.", SearchResult(index=name, hits=shown)
        )

    def get(
        self,
        file: Annotated[str, Field(description="A file of a hit; may end in :LINE or :FIRST-LAST")],
        from_line: Annotated[int, Field(description="First line, from 1", ge=1)] = 1,
        max_lines: Annotated[int, Field(description="Number of lines", ge=1, le=_MAX_LINES)] = 200,
    ) -> Annotated[CallToolResult, Lines]:
        """Read lines of an indexed file. Other files cannot be read."""
        found = self._lines(file)
        place = _PLACE.fullmatch(file)
        if found is None and place is not None:
            file, from_line = place[1], max(1, int(place[2]))
            max_lines = min(max_lines, max(1, int(place[3]) - from_line + 1)) if place[3] else max_lines
            found = self._lines(file)
        if found is None:
            raise ToolError(self._unknown(file))
        name, lines = found
        text = _cut("\n".join(lines[from_line - 1 : from_line - 1 + max_lines]), _BUDGET)
        last = min(len(lines), from_line + text.count("\n"))
        content = Lines(index=name, file=file, first_line=from_line, last_line=last, total_lines=len(lines), text=text)
        return _result(f"{file}:{from_line}-{last} of {len(lines)}\n{text}", content)

    def status(self) -> Annotated[CallToolResult, Status]:
        """List the indexes, the folders that they cover, and the banks of examples."""
        listed = []
        for name, indexer in self._indexes.items():
            try:
                state = indexer.status()
            except EpicError as error:
                raise ToolError(str(error)) from None
            listed.append(
                IndexSummary(
                    name=name, roots=list(state.roots), files=state.files, chunks=state.chunks, kinds=state.kinds,
                    updated_at=state.updated_at or "", state=state.state,
                )
            )  # fmt: skip
        lines = [f"{each.name}: {each.files} files, {each.chunks} chunks of {', '.join(each.roots)}" for each in listed]
        banks = self._banks.names()
        return _result("\n".join([*lines, f"banks: {', '.join(banks)}"]), Status(indexes=listed, banks=banks))

    def add_example(
        self,
        query: Annotated[str, Field(description="The question")],
        file: Annotated[str, Field(description="The file that answers it, from a hit")],
        line: Annotated[int, Field(description="A line of the passage that answers it", ge=1)],
    ) -> Annotated[CallToolResult, Added]:
        """Remember that a passage answers a question, so that searches with this bank find such passages first."""
        assert self._bank is not None
        found = self._lines(file)
        if found is None:
            raise ToolError(self._unknown(file))
        passage = _paragraph(found[1], line)
        if not passage or not query.strip():
            raise ToolError(f"Line {line} of {file[:200]} has no text around it. Use a line of a hit.")
        example = Demonstration(query.strip(), passage)
        try:
            if self._bank not in self._banks.names():
                self._banks.create(self._bank, [], task=DEFAULT_TASK, instruction=None)
            bank = self._banks.add(self._bank, [example])
        except (EpicError, ApiError) as error:
            raise ToolError(str(error)) from None
        text = f"The bank {self._bank} has {len(bank)} examples. Search with bank={self._bank} to use them."
        return _result(text, Added(bank=self._bank, examples=len(bank), passage=passage))

    def _lines(self, file: str) -> tuple[str, list[str]] | None:
        """Return the first index that has a file, and the file's lines; None if there is none."""
        for name, indexer in self._indexes.items():
            try:
                return name, indexer.read_lines(file)
            except EpicError as error:
                if not isinstance(error, DataError) or file in indexer.paths():
                    raise ToolError(str(error)) from None
            except ValueError:  # a character that no path has
                continue
        return None

    def _unknown(self, file: str) -> str:
        known = sorted({path for indexer in self._indexes.values() for path in indexer.paths()})
        wanted = file.rpartition("/")[2].lower()
        similar = [path for path in known if path.rpartition("/")[2].lower() == wanted]
        similar += [path for path in difflib.get_close_matches(file, known, _SUGGESTIONS) if path not in similar]
        hint = f"Did you mean {', '.join(similar[:_SUGGESTIONS])}?" if similar else "Use the file of a hit of search."
        return f"{file[:200]} is not a file of an index. {hint}"

    def _index(self, name: str) -> tuple[str, ChromaIndexer]:
        chosen = name or next(iter(self._indexes))
        if chosen not in self._indexes:
            raise ToolError(f"There is no index {name[:80]!r}. Known are {', '.join(self._indexes)}.")
        return chosen, self._indexes[chosen]


def mcp_server(indexes: Mapping[str, ChromaIndexer], banks: BankStore, *, bank: str | None = None) -> MCPServer:
    """Return an MCP server of the tools.

    Args:
        indexes: Indexes by name, at least one.
        banks: Banks by name.
        bank: The bank for `add_example`, which is offered only with one.
    """
    tools = Tools(indexes, banks, bank)
    server: MCPServer = MCPServer(
        "epic-rag",
        instructions=f"Searches documents of this machine. Indexes: {', '.join(indexes)}. Cite file:line of hits.",
        version=__version__,
        log_level="ERROR",
        subscriptions=False,
    )
    for tool in (tools.search, tools.get, tools.status):
        server.tool(annotations=_READ_ONLY)(tool)
    if bank is not None:
        server.tool(annotations=_ADDS)(tools.add_example)
    return server


async def run_stdio(server: MCPServer) -> None:
    """Serve on standard input and output until the input ends and its requests are answered.

    The SDK alone would cancel what is in progress at the end of the input.
    """
    async with stdio_server() as (read, write):
        pending = _Pending()
        lowlevel = server._lowlevel_server
        requests: Any = _Requests(read, pending)
        answers: Any = _Answers(write, pending)
        await lowlevel.run(requests, answers, lowlevel.create_initialization_options())


def http_app(server: MCPServer, policy: AccessPolicy) -> Starlette:
    """Return the ASGI application of a server over Streamable HTTP, at /mcp.

    Args:
        server: The server.
        policy: Who has access; checked before the SDK sees a request.
    """
    app = server.streamable_http_app(
        transport_security=TransportSecuritySettings(enable_dns_rebinding_protection=False),
        max_request_body_size=_MAX_BODY,
    )
    app.add_middleware(RequestGuard, policy=policy)
    return app


class _Pending:
    """Ids of requests without an answer."""

    def __init__(self) -> None:
        self.ids: set[str | int] = set()
        self.changed = anyio.Event()

    async def wait(self) -> None:
        """Wait until all are answered. A request that the client has cancelled gets no answer, hence the limit."""
        with anyio.move_on_after(_DRAIN_SECONDS):
            while self.ids:
                self.changed = anyio.Event()
                await self.changed.wait()


class _Wrapped:
    """A stream of messages that also records ids."""

    def __init__(self, stream: Any, pending: _Pending) -> None:
        self._stream = stream
        self._pending = pending

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    async def __aenter__(self) -> Any:
        await self._stream.__aenter__()
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self._stream.__aexit__(*error)


class _Requests(_Wrapped):
    def __aiter__(self) -> _Requests:
        return self

    async def __anext__(self) -> Any:
        try:
            item = await self._stream.__anext__()
        except StopAsyncIteration:
            await self._pending.wait()
            raise
        if isinstance(getattr(item, "message", None), JSONRPCRequest):
            self._pending.ids.add(item.message.id)
        return item


class _Answers(_Wrapped):
    async def send(self, item: Any) -> None:
        await self._stream.send(item)
        self._pending.ids.discard(getattr(item.message, "id", None))
        self._pending.changed.set()


def _result(text: str, content: BaseModel) -> CallToolResult:
    return CallToolResult(content=[TextContent(type="text", text=text)], structured_content=content.model_dump())


def _found(hit: Hit, text: str) -> Found:
    return Found(
        file=hit.path,
        first_line=hit.first_line or 0,
        last_line=hit.last_line or 0,
        page=hit.page or 0,
        heading=" > ".join(hit.heading_path),
        score=round(hit.score, 4),
        text=text,
    )


def _heading(hit: Found) -> str:
    place = f":{hit.first_line}-{hit.last_line}" if hit.first_line else f" page {hit.page}" if hit.page else ""
    return f"{hit.file}{place}{f'  {hit.heading}' if hit.heading else ''}"


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[: limit - 4]} ..."


def _paragraph(lines: list[str], line: int) -> str:
    """Return the lines around one up to the next blank ones; "" if there is no such line."""
    if line > len(lines) or not lines[line - 1].strip():
        return ""
    first = last = line - 1
    while first > max(0, line - _PARAGRAPH_LINES) and lines[first - 1].strip():
        first -= 1
    while last < min(len(lines), line + _PARAGRAPH_LINES) and lines[last].strip():
        last += 1
    return "\n".join(lines[first:last]).strip()
