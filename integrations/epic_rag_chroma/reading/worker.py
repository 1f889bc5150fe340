"""Files that others made are parsed in another process, which has a limit on time and memory and can be killed.

Parsers of containers (PDF, Office formats, HTML, ...) can be made to run for hours, to fill the memory or to crash by
one hostile or damaged file, and Python cannot stop a call into such a parser. So a worker process does it: started when
the first such file comes, used again for the next ones, killed and replaced when it crashes or takes too long. It
imports neither torch nor Chroma. Bytes go in and JSON comes out: nothing that a subverted parser could make the indexer
execute.

No worker outlives its indexer: Ctrl-C reaches the indexer alone, which kills the worker at once; a worker whose indexer
is gone ends by itself, and if its parser lets nothing else run, when the file's time is up.
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
from types import TracebackType
from typing import IO, Any

from epic_rag.errors import ConfigError, MissingExtraError
from epic_rag_chroma.reading.code import note_missing_parser
from epic_rag_chroma.reading.document import Break, BrokenFileError, Document, Heading, NotTextError, Repeat, Scope
from epic_rag_chroma.reading.reader import kind_of, read_document

__all__ = ["MEMORY_MIB", "SECONDS", "SECONDS_PER_MIB", "WAITING", "IsolatedReader", "serve"]


logger = logging.getLogger(__name__)

# A manual of a thousand pages takes about twenty seconds on a slow machine; nobody waits minutes for one file unless it
# is large. What is counted is computing, so that a busy machine does not skip other files than an idle one.
SECONDS = 60.0
SECONDS_PER_MIB = 1.0
# The time that may pass by the clock, in times of the limit, and the limit itself where computing cannot be limited.
WAITING = 4.0
# Address space, interpreter and libraries included (about 200 MiB); the tree of 128 MiB of XML fits.
MEMORY_MIB = 2048
# A worker that once needed half of what it may have is replaced, since memory is seldom given back.
_WORN_SHARE = 0.5
_MAX_REPLY = 512 * 2**20
_WATCH_SECONDS = 0.5
_START_SECONDS = 60.0
# Plain lines of text need no parser.
_READ_HERE = frozenset({"text"})
_SECONDS_VARIABLE = "EPIC_RAG_FILE_SECONDS"
_MEMORY_VARIABLE = "EPIC_RAG_FILE_MEMORY_MIB"
# How a worker ends that has used up its time.
_OUT_OF_TIME = tuple(-getattr(signal, name) for name in ("SIGPROF", "SIGALRM") if hasattr(signal, name))
_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from epic_rag_chroma.reading.worker import serve; serve()"
)


class IsolatedReader:
    """Reads files as `readers.read_document` does, in a worker process; a context manager.

    Args:
        seconds: The most computing time for a file, and as many seconds more as it has MiB (four times as much by the
            clock); the environment variable EPIC_RAG_FILE_SECONDS if None, else 60.
        memory_mib: The most memory of the worker, where the operating system can limit it (Linux);
            EPIC_RAG_FILE_MEMORY_MIB if None, else 2048.

    Raises:
        ConfigError: If a limit is not a positive number.
    """

    def __init__(self, *, seconds: float | None = None, memory_mib: int | None = None) -> None:
        self._seconds = _limit(_SECONDS_VARIABLE, SECONDS) if seconds is None else seconds
        self._memory_mib = int(_limit(_MEMORY_VARIABLE, MEMORY_MIB)) if memory_mib is None else memory_mib
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def read(self, name: str, data: bytes) -> Document:
        """Read a file.

        Args:
            name: The file's name; its ending decides how it is read.
            data: The file's bytes.

        Raises:
            NotTextError: If there is nothing to index in it.
            BrokenFileError: If it is damaged or locked, or its parser takes too long, too much memory, or crashes.
            MissingExtraError: If the package that reads this kind is not installed.
        """
        if kind_of(name) in _READ_HERE:
            return read_document(name, data)
        if kind_of(name) == "code":
            note_missing_parser()  # the worker has no log
        with self._lock:
            return _answer(self._ask(name, data), self._memory_mib)

    def close(self) -> None:
        """End the worker, if there is one."""
        with self._lock:
            self._kill()

    def __enter__(self) -> IsolatedReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _ask(self, name: str, data: bytes) -> dict[str, Any]:
        process, files, replies = self._started()
        seconds = self._seconds + SECONDS_PER_MIB * len(data) / 2**20
        reply: dict[str, Any] | None = None
        status: int | None = None
        try:
            with _deadline(process, seconds * WAITING) as late:
                with suppress(OSError):  # it has ended: the reply says how
                    _send(files, json.dumps({"name": name, "seconds": seconds}).encode())
                    _send(files, data)
                reply = _reply(_receive(replies))
            if reply is None and not late.is_set():
                with suppress(subprocess.TimeoutExpired):  # it has closed its pipe: let it end with its own status
                    process.wait(1)
        finally:
            # A KeyboardInterrupt comes this way as well: nothing goes on parsing behind the user's back.
            if reply is None or late.is_set() or reply.get("worn"):
                status = self._kill()
        if reply is None and (late.is_set() or status in _OUT_OF_TIME):
            raise BrokenFileError(f"takes longer than {seconds:.3g} s to read")
        if reply is None:
            logger.warning("the process that read %s ended with %s", name, _status(status))
            raise BrokenFileError(f"crashes its parser ({_status(status)})")
        return reply

    def _started(self) -> tuple[subprocess.Popen[bytes], IO[bytes], IO[bytes]]:
        """The worker, and the pipes to it and from it."""
        process = self._process
        if process is None or process.poll() is not None:
            self._kill()
            process = self._start()
        assert process.stdin is not None  # Popen was asked for pipes
        assert process.stdout is not None
        return process, process.stdin, process.stdout

    def _start(self) -> subprocess.Popen[bytes]:
        arguments = [json.dumps(sys.path), str(self._memory_mib), str(os.getpid())]
        try:
            process = subprocess.Popen(
                # Isolated: without it, Python would import a json.py from the working directory, which may be indexed.
                [sys.executable, "-I", "-c", _START, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                # A parser's warnings about each oddity; what matters comes back as the reason.
                stderr=subprocess.DEVNULL,
            )
        except (OSError, ValueError) as error:
            raise BrokenFileError(f"the process that would read it cannot be started: {error}") from error
        self._process = process
        assert process.stdout is not None
        with _deadline(process, _START_SECONDS):
            ready = _receive(process.stdout)
        if ready is None:
            raise BrokenFileError(f"the process that would read it does not start ({_status(self._kill())})")
        return process

    def _kill(self) -> int | None:
        """End the worker at once; its status, None if there is none."""
        process, self._process = self._process, None
        if process is None:
            return None
        process.kill()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with suppress(OSError):  # what was not sent yet is of no use to anyone
                    pipe.close()
        return process.wait()


@contextmanager
def _deadline(process: subprocess.Popen[bytes], seconds: float) -> Iterator[threading.Event]:
    """Kill a process if the block takes longer, which ends a read from it; the event says whether that was so."""
    late = threading.Event()

    def expire() -> None:
        late.set()
        process.kill()

    timer = threading.Timer(seconds, expire)
    timer.daemon = True
    timer.start()
    try:
        yield late
    finally:
        timer.cancel()


def serve() -> None:
    """What the worker runs: read a file, write its document, until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the indexer decides what Ctrl-C ends
    memory = int(sys.argv[2]) * 2**20
    _limit_resources(memory)
    if os.name == "posix":  # elsewhere a process does not learn that its parent is gone
        threading.Thread(target=_end_with, args=(int(sys.argv[3]),), daemon=True).start()
    files = sys.stdin.buffer
    # A parser that prints must not write among the replies.
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    _send(replies, b"ready")
    while (head := _receive(files)) is not None and (data := _receive(files)) is not None:
        asked = json.loads(head)
        _limit_time(float(asked["seconds"]))
        try:
            reply = _worked(str(asked["name"]), data)
            reply["worn"] = _peak_memory() > memory * _WORN_SHARE
            message = json.dumps(reply).encode()
        except MemoryError:
            message = b'{"error": "memory", "worn": true}'
        try:
            _send(replies, message)
        except OSError:
            return
        _limit_time(0)


