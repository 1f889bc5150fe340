"""A server on loopback with the wire shapes of OpenAI, Ollama, text-embeddings-inference and Cohere."""

from __future__ import annotations

import base64
import http.server
import json
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

SHAPES = ("openai:tiny@{}/v1", "ollama:tiny@{}", "tei:{}", "cohere:tiny@{}")


class RemoteService:
    """A service whose answers a test can replace.

    Attributes:
        answers: Status, headers and body of the next answers, before real ones.
        requests: Path and body of each request.
        keys: The authorization of each request.
        shift: Added to every vector: another model behind the same name.
        as_base64: Answer in OpenAI's shape with base64.
    """

    def __init__(self) -> None:
        self.answers: list[tuple[int, dict[str, str], bytes]] = []
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.keys: list[str | None] = []
        self.shift = 0.0
        self.as_base64 = False
        service = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.answer(200, {}, json.dumps({"model_id": "tiny", "max_input_length": 256}).encode())

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                service.requests.append((self.path, body))
                service.keys.append(self.headers.get("authorization"))
                self.answer(*(service.answers.pop(0) if service.answers else service.answer(self.path, body)))

            def answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
                self.send_response(status)
                for name, value in {**headers, "content-length": str(len(body))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                """Print nothing."""

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def vector(self, text: str) -> list[float]:
        """Return the sum of a vector for each word, so that texts with common words are alike."""
        values = np.zeros(16)
        for word in ["", *text.lower().split()]:
            values += np.random.default_rng(zlib.crc32(word.strip(".,?#").encode())).normal(size=16)
        values[3] += 2.0
        return [float(value) for value in values + self.shift * np.arange(16)]

    def texts(self) -> list[str]:
        """Return the texts of all requests."""
        return [text for _, body in self.requests for text in _texts(body)]

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
        """Return the answer of a path."""
        vectors = [self.vector(text) for text in _texts(body)]
        data: Any
        if path == "/embed":
            data = vectors
        elif path == "/api/embed":
            data = {"model": body["model"], "embeddings": vectors}
        elif path == "/v2/embed":
            data = {"embeddings": {"float": vectors}}
        else:
            items: list[Any] = list(vectors)
            if self.as_base64:
                items = [base64.b64encode(np.asarray(vector, "<f4").tobytes()).decode() for vector in vectors]
            data = {"data": [{"index": index, "embedding": item} for index, item in enumerate(items)][::-1]}
        return 200, {}, json.dumps(data).encode()


def _texts(body: dict[str, Any]) -> list[str]:
    found: list[str] = next(body[name] for name in ("input", "inputs", "texts") if name in body)
    return found


@contextmanager
def remote_service() -> Iterator[RemoteService]:
    """Run a service in a thread until the block ends."""
    made = RemoteService()
    thread = threading.Thread(target=made.server.serve_forever)
    thread.start()
    try:
        yield made
    finally:
        made.server.shutdown()
        made.server.server_close()
        thread.join()
