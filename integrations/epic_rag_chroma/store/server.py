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
import uuid
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from epic_rag.errors import ConfigError
from epic_rag_chroma.errors import ChromaServerError, IndexStateError
from epic_rag_chroma.store.paths import write_atomically

__all__ = [
    "ADDRESS_VARIABLE",
    "DATABASE_VARIABLE",
    "HEADERS_VARIABLE",
    "LOCAL",
    "TENANT_VARIABLE",
    "TOKEN_VARIABLE",
    "ChromaServer",
    "Place",
    "RestartedError",
    "ServerPlace",
    "has_credentials",
    "is_named_by_environment",
    "known_file",
    "may_be_corrupt",
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
LOCAL = "folder"
"""Stands for the index folder in place of a server's address."""

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


def may_be_corrupt(error: ChromaServerError) -> bool:
    """Whether an error says that a collection's graph may be broken, and not that it cannot be reached."""
    return isinstance(error, RestartedError) or error.status == 500


def parse_server(given: str | ChromaServer | None) -> ChromaServer | str | None:
    """What a caller asks for: a server, the index folder (`LOCAL`), or whatever the index has (None)."""
    if given is None or isinstance(given, ChromaServer):
        return given
    if given == LOCAL:
        return LOCAL
    return ChromaServer(
        given,
        os.environ.get(TENANT_VARIABLE) or _DEFAULT_TENANT,
        os.environ.get(DATABASE_VARIABLE) or _DEFAULT_DATABASE,
    )


def new_place(asked: ChromaServer | str | None, known: ServerPlace | None, *, is_new: bool) -> ServerPlace | None:
    """The place of an index that is made or made anew; None for its folder.

    Args:
        asked: What `parse_server` says.
        known: Where the index is now, if there is one.
        is_new: Whether there is none; only then does the environment's address count.
    """
    if asked is None and is_new:
        asked = parse_server(os.environ.get(ADDRESS_VARIABLE) or None)
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
    return given not in ("", LOCAL) and ChromaServer(given).url == server.url


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
