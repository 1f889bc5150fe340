"""Which Chroma servers this person has named, as opposed to an index folder that came from elsewhere.

An index folder says where its vectors are. If that were believed, a folder in somebody's archive or repository could
have texts, queries and the token sent wherever its author likes. So an address counts once the user has given it, by
argument or environment; it is noted in a file of the user's own, and from then on an index may remember it. Without
credentials, a server on this machine needs no naming.
"""

from __future__ import annotations

import ipaddress
import json
import logging
import os
import re
import shlex
import socket
import ssl
import time
import uuid
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

from epic_rag.errors import ConfigError
from epic_rag_chroma.errors import ChromaServerError, IndexStateError
from epic_rag_chroma.store.paths import CHROMA_FOLDER, write_atomically

if TYPE_CHECKING:
    from chromadb.api import ClientAPI

__all__ = [
    "ADDRESS_VARIABLE",
    "DATABASE_VARIABLE",
    "HEADERS_VARIABLE",
    "IN_FOLDER",
    "READER_PATIENCE",
    "TENANT_VARIABLE",
    "TOKEN_VARIABLE",
    "TRANSIENT",
    "WRITER_PATIENCE",
    "ChromaServer",
    "Place",
    "RestartedError",
    "ServerClient",
    "ServerPlace",
    "Session",
    "asked_server",
    "folder_client",
    "has_credentials",
    "is_in_doubt",
    "is_named_by_environment",
    "is_panic",
    "known_file",
    "new_place",
    "plain",
    "request_headers",
    "require_known",
]


# --- from session
# An HTTP session for a Chroma server that may be slow, busy, restarted or gone.
#
# Every request has a time limit; what is transient is tried again with growing, random pauses until the caller's patience
# is over; every failure ends as one `ChromaServerError` that says what happened and what to do.
#
# Chroma's server overwrites the files of a graph in place: killed in the middle of it, it comes back with a graph that
# fails, or finds less. So a session that has written notices when the server was away and says so (`RestartedError`),
# though trying again has helped.

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


# --- from client
# Chroma clients: for the index folder, and for a server.
#
# chromadb's own `HttpClient` waits without end for a server that does not answer, gives up at once on one that is being
# restarted, and loses the HTTP status of an error; `ServerClient` uses chromadb's API over a `Session` that does none of
# this. Trying again is safe: rows are written and deleted by id, collections have names that nobody else takes.

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


# --- from server
# Where an index keeps its vectors: in its own folder, or on a Chroma server.
#
# An index remembers its server (address, tenant, database and the id under which its collections are told from those of
# other indexes) in `index.json`. Credentials come from the environment each time and are kept nowhere:
#
#     EPIC_RAG_CHROMA            address of the server for indexes that are made without one being named
#     EPIC_RAG_CHROMA_TENANT     tenant and database for addresses that are given without them
#     EPIC_RAG_CHROMA_DATABASE
#     EPIC_RAG_CHROMA_TOKEN      sent with every request
#     EPIC_RAG_CHROMA_HEADERS    more headers, for a proxy before the server: a JSON object of names and values

ADDRESS_VARIABLE = "EPIC_RAG_CHROMA"
TENANT_VARIABLE = "EPIC_RAG_CHROMA_TENANT"
DATABASE_VARIABLE = "EPIC_RAG_CHROMA_DATABASE"
TOKEN_VARIABLE = "EPIC_RAG_CHROMA_TOKEN"
HEADERS_VARIABLE = "EPIC_RAG_CHROMA_HEADERS"
# What stands for the index folder where an address is asked for.
IN_FOLDER = "folder"

_DEFAULT_TENANT = "default_tenant"
_DEFAULT_DATABASE = "default_database"
_HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
_HEADER_VALUE = re.compile(r"[\x21-\x7e]([\x20-\x7e]*[\x21-\x7e])?")


