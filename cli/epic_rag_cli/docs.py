"""Writes docs/cli.md from the app: `python -m epic_rag_cli.docs > docs/cli.md`.

It reads the commands' own parameters rather than the printed help, whose layout changes with Typer's version.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import typer

from epic_rag_cli.main import PROGRAM, app

__all__ = ["command_help", "commands", "markdown"]

_INTRODUCTION = """\
# The command line

<!-- Written by `python -m epic_rag_cli.docs > docs/cli.md`; change the commands, not this file. -->

Data goes to stdout; progress, notes, warnings and errors go to stderr. Progress bars appear on a terminal only.
Text from documents is printed with its control characters escaped, also in JSON.

| Exit status | Meaning |
|---|---|
| 0 | Done. Also when the reader of a pipe has seen enough (`epic-rag query ... \\| head`). |
| 1 | An error: one line with the facts and the command to run next. |
| 2 | The command line is wrong: one line that names the help to read. |
| 130 | Interrupted with Ctrl-C. What `index` had stored stays. |

| Variable | Meaning |
|---|---|
| `EPIC_RAG_INDEX` | The index folder when `--index-dir` is not given. |
| `EPIC_RAG_MODEL` | The model when `--model` is not given. |
| `EPIC_RAG_DEBUG` | `1` shows tracebacks, and the messages of the libraries beneath. |
| `NO_COLOR` | Set to anything: no colours. |

`epic-rag --install-completion` installs completion for the current shell.
"""

_JSON = """\
## JSON

`--json` prints one JSON value and nothing else on stdout. New keys may be added; those below stay.

| Command | Value |
|---|---|
| `index` | `index_dir`; `added`, `changed`, `deleted`, `unchanged` (numbers of files); `skipped` (list of `path`, `reason`); `chunks_embedded`, `chunks_total`, `seconds`, `chunks_per_second` |
| `query` | `query`, `index_dir`, `task`, `bank`, `hits`: list of `rank`, `score` (cosine), `path` (relative to `root`), `root`, `first_line`, `last_line` (from 1, inclusive; null where there are none), `page` (of a PDF, else null), `heading_path` (list), `text`, `id` |
| `status` | `index_dir`, `roots`, `model`, `fingerprint`, `dimension`, `files`, `chunks`, `size_bytes`, `updated_at`, `settings` (`chunk_tokens`, `chunk_overlap`, `include`, `exclude`) |
| `bank list` | list of `name`, `task`, `instruction`, `symmetric`, `num_demonstrations`, `fingerprint`, `encoder_fingerprint` (null if not embedded), `encoder_fingerprints` (list: the former, and other models that the bank has vectors of), `origin` |
| `bank show` | the same, and `demonstrations`: list of `query`, `passage` |
| `mine` | `file`, `rows`, `documents`, `mined` (negatives added), `short` (rows with fewer than asked for), `candidates`, `dropped_share` (of the candidates, as likely false negatives) |
| `train` | `checkpoint`, `steps`, `loss` |
| `eval` | see [evaluation.md](evaluation.md) |
| `ablate` | see [evaluation.md](evaluation.md) |
| `models` | list of `name`, `path`, `dimension`, `parameters`, `size_bytes`, `description`, `default` |
"""  # noqa: E501 - a table row cannot be broken


def commands() -> Iterator[tuple[str, Any]]:
    """Yield every command with its full name ("epic-rag bank list"), in the order of the help."""
    yield from _walk(PROGRAM, typer.main.get_command(app))


def command_help(command: Any) -> tuple[list[str], list[str]]:
    """Return the paragraphs of a command's help, and the command lines of its examples."""
    text, _, examples = (command.help or "").partition("\b\nExamples:\n")
    paragraphs = [" ".join(part.split()) for part in text.split("\n\n") if part.strip()]
    return paragraphs, [line.strip() for line in examples.splitlines() if line.strip()]


def markdown() -> str:
    """Return docs/cli.md."""
    parts = [_INTRODUCTION]
    parts.extend(_section(name, command) for name, command in commands())
    parts.append(_JSON)
    return "\n".join(parts)


def _walk(name: str, command: Any) -> Iterator[tuple[str, Any]]:
    yield name, command
    for child, nested in getattr(command, "commands", {}).items():
        yield from _walk(f"{name} {child}", nested)


def _section(name: str, command: Any) -> str:
    paragraphs, examples = command_help(command)
    options = [param for param in command.params if param.param_type_name == "option"]
    # Typer's own options for completion come with texts that change with its version.
    options = [param for param in options if "completion" not in param.name]
    arguments = [param for param in command.params if param.param_type_name == "argument"]
    usage = [name, *(["[OPTIONS]"] if options else []), *map(_usage, arguments)]
    if getattr(command, "commands", None):
        usage.append("COMMAND")
    lines = [f"## {name}", "", "```", " ".join(usage), "```", ""]
    for paragraph in paragraphs:
        lines += [paragraph, ""]
    if examples:
        lines += ["```sh", *examples, "```", ""]
    if arguments or options:
        lines += ["| Argument or option | Meaning |", "|---|---|"]
        lines += [f"| `{_usage(param)}` | {_meaning(param)} |" for param in arguments]
        lines += [f"| {_names(param)} | {_meaning(param)} |" for param in options]
        lines.append("")
    return "\n".join(lines)


def _usage(argument: Any) -> str:
    return f"{argument.metavar}{'...' if argument.nargs == -1 else ''}"


def _names(option: Any) -> str:
    value = f" {option.metavar}".replace("|", "\\|") if option.metavar else ""  # a bar would end the table's cell
    return ", ".join(f"`{name}{value}`" for name in option.opts)


def _meaning(param: Any) -> str:
    text = (param.help or "").replace("|", "\\|")
    shown = param.show_default if isinstance(param.show_default, str) else None
    if shown is None and param.default not in (None, False, ()) and not param.required:
        shown = f"`{param.default}`"
    notes = [f"default: {shown}"] if shown else []
    if param.envvar:
        notes.append(f"environment: `{param.envvar}`")
    return text + (f" ({'; '.join(notes)})" if notes else "")


if __name__ == "__main__":
    sys.stdout.write(markdown())
