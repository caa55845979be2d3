"""The engine's core over a fake model: every text is what it would be alone."""

from __future__ import annotations

import numpy as np
import pytest
from tests.engine.fakes import VOCAB, FakeRunner, alone, engine, logits_of, request, run, tokens_of

from pagedkv import InvalidOperation
from pagedkv.engine import RequestRefused


def greedy(prompt, count):
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(logits_of(np.array(tokens)).argmax()))
    return tuple(tokens[len(prompt) :])


def prompts(count, shared=9, seed=0):
    random = np.random.default_rng(seed)
    head = random.integers(0, VOCAB, shared).tolist()
    return [head + random.integers(0, VOCAB, random.integers(1, 25)).tolist() for _ in range(count)]


@pytest.mark.parametrize("max_batch_tokens", [1, 7, 64, 4096])
@pytest.mark.parametrize("prefix_caching", [True, False])
@pytest.mark.parametrize("num_blocks", [20, 4096])
def test_greedy_texts_are_those_of_the_model(max_batch_tokens, prefix_caching, num_blocks):
    core = engine(num_blocks, max_batch_tokens=max_batch_tokens, prefix_caching=prefix_caching)
    given = prompts(12)
    for i, prompt in enumerate(given):
        core.add(request(f"r{i}", prompt, max_tokens=20 + i))
    outputs = run(core)
    for i, prompt in enumerate(given):
        assert tokens_of(outputs[f"r{i}"]) == [greedy(prompt, 20 + i)]
        assert outputs[f"r{i}"].outputs[0].finish_reason == "length"
    assert core.runner.cache.used_block_count == 0
    stats = core.stats()
    assert stats.generation_tokens == sum(20 + i for i in range(12))
    if num_blocks == 20 and max_batch_tokens >= 64:
        assert stats.num_preemptions > 0


def test_who_waits_for_a_prefix_does_not_compute_it():
    head = list(range(20))
    core = engine(200, max_batch_tokens=8)
    for i in range(6):
        core.add(request(f"r{i}", [*head, 25, i], max_tokens=3))
    outputs = run(core)
    # The head once; then of each request what lies behind its last full block, and the tokens written but the last.
    assert core.runner.computed_tokens == 20 + 6 * (2 + 2)
    assert [outputs[f"r{i}"].num_cached_tokens for i in range(6)] == [0] + [20] * 5


def test_other_requests_pass_those_that_wait_for_a_prefix():
    core = engine(200, max_batch_tokens=100)
    core.add(request("first", list(range(20)), max_tokens=9))
    core.add(request("same", [*range(20), 1], max_tokens=9))
    core.add(request("other", [9] * 10, max_tokens=9))
    core.step()
    assert core.runner.batches == [[20, 10]]
    core.step()
    assert core.runner.batches[1:] == [[1, 1, 1]] and core.stats().num_running == 3


def test_decoding_goes_first_and_prompts_come_in_chunks():
    core = engine(200, max_batch_tokens=8)
    core.add(request("a", [1] * 5, max_tokens=30))
    core.add(request("b", [2] * 20, max_tokens=30))
    for _ in range(5):
        core.step()
    assert core.runner.batches == [[5, 3], [1, 7], [1, 7], [1, 3], [1, 1]]


def test_higher_priorities_first_then_arrival():
    core = engine(200, max_num_seqs=1)
    for name, priority in (("a", 0), ("b", 1), ("c", 5), ("d", 1)):
        core.add(request(name, [1, 2], max_tokens=2, priority=priority))
    order = []
    while core.has_work:
        order += [output.request_id for output in core.step() if output.finished]
    assert order == ["c", "b", "d", "a"]


def test_the_victim_is_the_newest_of_the_lowest_priority_and_never_the_first():
    core = engine(16, max_batch_tokens=100)
    for name, priority in (("old", 0), ("high", 1), ("new", 0)):
        core.add(request(name, [ord(name[0]) % VOCAB] * 8, max_tokens=40, priority=priority))
    outputs = run(core)
    preempted = {name: output.metrics.num_preemptions for name, output in outputs.items()}
    assert preempted["high"] == 0 and preempted["new"] > 0
    for name, output in outputs.items():
        assert tokens_of(output) == [greedy([ord(name[0]) % VOCAB] * 8, 40)]


def test_who_is_let_in_is_not_preempted_by_the_next_step():
    core = engine(24, max_batch_tokens=64)
    for i in range(30):
        core.add(request(f"r{i}", [i] * (3 + i % 9), max_tokens=25))
    fresh: set[object] = set()
    while core.has_work:
        before = set(core.scheduler.running)
        core.step()
        assert all(sequence in core.scheduler.running or sequence.finish_reason for sequence in fresh)
        fresh = set(core.scheduler.running) - before
    assert core.stats().num_preemptions > 0


