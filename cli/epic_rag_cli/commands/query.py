"""`epic-rag query`: search an index for one query, a batch of queries, or queries typed at a prompt.

The command builds one `SearchRequest` from its options and passes it to `ChromaIndexer.query` or `query_many`.
"""

from __future__ import annotations

import dataclasses
import math
import os
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from epic_rag.errors import BankError, DataError, EpicError
from epic_rag.files import read_jsonl, write_atomically
from epic_rag.query_prompt import QueryPrompt
from epic_rag_chroma import DEFAULT_MODE, DEFAULT_PER_FILE
from epic_rag_cli.last_query import save_last_query
from epic_rag_cli.options import (
    DEFAULT_DTYPE,
    DEFAULT_HITS,
    DEFAULT_TASK,
    Bank,
    Chroma,
    Command,
    ConfigFile,
    Device,
    Dtype,
    IndexDirs,
    Json,
    Mode,
    Model,
    Quiet,
    Strategy,
    Task,
    Verbose,
    bank_setting,
    open_indexes,
)
from epic_rag_cli.results import display_path, file_of, find_indexes, hit_lines
from epic_rag_cli.terminal import (
    Verbosity,
    emit,
    emit_json,
    encodable,
    hyperlinks,
    message,
    plural,
    printable,
    stdin_bytes,
    usage_error,
    verbosity,
)

if TYPE_CHECKING:
    from epic_rag_chroma import ChromaIndexer, FederatedIndex, Hit, SearchRequest, StaleState

__all__ = ["QueryCommand", "editor_command", "fill_open_number", "open_hit", "query", "run_prompt"]

_EXAMPLE = '{"query": "..."}'
_GROUP = 256  # queries that are encoded together
_HISTORY_LINES = 1000
_COMPARED_FILES = 10_000  # comparing more would take as long as the query
# Formats that are not text; they open in the system's viewer.
_DOCUMENT_KINDS = frozenset(["pdf", "docx", "pptx", "xlsx", "opendocument", "rtf", "epub"])
_PLUS_LINE_EDITORS = frozenset(
    ["vi", "vim", "nvim", "view", "gvim", "nano", "pico", "emacs", "emacsclient", "micro", "kak", "joe", "mg", "gedit"]
)
_GOTO_EDITORS = frozenset(["code", "code-insiders", "codium", "cursor", "windsurf"])


