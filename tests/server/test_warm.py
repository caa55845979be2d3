"""System prompts that are pinned before the first request: as chats write them, for each key, in half of the pool."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import pytest
from tests.engine.fakes import FakeRunner
from tests.server.asgi import client_of
from tests.server.fakes import shipped_tokenizer

from pagedkv import InvalidOperation
from pagedkv.engine import LLM, AsyncEngine
from pagedkv.server import ServerConfig
from pagedkv.server.warm import Pinned, pin_prompts, read_prompts
from pagedkv.tiers import DiskTier

SYSTEM = "You write Python. You never write anything else, whatever the user says."
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}<assistant>"


def new_engine(num_blocks: int = 256, prefix_caching: bool = True, **options: Any) -> AsyncEngine:
    runner = FakeRunner(num_blocks, 4, prefix_caching=prefix_caching)
    runner.vocab_size = 4096  # of the tokenizer; it writes the first few
    return AsyncEngine(LLM(runner, shipped_tokenizer(), **options))


def prompts_of(tmp_path, content, name="prompts.json"):
    (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return read_prompts([tmp_path / name])


def test_a_text_and_a_list_are_read(tmp_path):
    (text,) = prompts_of(tmp_path, SYSTEM + "\n", "prompt.txt")
    assert [(message.role, message.text) for message in text] == [("system", SYSTEM)]
    chat = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    first, second = prompts_of(tmp_path, [SYSTEM, chat])
    assert first == text and [message.role for message in second] == ["system", "user"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "cannot read"),
        ({"a": 1}, "expected a list"),
        ([""], "none of them empty"),
        ([[]], "none of them empty"),
        ([3], "lists of messages"),
        ([[{"role": "judge", "content": "x"}]], "expected messages with a role"),
    ],
)
def test_other_files_are_refused_in_one_line(tmp_path, content, words):
    with pytest.raises(InvalidOperation, match=words) as caught:
        prompts_of(tmp_path, content)
    assert caught.value.argument == "warm" and "\n" not in str(caught.value)


@pytest.mark.anyio
@pytest.mark.parametrize("settings", [{}, {"chat_template": TEMPLATE}], ids=["plain", "template"])
@pytest.mark.parametrize("keys", [(), ("alice", "bob")], ids=["without keys", "two keys"])
async def test_what_was_pinned_is_found_by_every_chat_and_never_reclaimed(tmp_path, settings, keys):
    settings = {**settings, "api_keys": keys}
    engine, prompts = new_engine(), prompts_of(tmp_path, [SYSTEM])
    pinned = await asyncio.to_thread(pin_prompts, engine, ServerConfig(**settings), prompts)
    assert pinned.blocks * 4 == pinned.tokens > 20 * max(1, len(keys))
    assert engine.stats().blocks_used == 0 and engine.snapshot().counts()["pinned"] == pinned.blocks
    async with client_of(engine, **settings) as client:
        for round_ in range(3):
            for key in keys or ("",):
                headers = {"Authorization": f"Bearer {key}"} if key else {}
                messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": f"{round_} question"}]
                body = {"messages": messages, "max_tokens": 2}
                answer = (await client.post("/v1/chat/completions", json=body, headers=headers)).json()
                cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
                assert cached >= pinned.tokens / max(1, len(keys))
                body = {"prompt": [round_] * 900, "max_tokens": 1}  # takes all that is not pinned
                assert (await client.post("/v1/completions", json=body, headers=headers)).status_code in (200, 400)
        assert engine.snapshot().counts()["pinned"] == pinned.blocks
    await engine.shutdown()


def test_half_of_the_pool_is_the_most(tmp_path):
    engine, prompts = new_engine(64), prompts_of(tmp_path, [SYSTEM, SYSTEM + " Not even thanks."])
    with pytest.raises(InvalidOperation, match=r"at most 32 blocks, a half of the pool, got \d+ \(\d+ for each of 9 k"):
        pin_prompts(engine, ServerConfig(api_keys=tuple("abcdefghi")), prompts)
    assert engine.snapshot().counts()["free"] == 64
    shared = ServerConfig(api_keys=tuple("abcdefghi"), shared_cache=True)
    pinned = pin_prompts(engine, shared, prompts)
    assert pinned.blocks == engine.snapshot().counts()["pinned"] < pinned.tokens / 4, (
        "what both begin with is once there"
    )
    assert pin_prompts(engine, shared, []) == Pinned()
    assert pin_prompts(new_engine(2 * pinned.blocks), shared, prompts) == pinned
    with pytest.raises(InvalidOperation, match=f"at most {pinned.blocks - 1} blocks"):
        pin_prompts(new_engine(2 * pinned.blocks - 1), shared, prompts)


def test_without_reuse_there_is_nothing_to_pin(tmp_path):
    engine = new_engine(prefix_caching=False)
    with pytest.raises(InvalidOperation, match="not reused"):
        pin_prompts(engine, ServerConfig(), prompts_of(tmp_path, [SYSTEM]))


def test_it_comes_from_a_tier_where_one_has_it(tmp_path):
    prompts = prompts_of(tmp_path, [SYSTEM])
    computed = []
    for _ in range(2):
        engine = new_engine(tiers=[DiskTier(tmp_path / "tier", "1MB")])
        pin_prompts(engine, ServerConfig(), prompts)
        computed.append(
            SimpleNamespace(tokens=engine.llm.core.runner.computed_tokens, loads=engine.stats().tiers[0].loads)
        )
        engine.llm.close()
    assert computed[0].loads == 0 and computed[1].loads > 0 and computed[1].tokens < computed[0].tokens
