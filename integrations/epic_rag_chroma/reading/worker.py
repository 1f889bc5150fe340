"""Parse untrusted files in a worker process with limits on time and memory.

Parsers of containers (PDF, Office formats, HTML, ...) can be made to run for hours, to fill the memory or to crash by
one hostile or damaged file, and Python cannot interrupt a call into such a parser. `IsolatedReader` therefore has a
worker process parse them: started with the first such file, reused for the next ones, killed and replaced when it
crashes or exceeds a limit. The worker imports neither torch nor Chroma. It gets bytes and returns JSON, so a
compromised parser cannot make the indexer execute anything.

It is a plain subprocess and not `multiprocessing`, whose spawn would import the user's main module (and with it torch)
in the worker, and whose connections unpickle by default.

No worker outlives its indexer. Ctrl-C reaches only the indexer, which kills the worker at once. A worker whose indexer
has exited ends by itself, at the latest when the time limit of the file ends.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any

from epic_rag.errors import ConfigError, MissingExtraError
from epic_rag_chroma.reading.code import warn_of_missing_parser
from epic_rag_chroma.reading.document import (
    BrokenFileError,
    Document,
    Heading,
    NotTextError,
    RepeatedHeader,
    Scope,
    SplitCost,
)
from epic_rag_chroma.reading.file_types import kind_of
from epic_rag_chroma.reading.reader import read_document

__all__ = ["IsolatedReader", "document_from_json", "document_to_json", "serve"]

logger = logging.getLogger(__name__)

# CPU time for a file; a manual of a thousand pages takes about twenty seconds on a slow machine. CPU time and not wall
# time is limited, so that a busy machine skips the same files as an idle one.
SECONDS = 60.0
SECONDS_PER_MIB = 1.0
# Wall time as a multiple of the CPU time limit; the only limit where CPU time cannot be limited.
WALL_CLOCK_FACTOR = 4.0
# Address space, interpreter and libraries included (about 200 MiB); the tree of 128 MiB of XML fits.
MEMORY_MIB = 2048
# A worker is replaced after its memory peaked above this share of the limit, since memory is rarely returned.
_REPLACE_ABOVE = 0.5
_MAX_MESSAGE = 512 * 2**20
_PARENT_POLL_SECONDS = 0.5
_START_SECONDS = 60.0
_SECONDS_VARIABLE = "EPIC_RAG_FILE_SECONDS"
_MEMORY_VARIABLE = "EPIC_RAG_FILE_MEMORY_MIB"
# Exit statuses of a worker that was ended by its timers.
_OUT_OF_TIME = tuple(-getattr(signal, name) for name in ("SIGPROF", "SIGALRM") if hasattr(signal, name))
_ERRORS: dict[str, type[Exception]] = {
    "not text": NotTextError,
    "broken": BrokenFileError,
    "missing": MissingExtraError,
}
_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from epic_rag_chroma.reading.worker import serve; serve()"
)


class IsolatedReader:
    """Context manager that reads files as `read_document` does, in a worker process.

    Args:
        seconds: CPU time limit for a file, plus one second for each MiB of it (four times as much by the wall clock);
            None for the environment variable EPIC_RAG_FILE_SECONDS, or 60.
        memory_mib: Memory limit of the worker, where the operating system supports it (Linux); None for
            EPIC_RAG_FILE_MEMORY_MIB, or 2048.

    Raises:
        ConfigError: If a limit is not a positive number.
    """

    def __init__(self, *, seconds: float | None = None, memory_mib: int | None = None) -> None:
        self._seconds = _limit_from(_SECONDS_VARIABLE, SECONDS) if seconds is None else seconds
        self._memory_mib = int(_limit_from(_MEMORY_VARIABLE, MEMORY_MIB)) if memory_mib is None else memory_mib
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def read(self, name: str, data: bytes, *, named: bool = False) -> Document:
        """Read a file.

        Args:
            name: The file's name; its suffix selects the reader.
            data: The file's bytes.
            named: Whether the user asked for this file; see `read_document`.

        Raises:
            NotTextError: If there is nothing to index in it.
            BrokenFileError: If it is damaged or encrypted, exceeds a limit, or crashes its parser.
            MissingExtraError: If the package that reads this kind is not installed.
        """
        kind = kind_of(name)
        if kind == "text":  # needs no parser
            return read_document(name, data, named=named)
        if kind == "code":
            warn_of_missing_parser()  # the worker has no log
        with self._lock:
            reply = self._request(name, data, named)
        if reply.get("error") == "memory":
            raise BrokenFileError(f"needs more than {self._memory_mib} MiB of memory to read")
        if reply.get("error") in _ERRORS:
            raise _ERRORS[reply["error"]](*(str(part) for part in reply.get("message", [])))
        return document_from_json(reply)

    @property
    def has_worker(self) -> bool:
        """True while there is a worker process."""
        return self._process is not None

    def close(self) -> None:
        """Kill the worker, if there is one."""
        with self._lock:
            self._kill()

    def __enter__(self) -> IsolatedReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _request(self, name: str, data: bytes, named: bool) -> dict[str, Any]:
        """Send a file to the worker and return its reply."""
        process = self._process
        if process is None or process.poll() is not None:
            self._kill()
            process = self._start()
        assert process.stdin is not None  # Popen was given PIPE
        assert process.stdout is not None
        seconds = self._seconds + SECONDS_PER_MIB * len(data) / 2**20
        reply: dict[str, Any] | None = None
        status: int | None = None
        try:
            with _deadline(process, seconds * WALL_CLOCK_FACTOR) as expired:
                with suppress(OSError):  # the worker has exited, which _receive reports
                    head = {"name": name, "seconds": seconds, "named": named}
                    _send(process.stdin, json.dumps(head).encode())
                    _send(process.stdin, data)
                message = _receive(process.stdout)
                with suppress(ValueError):
                    parsed = json.loads(message or b"")
                    reply = parsed if isinstance(parsed, dict) else None
            if reply is None and not expired.is_set():
                with suppress(subprocess.TimeoutExpired):  # it has closed its pipe: wait for its exit status
                    process.wait(1)
        finally:
            # Also on KeyboardInterrupt: no parser keeps running in the background.
            if reply is None or expired.is_set() or reply.get("replace"):
                status = self._kill()
        if reply is not None:
            return reply
        if expired.is_set() or status in _OUT_OF_TIME:
            raise BrokenFileError(f"takes longer than {seconds:.3g} s to read")
        logger.warning("the process that read %s ended with %s", name, _status(status))
        raise BrokenFileError(f"crashes its parser ({_status(status)})")

    def _start(self) -> subprocess.Popen[bytes]:
        arguments = [json.dumps(sys.path), str(self._memory_mib), str(os.getpid())]
        try:
            self._process = process = subprocess.Popen(
                # -I: otherwise Python would import a json.py from the working directory, which may be indexed.
                [sys.executable, "-I", "-c", _START, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,  # warnings of parsers
            )
        except (OSError, ValueError) as error:
            raise BrokenFileError(f"the process that would read it cannot be started: {error}") from error
        assert process.stdout is not None
        with _deadline(process, _START_SECONDS):
            ready = _receive(process.stdout)
        if ready is None:
            raise BrokenFileError(f"the process that would read it does not start ({_status(self._kill())})")
        return process

    def _kill(self) -> int | None:
        """Kill the worker and return its exit status; None if there is none."""
        process, self._process = self._process, None
        if process is None:
            return None
        process.kill()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with suppress(OSError):  # unsent data
                    pipe.close()
        return process.wait()


@contextmanager
def _deadline(process: subprocess.Popen[bytes], seconds: float) -> Iterator[threading.Event]:
    """Kill a process if the block takes longer, which ends a read from it; the event is set if it did."""
    expired = threading.Event()

    def expire() -> None:
        expired.set()
        process.kill()

    timer = threading.Timer(seconds, expire)
    timer.daemon = True
    timer.start()
    try:
        yield expired
    finally:
        timer.cancel()


def _limit_from(variable: str, default: float) -> float:
    """Read a limit from an environment variable."""
    value = os.environ.get(variable, "").strip()
    if not value:
        return default
    try:
        limit = float(value)
    except ValueError:
        limit = 0.0
    if not 0 < limit < 1e9:
        raise ConfigError(f"{variable} is {value!r}. It must be a positive number.")
    return limit


def _status(status: int | None) -> str:
    """Describe an exit status."""
    if status is not None and status < 0:
        with suppress(ValueError):
            return signal.Signals(-status).name
    return f"exit status {status}"


def _send(pipe: IO[bytes], message: bytes) -> None:
    pipe.write(len(message).to_bytes(8, "big"))
    pipe.write(message)
    pipe.flush()


def _receive(pipe: IO[bytes]) -> bytes | None:
    """Read a message; None if the pipe was closed."""
    head = pipe.read(8)
    if len(head) < 8:
        return None
    size = int.from_bytes(head, "big")
    if size > _MAX_MESSAGE:
        return None
    message = pipe.read(size)
    return message if len(message) == size else None


def document_to_json(document: Document) -> dict[str, Any]:
    """Convert a document to JSON values."""
    return {
        "lines": document.lines,
        "split_costs": [int(cost) for cost in document.split_costs],
        "headings": [[heading.line, heading.level, heading.title, heading.height] for heading in document.headings],
        "spans": document.spans,
        "pages": document.pages,
        "scopes": [[scope.first, scope.end, scope.title, scope.body] for scope in document.scopes],
        "keep_together": document.keep_together,
        "repeated_headers": [[header.first, header.end, header.text] for header in document.repeated_headers],
        "display_only": sorted(document.display_only),
        "substitutions": [[line, some] for line, some in document.substitutions.items()],
        "metadata": document.metadata,
    }


def document_from_json(content: dict[str, Any]) -> Document:
    """Convert the values of `document_to_json` to a document."""
    spans = content["spans"]
    return Document(
        content["lines"],
        [SplitCost(cost) for cost in content["split_costs"]],
        [Heading(*heading) for heading in content["headings"]],
        spans=None if spans is None else [(first, last) for first, last in spans],
        pages=content["pages"],
        scopes=[Scope(*scope) for scope in content["scopes"]],
        keep_together=[(first, end) for first, end in content["keep_together"]],
        repeated_headers=[RepeatedHeader(*header) for header in content["repeated_headers"]],
        display_only=frozenset(content["display_only"]),
        substitutions={
            line: tuple((first, end, text) for first, end, text in some) for line, some in content["substitutions"]
        },
        metadata=content["metadata"],
    )


# The worker's side.


def serve() -> None:
    """Run the worker: read files from stdin and write their documents to stdout until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Ctrl-C, the indexer kills the worker
    memory, parent = int(sys.argv[2]) * 2**20, int(sys.argv[3])
    _limit_memory(memory)
    if os.name == "posix":  # elsewhere the parent's exit cannot be noticed
        threading.Thread(target=_exit_after, args=(parent,), daemon=True).start()
    files = sys.stdin.buffer
    # A parser that prints must not write into the replies.
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    _send(replies, b"ready")
    while (head := _receive(files)) is not None and (data := _receive(files)) is not None:
        request = json.loads(head)
        _limit_time(float(request["seconds"]))
        try:
            reply = _reply_to(str(request["name"]), data, named=bool(request["named"]))
            reply["replace"] = _peak_memory() > memory * _REPLACE_ABOVE
            message = json.dumps(reply).encode()
        except MemoryError:
            message = b'{"error": "memory", "replace": true}'
        try:
            _send(replies, message)
        except OSError:
            return
        _limit_time(0)


