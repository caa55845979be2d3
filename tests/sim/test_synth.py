from __future__ import annotations

import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest
from tests.sim.traces import as_requests

from pagedkv.errors import InvalidOperation
from pagedkv.sim.reading import read_trace
from pagedkv.sim.synth import DEFAULT_REQUESTS, synthesize
from pagedkv.sim.trace import NO_PARENT, Trace, write_trace
from pagedkv.sim.trace_stats import describe
from pagedkv.sim.traffic import KINDS, TRAFFIC

ARRAYS = ("times", "input_tokens", "output_tokens", "sessions", "offsets", "ids", "parents")
STEADY = {
    name: 0.0
    for name in ("turns_spread", "think_spread", "system_spread", "first_spread", "message_spread", "output_spread")
}


def digest(trace: Trace) -> str:
    return hashlib.sha256(b"".join(getattr(trace, name).tobytes() for name in ARRAYS)).hexdigest()


def check(trace: Trace) -> None:
    """Raise where the trace is not what `Trace` promises."""
    seen: set[int] = set()
    for blocks, tokens in zip(as_requests(trace), trace.input_tokens.tolist(), strict=True):
        assert len(blocks) == -(-tokens // trace.block_tokens) and len(set(blocks)) == len(blocks)
        for parent, block in zip([NO_PARENT, *blocks[:-1]], blocks, strict=True):
            assert trace.parents[block] == parent
            assert block in seen or block == len(seen)  # dense, in the order of first appearance
            seen.add(block)
    assert len(seen) == trace.num_distinct
    assert trace.times[0] == 0.0 and (np.diff(trace.times) >= 0).all()
    np.testing.assert_array_equal(trace.times, np.round(trace.times * 1000) / 1000)
    assert trace.input_tokens.min() >= 1 and trace.output_tokens.min() >= 1
    _, first = np.unique(trace.sessions, return_index=True)
    assert (np.diff(first) > 0).all() and trace.sessions.max() == len(first) - 1


# ---------------------------------------------------------------- every kind


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block_tokens", [16, 512])
def test_a_trace_is_chained_dense_and_in_order(kind, block_tokens):
    trace = synthesize(kind, requests=300, block_tokens=block_tokens, seed=1)
    check(trace)
    assert trace.num_requests == 300 and trace.block_tokens == block_tokens and trace.has_content


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_gives_the_same_bytes(kind):
    assert digest(synthesize(kind, requests=500, seed=7)) == digest(synthesize(kind, requests=500, seed=7))
    assert digest(synthesize(kind, requests=500, seed=7)) != digest(synthesize(kind, requests=500, seed=8))


FROZEN = {
    "chat": ("ad4f2e4230427973", {}),
    "agents": ("38e29088e650bf3e", {}),
    "rag": ("93082ff2cb4e30cb", {}),
    "mixed": ("64458c495ef498a8", {}),
    "a power law of exponent 1": (
        "248641fe822e104a",
        {"requests": 5000, "system_zipf": 1.0, "turns": 20, "idle_share": 0.5},
    ),
}


@pytest.mark.parametrize("name", FROZEN)
def test_a_trace_stays_what_it_was_from_release_to_release(name):
    frozen, parameters = FROZEN[name]
    kind = name if name in KINDS else "chat"
    assert digest(synthesize(kind, **{"requests": 3000, **parameters})).startswith(frozen)


@pytest.mark.parametrize("kind", KINDS)
def test_more_traffic_begins_as_less_does(kind):
    """The arrays of the longer one had to grow, which must change nothing."""
    short, long = synthesize(kind, requests=50, seed=3), synthesize(kind, requests=5_000, seed=3)
    for name in ("times", "input_tokens", "output_tokens", "sessions", "ids", "parents"):
        part = getattr(short, name)
        np.testing.assert_array_equal(part, getattr(long, name)[: len(part)])


def test_accesses_are_reached_with_the_last_request():
    trace = synthesize("chat", accesses=30_000, seed=2)
    assert trace.offsets[-2] < 30_000 <= trace.num_accesses
    assert digest(trace) == digest(synthesize("chat", requests=trace.num_requests, seed=2))
    both = synthesize("chat", requests=10, accesses=30_000, seed=2)
    assert both.num_requests == 10


def test_requests_have_a_default():
    assert synthesize("rag").num_requests == DEFAULT_REQUESTS


@pytest.mark.parametrize("kind", KINDS)
def test_a_written_trace_reads_as_the_same(kind, tmp_path):
    trace = synthesize(kind, requests=200, seed=5)
    write_trace(trace, tmp_path / "trace.jsonl.gz")
    found = read_trace(tmp_path / "trace.jsonl.gz")
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(trace, name), getattr(found, name))


