"""Parameters of synthetic traffic, and the built-in kinds."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from pagedkv.errors import InvalidOperation, bad_argument
from pagedkv.validate import likely, require_int, require_number

MAX_TOKENS = 1 << 30
MAX_COUNT = 1 << 40
MAX_NUMBER = 1e12


@dataclass(frozen=True)
class Traffic:
    """One kind of traffic.

    Tokens and seconds vary from draw to draw: they are log-normal around the stated median, with the stated spread
    (the standard deviation of the logarithm; 0 makes them constant). Popularity follows a power law.

    Attributes
    ----------
    rate : float
        Requests per second once as many sessions end as begin.
    turns, turns_spread : float
        Requests of a session: geometric around the session's own mean, which varies around `turns`.
    think_seconds, think_spread : float
        From a request to the next of its session.
    idle_share, idle_seconds : float
        How often the pause is a long one, and its median.
    common_tokens : int
        Tokens that every prompt of this kind begins with.
    system_prompts : int
        Different system prompts, projects or instructions, one to a session.
    system_zipf : float
        Exponent of their popularity; 0 makes them equally likely.
    system_tokens, system_spread : float
        What a system prompt adds to the common tokens.
    first_tokens, first_spread : float
        The first message, pasted text included.
    message_tokens, message_spread : float
        What later messages, or the results of tools, add to the history.
    output_tokens, output_spread : float
        What the model answers; it becomes part of the history.
    max_tokens : int
        The longest input.
    summary_tokens : float
        A session that would exceed `max_tokens` goes on with its system prompt and a summary of so many tokens; with 0
        it ends.
    documents : int
        Different documents; with 0 nothing is retrieved.
    document_zipf : float
        Exponent of their popularity.
    document_tokens, document_spread : float
        Length of a document.
    documents_per_request : int
        Different documents in the first request, in the order in which they are drawn, between system prompt and
        message.
    subagent_share : float
        How often a request starts sub-agents; the session waits for the last of them.
    subagents : int
        The most that run side by side.
    subagent_turns : float
        Mean requests of each.
    """

    rate: float = 1.0
    turns: float = 1.0
    turns_spread: float = 0.0
    think_seconds: float = 60.0
    think_spread: float = 1.0
    idle_share: float = 0.0
    idle_seconds: float = 600.0
    common_tokens: int = 0
    system_prompts: int = 1
    system_zipf: float = 1.0
    system_tokens: float = 0.0
    system_spread: float = 0.5
    first_tokens: float = 100.0
    first_spread: float = 1.0
    message_tokens: float = 100.0
    message_spread: float = 1.0
    output_tokens: float = 300.0
    output_spread: float = 0.6
    max_tokens: int = 131_072
    summary_tokens: float = 0.0
    documents: int = 0
    document_zipf: float = 1.0
    document_tokens: float = 500.0
    document_spread: float = 0.5
    documents_per_request: int = 0
    subagent_share: float = 0.0
    subagents: int = 1
    subagent_turns: float = 1.0


TRAFFIC = {
    "chat": Traffic(
        rate=3.4,
        turns=1.7,
        turns_spread=1.3,
        think_seconds=125.0,
        think_spread=1.2,
        common_tokens=512,
        system_prompts=50,
        system_tokens=150.0,
        first_tokens=4_500.0,
        first_spread=1.4,
        message_tokens=50.0,
        message_spread=2.4,
        output_tokens=320.0,
    ),
    "agents": Traffic(
        rate=0.75,
        turns=90.0,
        turns_spread=0.3,
        think_seconds=18.0,
        think_spread=0.9,
        idle_share=0.04,
        idle_seconds=700.0,
        common_tokens=8_000,
        system_prompts=200,
        system_zipf=0.7,
        system_tokens=6_000.0,
        first_tokens=12_000.0,
        first_spread=1.3,
        message_tokens=400.0,
        message_spread=1.6,
        output_tokens=215.0,
        output_spread=1.1,
        max_tokens=200_000,
        summary_tokens=20_000.0,
        subagent_share=0.005,
        subagents=4,
        subagent_turns=12.0,
    ),
    "rag": Traffic(
        rate=2.0,
        turns=1.3,
        think_seconds=60.0,
        common_tokens=300,
        system_prompts=5,
        system_tokens=400.0,
        first_tokens=60.0,
        first_spread=0.8,
        message_tokens=40.0,
        message_spread=0.8,
        output_tokens=250.0,
        documents=20_000,
        document_zipf=1.0,
        document_tokens=700.0,
        documents_per_request=6,
    ),
}
"""The parameters of each kind. Chat and agents follow an hour of real chat and 60 real coding sessions."""

KINDS = (*TRAFFIC, "mixed")


def changed(traffic: Traffic, changes: dict[str, Any]) -> Traffic:
    """Return the traffic with some parameters changed, each checked."""
    known = {field.name: field.type for field in fields(Traffic)}
    for name, value in changes.items():
        if name not in known:
            reason = f"traffic has no parameter {name!r}; it has {', '.join(known)}"
            raise InvalidOperation(reason, name, likely(name, known))
        if known[name] == "int":
            low, high = map(int, _range(name))
            require_int(name, value, low, high)
        else:
            require_number(name, value, *_range(name))
    after = replace(traffic, **changes)
    if after.documents and after.documents_per_request > after.documents:
        wanted = f"at most the {after.documents} documents"
        raise bad_argument("documents_per_request", wanted, f"{after.documents_per_request}")
    return after


def subagents_of(traffic: Traffic) -> Traffic:
    """Return the traffic of a session's sub-agents: shorter, without idle pauses or sub-agents of their own."""
    return replace(
        traffic,
        turns=traffic.subagent_turns,
        turns_spread=0.0,
        idle_share=0.0,
        system_prompts=max(1, traffic.system_prompts // 10),
        subagent_share=0.0,
    )


_RANGES: dict[str, tuple[float, float]] = {
    "rate": (1e-6, 1e9),
    "idle_share": (0, 1),
    "subagent_share": (0, 1),
    "max_tokens": (1, MAX_TOKENS),
    "system_prompts": (1, MAX_COUNT),
    "documents": (0, MAX_COUNT),
    "documents_per_request": (0, 1000),
    "subagents": (1, 1000),
}
_RANGES_BY_ENDING: dict[str, tuple[float, float]] = {
    "_spread": (0, 5),
    "_zipf": (0, 5),
    "turns": (1, MAX_NUMBER),
    "_tokens": (0, MAX_TOKENS),
    "_seconds": (0, MAX_NUMBER),
}


def _range(name: str) -> tuple[float, float]:
    return _RANGES.get(name) or next(limits for end, limits in _RANGES_BY_ENDING.items() if name.endswith(end))