def query(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="TEXT",
            help="The query, in your own words; quotes are needed only around characters of the shell and words that "
            "begin with a dash. `-` reads it from standard input. Without it, on a terminal: a prompt for one query "
            "after the other.",
            show_default=False,
        ),
    ] = None,
    k: Annotated[int, typer.Option("-k", "--top-k", metavar="N", min=1, help="Number of hits.")] = DEFAULT_HITS,
    mode: Mode = None,
    where: Annotated[
        list[str] | None,
        typer.Option(
            "--where",
            metavar="CONDITION",
            help="Only chunks with this metadata: 'lang=python', 'kind!=pdf', 'page>=3'; can be repeated, all hold.",
        ),
    ] = None,
    path: Annotated[
        list[str] | None,
        typer.Option(
            "--path",
            metavar="PATTERN",
            help="Only files that match, as in .gitignore: 'guide/**', '*.md'; can be repeated, one must match.",
        ),
    ] = None,
    since: Annotated[
        str | None,
        typer.Option(
            "--since",
            metavar="TIME",
            help="Only files that changed since then: an age (12h, 7d, 2w) or a date (2026-01-31).",
        ),
    ] = None,
    show_all: Annotated[
        bool,
        typer.Option(
            "--all",
            help="Show every chunk as a hit: also near-duplicates, and neighbours in a section, any number of a file.",
        ),
    ] = False,
    per_file: Annotated[
        int | None,
        typer.Option(
            "--per-file",
            metavar="N",
            min=0,
            help="Hits of a file that come before its others, which fill the places left; 0 for no limit.",
            show_default=str(DEFAULT_PER_FILE),
        ),
    ] = None,
    min_score: Annotated[
        float | None,
        typer.Option(
            "--min-score",
            metavar="X",
            help="Only hits with this score: the reranker's with --rerank, bm25 with --mode keyword, else the cosine.",
        ),
    ] = None,
    names_only: Annotated[
        bool, typer.Option("--files", help="Print the names of the files only, the best first; -k counts files.")
    ] = False,
    after: Annotated[
        int, typer.Option("-A", "--after-context", metavar="N", min=0, help="Print N lines after each hit.")
    ] = 0,
    before: Annotated[
        int, typer.Option("-B", "--before-context", metavar="N", min=0, help="Print N lines before each hit.")
    ] = 0,
    context: Annotated[
        int, typer.Option("-C", "--context", metavar="N", min=0, help="Print N lines before and after each hit.")
    ] = 0,
    full_section: Annotated[
        bool, typer.Option("--full-section", help="Print the whole section of each hit instead of a snippet.")
    ] = False,
    task: Task = None,
    bank: Bank = None,
    num_demonstrations: Annotated[
        int | None,
        typer.Option(
            "-n",
            "--num-demonstrations",
            metavar="N",
            min=0,
            help="Number of demonstrations of --bank to use.",
            show_default="all",
        ),
    ] = None,
    strategy: Strategy = None,
    rerank: Annotated[
        str | None,
        typer.Option(
            "--rerank",
            metavar="MODEL",
            help="Reorder the best hits with a cross-encoder: a folder or a Hugging Face name.",
        ),
    ] = None,
    batch: Annotated[
        str | None,
        typer.Option(
            "--batch",
            metavar="FILE",
            help='Answer each line {"query": "..."} of a file, or of standard input (`-`); an "id" comes back as '
            "`query_id`.",
        ),
    ] = None,
    open_number: Annotated[
        int | None,
        typer.Option(
            "--open",
            metavar="[N]",
            min=1,
            help="Open hit N (the best without a number) in $VISUAL or $EDITOR at its line; a PDF in its viewer.",
        ),
    ] = None,
    model: Model = None,
    dtype: Dtype = DEFAULT_DTYPE,
    device: Device = None,
    as_json: Json = False,
    as_json_lines: Annotated[bool, typer.Option("--jsonl", help="Print each hit as one line of JSON.")] = False,
    index_dir: IndexDirs = None,
    chroma: Chroma = None,
    server: Annotated[
        bool,
        typer.Option(
            "--server/--no-server", help="Have a running `epic-rag serve` of this index answer, if there is one."
        ),
    ] = True,
    config_file: ConfigFile = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Print the chunks of text that answer a query, best first.

    Each hit has its rank, its scores (cosine: similarity of the vectors; bm25: match of the words), the file with
    first and last line or the page, and the headings above it. Near-duplicates are listed under the best of them, and
    hits that follow one another in a section are one hit.
    Files that changed or were deleted since they were indexed are marked. With several --index-dir, the indexes of one
    model are searched as one.
    Demonstrations of your own (--bank) change the results at once, without a new index.
    Without TEXT on a terminal, queries are typed one after the other and the model stays loaded.

    Examples:
        epic-rag query 'how do I undo the last commit?'
        epic-rag query undo the last commit -k 3 --json
        epic-rag query 'undo the last commit' --bank docs --num-demonstrations 4
        epic-rag query 'commit' --mode keyword --path '*.md' --since 30d
        epic-rag query 'commit' --index-dir docs --index-dir notes
        epic-rag query 'commit' --files
        epic-rag query 'commit' -k 1 --full-section
    """
    if words and words[0] == "-" and len(words) > 1:
        raise usage_error("`-` (standard input) and TEXT exclude each other. Use one of them.")
    text = " ".join(words) if words else None
    if as_json and as_json_lines:
        raise usage_error("--json and --jsonl exclude each other. Use one of them.")
    if batch is not None and (text is not None or open_number is not None):
        raise usage_error(f"--batch excludes {'TEXT' if text is not None else '--open'}. Use one of them.")
    on_terminal = all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout))
    if text is None and batch is None and (as_json or as_json_lines or open_number is not None or not on_terminal):
        raise usage_error("Missing argument 'TEXT'")
    if num_demonstrations and not bank:
        raise usage_error("-n needs demonstrations. Pass --bank, for instance --bank docs")
    for name in bank or ():
        if os.path.isfile(name):
            raise BankError(
                f"{name} is a file, a bank is a folder. Run `epic-rag bank build {name} --out FOLDER --task "
                f"{task or DEFAULT_TASK}` and pass that folder to --bank."
            )
    from epic_rag_chroma import SearchRequest

    mode = mode or DEFAULT_MODE
    if mode == "keyword" and bank:
        message("note", "Keyword search uses no demonstrations. --bank only puts known answers of this query first.")
    elif bank and num_demonstrations is None:
        from epic_rag.demonstrations import is_enabled

        for name in (name for name in bank if not is_enabled(name)):
            message(
                "note",
                f"The demonstrations of {name} are off: they did not help where they were measured. -n N uses them.",
            )
    # All input is checked before a model is loaded.
    queries = [] if batch is None else _read_batch(batch)
    if text == "-":
        text = _read_stdin().strip()
    if text is not None and not text.strip():
        raise typer.BadParameter("it is empty", param_hint="'TEXT'")
    filters = None
    if where or path or since:
        from epic_rag_chroma import parse_filters

        filters = parse_filters(where or (), path or (), since)
    request = SearchRequest(
        # A bank has an instruction, so the default task is for queries without one.
        prompt=QueryPrompt(
            task=DEFAULT_TASK if task is None and not bank else task,
            bank=bank_setting(bank),
            num_demonstrations=num_demonstrations,
            strategy=strategy,
        ),
        k=k,
        mode=mode,
        filters=filters,
        collapse=not show_all,
        per_file=1 if names_only else per_file,
        min_score=min_score,
        before=before or context,
        after=after or context,
        full_section=full_section,
        reranker=rerank,
    )
    folders = find_indexes(index_dir)
    style: Literal["text", "json", "jsonl"] = "json" if as_json else "jsonl" if as_json_lines else "text"
    printer = _Printer(folders, request, style, names_only=names_only)
    if server and text is not None and chroma is None and len(folders) == 1 and verbosity() is not Verbosity.VERBOSE:
        from epic_rag_chroma import ServedModel, query_running_server

        served = ServedModel(model, dtype, device)
        answer = query_running_server(folders[0], encodable(text), request, served, max_files=_COMPARED_FILES)
        if answer is not None:
            printer.hits(text, answer.hits)
            _note_stale(answer.stale, index_dir, answer.hits)
            if open_number is not None and answer.hits:
                open_hit(answer.hits, open_number)
            return
    with open_indexes(folders, model=model, dtype=dtype, device=device, chroma=chroma) as indexer:
        if batch is not None:
            printer.batch(indexer, queries)
            _note_stale(indexer.stale_files(max_files=_COMPARED_FILES), index_dir)
        elif text is not None:
            hits = indexer.query(encodable(text), request)
            printer.hits(text, hits)
            _note_stale(indexer.stale_files(max_files=_COMPARED_FILES), index_dir, hits)
            if open_number is not None and hits:
                open_hit(hits, open_number)
        else:
            status = indexer.status()
            states = status if isinstance(status, list) else [status]
            chunks, files = (sum(getattr(state, name) for state in states) for name in ("chunks", "files"))
            message("note", f"{plural(chunks, 'chunk')} of {plural(files, 'file')}. Ctrl-D quits.")
            _note_stale(indexer.stale_files(max_files=_COMPARED_FILES), index_dir)
            run_prompt(lambda line: printer.hits(line, indexer.query(encodable(line), request)))


class _Printer:
    """Prints hits in the format that the options choose.

    Args:
        folders: The index folders, as the user wrote them.
        request: The search request.
        style: "text", "json" or "jsonl".
        names_only: Whether the best hit of each file is printed, as text the file's name.
    """

    def __init__(
        self,
        folders: Sequence[Path],
        request: SearchRequest,
        style: Literal["text", "json", "jsonl"],
        *,
        names_only: bool = False,
    ) -> None:
        self._folders = [str(folder) for folder in folders]
        self._request = request
        self._style = style
        self._names_only = names_only

    def hits(self, text: str, hits: Sequence[Hit], more: Mapping[str, Any] | None = None) -> None:
        """Print the hits of one query; if there are none, a note with the likely reason.

        Args:
            text: The query.
            hits: Its hits.
            more: Further keys of a line of --jsonl.
        """
        hits = self._shown(hits)
        if more is None and hits:
            save_last_query(text, hits)
        if self._style == "json":
            emit_json(self._answer(text, hits))
        elif self._style == "jsonl":
            for hit in hits:
                emit_json({"query": text, **(more or {}), **dataclasses.asdict(hit)}, one_line=True)
        elif hits and self._names_only:
            emit([printable(display_path(file_of(hit)) if hit.root else hit.path) for hit in hits])
        elif hits:
            request = self._request
            whole = bool(request.before or request.after or request.full_section)
            emit(hit_lines(hits, text, request.mode, links=hyperlinks(), whole=whole))
        if hits or (self._style != "text" and more is not None):
            return
        if self._request.min_score is not None:
            message("note", f"No hit has a score of {self._request.min_score} or more. Lower --min-score.")
        elif self._request.filters is not None:
            message("note", "No chunk matches --where, --path and --since. Relax a filter.")
        elif self._request.mode == "keyword":
            message("note", "No chunk has a word of the query. Use other words or --mode hybrid.")
        else:
            message("note", f"{' and '.join(self._folders)} holds no chunks. Run `epic-rag index PATH` to add some.")

    def batch(self, indexer: ChromaIndexer | FederatedIndex, queries: Sequence[_BatchQuery]) -> None:
        """Print the hits of many queries, which are encoded in groups."""
        from rich.text import Text

        answers: list[dict[str, Any]] = []
        for start in range(0, len(queries), _GROUP):
            group = queries[start : start + _GROUP]
            results = indexer.query_many([encodable(each.text) for each in group], self._request)
            for number, (each, hits) in enumerate(zip(group, results, strict=True), start):
                if self._style == "json":
                    answers.append({**self._answer(each.text, hits), "query_id": each.id})
                    continue
                if self._style == "text":
                    heading = Text(printable(each.text), style="bold underline")
                    if each.id is not None:
                        heading = Text(f"{printable(str(each.id))}  ", style="dim") + heading
                    emit([heading] if number == 0 else [Text(), heading])
                self.hits(each.text, hits, {"query_id": each.id})
        if self._style == "json":
            emit_json(answers)

    def _answer(self, text: str, hits: Sequence[Hit]) -> dict[str, Any]:
        prompt = self._request.prompt
        return {
            "query": text,
            "index_dir": self._folders[0],
            "index_dirs": self._folders,
            "task": prompt.task,
            "bank": prompt.bank,
            "mode": self._request.mode,
            "hits": [dataclasses.asdict(hit) for hit in self._shown(hits)],
        }

    def _shown(self, hits: Sequence[Hit]) -> Sequence[Hit]:
        """Return the hits that are printed: with names only, the best one of each file."""
        if not self._names_only:
            return hits
        best = list({(hit.root, hit.path): hit for hit in reversed(hits)}.values())
        return sorted(best, key=lambda hit: hit.rank)


def _note_stale(stale: Mapping[str, StaleState] | None, given: Sequence[Path] | None, hits: Sequence[Hit] = ()) -> None:
    """Print how many files changed since the last run; of very many files, only those of the hits are compared."""
    if stale is None:
        stale = {file_of(hit): hit.stale for hit in hits if hit.stale is not None}
    if not stale:
        return
    counts = Counter(stale.values())
    shown = [f"{plural(counts['changed'], 'file')} changed"] if counts["changed"] else []
    shown += [f"{plural(counts['deleted'], 'file')} deleted"] if counts["deleted"] else []
    options = [f" --index-dir {shlex.quote(str(folder))}" for folder in given or ()] or [""]
    commands = " and ".join(f"`epic-rag index{option}`" for option in options)
    message("note", f"Since the last run: {', '.join(shown)}. Run {commands} to update the index.")


@dataclass(frozen=True)
class _BatchQuery:
    text: str
    id: str | int | float | None


def _read_stdin() -> str:
    try:
        return stdin_bytes().read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"Standard input is not UTF-8 (byte {error.start}). Send it as UTF-8.") from None


def _read_batch(source: str) -> list[_BatchQuery]:
    """Read JSON lines with `query` and optionally `id` from a file, or from standard input ("-").

    Raises:
        DataError: If it cannot be read, has no queries, or has a malformed line, which the message names.
    """
    name = "standard input" if source == "-" else source
    queries = []
    for number, row in read_jsonl(name, stream=stdin_bytes() if source == "-" else None):
        text, identity = row.get("query"), row.get("id")
        if not isinstance(text, str) or not text.strip():
            raise DataError(f'{name}:{number}: "query" must be a string with text. Write a line like {_EXAMPLE}.')
        is_number = isinstance(identity, (int, float)) and not isinstance(identity, bool) and math.isfinite(identity)
        if identity is not None and not isinstance(identity, str) and not is_number:
            raise DataError(f'{name}:{number}: "id" must be a string or a finite number.')
        queries.append(_BatchQuery(text, identity))
    if not queries:
        raise DataError(f"{name} holds no queries. Write lines like {_EXAMPLE}.")
    return queries


def run_prompt(answer: Callable[[str], None]) -> None:
    """Read queries typed at a prompt and answer them, until Ctrl-D.

    Ctrl-C discards the line or ends the search; an error of the search is printed. With readline, lines of earlier
    sessions can be recalled. A line that begins with a space is not kept, as in shells.

    Args:
        answer: Searches for one query and prints its hits.
    """
    history = _History()
    while True:
        try:
            line = input("epic-rag> ")
        except EOFError:
            emit([""])
            return
        except KeyboardInterrupt:
            emit([""])
            continue
        history.add(line)
        try:
            if line.strip():
                answer(line.strip())
        except KeyboardInterrupt:
            emit([""])
            message("note", "Interrupted. Ctrl-D quits.")
        except EpicError as error:
            message("error", str(error))


class _History:
    """History of the interactive prompt: a private file in the user's state folder, loaded into readline."""

    def __init__(self) -> None:
        from platformdirs import user_state_path

        self._file: Path | None = user_state_path("epic-rag", appauthor=False) / "query_history"
        self._readline: Any = None
        lines: list[str] = []
        with suppress(ImportError):  # Windows edits lines without it
            import readline

            self._readline = readline
            readline.set_auto_history(False)
            readline.clear_history()
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._file.touch(0o600)
            self._file.chmod(0o600)
            lines = self._file.read_text(encoding="utf-8", errors="replace").splitlines()
            if len(lines) > 2 * _HISTORY_LINES:
                write_atomically(self._file, "".join(f"{line}\n" for line in lines[-_HISTORY_LINES:]))
        except OSError as error:
            message("warning", f"{self._file}: {error.strerror}. The history of this session is not kept.")
            self._file = None
        for line in lines[-_HISTORY_LINES:]:
            if self._readline is not None and line.isprintable():  # an escape sequence must not reach the terminal
                self._readline.add_history(line)

    def add(self, line: str) -> None:
        if not line.strip() or line.startswith(" ") or not line.isprintable():
            return
        if self._readline is not None:
            self._readline.add_history(line)
        if self._file is not None:
            with suppress(OSError), self._file.open("a", encoding="utf-8", errors="replace") as file:
                file.write(f"{line}\n")


