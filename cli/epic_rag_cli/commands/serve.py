"""`epic-rag serve`: an HTTP server for embeddings and search."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from epic_rag.errors import ConfigError
from epic_rag_cli.options import DEFAULT_DTYPE, Device, Dtype, IndexDirs, Model, Quiet, Verbose, open_indexer
from epic_rag_cli.results import find_indexes
from epic_rag_cli.terminal import message

if TYPE_CHECKING:
    from epic_rag import EpicEncoder
    from epic_rag_chroma import ChromaIndexer

__all__ = [
    "DEFAULT_HOST",
    "AllowHost",
    "ApiKeyEnv",
    "BankDir",
    "Host",
    "api_key",
    "bank_folder",
    "index_names",
    "serve",
]

_M_ARENA_MAX = -8  # of glibc's malloc.h

BankDir = Annotated[
    Path | None,
    typer.Option(
        "--bank-dir",
        metavar="DIR",
        help="Folder of the banks that can be created and changed.",
        show_default="epic-rag/banks in the user's data folder",
    ),
]

DEFAULT_HOST = "127.0.0.1"
Host = Annotated[
    str, typer.Option("--host", metavar="ADDRESS", help="Address to listen on; other machines need an API key.")
]
ApiKeyEnv = Annotated[
    str | None,
    typer.Option("--api-key-env", metavar="NAME", help="Environment variable with the key that requests must send."),
]
AllowHost = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-host",
        metavar="NAME",
        help="A further host name that requests may address, such as host.docker.internal; can be repeated.",
    ),
]


def serve(
    index_dir: IndexDirs = None,
    model: Model = None,
    dtype: Dtype = DEFAULT_DTYPE,
    device: Device = None,
    host: Host = DEFAULT_HOST,
    port: Annotated[
        int, typer.Option("--port", metavar="N", min=0, max=65535, help="Port to listen on; 0 for a free one.")
    ] = 8400,
    api_key_env: ApiKeyEnv = None,
    allow_host: AllowHost = None,
    bank_dir: BankDir = None,
    role_prefixes: Annotated[
        str | None,
        typer.Option(
            "--role-prefixes",
            metavar="QUERY,PASSAGE",
            help="Beginnings of texts that mark queries and passages, such as 'query: ,passage: '; they are removed.",
        ),
    ] = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Serve embeddings and search over HTTP.

    Embeddings for clients of OpenAI (/v1/embeddings), text-embeddings-inference (/embed) and Cohere (/v2/embed), search
    in indexes (/v1/search), banks of demonstrations (/v1/banks). Only this machine has access, unless --host and
    --api-key-env open the server to others. docs/server.md has a line to copy for each client. Ctrl-C ends it.

    Examples:
        epic-rag serve
        epic-rag serve --index-dir docs --port 8401
        epic-rag serve --host 0.0.0.0 --api-key-env EPIC_RAG_API_KEY
    """
    _share_heap()
    key = api_key(api_key_env)
    prefixes = None
    if role_prefixes is not None:
        query, comma, passage = role_prefixes.partition(",")
        if not comma or not query or not passage:
            raise typer.BadParameter("it is not of the form 'query: ,passage: '", param_hint="'--role-prefixes'")
        prefixes = (query, passage)
    folders = _folders(index_dir)
    # What `epic-rag query` would encode with: without torch, if its model can do without.
    opened = open_indexer(folders[0], model=model, dtype=dtype, device=device, chroma=None).encoder if folders else None
    light, encoder = (None, opened) if "torch" in sys.modules else (opened, None)
    # Imported here, as every library in a command, so that --help answers at once.
    import torch  # noqa: F401 - before the encoder, which computes single texts without torch if it is not loaded

    from epic_rag_chroma import ServedModel
    from epic_rag_server import AccessPolicy, BankStore, LocalQueries, Server, Service, create_app

    policy = AccessPolicy(bind=host, hosts=allow_host or (), api_key=key)
    banks = BankStore(bank_folder(bank_dir))

    def load() -> tuple[dict[str, ChromaIndexer], Service]:
        loaded, indexes = _open(folders, encoder, model, dtype, device)
        return indexes, Service(loaded, indexes, banks)

    # In a thread that ends: a thread that has computed keeps OpenMP's workers, and with more of them than cores the
    # workers of the thread that owns the model sleep between products, which doubles the time of a query.
    with ThreadPoolExecutor(1) as loader:
        indexes, service = loader.submit(load).result()
    local = LocalQueries(service, folders, ServedModel(model, dtype, device), light)
    try:
        server = Server(create_app(service, policy, role_prefixes=prefixes, local=local), host, port)
    except ConfigError:
        service.close()
        raise
    searched = f" and searches {', '.join(indexes)}" if indexes else ""
    local.announce(server.url)
    message("note", f"{service.name} is served at {server.url}{searched}. Ctrl-C ends it.")
    server.run()


def _share_heap() -> None:
    """Make all threads share one heap of glibc; call it before libraries are imported, whose threads get others.

    Tensors of ever new sizes leave gaps in each heap, so that memory under load would grow for minutes, by a third.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc alone has it
        if mallopt is not None:
            mallopt(_M_ARENA_MAX, 1)


def api_key(variable: str | None) -> str | None:
    """Return the API key in an environment variable.

    Raises:
        ConfigError: If the variable is not set.
    """
    key = None if variable is None else os.environ.get(variable, "")
    if key == "":
        raise ConfigError(f"The variable {variable} is not set. Put the API key into it.")
    return key


def bank_folder(given: Path | None) -> Path:
    """Return the folder of banks that can be changed."""
    if given is not None:
        return given
    from platformdirs import user_data_path

    return user_data_path("epic-rag", appauthor=False) / "banks"


def index_names(indexers: Sequence[ChromaIndexer]) -> list[str]:
    """Return a name for each index: that of its first folder, which is what a person recognises."""
    names: list[str] = []
    for indexer in indexers:
        status = indexer.status()
        name = Path(status.roots[0] if status.roots else status.index_dir).name or "index"
        number = sum(known.partition("~")[0] == name for known in names)
        names.append(f"{name}~{number + 1}" if number else name)
    return names


def _folders(given: list[Path] | None) -> list[Path]:
    from epic_rag_chroma import IndexNotFoundError

    try:
        return find_indexes(given)
    except IndexNotFoundError:  # embeddings need none
        return []


def _open(
    folders: list[Path], encoder: EpicEncoder | None, model: str | None, dtype: str, device: str | None
) -> tuple[EpicEncoder, dict[str, ChromaIndexer]]:
    """Return the model (the open one, the named one, that of the first index, or the default) and the indexes by name.

    Raises:
        EpicError: If an index or the model cannot be opened, or the model is not that of an index.
    """
    from epic_rag import EpicEncoder
    from epic_rag_chroma import ChromaIndexer, IndexMismatchError

    if encoder is not None:
        pass
    elif model is None and folders:
        encoder = ChromaIndexer(folders[0], dtype=dtype, device=device).encoder
    else:
        encoder = EpicEncoder.from_pretrained(model, dtype=dtype, device=device)
    indexers = [ChromaIndexer(folder, encoder=encoder) for folder in folders]
    for folder, indexer in zip(folders, indexers, strict=True):
        status = indexer.status()
        if status.fingerprint != encoder.fingerprint:
            raise IndexMismatchError(
                f"{folder} was built with {status.model} ({status.fingerprint}), not with {encoder.name} "
                f"({encoder.fingerprint}). Serve it separately, or index it again."
            )
    return encoder, dict(zip(index_names(indexers), indexers, strict=True))
