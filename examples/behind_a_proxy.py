"""The server behind a reverse proxy that publishes it under a path of its own, https://example.org/llm/v1/….

The application is mounted under the path, and believes the proxy, and nobody else, about scheme and client address.
The proxy passes ``X-Forwarded-Proto`` and ``X-Forwarded-For`` and leaves the path as it is::

    location /llm/ { proxy_pass http://127.0.0.1:8000; proxy_set_header X-Forwarded-Proto $scheme;
                     proxy_set_header X-Forwarded-For $remote_addr; proxy_set_header Host $http_host; }
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.routing import Mount
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from pagedkv.engine import LLM, AsyncEngine
from pagedkv.models import shipped_model_path
from pagedkv.server import ServerConfig, create_app


def behind_proxy(llm: LLM, path: str, trusted: str = "127.0.0.1") -> ProxyHeadersMiddleware:
    """Return the application that serves an engine under `path`, for a proxy with this address."""
    app = create_app(AsyncEngine(llm), ServerConfig(model_name="pysmall"))

    @asynccontextmanager
    async def lifespan(outer: Starlette) -> AsyncIterator[None]:
        async with app.router.lifespan_context(app):  # a mounted application is not started by itself
            yield

    outer = Starlette(routes=[Mount(path, app)], lifespan=lifespan)
    return ProxyHeadersMiddleware(outer, trusted_hosts=trusted)  # type: ignore[arg-type]  # uvicorn says less of ASGI


def main() -> None:
    import uvicorn

    llm = LLM(str(shipped_model_path()), num_blocks=512)
    uvicorn.run(behind_proxy(llm, "/llm"), host="127.0.0.1", port=8000, proxy_headers=False)


if __name__ == "__main__":
    main()
