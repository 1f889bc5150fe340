"""`epic-rag query`: the passages that answer a question, many questions, or one after the other."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO, get_args

import typer

from epic_rag.errors import BankError, ConfigError, DataError, EpicError
from epic_rag_chroma import SEARCH_MODES
from epic_rag_cli.options import (
    DEFAULT_DTYPE,
    DEFAULT_HITS,
    DEFAULT_TASK,
    Bank,
    Chroma,
    Device,
    Dtype,
    IndexDir,
    Json,
    Mode,
    Model,
    ShownBy,
    Strategy,
    Task,
    complete_banks,
    complete_modes,
    complete_strategies,
    complete_tasks,
)
from epic_rag_cli.results import display_path, file_of, find_index, hit_lines, passage_lines
from epic_rag_cli.terminal import columns, emit, emit_json, hyperlinks, message, plural, printable, usage_error

if TYPE_CHECKING:
    from types import ModuleType

    from epic_rag_chroma import ChromaIndexer, Hit, IndexStatus, SearchMode

__all__ = [
    "Asked",
    "Asker",
    "BatchQuery",
    "History",
    "Session",
    "editor_command",
    "history_file",
    "open_hit",
    "query",
    "read_batch",
    "read_stdin",
]


# --- from batch
# Many queries from a file: JSON lines, read and checked before any model is loaded.

STDIN = "-"
_STDIN_NAME = "standard input"
_EXAMPLE = '{"query": "..."}'


@dataclass(frozen=True)
class BatchQuery:
    """A query of a batch, and the `id` that came with it."""

    text: str
    id: str | int | float | None = None


def read_stdin() -> str:
    """Return what standard input holds, as text.

    Raises:
        DataError: It is closed, or is not UTF-8.
    """
    try:
        return _stdin().read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{_STDIN_NAME} is not UTF-8 (byte {error.start}); send it as UTF-8") from None


def read_batch(source: str) -> list[BatchQuery]:
    """Read queries from JSON lines: an object with `query` and perhaps `id` on each; empty lines do not count.

    Args:
        source: A file, or "-" for standard input.

    Raises:
        DataError: It cannot be read, a line is malformed (the message names it), or there is no query.
    """
    if source == STDIN:
        queries = list(_queries(_STDIN_NAME, _stdin()))
    else:
        try:
            with Path(source).open("rb") as file:
                queries = list(_queries(source, file))
        except OSError as error:
            raise DataError(
                f"{source} cannot be read ({error.strerror or error}); give --batch a file of lines {_EXAMPLE}"
            ) from None
    if not queries:
        name = _STDIN_NAME if source == STDIN else source
        raise DataError(f"{name} holds no queries; give --batch a file of lines {_EXAMPLE}")
    return queries


def _stdin() -> BinaryIO:
    if sys.stdin is None or not hasattr(sys.stdin, "buffer"):
        raise DataError(f"{_STDIN_NAME} is closed; send the text through a pipe, or give it on the command line")
    return sys.stdin.buffer


def _queries(name: str, file: BinaryIO) -> Iterator[BatchQuery]:
    for number, raw in enumerate(file, start=1):
        place = f"{name}:{number}"
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{place} is not UTF-8 (byte {error.start}); save the file as UTF-8") from None
        if line.strip():
            yield _query(place, line)


def _query(place: str, line: str) -> BatchQuery:
    try:
        value: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        why = getattr(error, "msg", None) or str(error)
        raise DataError(f"{place} is no JSON ({why}); write a line like {_EXAMPLE}") from None
    if not isinstance(value, dict):
        raise DataError(f"{place} is {_kind(value)}, not an object; write a line like {_EXAMPLE}")
    text = value.get("query")
    if not isinstance(text, str):
        said = f'"query" is {_kind(text)}' if "query" in value else 'there is no "query"'
        raise DataError(f"{place}: {said}, it must be a string; write a line like {_EXAMPLE}")
    if not text.strip():
        raise DataError(f'{place}: "query" is empty; write a line like {_EXAMPLE}')
    given = value.get("id")
    is_number = isinstance(given, (int, float)) and not isinstance(given, bool) and math.isfinite(given)
    if given is not None and not isinstance(given, str) and not is_number:
        raise DataError(f'{place}: "id" is {_kind(given)}; it must be a string or a number')
    return BatchQuery(text, given)


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number that JSON does not have" if value != value else "a number")


# --- from history
# What was typed into an interactive session, kept for the next: a private file in the user's state folder.

_MOST_LINES = 1000
_LONGEST = 10_000


def history_file() -> Path:
    """Return where the history is: below $XDG_STATE_HOME, or the folder that stands for it."""
    given = os.environ.get("XDG_STATE_HOME", "")
    # The specification says to ignore a path that is relative.
    state = Path(given) if os.path.isabs(given) else Path.home() / ".local" / "state"
    return state / "epic-rag" / "query_history"


class History:
    """Lines that were typed, oldest first. One that cannot be kept is no reason to stop."""

    def __init__(self) -> None:
        self._file = history_file()
        self._is_kept = True

    def load(self) -> list[str]:
        """Return the lines of earlier sessions; a long file is shortened."""
        try:
            lines = self._file.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
        except FileNotFoundError:
            return []
        except OSError as error:
            self._give_up(error)
            return []
        lines = [line for line in lines if 0 < len(line) <= _LONGEST and line.isprintable()]
        if len(lines) > 2 * _MOST_LINES:
            lines = lines[-_MOST_LINES:]
            self._write(lines, os.O_TRUNC)
        return lines[-_MOST_LINES:]

    def add(self, line: str) -> None:
        """Keep a line, unless it begins with a space, as shells have it."""
        if line.strip() and not line.startswith(" ") and line.isprintable() and len(line) <= _LONGEST:
            self._write([line], os.O_APPEND)

    def _write(self, lines: list[str], flag: int) -> None:
        if not self._is_kept:
            return
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            # Nobody else's business, also where the file was made by something else.
            handle = os.open(self._file, os.O_WRONLY | os.O_CREAT | flag, 0o600)
            with os.fdopen(handle, "a", encoding="utf-8", errors="replace") as file:
                if hasattr(os, "fchmod"):
                    os.fchmod(handle, 0o600)
                file.writelines(f"{line}\n" for line in lines)
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self._is_kept = False
        message("warning", f"{self._file}: {error.strerror}; what you type is not kept for the next time")


# --- from editor
# Opens a hit: text in an editor at its line, documents in the program that the system has for them.
#
# The editor is $VISUAL or $EDITOR, started without a shell. Text is never handed to the system's own opener: it would run
# a script, or a file that looks like one.

# How editors are told a line; {line} and {file} are filled in.
_SYNTAXES = {
    "+{line} {file}": """vi vim nvim view gvim mvim nano pico emacs emacsclient micro kak joe jove mg ne zile mcedit
        gedit gnome-text-editor bbedit less""",
    "-g {file}:{line}": "code code-insiders codium vscodium cursor windsurf positron",
    "{file}:{line}": "subl sublime_text hx helix zed zeditor lapce pulsar atom",
    "--line {line} {file}": """idea pycharm webstorm phpstorm goland clion rubymine rider rustrover kate kwrite
        intellij-idea-ultimate intellij-idea-community pycharm-community pycharm-professional""",
    "-l {line} {file}": "mate",
    "-n{line} {file}": "notepad++",
}
_SYNTAX_OF = {name: syntax for syntax, names in _SYNTAXES.items() for name in names.split()}
# What Debian has for the purpose, then what there is nearly everywhere.
_USUAL_EDITORS = ("sensible-editor", "editor", "nano", "vi")
# Formats whose bytes no editor shows as text.
_DOCUMENTS = frozenset(["pdf", "docx", "pptx", "xlsx", "opendocument", "rtf", "epub"])


def open_hit(hit: Hit) -> None:
    """Open the file of a hit and wait for the editor, if it is one.

    Raises:
        DataError: The file is gone, or lies outside of the folder that was indexed.
        EpicError: There is nothing to open it with.
    """
    path = file_of(hit)
    if os.path.isabs(hit.path) or ".." in PurePath(hit.path).parts:
        raise DataError(f"{hit.path} is no path below the indexed folder; run `epic-rag index --rebuild`")
    if not os.path.isfile(path):
        raise DataError(f"{display_path(path)} is gone since it was indexed; run `epic-rag index` to update the index")
    if hit.kind in _DOCUMENTS:
        _open_document(path)
    else:
        _run_editor(editor_command(path, hit.first_line))


def editor_command(path: str, line: int | None) -> list[str]:
    """Return the command that opens a text file in the user's editor.

    Args:
        path: The file, absolute: it cannot be taken for an option.
        line: The line to show, from 1; None for the top.

    Raises:
        EpicError: $VISUAL or $EDITOR is no command line, or there is no editor.
    """
    variable = next((name for name in ("VISUAL", "EDITOR") if os.environ.get(name, "").strip()), None)
    if variable is None:
        words = _usual_editor()
    else:
        value = os.environ[variable]
        try:
            words = shlex.split(value, posix=os.name != "nt")
        except ValueError as error:
            raise EpicError(
                f"{variable} is {value!r}, which is no command line ({error}); set it to an editor"
            ) from None
        # On Windows the quotes stay where they were.
        words = [word.strip('"') for word in words] if os.name == "nt" else words
    name = os.path.basename(words[0]).lower().removesuffix(".exe").removesuffix(".cmd")
    if line is None or name not in _SYNTAX_OF:
        return [*words, path]
    return [*words, *(part.format(line=line, file=path) for part in _SYNTAX_OF[name].split())]


def _usual_editor() -> list[str]:
    if sys.platform == "darwin":
        return ["open", "-t"]
    if os.name == "nt":
        return ["notepad.exe"]
    for name in _USUAL_EDITORS:
        if shutil.which(name):
            return [name]
    raise EpicError("EDITOR is not set, and there is no nano or vi; set EDITOR to your editor")


def _run_editor(command: Sequence[str]) -> None:
    program = shutil.which(command[0])
    if program is None:
        raise EpicError(f"there is no editor {command[0]}; set EDITOR to one that there is")
    # After `echo ... | epic-rag query -` standard input is a pipe, and an editor wants the terminal.
    terminal = None
    if os.name == "posix" and not sys.stdin.isatty():
        try:
            terminal = os.open("/dev/tty", os.O_RDWR)
        except OSError:  # there is none: a graphical editor needs none
            terminal = None
    try:
        with subprocess.Popen([program, *command[1:]], stdin=terminal) as child:
            status = _wait(child)
    except OSError as error:
        raise EpicError(f"{program} cannot be started ({error.strerror}); set EDITOR to another editor") from None
    finally:
        if terminal is not None:
            os.close(terminal)
    if status:
        message("warning", f"{command[0]} ended with status {status}")


def _wait(child: subprocess.Popen[bytes]) -> int:
    while True:
        try:
            return child.wait()
        except KeyboardInterrupt:  # it is the editor's: Ctrl-C means something in most of them
            continue


def _open_document(path: str) -> None:
    if sys.platform == "win32":
        os.startfile(path)
        return
    opener = "open" if sys.platform == "darwin" else "xdg-open"
    program = shutil.which(opener)
    if program is None:
        raise EpicError(f"there is no {opener} to open {display_path(path)} with; open the file by hand")
    # A session of its own: Ctrl-C here is not meant for what it opens.
    done = subprocess.run(
        [program, path], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True, check=False
    )
    if done.returncode:
        raise EpicError(f"{opener} cannot open {display_path(path)} (status {done.returncode}); open the file by hand")


# --- from asking
# What is asked of an index, the same for one query, a batch and an interactive session.


@dataclass(frozen=True)
class Asked:
    """How queries are answered: the options of `epic-rag query`, with the meaning that they have there."""

    k: int = DEFAULT_HITS
    task: str | None = None
    bank: str | None = None
    num_demonstrations: int | None = None
    strategy: ShownBy | None = None
    mode: SearchMode | None = None
    where: tuple[str, ...] = ()
    paths: tuple[str, ...] = ()
    since: str | None = None
    show_all: bool = False
    rerank: str | None = None

    def __post_init__(self) -> None:
        if self.bank is not None and os.path.isfile(self.bank):
            raise BankError(
                f"{self.bank} is a file, a bank is a folder; run `epic-rag bank build {self.bank} --out FOLDER "
                f"--task {self.task or DEFAULT_TASK}` and give --bank that folder"
            )

    @property
    def by(self) -> SearchMode:
        """The mode that counts."""
        from epic_rag_chroma import DEFAULT_MODE

        return self.mode or DEFAULT_MODE

    @property
    def instructed_by(self) -> str | None:
        """The task that counts: a bank brings its own instruction."""
        return DEFAULT_TASK if self.task is None and self.bank is None else self.task

    @property
    def is_filtered(self) -> bool:
        """Whether some passages cannot be found."""
        return bool(self.where or self.paths or self.since)

    def arguments(self) -> dict[str, Any]:
        """Return what the indexer is given besides the query.

        Raises:
            ConfigError: A filter cannot be understood.
        """
        filters = None
        if self.is_filtered:
            from epic_rag_chroma import parse_filters

            filters = parse_filters(self.where, self.paths, self.since)
        return {
            "k": self.k,
            "task": self.instructed_by,
            "bank": self.bank,
            "num_demonstrations": self.num_demonstrations,
            "strategy": self.strategy,
            "mode": self.by,
            "filters": filters,
            "collapse": not self.show_all,
            "reranker": self.rerank,
        }


class Asker:
    """Asks one index and shows what it answers.

    Args:
        indexer: The index.
        folder: Its folder, as the user wrote it.
    """

    def __init__(self, indexer: ChromaIndexer, folder: Path) -> None:
        self._indexer = indexer
        self._folder = folder

    def one(self, text: str, asked: Asked) -> list[Hit]:
        """Return the hits of one query."""
        return self._indexer.query(_encodable(text), **asked.arguments())

    def many(self, texts: Sequence[str], asked: Asked) -> list[list[Hit]]:
        """Return the hits of each query."""
        return self._indexer.query_many([_encodable(text) for text in texts], **asked.arguments())

    def show(self, hits: Sequence[Hit], text: str, asked: Asked) -> None:
        """Print hits for people; nothing on stdout if there are none."""
        if hits:
            emit(hit_lines(hits, text, asked.by, links=hyperlinks()))
        else:
            self.tell_nothing(asked)

    def tell_nothing(self, asked: Asked) -> None:
        """Say why there may be no hits."""
        if asked.is_filtered:
            message("note", "no passage satisfies all of --where, --path and --since; leave one out, or ask less of it")
        elif asked.by == "keyword":
            message("note", "no passage has a word of the query; ask in other words, or with --mode hybrid")
        else:
            message("note", f"{self._folder} holds no passages; run `epic-rag index PATH` to add some")

    def answer(self, hits: Sequence[Hit], text: str, asked: Asked) -> dict[str, Any]:
        """Return the answer to one query as JSON has it."""
        return {
            "query": text,
            "index_dir": str(self._folder),
            "task": asked.instructed_by,
            "bank": asked.bank,
            "mode": asked.by,
            "hits": [dataclasses.asdict(hit) for hit in hits],
        }


def _encodable(text: str) -> str:
    """Replace lone surrogates (bytes on the command line that are no text), which no tokenizer takes."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


