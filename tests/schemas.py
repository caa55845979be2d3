"""Random JSON Schemas: every text that follows one comes to an end."""

from __future__ import annotations

import random
from typing import Any

FORMATS = ("date", "time", "date-time", "email", "uuid", "ipv4")
ENDLESS = ("time", "date-time", "email")
PATTERNS = (
    "^[a-z]{1,8}$",
    "^[A-Z][a-z]{0,5}-[0-9]{2,4}$",
    "^(red|green|blue)(ish)?$",
    r"^\d{3}[.,]\d{1,2}$",
    "[xyz]{2}$",
)
NAMES = ("id", "name", "größe", "e-mail", "kind", "value", "items", "is ok", "when", "αβ", 'a"b', "x")
DEEPEST = 3


def random_schema(seed: int) -> dict[str, Any]:
    """Return a schema of an object or an array, the same for the same seed."""
    chance = random.Random(seed)
    defined = {name: _scalar(chance) for name in ("One", "Two")}
    schema = chance.choice((_object, _object, _array))(chance, DEEPEST)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "$defs": defined, **schema}


def _any(chance: random.Random, depth: int) -> dict[str, Any]:
    if depth == 0 or chance.random() < 0.45:
        return {"$ref": f"#/$defs/{chance.choice(('One', 'Two'))}"} if chance.random() < 0.2 else _scalar(chance)
    return chance.choice((_object, _array, _tuple, _any_of, _nullable, _tagged))(chance, depth - 1)


def _scalar(chance: random.Random) -> dict[str, Any]:
    return chance.choice((_string, _string, _integer, _number, _enum, _const, _boolean))(chance)


def _string(chance: random.Random) -> dict[str, Any]:
    kind = chance.randrange(3)
    if kind == 0:
        named = chance.choice(FORMATS)
        return {"type": "string", "format": named, **({"maxLength": 40} if named in ENDLESS else {})}
    if kind == 1:
        return {"type": "string", "pattern": chance.choice(PATTERNS), "maxLength": 24}
    least = chance.randrange(4)
    return {"type": "string", "minLength": least, "maxLength": least + chance.randrange(1, 16)}


def _integer(chance: random.Random) -> dict[str, Any]:
    low = chance.randrange(-1000, 1000)
    bounds = {"minimum": low, "maximum": low + chance.randrange(1, 10_000)}
    if chance.random() < 0.3:
        bounds = {"exclusiveMinimum": low, "exclusiveMaximum": low + chance.randrange(20, 100)}
    return {"type": "integer", **bounds, **({"multipleOf": chance.choice((2, 5, 10))} if chance.random() < 0.3 else {})}


def _number(chance: random.Random) -> dict[str, Any]:
    low = chance.randrange(-50, 50)
    return {"type": "number", "minimum": low, "maximum": low + chance.randrange(1, 100), "multipleOf": 0.25}


def _enum(chance: random.Random) -> dict[str, Any]:
    values = ["a", "über", 'q"\\', 0, -1.5, True, None, [1, 2], {"k": "v"}]
    return {"enum": chance.sample(values, chance.randrange(1, 5))}


def _const(chance: random.Random) -> dict[str, Any]:
    return {"const": chance.choice(("fixed", 42, None, False, ["x", {"y": 1}], {"a": [], "b": "ß"}))}


def _boolean(chance: random.Random) -> dict[str, Any]:
    return {"type": "boolean", "description": "whether it is so"}


def _object(chance: random.Random, depth: int) -> dict[str, Any]:
    names = chance.sample(NAMES, chance.randrange(1, 5))
    schema: dict[str, Any] = {
        "type": "object",
        "title": "A thing",
        "properties": {name: _any(chance, depth) for name in names},
        "required": [name for name in names if chance.random() < 0.7],
        "additionalProperties": False,
    }
    if chance.random() < 0.15:
        more = chance.randrange(1, 3)
        named = {"^[a-z_]{1,6}$": _scalar(chance)}
        return {"type": "object", "patternProperties": named, "additionalProperties": False, "maxProperties": more}
    return schema


def _array(chance: random.Random, depth: int) -> dict[str, Any]:
    least = chance.randrange(3)
    most = least + chance.randrange(1, 4)
    return {"type": "array", "items": _any(chance, depth), "minItems": least, "maxItems": most}


def _tuple(chance: random.Random, depth: int) -> dict[str, Any]:
    parts = [_any(chance, depth) for _ in range(chance.randrange(1, 4))]
    return {"type": "array", "prefixItems": parts, "items": False, "minItems": len(parts)}


def _any_of(chance: random.Random, depth: int) -> dict[str, Any]:
    return {"anyOf": [_any(chance, depth) for _ in range(chance.randrange(2, 4))]}


def _nullable(chance: random.Random, depth: int) -> dict[str, Any]:
    return {"anyOf": [_any(chance, depth), {"type": "null"}]}


def _tagged(chance: random.Random, depth: int) -> dict[str, Any]:
    """A union that is told apart by a constant, as pydantic writes it."""
    kinds = [
        {
            "type": "object",
            "properties": {"kind": {"const": kind, "type": "string"}, "value": _any(chance, depth)},
            "required": ["kind", "value"],
            "additionalProperties": False,
        }
        for kind in ("circle", "square")
    ]
    return {"oneOf": kinds}
