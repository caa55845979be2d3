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
from operator import attrgetter
from typing import Any, ClassVar, NamedTuple, TypeVar, overload

from pagedkv.control import policies
from pagedkv.control.ghosts import forget_ghosts, with_prefix_hashes
from pagedkv.control.learner import forget_notes, with_learner
from pagedkv.control.protocol import EvictionStrategy, Scores, hooks_of
from pagedkv.control.reclaim import PROBATION_SHARE
from pagedkv.control.shadows import forget_shadows
from pagedkv.control.state import PolicyKernels, State
from pagedkv.control.types import BlockView, SequenceView
from pagedkv.errors import InvalidOperation, bad_argument
from pagedkv.validate import likely, require_int, shown

# Strategies by name: ``strategy="lru"``, the simulator and the command line look them up here.

Factory = TypeVar("Factory", bound=Callable[..., EvictionStrategy])

_registry: dict[str, Callable[..., Any]] = {}


def _key(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")


def _home(factory: Callable[..., Any]) -> object:
    """Return where a factory was defined; what has no name of its own, a partial for instance, is like no other."""
    name = getattr(factory, "__qualname__", "<lambda>")
    return factory if name.endswith("<lambda>") else (factory.__module__, name)


@overload
def register_strategy(name: str, factory: Factory) -> Factory: ...


@overload
def register_strategy(name: str) -> Callable[[Factory], Factory]: ...


def register_strategy(name: str, factory: Factory | None = None) -> Factory | Callable[[Factory], Factory]:
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
        A class that is defined anew under its own name, in a notebook for instance, takes the place of its old self.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z][\w-]*", name):
        hint = "begin with a letter, and leave spaces out"
        raise bad_argument("name", "letters, digits, _ and -", shown(name), hint)

    def register(made_by: Factory) -> Factory:
        known = _registry.get(_key(name), made_by)
        if known is not made_by and _home(known) != _home(made_by):
            raise InvalidOperation(f"a strategy named {name!r} is registered already: {known!r}")
        _registry[_key(name)] = made_by
        return made_by

    return register if factory is None else register(factory)


def strategy_names() -> list[str]:
    """Return the names of all registered strategies, sorted."""
    return sorted(_registry)


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
        hint = likely(match[1] if match else text, _registry)
        raise bad_argument("strategy", f"one of {', '.join(sorted(_registry))}", shown(text), hint)
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
        if full in named:
            raise bad_argument("strategy", f"{name} once", f"{text!r}")
        named[full] = _value(value.strip())
    try:
        return as_strategy(factory(*positional, **named))
    except TypeError as error:
        wanted = ", ".join(names) or "no arguments"
        reason, example = f"strategy {match[1]!r} takes {wanted}, got {match[2]!r}", ",".join(f"{n}=…" for n in names)
        raise InvalidOperation(reason, "strategy", f"write {match[1]}{':' * bool(names)}{example}") from error


def as_strategy(strategy: object) -> EvictionStrategy:
    """Return `strategy` itself, or the one that the text names; refuse what has not the two scoring methods."""
    if isinstance(strategy, str):
        return parse_strategy(strategy)
    if isinstance(strategy, type) or not isinstance(strategy, EvictionStrategy):
        wanted = "a name or an object with score_sequences and score_blocks"
        raise bad_argument("strategy", wanted, shown(strategy), _missing(strategy))
    return strategy


def _missing(strategy: object) -> str:
    """Return what makes a strategy of something that is none."""
    if isinstance(strategy, type):
        return f"make one: {strategy.__name__}()"
    lacks = [name for name in ("score_sequences", "score_blocks") if not callable(getattr(strategy, name, None))]
    return f"write its {' and '.join(lacks)}"


# The built-in strategies. Which cached block is reclaimed first is decided by the kernels in `policies`; their
# ``score_blocks`` is the same formula over columns, for a strategy of a user that builds on one of them.


MAX_PRIORITY = 2 ** (63 - policies.RECENCY_BITS) - 1