# --- from interactive
# `epic-rag query` without a text: queries typed one after the other, with the model loaded once.
#
# A line that begins with a colon changes how the next queries are answered, or does something with the last hits.

_PROMPT = "epic-rag> "
_MOST_DIGITS = 10

# Command, its argument, what it does.
_HELP = (
    (":k", "N", "how many passages"),
    (":mode", "MODE", "dense (by meaning), keyword (by words) or hybrid (both)"),
    (":task", "[TASK]", "the task whose instruction the encoder gets"),
    (":bank", "[BANK]", "demonstrations: a built-in bank or a bank folder"),
    (":n", "[N]", "how many demonstrations"),
    (":strategy", "[NAME]", "how they reach the query: epic, text, task-vector or none"),
    (":where", "[CONDITION]", "one more condition on metadata: lang=python"),
    (":path", "[PATTERN]", "one more pattern of files: guide/**"),
    (":since", "[TIME]", "files that changed since: 7d"),
    (":all", "on|off", "near-duplicates, too"),
    (":rerank", "[MODEL]", "a cross-encoder that puts the best in order"),
    (":show", "[N]", "the whole text of hit N"),
    (":open", "[N]", "hit N in your editor"),
    (":help", "", "this list, with what is set"),
    (":quit", "", "the end, as Ctrl-D"),
)