@dataclass(frozen=True)
class ChromaServer:
    """A database on a Chroma server.

    Args:
        url: `http://host:port` or `https://host:port`; a path is kept, for a server behind a proxy.
        tenant: Chroma's tenant.
        database: The tenant's database. It must exist.

    Raises:
        ConfigError: If the address cannot be one, or has credentials in it.
    """

    url: str
    tenant: str = _DEFAULT_TENANT
    database: str = _DEFAULT_DATABASE

    def __post_init__(self) -> None:
        object.__setattr__(self, "url", _normal(self.url))
        for name in ("tenant", "database"):
            value = getattr(self, name)
            if not value or not value.isprintable() or "/" in value:
                raise ConfigError(
                    f"the {name} of a Chroma server cannot be {value!r}; give the name that the server has"
                )

    def __str__(self) -> str:
        parts = []
        if self.tenant != _DEFAULT_TENANT:
            parts.append(f"tenant {self.tenant}")
        if self.database != _DEFAULT_DATABASE:
            parts.append(f"database {self.database}")
        return self.url + (f" ({', '.join(parts)})" if parts else "")

    @property
    def is_local(self) -> bool:
        """Whether nothing that is sent there leaves this machine."""
        host = urlsplit(self.url).hostname or ""
        try:
            return ipaddress.ip_address(host).is_loopback
        except ValueError:
            return host == "localhost"


@dataclass(frozen=True)
class ServerPlace:
    """An index's place on a server; `index_id` tells its collections from those of other indexes."""

    server: ChromaServer
    index_id: str

    def __str__(self) -> str:
        return str(self.server)

    def to_json(self) -> dict[str, str]:
        """What `index.json` keeps."""
        server = self.server
        return {"url": server.url, "tenant": server.tenant, "database": server.database, "index_id": self.index_id}

    @classmethod
    def from_json(cls, content: dict[str, str]) -> ServerPlace:
        """Read what `to_json` made."""
        server = ChromaServer(str(content["url"]), str(content["tenant"]), str(content["database"]))
        return cls(server, str(content["index_id"]))


# The index folder, or a place on a server.
Place = Path | ServerPlace


class RestartedError(ChromaServerError):
    """The server was away while rows were being written. It is there again, and has done what was asked last."""


def is_in_doubt(error: ChromaServerError) -> bool:
    """Whether an error says that a collection's graph may be broken, and not that it cannot be reached."""
    return isinstance(error, RestartedError) or error.status == 500


def asked_server(given: str | ChromaServer | None) -> ChromaServer | str | None:
    """What a caller asks for: a server, the index folder (`IN_FOLDER`), or whatever the index has (None)."""
    if given is None or isinstance(given, ChromaServer):
        return given
    if given == IN_FOLDER:
        return IN_FOLDER
    return ChromaServer(
        given,
        os.environ.get(TENANT_VARIABLE) or _DEFAULT_TENANT,
        os.environ.get(DATABASE_VARIABLE) or _DEFAULT_DATABASE,
    )


def new_place(asked: ChromaServer | str | None, known: ServerPlace | None, *, is_new: bool) -> ServerPlace | None:
    """The place of an index that is made or made anew; None for its folder.

    Args:
        asked: What `asked_server` says.
        known: Where the index is now, if there is one.
        is_new: Whether there is none; only then does the environment's address count.
    """
    if asked is None and is_new:
        asked = asked_server(os.environ.get(ADDRESS_VARIABLE) or None)
    elif asked is None:
        return known
    if not isinstance(asked, ChromaServer):
        return None
    if known is not None and known.server == asked:
        return known
    return ServerPlace(asked, uuid.uuid4().hex[:16])


def is_named_by_environment(server: ChromaServer) -> bool:
    """Whether the environment has the server's address."""
    given = os.environ.get(ADDRESS_VARIABLE, "")
    return given not in ("", IN_FOLDER) and ChromaServer(given).url == server.url


def has_credentials() -> bool:
    """Whether there is anything secret to send."""
    return bool(os.environ.get(TOKEN_VARIABLE, "").strip() or os.environ.get(HEADERS_VARIABLE, "").strip())


