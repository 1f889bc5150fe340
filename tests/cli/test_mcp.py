"""`epic-rag mcp` as a subprocess of the official SDK's client, in both eras of the protocol."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import anyio
import httpx
import jsonschema
import pytest
from mcp import StdioServerParameters
from mcp.client import Client
from mcp.client.stdio import stdio_client

from epic_rag import DemonstrationBank
from tests.cli.conftest import FILES

ERAS = ("legacy", "2026-07-28")
SECRET = "never indexed"


@pytest.fixture
def folder(indexed: Path) -> Path:
    (indexed / "secret.env").write_text(SECRET)
    return indexed


def use(folder: Path, work: Callable[[Client], Awaitable[Any]], *options: object, era: str = ERAS[1]) -> Any:
    """Start the server with the SDK's client and do something with it."""
    arguments = ["-m", "epic_rag_cli", "mcp", "--index-dir", str(folder), *map(str, options)]
    parameters = StdioServerParameters(command=sys.executable, args=arguments, env=dict(os.environ))

    async def run() -> Any:
        with anyio.fail_after(120):
            async with Client(stdio_client(parameters), mode=era) as client:
                return await work(client)

    return anyio.run(run)


def text_of(result: Any) -> str:
    return "".join(block.text for block in result.content)


@pytest.mark.parametrize("era", ERAS)
def test_a_session(folder: Path, era: str) -> None:
    async def work(client: Client) -> None:
        tools = {tool.name: tool for tool in (await client.list_tools()).tools}
        assert set(tools) == {"search", "get", "status"}
        for tool in tools.values():
            assert tool.annotations is not None
            assert (tool.annotations.read_only_hint, tool.annotations.open_world_hint) == (True, False)
            assert tool.output_schema is not None
            for name, schema in tool.input_schema["properties"].items():
                assert {"anyOf", "oneOf", "$ref"} & set(schema) == set(), f"{name} is not flat"
                assert name in ("query", "file") or "default" in schema
        found = await client.call_tool("search", {"query": "undo the last commit", "top_k": 2})
        jsonschema.validate(found.structured_content, tools["search"].output_schema)
        assert len(found.structured_content["hits"]) == 2
        first = found.structured_content["hits"][0]
        assert f"1. {first['file']}:{first['first_line']}-{first['last_line']}" in text_of(found)
        lines = await client.call_tool("get", {"file": first["file"], "from_line": first["first_line"], "max_lines": 1})
        assert lines.structured_content["text"] == first["text"].split("\n")[0]
        status = (await client.call_tool("status", {})).structured_content
        assert status["indexes"][0]["name"] == "docs"
        assert "docs" in status["banks"]

    use(folder, work, era=era)


def test_arguments_and_errors(folder: Path) -> None:
    async def work(client: Client) -> None:
        async def files(**settings: Any) -> set[str]:
            result = await client.call_tool("search", {"query": "undo commit cats", **settings})
            assert not result.is_error, text_of(result)
            return {hit["file"] for hit in result.structured_content["hits"]}

        async def error(tool: str, **arguments: Any) -> str:
            result = await client.call_tool(tool, arguments)
            assert result.is_error, text_of(result)
            assert SECRET not in text_of(result)
            return text_of(result)

        assert await files(path="*.txt", mode="keyword") == {"notes.txt"}
        assert await files(where="kind=text") == {"notes.txt"}
        assert await files(since="2999-01-01") == set()
        assert await files(bank="docs", index="docs")
        assert "Known are docs" in await error("search", query="a", index="other")
        assert "no bank" in await error("search", query="a", bank="other")
        assert "not a condition" in await error("search", query="a", where="nonsense")
        await error("search", query="a", top_k=0)
        await error("search", query="a", mode="other")
        await error("search")
        assert "Did you mean drafts/idea.md?" in await error("get", file="idea.md")
        for file in (
            "secret.env",
            "../secret.env",
            "/etc/passwd",
            ".epic-rag/index.sqlite",
            "docs/../secret.env",
            "\0",
            "",
        ):
            assert "not a file" in await error("get", file=file)
        ranged = (await client.call_tool("get", {"file": "install.md:3-5"})).structured_content
        expected = FILES["install.md"].split("\n")[2:5]
        assert (ranged["first_line"], ranged["last_line"], ranged["text"].split("\n")) == (3, 5, expected)
        beyond = (await client.call_tool("get", {"file": "install.md", "from_line": 1000})).structured_content
        assert beyond["text"] == ""

    use(folder, work)


