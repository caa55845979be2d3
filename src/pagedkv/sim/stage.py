"""Where synthetic sessions live while they write a trace: the arrays of the generator, and how they grow."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pagedkv.errors import InvalidOperation
from pagedkv.sim.traffic import Traffic

__all__ = ["COUNTERS", "MAX_BLOCKS", "SESSION", "Stage", "empty_stage", "grown"]

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
COUNTERS = ("requests", "accesses", "distinct", "sessions", "events", "free", "known")
"""Places in `Stage.counters`, in this order."""

_PARAMETERS = np.dtype([(name, np.float64) for name in asdict(Traffic())])
_FIRST_SLOTS, _FIRST_KNOWN = 1024, 4096


class Stage(NamedTuple):
    """All state of the generator.

    Attributes
    ----------
    traffic : structured [num_kinds]
        The fields of `Traffic` as float64; the last kind are sub-agents.
    session_pause : float64 [num_kinds]
        Mean seconds between two sessions of a kind; infinite where none is wanted.
    arrivals : float64 [num_kinds]
        When the next session of each kind begins.
    chance, salt : uint64 [1]
    counters : int64 [len(COUNTERS)]
    event_times, event_slots : float64 and int32 [num_slots]
        A binary heap: when each live session that does not wait sends its next request.
    sessions : SESSION [num_slots]
    free_slots : int32 [num_slots]
    known_paths, known_places : uint64 and int64 [a power of two]
        Open-addressing table: a prefix of prompt and documents, and where a request that begins with it lies.
    paths, drawn : uint64 and int64
        Scratch: the prefixes of one opening, and its documents.
    times, input_tokens, output_tokens, numbers, ends, ids, parents
        The trace.
    """

    traffic: npt.NDArray[np.void]
    session_pause: npt.NDArray[np.float64]
    arrivals: npt.NDArray[np.float64]
    chance: npt.NDArray[np.uint64]
    salt: npt.NDArray[np.uint64]
    counters: npt.NDArray[np.int64]
    event_times: npt.NDArray[np.float64]
    event_slots: npt.NDArray[np.int32]
    sessions: npt.NDArray[np.void]
    free_slots: npt.NDArray[np.int32]
    known_paths: npt.NDArray[np.uint64]
    known_places: npt.NDArray[np.int64]
    paths: npt.NDArray[np.uint64]
    drawn: npt.NDArray[np.int64]
    times: npt.NDArray[np.float64]
    input_tokens: npt.NDArray[np.int64]
    output_tokens: npt.NDArray[np.int64]
    numbers: npt.NDArray[np.int64]
    ends: npt.NDArray[np.int64]
    ids: npt.NDArray[np.int32]
    parents: npt.NDArray[np.int32]


def empty_stage(
    kinds: list[Traffic], session_pause: list[float], seed: int, requests: int, accesses: int, most_blocks: int
) -> Stage:
    """Return a stage on which nothing happened, with room for about so many requests and accesses."""
    traffic = np.array([tuple(asdict(kind).values()) for kind in kinds], _PARAMETERS)
    pause = np.array(session_pause)
    slots = max(_FIRST_SLOTS, 2 * int(traffic["subagents"].max()))
    counters = np.zeros(len(COUNTERS), np.int64)
    counters[COUNTERS.index("free")] = slots
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
        free_slots=np.arange(slots - 1, -1, -1, dtype=np.int32),
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
    """Return the stage with more room for ``"requests"``, ``"ids"``, ``"parents"``, ``"slots"`` or ``"known"`` paths.

    Raises
    ------
    InvalidOperation
        When the trace would have more blocks than 32-bit ids can name.
    """
    if full == "requests":
        names = ("times", "input_tokens", "output_tokens", "numbers", "ends")
        longer: dict[str, Any] = {name: _longer(getattr(stage, name)) for name in names}
        return stage._replace(**longer)
    if full == "slots":
        return _with_more_slots(stage)
    if full == "known":
        return _with_larger_table(stage)
    array: npt.NDArray[Any] = getattr(stage, full)
    if full == "parents" and len(array) >= MAX_BLOCKS:
        raise InvalidOperation(f"the trace would have more than {MAX_BLOCKS} different blocks: ask for less traffic")
    longer = {full: _longer(array, most_blocks, MAX_BLOCKS if full == "parents" else None)}
    return stage._replace(**longer)


def _longer(array: npt.NDArray[Any], least: int = 0, most: int | None = None) -> npt.NDArray[Any]:
    length = len(array) + max(len(array) // 2, least, 1)
    longer = np.zeros(length if most is None else min(length, most), array.dtype)
    longer[: len(array)] = array
    return longer


def _with_more_slots(stage: Stage) -> Stage:
    before = len(stage.sessions)
    free = int(stage.counters[COUNTERS.index("free")])
    free_slots = np.empty(2 * before, np.int32)
    free_slots[:before] = np.arange(2 * before - 1, before - 1, -1)
    free_slots[before : before + free] = stage.free_slots[:free]
    stage.counters[COUNTERS.index("free")] = free + before
    return stage._replace(
        free_slots=free_slots,
        event_times=np.concatenate([stage.event_times, np.empty(before)]),
        event_slots=np.concatenate([stage.event_slots, np.empty(before, np.int32)]),
        sessions=np.concatenate([stage.sessions, np.zeros(before, SESSION)]),
    )


def _with_larger_table(stage: Stage) -> Stage:
    """Double the table; whoever has the paths must enter them again."""
    size = 2 * len(stage.known_paths)
    return stage._replace(known_paths=np.zeros(size, np.uint64), known_places=np.full(size, -1, np.int64))
