"""benchmarks/cpu_engines.py without any engine: what the works ask for, what its table says, engines that fail."""

from __future__ import annotations

import importlib
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmarks(monkeypatch):
    """Return a function that imports a module of the benchmarks, and forget all of them afterwards."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if (BENCHMARKS / f"{name}.py").exists():
            del sys.modules[name]


@pytest.fixture
def asked(benchmarks):
    """Do a work with an engine that answers 7 and takes a second for a call and a tenth for a token."""
    works, process = benchmarks("cpu_engine_works"), benchmarks("cpu_engine_process")

    def do(work, most=None, extra=()):
        calls, extra = [], list(extra)

        def ask(prompts, count):
            calls.append(([list(prompt) for prompt in prompts], count))
            seconds = 1 + count / 10 + (extra.pop(0) if extra else 0)
            return process.Answer(seconds, 2 * seconds, [[7] * count for _ in prompts])

        outcome = works.WORKS[work](ask, works.Source(None), random.Random(0), works.SHORT, most)
        return works.SHORT, calls, outcome

    return do


def test_a_stream_is_timed_without_its_prompt(asked):
    sizes, calls, outcome = asked("a", extra=[50.0])  # the first call is disturbed
    assert [count for _, count in calls] == [1, sizes.stream + 1, 1]
    assert {len(prompts[0]) for prompts, _ in calls} == {sizes.prompt}
    assert len({prompts[0][0] for prompts, _ in calls}) == 3  # or the later ones would be found in a cache
    assert outcome.seconds == pytest.approx(0.1) and outcome.processor == pytest.approx(0.2)


def test_a_disturbed_prompt_does_not_make_a_stream_fast(asked):
    sizes, _, outcome = asked("a", extra=[50.0, 0.0, 50.0])
    assert outcome.seconds == pytest.approx((1 + (sizes.stream + 1) / 10) / sizes.stream)


@pytest.mark.parametrize("work", ["c", "w"])
def test_many_requests_have_their_system_prompt_in_common_and_no_more(asked, work):
    sizes, calls, outcome = asked(work)
    prompts, count = calls[-1]
    assert count == sizes.new and len(outcome.texts) == len(prompts) == sizes.requests
    system = prompts[0][: sizes.system]
    assert all(prompt[: sizes.system] == system for prompt in prompts)
    assert len({prompt[sizes.system] for prompt in prompts}) > 1
    assert len(calls) == (2 if work == "w" else 1)
    assert all(prompt[:-1] == system for prompt in calls[0][0]) or work == "c"


def test_chats_go_on_with_the_answers(asked):
    sizes, calls, outcome = asked("d", most=1)
    assert len(outcome.texts) == 1 and len(calls) == 2 * sizes.turns
    for (before, _), (after, count) in zip(calls[1::2], calls[2::2], strict=False):
        assert after[0][: len(before[0]) + sizes.answer] == before[0] + [7] * sizes.answer and count == 1


def run_of(benchmarks, **seconds):
    """Return a run in which every engine took so many seconds for work a, and for work c ten times as many."""
    module, works = benchmarks("cpu_engines"), benchmarks("cpu_engine_works")
    run = module.Run("float32", reads=[module.BANDWIDTH_BYTES / 2e9, module.BANDWIDTH_BYTES / 1e9])
    for name, value in seconds.items():
        name = {"ours": module.OURS, "plain": module.REFERENCE}.get(name, name)
        spec = SimpleNamespace(engine="transformers" if name == module.REFERENCE else name)
        run.engines[name] = SimpleNamespace(spec=spec)
        run.outcomes["a", name] = [works.Outcome(2 * value, value, [[1]]), works.Outcome(value, value, [[1]])]
        if spec.engine != "transformers":
            run.outcomes["c", name] = [works.Outcome(10 * value, value, [[1], [2]])]
    run.expected = {"a": [[[1]], [[3]]], "c": [[[1]]]}
    return module, run


def by_name(rows):
    return {row["name"]: row for row in rows}


def test_the_best_peer_is_compared_with_the_best_round_of_ours(benchmarks):
    module, run = run_of(benchmarks, ours=0.02, plain=0.05, vllm=0.03, llamacpp=0.021)
    rows = by_name(module.work_rows(run, "a"))
    against = rows["float32 a, one stream: time of the best peer / ours"]
    assert (against["value"], against["met"], against["note"].split(";")[0]) == (1.05, False, "llamacpp")
    plain = rows["float32 a, one stream: time of transformers float32 / ours"]
    assert (plain["value"], plain["target"], plain["met"]) == (2.5, 2.7, False)
    ours = rows["float32 a, one stream: pagedkv"]
    assert ours["value"] == 50 and "1 of 2 texts as transformers" in ours["note"]
    many = by_name(module.work_rows(run, "c"))
    assert "float32 c, many at once: transformers float32" not in many
    assert "1 of 1 texts as transformers" in many["float32 c, many at once: vllm"]["note"]


def test_a_step_is_held_against_the_bandwidth(benchmarks):
    module, run = run_of(benchmarks, ours=0.02)
    line = module.limit_row(run, 4_000_000, 2)  # 16 MB at 1 GB/s, as memory was in the better turn
    assert line["value"] == pytest.approx(1.25) and line["met"] is True
    assert line["note"].endswith("; 3.12 × in the median of 2 turns")
    assert module.limit_row(run, 3_900_000, 2)["met"] is False


def test_an_embedding_that_is_no_head_is_not_read_by_a_step(benchmarks, tmp_path):
    module = benchmarks("cpu_engines")
    numbers = {"model.embed_tokens.weight": torch.zeros(10, 4), "model.norm.weight": torch.zeros(4)}
    save_file(numbers, tmp_path / "a.safetensors")
    assert module.parameters(tmp_path) == (44, 44)
    save_file({"lm_head.weight": torch.zeros(10, 4)}, tmp_path / "b.safetensors")
    assert module.parameters(tmp_path) == (84, 44)


def test_an_engine_that_is_not_installed_says_so(benchmarks):
    process = benchmarks("cpu_engine_process")
    with pytest.raises(process.EngineFailed, match=r"mine ended: .*no_such_engine"):
        process.EngineProcess(process.Spec("mine", "no_such_engine", "", "float32", sys.executable), 1, {})


def test_a_chat_of_llamacpp_keeps_its_slot(benchmarks):
    llamacpp = benchmarks("cpu_engine_llamacpp")
    engine, written = llamacpp.LlamaCpp.__new__(llamacpp.LlamaCpp), []
    engine._slots, engine._used = [[], []], [0, 1]
    engine._alone = SimpleNamespace(
        forget=lambda slot, start: None,
        write=lambda prompts, slots, known, count: written.append((slots[0], known)) or [[9] * count],
    )
    one, two = [1, *range(100, 140)], [1, *range(200, 240)]
    for prompt in (one, two, [*one, 9, 9, 5], [*two, 9, 9, 6], list(range(300, 340))):
        engine.generate([prompt], 3)
    assert written == [(0, 0), (1, 0), (0, 43), (1, 43), (0, 0)]
