"""One exam for all parsers of tool calls: what is called, what is text, and that no cut of the text matters."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagedkv.server.tool_parsers import PARSERS, CallDelta, TextDelta

NAMES = ("get_weather", "add", "now")
ARGUMENTS = {"city": 'Zürich → "x" </tool_call> [1] {', "days": [1, {"deep": True}], "none": None}


def call(name: str, arguments: Any, args: str = "arguments") -> str:
    return json.dumps({"name": name, args: arguments}, ensure_ascii=False)


def pythonic(name: str, arguments: dict[str, Any]) -> str:
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})"


def bare(name: str, arguments: dict[str, Any]) -> str:
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in arguments.items()}
    return (
        f"<function={name}>\n"
        + "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in texts.items())
        + "</function>"
    )


def written(form: str, *calls: tuple[str, dict[str, Any]]) -> str:
    """Write calls as a model of the family does."""
    match form:
        case "hermes":
            return "\n".join(f"<tool_call>\n{call(*each)}\n</tool_call>" for each in calls)
        case "llama3_json":
            return "; ".join(call(*each, args="parameters") for each in calls)
        case "mistral":
            return f"[TOOL_CALLS] [{', '.join(call(*each) for each in calls)}]"
        case "pythonic":
            return f"[{', '.join(pythonic(*each) for each in calls)}]"
        case "qwen3_coder":
            return "\n".join(f"<tool_call>\n{bare(*each)}\n</tool_call>" for each in calls)
    raise ValueError(form)


OTHER_WAYS = {
    "hermes": [
        '<tool_call>{"arguments": {"a": 1}, "name": "add"}</tool_call>',
        '<tool_call>{"name": "add", "arguments": {"a": 1}}}\n</tool_call>',
        '<tool_call>{"name": "add", "arguments": "{\\"a\\": 1}"}</tool_call>',
        '<tool_call>\n{"id": 7, "name": "add", "arguments": {"a": 1}}',
    ],
    "llama3_json": [
        '<|python_tag|>{"name": "add", "parameters": {"a": 1}}',
        '{"type": "function", "name": "add", "parameters": {"a": 1}};',
        '\n{ "name" : "add" , "arguments" : {"a": 1} }\n',
    ],
    "mistral": [
        '[TOOL_CALLS]add{"a": 1}',
        '[TOOL_CALLS]add[ARGS]{"a": 1}',
        '[TOOL_CALLS]add[CALL_ID]x1[ARGS]{"a": 1}',
        '[TOOL_CALLS][{"name": "add", "arguments": {"a": 1}, "id": "123456789"}]',
    ],
    "pythonic": [
        "<|python_start|>[add(a=1)]<|python_end|>",
        "[ add( a = 1 , ) , ]",
        "[add(a=+1 if True else 1)]",
    ],
    "qwen3_coder": [
        "<function=add>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>",
        "<function=add><parameter=a>1</parameter></function>",
        "<tool_call><function=add><parameter= a >1</parameter> </function></tool_call>",
        "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n</tool_call>",
        "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>",
    ],
}
TEXTS = [
    "",
    "nothing is called\n",
    "  white space \n\n",
    "half a mark <tool_c and <|python_ and [TOOL_ and [add",
    '<tool_call>no json</tool_call> [TOOL_CALLS] neither <|python_tag|>{"x": 1} <|python_start|>none',
    '{"name": "Ada", "parameters": "of life"}',
    '{"answer": 42}\n[1, 2, 3]\n[add](http://x)\n{"name": 3}',
    "<<tool_call[[TOOL_CALLS <|<|python_tag",
    'say {"name": "add", "parameters": {}} and [now()] in a line',
    '{"name": "add"',
    "a <function=add> in a line and\n<function=other>\n<function=add\n<parameter=a>1</parameter>",
]


def told(form: str, pieces: list[str]) -> tuple[str, list[tuple[str, str]]]:
    """Return the text and the calls, and see that the deltas are in order."""
    parser = PARSERS[form](NAMES)
    text, calls = "", []
    for delta in [each for piece in pieces for each in parser.feed(piece)] + parser.end():
        if isinstance(delta, TextDelta):
            assert delta.text
            text += delta.text
        elif delta.name is not None:
            assert isinstance(delta, CallDelta) and delta.index == len(calls)
            calls.append((delta.name, delta.arguments))
        else:
            assert delta.index == len(calls) - 1 and delta.arguments
            calls[-1] = calls[-1][0], calls[-1][1] + delta.arguments
    return text, calls


def parsed(calls: list[tuple[str, str]]) -> list[tuple[str, Any]]:
    return [(name, json.loads(arguments)) for name, arguments in calls]


@pytest.mark.parametrize("form", PARSERS)
def test_calls_are_found(form: str) -> None:
    wanted = [("get_weather", ARGUMENTS), ("now", {}), ("add", {"a": -1.5, "b": "it's"})]
    text, calls = told(form, [written(form, *wanted)])
    assert text == "" and parsed(calls) == wanted


@pytest.mark.parametrize(("form", "text"), [(form, text) for form, texts in OTHER_WAYS.items() for text in texts])
def test_other_ways_to_write_a_call(form: str, text: str) -> None:
    said, calls = told(form, [text])
    (only,) = calls
    assert said == "" and only[0] == "add"
    assert json.loads(only[1]) == ({"a": 1} if "if" not in text else {"a": "+1 if True else 1"})


@pytest.mark.parametrize("form", PARSERS)
@pytest.mark.parametrize("text", TEXTS)
def test_what_is_no_call_is_text_to_the_letter(form: str, text: str) -> None:
    assert told(form, [text]) == (text, [])


@pytest.mark.parametrize("form", PARSERS)
def test_text_beside_calls_is_text(form: str) -> None:
    once = written(form, ("now", {}))
    assert told(form, [f"I look.\n\n{once}\n"]) == ("I look.", [("now", "{}")])
    assert told(form, [f"I look.\n{once}\nDone.\n"]) == ("I look.\nDone.", [("now", "{}")])


@pytest.mark.parametrize("form", PARSERS)
def test_what_begins_like_a_call_is_held_back_and_the_arguments_are_not(form: str) -> None:
    parser = PARSERS[form](NAMES)
    text = written(form, ("get_weather", {"city": "Bern", "country": "CH"}))
    seen = [(place, delta) for place, c in enumerate(text) for delta in parser.feed(c)]
    assert all(isinstance(delta, CallDelta) for _, delta in seen)
    names = [delta.name for _, delta in seen if isinstance(delta, CallDelta)]
    assert names == ["get_weather", *[None] * (len(names) - 1)] and len(names) >= 3
    assert seen[0][0] < text.index("country") + 3


@pytest.mark.parametrize("form", PARSERS)
def test_a_call_that_is_cut_off_keeps_what_there_is(form: str) -> None:
    text = written(form, ("add", {"a": "x", "b": "y" * 20}))
    said, calls = told(form, [text[:-12]])
    assert said == "" and calls[0][0] == "add" and calls[0][1].startswith('{"a": "x"')
    assert told(form, [text[:4]]) == (text[:4], [])


@pytest.mark.parametrize("form", ["llama3_json", "pythonic"])
def test_forms_without_a_mark_take_no_functions_that_there_are_not(form: str) -> None:
    text = written(form, ("unknown", {"a": 1}))
    assert told(form, [text]) == (text, [])


def test_forms_with_a_mark_take_any_name() -> None:
    for form in ("hermes", "mistral", "qwen3_coder"):
        assert told(form, [written(form, ("unknown", {}))]) == ("", [("unknown", "{}")])


@pytest.mark.parametrize(
    "value", ["[(1, 2), {'a': None}]", "[true, null]", "'\\d'", "{1: 2}", "f(x)", "'a' 'b'", "(" * 300]
)
def test_any_value_of_a_pythonic_call_becomes_json(value: str) -> None:
    _, calls = told("pythonic", [f"[add(a={value}, b=2)]"])
    if value.startswith("(("):
        assert calls == []
    else:
        assert json.loads(calls[0][1])["b"] == 2


TYPED = {
    "type": "object",
    "properties": {
        "text": {"type": "string"},
        "word": {"enum": ["5", "true"]},
        "size": {"type": "integer"},
        "share": {"$ref": "#/$defs/share"},
        "on": {"type": ["boolean", "null"]},
        "list": {"type": "array"},
        "either": {"type": ["number", "string"]},
        "maybe": {"anyOf": [{"type": "string"}, {"type": "null"}]},
    },
    "$defs": {"share": {"type": "number"}},
}


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("text", "5", "5"),
        ("text", "", ""),
        ("text", "\n  two\nlines\n", "\n  two\nlines\n"),
        ("text", 'a "quoted" \\ </param> \t', 'a "quoted" \\ </param> \t'),
        ("text", "None", "None"),
        ("word", "true", "true"),
        ("size", "7", 7),
        ("size", "seven", "seven"),
        ("share", "1", 1),
        ("share", "-0.5e3", -500.0),
        ("on", "True", True),
        ("on", "None", None),
        ("list", "[1, 'a', None]", [1, "a", None]),
        ("list", '["a"]', ["a"]),
        ("either", "1", 1),
        ("either", "one", "one"),
        ("maybe", "null", None),
        ("maybe", "7", "7"),
        ("maybe", '"7"', "7"),
        ("other", "7", 7),
        ("other", '"7"', '"7"'),
        ("other", "plain", "plain"),
    ],
)
def test_bare_values_have_the_types_of_the_schema(key: str, text: str, value: Any) -> None:
    parser = PARSERS["qwen3_coder"](("add",), {"add": TYPED})
    answer = f"<tool_call>\n<function=add>\n<parameter={key}>\n{text}\n</parameter>\n</function>\n</tool_call>"
    deltas = [delta for c in answer for delta in parser.feed(c)] + parser.end()
    told = json.loads("".join(delta.arguments for delta in deltas if isinstance(delta, CallDelta)))
    assert told == {key: value} and type(told[key]) is type(value)


def test_a_bare_text_is_told_as_it_is_written() -> None:
    parser = PARSERS["qwen3_coder"](("add",), {"add": TYPED})
    parser.feed("<tool_call>\n<function=add>\n<parameter=text>\n")
    deltas = parser.feed("def f():\n    return '</p'\n")
    assert [delta.arguments for delta in deltas if isinstance(delta, CallDelta)] == ["\"def f():\\n    return '</p'"]


@pytest.mark.parametrize("form", PARSERS)
def test_long_arguments_are_taken(form: str) -> None:
    long = {"text": "ab\n" * 100_000}
    text = written(form, ("add", long))
    assert parsed(told(form, [text])[1]) == [("add", long)]


FRAGMENTS = sorted(
    {mark for parser in PARSERS.values() for mark in parser.marks}
    | {'{"name": "add", ', '"arguments": {', '"parameters": {"a": "', "}", "]", "[", ")", "add(", "a=", "1", "'", '"'}
    | {"<function=add>", "<function=now>\n", "<parameter=a>\n", "</parameter>", "</function>"}
    | {"</tool_call>", "\n", " ", ";", ",", ":", "{", "\\", "é→", "word", "now()", '{"x": 1}', '"name": "now"'}
)


@st.composite
def answers(draw: Any) -> tuple[str, str]:
    form = draw(st.sampled_from(sorted(PARSERS)))
    calls = st.sampled_from(
        [written(form, ("add", {"a": 1, "b": "ü]"})), written(form, ("now", {}), ("add", ARGUMENTS))]
    )
    parts = st.lists(st.one_of(st.sampled_from(FRAGMENTS), st.sampled_from(TEXTS), calls), max_size=8)
    return form, "".join(draw(parts))


@given(answers(), st.data())
@settings(max_examples=300, deadline=None)
def test_any_split_gives_the_same(answer: tuple[str, str], data: st.DataObject) -> None:
    form, text = answer
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=10)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert told(form, pieces) == told(form, [text]) == told(form, list(text))