def open_hit(hits: Sequence[Hit], number: int) -> None:
    """Open the file of hit `number`: documents in the system's viewer, text in $VISUAL or $EDITOR at its line.

    Text is never passed to the system's opener, which would run a script.

    Raises:
        DataError: If the file is gone, or is outside the indexed folder.
        EpicError: If there is no such hit, or nothing opens it.
    """
    if number > len(hits):
        raise EpicError(f"There is no hit {number}, only {plural(len(hits), 'hit')}. Raise -k.")
    hit = hits[number - 1]
    path = file_of(hit)
    if os.path.isabs(hit.path) or ".." in PurePath(hit.path).parts:
        raise DataError(f"{hit.path} is outside the indexed folder. Run `epic-rag index --rebuild`.")
    if not os.path.isfile(path):
        raise DataError(f"{display_path(path)} no longer exists. Run `epic-rag index` to update the index.")
    if hit.kind in _DOCUMENT_KINDS:
        if status := typer.launch(path, wait=sys.platform == "linux"):
            raise EpicError(f"No program opens {display_path(path)} (status {status}). Open the file by hand.")
        return
    command = editor_command(path, hit.first_line)
    # After `... | epic-rag query - --open` standard input is a pipe, but an editor needs the terminal.
    with ExitStack() as stack:
        terminal = None
        if os.name == "posix" and not sys.stdin.isatty():
            with suppress(OSError):  # no terminal, and a graphical editor needs none
                terminal = stack.enter_context(open("/dev/tty", "rb"))
        try:
            child = stack.enter_context(subprocess.Popen(command, stdin=terminal))
        except OSError as error:
            raise EpicError(
                f"The editor {command[0]} cannot be started ({error.strerror}). Set EDITOR to your editor."
            ) from None
        while child.poll() is None:
            with suppress(KeyboardInterrupt):  # Ctrl-C is for the editor
                child.wait()
        if child.returncode:
            message("warning", f"{command[0]} ended with status {child.returncode}.")