class _BuiltIn:
    """Least recently used goes first, unless a strategy names other scores."""

    _sequence_score: ClassVar[Any] = attrgetter("last_access")
    _block_score: ClassVar[Any] = attrgetter("last_access")

    def score_sequences(self, sequences: SequenceView, now: int) -> Scores:
        """Score sequences."""
        scores: Scores = type(self)._sequence_score(sequences)
        return scores

    def score_blocks(self, blocks: BlockView, now: int) -> Scores:
        """Score blocks, before any price or second chance."""
        scores: Scores = type(self)._block_score(blocks)
        return scores

    def __str__(self) -> str:
        return next(base.__name__ for base in type(self).__mro__ if base.__module__ == __name__)


@register_strategy("lru")
@dataclass(frozen=True)
class LRU(_BuiltIn):
    """Least recently used goes first."""


@register_strategy("lfu")
@dataclass(frozen=True)
class LFU(_BuiltIn):
    """Least frequently used goes first; among blocks of equal use the oldest."""

    _sequence_score = attrgetter("access_count")
    _block_score = staticmethod(policies.by_frequency)


@register_strategy("longest_first")
@dataclass(frozen=True)
class LongestFirst(_BuiltIn):
    """The longest sequence goes first; of blocks the deepest, among equals the oldest."""

    _sequence_score = staticmethod(lambda sequences: -sequences.num_tokens)
    _block_score = staticmethod(policies.by_depth)


@register_strategy("priority")
@dataclass(frozen=True)
class Priority(_BuiltIn):
    """The lowest priority goes first, among equals the least recently used.

    Parameters
    ----------
    levels : int
        Sequences may have the priorities 0 … levels−1.
    """

    levels: int

    _sequence_score = staticmethod(policies.by_priority)
    _block_score = staticmethod(policies.by_priority)

    def __post_init__(self) -> None:
        require_int("levels", self.levels, 1, MAX_PRIORITY + 1)

    def __str__(self) -> str:
        return f"Priority({self.levels})"


@register_strategy("streaming_llm")
@dataclass(frozen=True)
class StreamingLLM(_BuiltIn):
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
        require_int("sink_tokens", self.sink_tokens, 0, 2**62)
        require_int("window_tokens", self.window_tokens, 0, 2**62)

    def __str__(self) -> str:
        return f"StreamingLLM(sink={self.sink_tokens}, window={self.window_tokens})"


@register_strategy("ttl")
@dataclass(frozen=True)
class TTL(_BuiltIn):
    """Least recently used goes first, but what a sequence with a priority used lives longer: a pin that expires.

    Parameters
    ----------
    ticks : int
        Calls of the cache that a block of priority 1 is kept longer for; priority 2 counts twice, and so on.
    """

    ticks: int = 1000

    def __post_init__(self) -> None:
        require_int("ticks", self.ticks, 0, 2**32 - 1)

    def score_blocks(self, blocks: BlockView, now: int) -> Scores:
        """Score by the tick at which the block expires."""
        scores: Scores = policies.by_expiry(blocks, self.ticks)
        return scores

    def __str__(self) -> str:
        return f"TTL(ticks={self.ticks})"


@register_strategy("fifo")
@dataclass(frozen=True)
class FIFO(_BuiltIn):
    """First in, first out: use does not matter."""

    _sequence_score = attrgetter("created")
    _block_score = attrgetter("created")


@register_strategy("s3fifo")
@dataclass(frozen=True)
class S3FIFO(_BuiltIn):
    """Three FIFO queues: a tenth for newcomers, the rest for what proved itself, and a memory of what was evicted.

    A newcomer with two hits is promoted, one without goes; if it comes back soon, it enters as proven. A proven block
    is evicted when it comes first without a hit since. Source: Yang et al., SOSP 2023, algorithm 1.
    """

    _block_score = attrgetter("created")