def _end_with(indexer: int) -> None:
    """End this process soon after the indexer's, were it killed while a file is parsed."""
    while os.getppid() == indexer:
        time.sleep(_WATCH_SECONDS)
    os._exit(1)


def _worked(name: str, data: bytes) -> dict[str, Any]:
    """The reply to a file."""
    try:
        return _as_json(read_document(name, data))
    except NotTextError as error:
        return {"error": "not text", "said": [str(error)]}
    except BrokenFileError as error:
        return {"error": "broken", "said": [str(error)]}
    except MissingExtraError as error:
        return {"error": "missing", "said": [error.package, error.extra, error.purpose]}
    except MemoryError:
        raise
    except Exception as error:  # a parser's fault with one file must not cost the others
        said = " ".join(str(error).split())[:200]
        return {"error": "broken", "said": [f"cannot be parsed: {type(error).__name__}: {said}"]}


def _as_json(document: Document) -> dict[str, Any]:
    return {
        "lines": document.lines,
        "breaks": [int(cost) for cost in document.breaks],
        "headings": [[heading.line, heading.level, heading.title, heading.height] for heading in document.headings],
        "spans": document.spans,
        "pages": document.pages,
        "scopes": [[scope.first, scope.end, scope.title, scope.body] for scope in document.scopes],
        "wholes": document.wholes,
        "repeats": [[repeat.first, repeat.end, repeat.text] for repeat in document.repeats],
        "unread": sorted(document.unread),
    }


