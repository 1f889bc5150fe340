"""An HTTP session for a Chroma server that may be slow, busy, restarted or gone.

Every request has a time limit; what is transient is tried again with growing, random pauses until the caller's patience
is over; every failure ends as one `ChromaServerError` that says what happened and what to do.

Chroma's server overwrites the files of a graph in place: killed in the middle of it, it comes back with a graph that
fails, or finds less. So a session that has written notices when the server was away and says so (`RestartedError`),
though trying again has helped.
"""

from __future__ import annotations

import logging
import socket
import ssl
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import tenacity

from epic_rag.errors import ChromaServerError
from epic_rag_chroma.server import HEADERS_VARIABLE, TOKEN_VARIABLE, ChromaServer, RestartedError

__all__ = ["TRANSIENT", "Session", "plain"]

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
