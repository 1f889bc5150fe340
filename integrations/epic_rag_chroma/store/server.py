"""Chroma servers: addresses, credentials, and which servers the user has named.

The mirror of an index is in its folder or on a server. The index stores the server's address, tenant, database and the
id that marks its collections there. Credentials are read from the environment each time and never stored:

    EPIC_RAG_CHROMA            address of the server for new indexes
    EPIC_RAG_CHROMA_TENANT     default tenant and database of addresses
    EPIC_RAG_CHROMA_DATABASE
    EPIC_RAG_CHROMA_TOKEN      sent with every request
    EPIC_RAG_CHROMA_HEADERS    further headers, for a proxy before the server: a JSON object of names and values

Trust: if the address in an index folder were simply used, a folder from somebody's archive or repository could have
texts, queries and the token sent anywhere. So an address is used only after the user has named it, as an argument or
in the environment; it is then recorded in the user's state folder. A server on this machine needs no naming as long as
there are no credentials.
"""

from __future__ import annotations

import ipaddress
import json
import logging
import os
import re
import shlex
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import urlsplit

import platformdirs

from epic_rag.errors import ConfigError
from epic_rag.files import write_atomically
from epic_rag_chroma.errors import IndexStateError

__all__ = [
    "ADDRESS_VARIABLE",
    "COLLECTION",
    "DATABASE_VARIABLE",
    "HEADERS_VARIABLE",
    "LOCAL",
    "NO_CHROMA",
    "TENANT_VARIABLE",
    "TOKEN_VARIABLE",
    "ChromaServer",
    "Place",
    "ServerPlace",
    "collection_name",
    "new_place",
    "parse_server",
    "request_headers",
    "require_known",
]


logger = logging.getLogger(__name__)

ADDRESS_VARIABLE = "EPIC_RAG_CHROMA"
TENANT_VARIABLE = "EPIC_RAG_CHROMA_TENANT"
DATABASE_VARIABLE = "EPIC_RAG_CHROMA_DATABASE"
TOKEN_VARIABLE = "EPIC_RAG_CHROMA_TOKEN"
HEADERS_VARIABLE = "EPIC_RAG_CHROMA_HEADERS"
COLLECTION = "epic_rag"
"""Name of the collection in an index folder."""
LOCAL = "folder"
"""Stands for the index folder in place of a server's address."""
NO_CHROMA = "none"
"""Stands for an index without a Chroma mirror in place of a server's address."""

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
        ConfigError: If the address is invalid, or contains credentials.
    """

    url: str
    tenant: str = _DEFAULT_TENANT
    database: str = _DEFAULT_DATABASE

    def __post_init__(self) -> None:
        object.__setattr__(self, "url", _normal(self.url))
        for name in ("tenant", "database"):
            value = getattr(self, name)
            if not value or not value.isprintable() or "/" in value:
                raise ConfigError(f"The {name} of a Chroma server cannot be {value!r}. Use the name on the server.")

    def __str__(self) -> str:
        named = {"tenant": (self.tenant, _DEFAULT_TENANT), "database": (self.database, _DEFAULT_DATABASE)}
        parts = ", ".join(f"{name} {value}" for name, (value, default) in named.items() if value != default)
        return f"{self.url} ({parts})" if parts else self.url

    @property
    def is_local(self) -> bool:
        """True if requests stay on this machine."""
        host = urlsplit(self.url).hostname or ""
        try:
            return ipaddress.ip_address(host).is_loopback
        except ValueError:
            return host == "localhost"


@dataclass(frozen=True)
class ServerPlace:
    """An index's place on a server; `index_id` marks its collections."""

    server: ChromaServer
    index_id: str

    def __str__(self) -> str:
        return str(self.server)

    def to_json(self) -> dict[str, str]:
        """Return the form that the index stores."""
        return {**asdict(self.server), "index_id": self.index_id}

    @classmethod
    def from_json(cls, content: dict[str, str]) -> ServerPlace:
        """Parse the result of `to_json`."""
        fields = {name: str(value) for name, value in content.items()}
        return cls(index_id=fields.pop("index_id"), server=ChromaServer(**fields))


Place = Path | ServerPlace
"""The place of a mirror: the index folder, or a place on a server."""


def collection_name(place: Place | str) -> str:
    """Return the name of the collection of a mirror in the index folder (a path, or `LOCAL`) or on a server."""
    return f"{COLLECTION}_{place.index_id}" if isinstance(place, ServerPlace) else COLLECTION


def parse_server(given: str | ChromaServer | None) -> ChromaServer | str | None:
    """Return the requested place of the mirror: a server, `LOCAL`, `NO_CHROMA`, or the place it has (None)."""
    if given is None or isinstance(given, ChromaServer) or given in (LOCAL, NO_CHROMA):
        return given
    return ChromaServer(
        given,
        os.environ.get(TENANT_VARIABLE) or _DEFAULT_TENANT,
        os.environ.get(DATABASE_VARIABLE) or _DEFAULT_DATABASE,
    )


