"""Tools of a chat: what a request says of them, how the model is told, and the calls in its answer.

A model writes calls in the form of its family, by which its chat template can be told. A model whose template does not
know of tools, or that has none, is told in the system's message, in the form of Hermes.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import string
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from pagedkv.engine.structured import WHITESPACE, with_exact_formats
from pagedkv.errors import InvalidOperation, bad_argument
from pagedkv.server.schemas import AllowedToolsChoice, ChatMessage, Tool, ToolChoice, ToolRef
from pagedkv.server.structure import AskedStructure
from pagedkv.server.tool_parsers import PARSERS, Delta, TextDelta, ToolParser
from pagedkv.server.tool_values import FUNCTION_NAME, is_utf8, kinds_of

# Which form.

_SIGNS = (
    ("mistral", r"\[TOOL_CALLS\]"),
    ("pythonic", r"\[func_name1\(|<\|python_start\|>"),
    ("llama3_json", r"<\|python_tag\|>|ipython"),
    ("qwen3_coder", r"<function=[\s\S]*<parameter="),
    ("hermes", r"^(?![\s\S]*(?:<function=|<arg_key>))[\s\S]*<tool_call>"),
)
"""What the chat templates of a family have, and those of the families before it have not."""


def knows_tools(template: str | None) -> bool:
    """Whether a chat template writes tools by itself."""
    return template is not None and re.search(r"\btools\b", template) is not None


def form_of(template: str | None, asked: str | None = None) -> str | None:
    """Return the name of the form in which a model writes calls; None if its template has one that is not known.

    Parameters
    ----------
    template : str, optional
        The chat template.
    asked : str, optional
        What the operator says.
    """
    if asked is not None or not knows_tools(template):
        return asked or "hermes"
    return next((name for name, sign in _SIGNS if re.search(sign, template or "")), None)


# What a request says.


@dataclass(frozen=True, kw_only=True)
class ToolUse:
    """The tools of a request and what may, or must, be called of them.

    Attributes
    ----------
    form : str
        How calls are written: a key of ``PARSERS``.
    tools : tuple of Tool
        That the model is told of.
    callable : tuple of Tool
        That it may call; none where it must not call at all.
    required : bool
        Whether it has to call one of them.
    parallel : bool
        Whether an answer may hold several calls.
    """

    form: str
    tools: tuple[Tool, ...]
    callable: tuple[Tool, ...]
    required: bool = False
    parallel: bool = True

    @property
    def told(self) -> list[dict[str, Any]]:
        """The tools as chat templates take them."""
        return [_told(tool) for tool in self.tools]

    def shows_marks(self, special: Mapping[str, int]) -> bool:
        """Whether a mark of calls is a special token, so that these must not be skipped."""
        return bool(self.callable) and any(mark in special for mark in PARSERS[self.form].marks)

    def reader(self) -> MessageReader:
        """Return what reads one answer."""
        if not self.callable:
            return MessageReader()
        functions = [tool.function for tool in self.callable]
        schemas = {function.name: function.parameters or {} for function in functions}
        parser = PARSERS[self.form]([function.name for function in functions], schemas)
        return MessageReader(
            parser,
            new_id=_mistral_id if self.form == "mistral" else _id,
            most=None if self.parallel else 1,
            has_text=not self.required,
        )


def tool_use(
    tools: Sequence[Tool] | None,
    choice: ToolChoice | None = None,
    *,
    parallel: bool | None = None,
    template: str | None = None,
    asked: str | None = None,
) -> ToolUse | None:
    """Return what a request says of tools; None if it has none.

    Parameters
    ----------
    tools : sequence of Tool, optional
    choice : ToolChoice, optional
        auto by default.
    parallel : bool, optional
        Whether an answer may hold several calls; true by default.
    template : str, optional
        The chat template.
    asked : str, optional
        The form that the operator says.

    Raises
    ------
    InvalidOperation
        It chooses a tool that there is not, or the model's form is not known.
    """
    tools, choice, parallel = tuple(tools or ()), choice or "auto", parallel is not False
    if not tools:
        if choice not in ("none", "auto"):
            raise bad_argument("tool_choice", "none or auto where there are no tools", _shown(choice))
        return None
    if not is_utf8(json.dumps([_told(tool) for tool in tools], ensure_ascii=False)):
        raise bad_argument("tools", "whole characters", "a half of one, by an escape")
    names = [tool.function.name for tool in tools]
    if len(set(names)) < len(names):
        raise bad_argument("tools", "functions of different names", repr(max(names, key=names.count)))
    form = form_of(template, asked)
    if choice == "none":
        return ToolUse(form=form or "hermes", tools=tools, callable=())
    if form is None:
        known = ", ".join(PARSERS)
        message = f"tools: how this model writes calls is not known by its chat template; --tool-parser tells: {known}"
        raise InvalidOperation(message, "tools")
    if isinstance(choice, AllowedToolsChoice):
        allowed = _chosen(tools, choice.allowed_tools.tools)
        required = choice.allowed_tools.mode == "required"
        return ToolUse(form=form, tools=allowed, callable=allowed, required=required, parallel=parallel)
    if isinstance(choice, ToolRef):
        return ToolUse(form=form, tools=tools, callable=_chosen(tools, [choice]), required=True, parallel=False)
    return ToolUse(form=form, tools=tools, callable=tools, required=choice == "required", parallel=parallel)


def _chosen(tools: Sequence[Tool], refs: Sequence[ToolRef]) -> tuple[Tool, ...]:
    wanted = [ref.function.name for ref in refs]
    if missing := set(wanted) - {tool.function.name for tool in tools}:
        raise bad_argument("tool_choice", "names of tools", repr(min(missing)))
    return tuple(tool for tool in tools if tool.function.name in wanted)


def _shown(choice: Any) -> str:
    return repr(choice) if isinstance(choice, str) else choice.type


def _told(tool: Tool) -> dict[str, Any]:
    function = tool.function
    described = {} if function.description is None else {"description": function.description}
    parameters = function.parameters or {"type": "object", "properties": {}}
    return {"type": "function", "function": {"name": function.name, **described, "parameters": parameters}}


# What an answer has to be where a call is required.

_ENFORCEABLE = "JSON Schemas that can be enforced"
MOST_CALLS = 16
"""That a required answer may hold: a model that does not know when to end would go on."""


def structure_beside(
    use: ToolUse | None, asked: AskedStructure | None, special: Mapping[str, int]
) -> AskedStructure | None:
    """Return what an answer has to follow: calls that are required, or what is asked for, or either calls or JSON.

    Parameters
    ----------
    use : ToolUse, optional
    asked : AskedStructure, optional
        What the answer follows if nothing is called.
    special : mapping
        Special tokens to their ids: the text of one does not stand for it in a grammar.

    Raises
    ------
    InvalidOperation
        The arguments of a function cannot be written in the form of the model, or something else than JSON is asked
        for where the model may also call.
    """
    if use is None or not use.callable or (asked is None and not use.required):
        return asked
    rules = rules_of_calls(use, special)
    if use.required:
        return AskedStructure("tools", {"grammar": "\n".join(["start: calls", *rules])}, {}, _ENFORCEABLE)
    if asked is None or asked.options.get("json") is None:
        raise bad_argument(asked.field if asked else "tools", "JSON where tools may be called", "something else")
    schema, spaces = asked.options["json"], asked.options.get("whitespace")
    try:
        parsed = json.loads(schema) if isinstance(schema, str) else {"type": "object"} if schema is True else schema
    except (ValueError, RecursionError):
        return asked  # which says what is wrong
    if not isinstance(parsed, Mapping):
        return asked
    options = {"whitespace_pattern": WHITESPACE if spaces is None else spaces, "lenient": False}
    grammar = "\n".join(["start: calls | answer", f"answer: {_lark_of(parsed, options)}", *rules])
    return AskedStructure(asked.field, {"grammar": grammar}, {}, _ENFORCEABLE)


def rules_of_calls(use: ToolUse, special: Mapping[str, int]) -> list[str]:
    """Return the rules, in Lark as llguidance extends it, of one or several `calls` in the form of the model."""
    opening, between, closing = _AROUND[use.form]
    mark = next((mark for mark in PARSERS[use.form].marks if opening.startswith(mark)), "")
    if mark in special:
        before = f"<[{special[mark]}]> {_quoted(opening.removeprefix(mark))}"
    else:
        before = _quoted(opening)
    # Some have their marks around each call, the others around all of them.
    one, all_of_them = ("call", f"{before} {{}} {_quoted(closing)}")
    if use.form in ("hermes", "qwen3_coder"):
        one, all_of_them = f"({all_of_them.format('call')})", "{}"
    several = f"{one} ({_quoted(between)} {one}){{0,{MOST_CALLS - 1}}}" if use.parallel else one
    rules = [f"calls: {all_of_them.format(several)}"]
    rules.append("call: " + " | ".join(f"call_{number}" for number in range(len(use.callable))))
    write = {"pythonic": _pythonic_rules, "qwen3_coder": _bare_rules}.get(use.form, partial(_json_rules, form=use.form))
    for number, tool in enumerate(use.callable):
        rules += write(tool, number)
    return rules


_AROUND = {
    "hermes": ("<tool_call>\n", "\n", "\n</tool_call>"),
    "llama3_json": ("", "; ", ""),
    "mistral": ("[TOOL_CALLS] [", ", ", "]"),
    "pythonic": ("[", ", ", "]"),
    "qwen3_coder": ("<tool_call>\n", "\n", "\n</tool_call>"),
}
"""What stands before calls, between two, and behind them."""


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if text else ""


def _json_rules(tool: Tool, number: int, form: str) -> list[str]:
    key = "parameters" if form == "llama3_json" else "arguments"
    opening = f'{{"name": {json.dumps(tool.function.name)}, "{key}": '
    schema = _schema_of(tool)
    return [f'call_{number}: {_quoted(opening)} args_{number} "}}"', f"args_{number}: {_of_json(schema, tool)}"]


def _pythonic_rules(tool: Tool, number: int) -> list[str]:
    """Return the rules of a call with keywords: properties in order, those that are not required may be missing."""
    schema = _schema_of(tool)
    properties, required = schema.get("properties", {}), schema.get("required", ())
    for name in (*properties, *required):
        if name not in properties or not re.fullmatch(FUNCTION_NAME, name):
            raise bad_argument("tools", "properties that can be names of arguments in Python", repr(name[:40]))
    rules = [f'call_{number}: {_quoted(tool.function.name + "(")} first_{number}_0 ")"']
    defs = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    for place, (name, value) in enumerate(properties.items()):
        rest, item = f"{number}_{place + 1}", f"{_quoted(name + '=')} value_{number}_{place}"
        more, skip = f'", " {item} more_{rest}', name not in required
        rules += [
            f"first_{number}_{place}: {item} more_{rest}" + f" | first_{rest}" * skip,
            f"more_{number}_{place}: {more}" + f" | more_{rest}" * skip,
            f"value_{number}_{place}: {_of_json({**defs, **value} if isinstance(value, dict) else value, tool)}",
        ]
    return [*rules, f'first_{number}_{len(properties)}: ""', f'more_{number}_{len(properties)}: ""']


_END_OF_VALUE = "\n</parameter>\n"


def _bare_rules(tool: Tool, number: int) -> list[str]:
    """Return the rules of a call whose values are bare text: properties in order, as with keywords."""
    schema = _schema_of(tool)
    properties, required = schema.get("properties", {}), schema.get("required", ())
    defs = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    rules, items = [], []
    for place, name in enumerate(dict.fromkeys((*properties, *required))):
        if name not in properties or re.search(r"[<>\n]", name) or name != name.strip():
            raise bad_argument("tools", "properties that can be names of parameters in a tag", repr(name[:40]))
        value = properties[name]
        rule, opening = f"value_{number}_{place}", _quoted(f"<parameter={name}>\n")
        if kinds_of(value, schema) != {"string"}:
            given = {**defs, **value} if isinstance(value, dict) else value
            rules += [f"{rule}: json_{number}_{place} {_quoted(_END_OF_VALUE)}"]
            rules += [f"json_{number}_{place}: {_of_json(given, tool)}"]
        elif words := _words_of(value):
            rules += [f"{rule}: ({' | '.join(map(_quoted, words))}) {_quoted(_END_OF_VALUE)}"]
        else:
            if tool.function.strict and (wanted := {"pattern", "format", "minLength", "maxLength"} & set(value)):
                raise bad_argument("tools", _ENFORCEABLE, f"{min(wanted)} of a text that is written without quotes")
            rules += [f"{rule}[suffix={_quoted(_END_OF_VALUE)}]: /(?s:.*)/"]
        items.append(f"{opening} {rule}" if name in required else f"({opening} {rule})?")
    head = f"call_{number}: {_quoted(f'<function={tool.function.name}>' + chr(10))}"
    return [f"{head} {' '.join(items)} {_quoted('</function>')}", *rules]


def _words_of(schema: Mapping[str, Any]) -> list[str]:
    """Return the only texts that a schema allows, if it names them and they can be written bare."""
    words = schema.get("enum", [schema["const"]] if "const" in schema else [])
    return [word for word in words if isinstance(word, str) and word and _END_OF_VALUE.strip() not in word]


def _schema_of(tool: Tool) -> dict[str, Any]:
    """Return the schema of the arguments: an object that has no other properties, unless it says that it may."""
    return {"type": "object", "properties": {}, "additionalProperties": False, **(tool.function.parameters or {})}


def _of_json(schema: Any, tool: Tool) -> str:
    # What cannot be enforced is left out, but where the client insists on it.
    options = {"whitespace_pattern": " ?", "lenient": not tool.function.strict}
    given = schema if isinstance(schema, dict) else {"allOf": [schema]}
    return _lark_of(given, options)


def _lark_of(schema: Mapping[str, Any], options: Mapping[str, Any]) -> str:
    try:
        return f"%json {json.dumps({**with_exact_formats(dict(schema)), 'x-guidance': options})}"
    except RecursionError:
        raise bad_argument("tools", _ENFORCEABLE, "one that is nested too deeply") from None


# What is called in an answer.


@dataclass(slots=True)
class Call:
    """A call of a function.

    Attributes
    ----------
    id, name : str
    arguments : str
        The JSON of an object, unless the answer was cut off.
    """

    id: str
    name: str
    arguments: str

    @property
    def told(self) -> dict[str, Any]:
        """The call as OpenAI's clients know it."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


