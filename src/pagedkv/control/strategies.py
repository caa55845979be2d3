"""Eviction strategies: how much is this worth keeping? The lowest score goes first.

A strategy is a class with two pure methods; register it and it works everywhere::

    @register_strategy("smallest_first")
    class SmallestFirst:
        def score_sequences(self, sequences, now):
            return sequences.num_tokens
        def score_blocks(self, blocks, now):
            return blocks.last_access
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import numpy.typing as npt

from pagedkv.control.rules import AGE, CUSTOM, DEPTH, FREQUENCY, PRIORITY, RECENCY, RECENCY_BITS
from pagedkv.control.types import BlockView, SequenceView
from pagedkv.errors import InvalidOperation

__all__ = [
    "FIFO",
    "LFU",
    "LRU",
    "EvictionStrategy",
    "LongestFirst",
    "Priority",
    "StreamingLLM",
    "parse_strategy",
    "register_strategy",
]

Scores = npt.NDArray[np.int64]

MAX_PRIORITY = 2 ** (63 - RECENCY_BITS) - 1


@runtime_checkable
class EvictionStrategy(Protocol):
    """How much a sequence, or a cached block, is worth keeping."""

    def score_sequences(self, sequences: SequenceView, now: int) -> Scores:
        """Return int64 ``[len(sequences)]``; of all live sequences the lowest is evicted first, ties by id.

        A sequence is scored anew when it was accessed or changed since.
        """
        ...

    def score_blocks(self, blocks: BlockView, now: int) -> Scores:
        """Return int64 ``[len(blocks)]``; of all cached leaves the lowest is reclaimed first, ties by id.

        A block is scored when its last owner lets go of it, and the score is kept with it.
        """
        ...


def _then_recency(rank: npt.NDArray[Any], last_access: npt.NDArray[Any]) -> Scores:
    scores: Scores = (rank.astype(np.int64) << RECENCY_BITS) + last_access
    return scores


@dataclass(frozen=True)
class LRU:
    """Least recently used goes first."""

    def score_sequences(self, sequences: SequenceView, now: int) -> Scores:
        """Score by the last access."""
        return sequences.last_access

    def score_blocks(self, blocks: BlockView, now: int) -> Scores:
        """Score by the last use."""
        return blocks.last_access

    def __str__(self) -> str:
        return "LRU"


@dataclass(frozen=True)
class LFU:
    """Least frequently used goes first; among blocks of equal use the oldest."""

    def score_sequences(self, sequences: SequenceView, now: int) -> Scores:
        """Score by the number of accesses."""
        return sequences.access_count

    def score_blocks(self, blocks: BlockView, now: int) -> Scores:
        """Score by the number of sequences that used the block, then by recency."""
        return _then_recency(blocks.access_count, blocks.last_access)

    def __str__(self) -> str:
        return "LFU"


@dataclass(frozen=True)
class LongestFirst:
    """The longest sequence goes first; of blocks the deepest, among equals the oldest."""

    def score_sequences(self, sequences: SequenceView, now: int) -> Scores:
        """Score by the number of tokens, negated."""
        scores: Scores = -sequences.num_tokens
        return scores

    def score_blocks(self, blocks: BlockView, now: int) -> Scores:
        """Score by depth, negated, then by recency."""
        return _then_recency(-blocks.depth, blocks.last_access)

    def __str__(self) -> str:
        return "LongestFirst"


@dataclass(frozen=True)
class Priority:
    """The lowest priority goes first, among equals the least recently used.

    Parameters
    ----------
    levels : int
        Sequences may have the priorities 0 … levels−1.
    """

    levels: int

    def __post_init__(self) -> None:
        _require_int("levels", self.levels, 1, MAX_PRIORITY + 1)

    def score_sequences(self, sequences: SequenceView, now: int) -> Scores:
        """Score by priority, then by the last access."""
        return _then_recency(sequences.priority, sequences.last_access)

    def score_blocks(self, blocks: BlockView, now: int) -> Scores:
        """Score by the highest priority that used the block, then by recency."""
        return _then_recency(blocks.priority, blocks.last_access)

    def __str__(self) -> str:
        return f"Priority({self.levels})"


@dataclass(frozen=True)
class StreamingLLM:
    """Least recently used goes first; sequences keep sinks and a window (Xiao et al. 2023, section 3.2).

    Parameters
    ----------
    sink_tokens : int
        First tokens of a sequence that are always kept.
    window_tokens : int
        Last tokens of a sequence that are kept.
    """

    sink_tokens: int
    window_tokens: int

    def __post_init__(self) -> None:
        _require_int("sink_tokens", self.sink_tokens, 0, 2**62)
        _require_int("window_tokens", self.window_tokens, 0, 2**62)

    def score_sequences(self, sequences: SequenceView, now: int) -> Scores:
        """Score by the last access."""
        return sequences.last_access

    def score_blocks(self, blocks: BlockView, now: int) -> Scores:
        """Score by the last use."""
        return blocks.last_access

    def __str__(self) -> str:
        return f"StreamingLLM(sink={self.sink_tokens}, window={self.window_tokens})"


@dataclass(frozen=True)
class FIFO:
    """First in, first out: use does not matter."""

    def score_sequences(self, sequences: SequenceView, now: int) -> Scores:
        """Score by the tick of the allocation."""
        return sequences.created

    def score_blocks(self, blocks: BlockView, now: int) -> Scores:
        """Score by the tick at which the block was filled."""
        return blocks.created

    def __str__(self) -> str:
        return "FIFO"


def _require_int(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not low <= value <= high:
        raise InvalidOperation(f"{name} expects an int in {low} … {high}, got {value!r}")


Factory = TypeVar("Factory", bound=Callable[..., Any])

_registry: dict[str, Callable[..., Any]] = {}


def _key(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")


def register_strategy(name: str, factory: Factory | None = None) -> Any:
    """Make a strategy known by `name` to ``strategy=``, to the simulator and to the command line.

    Parameters
    ----------
    name : str
        Upper and lower case, ``_`` and ``-`` make no difference.
    factory : callable, optional
        The class, or a function that makes an instance. Without it this is a decorator.

    Raises
    ------
    InvalidOperation
        If the name is empty, taken by another factory, or has other characters than letters, digits, ``_`` and ``-``.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z][\w-]*", name):
        raise InvalidOperation(f"name expects letters, digits, _ and -, got {name!r}")

    def register(made_by: Factory) -> Factory:
        if _registry.setdefault(_key(name), made_by) is not made_by:
            raise InvalidOperation(f"a strategy named {name!r} is registered already: {_registry[_key(name)]!r}")
        return made_by

    return register if factory is None else register(factory)


