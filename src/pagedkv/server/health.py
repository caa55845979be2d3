"""Is it alive, and which version is it?"""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from pagedkv import __version__
from pagedkv.server.state import Server

__all__ = ["router"]

router = APIRouter(tags=["server"])


class Health(BaseModel):
    """Whether requests are taken."""

    status: Literal["ok", "draining", "dead"]


class Version(BaseModel):
    """Which pagedkv this is."""

    version: str


@router.get("/health", summary="Whether requests are taken", responses={503: {"model": Health}}, response_model=Health)
async def health(server: Server) -> Health | JSONResponse:
    """Answer 200 while requests are taken, 503 once the server drains or its engine has stopped."""
    status: Literal["ok", "draining", "dead"] = "draining" if server.draining else "ok"
    if not server.engine.is_alive:
        status = "dead"
    return Health(status=status) if status == "ok" else JSONResponse({"status": status}, 503)


@router.get("/version", summary="The version")
async def version() -> Version:
    """Return the version of pagedkv."""
    return Version(version=__version__)
