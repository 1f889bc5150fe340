"""Options that several commands share, the shell completion of their values, and the classes of commands.

`--config`, `--quiet` and `--verbose` may stand before or after a command. They are eager: each acts when it is parsed,
so that the configuration file is known before the other options take their defaults from it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import typer
from typer.core import TyperCommand, TyperGroup

from epic_rag.query_prompt import QUERY_STRATEGIES, QueryStrategy
from epic_rag.tasks import DEFAULT_TASK
from epic_rag_chroma import DEFAULT_MODE
from epic_rag_cli import config
from epic_rag_cli.terminal import Verbosity, log_info, request_verbosity

if TYPE_CHECKING:
    from epic_rag import EpicEncoder
    from epic_rag_chroma import ChromaIndexer, FederatedIndex

__all__ = [
    "CONFIG_HELP",
    "CONFIG_VARIABLE",
    "DEFAULT_DTYPE",
    "DEFAULT_HITS",
    "DEFAULT_TASK",
    "Bank",
    "Chroma",
    "Command",
    "ComputeDtype",
    "ConfigFile",
    "Device",
    "Dtype",
    "Group",
    "IndexDir",
    "IndexDirs",
    "Json",
    "Mode",
    "Model",
    "NumDemonstrations",
    "Paths",
    "Quiet",
    "Rerank",
    "Since",
    "Strategy",
    "Task",
    "Verbose",
    "Where",
    "bank_setting",
    "complete_banks",
    "complete_dtypes",
    "complete_models",
    "complete_modes",
    "complete_strategies",
    "complete_tasks",
    "configure",
    "new_group",
    "open_indexer",
    "open_indexes",
    "quiet",
    "require_command",
    "split_banks",
    "verbose",
]

DEFAULT_HITS = 5
"""Hits that `query` prints without -k."""

ComputeDtype = Literal["auto", "float32", "bfloat16", "float16"]
"""Number formats that a model can compute in."""

DEFAULT_DTYPE: ComputeDtype = "auto"

CONFIG_VARIABLE = "EPIC_RAG_CONFIG"
CONFIG_HELP = "The configuration file, instead of the user's and the project's. Also after a command."


def open_indexer(
    folder: Path, *, model: str | None, dtype: str, device: str | None, chroma: str | None
) -> ChromaIndexer:
    """Return the index in `folder`; its model is loaded when the first text is encoded.

    Args:
        folder: The index folder.
        model: The model of `--model`; None uses the index's model, or the default one for a new index.
        dtype: The number format that the model computes in.
        device: Where the model runs.
        chroma: The Chroma server of `--chroma`.
    """
    # Imported here, as every library in a command, so that --help answers at once.
    _import_numpy()
    from epic_rag_chroma import ChromaIndexer

    load = _loader(model, dtype, device)
    return ChromaIndexer(folder, encoder=load, chroma=chroma, dtype=dtype, device=device)


def open_indexes(
    folders: Sequence[Path], *, model: str | None, dtype: str, device: str | None, chroma: str | None
) -> ChromaIndexer | FederatedIndex:
    """Return the index in a folder, or those in several as one; see `open_indexer`."""
    if len(folders) == 1:
        return open_indexer(folders[0], model=model, dtype=dtype, device=device, chroma=chroma)
    _import_numpy()
    from epic_rag_chroma import FederatedIndex

    load = _loader(model, dtype, device)
    return FederatedIndex(folders, encoder=load, chroma=chroma, dtype=dtype, device=device)


def _loader(model: str | None, dtype: str, device: str | None) -> Callable[[], EpicEncoder] | None:
    def load() -> EpicEncoder:
        from epic_rag import EpicEncoder

        return EpicEncoder.from_pretrained(model, dtype=dtype, device=device)

    return None if model is None else load


def _import_numpy() -> None:
    """Import numpy with one thread for matrix products, unless the user has set their number.

    Products of one query are small. Where other programs are busy, several threads would mostly wait for each other:
    OpenBLAS spins until the slowest is done.
    """
    variable = "OPENBLAS_NUM_THREADS"
    if variable in os.environ:
        return
    os.environ[variable] = "1"
    try:
        import numpy  # noqa: F401 - OpenBLAS reads the variable now, and no program started later inherits it
    finally:
        del os.environ[variable]


class Command(TyperCommand):
    """A command whose help keeps the lines of the "Examples:" section as they are."""

    def __init__(self, *args: Any, help: str | None = None, **settings: Any) -> None:
        super().__init__(*args, help=_keep_examples(help), **settings)


class Group(TyperGroup):
    """A group of commands whose help keeps the lines of the "Examples:" section as they are."""

    def __init__(self, *args: Any, help: str | None = None, **settings: Any) -> None:
        super().__init__(*args, help=_keep_examples(help), **settings)


def _keep_examples(text: str | None) -> str:
    # A line with \b alone turns off wrapping for the paragraph that follows.
    return (text or "").replace("\nExamples:\n", "\n\b\nExamples:\n")


def new_group(name: str) -> typer.Typer:
    """Return a Typer app without commands.

    Its help is plain text: it can be piped, compared and copied, and rich need not be imported.
    """
    return typer.Typer(
        name=name,
        cls=Group,
        invoke_without_command=True,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )


def require_command(context: typer.Context) -> None:
    """Print a group's help and exit with status 2 if it is called without a command."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help(), err=True)
        raise typer.Exit(2)


