"""Chroma clients: for the index folder, and for a server over an HTTP session with time limits and retries.

chromadb's own `HttpClient` waits without end for a server that does not answer, gives up at once on one that is being
restarted, and loses the HTTP status of an error. `ServerClient` uses chromadb's API over a `Session`: every request
has a time limit, transient failures are retried with exponential backoff, and every failure ends as one
`ChromaServerError`.

Requests that write rows are not retried unless the server has refused to start on them. Chroma overwrites the files of
its graph in place within such a request, so a server that died in one comes back with a graph that may be torn; only a
new collection is safe then, see `store.collection`.
"""

from __future__ import annotations

import logging
import socket
import ssl
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import quote, urlsplit

import httpx
import tenacity

from epic_rag_chroma.errors import ChromaServerError
from epic_rag_chroma.store.paths import CHROMA_FOLDER
from epic_rag_chroma.store.server import HEADERS_VARIABLE, TOKEN_VARIABLE, ChromaServer, request_headers

if TYPE_CHECKING:
    from chromadb.api import ClientAPI, ServerAPI
    from chromadb.api.models.Collection import Collection

__all__ = ["PATIENCE", "RUN_PATIENCE", "ServerClient", "Session", "folder_client", "is_not_started", "is_transient"]

logger = logging.getLogger(__name__)

PATIENCE = 3.0
"""Seconds for which failing requests are retried. A query, and a run whose server is away, should fail soon."""
RUN_PATIENCE = 60.0
"""Seconds for which a run waits for a server that went away during it; a restart takes less."""

_CONNECT_SECONDS = 5.0
_ANSWER_SECONDS = 60.0
_LONGEST_PAUSE = 3.0
# With growing pauses, one or two seconds have passed.
_WARN_AT_ATTEMPT = 7
# Chroma answers 500 for a busy database, but also for permanent errors.
_TRIES_AT_500 = 5
_TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})
# The server, or a proxy, has not started on the request.
_NOT_STARTED = frozenset({408, 425, 429})
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_WRITES = ("/upsert", "/update", "/delete")
_SHOWN = 160
_PAGE = 200
_DEFAULT_BATCH = 1000