def editor_command(path: str, line: int | None) -> list[str]:
    """Return the command that opens a text file in $VISUAL or $EDITOR, at `line` if the editor's syntax is known.

    Raises:
        EpicError: If the variable is not a command line.
    """
    setting = next((os.environ[name] for name in ("VISUAL", "EDITOR") if os.environ.get(name, "").strip()), None)
    if setting is None:
        setting = {"darwin": "open -t", "win32": "notepad"}.get(sys.platform, "nano" if shutil.which("nano") else "vi")
    try:
        words = shlex.split(setting, posix=os.name != "nt")
    except ValueError as error:
        raise EpicError(f"The editor {setting!r} is not a command line ({error}). Set EDITOR to your editor.") from None
    name = Path(words[0]).stem.lower()
    if line is None:
        return [*words, path]
    if name in _GOTO_EDITORS:
        return [*words, "--goto", f"{path}:{line}"]
    return [*words, *([f"+{line}"] if name in _PLUS_LINE_EDITORS else []), path]


class QueryCommand(Command):
    """The `query` command, whose option `--open` may stand without a number."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the command line."""
        return super().parse_args(ctx, fill_open_number(args))


def fill_open_number(arguments: Sequence[str]) -> list[str]:
    """Insert the number 1 after an `--open` without a number: Typer has no options with an optional value."""
    filled: list[str] = []
    for place, argument in enumerate(arguments):
        if argument == "--":
            return [*filled, *arguments[place:]]
        filled.append(argument)
        if argument == "--open" and not "".join(arguments[place + 1 : place + 2]).isdecimal():
            filled.append("1")
    return filled