def test_many_sessions_at_once_and_many_prompts():
    """More than the first slots and the first table hold."""
    trace = synthesize("chat", requests=6_000, turns=50, think_seconds=1e6, system_prompts=10**6, system_zipf=0.0)
    check(trace)
    assert trace.sessions.max() > 2_000
    prompts = {blocks[1] for blocks in as_requests(trace) if len(blocks) > 1}
    assert len(prompts) > 2_000


@pytest.mark.parametrize("kind", KINDS)
def test_little_room_at_first_changes_nothing(kind, monkeypatch):
    arguments = {"requests": 3_000, "rate": 50.0, "subagent_share": 0.3}
    roomy = digest(synthesize(kind, **arguments))
    monkeypatch.setattr("pagedkv.sim.synth._FIRST_SLOTS", 1)
    monkeypatch.setattr("pagedkv.sim.synth._FIRST_KNOWN", 2)
    assert digest(synthesize(kind, **arguments)) == roomy


def test_uncompiled_code_gives_the_same_trace():
    program = (
        "from tests.sim.test_synth import digest; from pagedkv.sim.synth import synthesize;"
        "print(digest(synthesize('mixed', requests=60, seed=4, subagent_share=0.3)))"
    )
    environment = os.environ | {"NUMBA_DISABLE_JIT": "1"}
    said = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120)
    assert said.stdout.strip() == digest(synthesize("mixed", requests=60, seed=4, subagent_share=0.3)), said.stderr


@pytest.mark.parametrize("kind", ["chat", "rag"])
def test_the_rate_is_kept_in_the_long_run(kind):
    trace = synthesize(kind, requests=40_000, rate=2.0, think_seconds=5.0, turns_spread=0.3)
    assert trace.num_requests / trace.times[-1] == pytest.approx(2.0, rel=0.1)


def test_the_rate_of_agents_counts_their_sub_agents():
    trace = synthesize("agents", requests=60_000, rate=4.0, turns=10, idle_share=0.0, subagent_share=0.1)
    assert trace.num_requests / trace.times[-1] == pytest.approx(4.0, rel=0.1)


# ---------------------------------------------------------------- chat


def test_one_turn_behind_one_system_prompt_by_hand():
    trace = synthesize(
        "chat",
        requests=3,
        block_tokens=4,
        turns=1,
        system_prompts=1,
        **STEADY,
        common_tokens=6,
        system_tokens=4,
        first_tokens=3,
        output_tokens=9,
    )
    assert trace.input_tokens.tolist() == [13, 13, 13] and trace.output_tokens.tolist() == [9, 9, 9]
    assert as_requests(trace) == [[0, 1, 2, 3], [0, 1, 4, 5], [0, 1, 6, 7]]  # 10 tokens shared: two whole blocks
    assert trace.sessions.tolist() == [0, 1, 2]


def test_a_session_grows_by_its_answers_and_messages():
    trace = synthesize(
        "chat", requests=2_000, block_tokens=16, seed=1, **STEADY, turns=4, output_tokens=30, message_tokens=20
    )
    requests, turns = as_requests(trace), 0
    for session in range(trace.sessions.max() + 1):
        own = np.flatnonzero(trace.sessions == session)
        for before, after in zip(own[:-1], own[1:], strict=True):
            whole = int(trace.input_tokens[before]) // 16
            assert trace.input_tokens[after] == trace.input_tokens[before] + 50
            assert requests[after][:whole] == requests[before][:whole]
            assert set(requests[after][whole:]).isdisjoint(requests[before])
            turns += 1
    assert turns > 1_000


