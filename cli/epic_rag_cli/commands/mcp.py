"""`epic-rag mcp`: tools for assistants on standard input and output."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from epic_rag.errors import MissingExtraError
from epic_rag_cli.commands.serve import BankDir, bank_folder, index_names
from epic_rag_cli.options import DEFAULT_DTYPE, Device, Dtype, IndexDirs, Model, Quiet, Verbose, open_indexer
from epic_rag_cli.results import find_indexes
from epic_rag_cli.terminal import emit

__all__ = ["mcp"]


def mcp(
    index_dir: IndexDirs = None,
    model: Model = None,
    dtype: Dtype = DEFAULT_DTYPE,
    device: Device = None,
    bank_dir: BankDir = None,
    allow_examples: Annotated[
        str | None,
        typer.Option(
            "--allow-examples",
            metavar="BANK",
            help="Let the assistant add examples to this bank in --bank-dir, which is created if there is none.",
        ),
    ] = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the settings of the usual hosts, and exit.")
    ] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Offer assistants tools to search and read indexed documents (Model Context Protocol).

    Runs as long as standard input is open; an assistant's host starts it. Tools: search, get, status, and add_example
    with --allow-examples. Only files of the indexes can be read.

    Examples:
        epic-rag mcp --index-dir docs
        epic-rag mcp --index-dir docs --allow-examples mine --print-config
    """
    folders = find_indexes(index_dir)
    if print_config:
        arguments = ["mcp", *(word for folder in folders for word in ("--index-dir", str(folder.resolve())))]
        arguments += ["--model", model] if model else []
        arguments += ["--bank-dir", str(bank_dir.resolve())] if bank_dir else []
        arguments += ["--allow-examples", allow_examples] if allow_examples else []
        emit(_configurations(arguments))
        return
    try:
        import mcp.types  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("mcp", "mcp", "`epic-rag mcp`") from error
    import anyio

    from epic_rag_server import BankStore
    from epic_rag_server.mcp import mcp_server, run_stdio

    indexers = [open_indexer(folder, model=model, dtype=dtype, device=device, chroma=None) for folder in folders]
    for indexer in indexers:
        indexer.status()  # a missing index is an error now, and not of the first search
    indexes = dict(zip(index_names(indexers), indexers, strict=True))
    anyio.run(run_stdio, mcp_server(indexes, BankStore(bank_folder(bank_dir)), bank=allow_examples))


def _configurations(arguments: list[str]) -> list[str]:
    """Return the settings of hosts, as lines."""
    command = str(Path(sys.argv[0]).absolute()) if Path(sys.argv[0]).name == "epic-rag" else "epic-rag"
    entry = {"command": command, "args": arguments}
    line = shlex.join([command, *arguments])
    return [
        "Claude Code:",
        f"  claude mcp add epic-rag -- {line}",
        "Claude Desktop (claude_desktop_config.json), Cursor (.cursor/mcp.json):",
        *("  " + part for part in json.dumps({"mcpServers": {"epic-rag": entry}}, indent=2).splitlines()),
        "VS Code (.vscode/mcp.json):",
        *(
            "  " + part
            for part in json.dumps({"servers": {"epic-rag": {"type": "stdio", **entry}}}, indent=2).splitlines()
        ),
    ]
