"""Many engines as one: the same tokens, and requests that lose their replica go on at another."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import anyio
import pytest
from tests.replicas.links import LocalLink
from tests.server.fakes import shipped_tokenizer

from pagedkv.engine import RequestOutput, SamplingParams, Structured
from pagedkv.errors import EngineDead, InvalidOperation, ReplicaLost, RequestRefused
from pagedkv.replicas.engine import FleetEngine

pytestmark = pytest.mark.anyio

PROMPT = list(range(40, 90))
GREEDY = SamplingParams(max_tokens=12)
CHANCE = SamplingParams(max_tokens=12, temperature=1.0, n=2, logprobs=2)


@pytest.fixture
async def fleet(engines: dict[str, Any]) -> AsyncIterator[tuple[FleetEngine, LocalLink]]:
    link = LocalLink(a=engines["a"], b=engines["b"])
    made = await FleetEngine.of(link, shipped_tokenizer())
    await made.clear_prefix_cache()
    yield made, link


async def outputs(engine: Any, params: SamplingParams = GREEDY, prompt: Any = PROMPT, **more: Any) -> list[Any]:
    return [output async for output in engine.generate(prompt, params, **more)]


def texts(output: RequestOutput) -> list[tuple[Any, ...]]:
    return [(each.text, each.token_ids, each.finish_reason, each.logprobs) for each in output.outputs]


@pytest.mark.parametrize(
    "params",
    [
        GREEDY,
        SamplingParams(max_tokens=12, temperature=1.0, seed=5, n=3, logprobs=1, prompt_logprobs=1),
        SamplingParams(max_tokens=8, beam_width=3, n=2),
        SamplingParams(max_tokens=20, stop=["\n"]),
        SamplingParams(max_tokens=20, structured=Structured(choice=["yes", "no"])),
    ],
    ids=["greedy", "seeds", "beams", "stop", "structured"],
)
async def test_tokens_are_those_of_one_engine(fleet: Any, engines: dict[str, Any], params: SamplingParams) -> None:
    engine, link = fleet
    (*_, alone) = await outputs(engines["alone"], params)
    for _ in range(2):  # at each replica
        (*_, last) = await outputs(engine, params)
        assert texts(last) == texts(alone) and last.prompt_logprobs == alone.prompt_logprobs
        assert last.finished and last.prompt_token_ids == tuple(PROMPT)
    assert {name for name, _ in link.asked} == {"a", "b"} and not link.left


@pytest.mark.parametrize("told", [0, 1, 5])
@pytest.mark.parametrize("params", [GREEDY, CHANCE], ids=["greedy", "chance"])
async def test_a_request_goes_on_at_another_replica(fleet: Any, params: SamplingParams, told: int) -> None:
    engine, link = fleet
    link.loses_after = {"a": told}
    got = await outputs(engine, params)
    (first, asked), (second, again) = link.asked
    assert (first, second, asked) == ("a", "b", again) and engine.replica_count().failovers == 1
    for before, after in zip(got, got[1:], strict=False):  # never taken back, never told anew
        for old, new in zip(before.outputs, after.outputs, strict=False):
            assert new.token_ids[: len(old.token_ids)] == old.token_ids and new.text.startswith(old.text)
    assert got[-1].finished and all(len(each.token_ids) == 12 for each in got[-1].outputs)
    assert got[-1].metrics.arrived <= got[-1].metrics.first_scheduled


async def test_another_text_than_the_one_that_was_shown_is_an_error(fleet: Any, monkeypatch: Any) -> None:
    engine, link = fleet
    link.loses_after = {"a": 4}
    honest = link.replicas["b"].generate

    async def lies(asked: Any) -> Any:
        asked.token_ids[:] = asked.token_ids[::-1].copy()
        async for told in honest(asked):
            yield told

    monkeypatch.setattr(link.replicas["b"], "generate", lies)
    shown: list[Any] = []
    with pytest.raises(ReplicaLost, match="another text"):
        async for output in engine.generate(PROMPT, GREEDY):
            shown.append(output)
    assert shown and not shown[-1].finished


async def test_when_all_are_lost_it_says_so(fleet: Any) -> None:
    engine, link = fleet
    link.loses_after = {"a": 2, "b": 3}
    with pytest.raises(ReplicaLost, match="none is ready"):
        await outputs(engine)
    assert engine.replica_count().ready == 0 and engine.is_alive


async def test_an_engine_that_has_stopped_is_as_good_as_lost(fleet: Any, engines: dict[str, Any], one_off: Any) -> None:
    dead = one_off()
    await dead.shutdown()
    link = LocalLink(a=dead, b=engines["b"])
    engine = await FleetEngine.of(link, shipped_tokenizer())
    assert (await outputs(engine))[-1].finished
    assert [name for name, _ in link.asked] == ["a", "b"]
    with pytest.raises(EngineDead):
        link.replicas["a"].check_health()
    link.replicas["b"].check_health()


@pytest.fixture
def one_off() -> Any:
    from tests.server.local import make_engine

    return lambda: make_engine(num_blocks=16)


async def test_refusals_are_those_of_the_replica(fleet: Any) -> None:
    engine, link = fleet
    with pytest.raises(RequestRefused, match="blocks"):
        await outputs(engine, SamplingParams(max_tokens=100_000))
    with pytest.raises(InvalidOperation, match="prompt"):
        await outputs(engine, prompt=[10**6])
    with pytest.raises(InvalidOperation, match="structured"):
        (await FleetEngine.of(link, None)).compile(Structured(regex="[ab]+"))
    engine.compile(Structured(regex="[ab]+"))
    assert engine.replica_count().failovers == 0 and len(link.asked) == 2


async def test_a_reader_that_leaves_ends_the_request_at_its_replica(fleet: Any) -> None:
    engine, link = fleet
    async with aclosing(engine.generate(PROMPT, SamplingParams(max_tokens=1000, ignore_eos=True))) as stream:
        await anext(stream)
    for _ in range(100):
        await engine.refresh()
        if not engine.stats().num_running:
            break
        await anyio.sleep(0.01)
    assert link.left == ["a"] and engine.stats().num_running == 0


async def test_what_is_asked_of_one_is_asked_of_all(fleet: Any) -> None:
    engine, link = fleet
    for _ in range(2):
        await outputs(engine)
    pinned = await engine.pin(PROMPT)
    assert pinned.num_tokens == 48
    await engine.refresh()
    stats = engine.replica_stats()
    assert {name: each.blocks_total - each.blocks_free for name, each in stats.items()} == {"a": 3, "b": 3}
    assert engine.stats().blocks_free == 506 and engine.stats().blocks_total == 512
    assert engine.sizes.total_blocks == 512 and engine.sizes.max_num_seqs == 64 and engine.sizes.block_size == 16
    await engine.unpin(pinned.handle)
    await engine.unpin(pinned.handle)
    assert await engine.clear_prefix_cache() == 6
    assert (await engine.pin(PROMPT)).num_tokens == 0
    assert (await outputs(engine))[-1].num_cached_tokens == 0


async def test_after_its_shutdown_it_takes_nothing(fleet: Any) -> None:
    engine, link = fleet
    await engine.shutdown()
    await engine.shutdown(drain=False)
    assert link.closed == 1 and not engine.is_alive
    with pytest.raises(EngineDead):
        await outputs(engine)
