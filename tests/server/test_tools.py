"""Tools in /v1/chat/completions: what the model is told, and what a client gets of what it says."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from tests.server.asgi import client_of, events_of
from tests.server.fakes import FakeEngine, shipped_tokenizer
from tests.server.local import make_engine

from pagedkv.errors import InvalidOperation
from pagedkv.server import ServerConfig
from pagedkv.server.schemas import ChatMessage, Tool, ToolRef
from pagedkv.server.tool_parsers import PARSERS
from pagedkv.server.tools import chat_dicts, form_of, structure_beside, tool_use, written

pytestmark = pytest.mark.anyio
URL = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "how warm is it?"}]
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "get_weather", "description": "It is →", "parameters": SCHEMA}}
NOW = {"type": "function", "function": {"name": "now"}}
TOOLS = [WEATHER, NOW]
CALLS = [("get_weather", {"city": "Zürich → x"}), ("now", {})]
HISTORY = [
    *HELLO,
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Bern"}'}}
        ],
    },
    {"role": "tool", "tool_call_id": "call_1", "content": "21"},
]
KNOWING = (
    "{% if tools %}<tool_call>{{ tools | tojson }}{% endif %}{% for m in messages %}[{{ m.role }}"
    "{% if m.name %} {{ m.name }}{% endif %}]{{ m.content }}{% for c in m.tool_calls or [] %}<{{ c.id }} "
    "{{ c.function.name }} {{ c.function.arguments.city }}>{% endfor %}{% endfor %}"
)


def plain(engine: FakeEngine) -> str:
    text: str = shipped_tokenizer().decode(engine.calls[-1].token_ids, skip_special_tokens=True)
    return text


async def ask(engine: FakeEngine, settings: dict[str, Any] | None = None, **more: Any) -> Any:
    async with client_of(engine, **(settings or {})) as client:
        return await client.post(URL, json={"messages": HELLO, "tools": TOOLS, **more})


@pytest.mark.parametrize("form", PARSERS)
async def test_calls_are_told_and_what_is_said_before_them(form: str) -> None:
    engine = FakeEngine(says=f"I look.\n{written(form, CALLS)}", max_positions=1024)
    choice = (await ask(engine, {"tool_parser": form})).json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] == "I look."
    calls = choice["message"]["tool_calls"]
    assert [(each["function"]["name"], json.loads(each["function"]["arguments"])) for each in calls] == CALLS
    assert len({each["id"] for each in calls}) == 2 and {each["type"] for each in calls} == {"function"}


@pytest.mark.parametrize("form", PARSERS)
async def test_a_stream_of_calls_is_as_openai_has_it(form: str) -> None:
    engine = FakeEngine(says=f"I look.\n{written(form, CALLS)}", max_positions=1024)
    events = events_of((await ask(engine, {"tool_parser": form}, stream=True)).text)
    choices = [event["choices"][0] for event in events]
    assert choices[0]["delta"]["role"] == "assistant" and not any("role" in each["delta"] for each in choices[1:])
    assert [each["finish_reason"] for each in choices] == [None] * (len(choices) - 1) + ["tool_calls"]
    assert "".join(each["delta"].get("content") or "" for each in choices) == "I look."
    deltas = [call for each in choices for call in each["delta"].get("tool_calls", ())]
    for index, (name, arguments) in enumerate(CALLS):
        first, *rest = [each for each in deltas if each["index"] == index]
        assert first["id"] and first["type"] == "function" and first["function"]["name"] == name
        assert all(each.keys() == {"index", "function"} and each["function"].keys() == {"arguments"} for each in rest)
        assert json.loads("".join(each["function"]["arguments"] for each in [first, *rest])) == arguments
    assert [each["index"] for each in deltas] == sorted(each["index"] for each in deltas) and len(deltas) >= 2 + 2 * (
        form != "pythonic"
    )


async def test_what_only_begins_like_a_call_is_told_in_the_end() -> None:
    for says in ("a < b and <tool", '<tool_call>{"nothing": 1}</tool_call>', "text\n\n"):
        whole = (await ask(FakeEngine(says=says))).json()["choices"][0]
        assert whole["message"] == {"role": "assistant", "content": says, "refusal": None}
        assert whole["finish_reason"] == "stop"
        events = events_of((await ask(FakeEngine(says=says), stream=True)).text)
        assert "".join(event["choices"][0]["delta"].get("content") or "" for event in events) == says
        assert events[-1]["choices"][0]["finish_reason"] == "stop"


async def test_an_answer_of_calls_alone_has_no_content() -> None:
    message = (await ask(FakeEngine(says=written("hermes", CALLS[1:])))).json()["choices"][0]["message"]
    assert message["content"] is None and len(message["tool_calls"]) == 1


async def test_a_call_that_is_cut_off_ends_with_length() -> None:
    choice = (await ask(FakeEngine(says=written("hermes", CALLS)), max_tokens=26)).json()["choices"][0]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["tool_calls"][0]["function"]["arguments"].startswith('{"city')


async def test_one_call_where_several_are_not_wanted() -> None:
    for stream in (False, True):
        engine = FakeEngine(says=written("hermes", CALLS))
        answer = await ask(engine, parallel_tool_calls=False, stream=stream)
        assert "get_weather" in answer.text and "now" not in answer.text


async def test_log_probabilities_stay_whole_beside_calls() -> None:
    engine = FakeEngine(says=f"I look. {written('hermes', CALLS)}")
    whole = (await ask(engine, logprobs=True)).json()["choices"][0]["logprobs"]["content"]
    events = events_of((await ask(engine, logprobs=True, stream=True)).text)
    told = [each["logprobs"]["content"] for event in events for each in event["choices"] if each.get("logprobs")]
    assert sum(told, []) == whole


async def test_none_leaves_the_tools_in_the_prompt_and_finds_no_calls() -> None:
    says = written("hermes", CALLS[1:])
    engine = FakeEngine(says=says)
    message = (await ask(engine, {"chat_template": KNOWING}, tool_choice="none")).json()["choices"][0]["message"]
    assert message["content"] == says and "tool_calls" not in message and "get_weather" in plain(engine)


async def test_only_allowed_tools_are_told() -> None:
    engine = FakeEngine(says="no")
    allowed = {"mode": "auto", "tools": [{"type": "function", "function": {"name": "now"}}]}
    answer = await ask(engine, tool_choice={"type": "allowed_tools", "allowed_tools": allowed})
    assert answer.status_code == 200 and "now" in plain(engine) and "get_weather" not in plain(engine)


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"tool_choice": "sometimes"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
        ({"tools": None, "tool_choice": "required"}, "tool_choice"),
        ({"tools": [], "tool_choice": {"type": "function", "function": {"name": "now"}}}, "tool_choice"),
        ({"tools": [NOW, NOW]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "with space"}}]}, "tools.0.function.name"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": "x"}}]},
            "tools.0.function.parameters",
        ),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
    ],
)
async def test_wrong_tools_are_refused_by_name(more: dict[str, Any], param: str) -> None:
    engine = FakeEngine()
    answer = await ask(engine, **more)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param and engine.calls == []


# What is required is enforced, with the shipped model, which knows nothing of calls.

PAINT = {
    "type": "function",
    "function": {
        "name": "paint",
        "parameters": {
            "type": "object",
            "properties": {
                "colour": {"enum": ["red", "grün", "b'l\"ue"]},
                "coats": {"$ref": "#/$defs/few"},
                "where": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
            },
            "required": ["colour", "where"],
            "$defs": {"few": {"type": "integer", "minimum": 1, "maximum": 9}},
        },
    },
}


@pytest.fixture(scope="module")
def writer() -> Any:
    return make_engine(num_blocks=512)


def is_painted(call: dict[str, Any]) -> bool:
    """Whether a call is one that its schema allows."""
    name, arguments = call["function"]["name"], json.loads(call["function"]["arguments"])
    if name == "now":
        return bool(arguments == {})
    assert name == "paint" and set(arguments) <= {"colour", "coats", "where"}
    assert arguments["colour"] in ("red", "grün", "b'l\"ue") and 1 <= arguments.get("coats", 1) <= 9
    return all(each in (True, False) for each in arguments["where"]) and 1 <= len(arguments["where"]) <= 3


@pytest.mark.parametrize("form", PARSERS)
async def test_required_calls_are_written_by_any_model(writer: Any, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pagedkv.server.tools.MOST_CALLS", 2)
    body = {"messages": HELLO, "tools": [PAINT, NOW], "max_tokens": 400, "temperature": 1.5}
    named = {"type": "function", "function": {"name": "paint"}}
    async with client_of(writer, tool_parser=form) as client:
        for seed in range(3):
            answer = await client.post(URL, json={**body, "seed": seed, "tool_choice": "required", "n": 2})
            streamed = await client.post(URL, json={**body, "seed": seed, "tool_choice": named, "stream": True})
            for choice in answer.json()["choices"]:
                assert choice["message"]["content"] is None and choice["finish_reason"] == "tool_calls"
                assert all(map(is_painted, choice["message"]["tool_calls"]))
            choices = [event["choices"][0] for event in events_of(streamed.text)]
            first, *rest = [call for each in choices for call in each["delta"].get("tool_calls", ())]
            first["function"]["arguments"] += "".join(each["function"]["arguments"] for each in rest)
            assert choices[-1]["finish_reason"] == "tool_calls" and first["function"]["name"] == "paint"
            assert is_painted(first) and not any(each["delta"].get("content") for each in choices)


async def test_a_required_call_that_is_cut_off_is_no_text(writer: Any) -> None:
    body = {"messages": HELLO, "tools": [PAINT], "tool_choice": "required", "temperature": 0}
    async with client_of(writer) as client:
        for most in (1, 12, 24):
            choice = (await client.post(URL, json={**body, "max_tokens": most})).json()["choices"][0]
            assert choice["message"]["content"] is None and choice["finish_reason"] == "length"


@pytest.mark.parametrize("form", PARSERS)
def test_the_grammar_of_required_calls(form: str) -> None:
    import llguidance.hf

    special = {"[TOOL_CALLS]": 4096}
    tokenizer = copy.deepcopy(shipped_tokenizer())
    tokenizer.add_tokens(["[TOOL_CALLS]"], special_tokens=True)
    known = llguidance.hf.from_tokenizer(tokenizer)

    def follows(choice: Any, *calls: tuple[str, dict[str, Any]], **more: Any) -> bool:
        use = tool_use([Tool.model_validate(each) for each in (PAINT, NOW)], choice, asked=form, **more)
        assert use is not None
        structure = structure_beside(use, None, special)
        assert structure is not None
        matcher = llguidance.LLMatcher(known, structure.checked().definition)
        ids = tokenizer(written(form, calls).replace("'", '"'), add_special_tokens=False)["input_ids"]
        return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()

    some = ("paint", {"colour": "red", "where": [True]}), ("now", {})
    if form == "pythonic":
        some = ("paint", {"colour": "red", "where": []}), ("now", {})  # whose words Python writes as JSON does
        some[0][1]["where"] = [1]
        assert not follows("required", *some)
        some = ("now", {}), ("now", {})
    named = ToolRef.model_validate({"type": "function", "function": {"name": some[0][0]}})
    assert follows("required", *some) and follows("required", some[1]) and follows(named, some[0])
    assert not follows("required") and not follows(named, *some) and not follows("required", *some, parallel=False)
    assert not follows("required", ("other", {})) and not follows("required", ("now", {"a": 1}))
    assert not follows("required", ("paint", {"colour": "red"})) and not follows("required", *[some[1]] * 17)


def test_bare_texts_of_a_required_call_may_be_anything_but_their_end() -> None:
    import llguidance.hf

    known = llguidance.hf.from_tokenizer(shipped_tokenizer())
    use = tool_use([Tool.model_validate(WEATHER)], "required", asked="qwen3_coder", parallel=False)
    structure = structure_beside(use, None, {})
    assert structure is not None
    for city in ("Zürich", "", "two\nlines\n", "</param> <function=now>", '"'):
        matcher = llguidance.LLMatcher(known, structure.checked().definition)
        text = written("qwen3_coder", [("get_weather", {"city": city})])
        ids = shipped_tokenizer()(text, add_special_tokens=False)["input_ids"]
        assert matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting(), city
    strict = copy.deepcopy(WEATHER)
    strict["function"]["strict"] = True
    for properties, told in (({"city": {"type": "string", "pattern": "a"}}, "pattern of a text"), ({"a>": {}}, "'a>'")):
        strict["function"]["parameters"] = {"properties": properties}
        use = tool_use([Tool.model_validate(strict)], "required", asked="qwen3_coder")
        with pytest.raises(InvalidOperation, match=told):
            structure_beside(use, None, {})


@pytest.mark.parametrize(
    ("parameters", "strict", "status"),
    [
        ({"properties": {"a": {"not": {"type": "string"}}}}, True, 400),
        ({"properties": {"a": {"uniqueItems": True, "type": "array"}}}, False, 200),
        ({"properties": {"a": {"type": "nothing"}}}, None, 400),
        ({"properties": {"with space": {"type": "null"}}}, None, 400),
        (json.loads('{"properties": {"a":' * 200 + "{}" + "}}" * 200), None, 400),
    ],
)
async def test_schemas_that_cannot_be_enforced_are_refused(parameters: Any, strict: Any, status: int) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters, "strict": strict}}
    engine = FakeEngine(says="x", max_positions=1024)
    answer = await ask(engine, {"tool_parser": "pythonic"}, tools=[tool], tool_choice="required")
    assert answer.status_code == status and (status == 200 or answer.json()["error"]["param"] == "tools")
    assert "grammar" not in answer.text


async def test_an_answer_is_a_call_or_json_where_both_are_asked_for(writer: Any) -> None:
    properties = {"warm": {"type": "boolean"}}
    schema = {"type": "object", "properties": properties, "required": ["warm"], "additionalProperties": False}
    formats = [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}},
        {"structured_outputs": {"json": json.dumps(schema), "disable_any_whitespace": True}},
    ]
    seen = set()
    async with client_of(writer) as client:
        for seed in range(6):
            body = {"messages": HELLO, "tools": [PAINT, NOW], "parallel_tool_calls": False, "seed": seed}
            answer = await client.post(URL, json={**body, **formats[seed % 2], "temperature": 3, "max_tokens": 200})
            message = answer.json()["choices"][0]["message"]
            if message["content"] is None:
                assert all(map(is_painted, message["tool_calls"]))
            else:
                assert isinstance(json.loads(message["content"])["warm"], bool) and "tool_calls" not in message
            seen.add(message["content"] is None)
        torn = await client.post(URL, json={"messages": HELLO, "tools": [NOW], "structured_outputs": {"regex": "a"}})
    assert seen == {True, False}
    assert torn.status_code == 400 and torn.json()["error"]["param"] == "structured_outputs"


# What the model is told.


async def test_a_template_that_knows_tools_is_told_as_it_wants_it() -> None:
    engine = FakeEngine(says="x", max_positions=1024)
    await ask(engine, {"chat_template": KNOWING}, messages=HISTORY)
    tools = [{"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}]
    shown = json.dumps([WEATHER, *tools], ensure_ascii=False)
    said = "[user]how warm is it?[assistant]<call_1 get_weather Bern>[tool get_weather]21"
    assert plain(engine) == f"<tool_call>{shown}{said}"


async def test_a_template_that_wants_arguments_as_text_gets_text() -> None:
    calls = "{% for c in m.tool_calls or [] %}{{ '!' + c.function.arguments }}{% endfor %}"
    template = "{{ tools }}{% for m in messages %}" + calls + "{% endfor %}"
    engine = FakeEngine(says="x", max_positions=1024)
    await ask(engine, {"chat_template": template}, messages=HISTORY, tools=None)
    assert plain(engine).endswith('!{"city": "Bern"}')


@pytest.mark.parametrize(
    "template", [None, "{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}assistant:"]
)
async def test_a_model_that_knows_no_tools_is_told_in_plain_words(template: str | None) -> None:
    engine = FakeEngine(says=written("hermes", CALLS[1:]), max_positions=2048)
    messages = [{"role": "developer", "content": "be brief"}, *HISTORY, {"role": "tool", "content": "22"}]
    answer = (await ask(engine, {"chat_template": template}, messages=messages)).json()
    assert answer["choices"][0]["message"]["tool_calls"][0]["function"]["name"] == "now"
    head, *said = plain(engine).split("\n\nuser: ")
    assert head.startswith("system: be brief\n\n") and '"name": "get_weather"' in head and "<tool_call>" in head
    assert said == [
        'how warm is it?\n\nassistant: <tool_call>\n{"name": "get_weather", "arguments": {"city": "Bern"}}\n'
        "</tool_call>",
        "<tool_response>\n21\n</tool_response>\n<tool_response>\n22\n</tool_response>\n\nassistant:",
    ]


async def test_ids_of_calls_are_as_the_templates_of_mistral_want_them() -> None:
    calls = "{% for c in m.tool_calls or [] %}{{ c.id }} {% endfor %}"
    template = "[TOOL_CALLS]{% for m in messages %}{{ m.tool_call_id }}" + calls + "{% endfor %}{{ tools }}"
    engine = FakeEngine(says=written("mistral", CALLS[1:]), max_positions=1024)
    answer = await ask(engine, {"chat_template": template}, messages=HISTORY)
    first, second = plain(engine).removeprefix("[TOOL_CALLS]").split("[")[0].split(" ")
    assert len(first) == 9 and first.isalnum() and first == second
    assert len(answer.json()["choices"][0]["message"]["tool_calls"][0]["id"]) == 9


@pytest.mark.parametrize("arguments", ["[1]", "{", '"x"', '{"a": "\\ud800"}'])
async def test_a_history_with_broken_arguments_is_refused_by_place(arguments: str) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    for settings in ({}, {"chat_template": KNOWING}):
        messages = [*HELLO, {"role": "assistant", "tool_calls": [call]}]
        answer = await ask(FakeEngine(), settings, messages=messages, tools=None)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "messages.1.tool_calls.0.function.arguments"


async def test_halves_of_characters_in_a_schema_are_refused() -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"description": "\ud800"}}}]
    for settings in ({}, {"chat_template": "{{ tools[0].function.parameters.description }} <tool_call>"}):
        async with client_of(FakeEngine(), **settings) as client:
            body = json.dumps({"messages": HELLO, "tools": tools})
            answer = await client.post(URL, content=body, headers={"content-type": "application/json"})
        assert answer.status_code == 400


def test_templates_are_told_of_a_developer_as_of_the_system() -> None:
    messages = [ChatMessage(role=role, content="x") for role in ("developer", "user")]
    assert [told["role"] for told in chat_dicts(messages)] == ["system", "user"]


async def test_tokenize_takes_tools_too() -> None:
    engine = FakeEngine(says="x", max_positions=1024)
    async with client_of(engine, chat_template=KNOWING) as client:
        told = await client.post("/tokenize", json={"messages": HISTORY, "tools": TOOLS})
        await client.post(URL, json={"messages": HISTORY, "tools": TOOLS})
    assert told.json()["tokens"] == engine.calls[0].token_ids


# Which form.


def test_the_form_is_read_off_the_template() -> None:
    assert form_of("{{ tools }}<tool_call>") == form_of("no word of them") == form_of(None) == "hermes"
    assert form_of("{{ tools }}[TOOL_CALLS]") == "mistral"
    assert form_of('{{ tools }}"Environment: ipython"') == form_of("{{ tools }}<|python_tag|>") == "llama3_json"
    assert form_of("{{ tools }} ipython [func_name1(params_name1=…)]") == "pythonic"
    assert form_of("{{ tools }} something new") is form_of("{{ tools }}<tool_call><function=") is None
    assert form_of("{{ tools }}<tool_call><function=f>\n<parameter=a>") == "qwen3_coder"
    assert form_of("{{ tools }}<tool_call>{name}<arg_key>") is None
    assert form_of("{{ tools }} something new", "pythonic") == "pythonic"


async def test_a_form_that_is_not_known_is_refused_until_the_operator_names_one() -> None:
    template = {"chat_template": "{{ tools }} something new"}
    answer = await ask(FakeEngine(), template)
    assert answer.status_code == 400 and "--tool-parser" in answer.json()["error"]["message"]
    assert (
        await ask(FakeEngine(says="x", max_positions=1024), {**template, "tool_parser": "hermes"})
    ).status_code == 200
    assert (await ask(FakeEngine(says="x", max_positions=1024), template, tool_choice="none")).status_code == 200
    with pytest.raises(InvalidOperation, match="tool_parser: expected one of hermes"):
        ServerConfig(tool_parser="other")


async def test_a_mark_that_is_a_special_token_is_seen() -> None:
    engine = FakeEngine(says=written("mistral", CALLS))
    engine.tokenizer = copy.deepcopy(shipped_tokenizer())
    engine.tokenizer.add_tokens(["[TOOL_CALLS]"], special_tokens=True)
    for form, choice, skips in (("mistral", "auto", False), ("hermes", "auto", True), ("mistral", "none", True)):
        await ask(engine, {"tool_parser": form}, tool_choice=choice, skip_special_tokens=True)
        assert engine.calls[-1].params.skip_special_tokens is skips


def test_the_guide_names_all_parsers() -> None:
    page = (Path(__file__).parents[2] / "docs" / "server.md").read_text()
    assert [name for name in PARSERS if f"`{name}`" not in page] == []