for _builtin in (LRU, LFU, LongestFirst, Priority, StreamingLLM, FIFO):
    register_strategy(_builtin.__name__, _builtin)


def _value(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def parse_strategy(text: str) -> EvictionStrategy:
    """Make a strategy from its command-line form.

    ``"lru"``, ``"priority:levels=3"`` (or ``"priority:3"``), ``"streaming_llm:sink=4,window=512"``; what ``str()`` of a
    strategy gives is understood too.

    Raises
    ------
    InvalidOperation
        If no strategy has this name, or it does not take these arguments.
    """
    match = re.fullmatch(r"\s*([A-Za-z][\w-]*)\s*(?:[:(]\s*(.*?)\s*\)?)?\s*", text) if isinstance(text, str) else None
    factory = _registry.get(_key(match[1])) if match else None
    if match is None or factory is None:
        raise InvalidOperation(f"strategy expects one of {', '.join(sorted(_registry))}, got {text!r}")
    names = list(inspect.signature(factory).parameters)
    positional: list[Any] = []
    named: dict[str, Any] = {}
    for argument in filter(None, re.split(r"\s*,\s*", match[2] or "")):
        name, equals, value = argument.partition("=")
        if not equals:
            positional.append(_value(name.strip()))
            continue
        name = name.strip()
        full = next((known for known in names if known in (name, f"{name}_tokens")), name)
        named[full] = _value(value.strip())
    try:
        return as_strategy(factory(*positional, **named))
    except TypeError as error:
        wanted = ", ".join(names) or "no arguments"
        raise InvalidOperation(f"strategy {match[1]!r} takes {wanted}, got {match[2]!r}") from error


def as_strategy(strategy: object) -> EvictionStrategy:
    """Return `strategy` itself, or the one that the text names; refuse what cannot score.

    Raises
    ------
    InvalidOperation
        If it is neither a name nor an object with the two scoring methods.
    """
    if isinstance(strategy, str):
        return parse_strategy(strategy)
    if isinstance(strategy, type) or not isinstance(strategy, EvictionStrategy):
        raise InvalidOperation(
            f"strategy expects a name or an object with score_sequences and score_blocks, got {strategy!r}"
        )
    return strategy


_RULES: dict[type, int] = {
    LRU: RECENCY,
    StreamingLLM: RECENCY,
    LFU: FREQUENCY,
    LongestFirst: DEPTH,
    Priority: PRIORITY,
    FIFO: AGE,
}


def rule_of(strategy: EvictionStrategy) -> int:
    """Return the compiled rule that scores blocks as `strategy` does; CUSTOM for a user's own, subclasses included."""
    return _RULES.get(type(strategy), CUSTOM)


def checked_scores(strategy: EvictionStrategy, method: str, scores: object, count: int) -> Scores:
    """Return the scores as int64, or say what is wrong with them.

    Raises
    ------
    InvalidOperation
        If they are no integers or not one for each record.
    """
    array = np.asarray(scores)
    if array.shape != (count,) or array.dtype.kind not in "iu":
        raise InvalidOperation(
            f"{type(strategy).__name__}.{method} expects to return integers of shape ({count},), "
            f"got {array.dtype} of shape {array.shape}"
        )
    return array.astype(np.int64, copy=False)
