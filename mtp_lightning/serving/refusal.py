"""The error that a client gets instead of a text."""

from __future__ import annotations

from typing import Any

# nginx's status for a client that has disconnected; it only appears in metrics.
HUNG_UP = 499
_TYPES = {429: "rate_limit_error", 500: "server_error", 503: "server_error"}


class Refusal(Exception):
    """A request is refused, or its text is cut short.

    Args:
        message: a sentence for people.
        param: the invalid field.
        code: a word for programs, such as ``model_not_found``.
        retry_after: the seconds after which the client may try again.
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
        """The error object of OpenAI's API."""
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
        """Headers of the response."""
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
