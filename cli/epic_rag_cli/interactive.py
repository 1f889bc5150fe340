"""`epic-rag query` without a text: queries typed one after the other, with the model loaded once.

A line that begins with a colon changes how the next queries are answered, or does something with the last hits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, get_args

from epic_rag.errors import ConfigError, EpicError
from epic_rag_chroma.types import SEARCH_MODES
from epic_rag_cli.asking import Asked, Asker
from epic_rag_cli.completion import complete_banks, complete_modes, complete_strategies, complete_tasks
from epic_rag_cli.defaults import ShownBy
from epic_rag_cli.history import History
from epic_rag_cli.hits import passage_lines
from epic_rag_cli.output import columns, emit, message
from epic_rag_cli.text import plural

if TYPE_CHECKING:
    from types import ModuleType

    from epic_rag_chroma import Hit, IndexStatus

__all__ = ["Session"]

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
        from epic_rag_cli.editor import open_hit

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
