"""Forgetting what is cached."""

from __future__ import annotations

from fastapi import APIRouter
from pydantic import BaseModel, Field

from pagedkv.server.auth import Operator
from pagedkv.server.state import Server

__all__ = ["router"]

router = APIRouter(tags=["cache"], dependencies=[Operator])


class Cleared(BaseModel):
    """What was forgotten."""

    cleared_blocks: int = Field(description="Cached blocks that became free. Those in use stay.")


@router.post("/v1/cache/clear", summary="Forget all cached prefixes")
async def clear(server: Server) -> Cleared:
    """Forget all prefixes of all tenants; requests that run go on."""
    return Cleared(cleared_blocks=await server.engine.clear_prefix_cache())


@router.post("/reset_prefix_cache", summary="Forget all cached prefixes, under vLLM's name")
async def reset_prefix_cache(server: Server) -> Cleared:
    """Do the same as ``/v1/cache/clear``."""
    return await clear(server)