def test_n_texts_share_their_prompt_and_differ():
    core = engine(200)
    core.add(request("r", list(range(14)), max_tokens=12, n=4, temperature=1.0, seed=1))
    core.step()
    assert core.runner.cache.used_block_count == 4  # all of them in the same blocks
    output = run(core)["r"]
    assert len(set(tokens_of(output))) == 4 and [each.index for each in output.outputs] == [0, 1, 2, 3]
    core.add(request("s", list(range(14)), max_tokens=12, temperature=1.0, seed=1))
    assert tokens_of(run(core)["s"]) == tokens_of(output)[:1]


def test_refused_with_the_numbers():
    core = engine(8, max_num_seqs=3)
    core.runner.max_positions = 30
    for options, text in (
        ({"max_tokens": 24}, r"10 prompt tokens and max_tokens = 24 need 9 blocks of 4 tokens at once, the pool has 8"),
        ({"max_tokens": 21}, r"are 31 positions, the model has 30"),
        ({"max_tokens": 3, "n": 4}, r"4 texts at once exceed max_num_seqs = 3"),
        ({"max_tokens": 12, "beam_width": 3}, r"need 14 blocks of 4 tokens at once"),
        ({"max_tokens": None, "streaming": (2, 40)}, r"= None need 12 blocks .* stream through a smaller window"),
    ):
        with pytest.raises(RequestRefused, match=text):
            core.add(request("r", [1] * 10, **options))
    assert not core.has_work
    core.add(request("r", [1] * 10, max_tokens=None))
    assert len(tokens_of(run(core)["r"])[0]) == 20


def test_bad_requests_are_named():
    core = engine(eos_token_ids=[3], strategy="priority:levels=2")
    core.add(request("r", [1]))
    for new, text in (
        (request("r", [1]), "request_id: expected one that is not in use, got 'r'"),
        (request("s", []), "at least one token id"),
        (request("s", [[1]]), "flat list"),
        (request("s", ["a"]), "flat list"),
        (request("s", [VOCAB]), f"0 … {VOCAB - 1}, got {VOCAB}"),
        (request("s", [1], priority=2), "priority"),
        (request("s", [1], cache_salt=3), "cache_salt: expected a str, got 3"),
        (request("s", [1], stop="x"), "no tokenizer"),
        (request("s", [1], stop_token_ids=[VOCAB]), "stop_token_ids"),
    ):
        with pytest.raises(InvalidOperation, match=text):
            core.add(new)
    assert core.stats().num_waiting == 1


def test_abort_at_any_moment():
    for steps in range(6):
        core = engine(64, max_batch_tokens=5)
        core.add(request("r", [1] * 12, max_tokens=9, n=2, temperature=1.0))
        core.add(request("s", [2] * 5, max_tokens=9))
        for _ in range(steps):
            core.step()
        output = core.abort("r")
        assert output.finished and {each.finish_reason for each in output.outputs} == {"abort"}
        assert core.abort("r") is None
        assert tokens_of(run(core)["s"]) == [greedy([2] * 5, 9)]
        assert core.runner.cache.used_block_count == 0 and core.stats().aborted_requests == 1


def test_a_step_that_fails_never_was():
    core = engine(64)
    core.add(request("r", [1] * 6, max_tokens=9))
    core.step()
    for _ in range(2):
        core.runner.fail = True
        with pytest.raises(RuntimeError, match="the model broke"):
            core.step()
        core.runner.cache.check()
    core.runner.fail = False
    assert tokens_of(run(core)["r"]) == [greedy([1] * 6, 9)]


def test_a_request_without_numbers_ends_alone(caplog):
    class Broken(FakeRunner):
        def forward(self, plan, token_ids, wanted):
            logits = super().forward(plan, token_ids, wanted)
            logits[[i for i, place in enumerate(wanted.tolist()) if token_ids[place] == 30]] = np.nan
            return logits

    core = engine(runner=Broken(64))
    core.add(request("good", [1] * 6, max_tokens=5))
    core.add(request("bad", [2, 30], max_tokens=5))
    outputs = run(core)
    assert outputs["bad"].outputs[0].finish_reason == "abort" and "bad" in caplog.text
    assert tokens_of(outputs["good"]) == [greedy([1] * 6, 5)]