class Session:
    """Reads lines until the input ends.

    Args:
        asker: Answers them.
        status: What is asked.
        asked: How queries are answered at first.
    """

    def __init__(self, asker: Asker, status: IndexStatus, asked: Asked) -> None:
        self._asker = asker
        self._status = status
        self._asked = asked
        self._text = ""
        self._hits: list[Hit] = []
        self._history = History()
        self._actions: dict[str, Callable[[str], None]] = {
            ":k": lambda value: self._set(k=_number(":k", value, 1)),
            ":mode": lambda value: self._set(mode=_one_of(":mode", value, SEARCH_MODES)),
            ":task": lambda value: self._set(task=value or None),
            ":bank": lambda value: self._set(bank=value or None),
            ":n": lambda value: self._set(num_demonstrations=_number(":n", value, 0) if value else None),
            ":strategy": lambda value: self._set(
                strategy=_one_of(":strategy", value, get_args(ShownBy)) if value else None
            ),
            ":where": lambda value: self._set(where=(*self._asked.where, value) if value else ()),
            ":path": lambda value: self._set(paths=(*self._asked.paths, value) if value else ()),
            ":since": lambda value: self._set(since=value or None),
            ":all": lambda value: self._set(show_all=_switch(value)),
            ":rerank": lambda value: self._set(rerank=value or None),
            ":show": self._show,
            ":open": self._open,
            ":help": self._help,
        }

    def run(self) -> None:
        """Answer until Ctrl-D or `:quit`. Ctrl-C ends a line or a search, not the session."""
        readline = _readline()
        if readline is not None:
            _set_up(readline, self._history.load())
        index = f"{plural(self._status.chunks, 'passage')} of {plural(self._status.files, 'file')}"
        message("note", f"{index}; :help lists what can be changed, Ctrl-D ends")
        while True:
            try:
                if not self._next(readline):
                    return
            except KeyboardInterrupt:  # at the prompt: the line is given up
                emit([""])

    def _next(self, readline: ModuleType | None) -> bool:
        """Read a line and do what it says; False if it was the last."""
        try:
            line = input(_PROMPT)
        except EOFError:
            emit([""])
            return False
        if readline is not None and line.strip() and not line.startswith(" "):
            readline.add_history(line)
        self._history.add(line)
        if line.strip() in (":quit", ":q", ":exit"):
            return False
        try:
            self._do(line)
        except KeyboardInterrupt:
            emit([""])
            message("note", "interrupted; Ctrl-D ends the session")
        except EpicError as error:
            message("error", str(error))
        return True

    def _do(self, line: str) -> None:
        if not line.strip():
            return
        if not line.startswith(":"):
            self._text = line.strip()
            self._hits = []
            self._hits = self._asker.one(self._text, self._asked)
            self._asker.show(self._hits, self._text, self._asked)
            return
        word, _, value = line.strip().partition(" ")
        action = self._actions.get(word)
        if action is None:
            raise ConfigError(f"unknown command {word}; :help lists those that there are")
        action(value.strip())

    def _set(self, **changes: Any) -> None:
        changed = dataclasses.replace(self._asked, **changes)
        changed.arguments()  # a filter that cannot be understood is not kept
        self._asked = changed

    def _show(self, value: str) -> None:
        emit(passage_lines(self._hit(":show", value), self._text))

    def _open(self, value: str) -> None:

        open_hit(self._hit(":open", value))

    def _hit(self, command: str, value: str) -> Hit:
        number = _number(command, value or "1", 1)
        if not self._hits:
            raise ConfigError(f"there is no hit yet for {command}; type a query first")
        if number > len(self._hits):
            raise ConfigError(f"there is no hit {number}, only {plural(len(self._hits), 'hit')}; :k sets how many")
        return self._hits[number - 1]

    def _help(self, _: str) -> None:
        asked = self._asked
        now = {
            ":k": str(asked.k),
            ":mode": asked.by,
            ":task": asked.instructed_by or "the bank's",
            ":bank": asked.bank or "none",
            ":n": "all" if asked.num_demonstrations is None else str(asked.num_demonstrations),
            ":strategy": asked.strategy or "the checkpoint's",
            ":where": " and ".join(asked.where) or "anything",
            ":path": " or ".join(asked.paths) or "anywhere",
            ":since": asked.since or "ever",
            ":all": "on" if asked.show_all else "off",
            ":rerank": asked.rerank or "none",
        }
        rows = [
            (f"{name} {value}".strip(), what, f"now: {now[name]}" if name in now else "") for name, value, what in _HELP
        ]
        emit(columns(rows, styles=("bold", "", "dim")))
        message("note", "anything else is a query; so is a line that begins with a space")


