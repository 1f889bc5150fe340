"""Chroma clients: for the index folder, and for a server.

chromadb's own `HttpClient` waits without end for a server that does not answer, gives up at once on one that is being
restarted, and loses the HTTP status of an error; `ServerClient` uses chromadb's API over a `Session` that does none of
this. Trying again is safe: rows are written and deleted by id, collections have names that nobody else takes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import quote, urlsplit
from uuid import UUID

import chromadb
from chromadb.api import ServerAPI
from chromadb.api.models.Collection import Collection
from chromadb.config import Settings, System

from epic_rag.errors import ChromaServerError
from epic_rag_chroma.folder import CHROMA_FOLDER
from epic_rag_chroma.server import ChromaServer, request_headers
from epic_rag_chroma.session import TRANSIENT, Session, plain

if TYPE_CHECKING:
    from chromadb.api import ClientAPI

__all__ = ["READER_PATIENCE", "WRITER_PATIENCE", "ServerClient", "folder_client", "is_panic"]

# Seconds for which failing requests are tried again. A query should fail while its user still looks; a run of the
# indexer should outlive a restart of the server.
READER_PATIENCE = 3.0
WRITER_PATIENCE = 60.0

_GREETING_SECONDS = 10.0
_PAGE = 200
_ROWS_IF_UNSAID = 1000


def folder_client(index_dir: Path) -> ClientAPI:
    """A client for the files in an index folder.

    Raises:
        RuntimeError: If Chroma panics, for want of memory or threads.
    """
    # Chroma shares one system between the clients of a path and refuses a second one with other settings. The dot
    # makes ours a path of its own, so that a user's client with default settings can open the same folder.
    path = str(index_dir / CHROMA_FOLDER) + "/."
    try:
        return chromadb.PersistentClient(path, settings=Settings(anonymized_telemetry=False))
    except BaseException as error:
        if is_panic(error):
            raise RuntimeError(str(error)) from error
        raise


def is_panic(error: BaseException) -> bool:
    """Whether this is a panic of Chroma's Rust, which is no Exception: whoever handles those would not see it."""
    return type(error).__name__ == "PanicException"


class ServerClient:
    """What an index needs of a client, for one database on a Chroma server. Close it.

    Args:
        server: The server.
        patience: For how many seconds a request that fails is tried again once the server has answered.

    Raises:
        ChromaServerError: If the server does not answer, is no Chroma server that this can talk to, refuses the
            credentials, or has no such tenant or database.
    """

    def __init__(self, server: ChromaServer, *, patience: float = READER_PATIENCE) -> None:
        self._server = server
        settings = Settings(
            anonymized_telemetry=False,
            chroma_api_impl="chromadb.api.fastapi.FastAPI",
            chroma_server_host=server.url,
            chroma_server_http_port=urlsplit(server.url).port,
            chroma_server_ssl_enabled=server.url.startswith("https:"),
            chroma_server_headers={},
        )
        # chromadb's Client would make requests of its own before it can be told a time limit, and opens a second
        # connection; the API beneath makes none.
        self._system = System(settings)
        self._api: ServerAPI = self._system.instance(cast(Any, ServerAPI))
        inner: Any = self._api
        inner._session.close()
        self._session = Session(server, request_headers(), READER_PATIENCE)
        inner._session = self._session
        try:
            self._greet()
        except BaseException:
            self.close()
            raise
        self._session.patience = patience

    def close(self) -> None:
        """Close the connections."""
        self._session.close()
        self._system.stop()

    def get_max_batch_size(self) -> int:
        """The most rows that the server takes at once."""
        said = int(cast(Any, self._api).get_max_batch_size())
        return said if said > 0 else _ROWS_IF_UNSAID

    def list_collections(self) -> Iterator[Collection]:
        """All collections of the database, whoever made them."""
        offset = 0
        while True:
            models = self._api.list_collections(_PAGE, offset, **self._where())
            for model in models:
                yield Collection(client=self._api, model=model, embedding_function=None)
            if len(models) < _PAGE:
                return
            offset += _PAGE

    def find_collection(self, collection_id: str) -> Collection | None:
        """The collection with an id; None if it is not there."""
        try:
            model = self._api.get_collection_by_id(UUID(collection_id), **self._where())
        except ChromaServerError as error:
            if error.status == 404:
                return None
            raise
        return Collection(client=self._api, model=model, embedding_function=None)

    def create_collection(
        self, name: str, *, metadata: dict[str, Any], configuration: Any, embedding_function: Any
    ) -> Collection:
        """Make a collection; the name must be one that nobody else would take."""
        try:
            model = self._api.create_collection(
                name=name,
                metadata=metadata,
                configuration=cast(Any, {**configuration, "embedding_function": embedding_function}),
                **self._where(),
            )
        except ChromaServerError as error:
            if error.status != 409:
                raise
            # A first try had come through, and its answer was lost.
            model = self._api.get_collection(name, **self._where())
        return Collection(client=self._api, model=model, embedding_function=embedding_function)

    def delete_collection(self, name: str) -> None:
        """Delete a collection; it may be gone already."""
        try:
            self._api.delete_collection(name, **self._where())
        except ChromaServerError as error:
            if error.status != 404:
                raise

    def _where(self) -> dict[str, Any]:
        return {"tenant": self._server.tenant, "database": self._server.database}

    def _greet(self) -> None:
        """See that this is a Chroma server with the API that we speak, and that the database is there."""
        url, api = self._server.url, f"{self._server.url}/api/v2"
        answer = self._ask(f"{api}/heartbeat")
        if not isinstance(answer, dict) or "nanosecond heartbeat" not in answer:
            old = self._ask(f"{url}/api/v1/heartbeat")
            if isinstance(old, dict) and "nanosecond heartbeat" in old:
                raise ChromaServerError(
                    f"{url} is a Chroma server of an old version with API v1, epic-rag needs API v2 of Chroma 1.x; "
                    "update the server (`pip install --upgrade chromadb`) and run the command again"
                )
            raise ChromaServerError(
                f"{url} answers, but not as a Chroma server does; give --chroma the address that `chroma run` shows"
            )
        version = self._ask(f"{api}/version")
        if isinstance(version, str) and version.partition(".")[0] == "0":
            raise ChromaServerError(
                f"{url} is a Chroma server of version {plain(version)}, epic-rag needs 1.x; update the server "
                "(`pip install --upgrade chromadb`) and run the command again"
            )
        tenant, database = self._server.tenant, self._server.database
        if self._ask(f"{api}/tenants/{quote(tenant, safe='')}/databases/{quote(database, safe='')}") is None:
            raise ChromaServerError(
                f"{url} has no database {database} of a tenant {tenant}; set EPIC_RAG_CHROMA_TENANT and "
                "EPIC_RAG_CHROMA_DATABASE to one that it has, or make it with chromadb.AdminClient",
                404,
            )

    def _ask(self, url: str) -> Any:
        """The JSON at an address; None if there is none."""
        try:
            response = self._session.request("GET", url, timeout=_GREETING_SECONDS)
            return response.json()
        except ChromaServerError as error:
            if error.status is None or error.status in (301, 302, 303, 307, 308, 401, 403, *TRANSIENT):
                raise
            return None
        except ValueError:
            return None