def _reply_to(name: str, data: bytes, *, named: bool) -> dict[str, Any]:
    """Read a file and return its document, or the error, as JSON values."""
    try:
        return document_to_json(read_document(name, data, named=named))
    except NotTextError as error:
        return {"error": "not text", "message": [str(error)]}
    except BrokenFileError as error:
        return {"error": "broken", "message": [str(error)]}
    except MissingExtraError as error:
        return {"error": "missing", "message": [error.package, error.extra, error.purpose]}
    except MemoryError:
        raise
    except Exception as error:  # a parser's bug with one file must not stop the run
        reason = " ".join(str(error).split())[:200]
        return {"error": "broken", "message": [f"cannot be parsed: {type(error).__name__}: {reason}"]}


def _exit_after(parent: int) -> None:
    """Exit soon after the parent process, also if that was killed while a file is parsed."""
    while os.getppid() == parent:
        time.sleep(_PARENT_POLL_SECONDS)
    os._exit(1)


def _limit_memory(memory: int) -> None:
    """Limit the address space and disable core files, where the operating system has such limits."""
    try:
        import resource
    except ImportError:  # Windows
        return
    for kind, limit in ((resource.RLIMIT_AS, memory), (resource.RLIMIT_CORE, 0)):
        with suppress(ValueError, OSError):  # macOS refuses some; an administrator may have set lower ones
            resource.setrlimit(kind, (limit, resource.getrlimit(kind)[1]))


def _limit_time(seconds: float) -> None:
    """Limit the CPU time of this process; the operating system kills it, also inside a parser. 0 for no limit.

    A wall clock alarm covers a parser that waits, in case the indexer, which would kill it, has exited.
    """
    if os.name == "posix":
        signal.setitimer(signal.ITIMER_PROF, seconds)
        signal.setitimer(signal.ITIMER_REAL, seconds * WALL_CLOCK_FACTOR)


def _peak_memory() -> int:
    """Return the peak memory of this process in bytes."""
    # On Linux, ru_maxrss of a new process begins with that of its parent, which may hold a model; VmHWM does not.
    with suppress(OSError, ValueError, IndexError), open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))
    try:
        import resource
    except ImportError:  # Windows
        return 0
    # In KiB on Linux, in bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