def _number(command: str, value: str, least: int) -> int:
    if not (value.isascii() and value.isdigit() and len(value) < _MOST_DIGITS) or int(value) < least:
        raise ConfigError(f"{command} takes a whole number from {least}, not {value!r}")
    return int(value)


def _one_of(command: str, value: str, known: Sequence[str]) -> str:
    if value not in known:
        raise ConfigError(f"{command} takes {', '.join(known)}, not {value!r}")
    return value


def _switch(value: str) -> bool:
    if value not in ("", "on", "off"):
        raise ConfigError(f":all takes on or off, not {value!r}")
    return value != "off"


def _readline() -> ModuleType | None:
    try:
        import readline
    except ImportError:  # Windows has its own line editing
        return None
    return readline


def _set_up(readline: Any, lines: list[str]) -> None:
    """Give the line editor the history, and what Tab completes."""
    readline.set_auto_history(False)
    readline.clear_history()
    for line in lines:
        readline.add_history(line)
    readline.set_completer_delims(" ")
    readline.set_completer(_Completer(readline))
    libedit = "libedit" in (readline.__doc__ or "")
    readline.parse_and_bind("bind ^I rl_complete" if libedit else "tab: complete")
    if not libedit:
        # What is pasted is text, also where it holds a line end or an escape.
        readline.parse_and_bind("set enable-bracketed-paste on")


