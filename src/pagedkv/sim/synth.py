"""Synthetic traces: chat, agents and retrieval from stated parameters and a seed."""

from __future__ import annotations

from typing import Any

import numpy as np

from pagedkv.errors import InvalidOperation
from pagedkv.sim.acts import DONE, FULL, act, enter_again
from pagedkv.sim.stage import COUNTERS, MAX_BLOCKS, Stage, empty_stage, grown
from pagedkv.sim.trace import Trace
from pagedkv.sim.traffic import KINDS, TRAFFIC, Traffic, changed, subagents_of

__all__ = ["DEFAULT_REQUESTS", "synthesize"]

DEFAULT_REQUESTS = 10_000
_NO_LIMIT = 2**62
_MOST_ACCESSES = 10**12
_FIRST_REQUESTS = 4096


def synthesize(
    kind: str,
    *,
    requests: int | None = None,
    accesses: int | None = None,
    seed: int = 0,
    rate: float | None = None,
    block_tokens: int = 512,
    **parameters: Any,
) -> Trace:
    """Make up a trace. The same arguments give the same trace, to the bit.

    Parameters
    ----------
    kind : str
        ``"chat"``: sessions of several turns behind popular system prompts. ``"agents"``: long tool-calling sessions
        with sub-agents, idle gaps and compaction. ``"rag"``: an instruction, then popular documents in random order.
        ``"mixed"``: the three at once, each at its own rate.
    requests : int, optional
        How many requests; 10,000 where `accesses` is not given either.
    accesses : int, optional
        Stop with the request that reaches so many block accesses.
    seed : int
        0 … 2**63 − 1.
    rate : float, optional
        Requests per second in the long run; of all kinds together for ``"mixed"``. Without it the kind's own.
    block_tokens : int
        Tokens per block.
    **parameters
        Fields of `pagedkv.sim.traffic.Traffic` that differ from ``TRAFFIC[kind]``; for ``"mixed"`` in all its kinds.

    Returns
    -------
    Trace
        Format ``"synthetic"``, times in whole milliseconds. Sub-agents carry the session number of their starter.

    Raises
    ------
    InvalidOperation
        For an unknown kind or parameter, a value outside of its range, or more than 2**31 − 1 different blocks.

    Notes
    -----
    Sessions arrive as a Poisson process and live in a heap, next request first. A request copies the full blocks of
    the session's last one from where they lie in the trace, so the cost is that of writing the trace.
    """
    kinds, pauses = _cast(kind, rate, parameters)
    if requests is None and accesses is None:
        requests = DEFAULT_REQUESTS
    most_requests = _NO_LIMIT if requests is None else _whole("requests", requests, 1, MAX_BLOCKS)
    most_accesses = _NO_LIMIT if accesses is None else _whole("accesses", accesses, 1, _MOST_ACCESSES)
    _whole("seed", seed, 0, 2**63 - 1)
    _whole("block_tokens", block_tokens, 1, 1 << 20)
    most_blocks = max(-(-traffic.max_tokens // block_tokens) for traffic in kinds)
    room = min(most_requests, _FIRST_REQUESTS if accesses is None else max(1, most_accesses // 16))
    try:
        stage = empty_stage(kinds, pauses, seed, room, 0 if accesses is None else most_accesses, most_blocks)
        most_slots = 1 + max(traffic.subagents for traffic in kinds)
        stage = _play(stage, block_tokens, most_requests, most_accesses, most_blocks, most_slots)
        return _trace(stage, f"{kind} (seed {seed})", block_tokens)
    except MemoryError:
        raise InvalidOperation("the trace does not fit into this machine's memory: ask for less traffic") from None


def _cast(kind: str, rate: float | None, parameters: dict[str, Any]) -> tuple[list[Traffic], list[float]]:
    """Return the traffic of all kinds, sub-agents last, and the seconds between the sessions of each."""
    if kind not in KINDS:
        raise InvalidOperation(f"kind expects one of {', '.join(KINDS)}, got {kind!r}")
    kinds = [changed(traffic, parameters) for traffic in TRAFFIC.values()]
    rates = [traffic.rate if kind in (name, "mixed") else 0.0 for name, traffic in TRAFFIC.items()]
    if rate is not None:
        rate = changed(Traffic(), {"rate": rate}).rate
        rates = [one * rate / sum(rates) for one in rates]
    pauses = [_requests_of(traffic) / one if one else np.inf for traffic, one in zip(kinds, rates, strict=True)]
    agents = kinds[list(TRAFFIC).index("agents")]
    return [*kinds, subagents_of(agents)], [*pauses, np.inf]


def _requests_of(traffic: Traffic) -> float:
    """Return the mean number of requests of a session, its sub-agents included."""
    helpers = traffic.subagent_share * (1 + traffic.subagents) / 2 * traffic.subagent_turns
    return traffic.turns + (traffic.turns - 1) * helpers


def _whole(name: str, value: Any, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise InvalidOperation(f"{name} expects an int, got {value!r}")
    if not low <= value <= high:
        raise InvalidOperation(f"{name} expects an int in {low} … {high}, got {value}")
    return int(value)


def _play(stage: Stage, block_tokens: int, requests: int, accesses: int, most_blocks: int, most_slots: int) -> Stage:
    while (full := act(stage, block_tokens, requests, accesses, most_blocks, most_slots)) != DONE:
        before = stage
        stage = grown(stage, FULL[full], most_blocks)
        if FULL[full] == "known":
            enter_again(stage, before)
    return stage


def _trace(stage: Stage, name: str, block_tokens: int) -> Trace:
    count = dict(zip(COUNTERS, stage.counters.tolist(), strict=True))
    requests = count["requests"]
    times = stage.times[:requests]
    times -= times[0]
    np.floor(times * 1000.0, out=times)
    times /= 1000.0
    offsets = np.zeros(requests + 1, np.int64)
    offsets[1:] = stage.ends[:requests]
    return Trace(
        name=name,
        format="synthetic",
        block_tokens=block_tokens,
        times=times,
        input_tokens=stage.input_tokens[:requests],
        output_tokens=stage.output_tokens[:requests],
        sessions=stage.numbers[:requests],
        offsets=offsets,
        ids=stage.ids[: count["accesses"]],
        parents=stage.parents[: count["distinct"]],
    )