def _id() -> str:
    return f"call_{secrets.token_hex(12)}"


_LETTERS = string.ascii_letters + string.digits


def _mistral_id() -> str:
    """Return an id as the templates of Mistral want it."""
    return "".join(secrets.choice(_LETTERS) for _ in range(9))


@dataclass(eq=False)
class MessageReader:
    """Reads one answer, piece by piece: its text and its calls, which get ids.

    Attributes
    ----------
    parser : ToolParser, optional
        Without one all is text.
    new_id : callable
    most : int, optional
        Calls beyond are left out.
    has_text : bool
        Whether there is a text beside calls: what else there is, where calls are required, is a call that was cut off.
    calls : list of Call
        As far as they are read.
    """

    parser: ToolParser | None = None
    new_id: Callable[[], str] = _id
    most: int | None = None
    has_text: bool = True
    calls: list[Call] = field(default_factory=list)
    _said: list[str] = field(default_factory=list)

    @property
    def content(self) -> str | None:
        """The text, as far as it is read; None where there is none but calls."""
        return "".join(self._said) or (None if self.calls or not self.has_text else "")

    def read(self, text: str, *, is_last: bool = False) -> list[Delta]:
        """Take the next piece of the text and return what it settles."""
        deltas: list[Delta] = [TextDelta(text)] if text else []
        if self.parser is not None:
            deltas = self.parser.feed(text)
            if is_last:
                deltas += self.parser.end()
        return [kept for delta in deltas if (kept := self._note(delta)) is not None]

    def finish_reason(self, reason: str | None) -> str | None:
        """Return why the answer ended: to have tools called, or as the engine says."""
        return "tool_calls" if reason == "stop" and self.calls else reason

    def _note(self, delta: Delta) -> Delta | None:
        if isinstance(delta, TextDelta):
            if not self.has_text:
                return None
            self._said.append(delta.text)
        elif self.most is not None and delta.index >= self.most:
            return None
        elif delta.name is None:
            self.calls[-1].arguments += delta.arguments
        else:
            delta = replace(delta, id=self.new_id())
            self.calls.append(Call(delta.id or "", delta.name or "", delta.arguments))
        return delta


