"""How the OpenAPI document tells of answers that may be streams."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from pagedkv.server.schemas_chat import ChatChunk
from pagedkv.server.schemas_completion import CompletionChunk

__all__ = ["answers_with_events", "document_chunks"]

_REF = "#/components/schemas/{model}"


def answers_with_events(chunk: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """Return the successful answers of a route that sends events of this kind if ``stream`` is true."""
    data = {"contentMediaType": "application/json", "contentSchema": {"$ref": _REF.format(model=chunk.__name__)}}
    text = f"Events whose data is a {chunk.__name__}; the data of the last one is [DONE]."
    return {
        200: {
            "description": "The whole answer, or with stream its pieces as server-sent events.",
            "content": {"text/event-stream": {"schema": {"type": "string", "description": text, **data}}},
        }
    }


def document_chunks(app: FastAPI) -> None:
    """Add the objects that only streams hold to the OpenAPI document of an app."""
    of_fastapi = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = of_fastapi()
            _, chunks = models_json_schema(
                [(model, "serialization") for model in (CompletionChunk, ChatChunk)], ref_template=_REF
            )
            known = document.setdefault("components", {}).setdefault("schemas", {})
            known |= {name: schema for name, schema in chunks["$defs"].items() if name not in known}
        return app.openapi_schema or document

    app.openapi = openapi  # type: ignore[method-assign]
