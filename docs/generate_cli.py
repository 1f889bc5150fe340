"""Write docs/cli.md from the commands: `python docs/generate_cli.py > docs/cli.md`.

It reads the commands' parameters rather than the printed help, whose layout changes with Typer's version, and the JSON
Schemas in cli/epic_rag_cli/schemas. A test compares the page with the commands.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

import typer

from epic_rag_cli.main import PROGRAM, app

# In the order of the page.
SCHEMAS = (
    "query",
    "query-lines",
    "query-batch",
    "status",
    "index",
    "index-dry-run",
    "index-collection",
    "index-to",
    "status-to",
    "index-watch",
    "config",
    "models",
    "bank-list",
    "bank-show",
)

INTRODUCTION = """\
# The command line

<!-- Written by `python docs/generate_cli.py > docs/cli.md`. Change the commands, not this file. -->

Data goes to stdout; progress, notes, warnings and errors go to stderr. Progress bars appear on a terminal only.
Control characters in text from documents are escaped, also in JSON.

| Exit status | Meaning |
|---|---|
| 0 | Success. Also when the reader of a pipe closes it (`epic-rag query ... \\| head`). |
| 1 | An error: one line with the facts and a remedy. |
| 2 | A wrong command line: one line that names the help to read. |
| 130 | Interrupted with Ctrl-C. What `index` has stored stays. (`index --watch` ends with 0 if Ctrl-C comes between two rounds.) |

`--quiet`, `--verbose` and `--config` may stand before or after a command. With `--quiet`, only errors and data are
printed; `index` prints nothing on success. `--verbose` lists every file that is new, changed, renamed, deleted or
skipped, and the duration of each stage.

`index --watch` loads the model once and indexes again 0.3 s after the last of a burst of changes. Rounds that change
nothing print nothing, for instance after a change of an ignored file. A failed round is reported and repeated after the
next change or after half a minute; only a failure of the first round ends the command. On file systems without change
events (network drives), set `WATCHFILES_FORCE_POLLING=1`.

## Configuration files

Options of `index`, `query`, `status` and `clear` can be set in TOML files: the user's `epic-rag/config.toml` (below
`~/.config` on Linux), and the project's `epic-rag.toml` or table `[tool.epic-rag]` of `pyproject.toml`. The project's
file is the nearest one, from the working directory upwards to the top of a repository or the home folder. `--config
FILE` (or `EPIC_RAG_CONFIG`) replaces both; `--config /dev/null` turns configuration off.

```toml
model = "epic-minilm"       # for every command: model, index-dir, chroma, quiet, verbose
index-dir = ".epic-rag"     # paths are relative to the file

[index]                     # keys are the long names of options
exclude = ["drafts/", "*.log"]

[query]
top-k = 10
bank = "docs"
```

Precedence: command line, environment, project's file, user's file. `epic-rag config` shows what is set, and where.
Options of a single run cannot be set (`--rebuild`, `--dry-run`, `--watch`, `--yes`, ...). An unknown key is an error of
all four commands, a wrong value an error of the commands that have the option.

A project's file may come with a downloaded folder. It therefore cannot set `chroma`, `follow-links` or `rerank`, its
`index-dir` must be in its own folder, and it is ignored if it belongs to another user. If you trust it, name it with
`--config`. No file can set an editor or allow code in a checkpoint to run.

## Environment

| Variable | Meaning |
|---|---|
{variables}
| `EPIC_RAG_CHROMA` | The Chroma server of a new index; `EPIC_RAG_CHROMA_TENANT`, `EPIC_RAG_CHROMA_DATABASE` and `EPIC_RAG_CHROMA_TOKEN` go with it. |
| `EPIC_RAG_DEBUG` | `1` shows tracebacks and the output of libraries. |
| `NO_COLOR` | Any value turns colours off; query words stay bold. |
| `FORCE_COLOR` | Any value turns colours on where stdout is not a terminal, for `less -R`. |
| `VISUAL`, `EDITOR` | The editor of `query --open`. |
| `XDG_CONFIG_HOME` | Base folder of the user's configuration file on Linux; `~/.config` by default. |
| `XDG_STATE_HOME` | Base folder of the history of `epic-rag query`, `epic-rag/query_history`, on Linux; `~/.local/state` by default. |

## Completion

`epic-rag --install-completion` installs completion for the current shell: commands, options, and the names of models,
banks, tasks, modes and strategies.
"""  # noqa: E501 - table rows

JSON = """\
## JSON

`--json` prints one JSON value; `--jsonl`, and `--json` with `--watch`, print one value a line. The keys below are stable;
new keys may be added. Their JSON Schemas (draft 2020-12) are in the package's folder `epic_rag_cli/schemas/`.

{tables}
### The other commands

| Command | Value |
|---|---|
| `mine` | `file`, `rows`, `documents`, `mined` (negatives added), `short` (rows with fewer than requested), `candidates`, `dropped_share` (of the candidates, as likely false negatives) |
| `train` | `checkpoint`, `steps`, `loss` |
| `eval` | see [evaluation.md](evaluation.md) |
| `ablate` | see [evaluation.md](evaluation.md) |
"""  # noqa: E501 - table rows


def load_schema(name: str) -> dict[str, Any]:
    """Return a schema by its name."""
    text = (files("epic_rag_cli") / "schemas" / f"{name}.schema.json").read_text(encoding="utf-8")
    schema: dict[str, Any] = json.loads(text)
    return schema


def schema_tables() -> str:
    """Return a Markdown section for each schema: a heading, a sentence and a table of keys."""
    lines: list[str] = []
    for name in SCHEMAS:
        schema = load_schema(name)
        lines += [f"### `{schema['title']}`", ""]
        what = "A list. " if schema.get("type") == "array" else ""
        lines += [f"{what}{schema['description']} Schema: `{name}.schema.json`.", ""]
        lines += ["| Key | Type | Meaning |", "|---|---|---|"]
        hit = schema["$defs"]["hit"] if name == "query" else None
        lines += [f"| {key} | {kind} | {text} |" for key, kind, text in _rows(schema, "", hit)]
        lines.append("")
    return "\n".join(lines)


def _rows(schema: dict[str, Any], prefix: str, hit: dict[str, Any] | None) -> Iterator[tuple[str, str, str]]:
    """Yield key, type and meaning of a schema's properties; those of a hit only if its schema is given."""
    if "$ref" in schema:
        yield "...", "", "the keys of a hit, as in `query`"
    if schema.get("type") == "array":
        yield from _rows(schema["items"], f"{prefix}[].", hit)
    for name, each in schema.get("properties", {}).items():
        yield f"`{prefix}{name}`", _type(each), each.get("description", "")
        inner = each.get("items", each)
        if "$ref" in inner:
            inner = hit or {}
        if "properties" in inner:
            yield from _rows(inner, f"{prefix}{name}{'[]' if 'items' in each else ''}.", hit)


def _type(schema: dict[str, Any]) -> str:
    kind = schema.get("type", "boolean")
    if "enum" in schema:
        return " or ".join(f"`{value}`" for value in schema["enum"])
    if kind == "array":
        inner = schema["items"].get("type", "object")
        return f"list of {inner}s"
    return " or ".join(kind) if isinstance(kind, list) else str(kind)


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
    parts = [INTRODUCTION.replace("{variables}", "\n".join(_variables()))]
    parts.extend(_section(name, command) for name, command in commands())
    parts.append(JSON.replace("{tables}", schema_tables()))
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
