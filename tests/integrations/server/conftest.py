"""A server on loopback with a tiny model, an index and a folder of banks."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from epic_rag import EpicEncoder
from epic_rag_chroma import NO_CHROMA, ChromaIndexer
from epic_rag_server import AccessPolicy, BankStore, Server, Service, create_app
from tests.conftest import make_encoder

FILES = {
    "undo.md": "# Undo\n\nTo undo the last commit and keep its changes, reset softly to the one before it.\n",
    "guide/install.md": "# Guide\n\n## Install\n\nRun the installer, then read the manual.\n\n## Remove\n\nDelete the folder.\n",
    "notes.txt": "Cats sleep most of the day.\nThey wake up for food.\n",
}
SECRET = "a secret that .gitignore keeps out of the index"


@dataclass
class Running:
    """A server that answers, and what it serves."""

    url: str
    service: Service
    encoder: EpicEncoder
    docs: Path
    bank_folder: Path
    client: httpx.Client

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return self.client.post(path, json=body, **options)


def index_files(folder: Path, encoder: EpicEncoder) -> Path:
    """Write and index a folder; return its index."""
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    (folder / ".gitignore").write_text(".env\n")
    (folder / ".env").write_text(SECRET)
    with ChromaIndexer(folder / ".epic-rag", encoder=encoder, chroma=NO_CHROMA) as indexer:
        indexer.index([folder])
    return folder / ".epic-rag"


@contextmanager
def serving(
    encoder: EpicEncoder,
    folder: Path,
    *,
    indexes: dict[str, Path] | None = None,
    policy: AccessPolicy | None = None,
    role_prefixes: tuple[str, str] | None = None,
    headers: dict[str, str] | None = None,
    **options: Any,
) -> Iterator[Running]:
    """Run a server in a thread until the block ends."""
    banks = folder / "banks"
    opened = {name: ChromaIndexer(path, encoder=encoder) for name, path in (indexes or {}).items()}
    service = Service(encoder, opened, BankStore(banks), **options)
    server = Server(create_app(service, policy or AccessPolicy(), role_prefixes=role_prefixes), port=0)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        with httpx.Client(base_url=server.url, timeout=60, headers=headers) as client:
            client.get("/health")  # answered when the model is warm; tests then hold it as they like
            yield Running(server.url, service, encoder, folder / "docs", banks, client)
    finally:
        server.stop()
        thread.join()


@pytest.fixture(scope="session")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server with the index "docs". Shared: tests leave no bank behind."""
    folder = tmp_path_factory.mktemp("server")
    encoder = make_encoder()
    index = index_files(folder / "docs", encoder)
    with serving(encoder, folder, indexes={"docs": index}) as server:
        yield server


@pytest.fixture(scope="session")
def reference() -> EpicEncoder:
    """The same model, for expected vectors; the server's own belongs to its thread."""
    return make_encoder()