def test_answers_have_a_budget_of_characters(folder: Path, cli: Any, tiny_checkpoint: Path) -> None:
    (folder / "long.txt").write_text("".join(f"line {number} {'words ' * 30}\n" for number in range(120)))
    assert cli("index", folder, "--model", tiny_checkpoint, "--chroma", "none").status == 0

    async def work(client: Client) -> None:
        got = await client.call_tool("get", {"file": "long.txt", "max_lines": 2000})
        assert len(text_of(got)) < 16_500
        assert got.structured_content["last_line"] < 100
        found = await client.call_tool("search", {"query": "words line", "top_k": 50})
        assert len(text_of(found)) < 25_000

    use(folder, work)


def test_examples_are_added_only_if_allowed(folder: Path, tmp_path: Path) -> None:
    async def work(client: Client) -> None:
        tools = {tool.name: tool for tool in (await client.list_tools()).tools}
        assert tools["add_example"].annotations.read_only_hint is False
        added = await client.call_tool("add_example", {"query": "take it back", "file": "undo.md", "line": 3})
        assert added.structured_content["bank"] == "mine"
        assert added.structured_content["passage"].startswith("To undo the last commit")
        again = await client.call_tool("add_example", {"query": "take it back", "file": "undo.md", "line": 3})
        assert again.structured_content["examples"] == 1
        for arguments in (
            {"file": "undo.md", "line": 2},
            {"file": "undo.md", "line": 99},
            {"file": "secret.env", "line": 1},
        ):
            assert (await client.call_tool("add_example", {"query": "q", **arguments})).is_error
        assert not (await client.call_tool("search", {"query": "take it back", "bank": "mine"})).is_error

    use(folder, work, "--allow-examples", "mine", "--bank-dir", tmp_path / "banks")
    assert len(DemonstrationBank.load(tmp_path / "banks" / "mine")) == 1


