"""Chroma clients: for the index folder, and for a server over an HTTP session with time limits and retries.

chromadb's own `HttpClient` waits without end for a server that does not answer, gives up at once on one that is being
restarted, and loses the HTTP status of an error. `ServerClient` uses chromadb's API over a `Session`: every request
has a time limit, transient failures are retried with exponential backoff until the caller's patience is over, and every
failure ends as one `ChromaServerError`. Retries are safe: rows are written and deleted by id, and collections have
unique names.

A Chroma server overwrites the files of a graph in place: killed meanwhile, it comes back with a graph that fails or
finds less. So a session that has written detects a restart and raises `RestartedError`, even if the retry succeeded.
"""

from __future__ import annotations

import logging
import socket
import ssl
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import quote, urlsplit
from uuid import UUID

import chromadb
import httpx
import tenacity
from chromadb.api import ServerAPI
from chromadb.api.models.Collection import Collection
from chromadb.config import Settings, System

from epic_rag_chroma.errors import ChromaServerError
from epic_rag_chroma.store.paths import CHROMA_FOLDER
from epic_rag_chroma.store.server import HEADERS_VARIABLE, TOKEN_VARIABLE, ChromaServer, RestartedError, request_headers

if TYPE_CHECKING:
    from chromadb.api import ClientAPI

__all__ = [
    "READER_PATIENCE",
    "TRANSIENT",
    "WRITER_PATIENCE",
    "ServerClient",
    "Session",
    "folder_client",
    "is_panic",
    "plain",
]

logger = logging.getLogger(__name__)

_CONNECT_SECONDS = 5.0
_ANSWER_SECONDS = 60.0
# Shorter than what servers and proxies wait for: if a connection is closed within that time, it was not for idleness.
_KEEPALIVE_SECONDS = 8.0
# A connection that breaks and is there again within this time was broken by something else than a restart.
_RESTART_SECONDS = 0.3
_FIRST_PAUSE = 0.1
_LONGEST_PAUSE = 3.0
TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})
# Chroma answers 500 for a busy database, but also for what no second try will change.
_TRIES_AT_500 = 5
_SHOWN = 160
_WRITES = ("/upsert", "/update", "/delete")


