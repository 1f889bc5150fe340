"""Writes docs/cli.md from the app: `python -m epic_rag_cli.docs > docs/cli.md`.

It reads the commands' own parameters rather than the printed help, whose layout changes with Typer's version.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import typer

from epic_rag_cli.main import PROGRAM, app
from epic_rag_cli.schema import schema_tables

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
| 130 | Interrupted with Ctrl-C. What `index` had stored stays. (Between two rounds of `index --watch`, Ctrl-C is the way to end it: 0.) |

`--quiet`, `--verbose` and `--config` may stand before or after a command. `--quiet` leaves errors and data: `index`
prints nothing unless something is wrong. `--verbose` names every file that is new, changed, renamed, gone or skipped,
and says how long the stages took.

`index --watch` loads the model once and indexes again when files have changed and been left alone for a moment; ignored
files, what editors leave behind and the index itself do not count. A round that fails is said and tried again after the
next change, or after half a minute; only a first round that fails ends it. Where the system has no events for a folder (a
network drive), `WATCHFILES_FORCE_POLLING=1` makes it look for itself.

## Configuration file

`epic-rag.toml`, or the table `[tool.epic-rag]` of `pyproject.toml`, sets options of `index`, `query` and `status`. The
nearest one counts, from the working directory upwards; the search ends at the top of a repository and at the home
folder. `--config FILE` (or `EPIC_RAG_CONFIG`) names another; `--config /dev/null` is none.

```toml
model = "epic-minilm"       # for every command: model, index-dir, chroma, quiet, verbose
index-dir = ".epic-rag"     # paths are relative to the file

[index]                     # keys are the long names of options
exclude = ["drafts/", "*.log"]

[query]
top-k = 10
bank = "docs"
```

The command line outdoes the environment, which outdoes the file. `epic-rag config` shows what is set, and by which.
What a command does once is no setting (`--rebuild`, `--dry-run`, `--watch`, `--yes`, ...). An unknown key, or a value of
the wrong type, is an error.

A folder from elsewhere may bring a file along. One that was found, rather than named with `--config`, therefore cannot
set `chroma`, `follow-links` or `rerank`, its `index-dir` has to lie in its own folder, and it does not count at all if
it belongs to another user. No file can name an editor, or let code in a checkpoint run.

## Environment

| Variable | Meaning |
|---|---|
{variables}
| `EPIC_RAG_CHROMA` | The Chroma server of a new index; `EPIC_RAG_CHROMA_TENANT`, `EPIC_RAG_CHROMA_DATABASE` and `EPIC_RAG_CHROMA_TOKEN` go with it. |
| `EPIC_RAG_DEBUG` | `1` shows tracebacks, and the messages of the libraries beneath. |
| `NO_COLOR` | Set to anything: no colours; the words of a query are bold still. |
| `FORCE_COLOR` | Set to anything: colours also where stdout is no terminal, for `less -R`. |
| `VISUAL`, `EDITOR` | The editor of `query --open`. |
| `XDG_STATE_HOME` | Where what was typed into `epic-rag query` is kept, in `epic-rag/query_history`; `~/.local/state` if not set. A line that begins with a space is not kept. |

## Completion

`epic-rag --install-completion` installs completion of commands, options, and the names of models, banks and
tasks for the current shell.
"""  # noqa: E501 - a table row cannot be broken

_JSON = """\
## JSON

`--json` prints one JSON value and nothing else on stdout; `--jsonl`, and `--watch` with `--json`, print one a line. New
keys may be added; those below stay. They are described by JSON Schemas (draft 2020-12), which lie in the package's
folder `epic_rag_cli/schemas/`.

{tables}
### The other commands

| Command | Value |
|---|---|
| `mine` | `file`, `rows`, `documents`, `mined` (negatives added), `short` (rows with fewer than asked for), `candidates`, `dropped_share` (of the candidates, as likely false negatives) |
| `train` | `checkpoint`, `steps`, `loss` |
| `eval` | see [evaluation.md](evaluation.md) |
| `ablate` | see [evaluation.md](evaluation.md) |
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
    parts = [_INTRODUCTION.replace("{variables}", "\n".join(_variables()))]
    parts.extend(_section(name, command) for name, command in commands())
    parts.append(_JSON.replace("{tables}", schema_tables()))
    return "\n".join(parts)


def _variables() -> list[str]:
    """Return a table row for each variable that stands for an option."""
    options: dict[str, list[str]] = {}
    for _, command in commands():
        for param in command.params:
            if param.param_type_name == "option" and isinstance(param.envvar, str) and "completion" not in param.name:
                names = options.setdefault(param.envvar, [])
                names += [name for name in param.opts[-1:] if name not in names]
    return [
        f"| `{variable}` | {' or '.join(f'`{name}`' for name in names)}, if not given. |"
        for variable, names in sorted(options.items())
    ]


def _walk(name: str, command: Any) -> Iterator[tuple[str, Any]]:
    yield name, command
    for child, nested in getattr(command, "commands", {}).items():
        yield from _walk(f"{name} {child}", nested)


def _section(name: str, command: Any) -> str:
    paragraphs, examples = command_help(command)
    options = [param for param in command.params if param.param_type_name == "option"]
    # Typer's own options for completion come with texts that change with its version.
    options = [param for param in options if "completion" not in param.name and not param.hidden]
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
    name = argument.metavar if argument.required else f"[{argument.metavar}]"
    return f"{name}{'...' if argument.nargs == -1 else ''}"


def _names(option: Any) -> str:
    value = f" {option.metavar}".replace("|", "\\|") if option.metavar else ""  # a bar would end the table's cell
    return ", ".join(f"`{name}{value}`" for name in (*option.opts, *option.secondary_opts))


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
