"""The official client against a real server process with the shipped model."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any, Literal

import httpx
import pytest
from pydantic import BaseModel
from tests.server.fakes import FakeEngine, shipped_tokenizer
from tests.server.local import SMALL, Process, process, thread

openai = pytest.importorskip("openai")

PROMPT = "import os\nimport sys\n\nclass Parser:"
CHAT: list[Any] = [{"role": "user", "content": "write a loop"}]
FEW = 16  # the token that opens every text, and what else a tenant wrote before
KEYS = {"PAGEDKV_API_KEYS": "key-a key-b", "PAGEDKV_OPERATOR_KEYS": "key-op"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    log = tmp_path_factory.mktemp("server") / "log"
    with process(log, *SMALL, "--dtype", "float32", "--max-body", "200000", env=KEYS) as started:
        yield started
        assert started.stop() == 0, log.read_text()
        assert "Traceback" not in log.read_text()


def client_of(server: Process, key: str = "key-a") -> Any:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=60)


@pytest.fixture
def client(server: Process) -> Iterator[Any]:
    with client_of(server) as made:
        yield made


@pytest.fixture(scope="module")
def expected() -> dict[int, str]:
    """What ``model.generate()`` writes, greedily."""
    import torch
    from transformers import AutoModelForCausalLM

    from pagedkv.models import shipped_model_path

    model = AutoModelForCausalLM.from_pretrained(shipped_model_path(), dtype=torch.float32).eval()
    tokenizer = shipped_tokenizer()
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)
    new = out[0, ids.shape[1] :].tolist()
    return {count: tokenizer.decode(new[:count], skip_special_tokens=True) for count in (8, 24, 40)}


def complete(client: Any, **options: Any) -> Any:
    return client.completions.create(**{"model": "pysmall", "prompt": PROMPT, "temperature": 0, **options})


def test_models(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["pysmall"]
    assert client.models.retrieve("pysmall").object == "model"


@pytest.mark.parametrize("count", [8, 24, 40])
def test_greedy_is_what_generate_writes(client: Any, expected: dict[int, str], count: int) -> None:
    answer = complete(client, max_tokens=count)
    assert answer.choices[0].text == expected[count] and answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == count
    streamed = complete(client, max_tokens=count, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == expected[count]


def test_a_prefix_is_found_again(client: Any) -> None:
    words = "value = compute(value) + 1\n" * 12
    first, second = (complete(client, prompt=words, max_tokens=2) for _ in range(2))
    cached = [answer.usage.prompt_tokens_details.cached_tokens for answer in (first, second)]
    assert cached[0] < FEW and cached[1] >= second.usage.prompt_tokens - 17
    assert first.choices[0].text == second.choices[0].text


def test_tenants_do_not_see_each_other(server: Process, client: Any) -> None:
    words = "tenant = secret(tenant) * 2\n" * 12

    def cached(of: Any, **more: Any) -> int:
        return int(complete(of, prompt=words, max_tokens=2, **more).usage.prompt_tokens_details.cached_tokens)

    with client_of(server, "key-b") as other:
        assert cached(client) < FEW and cached(client) > 100
        assert cached(other) < FEW and cached(other) > 100
        assert cached(client, extra_body={"cache_salt": "s"}) == 0
        assert cached(other, extra_body={"cache_salt": "s"}) == 0
        with pytest.raises(openai.PermissionDeniedError):
            other.post("/cache/clear", cast_to=object)
    with client_of(server, "key-op") as operator:
        assert operator.post("/cache/clear", cast_to=object)["cleared_blocks"] > 0
    assert cached(client) == 0


def test_chat(client: Any) -> None:
    answer = client.chat.completions.create(model="pysmall", messages=CHAT, temperature=0, max_tokens=12, n=2, seed=1)
    assert len(answer.choices) == 2 and answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == answer.choices[1].message.content
    stream = client.chat.completions.create(
        model="pysmall",
        messages=CHAT,
        temperature=0,
        max_completion_tokens=12,
        stream=True,
        stream_options={"include_usage": True},
    )
    *chunks, last = stream
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == answer.choices[0].message.content
    assert last.choices == [] and last.usage.completion_tokens == 12


def test_the_same_seed_writes_the_same(client: Any) -> None:
    texts = [complete(client, temperature=1, seed=seed, max_tokens=12).choices[0].text for seed in (7, 7, 8)]
    assert texts[0] == texts[1] != texts[2]
    both = complete(client, temperature=1, seed=7, max_tokens=12, n=2, prompt=[PROMPT, "x = "])
    assert len(both.choices) == 4 and both.choices[0].text != both.choices[1].text


def test_stops(client: Any, expected: dict[int, str]) -> None:
    stop = expected[40][6:9]
    answer = complete(client, max_tokens=40, stop=[stop])
    assert answer.choices[0].text == expected[40][: expected[40].index(stop)]
    assert answer.choices[0].finish_reason == "stop" and answer.choices[0].stop_reason == stop
    streamed = complete(client, max_tokens=40, stop=stop, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == answer.choices[0].text


def test_log_probabilities(client: Any, expected: dict[int, str]) -> None:
    told = complete(client, max_tokens=8, logprobs=3).choices[0].logprobs
    assert "".join(told.tokens) == expected[8] and len(told.token_logprobs) == 8
    for token, logprob, top in zip(told.tokens, told.token_logprobs, told.top_logprobs, strict=True):
        assert len(top) == 3 and top[token] == max(top.values()) == logprob <= 0
    chat = client.chat.completions.create(
        model="pysmall", messages=CHAT, max_tokens=4, logprobs=True, top_logprobs=2, temperature=0
    )
    content = chat.choices[0].logprobs.content
    assert bytes(b for entry in content for b in entry.bytes).decode() == chat.choices[0].message.content
    assert all(entry.top_logprobs[0].token == entry.token and len(entry.top_logprobs) == 2 for entry in content)


def test_a_bias_decides(client: Any) -> None:
    token = shipped_tokenizer()(" os", add_special_tokens=False)["input_ids"][0]
    answer = complete(client, max_tokens=3, logit_bias={str(token): 100}, extra_body={"repetition_penalty": 1.0})
    assert answer.choices[0].text == " os os os"


def test_echo_and_best_of(client: Any, expected: dict[int, str]) -> None:
    answer = complete(client, max_tokens=8, echo=True, best_of=2, temperature=0)
    assert answer.choices[0].text == PROMPT + expected[8]


def test_log_probabilities_of_a_prompt(client: Any) -> None:
    told = complete(client, max_tokens=0, echo=True, logprobs=1).choices[0]
    assert told.text == PROMPT and told.logprobs.tokens[0] == "<|file|>"
    assert "".join(told.logprobs.tokens[1:]) == PROMPT
    assert told.logprobs.token_logprobs[0] is None and max(told.logprobs.token_logprobs[1:]) <= 0
    assert [PROMPT[at : at + 1] for at in told.logprobs.text_offset[1:]] == [t[0] for t in told.logprobs.tokens[1:]]


def test_errors_are_the_clients_own(server: Process, client: Any) -> None:
    with client_of(server, "wrong") as stranger, pytest.raises(openai.AuthenticationError):
        stranger.models.list()
    with pytest.raises(openai.NotFoundError) as missing:
        complete(client, model="other")
    assert missing.value.code == "model_not_found"
    for wrong in ({"temperature": -1}, {"max_tokens": 10**6}, {"prompt": ""}, {"extra_body": {"n": "two"}}):
        with pytest.raises(openai.BadRequestError) as refused:
            complete(client, **wrong)
        assert refused.value.param in ("temperature", "max_tokens", "prompt", "n")
    with pytest.raises(openai.BadRequestError, match="functions"):
        client.chat.completions.create(model="pysmall", messages=CHAT, functions=[{"name": "f"}])
    with pytest.raises(openai.APIStatusError) as large:
        complete(client, prompt="x" * 200_000)
    assert large.value.status_code == 413


async def _many(server: Process, count: int) -> list[Any]:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="key-b", max_retries=0) as client:

        async def one(number: int) -> Any:
            options = {"model": "pysmall", "prompt": PROMPT, "temperature": 0, "max_tokens": 24}
            if number % 2:
                return (await client.completions.create(**options)).choices[0].text
            stream = await client.completions.create(**options, stream=True)
            return "".join([chunk.choices[0].text async for chunk in stream])

        return await asyncio.gather(*map(one, range(count)))


def test_many_at_once_all_write_what_one_writes(server: Process, expected: dict[int, str]) -> None:
    assert asyncio.run(_many(server, 24)) == [expected[24]] * 24


async def _leave(server: Process) -> None:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="key-a", max_retries=0) as client:
        options: Any = {"model": "pysmall", "prompt": PROMPT, "max_tokens": 3000, "extra_body": {"ignore_eos": True}}
        stream = await client.completions.create(**options, stream=True)
        await anext(aiter(stream))
        await stream.close()
        with pytest.raises(openai.APITimeoutError):
            await client.completions.create(**options, timeout=0.2)


def test_who_leaves_frees_the_blocks(server: Process) -> None:
    asyncio.run(_leave(server))
    headers = {"authorization": "Bearer key-op"}
    for _ in range(200):
        told = httpx.get(f"{server.url}/v1/cache", headers=headers).json()
        if told["stats"]["blocks_used"] == 0:
            break
    assert told["stats"]["blocks_used"] == 0 and told["stats"]["aborted_requests"] >= 2


class Paint(BaseModel):
    """A wall."""

    colour: Literal["red", "grün"]
    coats: Literal[1, 2, 3]


def test_required_tools_are_called_by_any_model(client: Any) -> None:
    asked = {"model": "pysmall", "messages": CHAT, "tools": [openai.pydantic_function_tool(Paint)], "temperature": 1}
    named = {"type": "function", "function": {"name": "Paint"}}
    required = client.chat.completions.parse(**asked, tool_choice="required", parallel_tool_calls=False)
    with client.chat.completions.stream(**asked, tool_choice=named) as stream:
        streamed = stream.get_final_completion()
    for answer in (required, streamed):
        (call,) = answer.choices[0].message.tool_calls
        assert answer.choices[0].finish_reason == "tool_calls" and not answer.choices[0].message.content
        assert isinstance(call.function.parsed_arguments, Paint)


# Tools, with a model that says what it is told to.


class GetWeather(BaseModel):
    """The weather of a city."""

    city: str
    days: int = 1


SAYS = 'I look.\n<tool_call>\n{"name": "GetWeather", "arguments": {"city": "Zürich →", "days": 2}}\n</tool_call>'


@pytest.fixture(scope="module")
def scripted() -> Iterator[Any]:
    engine = FakeEngine(says=SAYS, max_positions=2048)
    with thread(engine) as served, openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def tools() -> list[Any]:
    return [openai.pydantic_function_tool(GetWeather)]


def test_calls_and_their_results(scripted: Any) -> None:
    answer = scripted.chat.completions.create(model="pysmall", messages=CHAT, tools=tools(), logprobs=True)
    message = answer.choices[0].message
    (call,) = message.tool_calls
    assert answer.choices[0].finish_reason == "tool_calls" and message.content == "I look."
    assert GetWeather.model_validate_json(call.function.arguments) == GetWeather(city="Zürich →", days=2)
    result = {"role": "tool", "tool_call_id": call.id, "content": "21 degrees"}
    again = scripted.chat.completions.create(model="pysmall", messages=[*CHAT, message, result], tools=tools())
    assert again.usage.prompt_tokens > answer.usage.prompt_tokens + 20


def test_calls_are_parsed(scripted: Any) -> None:
    answer = scripted.chat.completions.parse(model="pysmall", messages=CHAT, tools=tools())
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.parsed_arguments == GetWeather(city="Zürich →", days=2)


def test_calls_are_streamed(scripted: Any) -> None:
    with scripted.chat.completions.stream(model="pysmall", messages=CHAT, tools=tools()) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion().choices[0]
    assert kinds.count("tool_calls.function.arguments.delta") > 2
    assert "tool_calls.function.arguments.done" in kinds and "content.done" in kinds
    assert final.finish_reason == "tool_calls" and final.message.content == "I look."
    assert final.message.tool_calls[0].function.parsed_arguments == GetWeather(city="Zürich →", days=2)
