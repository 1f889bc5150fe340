"""A Chroma server on loopback that a test can kill and restart, and a proxy with programmed answers in front of it."""

from __future__ import annotations

import http.client
import http.server
import json
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

import chromadb
from chromadb.api import ClientAPI

HOST = "127.0.0.1"
_START_SECONDS = 240.0
_LARGEST_FILE = 2**30


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


class ChromaProcess:
    """`chroma run` on a folder; every start uses the same port."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    def start(self) -> ChromaProcess:
        """Start the server and wait for its first answer."""
        # The wheel's own entry point, without the second that importing chromadb takes. A file size limit, because
        # after a kill Chroma may let a file of its graph grow until the disk is full (chroma-core/chroma#7510).
        limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({_LARGEST_FILE}, {_LARGEST_FILE}))"
        code = f"{limit}; import sys, chromadb_rust_bindings; chromadb_rust_bindings.cli(['chroma', *sys.argv[1:]])"
        arguments = ["run", "--path", str(self.folder), "--host", HOST, "--port", str(self.port)]
        self._process = subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        end = time.monotonic() + _START_SECONDS
        while time.monotonic() < end:
            if self._process.poll() is not None:
                raise RuntimeError(f"chroma run ended with status {self._process.returncode}")
            try:
                with urllib.request.urlopen(f"{self.url}/api/v2/heartbeat", timeout=5):
                    return self
            except (urllib.error.URLError, OSError):
                time.sleep(0.02)
        self.kill()
        raise RuntimeError(f"chroma run did not answer within {_START_SECONDS:.0f} s")

    def kill(self) -> None:
        """Kill the server with SIGKILL, as a power cut would."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            self._process = None

    def __enter__(self) -> ChromaProcess:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()


Answer = tuple[int, dict[str, str], bytes]


class Front:
    """A proxy in front of a Chroma server (or of nothing) that can answer requests itself.

    Args:
        answer: Gets method, path, headers (names in lower case) and body of each request, and returns an answer
            (status, headers, body), or None to forward the request.
        behind: The address of the server that requests are forwarded to.
    """

    def __init__(
        self, answer: Callable[[str, str, dict[str, str], bytes], Answer | None], behind: str | None = None
    ) -> None:
        self.requests: list[tuple[str, str]] = []
        front = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                headers = {name.lower(): value for name, value in self.headers.items()}
                front.requests.append((self.command, self.path))
                given = answer(self.command, self.path, headers, body)
                status, extra, content = given if given is not None else front._forward(self.command, self.path, body)
                self.send_response(status)
                for name, value in {"Content-Type": "application/json", **extra}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = do_PUT = do_DELETE = handle_any  # noqa: N815

            def log_message(self, format: str, *arguments: object) -> None:
                pass

        self._behind = behind
        self.server = http.server.ThreadingHTTPServer((HOST, 0), Handler)
        self.server.daemon_threads = True
        self._thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.server.server_address[1]}"

    def _forward(self, method: str, path: str, body: bytes) -> Answer:
        assert self._behind is not None
        target = urlsplit(self._behind)
        connection = http.client.HTTPConnection(str(target.hostname), target.port, timeout=60)
        try:
            # Without credentials: the server behind checks none.
            connection.request(method, path, body or None, {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, {}, response.read()
        finally:
            connection.close()

    def send(self, method: str, path: str, content: object) -> Answer:
        """Send a request to the server behind."""
        status, headers, body = self._forward(method, path, json.dumps(content).encode())
        assert status < 300, body
        return status, headers, body

    def __enter__(self) -> Front:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.server.shutdown()
        self.server.server_close()
        self._thread.join()


@contextmanager
def plain_client(url: str, **where: str) -> Iterator[ClientAPI]:
    """Open chromadb's own client, and close its connections too, which its `close` leaves open."""
    client = chromadb.HttpClient(url, **where)
    try:
        yield client
    finally:
        close_plain(client)


def close_plain(client: Any) -> None:
    """Close chromadb's own client and its connections."""
    sessions = [client._server._session, client._admin_client._server._session]
    client.close()
    for session in sessions:
        session.close()
