"""The generator's loop: whose turn is it, what does the request consist of, when is the next one.

A request repeats the blocks that its session had, so it is a copy from an earlier place of the trace, and new blocks
behind that. No session keeps blocks of its own.
"""

from __future__ import annotations

import numpy as np

from pagedkv.jit import compiled
from pagedkv.sim.chance import exponential, lognormal, mix, normal_of, popular, uniform
from pagedkv.sim.stage import MAX_BLOCKS, Stage

__all__ = ["DONE", "FULL", "act", "enter_again"]

REQUESTS, ACCESSES, DISTINCT, SESSIONS, EVENTS, FREE, KNOWN = range(7)  # of Stage.counters
DONE = 0
FULL = ("", "requests", "ids", "parents", "slots", "known")
"""What `act` lacks room for, by what it returns."""

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
