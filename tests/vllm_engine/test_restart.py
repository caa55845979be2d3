"""The connector inside vLLM: same tokens with and without it, after a restart, and whatever happens to what was kept.

A start of vLLM takes a minute or two, so that each is used for several checks.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiers.resp_server import RespServer
from tests.vllm_engine.process import VllmProcess
from transformers import LlamaConfig, LlamaForCausalLM

from pagedkv.tiers import check_tier, inspect_tier

VOCABULARY, BLOCK = 512, 32
LENGTHS = (300, 517, 64, 31, 1000)


def made(folder: Path, seed: int) -> Path:
    """Save a small Llama whose next token depends on all before it."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def prompts(seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [rng.choices(range(VOCABULARY), k=length) for length in LENGTHS]


def whole(length: int) -> int:
    """Tokens of a prompt that can be found: whole blocks, and never its last token."""
    return (length - 1) // BLOCK * BLOCK


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vllm")


@pytest.fixture(scope="module")
def model(folder: Path) -> Path:
    return made(folder / "one", 1)


@pytest.fixture
def started(folder: Path) -> Iterator[Any]:
    """Start vLLM; it ends with the test."""
    running: list[VllmProcess] = []

    def start(model: Path, connector: dict[str, Any] | None = None, **options: Any) -> VllmProcess:
        running.append(VllmProcess(model, folder / "log", connector, **options))
        return running[-1]

    yield start
    for each in running:
        each.kill()


@pytest.fixture(scope="module")
def alone(folder: Path, model: Path) -> list[list[int]]:
    """What vLLM writes without the connector."""
    engine = VllmProcess(model, folder / "log")
    try:
        answers = [engine.ask(prompt)["tokens"][0] for prompt in prompts()]
        assert engine.ask(*prompts())["tokens"] == answers
        return answers
    finally:
        engine.kill()


def test_a_prefix_survives_a_kill_and_damage_costs_time_alone(
    started: Any, folder: Path, model: Path, alone: list[list[int]]
) -> None:
    kept = {"disk": str(folder / "kept"), "disk_size": "256MiB"}
    engine = started(model, kept)
    for prompt, tokens in zip(prompts(), alone, strict=True):
        answer = engine.ask(prompt)
        assert (answer["tokens"], answer["cached"]) == ([tokens], [0])
    engine.empty_pool()
    together = engine.ask(*prompts())
    assert together["tokens"] == alone and together["cached"] == [whole(length) for length in LENGTHS]
    assert engine.ask(prompts()[0], salt="other")["cached"] == [0]
    time.sleep(1)
    engine.kill()
    assert check_tier(folder / "kept").corrupt == 0

    engine = started(model, kept)
    for prompt, tokens in zip(prompts(), alone, strict=True):
        answer = engine.ask(prompt)
        assert (answer["tokens"], answer["cached"]) == ([tokens], [whole(len(prompt))])
    longer = prompts()[1] + alone[1] + prompts(1)[0]
    assert engine.ask(longer)["cached"][0] >= whole(LENGTHS[1])
    engine.empty_pool()
    assert engine.ask(prompts()[0], salt="other")["cached"] == [whole(LENGTHS[0])]
    engine.close()

    slab, rng = folder / "kept" / "slab", random.Random(0)
    data = bytearray(slab.read_bytes())
    step = len(data) // inspect_tier(folder / "kept").num_slots
    for slot in range(len(data) // step):
        if rng.random() < 0.4:
            data[slot * step + rng.randrange(4096)] ^= 1 << rng.randrange(8)
    slab.write_bytes(data)
    engine = started(model, kept)
    for turn in range(2):  # the second time everything is mended
        answers = [engine.ask(prompt) for prompt in prompts()]
        assert [answer["tokens"][0] for answer in answers] == alone
        cached, wanted = sum(answer["cached"][0] for answer in answers), sum(map(whole, LENGTHS))
        assert cached < wanted if turn == 0 else cached == wanted
        engine.empty_pool()
    engine.clear()
    assert [engine.ask(prompt)["cached"] for prompt in prompts()] == [[0]] * len(LENGTHS)
    engine.close()


def test_another_model_finds_nothing_in_the_same_directory(started: Any, folder: Path, model: Path) -> None:
    other = made(folder / "two", 2)
    judge = LlamaForCausalLM.from_pretrained(other, dtype=torch.float32)
    kept = {"disk": str(folder / "kept"), "disk_size": "256MiB"}
    engine = started(other, kept)
    for prompt in prompts():
        answer = engine.ask(prompt)
        ids = torch.tensor([prompt])
        tokens = judge.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        assert (answer["tokens"][0], answer["cached"]) == (tokens[0, len(prompt) :].tolist(), [0])


def test_a_server_that_stalls_dies_or_damages_is_a_miss(started: Any, model: Path, alone: list[list[int]]) -> None:
    server = RespServer()
    try:
        engine = started(model, {"resp": server.url, "timeout": 5.0, "patience": 8.0})

        def cached(most_seconds: float = 60.0) -> list[int]:
            engine.empty_pool()
            answers = [engine.ask(prompt) for prompt in prompts()]
            assert [answer["tokens"][0] for answer in answers] == alone
            assert max(answer["seconds"] for answer in answers) < most_seconds
            return [answer["cached"][0] for answer in answers]

        everything, nothing = [whole(length) for length in LENGTHS], [0] * len(LENGTHS)
        assert cached() == nothing
        assert cached() == everything
        server.stalls_at = "GET"
        assert cached(30.0) == nothing
        server.heal()
        server.values = {key: value[:-1] + bytes([value[-1] ^ 1]) for key, value in server.values.items()}
        time.sleep(20)  # a server that failed is left alone for a while
        assert sum(cached()) == 0
        server.stop()
        assert cached(30.0) == nothing
        server.start()
        time.sleep(30)
        cached()
        assert cached() == everything
    finally:
        server.stop()