class _Completer:
    """Completes commands, and the values of those that take names."""

    def __init__(self, readline: Any) -> None:
        self._readline = readline

    def __call__(self, word: str, state: int) -> str | None:
        line = self._readline.get_line_buffer().lstrip()
        if not line.startswith(":"):
            return None
        known = {
            ":mode": complete_modes,
            ":bank": complete_banks,
            ":strategy": complete_strategies,
            ":task": complete_tasks,
        }
        command, space, _ = line.partition(" ")
        if not space:
            found = [name for name, _, _ in _HELP if name.startswith(word)]
        else:
            # A folder's name may hold what a terminal must not get.
            found = [name for name in known[command](word) if name.isprintable()] if command in known else []
        return found[state] if state < len(found) else None


_STDIN = "-"
# So many queries are encoded at once, and answered before the next are read by the model.
_BATCH = 256


def query(
    text: Annotated[
        str | None,
        typer.Argument(
            metavar="TEXT",
            help="What to look for, in your own words; `-` reads it from standard input. Without it, on a terminal: "
            "one query after the other.",
            show_default=False,
        ),
    ] = None,
    k: Annotated[int, typer.Option("-k", "--top-k", metavar="N", min=1, help="How many passages.")] = DEFAULT_HITS,
    mode: Mode = None,
    where: Annotated[
        list[str] | None,
        typer.Option(
            "--where",
            metavar="CONDITION",
            help="Only passages whose metadata satisfies it: 'lang=python', 'kind!=pdf', 'page>=3'; can be repeated.",
        ),
    ] = None,
    path: Annotated[
        list[str] | None,
        typer.Option(
            "--path",
            metavar="PATTERN",
            help="Only files that match, as in .gitignore: 'guide/**', '*.md'; can be repeated, and one must match.",
        ),
    ] = None,
    since: Annotated[
        str | None,
        typer.Option(
            "--since",
            metavar="TIME",
            help="Only files that changed since: an age (12h, 7d, 2w) or a date (2026-01-31).",
        ),
    ] = None,
    show_all: Annotated[
        bool, typer.Option("--all", help="Show near-duplicates, too, instead of folding them into the best one.")
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
            help="How many demonstrations the encoder sees.",
            show_default="all of --bank, none without it",
        ),
    ] = None,
    strategy: Strategy = None,
    rerank: Annotated[
        str | None,
        typer.Option(
            "--rerank",
            metavar="MODEL",
            help="Put the best passages in order with a cross-encoder: a folder or a Hugging Face name.",
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
    index_dir: IndexDir = None,
    chroma: Chroma = None,
) -> None:
    """Print the passages that answer a question, best first.

    Each hit has its rank, the numbers that it is ranked by (cosine: question and passage as vectors; bm25: words that
    they share), the file with first and last line or the page, and the headings above it. Near-duplicates are named
    under the best of them. Demonstrations of your own change what is found at once, with no new index.
    Without TEXT on a terminal, queries are typed one after the other and the model stays loaded; `:help` lists what
    can be changed in between.

    Examples:
        epic-rag query 'how do I undo the last commit?'
        epic-rag query 'undo the last commit' -k 3 --json
        epic-rag query 'undo the last commit' --bank docs --num-demonstrations 4
        epic-rag query 'commit' --mode keyword --path '*.md' --since 30d
    """
    if as_json and as_json_lines:
        raise usage_error("--json and --jsonl exclude each other; give one of them")
    if batch is not None and (text is not None or open_number is not None):
        raise usage_error(f"--batch excludes {'TEXT' if text is not None else '--open'}; give one of them")
    if text is None and batch is None and not _is_conversation(as_json or as_json_lines):
        raise usage_error("Missing argument 'TEXT'")
    queries = _read(text, batch)
    asked = Asked(
        k=k,
        task=task,
        bank=bank,
        num_demonstrations=num_demonstrations,
        strategy=strategy,
        mode=mode,
        where=tuple(where or ()),
        paths=tuple(path or ()),
        since=since,
        show_all=show_all,
        rerank=rerank,
    )
    asked.arguments()  # a filter that cannot be understood is found before anything is opened
    if asked.by == "keyword" and bank is not None:
        message("note", "keyword search reads no demonstrations; --bank changes nothing")
    folder = find_index(index_dir)
    from epic_rag_chroma import ChromaIndexer
    from epic_rag_cli.loading import encoder_for, without_collections

    with ChromaIndexer(
        folder, encoder=encoder_for(model, dtype, device), chroma=chroma, dtype=dtype, device=device
    ) as indexer:
        asker = Asker(indexer, folder)
        if not queries:
            Session(asker, indexer.status(), asked).run()
        elif batch is not None:
            _answer_batch(asker, queries, asked, as_json=as_json, as_json_lines=as_json_lines)
        else:
            with without_collections():
                hits = asker.one(queries[0].text, asked)
            _answer(asker, hits, queries[0].text, asked, as_json=as_json, as_json_lines=as_json_lines)
            if open_number is not None and hits:
                _open(hits, open_number)


def _is_conversation(wants_json: bool) -> bool:
    """Whether somebody sits there who can be asked for queries."""
    return not wants_json and all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout))


