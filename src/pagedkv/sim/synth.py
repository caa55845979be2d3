"""Synthetic traces of chat, agents and retrieval, from parameters and a seed."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pagedkv.errors import InvalidOperation
from pagedkv.jit import compiled, mix64
from pagedkv.sim.trace import Floats, Int32s, Int64s, Trace
from pagedkv.sim.traffic import KINDS, TRAFFIC, Traffic, changed, subagents_of
from pagedkv.validate import require_choice, require_int

# Random numbers that are the same everywhere: SplitMix64 (Steele, Lea, Flood, OOPSLA 2014) and a few distributions.
#
# The state is a uint64 array of one element.

State = npt.NDArray[np.uint64]

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_STREAM = np.uint64(0x94D049BB133111EB)  # sets the stream apart from pairs


@compiled
def mix(bits: np.uint64, more: np.uint64) -> np.uint64:
    """Return 64 well-mixed bits that stand for a pair."""
    return mix64((bits ^ more) + _GAMMA)


@compiled
def uniform_of(bits: np.uint64) -> float:
    """Turn random bits into a number within (0, 1), the ends left out."""
    return (float(bits >> np.uint64(12)) + 0.5) * 2.0**-52


@compiled
def normal_of(bits: np.uint64) -> float:
    """Turn random bits into a standard normal number (Box and Muller)."""
    angle = 2.0 * np.pi * uniform_of(mix(bits, _GAMMA))
    return float(np.sqrt(-2.0 * np.log(uniform_of(bits))) * np.cos(angle))


@compiled
def _bits(state: State) -> np.uint64:
    state[0] += _GAMMA
    return mix(state[0], _STREAM)


@compiled
def uniform(state: State) -> float:
    """Draw from (0, 1)."""
    return uniform_of(_bits(state))


@compiled
def exponential(state: State, mean: float) -> float:
    """Draw a waiting time."""
    return float(-mean * np.log(uniform(state)))


@compiled
def lognormal(state: State, median: float, spread: float) -> float:
    """Draw from the log-normal distribution; `spread` is the standard deviation of the logarithm."""
    return float(median * np.exp(spread * normal_of(_bits(state))))


@compiled
def popular(state: State, count: int, exponent: float) -> int:
    """Draw one of 0 … count − 1 with a probability of about (i + 1) ** −exponent: the power law, made continuous."""
    u = uniform(state)
    if abs(exponent - 1.0) < 1e-9:
        place = (count + 1.0) ** u
    else:
        place = ((((count + 1.0) ** (1.0 - exponent)) - 1.0) * u + 1.0) ** (1.0 / (1.0 - exponent))
    return min(int(place) - 1, count - 1)


# Where synthetic sessions live while they write a trace: the arrays of the generator, and how they grow.

MAX_REQUESTS = 2**31 - 1
MAX_BLOCKS = 2**31 - 1

SESSION = np.dtype(
    [
        ("kind", np.int64),
        ("number", np.int64),  # as the trace has it
        ("prompt", np.int64),  # which system prompt
        ("turns", np.int64),  # still to come
        ("tokens", np.int64),  # of the history, the last answer included
        ("source", np.int64),  # where the blocks of the last request lie
        ("shared", np.int64),  # tokens of the last request; 0 before the first
        ("starter", np.int64),  # slot of the session that started this sub-agent, or −1
        ("waiting", np.int64),  # sub-agents that have not ended
    ]
)
NUM_COUNTERS = 7
REQUESTS, ACCESSES, DISTINCT, SESSIONS, EVENTS, FREE, KNOWN = range(NUM_COUNTERS)  # of Stage.counters

_PARAMETERS = np.dtype([(name, np.float64) for name in asdict(Traffic())])
_FIRST_SLOTS, _FIRST_KNOWN = 1024, 4096


class Stage(NamedTuple):
    """All state of the generator."""

    traffic: npt.NDArray[np.void]  # [num_kinds], the fields of `Traffic` as float64; the last kind are sub-agents
    session_pause: Floats  # [num_kinds], mean seconds between two sessions; infinite where none is wanted
    arrivals: Floats  # [num_kinds], when the next session of each kind begins
    chance: State
    salt: State
    counters: Int64s  # [NUM_COUNTERS]
    event_times: Floats  # [num_slots], a binary heap: when each live session that does not wait sends its next request
    event_slots: Int32s
    sessions: npt.NDArray[np.void]  # SESSION [num_slots]
    free_slots: Int32s  # [num_slots]
    known_paths: npt.NDArray[np.uint64]  # [a power of two], open addressing: a prefix of prompt and documents
    known_places: Int64s  # where a request that begins with it lies
    paths: npt.NDArray[np.uint64]  # scratch: the prefixes of one opening
    drawn: Int64s  # scratch: its documents
    # The trace.
    times: Floats
    input_tokens: Int64s
    output_tokens: Int64s
    numbers: Int64s
    ends: Int64s
    ids: Int32s
    parents: Int32s


_GROW_TOGETHER = {
    "requests": ("times", "input_tokens", "output_tokens", "numbers", "ends"),
    "ids": ("ids",),
    "parents": ("parents",),
    "slots": ("event_times", "event_slots", "sessions", "free_slots"),
    "known": ("known_paths", "known_places"),
}
FULL = ("", *_GROW_TOGETHER)
"""What `act` lacks room for, by what it returns."""


def empty_stage(
    kinds: list[Traffic], session_pause: list[float], seed: int, requests: int, accesses: int, most_blocks: int
) -> Stage:
    """Return a stage on which nothing happened, with room for about so many requests and accesses."""
    traffic = np.array([tuple(asdict(kind).values()) for kind in kinds], _PARAMETERS)
    pause = np.array(session_pause)
    slots = max(_FIRST_SLOTS, 2 * int(traffic["subagents"].max()))
    counters = np.zeros(NUM_COUNTERS, np.int64)
    counters[FREE] = slots
    num_parts = 2 + int(traffic["documents_per_request"].max())
    return Stage(
        traffic=traffic,
        session_pause=pause,
        arrivals=np.where(np.isfinite(pause), 0.0, np.inf),
        chance=np.array([seed], np.uint64),
        salt=np.array([seed], np.uint64),
        counters=counters,
        event_times=np.empty(slots),
        event_slots=np.empty(slots, np.int32),
        sessions=np.zeros(slots, SESSION),
        free_slots=np.arange(slots, dtype=np.int32),
        known_paths=np.zeros(_FIRST_KNOWN, np.uint64),
        known_places=np.full(_FIRST_KNOWN, -1, np.int64),
        paths=np.empty(num_parts, np.uint64),
        drawn=np.empty(num_parts, np.int64),
        times=np.empty(requests),
        input_tokens=np.empty(requests, np.int64),
        output_tokens=np.empty(requests, np.int64),
        numbers=np.empty(requests, np.int64),
        ends=np.empty(requests, np.int64),
        ids=np.empty(accesses + most_blocks, np.int32),
        parents=np.empty(accesses // 8 + most_blocks, np.int32),
    )


def grown(stage: Stage, full: str, most_blocks: int) -> Stage:
    """Return the stage with more room for what is full, a key of `_GROW_TOGETHER`."""
    names = _GROW_TOGETHER[full]
    before = len(getattr(stage, names[0]))
    if full in ("slots", "known"):
        length = 2 * before
    else:
        length = before + max(before // 2, 1 if full == "requests" else most_blocks)
    if full == "parents":
        if before >= MAX_BLOCKS:
            what = f"the trace would have more than {MAX_BLOCKS} different blocks"
            raise InvalidOperation(f"{what}: ask for less traffic")
        length = min(length, MAX_BLOCKS)
    longer: dict[str, Any] = {name: _longer(getattr(stage, name), length) for name in names}
    larger = stage._replace(**longer)
    if full == "slots":
        free = stage.counters[FREE]
        larger.free_slots[free : free + before] = np.arange(before, length)
        stage.counters[FREE] += before
    if full == "known":
        larger.known_places[:] = -1
        enter_again(larger, stage)
    return larger


def _longer(array: npt.NDArray[Any], length: int) -> npt.NDArray[Any]:
    longer = np.zeros(length, array.dtype)
    longer[: len(array)] = array
    return longer


# The generator's loop: whose turn is it, what does the request consist of, when is the next one.
#
# Compiled, with a heap and a table of its own: `heapq` and dictionaries would be half of the code, but each request
# would take some 25 µs instead of 1, so that 100 million accesses took minutes.
#
# A request repeats the blocks that its session had, so it is a copy from an earlier place of the trace, and new
# blocks behind that. No session keeps blocks of its own.

DONE = 0
_DOCUMENT = np.uint64(1 << 62)  # keeps the numbers of documents apart from those of prompts
_ONE = np.uint64(1)
_LARGEST = float(1 << 40)
_LONGEST_PAUSE = 1e9  # seconds, a generation: time stays a number that files can hold


@compiled
def act(stage: Stage, block_tokens: int, requests: int, accesses: int, most_blocks: int, most_slots: int) -> int:
    """Play until the trace has so many requests or accesses; stop before that where an array lacks room.

    One request takes at most `most_blocks` blocks and `most_slots` slots.
    """
    counters = stage.counters
    while counters[REQUESTS] < requests and counters[ACCESSES] < accesses:
        full = _lacks(stage, most_blocks, most_slots)
        if full:
            return full
        kind = int(np.argmin(stage.arrivals))
        now = stage.arrivals[kind]
        if counters[EVENTS] and stage.event_times[0] < now:
            now = stage.event_times[0]
            slot = _pop_event(stage)
        else:
            stage.arrivals[kind] += min(exponential(stage.chance, stage.session_pause[kind]), _LONGEST_PAUSE)
            slot = _begin(stage, kind, -1)
        if _send(stage, slot, now, block_tokens):
            _go_on(stage, slot, now)
        else:
            _end(stage, slot, now)
    return DONE


@compiled
def _lacks(stage: Stage, most_blocks: int, most_slots: int) -> int:
    counters = stage.counters
    if counters[REQUESTS] == len(stage.times):
        return 1
    if counters[ACCESSES] + most_blocks > len(stage.ids):
        return 2
    if counters[DISTINCT] + most_blocks > len(stage.parents):
        return 3
    if counters[FREE] < most_slots:
        return 4
    if 2 * (counters[KNOWN] + len(stage.paths)) > len(stage.known_paths):
        return 5
    return 0


@compiled
def _begin(stage: Stage, kind: int, starter: int) -> int:
    """Take a slot for a new session, or for a sub-agent of one, and return it."""
    counters, chance = stage.counters, stage.chance
    counters[FREE] -= 1
    slot = stage.free_slots[counters[FREE]]
    session, traffic = stage.sessions[slot], stage.traffic[kind]
    session["kind"] = kind
    session["starter"] = starter
    session["shared"] = 0
    session["waiting"] = 0
    session["prompt"] = popular(chance, int(traffic["system_prompts"]), traffic["system_zipf"])
    spread = traffic["turns_spread"]
    more = (traffic["turns"] - 1.0) * lognormal(chance, 1.0, spread) * np.exp(-0.5 * spread * spread)
    session["turns"] = 1
    if more > 0.0:
        session["turns"] += int(min(exponential(chance, 1.0) / np.log1p(1.0 / more), _LARGEST))
    if starter < 0:
        session["number"] = counters[SESSIONS]
        counters[SESSIONS] += 1
    else:
        session["number"] = stage.sessions[starter]["number"]
    return slot


@compiled
def _send(stage: Stage, slot: int, now: float, block_tokens: int) -> bool:
    """Write the session's next request; False where it would be too long and the session ends instead."""
    session, chance = stage.sessions[slot], stage.chance
    traffic = stage.traffic[session["kind"]]
    limit, message, opens = int(traffic["max_tokens"]), 0.0, session["shared"] == 0
    if opens:
        message = lognormal(chance, traffic["first_tokens"], traffic["first_spread"])
    else:
        message = lognormal(chance, traffic["message_tokens"], traffic["message_spread"])
        if session["tokens"] + message > limit:
            if traffic["summary_tokens"] == 0.0:
                return False
            opens = True
            message += lognormal(chance, traffic["summary_tokens"], 0.5)
    before = _open(stage, slot) if opens else session["tokens"]
    tokens = before + max(1, int(min(message, float(limit - before))))
    answer = max(1, int(min(lognormal(chance, traffic["output_tokens"], traffic["output_spread"]), _LARGEST)))
    place = stage.counters[ACCESSES]
    request = stage.counters[REQUESTS]
    stage.times[request] = now
    stage.input_tokens[request] = tokens
    stage.output_tokens[request] = answer
    stage.numbers[request] = session["number"]
    _lay_blocks(stage, session["source"], session["shared"] // block_tokens, -(-tokens // block_tokens))
    stage.ends[request] = stage.counters[ACCESSES]
    stage.counters[REQUESTS] += 1
    session["tokens"] = min(tokens + answer, MAX_BLOCKS * block_tokens)
    session["source"] = place
    session["shared"] = tokens
    session["turns"] -= 1
    return True


@compiled
def _lay_blocks(stage: Stage, source: int, num_shared: int, num_blocks: int) -> None:
    place, distinct, parent = stage.counters[ACCESSES], stage.counters[DISTINCT], -1
    ids, parents = stage.ids, stage.parents
    for i in range(num_shared):
        ids[place + i] = ids[source + i]
    if num_shared:
        parent = ids[place + num_shared - 1]
    for i in range(num_shared, num_blocks):
        ids[place + i] = distinct
        parents[distinct] = parent
        parent = distinct
        distinct += 1
    stage.counters[ACCESSES] = place + num_blocks
    stage.counters[DISTINCT] = distinct


@compiled
def _open(stage: Stage, slot: int) -> int:
    """Lay out what comes before the first message, share what an earlier request began with, return the tokens."""
    session = stage.sessions[slot]
    kind = session["kind"]
    traffic, paths = stage.traffic[kind], stage.paths
    root = mix(stage.salt[0], np.uint64(kind + 1))
    path = mix(root, np.uint64(session["prompt"] + 1))
    limit = int(traffic["max_tokens"]) - 1
    num_documents = int(traffic["documents_per_request"]) if traffic["documents"] else 0
    tokens, session["source"], session["shared"] = 0, 0, 0
    for part in range(2 + num_documents):
        length = traffic["common_tokens"]
        if part == 0:
            paths[part] = root
        elif part == 1:
            paths[part] = path
            length = _length_of(path, traffic["system_tokens"], traffic["system_spread"])
        else:
            document = np.uint64(_draw_document(stage, traffic, part - 2)) + _DOCUMENT
            paths[part] = mix(paths[part - 1], document)
            length = _length_of(mix(root, document), traffic["document_tokens"], traffic["document_spread"])
        tokens += int(min(length, float(limit - tokens)))
        at = _find(stage, paths[part])
        if stage.known_places[at] >= 0:
            session["source"] = stage.known_places[at]
            session["shared"] = tokens
        else:
            stage.known_paths[at] = paths[part]
            stage.known_places[at] = stage.counters[ACCESSES]
            stage.counters[KNOWN] += 1
    return tokens


@compiled
def _draw_document(stage: Stage, traffic: np.void, num_drawn: int) -> int:
    """Draw a document that this request does not have: after a repeated one the next in the order of popularity."""
    number, place = popular(stage.chance, int(traffic["documents"]), traffic["document_zipf"]), 0
    while place < num_drawn:
        if stage.drawn[place] == number:
            number, place = (number + 1) % int(traffic["documents"]), 0
        else:
            place += 1
    stage.drawn[num_drawn] = number
    return number


@compiled
def _length_of(bits: np.uint64, median: float, spread: float) -> float:
    """Return how long a prompt or a document is, always the same for the same one."""
    return float(median * np.exp(spread * normal_of(mix(bits, _ONE))))


@compiled
def _find(stage: Stage, path: np.uint64) -> int:
    """Return where in the table the path is, or where it belongs."""
    mask = len(stage.known_paths) - 1
    at = np.int64(path & np.uint64(mask))
    while stage.known_places[at] >= 0 and stage.known_paths[at] != path:
        at = (at + 1) & mask
    return at


@compiled
def enter_again(stage: Stage, smaller: Stage) -> None:
    """Enter the paths of a smaller table."""
    for i in range(len(smaller.known_paths)):
        if smaller.known_places[i] >= 0:
            at = _find(stage, smaller.known_paths[i])
            stage.known_paths[at] = smaller.known_paths[i]
            stage.known_places[at] = smaller.known_places[i]


@compiled
def _go_on(stage: Stage, slot: int, now: float) -> None:
    """Decide what the session does after its request."""
    session, chance = stage.sessions[slot], stage.chance
    traffic = stage.traffic[session["kind"]]
    if session["turns"] <= 0:
        _end(stage, slot, now)
        return
    if traffic["subagent_share"] > 0.0 and uniform(chance) < traffic["subagent_share"]:
        session["waiting"] = 1 + int(uniform(chance) * traffic["subagents"])
        for _ in range(session["waiting"]):
            agent = _begin(stage, len(stage.traffic) - 1, slot)
            _push_event(stage, now + exponential(chance, 1.0), agent)
        return
    _push_event(stage, now + _pause(stage, session["kind"]), slot)


@compiled
def _pause(stage: Stage, kind: int) -> float:
    traffic, median = stage.traffic[kind], stage.traffic[kind]["think_seconds"]
    if uniform(stage.chance) < traffic["idle_share"]:
        median = traffic["idle_seconds"]
    return min(lognormal(stage.chance, median, traffic["think_spread"]), _LONGEST_PAUSE)


@compiled
def _end(stage: Stage, slot: int, now: float) -> None:
    """Give the slot back; the last sub-agent lets its starter go on."""
    starter = stage.sessions[slot]["starter"]
    stage.free_slots[stage.counters[FREE]] = slot
    stage.counters[FREE] += 1
    if starter >= 0:
        stage.sessions[starter]["waiting"] -= 1
        if stage.sessions[starter]["waiting"] == 0:
            _push_event(stage, now + _pause(stage, len(stage.traffic) - 1), starter)


@compiled
def _push_event(stage: Stage, time: float, slot: int) -> None:
    times, slots, place = stage.event_times, stage.event_slots, stage.counters[EVENTS]
    stage.counters[EVENTS] += 1
    while place and times[(place - 1) // 2] > time:
        times[place], slots[place] = times[(place - 1) // 2], slots[(place - 1) // 2]
        place = (place - 1) // 2
    times[place], slots[place] = time, slot


@compiled
def _pop_event(stage: Stage) -> int:
    times, slots = stage.event_times, stage.event_slots
    first = slots[0]
    stage.counters[EVENTS] -= 1
    num_events = stage.counters[EVENTS]
    time, slot, place = times[num_events], slots[num_events], 0
    while 2 * place + 1 < num_events:
        child = 2 * place + 1
        if child + 1 < num_events and times[child + 1] < times[child]:
            child += 1
        if times[child] >= time:
            break
        times[place], slots[place] = times[child], slots[child]
        place = child
    times[place], slots[place] = time, slot
    return first


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
    **parameters: float,
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
        Fields of `pagedkv.sim.synth.Traffic` that differ from ``TRAFFIC[kind]``; for ``"mixed"`` in all its kinds.

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
    most_requests = _NO_LIMIT if requests is None else require_int("requests", requests, 1, MAX_REQUESTS)
    most_accesses = _NO_LIMIT if accesses is None else require_int("accesses", accesses, 1, _MOST_ACCESSES)
    require_int("seed", seed, 0, 2**63 - 1)
    require_int("block_tokens", block_tokens, 1, 1 << 20)
    most_blocks = max(-(-traffic.max_tokens // block_tokens) for traffic in kinds)
    room = min(most_requests, _FIRST_REQUESTS if accesses is None else max(1, most_accesses // 16))
    try:
        stage = empty_stage(kinds, pauses, seed, room, 0 if accesses is None else most_accesses, most_blocks)
        most_slots = 1 + max(traffic.subagents for traffic in kinds)
        while full := act(stage, block_tokens, most_requests, most_accesses, most_blocks, most_slots):
            stage = grown(stage, FULL[full], most_blocks)
        return _trace(stage, f"{kind} (seed {seed})", block_tokens)
    except MemoryError:
        raise InvalidOperation("the trace does not fit into this machine's memory: ask for less traffic") from None


def _cast(kind: str, rate: float | None, parameters: dict[str, Any]) -> tuple[list[Traffic], list[float]]:
    """Return the traffic of all kinds, sub-agents last, and the seconds between the sessions of each."""
    require_choice("kind", kind, KINDS)
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


def _trace(stage: Stage, name: str, block_tokens: int) -> Trace:
    requests, accesses, distinct = stage.counters[[REQUESTS, ACCESSES, DISTINCT]].tolist()
    times = stage.times[:requests]
    times -= times[0]
    np.floor(times * 1000.0, out=times)
    times /= 1000.0
    return Trace(
        name=name,
        format="synthetic",
        block_tokens=block_tokens,
        times=times,
        input_tokens=stage.input_tokens[:requests],
        output_tokens=stage.output_tokens[:requests],
        sessions=stage.numbers[:requests],
        offsets=np.concatenate([np.zeros(1, np.int64), stage.ends[:requests]]),
        ids=stage.ids[:accesses],
        parents=stage.parents[:distinct],
    )
