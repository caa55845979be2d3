"""Which models there are: one."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel

from pagedkv.server.auth import Client
from pagedkv.server.state import Server

__all__ = ["router"]

router = APIRouter(tags=["models"], dependencies=[Client])


class Model(BaseModel):
    """A model that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "pagedkv"
    max_model_len: int


class ModelList(BaseModel):
    """All of them."""

    object: Literal["list"] = "list"
    data: list[Model]


def _only_model(server: Server) -> Model:
    model = server.model
    return Model(id=model.name, created=model.created, max_model_len=model.max_model_len)


@router.get("/v1/models", summary="List the models")
async def list_models(server: Server) -> ModelList:
    """Return the model that is served."""
    return ModelList(data=[_only_model(server)])


@router.get("/v1/models/{name:path}", summary="Describe a model")
async def get_model(name: str, server: Server) -> Model:
    """Return the model of this name; 404 for any other."""
    server.model.check_name(name)
    return _only_model(server)