class Session(httpx.Client):
    """An HTTP session with retries that raises every failure as a `ChromaServerError`.

    Args:
        server: The server.
        patience: For how many seconds a failing request is retried; can be set later.
        first_pause: Seconds before the first retry; further pauses grow exponentially.
        headers: Headers with credentials; None for those of the environment.

    Raises:
        ConfigError: If the credentials in the environment are invalid.
    """

    def __init__(
        self,
        server: ChromaServer,
        patience: float,
        *,
        first_pause: float = 0.1,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.url = f"{server.url}/api/v2/tenants/{quote(server.tenant, safe='')}/databases/"
        self.url += quote(server.database, safe="")
        self._server = server
        self.patience = patience
        self._first_pause = first_pause
        headers = request_headers() if headers is None else headers
        # "Bearer TOKEN" and TOKEN, the longer ones first.
        secrets = {part for value in headers.values() for part in (value, value.rpartition(" ")[2])}
        self._secrets = sorted(secrets, key=len, reverse=True)
        super().__init__(
            headers={"Content-Type": "application/json", "User-Agent": "epic-rag", **headers},
            timeout=httpx.Timeout(_ANSWER_SECONDS, connect=_CONNECT_SECONDS),
            # A proxy of the environment cannot reach this machine as localhost.
            mounts={f"all://{urlsplit(server.url).netloc}": None} if server.is_local else None,
        )

    def request(self, method: str, url: httpx.URL | str, **options: Any) -> httpx.Response:
        """Send a request, with retries; see httpx. The response always has a status of success.

        Raises:
            ChromaServerError: If there is no such response.
        """
        is_write = method.upper() == "POST" and str(url).endswith(_WRITES)

        def send() -> httpx.Response:
            response = super(Session, self).request(method, url, **options)
            if not response.is_success:
                # Without httpx's message; `_refused` formats ours.
                raise httpx.HTTPStatusError("", request=response.request, response=response)
            return response

        is_over = tenacity.stop_before_delay(self.patience)
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(lambda error: _is_retried(error, is_write)),
            stop=lambda state: is_over(state) or (state.attempt_number >= _TRIES_AT_500 and _status(state) == 500),
            wait=tenacity.wait_random_exponential(self._first_pause, min=self._first_pause / 2, max=_LONGEST_PAUSE),
            before_sleep=self._log_retry,
            reraise=True,
        )
        try:
            return retrying(send)
        except httpx.HTTPStatusError as error:
            raise ChromaServerError(self._refused(error.response), error.response.status_code) from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ChromaServerError(self._unreachable(error)) from error

    def get_json(self, url: str, **options: Any) -> Any:
        """Return the JSON at an address; None if the server has none there.

        Raises:
            ChromaServerError: If the server is away, redirects, or refuses the credentials.
        """
        try:
            return self.request("GET", url, **options).json()
        except ChromaServerError as error:
            if error.status is None or error.status in (401, 403, *_REDIRECTS, *_TRANSIENT):
                raise
        except ValueError:
            pass  # not JSON
        return None

    def _log_retry(self, state: tenacity.RetryCallState) -> None:
        why = f"status {_status(state)}" if _status(state) else _reason(_error(state))
        # Only long waits are worth a warning.
        level = logging.WARNING if state.attempt_number == _WARN_AT_ATTEMPT else logging.INFO
        logger.log(level, "Waiting for the Chroma server at %s (%s)", self._server.url, why)

    def _refused(self, response: httpx.Response) -> str:
        url, status = self._server.url, response.status_code
        if status in (401, 403):
            if self._secrets:
                return (
                    f"{url} refuses the credentials in {TOKEN_VARIABLE} and {HEADERS_VARIABLE} (status {status}). "
                    f"Set {TOKEN_VARIABLE} to a token for tenant {self._server.tenant} and database "
                    f"{self._server.database}."
                )
            return f"{url} requires credentials (status {status}). Set {TOKEN_VARIABLE} to the token."
        if status in _REDIRECTS:
            there = _plain(response.headers.get("location", "elsewhere"))
            return f"{url} redirects to {there}. Pass the server's address with --chroma."
        said = f"status {status}: {self._server_message(response)}".rstrip(": ")
        if status == 404 and "/collections/" in response.request.url.path:
            return (
                f"The index's collection is missing on {url} ({said}). Run `epic-rag index` with the indexed folder to "
                "rebuild it."
            )
        if status == 413:
            return f"{url} refuses a request of this size ({said}). Raise the limit of the server or its proxy."
        failed = "cannot answer now" if status in _TRANSIENT or status >= 500 else "refuses a request"
        return f"{url} {failed} ({said}). Check the server's log and run the command again."

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
        return _plain(text)

    def _unreachable(self, error: Exception) -> str:
        url, port = self._server.url, urlsplit(self._server.url).port
        causes = list(_causes(error))
        if any(isinstance(cause, socket.gaierror) for cause in causes):
            return f"The host name in {url} is unknown. Check the address and the network."
        tls = next((cause for cause in causes if isinstance(cause, ssl.SSLError)), None)
        if isinstance(tls, ssl.SSLCertVerificationError):
            return (
                f"The certificate of {url} cannot be verified ({_plain(tls.verify_message)}). Set SSL_CERT_FILE to the "
                "certificate of its authority, or correct the address."
            )
        if tls is not None:
            return f"{url} does not speak TLS ({_plain(tls.reason or str(tls))}). Use an address with http://."
        if isinstance(error, httpx.TimeoutException):
            return (
                f"{url} does not answer in time ({_reason(error)}). Check the server's load and run the command again."
            )
        if isinstance(error, httpx.ConnectError):
            start = f"Start one with `chroma run --path FOLDER --port {port}`" if self._server.is_local else "Start it"
            return f"No Chroma server answers at {url} ({_reason(error)}). {start}, or correct the address."
        return f"The connection to {url} was lost ({_reason(error)}). Check the server's log and run the command again."


def is_not_started(error: ChromaServerError) -> bool:
    """Return whether no server got the request, so that repeating it is safe."""
    return isinstance(error.__cause__, (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout))


def is_transient(error: ChromaServerError) -> bool:
    """Return whether a later attempt may succeed: the server was away, busy, or cannot use a collection."""
    cause = error.__cause__
    return error.status in _TRANSIENT if error.status is not None else cause is not None and _is_retried(cause, False)


def _is_retried(error: BaseException, is_write: bool) -> bool:
    if isinstance(error, httpx.HTTPStatusError):
        return error.response.status_code in (_NOT_STARTED if is_write else _TRANSIENT)
    if is_write or not isinstance(error, httpx.TransportError):
        return False
    if isinstance(error, (httpx.UnsupportedProtocol, httpx.LocalProtocolError, httpx.ProxyError)):
        return False
    for cause in _causes(error):
        if isinstance(cause, ssl.SSLError) and not isinstance(cause, ssl.SSLEOFError):
            return False
        if isinstance(cause, socket.gaierror) and cause.errno != socket.EAI_AGAIN:
            return False
    return True


def _error(state: tenacity.RetryCallState) -> BaseException | None:
    return None if state.outcome is None else state.outcome.exception()


def _status(state: tenacity.RetryCallState) -> int | None:
    error = _error(state)
    return error.response.status_code if isinstance(error, httpx.HTTPStatusError) else None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _reason(error: BaseException | None) -> str:
    """Return a short reason, from the operating system if possible."""
    reasons = [cause.strerror for cause in _causes(error) if isinstance(cause, OSError) and cause.strerror]
    return reasons[0].lower() if reasons else _plain(str(error)) or type(error).__name__


def _plain(text: str) -> str:
    """Return untrusted text as one short line without control characters."""
    return "".join(each for each in " ".join(text.split()) if each.isprintable())[:_SHOWN]


