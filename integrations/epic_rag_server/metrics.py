"""Metrics in Prometheus' format, and the middleware that measures requests."""

from __future__ import annotations

import logging
import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["Metrics", "RequestMeter"]

logger = logging.getLogger(__name__)

_TOKENS = tuple(2**power for power in range(4, 18))


class Metrics:
    """The counters of one server.

    Attributes:
        tokens: Tokens of texts that were encoded for requests.
        queued: Texts that wait or are being encoded.
    """

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter("epic_rag_requests", "Requests", ["route", "status"], registry=registry)
        self.seconds = Histogram("epic_rag_request_seconds", "Duration of requests", ["route"], registry=registry)
        self.tokens = Counter("epic_rag_tokens", "Tokens of encoded texts", registry=registry)
        self.queued = Gauge("epic_rag_queued_texts", "Texts that wait or are being encoded", registry=registry)
        self.queue_seconds = Histogram("epic_rag_queue_seconds", "Longest wait in a batch", registry=registry)
        self.batch_tokens = Histogram("epic_rag_batch_tokens", "Tokens in a batch", buckets=_TOKENS, registry=registry)

    def batch(self, tokens: int, waited: float) -> None:
        """Record a batch and the seconds that its oldest text waited."""
        self.batch_tokens.observe(tokens)
        self.queue_seconds.observe(waited)

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self._registry)


class RequestMeter:
    """ASGI middleware that counts and times requests by route, and logs them without queries and texts.

    Args:
        app: The application.
        metrics: The counters.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on a request and record its status and duration."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = time.perf_counter(), 499  # no answer: the client has left

        async def sent(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, sent)
        finally:
            # The pattern of the route, because paths name documents. Starlette stores the matched route.
            route = getattr(scope.get("route"), "path", "unknown")
            seconds = time.perf_counter() - start
            self._metrics.requests.labels(route, str(status)).inc()
            self._metrics.seconds.labels(route).observe(seconds)
            logger.info("%s %s %d %.1f ms", scope["method"], route, status, 1000 * seconds)