def told_delta(delta: Delta) -> dict[str, Any]:
    """Return a delta as OpenAI's clients know it."""
    if isinstance(delta, TextDelta):
        return {"content": delta.text}
    function = (
        {"arguments": delta.arguments} if delta.name is None else {"name": delta.name, "arguments": delta.arguments}
    )
    opening = {} if delta.name is None else {"id": delta.id, "type": "function"}
    return {"tool_calls": [{"index": delta.index, **opening, "function": function}]}


# How the model is told.


def chat_dicts(
    messages: Sequence[ChatMessage], form: str | None = None, *, as_text: bool = False
) -> list[dict[str, Any]]:
    """Return messages as chat templates take them: arguments of calls as mappings or, as few want it, as text.

    Raises
    ------
    InvalidOperation
        Arguments of a call are no JSON of an object.
    """
    names = {call.id: call.function.name for message in messages for call in message.tool_calls or () if call.id}
    known = _of_nine_letters if form == "mistral" else str
    dicts = []
    for place, message in enumerate(messages):
        # The newer name of the system's role is one that templates do not know.
        role = "system" if message.role == "developer" else message.role
        told: dict[str, Any] = {"role": role, "content": message.text}
        if message.role == "tool":
            name = message.name or names.get(message.tool_call_id or "")
            told |= {} if name is None else {"name": name}
            told |= {} if message.tool_call_id is None else {"tool_call_id": known(message.tool_call_id)}
        if message.tool_calls:
            told["tool_calls"] = [
                {
                    "id": known(call.id or f"call_{place}_{number}"),
                    "type": "function",
                    "function": {
                        "name": call.function.name,
                        "arguments": json.dumps(arguments, ensure_ascii=False) if as_text else arguments,
                    },
                }
                for number, call in enumerate(message.tool_calls)
                for arguments in [_arguments(call.function.arguments, place, number)]
            ]
        dicts.append(told)
    return dicts


