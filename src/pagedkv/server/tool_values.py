"""Names that functions may have, and values of arguments that a model writes without JSON: Python's, or bare text."""

from __future__ import annotations

import ast
import json
import warnings
from collections.abc import Mapping
from typing import Any

FUNCTION_NAME = r"[A-Za-z0-9_.\-]{1,256}"

_WORDS = {"true": True, "false": False, "null": None}
_PYTHON_WORDS = {"True": True, "False": False, "None": None}
_KINDS = ("null", "boolean", "integer", "number", "string", "array", "object")


def is_utf8(text: str) -> bool:
    """Whether a text has no halves of surrogate pairs, which escapes can bring."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def json_of_literal(source: str) -> str:
    """Return the JSON of a literal of JSON or of Python; of what is none, the JSON of its text."""
    try:
        text = json.dumps(json.loads(source), ensure_ascii=False, allow_nan=False)
        return text if is_utf8(text) else json.dumps(source)
    except (ValueError, RecursionError):
        pass
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes that Python does not know
            value = _literal(ast.parse(source, mode="eval").body)
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        return text if is_utf8(text) else json.dumps(value)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return json.dumps(source, ensure_ascii=False)


def _literal(node: ast.expr) -> Any:
    match node:
        case ast.Constant(value=str() | int() | float() | bool() | None as value):
            return value
        case ast.Name(id=name) if name in _WORDS:
            return _WORDS[name]
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_literal(item) for item in items]
        case ast.Dict(keys=keys, values=values):
            named = [key.value for key in keys if isinstance(key, ast.Constant) and isinstance(key.value, str)]
            return dict(zip(named, map(_literal, values), strict=True))
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            return -value
    raise ValueError("no literal")


def kinds_of(schema: Any, root: Mapping[str, Any], depth: int = 8) -> frozenset[str]:
    """Return the types of JSON that a schema allows, by ``type``, ``enum``, ``const``, ``anyOf``, ``oneOf`` and
    ``$ref`` within `root`; all of them where these do not say.
    """
    if not isinstance(schema, Mapping) or not depth:
        return frozenset(_KINDS)
    if isinstance(schema.get("type"), str):
        return frozenset([schema["type"]])
    if isinstance(schema.get("type"), list):
        return frozenset(filter(lambda kind: isinstance(kind, str), schema["type"]))
    if isinstance(schema.get("enum"), list):
        return frozenset(map(_kind, schema["enum"]))
    if "const" in schema:
        return frozenset([_kind(schema["const"])])
    if isinstance(reference := schema.get("$ref"), str):
        place, _, name = reference.rpartition("/")
        known = root.get(place.removeprefix("#/"))
        return kinds_of(known.get(name) if isinstance(known, Mapping) else None, root, depth - 1)
    for key in ("anyOf", "oneOf"):
        if isinstance(options := schema.get(key), list):
            return frozenset().union(*(kinds_of(option, root, depth - 1) for option in options))
    return frozenset(_KINDS)


def json_of_text(text: str, kinds: frozenset[str]) -> str:
    """Return the JSON of a bare text whose value is of one of some types.

    JSON of such a type, ``True``, ``False`` and ``None`` are what they say; else it is a text, if that may be, but for
    text in quotes where also other things than text may stand: that is JSON, too.
    """
    try:
        value = _PYTHON_WORDS[text] if text in _PYTHON_WORDS else json.loads(text)
        written = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (ValueError, RecursionError):
        pass
    else:
        is_bare = isinstance(value, str) and kinds == frozenset(_KINDS)  # of no type in particular: with its quotes
        if not is_bare and _is_of(value, kinds) and is_utf8(written):
            return written
    return json.dumps(text, ensure_ascii=False) if "string" in kinds else json_of_literal(text)


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "boolean"
    names = {int: "integer", float: "number", str: "string", list: "array", dict: "object"}
    return names.get(type(value), "null")


def _is_of(value: Any, kinds: frozenset[str]) -> bool:
    kind = _kind(value)
    return kind in kinds or (kind == "integer" and "number" in kinds)
