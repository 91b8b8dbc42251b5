"""Errors as OpenAI's API words them: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

from typing import Any

from libortho.errors import LibOrthoError

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    502: "server_error",
    503: "server_error",
    504: "timeout_error",
}


class ApiError(LibOrthoError):
    """An answer that is an error.

    Attributes:
        status: HTTP status.
        code: a word for programs ("alpha_not_permitted").
        message: a sentence for people; never holds the request's text.
        param: the parameter at fault.
        retry_after: seconds after which to try again, for 429 and 503.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        """The JSON of the response."""
        return {
            "error": {
                "message": self.message,
                "type": _TYPES.get(self.status, "invalid_request_error"),
                "param": self.param,
                "code": self.code,
            }
        }

    def headers(self) -> dict[str, str]:
        """Headers that go with it."""
        headers = {}
        if self.retry_after is not None:
            headers["retry-after"] = str(self.retry_after)
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return headers


def bad_request(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    """400."""
    return ApiError(400, code, message, param)


def alpha_above_limit(asked: float, principal: str, limit: float) -> ApiError:
    """403: the policy does not grant this alpha. It is refused, never cut to the limit."""
    who = "a request without a known key" if principal == "anonymous" else f"key {principal!r}"
    return ApiError(
        403,
        "alpha_not_permitted",
        f"alpha {asked:g} is above {limit:g}, the limit of {who}",
        "alpha",
    )


def alpha_not_served(asked: float, served: str) -> ApiError:
    """503: the caller may have this alpha, and the server cannot give it."""
    return ApiError(
        503, "alpha_unavailable", f"alpha {asked:g} is not served here now: {served}", "alpha"
    )


def model_not_found(name: str) -> ApiError:
    """404."""
    return ApiError(404, "model_not_found", f"model {name[:80]!r} does not exist", "model")
