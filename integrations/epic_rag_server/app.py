"""The ASGI application and the process that serves it."""

from __future__ import annotations

import logging
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from epic_rag import ConfigError, EpicError
from epic_rag_server.bank_routes import BankRoutes
from epic_rag_server.batching import QueueClosedError, QueueFullError
from epic_rag_server.embeddings import EmbeddingRoutes
from epic_rag_server.errors import ApiError, error_of, error_response
from epic_rag_server.local_queries import LocalQueries
from epic_rag_server.messages import json_response
from epic_rag_server.metrics import RequestMeter
from epic_rag_server.search import SearchRoutes
from epic_rag_server.search_page import PageRoutes
from epic_rag_server.security import AccessPolicy, RequestGuard
from epic_rag_server.service import Service

__all__ = ["Server", "create_app"]

logger = logging.getLogger(__name__)

_CLIENT_LEFT = 499
_MAX_CONNECTIONS = 1024
_STOP_SECONDS = 30


def create_app(
    service: Service,
    policy: AccessPolicy,
    *,
    role_prefixes: tuple[str, str] | None = None,
    local: LocalQueries | None = None,
) -> Starlette:
    """Return the ASGI application.

    Args:
        service: The model, its indexes and banks; closed when the application stops.
        policy: Who has access.
        role_prefixes: See `EmbeddingRoutes`.
        local: Queries of `epic-rag query` on this machine.
    """

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        await service.encode(["warm up"], None)
        yield
        if local is not None:  # now, as uvicorn ends the process by the signal that stopped it
            local.close()
        await run_in_threadpool(service.close)

    async def health(request: Request) -> Response:
        if not service.queue.is_alive:
            raise ApiError(503, "The server is stopping. Use another one.", code="stopping")
        return json_response({"status": "ok", "model": service.name})

    async def metrics(request: Request) -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    search = SearchRoutes(service)
    return Starlette(
        routes=[
            Route("/health", health),
            Route("/metrics", metrics),
            *EmbeddingRoutes(service, role_prefixes).routes(),
            *search.routes(),
            *BankRoutes(service).routes(),
            *PageRoutes(service, search, policy).routes(),
            *(() if local is None else local.routes()),
        ],
        middleware=[Middleware(RequestMeter, metrics=service.metrics), Middleware(RequestGuard, policy=policy)],
        exception_handlers={
            ApiError: _refused,
            EpicError: _failed,
            HTTPException: _not_served,
            ClientDisconnect: _left,
            Exception: _unexpected,
        },
        lifespan=lifespan,
    )


async def _refused(request: Request, error: Any) -> Response:
    return error_response(error)


async def _failed(request: Request, error: Any) -> Response:
    if isinstance(error, QueueFullError):
        retry = {"Retry-After": str(error.retry_after)}
        return error_response(ApiError(429, str(error), code="queue_full", headers=retry))
    if isinstance(error, QueueClosedError):
        return error_response(ApiError(503, str(error), code="stopping"))
    return error_response(error_of(error))


async def _not_served(request: Request, error: Any) -> Response:
    if error.status_code == 405:
        message = f"{request.method} is not a method of this address."
    else:
        message = "There is nothing at this address. Embeddings are at /v1/embeddings, search is at /v1/search."
    return error_response(ApiError(error.status_code, message, code="not_found", headers=error.headers))


async def _left(request: Request, error: Any) -> Response:
    return Response(status_code=_CLIENT_LEFT)


async def _unexpected(request: Request, error: Any) -> Response:
    logger.error("Unexpected error (%s). Run with EPIC_RAG_DEBUG=1 for the traceback.", type(error).__name__)
    return error_response(ApiError(500, "Unexpected error. The server's log has its type.", code="unexpected"))


class Server:
    """An HTTP server of an application; the port is bound when it is made.

    Args:
        app: The application.
        host: The address to listen on.
        port: The port; 0 for a free one.

    Raises:
        ConfigError: If the address cannot be bound.
    """

    def __init__(self, app: Starlette, host: str = "127.0.0.1", port: int = 8400) -> None:
        try:
            family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            self._socket = socket.create_server(address, family=family, backlog=_MAX_CONNECTIONS)
        except (OSError, OverflowError) as error:
            raise ConfigError(f"Port {port} of {host} cannot be used ({error}). Pass another --port.") from error
        bound = self._socket.getsockname()
        shown = f"[{bound[0]}]" if ":" in bound[0] else bound[0]
        self.url = f"http://{shown}:{bound[1]}"
        self._server = uvicorn.Server(
            uvicorn.Config(
                app,
                http="h11",  # limits the size of headers
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,  # lines of uvicorn's have the query string
                server_header=False,
                proxy_headers=False,
                limit_concurrency=_MAX_CONNECTIONS,
                timeout_graceful_shutdown=_STOP_SECONDS,
            )
        )

    def run(self) -> None:
        """Serve until Ctrl-C, SIGTERM or `stop`; requests in progress are answered first."""
        try:
            self._server.run([self._socket])
        except KeyboardInterrupt:
            logger.info("Stopped.")
        finally:
            self._socket.close()

    def stop(self) -> None:
        """End `run`, which may be running in another thread."""
        self._server.should_exit = True