def test_popularity_of_system_prompts():
    def shares(zipf: float) -> np.ndarray:
        trace = synthesize(
            "chat", requests=20_000, turns=1, common_tokens=0, system_prompts=4, system_zipf=zipf, system_tokens=2_000
        )
        counts = np.bincount([blocks[0] for blocks in as_requests(trace)])
        return np.sort(counts[counts > 0])[::-1] / 20_000

    np.testing.assert_allclose(shares(0.0), [0.25] * 4, atol=0.02)
    expected = np.log([2 / 1, 3 / 2, 4 / 3, 5 / 4]) / np.log(5)  # 1/x over [1, 5), in four pieces
    np.testing.assert_allclose(shares(1.0), expected, atol=0.02)


def test_a_chat_that_reaches_the_longest_input_ends():
    trace = synthesize("chat", requests=500, turns=1_000, first_tokens=100, message_tokens=500, max_tokens=4_000)
    assert trace.input_tokens.max() <= 4_000
    assert trace.sessions.max() > 5


# ---------------------------------------------------------------- agents


def test_context_compaction_keeps_the_system_prompt():
    trace = synthesize(
        "agents",
        requests=2_000,
        **STEADY,
        subagent_share=0.0,
        turns=500,
        common_tokens=1_024,
        system_tokens=1_024,
        summary_tokens=1_000,
        max_tokens=20_000,
        system_prompts=1,
    )
    check(trace)
    requests, compactions = as_requests(trace), 0
    for session in range(trace.sessions.max() + 1):
        own = np.flatnonzero(trace.sessions == session)
        for before, after in zip(own[:-1], own[1:], strict=True):
            assert requests[after][:4] == requests[before][:4]
            if trace.input_tokens[after] < trace.input_tokens[before]:
                compactions += 1
                assert not set(requests[after][4:]) & set(requests[before])
    assert compactions > 10 and trace.input_tokens.max() <= 20_000


def test_sub_agents_share_the_session_of_their_starter_and_run_side_by_side():
    alone = synthesize("agents", requests=3_000, rate=0.01, subagent_share=0.0)
    helped = synthesize("agents", requests=3_000, rate=0.01, subagent_share=0.2, subagents=4)
    assert roots_per_session(alone) == 1
    assert roots_per_session(helped) == 2
    # Two neighbours of a session that are not one context: the second does not begin with the first one's blocks.
    assert switches(alone) < 0.05 < 0.2 < switches(helped)


def roots_per_session(trace: Trace) -> int:
    firsts = trace.ids[trace.offsets[:-1]]
    return max(len(np.unique(firsts[trace.sessions == session])) for session in np.unique(trace.sessions))


def switches(trace: Trace) -> float:
    requests, count, pairs = as_requests(trace), 0, 0
    for session in np.unique(trace.sessions):
        own = np.flatnonzero(trace.sessions == session)
        for before, after in zip(own[:-1], own[1:], strict=True):
            count += requests[after][: len(requests[before]) - 1] != requests[before][:-1]
            pairs += 1
    return count / pairs


def test_idle_gaps():
    def long_pauses(share: float) -> float:
        trace = synthesize("agents", requests=3_000, rate=0.01, subagent_share=0.0, idle_share=share, think_seconds=5)
        pauses = np.concatenate([np.diff(trace.times[trace.sessions == s]) for s in np.unique(trace.sessions)])
        return float((pauses > 120).mean())

    assert long_pauses(0.0) < 0.01 < 0.25 < long_pauses(0.3) < 0.35


# ---------------------------------------------------------------- retrieval


def rag(**parameters) -> Trace:
    """One block a token: 3 of the system prompt, 5 a document, 1 of the question."""
    constant = {"turns": 1, "system_prompts": 1, "common_tokens": 0, "system_tokens": 3, "first_tokens": 1}
    lengths = {"document_tokens": 5, "document_spread": 0.0}
    return synthesize("rag", block_tokens=1, **STEADY, **constant, **lengths, **parameters)


def test_the_chain_depends_on_the_order_of_the_documents():
    trace = rag(requests=200, documents=3, documents_per_request=2)
    check(trace)
    assert set(trace.input_tokens.tolist()) == {3 + 2 * 5 + 1}
    requests = as_requests(trace)
    distinct = [len({blocks[depth] for blocks in requests}) for depth in range(14)]
    assert distinct == [1] * 3 + [3] * 5 + [6] * 5 + [200]  # the pairs of three documents, in either order


