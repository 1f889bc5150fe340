"""Errors of requests, in the shape of OpenAI's API: `{"error": {"message", "type", "param", "code"}}`.

A message is about the request. Paths of the machine, which messages of epic-rag's errors may contain, go to the log.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

from epic_rag import BankError, ConfigError, EpicError, PromptError, TaskError
from epic_rag_chroma import IndexMismatchError, IndexNotFoundError, KeywordsUnavailableError

__all__ = ["ApiError", "error_of", "error_response"]

logger = logging.getLogger(__name__)

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
_LONGEST = 500


class ApiError(Exception):
    """A request that is refused.

    Args:
        status: HTTP status.
        message: Fact and remedy.
        param: The field of the request that is wrong.
        code: A short name for programs.
        headers: Further headers of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        # Text of the request in a message may be of any length; the remedy is at the end.
        self.message = (
            message if len(message) <= _LONGEST else f"{message[: _LONGEST // 2]}...{message[-_LONGEST // 2 :]}"
        )
        self.param = param
        self.code = code
        self.headers = headers


def error_response(error: ApiError) -> JSONResponse:
    """Return the response to a refused request."""
    kind = _TYPES.get(error.status, "server_error" if error.status >= 500 else "invalid_request_error")
    body: dict[str, Any] = {"message": error.message, "type": kind, "param": error.param, "code": error.code}
    return JSONResponse({"error": body}, error.status, error.headers)


def error_of(error: EpicError) -> ApiError:
    """Return the response's error for one of epic-rag's; a message that may name a path is replaced and logged."""
    if isinstance(error, (ConfigError, PromptError, TaskError)):
        return ApiError(400, str(error))
    logger.warning("%s", error)
    if isinstance(error, IndexMismatchError):
        return ApiError(
            409, "The index was built with another model. Serve that model, or index again.", code="index_mismatch"
        )
    if isinstance(error, IndexNotFoundError):
        return ApiError(503, "The index does not exist any more. Run `epic-rag index` again.", code="index_not_found")
    if isinstance(error, KeywordsUnavailableError):
        return ApiError(409, "The index has no keywords. Use mode dense, or index again.", code="no_keywords")
    if isinstance(error, BankError):
        return ApiError(503, "The bank cannot be read or written. The server's log has the reason.", code="bank_error")
    return ApiError(503, "The request failed. The server's log has the reason.", code=type(error).__name__)
