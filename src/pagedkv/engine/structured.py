"""Structured output: the JSON Schema, regular expression, choice or grammar that a text has to follow."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from pagedkv.errors import MissingExtra, bad_argument

MOST_CHARACTERS = 1 << 18
MOST_OF_GBNF = 1 << 13  # it is turned into Lark by Python, in time quadratic in the rules
KINDS = ("json", "regex", "choice", "grammar")
ANY_OBJECT = '{"type":"object"}'
WHITESPACE = r"(\n[ \t]{0,32}| )?"
"""Between the tokens of JSON: a space, or a line break and an indent. Unbounded, a model may write spaces for ever."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Structured:
    """What a text has to follow, token by token: one of `json`, `regex`, `choice` and `grammar`; checked when made.

    What cannot be enforced is refused, never left out: JSON Schema's ``not``, ``if``, ``uniqueItems``, ``contains`` and
    ``propertyNames``, look-around and back-references of regular expressions. Properties are written in the order of
    the schema.

    Parameters
    ----------
    json : mapping, str or bool, optional
        A JSON Schema (draft 2020-12), as an object or as text; True for any object.
    regex : str, optional
        In the syntax of Rust's regex crate; the whole text matches it.
    choice : sequence of str, optional
        The text is one of these.
    grammar : str, optional
        A context-free grammar: Lark, as llguidance extends it, or GBNF.
    whitespace : str, optional
        Of `json`: a regular expression for what may stand between two tokens of JSON; ``""`` for nothing. By default a
        space, or a line break and an indent.

    Attributes
    ----------
    definition : str
        All of it, as llguidance takes it.

    Raises
    ------
    InvalidOperation
        Names the argument and what is wrong with it.
    MissingExtra
        llguidance is not installed.
    """

    json: Mapping[str, Any] | str | bool | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    whitespace: str | None = None
    definition: str = field(init=False, repr=False)

    def __post_init__(self) -> None:
        given = [name for name in KINDS if getattr(self, name) is not None]
        if len(given) != 1:
            raise bad_argument("structured", "one of json, regex, choice and grammar", " and ".join(given) or "none")
        if self.whitespace is not None:
            _require_text("whitespace", self.whitespace)
            if self.json is None:
                raise bad_argument("whitespace", "json beside it", given[0])
        if self.json is not None:
            self._set("json", _schema_text(self.json))
            definition = _of_schema(self.json, WHITESPACE if self.whitespace is None else self.whitespace)
        elif self.regex is not None:
            definition = _library().LLMatcher.grammar_from_regex(_require_text("regex", self.regex, 1))
        elif self.choice is not None:
            self._set("choice", _texts("choice", self.choice))
            definition = _library().LLMatcher.grammar_from_lark(_alternatives(self.choice))
        else:
            lark = _lark(_require_text("grammar", self.grammar, 1))
            definition = _library().LLMatcher.grammar_from_lark(lark)
        if fault := _fault(definition):
            raise bad_argument(given[0], _EXPECTED[given[0]], fault)
        self._set("definition", definition)

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)


_EXPECTED = {
    "json": "a JSON Schema that can be enforced",
    "regex": "a regular expression",
    "choice": "strings",
    "grammar": "a Lark or GBNF grammar",
}


def _library() -> Any:
    try:
        import llguidance
    except ModuleNotFoundError:
        raise MissingExtra("llguidance", "structured") from None
    return llguidance


def parser_limits() -> Any:
    """Return what a schema or grammar may take: about a second to compile, and some 20 ms a token at worst."""
    return _library().LLParserLimits(
        max_items_in_row=10_000, max_lexer_states=50_000, max_grammar_size=200_000, verbose_errors=False
    )


@lru_cache(64)
def _fault(definition: str) -> str:
    """Return what is wrong with a grammar; nothing if it is right."""
    is_wrong, said = _library().LLMatcher.validate_grammar_with_warnings(definition, limits=parser_limits())
    return in_a_line(said[0]) if is_wrong else ""


def in_a_line(message: str) -> str:
    """Return what matters of an error of several lines: what a regular expression is at fault for, or the first one."""
    lines = [line.strip() for line in message.splitlines() if line.strip()] or ["an error"]
    first = lines[0].removesuffix("regex parse error:").rstrip(" :")
    details = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return ": ".join(part[:200] for part in (first, *details) if part)


def _require_text(name: str, value: object, least: int = 0, most: int = MOST_CHARACTERS) -> str:
    if not isinstance(value, str) or not least <= len(value) <= most:
        got = f"{len(value)} characters" if isinstance(value, str) else f"{value!r:.80}"
        raise bad_argument(name, f"a str of {least} … {most} characters", got)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise bad_argument(name, "whole characters", "half of a surrogate pair") from None
    return value


