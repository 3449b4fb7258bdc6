"""What a client is told when there is no text for it."""

from __future__ import annotations

from typing import Any

# nginx's number for it; no client sees it.
HUNG_UP = 499
_TYPES = {429: "rate_limit_error", 500: "server_error", 503: "server_error"}


class Refusal(Exception):
    """A request that is not answered, or no further.

    Args:
        message: one sentence, for a person.
        status: of HTTP.
        param: the field that is wrong.
        code: a word for programs, such as ``model_not_found``.
        retry_after: seconds after which it may be tried again.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.retry_after = retry_after

    @property
    def body(self) -> dict[str, Any]:
        """In OpenAI's shape."""
        return {
            "error": {
                "message": str(self),
                "type": _TYPES.get(self.status, "invalid_request_error"),
                "param": self.param,
                "code": self.code,
            }
        }

    @property
    def headers(self) -> dict[str, str]:
        """Of the response."""
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
