"""Error responses: every failure as the JSON object that OpenAI's clients expect."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from pagedkv.errors import EngineDead, InvalidOperation, ReplicaLost, RequestRefused

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}
CLOSE = {"Connection": "close"}
"""The header of a refusal before the whole body has come: what is left of it is not read."""


_MEMBERS = frozenset({"str", "int", "float", "bool", "list", "dict", "nullable"})


class ErrorBody(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    """The body of every answer that is no success."""

    error: ErrorBody


class ClientLeft(OSError):
    """The client does not wait for the answer any more."""


class ApiError(HTTPException):
    """An answer that is no success.

    It is an exception of HTTP, so that FastAPI lets it through where it reads the body.

    Parameters
    ----------
    status : int
        Of HTTP.
    message : str
    param : str, optional
        The field at fault.
    code : str, optional
        A word for programs.
    retry_after : float, optional
        Seconds.
    headers : dict, optional
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        headers = dict(headers or {})
        if retry_after is not None:
            headers["Retry-After"] = str(max(1, round(retry_after)))
        super().__init__(status, message, headers)
        self.status, self.message, self.param, self.code = status, message, param, code

    @property
    def body(self) -> dict[str, Any]:
        """The JSON object."""
        default = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = _TYPES.get(self.status, default)
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


# Anthropic's and Ollama's clients expect errors of their own form.

_ANTHROPIC = {413: "request_too_large", 503: "overloaded_error"}


class AnthropicError(BaseModel):
    """The body of every answer of ``/v1/messages`` that is no success."""

    type: Literal["error"] = "error"
    error: dict[Literal["type", "message"], str]


class OllamaError(BaseModel):
    """The body of every answer below ``/api`` that is no success."""

    error: str


def anthropic_error(error: ApiError) -> dict[str, Any]:
    """Return an error as Anthropic's clients expect it."""
    default = "api_error" if error.status >= 500 else "invalid_request_error"
    kind = _ANTHROPIC.get(error.status) or _TYPES.get(error.status, default)
    return {"type": "error", "error": {"type": kind, "message": error.message}}


def ollama_error(error: ApiError) -> dict[str, Any]:
    """Return an error as Ollama's clients expect it."""
    return {"error": error.message}


def error_response(error: ApiError, path: str) -> JSONResponse:
    """Return the answer for an error, in the form of the API that a path belongs to."""
    body = error.body
    if path.startswith("/v1/messages"):
        body = anthropic_error(error)
    elif path.startswith("/api/"):
        body = ollama_error(error)
    return JSONResponse(body, error.status, headers=error.headers)


def api_error_of(error: BaseException) -> ApiError:
    """Return how an error of the engine, or an unforeseen one, is answered."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestRefused):
        if error.retry_after is not None:
            return ApiError(429, error.reason, code="queue_full", retry_after=error.retry_after)
        return ApiError(400, error.reason, code="request_too_large")
    if isinstance(error, InvalidOperation):
        return ApiError(400, error.reason, param=error.argument, code="invalid_value")
    if isinstance(error, ClientLeft):
        return ApiError(499, "the client left", code="client_left")  # for the log
    if isinstance(error, ReplicaLost):
        text = f"the replica that wrote the answer has gone, and no other could go on: {error.reason}"
        return ApiError(503, text, code="replica_lost", retry_after=1)
    if isinstance(error, EngineDead):
        return ApiError(503, "the engine has stopped", code="engine_dead")
    return ApiError(500, "the server met an error that it did not foresee", code="internal_error")


def _field(location: Sequence[Any]) -> str | None:
    # The first part says body, query or path; the names of the members of a union would tell a client nothing.
    parts = [part for part in location[1:] if isinstance(part, int) or (part.isidentifier() and part not in _MEMBERS)]
    return ".".join(map(str, parts)) or None


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    """Name the field at fault, and what each form that it may take expected."""
    problems = error.errors() if isinstance(error, RequestValidationError) else []
    if problems[0]["type"] == "json_invalid":
        return _answer(request, ApiError(400, "the body is no valid JSON", code="invalid_json"))
    if problems[0]["loc"] == ("body",) and not says_json(request.headers.get("content-type", "")):
        text = "expected a JSON object and the header Content-Type: application/json"
        return _answer(request, ApiError(415, text, code="unsupported_media_type"))
    field = _field(problems[0]["loc"])
    same = [problem for problem in problems if _root(problem["loc"]) == _root(problems[0]["loc"])]
    said = dict.fromkeys(f"{_field(problem['loc']) or 'the body'}: {problem['msg']}" for problem in same)
    return _answer(request, ApiError(400, "; or ".join(list(said)[:4]), param=field, code="invalid_value"))


def says_json(content_type: str) -> bool:
    """Whether a Content-Type is JSON, or one of the formats that are."""
    kind = content_type.partition(";")[0].strip().lower()
    return kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))


def _root(location: tuple[Any, ...]) -> tuple[Any, ...]:
    # Of messages, say, each message is a field of its own; the members of a union share theirs.
    numbered = 3 if len(location) > 2 and isinstance(location[2], int) else 2
    return location[:numbered]


async def _http(request: Request, error: Exception) -> JSONResponse:
    if not isinstance(error, HTTPException):
        raise error
    messages = {
        404: f"there is nothing at {request.url.path}",
        405: f"{request.url.path} does not take {request.method}",
    }
    message = messages.get(error.status_code, str(error.detail))
    return _answer(request, ApiError(error.status_code, message, headers=dict(error.headers or {})))


async def _known(request: Request, error: Exception) -> JSONResponse:
    return _answer(request, api_error_of(error))


def _answer(request: Request, error: ApiError) -> JSONResponse:
    return error_response(error, request.url.path)


def install_error_handlers(app: FastAPI) -> None:
    """Answer every error of an app in the one shape."""
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    for kind in (ApiError, ClientLeft, RequestRefused, InvalidOperation, EngineDead, ReplicaLost):
        app.add_exception_handler(kind, _known)