def test_popular_documents_are_found_more_often():
    equal = describe(rag(requests=1_000, documents=500, documents_per_request=1, document_zipf=0.0)).content
    skewed = describe(rag(requests=1_000, documents=500, documents_per_request=1, document_zipf=1.5)).content
    assert skewed.hit_ratio > equal.hit_ratio + 0.05


def test_every_document_at_once():
    trace = rag(requests=50, documents=5, documents_per_request=5, document_zipf=3.0)
    assert set(trace.input_tokens.tolist()) == {3 + 5 * 5 + 1}


# ---------------------------------------------------------------- what is wrong


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"kind": "video"}, "kind: expected one of chat, agents, rag, mixed, got 'video'"),
        ({"kind": "chat", "requests": 0}, "requests: expected an int in 1 … 2147483647, got 0"),
        ({"kind": "chat", "requests": -5}, "requests: expected an int in 1 … 2147483647, got -5"),
        ({"kind": "chat", "requests": 1.5}, "requests: expected an int, got 1.5"),
        ({"kind": "chat", "accesses": 0}, "accesses: expected an int in 1 … 1000000000000, got 0"),
        ({"kind": "chat", "seed": -1}, "seed: expected an int in 0 … 9223372036854775807, got -1"),
        ({"kind": "chat", "seed": 2**63}, "seed: expected an int in 0 … 9223372036854775807, got 9223372036854775808"),
        ({"kind": "chat", "seed": True}, "seed: expected an int, got True"),
        ({"kind": "chat", "rate": -1.0}, "rate: expected a number in 1e-06 … 1e+09, got -1.0"),
        ({"kind": "mixed", "rate": 0}, "rate: expected a number in 1e-06 … 1e+09, got 0"),
        ({"kind": "chat", "rate": float("nan")}, "rate: expected a number in 1e-06 … 1e+09, got nan"),
        ({"kind": "chat", "rate": "fast"}, "rate: expected a number, got 'fast'"),
        ({"kind": "chat", "block_tokens": 0}, "block_tokens: expected an int in 1 … 1048576, got 0"),
        ({"kind": "chat", "turns": 0.5}, "turns: expected a number in 1 … 1e+12, got 0.5"),
        ({"kind": "chat", "system_prompts": 0}, "system_prompts: expected an int in 1 … 1099511627776, got 0"),
        ({"kind": "chat", "system_prompts": 2.5}, "system_prompts: expected an int, got 2.5"),
        ({"kind": "agents", "idle_share": 1.1}, "idle_share: expected a number in 0 … 1, got 1.1"),
        ({"kind": "agents", "think_seconds": float("inf")}, "think_seconds: expected a number in 0 … 1e+12, got inf"),
        ({"kind": "rag", "documents": 3}, "documents_per_request: expected at most the 3 documents, got 6"),
        ({"kind": "chat", "colour": 1}, "traffic has no parameter 'colour'; it has rate, turns"),
    ],
)
def test_bad_arguments_are_named(arguments, said):
    with pytest.raises(InvalidOperation) as caught:
        synthesize(**arguments)
    assert said in str(caught.value)


def test_more_than_fits_is_refused(monkeypatch):
    def no_memory(*arguments: object) -> None:
        raise MemoryError

    monkeypatch.setattr("pagedkv.sim.synth.grown", no_memory)
    with pytest.raises(InvalidOperation, match="does not fit into this machine's memory"):
        synthesize("chat", requests=100_000)


def test_more_blocks_than_ids_is_refused(monkeypatch):
    monkeypatch.setattr("pagedkv.sim.synth.MAX_BLOCKS", 5_000)
    with pytest.raises(InvalidOperation, match="would have more than 5000 different blocks: ask for less traffic"):
        synthesize("chat", requests=10_000)
    assert synthesize("chat", requests=10).num_distinct < 5_000


def test_pauses_without_end_stay_numbers():
    trace = synthesize("chat", requests=500, turns=1e12, think_seconds=1e12, think_spread=5, rate=1e-6)
    check(trace)
    assert trace.times[-1] < 1e12


def test_extreme_parameters_stay_within_bounds():
    trace = synthesize(
        "agents", requests=100, message_spread=5, message_tokens=2**30, output_tokens=2**30, output_spread=5, turns=1e12
    )
    check(trace)
    assert trace.input_tokens.max() <= TRAFFIC["agents"].max_tokens