class ServerClient:
    """The part of Chroma's client API that a mirror needs, for one database on a server. Must be closed.

    Args:
        server: The server.
        patience: For how many seconds failing requests are retried once the server has answered.
        check_patience: For how many seconds the requests that check the server are retried.
        check_seconds: Time limit of each of them.
        first_pause: See `Session`.
        headers: See `Session`.

    Raises:
        ChromaServerError: If the server does not answer, is not a Chroma server with API v2, refuses the credentials,
            or has no such tenant or database.
    """

    def __init__(
        self,
        server: ChromaServer,
        patience: float = PATIENCE,
        check_patience: float = PATIENCE,
        *,
        check_seconds: float = 10.0,
        first_pause: float = 0.1,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        from chromadb.api import ServerAPI
        from chromadb.config import Settings, System

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
        cast(Any, self._api)._session.close()
        self._session = cast(Any, self._api)._session = Session(
            server, check_patience, first_pause=first_pause, headers=headers
        )
        self._heartbeat = f"{server.url}/api/v2/heartbeat"
        self._where: dict[str, Any] = {"tenant": server.tenant, "database": server.database}
        try:
            self._check_server(server, check_seconds)
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
            models = self._api.list_collections(_PAGE, offset, **self._where)
            for model in models:
                yield self._collection(model)
            if len(models) < _PAGE:
                return
            offset += _PAGE

    def find_collection(self, name: str) -> Collection | None:
        """Return a collection by its name; None if there is none."""
        try:
            return self._collection(self._api.get_collection(name, **self._where))
        except ChromaServerError as error:
            if error.status != 404:
                raise
            return None

    def wait(self, seconds: float) -> None:
        """Wait until a server that was restarted answers again.

        Raises:
            ChromaServerError: If it does not answer in that time.
        """
        usual, self._session.patience = self._session.patience, 0.0
        try:
            tenacity.Retrying(
                retry=tenacity.retry_if_exception(
                    lambda error: isinstance(error, ChromaServerError) and is_transient(error)
                ),
                stop=tenacity.stop_after_delay(seconds),
                wait=tenacity.wait_random(0.1, 0.4),
                reraise=True,
            )(self._session.request, "GET", self._heartbeat)
        finally:
            self._session.patience = usual

    def create_collection(
        self, name: str, *, metadata: dict[str, Any], configuration: Any, embedding_function: Any
    ) -> Collection:
        """Create a collection; the name must be unique."""
        configuration = {**configuration, "embedding_function": embedding_function}
        return self._collection(
            self._api.create_collection(
                name=name, metadata=metadata, configuration=cast(Any, configuration), **self._where
            )
        )

    def delete_collection(self, name: str) -> None:
        """Delete a collection, if it exists."""
        try:
            self._api.delete_collection(name, **self._where)
        except ChromaServerError as error:
            if error.status != 404:
                raise

    def _collection(self, model: Any) -> Collection:
        from chromadb.api.models.Collection import Collection

        return Collection(client=self._api, model=model, embedding_function=None)

    def _check_server(self, server: ChromaServer, seconds: float) -> None:
        """Check that this is a Chroma server with API v2, and that the database exists."""
        url, session = server.url, self._session

        def has_heartbeat(version: str) -> bool:
            answer = session.get_json(f"{url}/api/{version}/heartbeat", timeout=seconds)
            return isinstance(answer, dict) and "nanosecond heartbeat" in answer

        if not has_heartbeat("v2"):
            if has_heartbeat("v1"):
                raise ChromaServerError(
                    f"{url} is an old Chroma server with API v1, epic-rag needs API v2 of Chroma 1.x. "
                    "Update the server (`pip install --upgrade chromadb`)."
                )
            raise ChromaServerError(
                f"{url} is not a Chroma server. Pass the address that `chroma run` shows with --chroma."
            )
        version = session.get_json(f"{url}/api/v2/version", timeout=seconds)
        if isinstance(version, str) and version.partition(".")[0] == "0":
            raise ChromaServerError(
                f"{url} is a Chroma server of version {_plain(version)}, epic-rag needs 1.x. Update the server "
                "(`pip install --upgrade chromadb`)."
            )
        if session.get_json(session.url, timeout=seconds) is None:
            raise ChromaServerError(
                f"{url} has no database {server.database} of a tenant {server.tenant}. Set EPIC_RAG_CHROMA_TENANT and "
                "EPIC_RAG_CHROMA_DATABASE to an existing one, or create it with chromadb.AdminClient.",
                404,
            )


def folder_client(index_dir: Path) -> ClientAPI:
    """Return a client for the files in an index folder."""
    import chromadb
    from chromadb.config import Settings

    # Chroma shares one system between the clients of a path and refuses a second one with other settings. The dot
    # makes another path, so that a user's client with default settings can open the same folder.
    return chromadb.PersistentClient(f"{index_dir / CHROMA_FOLDER}/.", settings=Settings(anonymized_telemetry=False))