def _read(text: str | None, batch: str | None) -> list[BatchQuery]:
    """Return the queries that are given; none means that they will be typed."""
    if batch is not None:
        return read_batch(batch)
    if text is None:
        return []
    said = read_stdin() if text == _STDIN else text
    if not said.strip():
        where = "standard input" if text == _STDIN else "it"
        raise typer.BadParameter(f"{where} is empty", param_hint="'TEXT'")
    return [BatchQuery(said.strip() if text == _STDIN else said)]


def _answer(asker: Asker, hits: list[Hit], text: str, asked: Asked, *, as_json: bool, as_json_lines: bool) -> None:
    if not as_json and not as_json_lines:
        asker.show(hits, text, asked)
        return
    if as_json:
        emit_json(asker.answer(hits, text, asked))
    else:
        _emit_lines(hits, text, {})
    if not hits:
        asker.tell_nothing(asked)


def _answer_batch(
    asker: Asker, queries: Sequence[BatchQuery], asked: Asked, *, as_json: bool, as_json_lines: bool
) -> None:
    answers: list[dict[str, Any]] = []
    for number, (each, hits) in enumerate(_answered(asker, queries, asked)):
        if as_json:
            answers.append({**asker.answer(hits, each.text, asked), "query_id": each.id})
        elif as_json_lines:
            _emit_lines(hits, each.text, {"query_id": each.id})
        else:
            _emit_heading(each, first=number == 0)
            asker.show(hits, each.text, asked)
    if as_json:
        emit_json(answers)


def _answered(asker: Asker, queries: Sequence[BatchQuery], asked: Asked) -> Iterator[tuple[BatchQuery, list[Hit]]]:
    for start in range(0, len(queries), _BATCH):
        part = queries[start : start + _BATCH]
        yield from zip(part, asker.many([each.text for each in part], asked), strict=True)


def _emit_lines(hits: Sequence[Hit], text: str, more: dict[str, Any]) -> None:
    for hit in hits:
        emit_json({"query": text, **more, **dataclasses.asdict(hit)}, one_line=True)


def _emit_heading(each: BatchQuery, *, first: bool) -> None:
    from rich.text import Text

    heading = Text(printable(each.text), style="bold underline")
    if each.id is not None:
        heading = Text(f"{printable(str(each.id))}  ", style="dim") + heading
    emit([heading] if first else [Text(), heading])


def _open(hits: Sequence[Hit], number: int) -> None:
    if number > len(hits):
        raise EpicError(f"there is no hit {number} to open, only {plural(len(hits), 'hit')}; give -k a larger number")

    open_hit(hits[number - 1])
