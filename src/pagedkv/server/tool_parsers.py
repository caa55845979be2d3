"""Tool calls in the text of a model: streaming parsers for the forms in which families of models write them.

A parser takes a text piece by piece and tells what is said and what is called. However the text is cut into pieces, the
deltas add up to the same: every parser reads one character after the other. What may yet become a call is held back
until it is one, or is not; then it is text, to the letter. White space beside calls is no text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Generator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from pagedkv.server.tool_values import FUNCTION_NAME, is_utf8, json_of_literal, json_of_text, kinds_of

_quoted = json.JSONEncoder(ensure_ascii=False).encode

T = TypeVar("T")
Reading = Generator[None, str, T]
"""Takes characters, the empty text at the end, until it has read a T."""


@dataclass(frozen=True, slots=True)
class TextDelta:
    """What is said beside calls.

    Attributes
    ----------
    text : str
    """

    text: str


@dataclass(frozen=True, slots=True)
class CallDelta:
    """A piece of a call.

    Attributes
    ----------
    index : int
        Which call, from 0 on.
    name : str or None
        Of the function: with the first piece only.
    arguments : str
        More of the text of the arguments, a JSON object in the end unless the model was cut off or writes no JSON.
    id : str or None
        Given by who reads for a client, with the name; parsers give none.
    """

    index: int
    name: str | None
    arguments: str
    id: str | None = None


Delta = TextDelta | CallDelta

_NAMES, _ARGUMENTS = ("name",), ("arguments", "parameters")
_OTHERS = ("id", "type", "index", "call_id")  # that some models write, too


class ToolParser:
    """Reads the text of one answer; the subclasses know one form of calls each.

    Parameters
    ----------
    names : collection of str
        Of the functions that there are. Forms without a mark of their own take nothing else for a call.
    schemas : mapping, optional
        The JSON Schema of the arguments of each: a form that writes bare text has their types from it.
    """

    marks: tuple[str, ...] = ()
    """Texts that open a call; tokenizers may have them as special tokens, which must not be skipped then."""

    def __init__(self, names: Collection[str] = (), schemas: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        self._names, self._schemas = frozenset(names), schemas or {}
        self._told: list[tuple[int | None, str | None, list[str]]] = []  # call, its name if it is new, pieces
        self._num_calls = 0
        self._held: list[str] = []  # read, and neither told nor taken for a call yet
        self._space = ""  # behind what is said: said, too, if more is
        self._c = ""  # the character that is to be read next; none at the end
        self._at_line_start = True
        self._reading = self._read_all()
        next(self._reading)

    def feed(self, text: str) -> list[Delta]:
        """Take the next piece of the text and return what it settles."""
        for character in text:
            self._reading.send(character)
        return self._settled()

    def end(self) -> list[Delta]:
        """Return what was held back: the text ends here. Nothing may be fed any more."""
        self._reading.send("")
        self._reading.close()
        if not self._num_calls and self._space:
            self._tell(self._space)
        return self._settled()

    def _settled(self) -> list[Delta]:
        told, self._told = self._told, []
        return [
            TextDelta("".join(pieces)) if index is None else CallDelta(index, name, "".join(pieces))
            for index, name, pieces in told
        ]

    # What is told.

    def _tell(self, text: str, index: int | None = None, name: str | None = None) -> None:
        """Tell more of the text or, with an index, of the arguments of a call."""
        if name is None and self._told and self._told[-1][0] == index:
            self._told[-1][2].append(text)
        else:
            self._told.append((index, name, [text]))

    def _say_held(self) -> None:
        """Tell what was held back as text."""
        text = "".join(self._held)
        self._held.clear()
        words = text.rstrip()
        if words:
            self._tell(self._space + words)
            self._space = ""
        self._space += text[len(words) :]
        self._at_line_start = text.endswith("\n") or (self._at_line_start and not words)

    def _begin(self, name: str, arguments: str = "") -> None:
        self._tell(arguments, self._num_calls, name)
        self._num_calls += 1
        self._space = ""
        self._at_line_start = True

    def _argue(self, text: str) -> None:
        self._tell(text, self._num_calls - 1)

    # How it is read.

    def _read_all(self) -> Reading[None]:
        self._c = yield
        while self._c:
            if (yield from self._call()):
                self._held.clear()
            else:
                if not self._held:
                    yield from self._advance()
                self._say_held()
        yield

    def _call(self) -> Reading[bool]:
        """Read a call if one begins here; if not, what was read is in `_held`."""
        raise NotImplementedError

    def _advance(self) -> Reading[None]:
        self._held.append(self._c)
        self._c = yield

    def _mark(self, mark: str) -> Reading[bool]:
        """Read a text; whether it stands here."""
        for character in mark:
            if self._c != character:
                return False
            yield from self._advance()
        return True

    def _skip(self, characters: str) -> Reading[None]:
        while self._c and self._c in characters:
            yield from self._advance()

    def _word(self) -> Reading[str]:
        """Read the name of a function or of an argument."""
        word = []
        while re.fullmatch(FUNCTION_NAME, self._c):
            word.append(self._c)
            yield from self._advance()
        return "".join(word)

    # JSON.

    def _string(self) -> Reading[str | None]:
        """Read a JSON string that names something and return what it says; None if it is none, or has quotes in it."""
        raw: list[str] = []
        while self._c and self._c >= " " and (raw or self._c == '"'):
            raw.append(self._c)
            yield from self._advance()
            if raw[-1] == '"' and len(raw) > 1:
                try:
                    return str(json.loads("".join(raw)))
                except ValueError:
                    return None
        return None

    def _json(self, buffer: list[str] | None) -> Reading[bool]:
        """Read a JSON value into a buffer or, if there is none, into the arguments; whether it came to its end."""
        depth, in_string, is_escaped = 0, False, False
        while self._c:
            c = self._c
            if not in_string and not depth and (c in ",]}" or c.isspace()):
                return True  # behind a number or a word
            if in_string:
                in_string = c != '"' or is_escaped
                is_escaped = c == "\\" and not is_escaped
            elif c == '"':
                in_string = True
            elif c in "{[":
                depth += 1
            elif c in "]}":
                depth -= 1
            if buffer is None:
                self._argue(c)
            else:
                buffer.append(c)
            yield from self._advance()
            if not in_string and not depth and c in '"]}':
                return True
        return False

    def _object(self, *, known: bool) -> Reading[bool]:
        """Read a JSON object that is a call, with the name first or the arguments; whether it is one.

        It counts as a call from where it has a name and the beginning of its arguments, whatever follows. With
        `known` the name has to be that of a function that there is.
        """
        name: str | None = None
        buffered: str | None = None
        has_begun = False
        if not (yield from self._mark("{")):
            return False
        while True:
            yield from self._skip(" \t\r\n")
            key = yield from self._string()
            yield from self._skip(" \t\r\n")
            if key not in (*_NAMES, *_ARGUMENTS, *_OTHERS) or not (yield from self._mark(":")):
                return has_begun
            yield from self._skip(" \t\r\n")
            if key in _NAMES and name is None:
                name = yield from self._string()
                if not name or not re.fullmatch(FUNCTION_NAME, name) or (known and name not in self._names):
                    return has_begun
            elif key in _ARGUMENTS and not has_begun and name is not None and self._c == "{":
                self._begin(name)
                has_begun = True
                if not (yield from self._json(None)):
                    return True
            else:
                value: list[str] = []
                if not (yield from self._json(value)):
                    return has_begun
                if key in _ARGUMENTS:
                    buffered = _arguments_of("".join(value))
                    if buffered is None:
                        return has_begun
            if name is not None and buffered is not None and not has_begun:
                self._begin(name, buffered)
                has_begun = True
            yield from self._skip(" \t\r\n")
            if self._c == ",":
                yield from self._advance()
                continue
            if self._c == "}" and name is not None:
                yield from self._advance()
                if not has_begun:
                    self._begin(name, "{}")
                return True
            return has_begun


def _arguments_of(raw: str) -> str | None:
    """Return the text of arguments that are an object, a string that holds one, or null; None if they are neither."""
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    if isinstance(value, str):
        return (value if is_utf8(value) else None) if value.strip() else "{}"
    return "{}" if value is None else raw if isinstance(value, dict) else None


class Hermes(ToolParser):
    """``<tool_call>{"name": …, "arguments": {…}}</tool_call>``: Hermes, Qwen 2.5 and 3, and many that follow them."""

    marks = ("<tool_call>",)

    def _call(self) -> Reading[bool]:
        if not (yield from self._mark("<tool_call>")):
            return False
        yield from self._skip(" \t\r\n")
        if not (yield from self._object(known=False)):
            return False
        self._held.clear()
        yield from self._skip(" \t\r\n}]")  # a bracket too many
        self._held.clear()
        return (yield from self._mark("</tool_call>")) or not self._held


class Llama3Json(ToolParser):
    """``{"name": …, "parameters": {…}}``: Llama 3, several with semicolons between them, perhaps after a tag.

    Without the tag a call begins a line, and names a function that there is.
    """

    marks = ("<|python_tag|>",)

    def _call(self) -> Reading[bool]:
        has_tag = yield from self._mark("<|python_tag|>")
        if self._held and not has_tag:
            return False
        if has_tag:
            yield from self._skip(" \t\r\n")
        if not (has_tag or self._at_line_start) or not (yield from self._object(known=not has_tag)):
            return False
        while True:
            self._held.clear()
            yield from self._skip(" \t\r\n;")
            if self._c != "{" or not (yield from self._object(known=not has_tag)):
                return not self._c and not "".join(self._held).strip(" \t\r\n;")


class Mistral(ToolParser):
    """``[TOOL_CALLS] [{"name": …, "arguments": {…}}, …]``, or, with newer models, ``[TOOL_CALLS]name{…}`` for each."""

    marks = ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]")

    def _call(self) -> Reading[bool]:
        if not (yield from self._mark("[TOOL_CALLS]")):
            return False
        yield from self._skip(" \t\r\n")
        return (yield from self._array()) if self._c == "[" else (yield from self._named())

    def _array(self) -> Reading[bool]:
        yield from self._advance()
        before = self._num_calls
        while True:
            yield from self._skip(" \t\r\n,")
            if not (yield from self._object(known=False)):
                if self._num_calls == before:
                    return False
                return (yield from self._mark("]")) or not self._held
            self._held.clear()

    def _named(self) -> Reading[bool]:
        name = yield from self._word()
        if not re.fullmatch(FUNCTION_NAME, name):
            return False
        if self._c == "[" and (yield from self._mark("[")):
            if self._c == "C":
                if not (yield from self._mark("CALL_ID]")):
                    return False
                yield from self._word()
                if not (yield from self._mark("[")):
                    return False
            if not (yield from self._mark("ARGS]")):
                return False
        yield from self._skip(" \t\r\n")
        if self._c != "{":
            return False
        self._begin(name)
        yield from self._json(None)
        return True


class Pythonic(ToolParser):
    """``[name(key=value, …), …]``: Llama 3.2 and 4, ToolACE; a list of calls with keywords and literals.

    It begins a line or follows ``<|python_start|>``, and names functions that there are. A value that is no literal is
    given as its text.
    """

    marks = ("<|python_start|>", "<|python_end|>")

    def _call(self) -> Reading[bool]:
        has_tag = yield from self._mark("<|python_start|>")
        if self._held and not has_tag:
            return False
        if has_tag:
            yield from self._skip(" \t\r\n")
        if not (has_tag or self._at_line_start) or not (yield from self._list()):
            return False
        self._held.clear()
        if has_tag:
            yield from self._skip(" \t\r\n")
            return (yield from self._mark("<|python_end|>")) or not self._c
        return True

    def _list(self) -> Reading[bool]:
        if not (yield from self._mark("[")):
            return False
        before = self._num_calls
        while True:
            yield from self._skip(" \t\r\n")
            if self._num_calls > before and (yield from self._mark("]")):
                return True
            if not (yield from self._one()):
                return False
            self._held.clear()
            yield from self._skip(" \t\r\n")
            if self._c != ",":
                yield from self._mark("]")
                return True
            yield from self._advance()

    def _one(self) -> Reading[bool]:
        """Read one call of the list; it counts from where its first argument, or that it has none, is read."""
        name = yield from self._word()
        if name not in self._names or not (yield from self._mark("(")):
            return False
        has_begun = False
        while True:
            yield from self._skip(" \t\r\n")
            if self._c == ")":
                yield from self._advance()
                if has_begun:
                    self._argue("}")
                else:
                    self._begin(name, "{}")
                return True
            key = yield from self._word()
            yield from self._skip(" \t\r\n")
            if not key or not (yield from self._mark("=")):
                return has_begun
            source = yield from self._expression()
            if not self._c:
                return has_begun
            if not has_begun:
                self._begin(name)
            self._argue(f"{', ' if has_begun else '{'}{json.dumps(key)}: {json_of_literal(source)}")
            has_begun = True
            if self._c == ",":
                yield from self._advance()

    def _expression(self) -> Reading[str]:
        """Read up to the comma or the bracket behind a value."""
        source, depth, quote, is_escaped = [], 0, "", False
        while self._c:
            c = self._c
            if quote:
                quote = "" if c == quote and not is_escaped else quote
                is_escaped = c == "\\" and not is_escaped
            elif not depth and c in ",)":
                break
            elif c in "\"'":
                quote = c
            elif c in "([{":
                depth += 1
            elif c in ")]}":
                depth -= 1
            source.append(c)
            yield from self._advance()
        return "".join(source).strip()


class Qwen3Coder(ToolParser):
    """``<function=name><parameter=key>value</parameter>…</function>`` within ``<tool_call>``: Qwen3-Coder, Qwen 3.5.

    Values are bare text, of the type that the schema of the function gives. The outer mark may be missing before the
    name of a function that there is, at the beginning of a line.
    """

    marks = ("<tool_call>",)

    def _call(self) -> Reading[bool]:
        is_line_start = self._at_line_start
        if not (yield from self._mark("<")):
            return False
        has_mark = self._c == "t"
        if has_mark:
            if not (yield from self._mark("tool_call>")):
                return False
            yield from self._skip(" \t\r\n")
            if not (yield from self._mark("<")):
                return False
        if not (yield from self._mark("function=")):
            return False
        name = yield from self._word()
        is_name = re.fullmatch(FUNCTION_NAME, name) if has_mark else is_line_start and name in self._names
        if not is_name or not (yield from self._mark(">")):
            return False
        self._begin(name)
        yield from self._parameters(self._schemas.get(name) or {})
        self._held.clear()
        yield from self._skip(" \t\r\n")
        return (yield from self._mark("</tool_call>")) or not self._held

    def _parameters(self, schema: Mapping[str, Any]) -> Reading[None]:
        """Read up to the end of the function; what is neither that nor a parameter ends it, too."""
        properties = schema.get("properties")
        properties = properties if isinstance(properties, Mapping) else {}
        before = "{"
        while True:
            yield from self._skip(" \t\r\n")
            if not self._c or not (yield from self._mark("<")):
                break
            if self._c != "p" or not (yield from self._mark("parameter=")):
                if (yield from self._mark("/")):
                    yield from self._mark("function>" if self._c == "f" else "tool_call>")
                break
            key = yield from self._key()
            if not key:
                break
            self._argue(f"{before}{json.dumps(key, ensure_ascii=False)}: ")
            before = ", "
            if not (yield from self._value(kinds_of(properties.get(key), schema))):
                return
        self._argue("}" if before == ", " else "{}")

    def _key(self) -> Reading[str]:
        key = []
        while self._c and self._c not in "<>\n":
            key.append(self._c)
            yield from self._advance()
        return "".join(key).strip() if (yield from self._mark(">")) else ""

    def _value(self, kinds: frozenset[str]) -> Reading[bool]:
        """Read a value into the arguments, without the line breaks around it; whether it came to its end.

        A text is told as it is read, anything else in the end.
        """
        end, is_text = "</parameter>", kinds == {"string"}
        yield from self._skip_one("\n")
        if is_text:
            self._argue('"')
        text, tail = [], ""  # of the tail nobody knows yet whether it is text
        while self._c and tail not in (end, f"\n{end}"):
            tail += self._c
            yield from self._advance()
            while not (end.startswith(tail) or f"\n{end}".startswith(tail)):
                if is_text:
                    self._argue(_quoted(tail[0])[1:-1])
                else:
                    text.append(tail[0])
                tail = tail[1:]
        is_whole = tail in (end, f"\n{end}")
        if is_text and is_whole:
            self._argue('"')
        elif is_whole:
            self._argue(json_of_text("".join(text), kinds))
        return is_whole

    def _skip_one(self, character: str) -> Reading[None]:
        if self._c == character:
            yield from self._advance()


PARSERS: dict[str, type[ToolParser]] = {
    "hermes": Hermes,
    "llama3_json": Llama3Json,
    "mistral": Mistral,
    "pythonic": Pythonic,
    "qwen3_coder": Qwen3Coder,
}
"""By the names that vLLM gives them."""
