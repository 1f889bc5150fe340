"""Bodies of requests and responses, and clients that leave before they are answered."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Mapping
from typing import Any, TypeVar

import orjson
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from epic_rag_server.errors import ApiError
from epic_rag_server.schemas import Parsed, parse

__all__ = ["json_response", "read", "read_body", "unless_disconnected"]

Result = TypeVar("Result")
_READ_SECONDS = 60.0


def json_response(content: Any, *, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Return a response of JSON; numpy rows become lists of numbers."""
    try:
        body = orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)
    except TypeError:  # half a surrogate pair, for an undecodable byte of a file's name
        body = json.dumps(content, allow_nan=False).encode()
    return Response(body, status, headers, "application/json")


async def read(request: Request, model: type[Parsed]) -> Parsed:
    """Read and parse the body of a request.

    Raises:
        ApiError: 400 if it is not of that shape, 408 if it does not arrive.
    """
    return parse(model, await read_body(request))


async def read_body(request: Request) -> bytes:
    """Read the body of a request.

    Raises:
        ApiError: 408 if it does not arrive.
    """
    try:
        return await asyncio.wait_for(request.body(), _READ_SECONDS)
    except asyncio.TimeoutError:
        raise ApiError(408, f"The body did not arrive within {_READ_SECONDS:.0f} s. Send it faster.") from None


async def unless_disconnected(request: Request, work: Awaitable[Result]) -> Result:
    """Wait for work, which is cancelled when the client leaves.

    Args:
        request: The request; its body has been read.
        work: The work.

    Raises:
        ClientDisconnect: If the client has left.
    """
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(request.receive())  # after the body, the next message is the disconnection
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        watcher.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)