class Session(httpx.Client):
    """An HTTP session that tries again, and turns whatever goes wrong into a `ChromaServerError`.

    Args:
        server: Whom it talks to.
        secret_headers: Headers that no message may show.
        patience: For how many seconds a request that fails is tried again; can be changed.
    """

    def __init__(self, server: ChromaServer, secret_headers: dict[str, str], patience: float) -> None:
        self.patience = patience
        self._target = server
        # "Bearer TOKEN" and TOKEN itself, the longer ones first.
        secrets = {part for value in secret_headers.values() for part in (value, value.rpartition(" ")[2])}
        self._secrets = sorted(secrets, key=len, reverse=True)
        self._has_token = bool(secret_headers)
        self._has_written = False
        self._answered = 0.0
        self._connection: object = None
        super().__init__(
            headers={"Content-Type": "application/json", "User-Agent": "epic-rag", **secret_headers},
            timeout=httpx.Timeout(_ANSWER_SECONDS, connect=_CONNECT_SECONDS),
            limits=httpx.Limits(keepalive_expiry=_KEEPALIVE_SECONDS),
            # A proxy that the environment names cannot know this machine by its own name for itself.
            mounts={f"all://{urlsplit(server.url).netloc}": None} if server.is_local else None,
        )

    def request(self, method: str, url: httpx.URL | str, **options: Any) -> httpx.Response:
        """As httpx's; always a response with a status of success.

        Raises:
            RestartedError: If rows have been written, and the server was away since.
            ChromaServerError: If there is no such response, and trying again has not helped.
        """
        self._has_written |= method.upper() == "POST" and str(url).endswith(_WRITES)
        trouble: list[tuple[float, bool]] = []
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(_is_transient),
            stop=self._is_enough,
            wait=_pause,
            before_sleep=self._tell,
            reraise=True,
        )
        try:
            response: httpx.Response = retrying(self._once, trouble, method, url, **options)
        except httpx.HTTPStatusError as error:
            raise ChromaServerError(self._refused(error.response), error.response.status_code) from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ChromaServerError(self._unreachable(error)) from error
        if self._was_away(trouble, response) and self._has_written:
            raise RestartedError(
                f"{self._target.url} was restarted while rows were being written; run the command again to see that "
                "they are there"
            )
        return response

    def _once(
        self, trouble: list[tuple[float, bool]], method: str, url: httpx.URL | str, **options: Any
    ) -> httpx.Response:
        try:
            response = super().request(method, url, **options)
        except httpx.TransportError as error:
            trouble.append((time.monotonic(), isinstance(error, httpx.ConnectError)))
            raise
        if not response.is_success:
            if response.status_code in (502, 503, 504):  # what a proxy says of a server that is not there
                trouble.append((time.monotonic(), True))
            # Without the message that httpx would make of it; ours is made once, at the end.
            raise httpx.HTTPStatusError("", request=response.request, response=response)
        return response

    def _was_away(self, trouble: list[tuple[float, bool]], response: httpx.Response) -> bool:
        """Whether the server was not there for a while between the last response and this one."""
        now, before, connection = time.monotonic(), self._connection, _connection(response)
        idle = now - response.elapsed.total_seconds() - self._answered
        # None when the connection was to end with this response.
        self._connection = None if response.headers.get("connection", "").lower() == "close" else connection
        self._answered = now
        if trouble:
            return any(refused for _, refused in trouble) or now - trouble[0][0] > _RESTART_SECONDS
        return None not in (before, connection) and before != connection and idle < _KEEPALIVE_SECONDS

    def _is_enough(self, state: tenacity.RetryCallState) -> bool:
        error = state.outcome.exception() if state.outcome is not None else None
        if isinstance(error, httpx.HTTPStatusError) and error.response.status_code == 500:
            return state.attempt_number >= _TRIES_AT_500
        # The pause counts: nobody waits for longer than was said.
        return (state.seconds_since_start or 0.0) + state.upcoming_sleep > self.patience

    def _tell(self, state: tenacity.RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome is not None else None
        why = f"status {error.response.status_code}" if isinstance(error, httpx.HTTPStatusError) else _reason(error)
        # Short trouble is nobody's business; long silence is.
        level = logging.WARNING if state.attempt_number == _WORTH_SAYING else logging.INFO
        logger.log(level, "waiting for the Chroma server at %s (%s)", self._target.url, why)

    def _refused(self, response: httpx.Response) -> str:
        url, status = self._target.url, response.status_code
        if status in (401, 403):
            if self._has_token:
                return (
                    f"{url} refuses the credentials in {TOKEN_VARIABLE} and {HEADERS_VARIABLE} (status {status}); set "
                    f"{TOKEN_VARIABLE} to a token that may use tenant {self._target.tenant} and database "
                    f"{self._target.database}"
                )
            return f"{url} wants credentials (status {status}), and none are set; set {TOKEN_VARIABLE} to the token"
        if status in (301, 302, 303, 307, 308):
            there = plain(response.headers.get("location", "elsewhere"))
            return f"{url} sends on to {there}; give --chroma the address where the server is"
        said = f"status {status}: {self._words(response)}".rstrip(": ")
        if status == 404 and "/collections/" in response.request.url.path:
            return (
                f"{url} has lost the index's collection ({said}); run `epic-rag index` with the indexed folder to make "
                "it again"
            )
        if status == 413:
            return (
                f"{url} takes no request of this size ({said}); raise the limit of the server or of the proxy before it"
            )
        if status >= 500 or status in TRANSIENT:
            return f"{url} cannot answer now ({said}); see the server's log, and run the command again"
        return f"{url} refuses a request ({said}); see the server's log, and run the command again"

    def _words(self, response: httpx.Response) -> str:
        """What the server said, in a form that can be shown."""
        text = response.text
        try:
            content = response.json()
            text = str(content["message"]) if isinstance(content, dict) and "message" in content else text
        except ValueError:
            pass  # not JSON: a proxy's page, perhaps
        if text.lstrip().startswith("<"):
            return response.reason_phrase
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return plain(text)

    def _unreachable(self, error: Exception) -> str:
        url, port = self._target.url, urlsplit(self._target.url).port
        causes = list(_causes(error))
        if any(isinstance(cause, socket.gaierror) for cause in causes):
            return f"no machine has the name in {url}; check the address and the network, and run the command again"
        tls = next((cause for cause in causes if isinstance(cause, ssl.SSLError)), None)
        if isinstance(tls, ssl.SSLCertVerificationError):
            return (
                f"{url} does not prove that it is that server ({plain(tls.verify_message)}); set SSL_CERT_FILE to the "
                "certificate of its authority, or correct the address"
            )
        if tls is not None:
            return f"{url} does not speak TLS ({plain(tls.reason or str(tls))}); give --chroma an address with http://"
        if isinstance(error, httpx.TimeoutException):
            return (
                f"{url} does not answer in time ({_reason(error)}); see whether the server is busy, and run the "
                "command again"
            )
        if isinstance(error, httpx.ConnectError):
            start = f"start one with `chroma run --path FOLDER --port {port}`" if self._target.is_local else "start it"
            return f"no Chroma server answers at {url} ({_reason(error)}); {start}, or correct the address"
        return f"the connection to {url} broke ({_reason(error)}); see the server's log, and run the command again"


# The try at which, with growing pauses, a second or two have passed.
_WORTH_SAYING = 7


def _pause(state: tenacity.RetryCallState) -> float:
    """Growing and random, or what the server asks for, if that is not too long."""
    error = state.outcome.exception() if state.outcome is not None else None
    asked = error.response.headers.get("retry-after", "") if isinstance(error, httpx.HTTPStatusError) else ""
    if asked.isdecimal():
        return min(float(asked), _LONGEST_PAUSE) + _FIRST_PAUSE
    grow = tenacity.wait_random_exponential(multiplier=_FIRST_PAUSE, min=_FIRST_PAUSE / 2, max=_LONGEST_PAUSE)
    return float(grow(state))


def _connection(response: httpx.Response) -> object:
    """Tells one connection from the next; None if it has been closed already."""
    stream = response.extensions.get("network_stream")
    try:
        return None if stream is None else stream.get_extra_info("client_addr")
    except OSError:
        return None


def _is_transient(error: BaseException) -> bool:
    if isinstance(error, httpx.HTTPStatusError):
        return error.response.status_code in TRANSIENT
    if not isinstance(error, httpx.TransportError):
        return False
    if isinstance(error, (httpx.UnsupportedProtocol, httpx.LocalProtocolError, httpx.ProxyError)):
        return False
    for cause in _causes(error):
        if isinstance(cause, ssl.SSLError) and not isinstance(cause, ssl.SSLEOFError):
            return False
        if isinstance(cause, socket.gaierror) and cause.errno != socket.EAI_AGAIN:
            return False
    return True


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__


def _reason(error: BaseException | None) -> str:
    """A short word for what happened: the system's own where it has one."""
    if error is None:
        return ""
    for cause in _causes(error):
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror.lower()
    return plain(str(error)) or type(error).__name__


def plain(text: str) -> str:
    """One short line without control characters; it comes from a machine that we know nothing of."""
    return "".join(each for each in " ".join(text.split()) if each.isprintable())[:_SHOWN]


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