def request_headers() -> dict[str, str]:
    """The headers with the credentials that the environment has; for requests only, never to be kept or shown.

    A token goes into both headers in use: Chroma's own (`X-Chroma-Token`, also Chroma Cloud's) and `Authorization`,
    which is what most proxies check.

    Raises:
        ConfigError: If they cannot be sent. The message does not repeat them.
    """
    headers: dict[str, str] = {}
    token = os.environ.get(TOKEN_VARIABLE, "").strip()
    if token:
        if _HEADER_VALUE.fullmatch(token) is None:
            raise ConfigError(f"{TOKEN_VARIABLE} has characters that no token can have; set it to the token alone")
        headers = {"X-Chroma-Token": token, "Authorization": f"Bearer {token}"}
    more = os.environ.get(HEADERS_VARIABLE, "").strip()
    if more:
        try:
            content = json.loads(more)
        except ValueError:
            content = None
        if not isinstance(content, dict) or not all(
            isinstance(value, str) and _HEADER_NAME.fullmatch(name) and _HEADER_VALUE.fullmatch(value)
            for name, value in content.items()
        ):
            raise ConfigError(
                f"{HEADERS_VARIABLE} is no JSON object of header names and values; set it to one, as in "
                '\'{"X-Api-Key": "..."}\''
            )
        for name, value in content.items():
            headers = {known: kept for known, kept in headers.items() if known.lower() != name.lower()}
            headers[name] = value
    return headers


def _normal(url: str) -> str:
    """An address in the one way that addresses are compared in."""
    example = "give it as http://localhost:8000 or https://host:port"
    try:
        parts = urlsplit(url.strip())
        port = parts.port
    except ValueError:
        shown = repr(url.rpartition("@")[2])  # a password would stand before the sign
        raise ConfigError(f"{shown} is no address of a Chroma server; {example}") from None
    if parts.username is not None or parts.password is not None:
        # Not repeated: it is written into index.json and messages, where no password may be.
        raise ConfigError(
            f"the address of the Chroma server on {parts.hostname} has a name or password in it; leave it out, and set "
            f"{TOKEN_VARIABLE} or {HEADERS_VARIABLE} instead"
        )
    host = (parts.hostname or "").rstrip(".")
    if parts.scheme.lower() not in ("http", "https") or not re.fullmatch(r"[\w.:%-]+", host):
        raise ConfigError(f"{url!r} is no address of a Chroma server; {example}")
    if parts.query or parts.fragment:
        raise ConfigError(f"{url!r} has more than an address in it; {example}")
    scheme = parts.scheme.lower()
    port = port if port is not None else {"http": 80, "https": 443}[scheme]
    shown = f"[{host}]" if ":" in host else host
    path = parts.path.rstrip("/").removesuffix("/api/v2")
    return f"{scheme}://{shown}:{port}{path}"


def known_file() -> Path:
    """Where the addresses are noted."""
    given = os.environ.get("XDG_STATE_HOME", "")
    state = Path(given) if os.path.isabs(given) else Path.home() / ".local" / "state"
    return state / "epic-rag" / "chroma_servers.json"


def require_known(index_dir: Path, server: ChromaServer, *, is_named: bool) -> None:
    """Refuse an address that nobody but an index folder has named.

    Args:
        index_dir: The index folder.
        server: The server that it names.
        is_named: Whether the caller has named it, too.

    Raises:
        IndexStateError: If it is unknown.
    """
    if server.is_local and not has_credentials():
        return
    known = _read()
    if server.url in known:
        return
    if is_named or is_named_by_environment(server):
        _write(known | {server.url})
        return
    raise IndexStateError(
        f"the index in {index_dir} has its vectors on {server}, which you have not named on this machine; if you trust "
        f"that server with texts and queries, give --chroma {shlex.quote(server.url)} once, or set {ADDRESS_VARIABLE}"
    )


def _read() -> frozenset[str]:
    try:
        return frozenset(map(str, json.loads(known_file().read_text(encoding="utf-8"))["servers"]))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError):  # the last: there is no home folder
        return frozenset()  # then the user names it again


def _write(servers: frozenset[str]) -> None:
    try:
        path = known_file()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps({"servers": sorted(servers)}, indent=2) + "\n")
    except (OSError, RuntimeError) as error:
        logger.warning("cannot note that you use this Chroma server (%s); name it with --chroma each time", error)