def _of_nine_letters(call_id: str) -> str:
    """Return an id as Mistral's templates want it, the same for the same id."""
    if len(call_id) == 9 and all(letter in _LETTERS for letter in call_id):
        return call_id
    return hashlib.sha256(call_id.encode()).hexdigest()[:9]


def _arguments(text: str, place: int, number: int) -> dict[str, Any]:
    arguments, is_right = None, False
    with suppress(ValueError, RecursionError):
        arguments = json.loads(text) if text.strip() else {}
        is_right = isinstance(arguments, dict) and is_utf8(json.dumps(arguments, ensure_ascii=False))
    if not is_right or arguments is None:
        name = f"messages.{place}.tool_calls.{number}.function.arguments"
        raise bad_argument(name, "the JSON of an object", repr(text[:40]))
    return arguments


_HOW = {
    "hermes": 'write {"name": …, "arguments": {…}} between <tool_call> and </tool_call>',
    "llama3_json": 'answer with nothing but {"name": …, "parameters": {…}}',
    "mistral": 'answer with nothing but [TOOL_CALLS] [{"name": …, "arguments": {…}}]',
    "pythonic": "answer with nothing but [function_name(argument=value, …)]",
    "qwen3_coder": "write <function=name>, for each argument a line <parameter=name>, its value and a line "
    "</parameter>, and </function> between <tool_call> and </tool_call>",
}