@register_strategy("sieve")
@dataclass(frozen=True)
class SIEVE(_BuiltIn):
    """FIFO in which a block that was hit is passed over once. Source: Zhang et al., NSDI 2024, algorithm 1."""

    _block_score = attrgetter("created")


@register_strategy("gdsf")
@dataclass(frozen=True)
class GDSF(_BuiltIn):
    """Greedy-Dual: uses times the cost of computing a block again, above a price that rises with what was evicted.

    The cost grows with the depth of the block in its prefix: attention reads all that precedes it. Source: Cherkasova,
    HPL-98-69R1, 1998, with equal sizes.
    """

    _block_score = staticmethod(policies.by_cost)


@register_strategy("adaptive")
@dataclass(frozen=True)
class Adaptive(_BuiltIn):
    """What will be used again within the time that room lasts is kept; there is nothing to tune.

    Two orders contend with least recently used. By expiry: blocks fall into classes by how often they were used and by
    whether they end a prefix; for each class the ages at which blocks are used again are counted, and from them follows
    how long such a block is worth keeping. By turns: a session is expected back after as long a pause as it made before
    its other turns, and as follows an answer of that length, so that of more sessions than there is room for those stay
    that come back soon. As long as neither is clearly better, judged by three small shadow caches over a sample of the
    content, this is LRU. What it learns lies with the cache, not with the object. See ``docs/strategies.md``.
    """


# The policy of each strategy: its kernels, and what they need to remember.


def _with_ticks(state: State, strategy: Any) -> State:
    state.memory[0].ticks = strategy.ticks
    return state


def _with_ghosts(state: State, strategy: Any) -> State:
    num_blocks = len(state.blocks)
    return with_prefix_hashes(state, ghosts=max(1, num_blocks - num_blocks // PROBATION_SHARE))


class _Policy(NamedTuple):
    kernels: PolicyKernels
    with_memory: Callable[[State, Any], State] = lambda state, strategy: state


_POLICIES: dict[type, _Policy] = {
    LRU: _Policy(policies.LRU),
    LFU: _Policy(policies.LFU),
    LongestFirst: _Policy(policies.LONGEST_FIRST),
    Priority: _Policy(policies.PRIORITY),
    StreamingLLM: _Policy(policies.LRU),
    TTL: _Policy(policies.TTL, _with_ticks),
    FIFO: _Policy(policies.FIFO),
    S3FIFO: _Policy(policies.S3FIFO, _with_ghosts),
    SIEVE: _Policy(policies.SIEVE),
    GDSF: _Policy(policies.GDSF),
    Adaptive: _Policy(policies.ADAPTIVE, lambda state, strategy: with_learner(state)),
}
_IN_NUMPY = _Policy(policies.IN_NUMPY)
_IN_NUMPY_WITH_HOOKS = _Policy(policies.IN_NUMPY_WITH_HOOKS, lambda state, strategy: with_prefix_hashes(state))


def is_scored_in_numpy(strategy: EvictionStrategy) -> bool:
    """Tell whether a strategy is a user's own; subclasses of ours are, as they may score otherwise."""
    return type(strategy) not in _POLICIES


def with_policy_of(state: State, strategy: EvictionStrategy) -> State:
    """Return the state with the kernels of `strategy` in force."""
    in_numpy = _IN_NUMPY_WITH_HOOKS if hooks_of(strategy) else _IN_NUMPY
    policy = _POLICIES.get(type(strategy), in_numpy)
    return policy.with_memory(state._replace(kernels=policy.kernels), strategy)


def forget_blocks(state: State) -> None:
    """Forget what the strategy in force knows of single blocks, when all of them are forgotten."""
    forget_ghosts(state)
    forget_notes(state)
    forget_shadows(state.learner)


def checked_priority(strategy: EvictionStrategy, priority: Any) -> int:
    """Return the priority of a sequence, if the strategy knows such."""
    highest = strategy.levels - 1 if isinstance(strategy, Priority) else MAX_PRIORITY
    return require_int("priority", priority, 0, highest)