def new_place(requested: ChromaServer | str | None, current: ServerPlace | str | None) -> ServerPlace | str:
    """Return the place of the mirror after a run.

    Args:
        requested: The result of `parse_server`.
        current: The current place; None for a new index, which alone uses the environment's address.
    """
    if requested is None and current is None:
        requested = parse_server(os.environ.get(ADDRESS_VARIABLE) or None) or LOCAL
    elif requested is None:
        assert current is not None
        return current
    if isinstance(requested, str):
        return requested
    if isinstance(current, ServerPlace):  # an index keeps its id: the collection is found there if the server moved
        return ServerPlace(requested, current.index_id)
    return ServerPlace(requested, uuid.uuid4().hex[:16])


def request_headers() -> dict[str, str]:
    """Return headers with the environment's credentials, which must never be stored or shown.

    A token is sent in both usual headers: `X-Chroma-Token` (Chroma, Chroma Cloud) and `Authorization` (most proxies).

    Raises:
        ConfigError: If they are invalid. The message does not repeat them.
    """
    headers: dict[str, str] = {}
    token = os.environ.get(TOKEN_VARIABLE, "").strip()
    if token:
        if _HEADER_VALUE.fullmatch(token) is None:
            raise ConfigError(f"{TOKEN_VARIABLE} has invalid characters. Set it to the token alone.")
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
                f"{HEADERS_VARIABLE} is not a JSON object of header names and values. Set it to one, as in "
                '\'{"X-Api-Key": "..."}\'.'
            )
        for name, value in content.items():
            headers = {known: kept for known, kept in headers.items() if known.lower() != name.lower()}
            headers[name] = value
    return headers


def _normal(url: str) -> str:
    """Return the canonical form of an address."""
    example = "Use the form http://localhost:8000 or https://host:port."
    try:
        parts = urlsplit(url.strip())
        port = parts.port
    except ValueError:
        shown = repr(url.rpartition("@")[2])  # a password would be before the @
        raise ConfigError(f"{shown} is not the address of a Chroma server. {example}") from None
    if parts.username is not None or parts.password is not None:
        # Not repeated, since messages and indexes must not contain passwords.
        raise ConfigError(
            f"The address of the Chroma server on {parts.hostname} contains a name or password. "
            f"Set {TOKEN_VARIABLE} or {HEADERS_VARIABLE} instead."
        )
    host = (parts.hostname or "").rstrip(".")
    if parts.scheme.lower() not in ("http", "https") or not re.fullmatch(r"[\w.:%-]+", host):
        raise ConfigError(f"{url!r} is not the address of a Chroma server. {example}")
    if parts.query or parts.fragment:
        raise ConfigError(f"{url!r} contains more than an address. {example}")
    scheme = parts.scheme.lower()
    port = port if port is not None else {"http": 80, "https": 443}[scheme]
    shown = f"[{host}]" if ":" in host else host
    path = parts.path.rstrip("/").removesuffix("/api/v2")
    return f"{scheme}://{shown}:{port}{path}"


def require_known(index_dir: Path, server: ChromaServer, *, is_named: bool) -> None:
    """Refuse an address that only an index folder has named.

    Args:
        index_dir: The index folder.
        server: The server that it names.
        is_named: Whether the caller has named it, too; it is then recorded.

    Raises:
        IndexStateError: If the user has never named it.
    """
    if server.is_local and not any(os.environ.get(name, "").strip() for name in (TOKEN_VARIABLE, HEADERS_VARIABLE)):
        return
    file = platformdirs.user_state_path("epic-rag", appauthor=False) / "chroma_servers.json"
    try:
        known = set(map(str, json.loads(file.read_text(encoding="utf-8"))["servers"]))
    except (OSError, ValueError, KeyError, TypeError):
        known = set()  # the user has to name it again
    if server.url in known:
        return
    named = os.environ.get(ADDRESS_VARIABLE, "")
    if not is_named and (named in ("", LOCAL, NO_CHROMA) or ChromaServer(named).url != server.url):
        raise IndexStateError(
            f"The index in {index_dir} has its Chroma mirror on {server}, which you have not named on this machine. If "
            f"you trust that server with your texts, pass --chroma {shlex.quote(server.url)} once, or set "
            f"{ADDRESS_VARIABLE}."
        )
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps({"servers": sorted(known | {server.url})}, indent=2) + "\n")
    except OSError as error:
        logger.warning("The Chroma server cannot be recorded (%s). Pass --chroma each time.", error)