def in_plain_words(messages: Sequence[ChatMessage], use: ToolUse | None) -> list[ChatMessage]:
    """Return a chat for a model that knows no tools: told in the system's message, calls and results as text."""
    form = "hermes" if use is None else use.form
    plain: list[ChatMessage] = []
    for place, message in enumerate(messages):
        if message.role == "tool":
            text = f"<tool_response>\n{message.text}\n</tool_response>"
            if place and messages[place - 1].role == "tool":  # roles have to alternate, with many templates
                text = f"{plain.pop().text}\n{text}"
            plain.append(ChatMessage(role="user", content=text))
        elif message.tool_calls:
            calls = [
                (call.function.name, _arguments(call.function.arguments, place, number))
                for number, call in enumerate(message.tool_calls)
            ]
            text = "\n".join(filter(None, [message.text, written(form, calls)]))
            plain.append(ChatMessage(role=message.role, content=text))
        else:
            plain.append(message)
    if use is None:
        return plain
    tools = "\n".join(json.dumps(told, ensure_ascii=False) for told in use.told)
    text = (
        f"You may call functions. These are their signatures:\n<tools>\n{tools}\n</tools>\nTo call one, {_HOW[form]}."
    )
    if plain and plain[0].role in ("system", "developer"):
        text = f"{plain.pop(0).text}\n\n{text}"
    return [ChatMessage(role="system", content=text), *plain]


def written(form: str, calls: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """Return calls as a model of a family writes them."""
    if form == "pythonic":
        lists = [f"{name}({', '.join(f'{key}={value!r}' for key, value in args.items())})" for name, args in calls]
        return f"[{', '.join(lists)}]"
    if form == "qwen3_coder":
        return "\n".join(_bare(name, arguments) for name, arguments in calls)
    key = "parameters" if form == "llama3_json" else "arguments"
    objects = [json.dumps({"name": name, key: arguments}, ensure_ascii=False) for name, arguments in calls]
    if form == "llama3_json":
        return "; ".join(objects)
    if form == "mistral":
        return f"[TOOL_CALLS] [{', '.join(objects)}]"
    return "\n".join(f"<tool_call>\n{each}\n</tool_call>" for each in objects)


def _bare(name: str, arguments: Mapping[str, Any]) -> str:
    texts = {
        key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for key, value in arguments.items()
    }
    parameters = "".join(f"<parameter={key}>\n{text}\n</parameter>\n" for key, text in texts.items())
    return f"<tool_call>\n<function={name}>\n{parameters}</function>\n</tool_call>"