def test_ends():
    text = greedy([1, 2], 30)
    stop = text[10]
    first = text.index(stop)
    for options, eos in (({"stop_token_ids": [stop]}, []), ({}, [stop])):
        core = engine(eos_token_ids=eos)
        core.add(request("r", [1, 2], max_tokens=30, **options))
        ended = run(core)["r"].outputs[0]
        assert (ended.token_ids, ended.finish_reason, ended.stop_reason) == (text[: first + 1], "stop", stop)
    core = engine(eos_token_ids=[stop])
    core.add(request("r", [1, 2], max_tokens=30, ignore_eos=True))
    core.add(request("s", [1, 2], max_tokens=30, min_tokens=20))
    outputs = run(core)
    assert tokens_of(outputs["r"]) == [text]
    assert len(tokens_of(outputs["s"])[0]) > 20 and stop not in tokens_of(outputs["s"])[0][:20]


@pytest.mark.parametrize("options", [{}, {"temperature": 0.9, "seed": 3}, {"beam_width": 3}])
def test_ends_that_the_model_has_no_logit_of(options):
    texts = []
    end = greedy([1, 2], 1)[0] - VOCAB
    for eos in ([], [VOCAB, 10 * VOCAB, end]):
        core = engine(eos_token_ids=eos)
        core.add(request("r", [1, 2], max_tokens=9, min_tokens=3, **options))
        texts.append(tokens_of(run(core)["r"]))
    assert texts[0] == texts[1]


@pytest.mark.parametrize("options", [{}, {"beam_width": 2, "n": 2}])
def test_where_every_token_ends_a_text_it_is_written_though(options):
    core = engine()
    core.add(request("r", [1, 2], max_tokens=9, min_tokens=3, stop_token_ids=range(VOCAB), **options))
    texts = tokens_of(run(core)["r"])
    assert len(texts) == options.get("n", 1) and all(texts)


@pytest.mark.parametrize("max_batch_tokens", [1, 3, 100])
def test_prompt_logprobs_are_those_of_the_model(max_batch_tokens):
    prompt = prompts(1, 20)[0]
    core = engine(200, max_batch_tokens=max_batch_tokens)
    core.add(request("seen", prompt, max_tokens=1))
    run(core)
    core.add(request("r", prompt, max_tokens=3, prompt_logprobs=2))
    output = run(core)["r"]
    assert output.prompt_logprobs[0] is None and len(output.prompt_logprobs) == len(prompt)
    for i in range(1, len(prompt)):
        logits = logits_of(np.array(prompt[:i])).astype(np.float64)
        expected = logits[prompt[i]] - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
        assert output.prompt_logprobs[i][prompt[i]].logprob == pytest.approx(expected, abs=1e-3)
    assert tokens_of(output) == [greedy(prompt, 3)]


def test_logits_of_prompts_are_held_a_few_at_a_time(monkeypatch):
    rows = 10
    monkeypatch.setattr("pagedkv.engine.batch.SCORED_BYTES", 4 * rows * FakeRunner.vocab_size)
    core, held = engine(200, max_batch_tokens=100), []
    forward = core.runner.forward

    def watched(plan, token_ids, wanted):
        held.append(len(wanted))
        return forward(plan, token_ids, wanted)

    core.runner.forward = watched
    texts = prompts(3, 40)
    for name, prompt in zip("abc", texts, strict=True):
        core.add(request(name, prompt, max_tokens=2, prompt_logprobs=1))
    outputs = run(core)
    for name, prompt in zip("abc", texts, strict=True):
        assert len(outputs[name].prompt_logprobs) == len(prompt) and tokens_of(outputs[name]) == [greedy(prompt, 2)]
    assert max(held) <= rows + 2 * len(texts)  # a row for each prompt that would starve, and one that is written


@pytest.mark.parametrize("streaming", [(0, 5), (3, 6), (4, 8)])
def test_streams_see_sinks_and_window(streaming):
    sink, window = streaming
    prompt = prompts(1, 20)[0]
    text = list(prompt)
    for _ in range(40):
        seen = text if len(text) <= sink + window + 1 else text[:sink] + text[-window - 1 :]
        text.append(int(logits_of(np.array(seen)).argmax()))
    core = engine(8, max_batch_tokens=7)
    core.add(request("r", prompt, max_tokens=40, streaming=streaming))
    assert tokens_of(run(core)["r"]) == [tuple(text[len(prompt) :])]


def test_counters():
    core = engine(200, max_batch_tokens=64)
    for name in ("a", "b"):
        core.add(request(name, list(range(20)), max_tokens=5))
    assert (core.stats().num_waiting, core.stats().num_running) == (2, 0)
    outputs = run(core)
    stats = core.stats()
    assert (stats.finished_requests, stats.generation_tokens, stats.prompt_tokens) == (2, 10, 40)
    assert (stats.prefix_queries, stats.prefix_hits) == (40, 16 + 3)
    assert 0 < stats.bookkeeping_seconds < stats.busy_seconds and stats.steps == len(core.runner.batches)
    times = outputs["b"].metrics
    assert times.arrived <= times.first_scheduled <= times.first_token <= times.finished