def configure(context: typer.Context, value: Path | None) -> Path | None:
    """Fill the command's `default_map` from the configuration files; a file after the command takes precedence."""
    if context.resilient_parsing:  # completion needs no configuration
        return value
    if context.parent is None:
        context.obj = value  # inherited by the contexts of the commands
        return value
    value = value or context.obj
    name = context.info_name or ""
    if name in config.COMMANDS:
        context.default_map = dict(config.load(context, value).values[name])
        for repeatable in ("index_dir", "bank"):  # they may have a single value in a file
            if isinstance(context.default_map.get(repeatable), str):
                context.default_map[repeatable] = [context.default_map[repeatable]]
    return value


def quiet(context: typer.Context, value: bool) -> bool:
    """Apply `--quiet`."""
    if value and not context.resilient_parsing:
        request_verbosity(Verbosity.QUIET, explicit=_on_command_line(context, "quiet"))
    return value


def verbose(context: typer.Context, value: bool) -> bool:
    """Apply `--verbose`."""
    if value and not context.resilient_parsing:
        request_verbosity(Verbosity.VERBOSE, explicit=_on_command_line(context, "verbose"))
        log_info()
    return value


def _on_command_line(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def bank_setting(names: Sequence[str] | None) -> str | tuple[str, ...] | None:
    """Return the banks of `--bank` as `QueryPrompt` takes them."""
    return tuple(names) if names and len(names) > 1 else names[0] if names else None


def complete_models(incomplete: str) -> list[str]:
    """Return the models that ship with the package, and folders that hold a checkpoint."""
    from epic_rag.checkpoints import list_checkpoints

    return [*_starting([info.name for info in list_checkpoints()], incomplete), *_folders(incomplete, "config.json")]


def complete_banks(incomplete: str) -> list[str]:
    """Return the built-in banks, and folders that hold one."""
    from epic_rag.demonstrations import built_in_banks

    return [*_starting(list(built_in_banks()), incomplete), *_folders(incomplete, "bank.json")]


def complete_dtypes(incomplete: str) -> list[str]:
    """Return the values of `--dtype`."""
    return _starting(list(get_args(ComputeDtype)), incomplete)


def complete_tasks(incomplete: str) -> list[str]:
    """Return the tasks."""
    from epic_rag.tasks import list_tasks

    return _starting([task.name for task in list_tasks()], incomplete)


def complete_modes(incomplete: str) -> list[str]:
    """Return the search modes."""
    from epic_rag_chroma import SEARCH_MODES

    return _starting(list(SEARCH_MODES), incomplete)


def complete_strategies(incomplete: str) -> list[str]:
    """Return the values of `--strategy`."""
    return _starting(list(QUERY_STRATEGIES), incomplete)


def split_banks(context: typer.Context, value: list[str] | None) -> list[str] | None:
    """Split the variable at the character that separates folders in PATH; Typer would split it at blanks."""
    source = context.get_parameter_source("bank")
    if source is not None and source.name == "ENVIRONMENT":
        value = [name for name in os.environ["EPIC_RAG_BANK"].split(os.pathsep) if name]
    return value or None


def _starting(names: list[str], incomplete: str) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]


def _folders(incomplete: str, file: str) -> list[str]:
    """Return folders whose path starts with `incomplete`; those without `file` get a slash, to complete further."""
    given, slash, _ = incomplete.rpartition("/")
    parent = Path(given or slash or ".")
    found = []
    try:
        for folder in sorted(parent.iterdir()):
            shown = f"{given}{slash}{folder.name}"
            hidden = folder.name.startswith(".") and not incomplete.rpartition("/")[2].startswith(".")
            if hidden or not shown.startswith(incomplete) or not folder.is_dir():
                continue
            found.append(shown if (folder / file).is_file() else f"{shown}/")
    except OSError:
        return []
    return found


