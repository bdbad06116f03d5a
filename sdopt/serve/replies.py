"""Errors as HTTP has them: one exception, and its body in the shape that OpenAI's clients read.

{"error": {"message": "...", "type": "invalid_request_error", "param": "seed", "code": null}}
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from starlette.responses import JSONResponse

from sdopt.serve.orders import Failed

TYPES = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
         405: "invalid_request_error", 408: "timeout_error", 409: "conflict_error", 411: "invalid_request_error",
         413: "request_too_large", 415: "invalid_request_error", 429: "rate_limit_error", 500: "server_error",
         503: "unavailable_error", 504: "timeout_error"}  # fmt: skip
WEB_UI = "/sdapi/"  # how the paths of AUTOMATIC1111's API begin
OF_REASON = {"usage": 400, "full": 429, "late": 429, "cancelled": 409, "failed": 500, "stopping": 503}
CODES = {"full": "queue_full", "late": "deadline", "stopping": "stopping", "cancelled": "cancelled"}


@dataclass
class HttpError(Exception):
    """A request that gets no picture. `retry_after`: seconds after which it may work."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    retry_after: float | None = None

    @property
    def body(self) -> dict[str, Any]:
        """The error as OpenAI's clients read it."""
        kind = TYPES.get(self.status, "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """When to try again. OpenAI's clients take the milliseconds, others the seconds."""
        if self.retry_after is None:
            return {}
        return {
            "retry-after-ms": str(math.ceil(1000 * self.retry_after)),
            "retry-after": str(max(1, math.ceil(self.retry_after))),
        }

    @property
    def web_ui_body(self) -> dict[str, Any]:
        """The error as clients of AUTOMATIC1111's web UI read it."""
        detail = self.message if self.param is None else f"{self.param}: {self.message}"
        is_named = self.param is None or self.param in self.message
        detail = self.message if is_named else f"{self.param}: {self.message}"
        return {"error": "HTTPException", "detail": detail, "body": "", "errors": "", "param": self.param}

    def response(self, path: str = "") -> JSONResponse:
        """The answer, in the shape of the API that `path` belongs to."""
        if not path.startswith(WEB_UI):
            return JSONResponse(self.body, self.status, self.headers)
        status = 422 if self.status == 400 else self.status
        login = {"www-authenticate": 'Basic realm="sdopt"'} if status == 401 else {}
        return JSONResponse(self.web_ui_body, status, {**self.headers, **login})

    @staticmethod
    def of(failed: Failed) -> HttpError:
        """The error of an order that failed."""
        status, code = OF_REASON[failed.reason], CODES.get(failed.reason)
        return HttpError(status, failed.message, failed.param, code, failed.retry_after)
