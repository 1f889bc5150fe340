"""Access control: Host and Origin headers, API key, size of bodies.

Any web page that a user of the machine opens can send requests to a server on loopback. Three headers that pages cannot
forge stop it: `Origin` names another page; after DNS rebinding (the page's own name resolves to 127.0.0.1) `Host` names
the page's host; and `Sec-Fetch-Site` names requests of other pages that carry no Origin, such as those for images.
Links of other pages lead to the search page alone. Programs send neither Origin nor Sec-Fetch-Site and are served.
There is no CORS: no page of another origin can read an answer.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterable
from dataclasses import dataclass, field
from ipaddress import ip_address

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from epic_rag import ConfigError
from epic_rag_chroma import LOCAL_QUERY_PATH
from epic_rag_server.errors import ApiError, error_response

__all__ = ["AccessPolicy", "RequestGuard", "host_name", "is_loopback"]

# Local queries have a token. The page shows nothing of the server without a key; its files are the same everywhere.
_WITHOUT_KEY = frozenset({"/health", "/", LOCAL_QUERY_PATH})
_PAGE_FILES = "/page/"
# What a browser sends for a request of the server's own page, and for an address that its user typed.
_OWN_SITES = frozenset({"same-origin", "none"})
_PAGES = frozenset({"/", "/document"})


def host_name(netloc: str) -> str | None:
    """Return the host of a Host header in lower case, without port and brackets; None if it is malformed."""
    host, colon, port = netloc.lower().rpartition(":")
    if not colon or netloc.endswith("]"):
        host, port = netloc.lower(), "0"
    if host.startswith("["):
        host = host[1:-1] if host.endswith("]") else ""
    elif ":" in host:
        return None
    is_plain = bool(host) and all(character.isalnum() or character in ".-_:%" for character in host)
    return host.rstrip(".") if is_plain and port.isdecimal() and netloc.isascii() else None


def is_loopback(host: str) -> bool:
    """Return whether a host name or address is this machine's loopback interface."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@dataclass(frozen=True)
class AccessPolicy:
    """Rules for requests.

    Args:
        bind: The address that the server listens on.
        hosts: Further host names that requests may address.
        api_key: The key that requests must send; None for no key, on loopback only.
        max_body: Maximum number of bytes of a body.

    Raises:
        ConfigError: If the address is not on loopback and there is no key, or the key cannot be sent in a header.
    """

    bind: str = "127.0.0.1"
    hosts: Iterable[str] = ()
    api_key: str | None = field(default=None, repr=False)
    max_body: int = 32 * 2**20

    def __post_init__(self) -> None:
        object.__setattr__(self, "hosts", frozenset(name.lower().rstrip(".") for name in self.hosts))
        if self.api_key is None and not is_loopback(self.bind):
            raise ConfigError(
                f"{self.bind} can be reached from other machines, and there is no API key. Put one into a variable and "
                "pass its name to --api-key-env, or listen on 127.0.0.1."
            )
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable() and self.api_key):
            raise ConfigError("The API key is empty or has characters beyond ASCII. Use letters and digits.")

    def check(self, headers: Headers, path: str) -> None:
        """Check the headers of a request.

        Raises:
            ApiError: 403 for a foreign Host or Origin, 401 without the key, 413 for an announced body that is too long.
        """
        given = headers.getlist("host")
        if len(given) != 1 or not self._is_own(host_name(given[0])):
            raise ApiError(
                403, "The Host header is not an address of this server. Add it with --allow-host.", code="host"
            )
        for origin in headers.getlist("origin"):
            if origin.partition("://")[2].lower() != given[0].lower() or not origin.startswith(("http://", "https://")):
                raise ApiError(403, "Pages of other origins have no access to this server.", code="origin")
        if headers.get("sec-fetch-site", "none") not in _OWN_SITES:
            is_link = headers.get("sec-fetch-mode") == "navigate" and headers.get("sec-fetch-dest") == "document"
            if not is_link or path not in _PAGES:
                raise ApiError(403, "Pages of other origins have no access to this server.", code="origin")
        if path not in _WITHOUT_KEY and not path.startswith(_PAGE_FILES) and not self.has_key(headers):
            raise ApiError(
                401,
                "The API key is missing or wrong. Send it as `Authorization: Bearer KEY`.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        announced = headers.get("content-length", "0")
        if announced.isdecimal() and (len(announced) > 18 or int(announced) > self.max_body):
            raise self.too_large()

    def has_key(self, headers: Headers) -> bool:
        """Return whether a request has the API key, or none is needed."""
        if self.api_key is None:
            return True
        scheme, _, key = headers.get("authorization", "").rpartition(" ")
        # LlamaIndex's client of TEI sends the key without a scheme.
        is_right = hmac.compare_digest(key.encode("utf-8", "replace"), self.api_key.encode())
        return is_right and scheme.strip().lower() in ("", "bearer")

    def too_large(self) -> ApiError:
        """Return the error for a body above the limit."""
        return ApiError(413, f"The body is longer than {self.max_body:,} bytes. Send fewer texts.", code="too_large")

    def _is_own(self, host: str | None) -> bool:
        if host is None:
            return False
        if is_loopback(host) or host in self.hosts or host == self.bind:
            return host != "0.0.0.0"
        if is_loopback(self.bind):
            return False
        try:  # DNS rebinding needs a name
            return not ip_address(host).is_unspecified
        except ValueError:
            return False


class RequestGuard:
    """ASGI middleware that applies an `AccessPolicy` to every route.

    Args:
        app: The application.
        policy: The rules.
    """

    def __init__(self, app: ASGIApp, policy: AccessPolicy) -> None:
        self._app = app
        self._policy = policy

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request that breaks a rule; pass on any other, and count the bytes of its body."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            self._policy.check(Headers(scope=scope), scope["path"])
        except ApiError as error:
            await error_response(error)(scope, receive, send)
            return
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._policy.max_body:
                raise self._policy.too_large()
            return message

        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-content-type-options", b"nosniff")]
            await send(message)

        await self._app(scope, counted, sent)
