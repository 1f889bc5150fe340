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
from dataclasses import dataclass
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
    "DEFAULT_TIMING",
    "READER_PATIENCE",
    "TRANSIENT",
    "WRITER_PATIENCE",
    "ServerClient",
    "Session",
    "Timing",
    "folder_client",
    "is_panic",
    "plain",
]

logger = logging.getLogger(__name__)

_CONNECT_SECONDS = 5.0
_ANSWER_SECONDS = 60.0
# A connection that is back within this time was not broken by a restart.
_RESTART_SECONDS = 0.3
_LONGEST_PAUSE = 3.0
TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})
# Chroma answers 500 for a busy database, but also for permanent errors.
_TRIES_AT_500 = 5
_SHOWN = 160
_WRITES = ("/upsert", "/update", "/delete")


# Seconds for which failing requests are retried. A query should fail soon; a run of the indexer should survive a
# restart of the server.
READER_PATIENCE = 3.0
WRITER_PATIENCE = 60.0


@dataclass(frozen=True)
class Timing:
    """Pauses and limits of a session in seconds.

    Args:
        check: Time limit of each request when a server is opened.
        check_patience: For how long these requests are retried.
        first_pause: Pause before the first retry; further ones grow exponentially.
        keepalive: How long an idle connection is kept. It is shorter than the idle timeouts of servers and proxies, so
            that a connection that was closed earlier was not closed for idleness.
    """

    check: float = 10.0
    check_patience: float = READER_PATIENCE
    first_pause: float = 0.1
    keepalive: float = 8.0


DEFAULT_TIMING = Timing()


