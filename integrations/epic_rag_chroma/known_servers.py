"""Which Chroma servers this person has named, as opposed to an index folder that came from elsewhere.

An index folder says where its vectors are. If that were believed, a folder in somebody's archive or repository could
have texts, queries and the token sent wherever its author likes. So an address counts once the user has given it, by
argument or environment; it is noted in a file of the user's own, and from then on an index may remember it. Without
credentials, a server on this machine needs no naming.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
from pathlib import Path

from epic_rag.errors import IndexStateError
from epic_rag_chroma.manifest import write_atomically
from epic_rag_chroma.server import ADDRESS_VARIABLE, ChromaServer, has_credentials, is_named_by_environment

__all__ = ["known_file", "require_known"]

logger = logging.getLogger(__name__)


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
