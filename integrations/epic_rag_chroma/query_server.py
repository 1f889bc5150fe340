"""Query server: a process with the model in memory that answers the queries of `epic-rag query`.

`epic-rag serve` writes a file into each index folder that it searches: its address, its model, and a random token that
only the same user can read. A client sends the token, so that no other program's request is answered, and reads the
answer only from the process that wrote the file: the operating system holds a lock for it and releases the lock when
it dies. Whatever goes wrong, the client searches alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, cast

from filelock import FileLock, Timeout

from epic_rag import __version__
from epic_rag.query_prompt import QueryPrompt
from epic_rag_chroma.search.request import SearchRequest
from epic_rag_chroma.store.paths import SERVER_FILE, SERVER_LOCK_FILE
from epic_rag_chroma.types import Hit, SearchFilters, StaleState

__all__ = [
    "LOCAL_QUERY_PATH",
    "ServedModel",
    "ServerAnswer",
    "announce_server",
    "query_running_server",
    "request_fields",
    "search_request_of",
]

LOCAL_QUERY_PATH = "/local/query"
"""Path of the route, which is for this client only and changes with the version."""

# A server answers the first bytes at once; one that does not is stopped or something else.
_CONNECT_SECONDS = 0.5
_FIRST_BYTES_SECONDS = 1.0
_ANSWER_SECONDS = 120.0
# A client holds the lock for a moment, to see that nobody else does.
_LOCK_SECONDS = 0.2


class ServedModel(NamedTuple):
    """The options that choose a model and its arithmetic, as a command got them."""

    model: str | None
    dtype: str
    device: str | None

    def fields(self) -> dict[str, str | None]:
        """Return the options for the file; a folder as its absolute path."""
        return {"model": _absolute(self.model), "dtype": self.dtype, "device": self.device}


class ServerAnswer(NamedTuple):
    """Hits, and the files that have changed since they were indexed, as `ChromaIndexer.stale_files` returns them."""

    hits: list[Hit]
    stale: dict[str, StaleState] | None


@contextmanager
def announce_server(
    folders: Sequence[Path], url: str, fingerprint: str, token: str, model: ServedModel
) -> Iterator[None]:
    """Write the file of this server into index folders, and remove it afterwards.

    A folder that cannot be written to, or that has another server, is left out.

    Args:
        folders: The index folders.
        url: The server's address.
        fingerprint: Fingerprint of its model.
        token: What clients must send.
        model: The options that its model was opened with.
    """
    facts = {
        "version": __version__, "host": socket.gethostname(), "pid": os.getpid(), "url": url,
        "fingerprint": fingerprint, "token": token, **model.fields(),
    }  # fmt: skip
    with ExitStack() as stack:
        for folder in folders:
            lock = FileLock(str(folder / SERVER_LOCK_FILE), timeout=_LOCK_SECONDS)
            try:
                lock.acquire()
            except (Timeout, OSError):
                continue
            stack.callback(lock.release)
            file = folder / SERVER_FILE
            with suppress(OSError):
                file.unlink(missing_ok=True)
                with open(os.open(file, os.O_CREAT | os.O_WRONLY | os.O_EXCL, 0o600), "w", encoding="utf-8") as stream:
                    json.dump(facts, stream)
            stack.callback(_remove, file)
        yield


def _remove(file: Path) -> None:
    with suppress(OSError):
        file.unlink()


def query_running_server(
    index_dir: Path, text: str, request: SearchRequest, model: ServedModel, *, max_files: int
) -> ServerAnswer | None:
    """Have a running server of an index answer a query.

    Args:
        index_dir: The index folder.
        text: The query.
        request: Settings of the search.
        model: The options of the model; the server's must be the same.
        max_files: See `ChromaIndexer.stale_files`.

    Returns:
        The answer, the same as that of a `ChromaIndexer`; None if there is no such server, it does not answer in time,
        or the request or its answer needs more than hits, such as a warning.
    """
    fields = request_fields(request)
    facts = None if fields is None else _running(index_dir.resolve())
    if facts is None or any(facts.get(name, "") != value for name, value in model.fields().items()):
        return None
    body = json.dumps(
        {
            "index_dir": str(index_dir.resolve()),
            "fingerprint": facts["fingerprint"],
            "text": text,
            "request": fields,
            "max_files": max_files,
        }
    )
    try:
        answer = _post(facts["url"], body, facts["token"])
        hits = [Hit(**{name: _tuples(value) for name, value in hit.items()}) for hit in answer["hits"]]
        return ServerAnswer(hits, answer["stale"])
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError, AttributeError):
        return None


def _running(index_dir: Path) -> dict[str, Any] | None:
    """Return the contents of the file of a server that is running; remove the file of one that is not."""
    file = index_dir / SERVER_FILE
    try:
        with open(file, encoding="utf-8") as stream:
            status = os.fstat(stream.fileno())
            if hasattr(os, "geteuid") and (status.st_uid != os.geteuid() or status.st_mode & 0o077):
                return None  # another user could have written it
            facts = json.load(stream)
        if facts["host"] != socket.gethostname() or facts["version"] != __version__:
            return None
        if not {"url", "token", "fingerprint"} <= {name for name, value in facts.items() if isinstance(value, str)}:
            return None
        with FileLock(str(index_dir / SERVER_LOCK_FILE), timeout=0):
            file.unlink(missing_ok=True)  # it has died, and its port may be another program's
        return None
    except Timeout:
        return cast(dict[str, Any], facts)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _post(url: str, body: str, token: str) -> dict[str, Any]:
    """Send a request; the answer is one line of JSON.

    Raises:
        OSError: If the server is not reached or is too slow.
        http.client.HTTPException: If it does not speak HTTP.
        ValueError: If it refuses.
    """
    scheme, _, address = url.partition("://")
    if scheme != "http":
        raise ValueError(url)
    with contextlib.closing(http.client.HTTPConnection(address, timeout=_CONNECT_SECONDS)) as connection:
        connection.connect()
        assert connection.sock is not None
        connection.sock.settimeout(_FIRST_BYTES_SECONDS)
        started = time.monotonic()
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {token}", "Connection": "close"}
        connection.request("POST", LOCAL_QUERY_PATH, body.encode(), headers)
        sock = connection.sock
        response = connection.getresponse()
        if response.status != 200:
            raise ValueError(response.status)
        sock.settimeout(max(0.1, _ANSWER_SECONDS - (time.monotonic() - started)))
        answer = json.loads(response.read())
        if not isinstance(answer, dict):
            raise ValueError("not an object")
        return answer


def request_fields(request: SearchRequest) -> dict[str, Any] | None:
    """Return a request as JSON; None if it has something that JSON has not, such as a bank in memory."""

    def plain(value: Any) -> Any:
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        if isinstance(value, (list, tuple)):
            return [plain(each) for each in value]
        if value is not None and not isinstance(value, (str, int, float, bool)):
            raise TypeError
        return value

    filters = request.filters
    try:
        prompt = {each.name: plain(getattr(request.prompt, each.name)) for each in dataclasses.fields(QueryPrompt)}
        # A built-in bank's name takes precedence over a folder; the server knows them.
        given = prompt["bank"]
        if given is not None:
            names = [given] if isinstance(given, str) else given
            prompt["bank"] = [[name, os.path.abspath(os.path.expanduser(name))] for name in names]
        fields = {
            each.name: plain(getattr(request, each.name))
            for each in dataclasses.fields(SearchRequest)
            if each.name not in ("prompt", "filters")
        }
        fields["reranker"] = _absolute(fields["reranker"])
        fields["prompt"] = prompt
        fields["filters"] = None
        if filters is not None:
            chosen = {each.name: getattr(filters, each.name) for each in dataclasses.fields(SearchFilters)}
            since = chosen.pop("since")
            fields["filters"] = {name: plain(value) for name, value in chosen.items()}
            fields["filters"]["since"] = None if since is None else since.isoformat()
        return fields
    except TypeError:
        return None


def search_request_of(fields: Mapping[str, Any]) -> SearchRequest:
    """Return the request that `request_fields` describes.

    Raises:
        EpicError: If a setting is invalid.
        TypeError: If it is not such a description.
        ValueError: If it is not such a description.
        KeyError: If it is not such a description.
    """
    from epic_rag.demonstrations import built_in_banks

    rest = {name: _tuples(value) for name, value in fields.items() if name not in ("prompt", "filters")}
    prompt = {name: _tuples(value) for name, value in fields["prompt"].items()}
    if prompt["bank"] is not None:
        known = built_in_banks()
        banks = tuple(name if name in known else folder for name, folder in prompt["bank"])
        prompt["bank"] = banks[0] if len(banks) == 1 else banks
    filters = None
    if fields["filters"] is not None:
        chosen = {name: _tuples(value) for name, value in fields["filters"].items()}
        since = chosen.pop("since")
        filters = SearchFilters(since=None if since is None else datetime.fromisoformat(since), **chosen)
    return SearchRequest(prompt=QueryPrompt(**prompt), filters=filters, **rest)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(each) for each in value) if isinstance(value, list) else value


def _absolute(name: str | None) -> str | None:
    """Return a name, or the absolute path of the folder that it is."""
    return os.path.abspath(name) if name is not None and os.path.isdir(name) else name
