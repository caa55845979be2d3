"""Request log: one line each with who, what, how long and how many tokens; never a prompt nor a text."""

from __future__ import annotations

import json
import logging
import re
import time
import traceback
import uuid
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pagedkv.server.errors import ApiError, api_error_of, error_response

logger = logging.getLogger("pagedkv.server")

_SANE_ID = re.compile(r"[A-Za-z0-9._:\-]{1,128}")
_QUIET = frozenset({"/health", "/metrics"})


def request_id_of(scope: Scope) -> str:
    """Return the id of a request: the client's header x-request-id, where it is a sane one, or a fresh one."""
    found: str | None = scope.get("pagedkv.id")
    if found is None:
        given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        found = given if _SANE_ID.fullmatch(given) else uuid.uuid4().hex
        scope["pagedkv.id"] = found
    return found


def note(scope: Scope, **facts: Any) -> None:
    """Add facts to the line of a request. Text of users must not be among them."""
    scope.setdefault("pagedkv.notes", {}).update(facts)


class RequestLog:
    """Middleware: logs every request, names it in the header x-request-id, and answers unforeseen errors with 500."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope.setdefault("pagedkv.notes", {})
        request_id, started = request_id_of(scope), time.perf_counter()
        status = 0

        async def named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, named)
        except Exception as error:
            if status and isinstance(error, OSError):
                note(scope, ended="client left")
                return
            _log_fault(request_id, error)
            if status:
                # The connection must break, but what the error says stays here: it may quote the request.
                raise ConnectionAbortedError("the answer broke off") from None
            known = error if isinstance(error, ApiError) else api_error_of(error)
            await error_response(known, scope["path"])(scope, receive, named)
        finally:
            _log_request(scope, request_id, status, time.perf_counter() - started)


def _log_request(scope: Scope, request_id: str, status: int, seconds: float) -> None:
    level = logging.DEBUG if scope["path"] in _QUIET and status < 400 else logging.INFO
    if not logger.isEnabledFor(level):
        return
    facts: dict[str, Any] = {
        "id": request_id,
        "method": scope["method"],
        "path": scope["path"][:200],
        "status": status,
        "seconds": round(seconds, 6),
    }
    if scope.get("pagedkv.caller"):
        facts["key"] = scope["pagedkv.caller"]
    facts |= scope["pagedkv.notes"]
    words = " ".join(f"{name}={value}" for name, value in facts.items() if name not in ("method", "path", "status"))
    line = "%s %s %d %s"
    logger.log(level, line, facts["method"], json.dumps(facts["path"])[1:-1], status, words, extra={"facts": facts})


def _log_fault(request_id: str, error: Exception) -> None:
    # Where it happened, not what the message says: that may quote the request.
    places = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(error.__traceback__)]
    facts = {"id": request_id, "error": type(error).__name__, "at": places[-8:]}
    logger.error(
        "%s in request %s at %s", facts["error"], request_id, " < ".join(places[::-1][:8]), extra={"facts": facts}
    )


class JsonFormatter(logging.Formatter):
    """Writes a record as one JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        line: dict[str, Any] = {"time": when, "level": record.levelname.lower(), "logger": record.name}
        facts = getattr(record, "facts", None)
        line |= (
            {"event": "request" if "status" in facts else "fault", **facts}
            if facts
            else {"message": record.getMessage()}
        )
        return json.dumps(line, default=str)