Bank = Annotated[
    list[str] | None,
    typer.Option(
        "--bank",
        metavar="BANK",
        envvar="EPIC_RAG_BANK",
        autocompletion=complete_banks,
        callback=split_banks,
        help="Demonstrations: a name from `epic-rag bank list` or a bank folder; can be repeated. The first one's "
        "instruction holds.",
    ),
]
Chroma = Annotated[
    str | None,
    typer.Option(
        "--chroma",
        metavar="URL",
        help=(
            "Keep a copy of the index on a Chroma server, http://host:port; `folder` for the index folder, `none` for "
            "no copy. An index remembers the place; a new index uses EPIC_RAG_CHROMA."
        ),
    ),
]
ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", is_eager=True, hidden=True, callback=configure, help=CONFIG_HELP),
]
Device = Annotated[
    str | None,
    typer.Option(
        "--device",
        metavar="NAME,...",
        envvar="EPIC_RAG_DEVICE",
        help="Where the model runs: cpu, cuda, mps, or several as cuda:0,cuda:1.",
        show_default="a GPU if there is one",
    ),
]
Dtype = Annotated[
    ComputeDtype,
    typer.Option(
        "--dtype",
        metavar="NAME",
        envvar="EPIC_RAG_DTYPE",
        autocompletion=complete_dtypes,
        help="Number format of the model's computations: auto, float32, bfloat16 or float16. auto is float32, or "
        "bfloat16 where that is faster.",
    ),
]
IndexDir = Annotated[
    list[Path] | None,
    typer.Option(
        "--index-dir",
        metavar="DIR",
        envvar="EPIC_RAG_INDEX",
        help="The index folder, or a folder whose .epic-rag it is. Without it: the nearest .epic-rag in the working "
        "directory and its parents.",
    ),
]
IndexDirs = Annotated[
    list[Path] | None,
    typer.Option(
        "--index-dir",
        metavar="DIR",
        envvar="EPIC_RAG_INDEX",
        help="The index folder, or a folder whose .epic-rag it is; can be repeated. Without it: the nearest .epic-rag "
        "in the working directory and its parents.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
Mode = Annotated[
    Literal["dense", "hybrid", "keyword"] | None,
    typer.Option(
        "--mode",
        metavar="MODE",
        envvar="EPIC_RAG_MODE",
        autocompletion=complete_modes,
        help="Search mode: dense (vectors), keyword (words; loads no model) or hybrid (both).",
        show_default=DEFAULT_MODE,
    ),
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="MODEL",
        envvar="EPIC_RAG_MODEL",
        autocompletion=complete_models,
        help="A name from `epic-rag models`, a checkpoint folder or a Hugging Face name.",
    ),
]
NumDemonstrations = Annotated[
    int | None,
    typer.Option(
        "-n",
        "--num-demonstrations",
        metavar="N",
        min=0,
        help="Number of demonstrations of --bank to use.",
        show_default="all",
    ),
]
Paths = Annotated[
    list[str] | None,
    typer.Option(
        "--path",
        metavar="PATTERN",
        help="Only files that match, as in .gitignore: 'guide/**', '*.md'; can be repeated, one must match.",
    ),
]
Quiet = Annotated[
    bool,
    typer.Option(
        "--quiet",
        "-q",
        is_eager=True,
        hidden=True,
        callback=quiet,
        help="Print errors and data only. Also after a command.",
    ),
]
Rerank = Annotated[
    str | None,
    typer.Option(
        "--rerank",
        metavar="MODEL",
        help="Reorder the best hits with a cross-encoder: a folder or a Hugging Face name.",
    ),
]
Since = Annotated[
    str | None,
    typer.Option(
        "--since",
        metavar="TIME",
        help="Only files that changed since then: an age (12h, 7d, 2w) or a date (2026-01-31).",
    ),
]
Strategy = Annotated[
    QueryStrategy | None,
    typer.Option(
        "--strategy",
        metavar="NAME",
        autocompletion=complete_strategies,
        help="How demonstrations reach the query: reader (its vector moves by what they show about such queries), "
        "task-vector (by their mean difference), epic (as embeddings in its prompt) or text (as texts in its prompt).",
        show_default="the checkpoint's",
    ),
]
Task = Annotated[
    str | None,
    typer.Option(
        "--task",
        metavar="TASK",
        envvar="EPIC_RAG_TASK",
        autocompletion=complete_tasks,
        help="The task whose instruction the query gets. It brings no demonstrations.",
        show_default=f"{DEFAULT_TASK}, or the bank's instruction",
    ),
]
Verbose = Annotated[
    bool,
    typer.Option(
        "--verbose",
        "-v",
        is_eager=True,
        hidden=True,
        callback=verbose,
        help="Also report what is read, embedded and reused. Also after a command.",
    ),
]
Where = Annotated[
    list[str] | None,
    typer.Option(
        "--where",
        metavar="CONDITION",
        help="Only chunks with this metadata: 'lang=python', 'kind!=pdf', 'page>=3'; can be repeated, all hold.",
    ),
]
