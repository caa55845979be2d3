"""The HTTP server: one engine behind the API that OpenAI's clients speak."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pagedkv.server.config import ServerConfig

if TYPE_CHECKING:
    from pagedkv.server.app import create_app

__all__ = ["ServerConfig", "create_app"]


def __getattr__(name: str) -> Any:
    if name != "create_app":
        raise AttributeError(f"module 'pagedkv.server' has no attribute {name!r}")
    try:
        from pagedkv.server.app import create_app
    except ModuleNotFoundError as error:
        if error.name not in ("fastapi", "starlette", "pydantic", "uvicorn", "prometheus_client"):
            raise
        from pagedkv.errors import MissingExtra

        raise MissingExtra(error.name, "serve") from error
    return create_app
