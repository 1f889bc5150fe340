"""`epic-rag ask` against a stub of an OpenAI-compatible endpoint on loopback."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from epic_rag_chroma import Hit
from epic_rag_cli.commands.ask import build_prompt, estimate_tokens
from epic_rag_cli.llm import CitationChecker
from epic_rag_cli.terminal import encodable


@dataclass
class Stub:
    """An endpoint: what it sends, and what it got."""

    url: str = ""
    status: int = 200
    parts: list[str] = field(default_factory=lambda: ["Reset softly ", "[1", "]", ".\n"])
    models: list[str] = field(default_factory=lambda: ["stub"])
    stream: bool = True
    body: bytes | None = None  # instead of an answer
    breaks_off: bool = False
    done: bool = True
    requests: list[tuple[str, dict[str, str], Any]] = field(default_factory=list)


@pytest.fixture
def stub() -> Iterator[Stub]:
    answer = Stub()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            answer.requests.append((self.path, dict(self.headers), None))
            self._send(200, json.dumps({"object": "list", "data": [{"id": name} for name in answer.models]}).encode())

        def do_POST(self) -> None:
            sent = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            answer.requests.append((self.path, dict(self.headers), sent))
            if answer.body is not None:
                self._send(answer.status, answer.body)
            elif not answer.stream:
                message = {"role": "assistant", "content": "".join(answer.parts)}
                self._send(200, json.dumps({"choices": [{"index": 0, "message": message}]}).encode())
            else:
                self._stream()

        def _send(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def _stream(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream; charset=utf-8")
            if answer.breaks_off:
                self.send_header("Content-Length", "100000")
            self.end_headers()
            self.wfile.write(b": a comment\n\n")
            deltas: list[Any] = [
                {"role": "assistant"},
                *({"content": part} for part in answer.parts),
                {"content": None},
            ]
            for delta in deltas:
                event = {"object": "chat.completion.chunk", "choices": [{"index": 0, "delta": delta}]}
                self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
                self.wfile.flush()
            self.wfile.write(b'data: {"choices": [], "usage": {"total_tokens": 3}}\n\n')
            if answer.done:
                self.wfile.write(b"data: [DONE]\n\n")
            self.close_connection = True

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        answer.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield answer
        server.shutdown()
        thread.join()


@pytest.fixture
def ask(cli: Any, indexed: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    for name in ("EPIC_RAG_LLM", "EPIC_RAG_LLM_MODEL", "EPIC_RAG_LLM_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)

    def call(*options: object) -> Any:
        # The tiny model is random, so every similarity will do.
        return cli("ask", "how do I", "undo it?", "--index-dir", indexed, "--min-cosine", "-1", *options)

    return call


def test_an_answer_with_its_sources(ask: Any, stub: Stub) -> None:
    done = ask("--llm", stub.url, "--path", "undo.md")
    assert (done.status, done.err) == (0, "")
    assert done.out == "Reset softly [1].\n\n[1] docs/undo.md:1-3\n"
    assert [path for path, _, _ in stub.requests] == ["/v1/models", "/v1/chat/completions"]
    _, headers, sent = stub.requests[1]
    assert "Authorization" not in headers
    assert (sent["model"], sent["stream"]) == ("stub", True)
    system, user = sent["messages"]
    assert (system["role"], user["role"]) == ("system", "user")
    assert "[1] docs/undo.md:1-3 Undo\n# Undo\n\nTo undo the last commit" in user["content"]
    assert user["content"].endswith("\nQuestion: how do I undo it?")
    assert ask("--llm", f"{stub.url}/v1/", "--llm-model", "named", "--path", "undo.md").out == done.out
    assert [stub.requests[-1][0], stub.requests[-1][2]["model"]] == ["/v1/chat/completions", "named"]
    stub.stream = False
    assert ask("--llm", f"{stub.url}/v1/chat/completions", "--path", "undo.md").out == done.out
    stub.stream, stub.done = True, False
    assert ask("--llm", stub.url, "--path", "undo.md").out == done.out


def test_json(ask: Any, stub: Stub) -> None:
    stub.parts = ["No [2] and [", "7] or [1,9]."]
    done = ask("--llm", stub.url, "--json", "-k", "2")
    answer = json.loads(done.out)
    assert answer["answer"] == "No [2] and [no source 7] or [1][no source 9]."
    assert (answer["cited"], answer["invented"], answer["llm_model"]) == ([2, 1], [7, 9], "stub")
    assert [source["number"] for source in answer["sources"]] == [1, 2]
    source = answer["sources"][0]
    assert source["location"].startswith(f"docs/{source['path']}:{source['first_line']}")
    assert "cites 7, 9, but there are 2 sources" in done.err
    printed = json.loads(ask("--json", "-k", "2").out)
    assert (printed["answer"], printed["llm"], printed["sources"]) == (None, None, answer["sources"])
    assert printed["prompt"] == answer["prompt"] == stub.requests[-1][2]["messages"]


def test_the_prompt_is_printed_without_an_endpoint(ask: Any) -> None:
    done = ask("--mode", "keyword")
    assert (done.status, done.err) == (0, "")
    assert done.out.startswith("Answer the question from the numbered sources")
    assert "\n[1] docs/undo.md:1-3 Undo\n# Undo\n" in done.out
    assert done.out.endswith("\nQuestion: how do I undo it?\n")


def test_nothing_is_asked_without_a_source(cli: Any, ask: Any, stub: Stub, docs: Path, tiny_checkpoint: Path) -> None:
    for options, part in (
        (["--path", "*.none"], "nothing to answer from. Relax a filter"),
        (["--min-cosine", "1"], "(best cosine"),
    ):
        done = ask("--llm", stub.url, *options)
        assert (done.status, done.out, part in done.err) == (1, "", True), done
    keyword = cli("ask", "zebra", "--mode", "keyword", "--llm", stub.url, "--index-dir", docs)
    assert (keyword.status, keyword.out) == (1, "")
    assert stub.requests == []


def test_an_answer_without_citations_is_flagged(ask: Any, stub: Stub) -> None:
    stub.parts = ["The sources do not answer it."]
    done = ask("--llm", stub.url)
    assert (done.status, done.out) == (0, "The sources do not answer it.\n")
    assert done.err == "warning: The answer cites no source. Check it against `epic-rag query`.\n"


def test_the_answer_cannot_control_the_terminal(ask: Any, stub: Stub) -> None:
    stub.parts = ["\x1b]0;title\x07 [1]\u202e\n\tend"]
    assert ask("--llm", stub.url).out.startswith("\\u001b]0;title\\u0007 [1]\\u202e\n\tend\n")


def test_the_key_is_of_the_environment(ask: Any, stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "of another endpoint")
    monkeypatch.setenv("EPIC_RAG_LLM_KEY", "k3y")
    monkeypatch.setenv("EPIC_RAG_LLM", stub.url)
    assert ask().status == 0
    assert [headers["Authorization"] for _, headers, _ in stub.requests] == ["Bearer k3y"] * 2
    monkeypatch.setenv("OTHER", "0ther")
    assert ask("--llm-key-env", "OTHER").status == 0
    assert stub.requests[-1][1]["Authorization"] == "Bearer 0ther"
    refused = ask("--llm", "http://192.0.2.1/v1")
    assert (refused.status, "Use https" in refused.err, "k3y" in refused.err) == (1, True, False)
    assert "NOT_SET is not set" in ask("--llm-key-env", "NOT_SET").err


def test_errors_of_the_endpoint(ask: Any, stub: Stub) -> None:
    def error(**changes: Any) -> str:
        for name, value in changes.items():
            setattr(stub, name, value)
        done = ask("--llm", stub.url, "--llm-model", "m")
        assert done.status == 1, done
        assert done.err.startswith("error: ")
        assert "Traceback" not in done.err
        return str(done.err)

    assert "has 2 models. Pass one of a, b to --llm-model" in ask("--llm", _listing(stub, ["a", "b"])).err
    assert "lists no models" in ask("--llm", _listing(stub, [])).err
    message = b'{"error": {"message": "model \\"m\\" not found,\\n try pulling it"}}'
    assert 'status 404: model "m" not found, try pulling it). Check --llm' in error(status=404, body=message)
    assert "API key" in error(status=401, body=b"not JSON")
    assert "status 500: oops" in error(status=500, body=b'{"error": "oops"}')
    assert "shape of OpenAI" in error(status=200, body=b"<html>")
    assert "shape of OpenAI" in error(body=b"[]")
    assert "shape of OpenAI" in error(body=b'{"choices": [3]}')
    assert "failed: out of memory" in error(body=b'{"error": {"message": "out of memory"}}')
    assert "answered nothing" in error(body=b'{"choices": []}')
    assert "broke off" in error(body=None, breaks_off=True, done=False)
    gone = ask("--llm", "http://127.0.0.1:1", "--llm-model", "m")
    assert (gone.status, gone.out, "does not answer" in gone.err) == (1, "", True)
    for url in ("127.0.0.1:8000", "ftp://a/v1", "http://", "http://user:pw@a/v1", "http://a:b/v1"):
        assert "is not the address" in ask("--llm", url).err


def _listing(stub: Stub, names: list[str]) -> str:
    stub.models = names
    return stub.url


def hit(number: int, text: str) -> Hit:
    return Hit(number, 1.0, f"{number}.md", number, number, None, ("A",), text, str(number))


@given(st.lists(st.text(min_size=1, max_size=2000).map(encodable), min_size=1, max_size=8), st.integers(200, 2000))
def test_a_prompt_keeps_to_its_budget(texts: list[str], budget: int) -> None:
    messages, used = build_prompt("why?", [hit(number, text) for number, text in enumerate(texts)], budget)
    # Each piece is rounded up by itself.
    assert estimate_tokens("".join(each["content"] for each in messages)) <= budget
    assert used
    for number, each in enumerate(used, 1):
        assert f"\n[{number}] {each.path}:" in messages[1]["content"]


@given(st.text(alphabet="[]0123,-;`a \n", max_size=60), st.integers(1, 3), st.data())
def test_citations_do_not_depend_on_the_parts(text: str, sources: int, data: st.DataObject) -> None:
    whole = CitationChecker(sources)
    expected = whole.feed(text) + whole.end()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=5)))
    parted = CitationChecker(sources)
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert "".join(map(parted.feed, pieces)) + parted.end() == expected
    assert (parted.cited, parted.invented) == (whole.cited, whole.invented)
    assert all(1 <= number <= sources for number in whole.cited)
    assert not any(1 <= number <= sources for number in whole.invented)


@pytest.mark.parametrize(
    ("text", "shown", "cited", "invented"),
    [
        ("a [1][3].", "a [1][3].", [1, 3], []),
        ("a [1-3]", "a [1-3]", [1, 2, 3], []),
        ("a [2, 5]", "a [2][no source 5]", [2], [5]),
        ("a [0] [Source 4]", "a [no source 0] [no source 4]", [], [0, 4]),
        ("a [1-900]", "a [1][no source 900]", [1], [900]),
        ("`x[9]` and ```\ny[7]\n``` [2]", "`x[9]` and ```\ny[7]\n``` [2]", [2], []),
        ("[a] [ ] [1", "[a] [ ] [1", [], []),
    ],
)
def test_citations(text: str, shown: str, cited: list[int], invented: list[int]) -> None:
    checker = CitationChecker(3)
    assert checker.feed(text) + checker.end() == shown
    assert (checker.cited, checker.invented) == (cited, invented)