def test_only_the_protocol_is_on_stdout_and_the_end_of_stdin_ends_it(folder: Path) -> None:
    start = {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "test", "version": "1"}}
    messages = [
        {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": start},
        {"jsonrpc": "2.0", "method": "notifications/initialized"},
        *(
            {"jsonrpc": "2.0", "id": number, "method": "tools/call", "params": {"name": "search", "arguments": {"query": "undo"}}}
            for number in range(2, 6)
        ),
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "epic_rag_cli", "mcp", "--index-dir", str(folder)],
        input="".join(json.dumps(message) + "\n" for message in messages),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert {answer["id"] for answer in answers} == {1, 2, 3, 4, 5}  # what was asked before the end is answered
    assert all("result" in answer for answer in answers)
    assert "Traceback" not in done.stderr


@contextmanager
def http(
    folder: Path, *options: object, env: dict[str, str] | None = None
) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Run `epic-rag mcp --http` on a free port; yield its address and the process."""
    command = [sys.executable, "-m", "epic_rag_cli", "mcp", "--http", "--port", "0", "--index-dir", str(folder)]
    process = subprocess.Popen(
        [*command, *map(str, options)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env={**os.environ, **(env or {})},
    )  # fmt: skip
    assert process.stderr is not None
    try:
        line = process.stderr.readline()
        found = re.fullmatch(r"note: Tools for docs are served at (http://\S+/mcp)\. Ctrl-C ends it\.\n", line)
        assert found, line + process.stderr.read()
        yield found[1], process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def test_http(folder: Path) -> None:
    async def work(url: str, era: str, name: str) -> None:
        async with Client(url, mode=era) as client:
            assert {tool.name for tool in (await client.list_tools()).tools} == {"search", "get", "status"}
            found = await client.call_tool("search", {"query": "undo the last commit", "top_k": 2})
            assert len(found.structured_content["hits"]) == 2
            lines = await client.call_tool("get", {"file": f"{name}:1-2"})
            assert lines.structured_content["text"] == "\n".join(FILES[name].split("\n")[:2])
            refused = await client.call_tool("get", {"file": "../secret.env"})
            assert refused.is_error
            assert SECRET not in text_of(refused)

    async def all_at_once(url: str) -> None:
        with anyio.fail_after(120):
            async with anyio.create_task_group() as group:
                for era in ERAS:
                    for name in ("undo.md", "notes.txt"):
                        group.start_soon(work, url, era, name)

    async def stop_with_a_client(url: str, process: subprocess.Popen[str]) -> None:
        with anyio.fail_after(120):
            with suppress(Exception):  # the session's end cannot be reported to a server that has ended
                async with Client(url, mode="legacy") as client:
                    await client.list_tools()
                    process.send_signal(signal.SIGINT)
                    await anyio.to_thread.run_sync(process.wait)

    with http(folder) as (url, process):
        anyio.run(all_at_once, url)
        anyio.run(stop_with_a_client, url, process)
        assert process.wait(60) == 0
        assert process.communicate() == ("", "")


def test_access_over_http(folder: Path) -> None:
    body = {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": {
        "protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "test", "version": "1"},
    }}  # fmt: skip
    accept = {"Accept": "application/json, text/event-stream"}
    with http(folder, "--api-key-env", "MCP_KEY", env={"MCP_KEY": "k3y"}) as (url, _):

        def status(**headers: str) -> int:
            given = {name.capitalize(): value for name, value in headers.items()}
            return httpx.post(url, json=body, headers={**accept, "Authorization": "Bearer k3y", **given}).status_code

        assert status() == 200
        assert status(authorization="Bearer other") == 401
        assert status(host="rebound.example") == 403
        assert status(origin="http://page.example") == 403
        assert status(origin=url.removesuffix("/mcp")) == 200
        assert httpx.post(url, json=body, headers=accept).status_code == 401
        large = {**body, "params": {"padding": "a" * 2**21}}
        assert httpx.post(url, json=large, headers={**accept, "Authorization": "Bearer k3y"}).status_code == 413
        for content in (b"", b"{", b"[]", b"\xff" * 50, b"null"):
            answer = httpx.post(url, content=content, headers={**accept, "Authorization": "Bearer k3y"})
            assert 400 <= answer.status_code < 500


def test_options_of_http(cli: Any, indexed: Path) -> None:
    assert "Add --http" in cli("mcp", "--index-dir", indexed, "--port", "1").err
    open_to_all = cli("mcp", "--http", "--host", "0.0.0.0", "--index-dir", indexed)
    assert (open_to_all.status, "--api-key-env" in open_to_all.err) == (1, True)
    assert "NOT_SET is not set" in cli("mcp", "--http", "--api-key-env", "NOT_SET", "--index-dir", indexed).err
    printed = cli("mcp", "--http", "--api-key-env", "KEY", "--index-dir", indexed, "--print-config").out
    decoder = json.JSONDecoder()
    objects = [decoder.raw_decode(part)[0] for part in ("{" + rest for rest in printed.split("  {\n")[1:])]
    url = "http://127.0.0.1:8401/mcp"
    assert objects == [
        {"mcpServers": {"epic-rag": {"type": "http", "url": url, "headers": {"Authorization": "Bearer ${KEY}"}}}},
        {"mcpServers": {"epic-rag": {"url": url, "headers": {"Authorization": "Bearer ${env:KEY}"}}}},
        {"servers": {"epic-rag": {"type": "http", "url": url, "headers": {"Authorization": "Bearer ${env:KEY}"}}}},
    ]
    assert f"claude mcp add --transport http epic-rag {url} --header" in printed


def test_a_file_that_has_become_a_link_is_not_read(folder: Path) -> None:
    (folder / "undo.md").unlink()
    (folder / "undo.md").symlink_to(folder / "secret.env")
    (folder / "notes.txt").unlink()
    (folder / "notes.txt").symlink_to("/etc/hostname")

    async def work(client: Client) -> None:
        for file in ("notes.txt", "undo.md"):
            result = await client.call_tool("get", {"file": file})
            assert result.is_error or file == "undo.md", text_of(result)
            assert Path("/etc/hostname").read_text().strip() not in text_of(result).replace(file, "")

    use(folder, work)


def test_settings_of_hosts(indexed: Path, cli: Any) -> None:
    printed = cli("mcp", "--index-dir", indexed, "--allow-examples", "mine", "--print-config")
    assert (printed.status, printed.err) == (0, "")
    arguments = ["mcp", "--index-dir", str((indexed / ".epic-rag").resolve()), "--allow-examples", "mine"]
    decoder = json.JSONDecoder()
    objects = [decoder.raw_decode(part)[0] for part in ("{" + rest for rest in printed.out.split("  {\n")[1:])]
    assert objects[0]["mcpServers"]["epic-rag"]["args"] == arguments
    assert objects[1]["servers"]["epic-rag"] == {"type": "stdio", "command": "epic-rag", "args": arguments}
    assert "claude mcp add epic-rag -- epic-rag mcp" in printed.out


def test_errors_at_the_start(cli: Any, indexed: Path) -> None:
    missing = cli("mcp", "--index-dir", indexed / "nowhere")
    assert (missing.status, missing.out) == (1, "")
    shutil.rmtree(indexed / ".epic-rag")
    assert cli("mcp", "--index-dir", indexed).status == 1
