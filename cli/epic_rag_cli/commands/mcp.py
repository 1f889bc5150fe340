"""`epic-rag mcp`: tools for assistants on standard input and output, or over HTTP."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from epic_rag.errors import needs_extra
from epic_rag_cli.commands.serve import (
    DEFAULT_HOST,
    AllowHost,
    ApiKeyEnv,
    BankDir,
    Host,
    api_key,
    bank_folder,
    index_names,
)
from epic_rag_cli.options import DEFAULT_DTYPE, Device, Dtype, IndexDirs, Model, Quiet, Verbose, open_indexer
from epic_rag_cli.results import find_indexes
from epic_rag_cli.terminal import emit, message, usage_error

__all__ = ["mcp"]


def mcp(
    context: typer.Context,
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
    http: Annotated[
        bool, typer.Option("--http", help="Serve over HTTP (at /mcp) instead of standard input and output.")
    ] = False,
    host: Host = DEFAULT_HOST,
    port: Annotated[
        int, typer.Option("--port", metavar="N", min=0, max=65535, help="Port of --http; 0 for a free one.")
    ] = 8401,
    api_key_env: ApiKeyEnv = None,
    allow_host: AllowHost = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the settings of the usual hosts, and exit.")
    ] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Offer assistants tools to search and read indexed documents (Model Context Protocol).

    Runs as long as standard input is open; an assistant's host starts it. With --http, it runs until Ctrl-C and serves
    any number of hosts. Tools: search, get, status, and add_example with --allow-examples. Only files of the indexes
    can be read.

    Examples:
        epic-rag mcp --index-dir docs
        epic-rag mcp --index-dir docs --http
        epic-rag mcp --index-dir docs --allow-examples mine --print-config
    """
    if not http:
        for option in ("--host", "--port", "--api-key-env", "--allow-host"):
            source = context.get_parameter_source(option.removeprefix("--").replace("-", "_"))
            if source is not None and source.name == "COMMANDLINE":
                raise usage_error(f"{option} applies to HTTP. Add --http")
    folders = find_indexes(index_dir)
    if print_config and http:
        emit(_http_configurations(f"http://{host}:{port}/mcp", api_key_env))
        return
    if print_config:
        arguments = ["mcp", *(word for folder in folders for word in ("--index-dir", str(folder.resolve())))]
        arguments += ["--model", model] if model else []
        arguments += ["--bank-dir", str(bank_dir.resolve())] if bank_dir else []
        arguments += ["--allow-examples", allow_examples] if allow_examples else []
        emit(_configurations(arguments))
        return
    with needs_extra("mcp", "`epic-rag mcp`"):
        import anyio

        from epic_rag_server import AccessPolicy, BankStore, Server
        from epic_rag_server.mcp import http_app, mcp_server, run_stdio

    policy = AccessPolicy(bind=host, hosts=allow_host or (), api_key=api_key(api_key_env))

    indexers = [open_indexer(folder, model=model, dtype=dtype, device=device, chroma=None) for folder in folders]
    for indexer in indexers:
        indexer.status()  # a missing index is an error now, and not of the first search
    indexes = dict(zip(index_names(indexers), indexers, strict=True))
    tools = mcp_server(indexes, BankStore(bank_folder(bank_dir)), bank=allow_examples)
    if not http:
        anyio.run(run_stdio, tools)
        return
    server = Server(http_app(tools, policy), host, port)
    message("note", f"Tools for {', '.join(indexes)} are served at {server.url}/mcp. Ctrl-C ends it.")
    server.run()


def _configurations(arguments: list[str]) -> list[str]:
    """Return the settings of hosts, as lines."""
    command = str(Path(sys.argv[0]).absolute()) if Path(sys.argv[0]).name == "epic-rag" else "epic-rag"
    entry = {"command": command, "args": arguments}
    line = shlex.join([command, *arguments])
    return [
        "Claude Code:",
        f"  claude mcp add epic-rag -- {line}",
        "Claude Desktop (claude_desktop_config.json), Cursor (.cursor/mcp.json):",
        *_indented({"mcpServers": {"epic-rag": entry}}),
        "VS Code (.vscode/mcp.json):",
        *_indented({"servers": {"epic-rag": {"type": "stdio", **entry}}}),
    ]


def _http_configurations(url: str, api_key_env: str | None) -> list[str]:
    """Return the settings of hosts for a server that runs at an address, as lines."""
    # Hosts put variables of the environment into headers, in two notations.
    claude = {} if api_key_env is None else {"headers": {"Authorization": f"Bearer ${{{api_key_env}}}"}}
    others = {} if api_key_env is None else {"headers": {"Authorization": f"Bearer ${{env:{api_key_env}}}"}}
    option = "" if api_key_env is None else f' --header "Authorization: Bearer ${api_key_env}"'
    return [
        "Claude Code:",
        f"  claude mcp add --transport http epic-rag {url}{option}",
        "Claude Code (.mcp.json):",
        *_indented({"mcpServers": {"epic-rag": {"type": "http", "url": url, **claude}}}),
        "Cursor (.cursor/mcp.json):",
        *_indented({"mcpServers": {"epic-rag": {"url": url, **others}}}),
        "VS Code (.vscode/mcp.json):",
        *_indented({"servers": {"epic-rag": {"type": "http", "url": url, **others}}}),
    ]


def _indented(value: object) -> list[str]:
    return ["  " + part for part in json.dumps(value, indent=2).splitlines()]