def test_an_admission_that_fails_leaves_no_trace(monkeypatch):
    core = engine(64)
    core.add(request("r", [1] * 6, max_tokens=9))
    core.step()
    core.add(request("s", [2] * 6, max_tokens=9))
    with monkeypatch.context() as patch:
        patch.setattr(core.runner.cache, "match_prefix", None)
        with pytest.raises(TypeError):
            core.step()
    core.runner.cache.check()
    outputs = run(core)
    assert tokens_of(outputs["r"]) == [greedy([1] * 6, 9)] and tokens_of(outputs["s"]) == [greedy([2] * 6, 9)]


def test_who_has_entered_when_an_admission_fails_is_computed_anew(monkeypatch):
    core = engine(64)
    for name in "rs":
        core.add(request(name, [ord(name) % VOCAB] * 6, max_tokens=9))
    allocate = core.runner.cache.allocate

    def only_once(seq_id, *args, **options):
        if core.runner.cache.num_sequences:
            raise TypeError("a strategy of the user's")
        return allocate(seq_id, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(core.runner.cache, "allocate", only_once)
        with pytest.raises(TypeError):
            core.step()
    core.runner.cache.check()
    outputs = run(core)
    for name in "rs":
        assert tokens_of(outputs[name]) == [greedy([ord(name) % VOCAB] * 6, 9)]


def test_interrupted_texts_go_on(monkeypatch):
    core = engine(64)
    for name in "rs":
        core.add(request(name, [ord(name) % VOCAB] * 6, max_tokens=9))
    core.step()
    with monkeypatch.context() as patch:
        patch.setattr(core.runner.cache, "commit", None)
        with pytest.raises(TypeError):
            core.step()
    core.runner.cache.check()
    outputs = run(core)
    for name in "rs":
        assert tokens_of(outputs[name]) == [greedy([ord(name) % VOCAB] * 6, 9)]


@pytest.mark.parametrize("max_batch_tokens", [4, 8, 512])
def test_samples_get_no_drafts_before_they_are_forked(max_batch_tokens):
    """The last token of the prompt is computed alone, like one of a text that is being written."""
    prompt = [1, 2, 3, 1, 2, 3, 1, 2, 3]
    wanted, found = (
        request("r", prompt, n=2, temperature=1.0, seed=3, max_tokens=8, prompt_lookup=lookup) for lookup in (0, 3)
    )
    core = engine(max_batch_tokens=max_batch_tokens)
    core.add(found)
    assert tokens_of(run(core)["r"]) == alone(wanted)


def test_what_is_pinned_stays_in_the_pool_until_it_is_unpinned():
    core = engine(16)
    core.add(request("first", list(range(12)), max_tokens=1))
    run(core)
    pinned = core.pin(range(12))
    assert pinned.num_tokens == 12 and core.pin([30, 29, 28, 27]).num_tokens == 0

    def fill(name):
        for start in range(4):
            core.add(request(f"{name}{start}", [start, *range(20, 28)] * 4, max_tokens=8))
        run(core)

    fill("a")
    core.add(request("second", [*range(12), 1], max_tokens=1))
    assert run(core)["second"].num_cached_tokens == 12
    core.unpin(pinned.handle)
    core.unpin(pinned.handle)  # gone already
    fill("b")
    core.add(request("third", [*range(12), 1], max_tokens=1))
    assert run(core)["third"].num_cached_tokens == 0
    core.runner.cache.check()


def test_pins_never_keep_a_request_from_being_computed():
    core = engine(16)
    for number in range(2):
        core.add(request(f"r{number}", [number] * 12, max_tokens=1))
        run(core)
    older, newer = core.pin([0] * 12), core.pin([1] * 12)
    core.add(request("large", [2] * 40, max_tokens=8))  # 12 of 16 blocks: one pin has to go
    core.add(request("small", [3] * 4, max_tokens=4))
    outputs = run(core)
    assert tokens_of(outputs["large"]) == [greedy([2] * 40, 8)] and tokens_of(outputs["small"]) == [greedy([3] * 4, 4)]
    assert core.runner.cache.free_block_count == 16 - 3
    core.unpin(newer.handle)
    core.unpin(older.handle)
    assert core.runner.cache.free_block_count == 16
    core.runner.cache.check()