class Session(httpx.Client):
    """An HTTP session with retries that raises every failure as a `ChromaServerError`.

    Args:
        server: The server.
        secret_headers: Headers with secrets, which are removed from messages.
        patience: For how many seconds a failing request is retried; can be set later.
        timing: Pauses and limits.
    """

    def __init__(
        self, server: ChromaServer, secret_headers: dict[str, str], patience: float, timing: Timing = DEFAULT_TIMING
    ) -> None:
        self.patience = patience
        self._timing = timing
        self._target = server
        # "Bearer TOKEN" and TOKEN, the longer ones first.
        secrets = {part for value in secret_headers.values() for part in (value, value.rpartition(" ")[2])}
        self._secrets = sorted(secrets, key=len, reverse=True)
        self._has_token = bool(secret_headers)
        self._has_written = False
        self._answered = 0.0
        self._connection: object = None
        super().__init__(
            headers={"Content-Type": "application/json", "User-Agent": "epic-rag", **secret_headers},
            timeout=httpx.Timeout(_ANSWER_SECONDS, connect=_CONNECT_SECONDS),
            limits=httpx.Limits(keepalive_expiry=timing.keepalive),
            # A proxy of the environment cannot reach this machine as localhost.
            mounts={f"all://{urlsplit(server.url).netloc}": None} if server.is_local else None,
        )

    def request(self, method: str, url: httpx.URL | str, **options: Any) -> httpx.Response:
        """Send a request, with retries; see httpx. The response always has a status of success.

        Raises:
            RestartedError: If the server was restarted after rows have been written.
            ChromaServerError: If there is no such response.
        """
        self._has_written |= method.upper() == "POST" and str(url).endswith(_WRITES)
        trouble: list[tuple[float, bool]] = []
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(_is_transient),
            stop=self._is_enough,
            wait=self._pause,
            before_sleep=self._log_retry,
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
                f"{self._target.url} was restarted while rows were being written. Run the command again to check them."
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
            if response.status_code in (502, 503, 504):  # from a proxy whose server is away
                trouble.append((time.monotonic(), True))
            # Without httpx's message; `_refused` formats ours.
            raise httpx.HTTPStatusError("", request=response.request, response=response)
        return response

    def _was_away(self, trouble: list[tuple[float, bool]], response: httpx.Response) -> bool:
        """Return whether the server was away between the last response and this one."""
        now, before, connection = time.monotonic(), self._connection, _connection(response)
        idle = now - response.elapsed.total_seconds() - self._answered
        # None if the connection ends with this response.
        self._connection = None if response.headers.get("connection", "").lower() == "close" else connection
        self._answered = now
        if trouble:
            return any(refused for _, refused in trouble) or now - trouble[0][0] > _RESTART_SECONDS
        return None not in (before, connection) and before != connection and idle < self._timing.keepalive

    def _is_enough(self, state: tenacity.RetryCallState) -> bool:
        error = state.outcome.exception() if state.outcome is not None else None
        if isinstance(error, httpx.HTTPStatusError) and error.response.status_code == 500:
            return state.attempt_number >= _TRIES_AT_500
        # The upcoming pause counts: patience is an upper limit.
        return (state.seconds_since_start or 0.0) + state.upcoming_sleep > self.patience

    def _pause(self, state: tenacity.RetryCallState) -> float:
        """Return exponential backoff with jitter, or the server's Retry-After up to a limit."""
        error = state.outcome.exception() if state.outcome is not None else None
        requested = error.response.headers.get("retry-after", "") if isinstance(error, httpx.HTTPStatusError) else ""
        first = self._timing.first_pause
        if requested.isdecimal():
            return min(float(requested), _LONGEST_PAUSE) + first
        return float(tenacity.wait_random_exponential(multiplier=first, min=first / 2, max=_LONGEST_PAUSE)(state))

    def _log_retry(self, state: tenacity.RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome is not None else None
        why = f"status {error.response.status_code}" if isinstance(error, httpx.HTTPStatusError) else _reason(error)
        # Only long waits are worth a warning.
        level = logging.WARNING if state.attempt_number == _WARN_AT_ATTEMPT else logging.INFO
        logger.log(level, "Waiting for the Chroma server at %s (%s)", self._target.url, why)

    def _refused(self, response: httpx.Response) -> str:
        url, status = self._target.url, response.status_code
        if status in (401, 403):
            if self._has_token:
                return (
                    f"{url} refuses the credentials in {TOKEN_VARIABLE} and {HEADERS_VARIABLE} (status {status}). "
                    f"Set {TOKEN_VARIABLE} to a token for tenant {self._target.tenant} and database "
                    f"{self._target.database}."
                )
            return f"{url} requires credentials (status {status}). Set {TOKEN_VARIABLE} to the token."
        if status in (301, 302, 303, 307, 308):
            there = plain(response.headers.get("location", "elsewhere"))
            return f"{url} redirects to {there}. Pass the server's address with --chroma."
        said = f"status {status}: {self._server_message(response)}".rstrip(": ")
        if status == 404 and "/collections/" in response.request.url.path:
            return (
                f"The index's collection is missing on {url} ({said}). Run `epic-rag index` with the indexed folder to "
                "rebuild it."
            )
        if status == 413:
            return f"{url} refuses a request of this size ({said}). Raise the limit of the server or its proxy."
        if status >= 500 or status in TRANSIENT:
            return f"{url} cannot answer now ({said}). Check the server's log and run the command again."
        return f"{url} refuses a request ({said}). Check the server's log and run the command again."

    def _server_message(self, response: httpx.Response) -> str:
        """Return the server's message without secrets and control characters."""
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
            return f"The host name in {url} is unknown. Check the address and the network."
        tls = next((cause for cause in causes if isinstance(cause, ssl.SSLError)), None)
        if isinstance(tls, ssl.SSLCertVerificationError):
            return (
                f"The certificate of {url} cannot be verified ({plain(tls.verify_message)}). Set SSL_CERT_FILE to the "
                "certificate of its authority, or correct the address."
            )
        if tls is not None:
            return f"{url} does not speak TLS ({plain(tls.reason or str(tls))}). Use an address with http://."
        if isinstance(error, httpx.TimeoutException):
            return (
                f"{url} does not answer in time ({_reason(error)}). Check the server's load and run the command again."
            )
        if isinstance(error, httpx.ConnectError):
            start = f"Start one with `chroma run --path FOLDER --port {port}`" if self._target.is_local else "Start it"
            return f"No Chroma server answers at {url} ({_reason(error)}). {start}, or correct the address."
        return f"The connection to {url} was lost ({_reason(error)}). Check the server's log and run the command again."


# With growing pauses, one or two seconds have passed.
_WARN_AT_ATTEMPT = 7


def _connection(response: httpx.Response) -> object:
    """Return an id of the connection; None if it is closed."""
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
    """Return a short reason, from the operating system if possible."""
    if error is None:
        return ""
    for cause in _causes(error):
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror.lower()
    return plain(str(error)) or type(error).__name__


def plain(text: str) -> str:
    """Return untrusted text as one short line without control characters."""
    return "".join(each for each in " ".join(text.split()) if each.isprintable())[:_SHOWN]


_PAGE = 200
_DEFAULT_BATCH = 1000


def folder_client(index_dir: Path) -> ClientAPI:
    """Return a client for the files in an index folder.

    Raises:
        RuntimeError: If Chroma panics, for lack of memory or threads.
    """
    # Chroma shares one system between the clients of a path and refuses a second one with other settings. The dot
    # makes another path, so that a user's client with default settings can open the same folder.
    path = str(index_dir / CHROMA_FOLDER) + "/."
    try:
        return chromadb.PersistentClient(path, settings=Settings(anonymized_telemetry=False))
    except BaseException as error:
        if is_panic(error):
            raise RuntimeError(str(error)) from error
        raise


def is_panic(error: BaseException) -> bool:
    """Return whether this is a panic of Chroma's Rust code, which is not an `Exception`."""
    return type(error).__name__ == "PanicException"


class ServerClient:
    """The part of Chroma's client API that an index needs, for one database on a server. Must be closed.

    Args:
        server: The server.
        patience: For how many seconds failing requests are retried once the server has answered.
        timing: Pauses and limits.

    Raises:
        ChromaServerError: If the server does not answer, is not a Chroma server with API v2, refuses the credentials,
            or has no such tenant or database.
    """

    def __init__(
        self, server: ChromaServer, *, patience: float = READER_PATIENCE, timing: Timing = DEFAULT_TIMING
    ) -> None:
        self._server = server
        settings = Settings(
            anonymized_telemetry=False,
            chroma_api_impl="chromadb.api.fastapi.FastAPI",
            chroma_server_host=server.url,
            chroma_server_http_port=urlsplit(server.url).port,
            chroma_server_ssl_enabled=server.url.startswith("https:"),
            chroma_server_headers={},
        )
        # chromadb's Client sends requests before a time limit can be set, and opens a second connection; its API class
        # does not.
        self._system = System(settings)
        self._api: ServerAPI = self._system.instance(cast(Any, ServerAPI))
        inner: Any = self._api
        inner._session.close()
        self._timing = timing
        self._session = Session(server, request_headers(), timing.check_patience, timing)
        inner._session = self._session
        try:
            self._check_server()
        except BaseException:
            self.close()
            raise
        self._session.patience = patience

    def close(self) -> None:
        """Close the connections."""
        self._session.close()
        self._system.stop()

    def get_max_batch_size(self) -> int:
        """Return the maximum number of rows in a request."""
        said = int(cast(Any, self._api).get_max_batch_size())
        return said if said > 0 else _DEFAULT_BATCH

    def list_collections(self) -> Iterator[Collection]:
        """Yield all collections of the database, also those of others."""
        offset = 0
        while True:
            models = self._api.list_collections(_PAGE, offset, **self._where())
            for model in models:
                yield Collection(client=self._api, model=model, embedding_function=None)
            if len(models) < _PAGE:
                return
            offset += _PAGE

    def find_collection(self, collection_id: str) -> Collection | None:
        """Return the collection with an id; None if it does not exist."""
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
        """Create a collection; the name must be unique."""
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
            # An earlier attempt succeeded, and its answer was lost.
            model = self._api.get_collection(name, **self._where())
        return Collection(client=self._api, model=model, embedding_function=embedding_function)

    def delete_collection(self, name: str) -> None:
        """Delete a collection, if it exists."""
        try:
            self._api.delete_collection(name, **self._where())
        except ChromaServerError as error:
            if error.status != 404:
                raise

    def _where(self) -> dict[str, Any]:
        return {"tenant": self._server.tenant, "database": self._server.database}

    def _check_server(self) -> None:
        """Check that this is a Chroma server with API v2, and that the database exists."""
        url, api = self._server.url, f"{self._server.url}/api/v2"
        answer = self._get_json(f"{api}/heartbeat")
        if not isinstance(answer, dict) or "nanosecond heartbeat" not in answer:
            old = self._get_json(f"{url}/api/v1/heartbeat")
            if isinstance(old, dict) and "nanosecond heartbeat" in old:
                raise ChromaServerError(
                    f"{url} is an old Chroma server with API v1, epic-rag needs API v2 of Chroma 1.x. "
                    "Update the server (`pip install --upgrade chromadb`)."
                )
            raise ChromaServerError(
                f"{url} is not a Chroma server. Pass the address that `chroma run` shows with --chroma."
            )
        version = self._get_json(f"{api}/version")
        if isinstance(version, str) and version.partition(".")[0] == "0":
            raise ChromaServerError(
                f"{url} is a Chroma server of version {plain(version)}, epic-rag needs 1.x. Update the server "
                "(`pip install --upgrade chromadb`)."
            )
        tenant, database = self._server.tenant, self._server.database
        if self._get_json(f"{api}/tenants/{quote(tenant, safe='')}/databases/{quote(database, safe='')}") is None:
            raise ChromaServerError(
                f"{url} has no database {database} of a tenant {tenant}. Set EPIC_RAG_CHROMA_TENANT and "
                "EPIC_RAG_CHROMA_DATABASE to an existing one, or create it with chromadb.AdminClient.",
                404,
            )

    def _get_json(self, url: str) -> Any:
        """Return the JSON at an address; None if there is none."""
        try:
            response = self._session.request("GET", url, timeout=self._timing.check)
            return response.json()
        except ChromaServerError as error:
            if error.status is None or error.status in (301, 302, 303, 307, 308, 401, 403, *TRANSIENT):
                raise
            return None
        except ValueError:
            return None