def _answer(reply: dict[str, Any], memory_mib: int) -> Document:
    """What a reply says.

    Raises:
        NotTextError, BrokenFileError, MissingExtraError: As the worker did.
    """
    said = [str(part) for part in reply.get("said", [])]
    match reply.get("error"):
        case "not text":
            raise NotTextError(*said)
        case "broken":
            raise BrokenFileError(*said)
        case "missing":
            raise MissingExtraError(*said)
        case "memory":
            raise BrokenFileError(f"needs more than {memory_mib} MiB of memory to read")
    spans = reply["spans"]
    return Document(
        reply["lines"],
        [Break(cost) for cost in reply["breaks"]],
        [Heading(*heading) for heading in reply["headings"]],
        spans=None if spans is None else [(first, last) for first, last in spans],
        pages=reply["pages"],
        scopes=[Scope(*scope) for scope in reply["scopes"]],
        wholes=[(first, end) for first, end in reply["wholes"]],
        repeats=[Repeat(*repeat) for repeat in reply["repeats"]],
        unread=frozenset(reply["unread"]),
    )


def _send(pipe: IO[bytes], message: bytes) -> None:
    pipe.write(len(message).to_bytes(8, "big"))
    pipe.write(message)
    pipe.flush()


def _receive(pipe: IO[bytes]) -> bytes | None:
    """A message; None if the pipe closed."""
    head = pipe.read(8)
    if len(head) < 8:
        return None
    size = int.from_bytes(head, "big")
    if size > _MAX_REPLY:
        return None
    message = pipe.read(size)
    return message if len(message) == size else None


def _reply(message: bytes | None) -> dict[str, Any] | None:
    if message is None:
        return None
    try:
        reply = json.loads(message)
    except ValueError:
        return None
    return reply if isinstance(reply, dict) else None


def _status(status: int | None) -> str:
    """How a process ended."""
    if status is not None and status < 0:
        with suppress(ValueError):
            return signal.Signals(-status).name
    return f"exit status {status}"


def _limit(variable: str, default: float) -> float:
    value = os.environ.get(variable, "").strip()
    if not value:
        return default
    try:
        limit = float(value)
    except ValueError:
        limit = 0.0
    if not 0 < limit < 1e9:
        raise ConfigError(f"{variable} is {value!r}; it must be a positive number")
    return limit


def _limit_resources(memory: int) -> None:
    """Limit the address space and write no core files, where the operating system has such limits."""
    try:
        import resource
    except ImportError:  # Windows
        return
    for what, limit in ((resource.RLIMIT_AS, memory), (resource.RLIMIT_CORE, 0)):
        with suppress(ValueError, OSError):  # macOS refuses some, an administrator may have set lower ones
            resource.setrlimit(what, (limit, resource.getrlimit(what)[1]))


def _peak_memory() -> int:
    """The most bytes of memory that this process had."""
    # On Linux the resource usage of a new process begins with what its parent had when it was started, which may be a
    # whole model; the high-water mark of its own memory does not.
    with suppress(OSError, ValueError, IndexError), open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))
    try:
        import resource
    except ImportError:  # Windows
        return 0
    # The unit is KiB on Linux and bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _limit_time(seconds: float) -> None:
    """Have the operating system end this process after that much computing, also in the middle of a parser; 0: never.

    An alarm does it for a parser that waits instead, should the indexer be gone that would end it.
    """
    if os.name == "posix":
        signal.setitimer(signal.ITIMER_PROF, seconds)
        signal.setitimer(signal.ITIMER_REAL, seconds * WAITING)