def _texts(name: str, value: object) -> tuple[str, ...]:
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Sequence) or not value:
        raise bad_argument(name, "at least one string", f"{value!r:.80}")
    texts = tuple(_require_text(name, each, 1) for each in value)
    if sum(map(len, texts)) > MOST_CHARACTERS:
        raise bad_argument(name, f"at most {MOST_CHARACTERS} characters", f"{sum(map(len, texts))}")
    return tuple(dict.fromkeys(texts))


def _schema_text(schema: Mapping[str, Any] | str | bool) -> str:
    """Return a JSON Schema as JSON."""
    if schema is True:
        return ANY_OBJECT
    if isinstance(schema, Mapping):
        try:
            text = json.dumps(dict(schema), allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise bad_argument("json", _EXPECTED["json"], f"no JSON: {error}") from None
        return _require_text("json", text)
    if not isinstance(schema, str):
        raise bad_argument("json", f"{_EXPECTED['json']}, or True", f"{schema!r:.80}")
    _require_text("json", schema)
    try:
        parsed = json.loads(schema)
    except (ValueError, RecursionError) as error:
        raise bad_argument("json", _EXPECTED["json"], f"no JSON: {error}") from None
    if not isinstance(parsed, dict) and parsed is not True:
        raise bad_argument("json", _EXPECTED["json"], f"{schema:.80}")
    return "{}" if parsed is True else schema


def _of_schema(schema: Any, whitespace: str) -> str:
    # What a client says in the schema itself must not loosen it.
    options = {"whitespace_pattern": whitespace, "lenient": False}
    try:
        exact = with_exact_formats(json.loads(schema)) if '"format"' in schema else schema
        definition: str = _library().LLMatcher.grammar_from_json_schema(exact, overrides=options)
    except RecursionError as error:
        raise bad_argument("json", _EXPECTED["json"], f"one that is nested too deeply: {error}") from None
    return definition


# What llguidance's expressions of some formats let through: leap seconds at any time, 29 February in any year, and
# parts of addresses that are too long.
_DAY = (
    r"^(\d{4}-(0[13-9]|1\d|02-[01]|02-2[0-8])"
    r"|(\d\d(0[48]|[2468][048]|[13579][26])|([02468][048]|[13579][26])00)-02-29)"
)
_EXACT = {
    "date": (_DAY,),
    "time": ("^[^:]*:[^:]*:[0-5]",),
    "date-time": (_DAY, "^[^:]*:[^:]*:[0-5]"),
    "email": (r"^[^@]{1,64}@[^@.]{1,63}(\.[^@.]{1,63}){0,3}$",),
}
_OF_NAMES = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_OF_DATA = ("const", "enum", "default", "examples")


def with_exact_formats(schema: Any) -> Any:
    """Return a part of a JSON Schema with patterns beside the formats of which llguidance lets more through."""
    if isinstance(schema, list):
        return [with_exact_formats(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    made: dict[str, Any] = {}
    for key, value in schema.items():
        if key in _OF_NAMES and isinstance(value, dict):
            made[key] = {name: with_exact_formats(each) for name, each in value.items()}
        else:
            made[key] = value if key in _OF_DATA else with_exact_formats(value)
    named, others = made.get("format"), made.get("allOf", [])
    if isinstance(named, str) and named in _EXACT and isinstance(others, list):
        made["allOf"] = [*others, *({"pattern": pattern} for pattern in _EXACT[named])]
    return made


def _alternatives(choice: Sequence[str]) -> str:
    """Return the Lark grammar of one of some strings, which it quotes as JSON does."""
    return "start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in choice)


def _lark(grammar: str) -> str:
    """Return a grammar as Lark."""
    if any(_is_lark(line.strip()) for line in grammar.splitlines()):
        return grammar
    _require_text("grammar", grammar, most=MOST_OF_GBNF)
    _library()
    from llguidance.gbnf_to_lark import gbnf_to_lark

    try:
        lark: str = gbnf_to_lark(grammar)
    except Exception as error:  # it parses by hand, and has no errors of its own for all that can be wrong
        raise bad_argument("grammar", _EXPECTED["grammar"], in_a_line(f"{error}")) from None
    return lark


def _is_lark(line: str) -> bool:
    """Tell whether a line begins the rule that every Lark grammar has; GBNF has ``::=`` behind a name."""
    rest = line.removeprefix("start").lstrip()
    return line.startswith("%llguidance") or (line != rest and rest[:1] == ":" and not rest.startswith("::="))
