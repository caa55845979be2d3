"""OpenAPI document: what FastAPI does not know by itself."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

_REF = "#/components/schemas/{model}"
_CHUNKS: dict[str, type[BaseModel]] = {}
"""Objects that only streams hold, which FastAPI does not see."""


def answers_with_events(chunk: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """Return the successful answers of a route that sends events of this kind if ``stream`` is true."""
    return _streamed(chunk, "text/event-stream", f"Events whose data is a {chunk.__name__}; of the last one [DONE].")


def answers_with_named_events(chunk: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """Return the same for a route whose events have names, which are the types of their data."""
    return _streamed(chunk, "text/event-stream", f"Events whose data is a {chunk.__name__}, named by its type.")


def answers_with_lines(chunk: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """Return the same for a route that sends an object a line unless ``stream`` is false."""
    return _streamed(chunk, "application/x-ndjson", f"A {chunk.__name__} a line.")


def _streamed(chunk: type[BaseModel], media_type: str, text: str) -> dict[int | str, dict[str, Any]]:
    _CHUNKS[chunk.__name__] = chunk
    data = {"contentMediaType": "application/json", "contentSchema": {"$ref": _REF.format(model=chunk.__name__)}}
    return {
        200: {
            "description": "The whole answer, or its pieces as a stream.",
            "content": {media_type: {"schema": {"type": "string", "description": text, **data}}},
        }
    }


def complete_openapi(app: FastAPI, *, has_keys: bool) -> None:
    """Correct the OpenAPI document of an app.

    Parameters
    ----------
    app : FastAPI
    has_keys : bool
        Whether requests need a key; if not, the document must not say that they do.
    """
    of_fastapi = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = of_fastapi()
            _add_chunks(document)
            if not has_keys:
                _remove_keys(document)
        return app.openapi_schema or document

    app.openapi = openapi  # type: ignore[method-assign]


def _add_chunks(document: dict[str, Any]) -> None:
    """Add the objects that only streams hold."""
    chunks = [(model, "serialization") for model in _CHUNKS.values()]
    _, found = models_json_schema(chunks, ref_template=_REF)  # type: ignore[arg-type]
    known = document.setdefault("components", {}).setdefault("schemas", {})
    known |= {name: schema for name, schema in found["$defs"].items() if name not in known}


def _remove_keys(document: dict[str, Any]) -> None:
    document["components"].pop("securitySchemes", None)
    for methods in document["paths"].values():
        for operation in methods.values():
            operation.pop("security", None)
