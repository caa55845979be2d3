"""Structured output as clients ask for it: response_format, structured_outputs, guided_json and its other names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pagedkv.engine import Structured
from pagedkv.errors import InvalidOperation, MissingExtra, bad_argument
from pagedkv.server.errors import ApiError
from pagedkv.server.schemas import GenerationFields, ResponseFormat, StructuredOutputs


@dataclass(frozen=True, slots=True)
class AskedStructure:
    """What an answer shall follow, not yet checked: that may take a second.

    Attributes
    ----------
    field : str
        That of the request which asks for it, for errors.
    options : mapping
        Of :class:`pagedkv.engine.Structured`.
    names : mapping
        Those of the options to how the request calls them.
    expected : str
        What errors say that was expected, where that is not what the option says.
    """

    field: str
    options: Mapping[str, Any]
    names: Mapping[str, str]
    expected: str = ""

    def checked(self) -> Structured:
        """Return it as the engine takes it; 400, in the words of the request, if it makes no sense."""
        try:
            return Structured(**self.options)
        except InvalidOperation as error:
            raise self.fault(error) from None
        except MissingExtra as error:
            raise ApiError(400, f"{self.field}: {error}", param=self.field, code="unsupported_parameter") from None

    def fault(self, error: InvalidOperation) -> ApiError:
        """Return an error about an option as one about the field of the request."""
        name, reason = self.names.get(error.argument or "", self.field), error.reason.partition(": ")[2]
        if self.expected:
            reason = f"expected {self.expected}, got {reason.partition(', got ')[2]}"
        return ApiError(400, f"{name}: {reason}", param=name, code="invalid_value")


def asked_structure(body: GenerationFields) -> AskedStructure | None:
    """Return what an answer shall follow, if anything.

    Raises
    ------
    InvalidOperation
        Two fields ask for something, or one does not say what.
    """
    asked = list(_asked(body))
    if len(asked) > 1:
        raise bad_argument(asked[1].field, f"none beside {asked[0].field}", "both")
    return asked[0] if asked else None


def _asked(body: GenerationFields) -> Iterator[AskedStructure]:
    if body.response_format is not None:
        yield from _of_format(body.response_format)
    if body.structured_outputs is not None:
        yield from _of_outputs(body.structured_outputs)
    spaces = {} if body.guided_whitespace_pattern is None else {"whitespace": body.guided_whitespace_pattern}
    for field, option in _FLAT.items():
        value = getattr(body, field)
        if value not in (None, ""):
            options = {option: value, **(spaces if field == "guided_json" else {})}
            yield AskedStructure(field, options, {option: field, "whitespace": "guided_whitespace_pattern"})


_FLAT = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
    "json_schema": "json",
    "grammar": "grammar",
    "ebnf": "grammar",
    "regex": "regex",
}


def _of_format(form: ResponseFormat) -> Iterator[AskedStructure]:
    field, schema = "response_format", form.of_object
    if form.type == "text":
        return
    name = "response_format.schema"
    if form.type == "json_schema":
        name = "response_format.json_schema.schema"
        schema = schema if form.json_schema is None else form.json_schema.json_schema
        if schema is None:
            raise bad_argument(name, "a JSON Schema", "none")
    yield AskedStructure(field, {"json": True if schema is None else schema}, {"json": name})


def _of_outputs(asked: StructuredOutputs) -> Iterator[AskedStructure]:
    field = "structured_outputs"
    options: dict[str, Any] = {
        "json": True if asked.json_object and asked.of_json is None else asked.of_json,
        "regex": asked.regex,
        "choice": asked.choice,
        "grammar": asked.grammar,
        "whitespace": "" if asked.disable_any_whitespace else asked.whitespace_pattern,
    }
    names = {name: f"{field}.{name}" for name in options} | {"whitespace": f"{field}.whitespace_pattern"}
    yield AskedStructure(field, options, names)
