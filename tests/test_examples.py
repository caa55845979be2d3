"""Each program of examples/ runs, and does what it says."""

from __future__ import annotations

import importlib.util
import re
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from pagedkv import BlockManager
from pagedkv.models import shipped_model_path
from pagedkv.sim import replay, synthesize

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def example(name: str) -> ModuleType:
    """Import a program of examples/ by its name."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", ROOT / "examples" / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model():
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(shipped_model_path(), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def runner(model):
    from pagedkv.hf import load_runner

    return load_runner(model, num_blocks=24, block_size=8)


def greedy(model, prompt: list[int], length: int) -> list[int]:
    ids = model.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), do_sample=False,
        min_new_tokens=length, max_new_tokens=length, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    return ids[0, len(prompt) :].tolist()


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    head = rng.integers(3, 200, 24).tolist()
    return [head + rng.integers(3, 200, 5 + i).tolist() for i in range(count)]


def test_the_mini_engine_writes_what_the_model_writes(model, runner):
    engine = example("mini_engine").MiniEngine(runner, max_running=4)
    texts = prompts(6)
    for text in texts:
        engine.add(text, max_tokens=14)
    written = engine.run()
    assert written == [greedy(model, text, 14) for text in texts]
    assert (
        sum(request.num_cached for request in engine.requests) >= 2 * 24
    )  # the last two; who enters with the first finds nothing
    assert runner.cache.num_sequences == 0
    runner.cache.check()


def test_speculation_changes_no_token(model, runner):
    prompt = prompts(1, seed=1)[0] * 2
    text, passes = example("speculative_decoding").generate(runner, prompt, 24)
    assert text == greedy(model, prompt, 24)
    assert passes <= 24 and runner.cache.num_sequences == 0
    runner.cache.check()


def test_beams_are_those_of_transformers(model, runner):
    prompt = prompts(1, seed=2)[0]
    (score, best), *others = example("beam_search").beam_search(runner, prompt, 3, 8)
    ids = model.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), num_beams=3,
        do_sample=False, min_new_tokens=8, max_new_tokens=8, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    assert best == ids[0, len(prompt) :].tolist()
    assert score >= max(other for other, _ in others)
    assert runner.cache.num_sequences == 0
    runner.cache.check()


@pytest.mark.parametrize("name", ["mini_engine", "speculative_decoding", "beam_search"])
def test_a_program_around_a_model_prints_what_it_wrote(name, runner, capsys):
    assert example(name).main(runner)
    assert len(capsys.readouterr().out.splitlines()) >= 2
    assert runner.cache.num_sequences == 0


def test_a_strategy_of_ones_own_is_judged_by_a_replay(capsys):
    module = example("custom_strategy")
    results = module.main()
    assert results["optimum"].hit_ratio >= max(results["lru"].hit_ratio, results["shallow_first"].hit_ratio)
    trace = synthesize("chat", requests=200, seed=7)
    assert replay(trace, 50, "shallow-first").hit_blocks == replay(trace, 50, module.ShallowFirst()).hit_blocks
    assert "shallow_first" in capsys.readouterr().out


def test_a_tier_of_ones_own_is_found_by_the_next_engine():
    first, second = example("custom_tier").main()
    assert first == 0 and second >= 16


def test_a_tier_of_ones_own_gives_nothing_that_it_cannot_verify(tmp_path):
    from pagedkv.tiers import BlockFormat

    tier = example("custom_tier").SqliteTier(tmp_path / "kv.db").open(BlockFormat("model", 4, 8))
    rows, ids = np.arange(16, dtype=np.uint8).reshape(2, 8), list(range(9))
    assert tier.store(ids, rows).result() == 2 == tier.match(ids).result()
    assert tier.match(ids, "another tenant").result() == 0
    tier._thread.submit(tier._db.execute, "UPDATE blocks SET bytes = zeroblob(8)").result()
    assert tier.load(ids, np.zeros((2, 8), np.uint8)).result() == 0 == tier.match(ids).result()
    tier.clear()
    tier.close()


def test_a_server_behind_a_proxy_answers_under_its_path(model):
    pytest.importorskip("fastapi")
    import asyncio

    import httpx

    from pagedkv.engine import LLM

    async def ask() -> list[httpx.Response]:
        app = example("behind_a_proxy").behind_proxy(
            LLM(model, str(shipped_model_path()), num_blocks=32), "/llm", trusted="127.0.0.1"
        )
        body = {"model": "pysmall", "prompt": "def f(", "max_tokens": 3}
        headers = {"x-forwarded-proto": "https", "x-forwarded-for": "203.0.113.9"}
        transport = httpx.ASGITransport(app, client=("127.0.0.1", 1))
        async with app.app.router.lifespan_context(app.app):
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost", headers=headers) as client:
                return [
                    await client.get("/llm/health"),
                    await client.post("/llm/v1/completions", json=body),
                    await client.get("/v1/models"),
                ]

    healthy, written, outside = asyncio.run(ask())
    assert (healthy.status_code, written.status_code, outside.status_code) == (200, 200, 404)
    assert written.json()["choices"][0]["text"]


def test_an_adapter_keeps_the_books_of_a_foreign_scheduler():
    module = example("vllm_adapter")
    books = module.main().books
    assert books.free_block_count == 12 and books.num_sequences == 0
    manager = module.KVCacheManager(8, 4)
    request = module.Request("a", list(range(9)), skip_reading_prefix_cache=True)
    assert len(manager.allocate_slots(request, 9)) == 3
    request.num_computed_tokens = 9
    request.all_token_ids += [50, 51, 52]
    assert len(manager.allocate_slots(request, 3)) == 0  # two of them are drafts
    request.num_computed_tokens, request.all_token_ids[10:] = 10, [60]
    assert manager.allocate_slots(request, 1) == ()
    manager.books.check()
    assert manager.get_computed_blocks(module.Request("b", list(range(9))))[1] == 8
    manager.free(request)
    assert manager.usage == 0.0 and isinstance(manager.books, BlockManager)


def test_every_example_is_listed_in_the_docs():
    page = (ROOT / "docs" / "examples.md").read_text()
    assert set(re.findall(r"`examples/(\w+\.py)` \|", page)) == {path.name for path in EXAMPLES}
    assert len(EXAMPLES) >= 7


def test_the_source_distribution_has_them():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "examples" in project["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
