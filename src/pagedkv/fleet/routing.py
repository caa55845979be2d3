"""Routing policies: in which order the replicas of a fleet should be asked to serve a request.

A policy keeps nothing between two calls: what it may look at is in the request and the candidates, so it gives the same
order wherever it is asked. Ties go to the candidate that stands first.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from pagedkv.errors import InvalidOperation, bad_argument
from pagedkv.validate import require_number, shown

NO_HOME = -1
"""The home of a request whose conversation no candidate has served."""

COMMON = 2
"""A block behind which so many texts for each replica went on differently is of no one conversation: many have it."""


@dataclass(frozen=True, slots=True)
class RoutingRequest:
    """What a policy knows of a request.

    Attributes
    ----------
    number : int
        How many requests were routed before it.
    tokens : int
        Of its prompt.
    home : int
        The place among the candidates of the one that served its conversation last, or −1.
    """

    number: int
    tokens: int
    home: int = NO_HOME


@dataclass(frozen=True, slots=True, eq=False)
class Candidates:
    """The replicas that may serve a request, one row each.

    Attributes
    ----------
    matched : int64 [candidates, tiers]
        Leading tokens of the prompt that each has cached, by the tier they are in, the fastest first; a token counts in
        the fastest that has it.
    load : float64 [candidates]
        Work that each was given lately, in tokens to compute.
    queue : int64 [candidates]
        Requests that wait there.
    """

    matched: npt.NDArray[np.int64]
    load: npt.NDArray[np.float64]
    queue: npt.NDArray[np.int64]

    def __len__(self) -> int:
        """Return how many candidates there are."""
        return len(self.load)

    @property
    def matched_tokens(self) -> npt.NDArray[np.int64]:
        """Leading tokens that each has cached in any tier, int64 [candidates]."""
        found: npt.NDArray[np.int64] = self.matched.sum(axis=1, dtype=np.int64)
        return found


@runtime_checkable
class RoutingPolicy(Protocol):
    """Decides where a request goes; any object with this method is one."""

    def order(self, request: RoutingRequest, candidates: Candidates) -> Sequence[int] | npt.NDArray[np.int64]:
        """Return the places of all candidates, the best first."""


@dataclass(frozen=True)
class RoundRobin:
    """One after the other, whatever they have cached."""

    def order(self, request: RoutingRequest, candidates: Candidates) -> npt.NDArray[np.int64]:
        """Begin with the candidate whose turn it is."""
        return (np.arange(len(candidates)) + request.number) % len(candidates)

    def __str__(self) -> str:
        return "round_robin"


@dataclass(frozen=True)
class LeastLoad:
    """The shortest queue first; among equals the one that was given the least work lately."""

    def order(self, request: RoutingRequest, candidates: Candidates) -> npt.NDArray[np.int64]:
        """Sort by queue, then by load."""
        return np.lexsort((candidates.load, candidates.queue))

    def __str__(self) -> str:
        return "least_load"


@dataclass(frozen=True)
class StickySession:
    """The candidate that served the conversation last, however busy; a new conversation goes to the least load."""

    def order(self, request: RoutingRequest, candidates: Candidates) -> npt.NDArray[np.int64]:
        """Put the home first and sort the others as `LeastLoad` does."""
        is_elsewhere = np.arange(len(candidates)) != request.home
        return np.lexsort((candidates.load, candidates.queue, is_elsewhere))

    def __str__(self) -> str:
        return "sticky"


@dataclass(frozen=True)
class PrefixLoad:
    """The longest cached prefix, unless that candidate has been given too much work; balanced request by request.

    A candidate is passed over while its load is above `overload` times the mean load plus the tokens of the request:
    the prompt itself is allowed for, so that one long conversation is not torn apart.

    Parameters
    ----------
    overload : float
        At least 1. A larger one finds more and balances less.
    """

    overload: float = 1.25

    def __post_init__(self) -> None:
        require_number("overload", self.overload, 1)

    def order(self, request: RoutingRequest, candidates: Candidates) -> npt.NDArray[np.int64]:
        """Sort by cached tokens, then by how fast the tier is, then by load; those passed over follow, by load."""
        is_over = candidates.load > self.overload * candidates.load.mean() + request.tokens
        counted = np.where(is_over, 0, candidates.matched_tokens)
        by_tier = [-np.where(is_over, 0, tier) for tier in candidates.matched.T[::-1]]  # the fastest weighs most
        return np.lexsort((candidates.load, *by_tier, -counted, is_over))

    def __str__(self) -> str:
        return "prefix"


_NAMED: dict[str, type[RoundRobin | LeastLoad | StickySession | PrefixLoad]] = {
    "round_robin": RoundRobin,
    "least_load": LeastLoad,
    "sticky": StickySession,
    "prefix": PrefixLoad,
}
_MODULE_AND_CLASS = re.compile(r"([A-Za-z_][\w.]*):([A-Za-z_][\w.]*)")


def routing_names() -> tuple[str, ...]:
    """Return the names of the policies that come with pagedkv."""
    return tuple(_NAMED)


def parse_routing(routing: str | RoutingPolicy) -> RoutingPolicy:
    """Return the policy of a name, of ``module:Class`` that can be made without arguments, or of a policy itself.

    Raises
    ------
    InvalidOperation
        If there is no such policy.
    """
    if not isinstance(routing, str):
        if not isinstance(routing, RoutingPolicy) or isinstance(routing, type):
            raise bad_argument("routing", "a name or an object with order(request, candidates)", shown(routing))
        return routing
    name = routing.strip()
    if made := _NAMED.get(name.lower().replace("-", "_")):
        return made()
    match = _MODULE_AND_CLASS.fullmatch(name)
    if match is None:
        raise bad_argument("routing", f"module:Class or one of {', '.join(_NAMED)}", shown(routing))
    try:
        found = getattr(import_module(match[1]), match[2])()
    except Exception as error:
        raise InvalidOperation(
            f"routing {name!r} cannot be imported and made: {type(error).__name__}: {error}"
        ) from error
    return parse_routing(found)


def route(policy: RoutingPolicy, request: RoutingRequest, candidates: Candidates) -> list[int]:
    """Return the order that a policy gives, once it is seen to be one.

    Parameters
    ----------
    policy : RoutingPolicy
    request : RoutingRequest
    candidates : Candidates

    Returns
    -------
    list of int
        The place of every candidate, the best first.

    Raises
    ------
    InvalidOperation
        If the policy leaves a candidate out, or names one twice or one that is not there.
    """
    order = np.asarray(policy.order(request, candidates))
    places: list[int] = order.tolist()
    if order.dtype.kind not in "iu" or order.ndim != 1 or sorted(places) != list(range(len(candidates))):
        raise bad_argument("routing", f"each of 0 … {len(candidates) - 1} once, the best first", shown(order))
    return places


class RecentLoad:
    """Work that each replica was given lately, in tokens: with every request of the fleet older work counts less.

    Replicas are names; one that is new begins with the mean of the others.

    Parameters
    ----------
    memory : float
        What is left of it after a request: .995 halves it in 138 requests.
    """

    def __init__(self, memory: float = 0.995) -> None:
        self._memory = require_number("memory", memory, 0, 1)
        self._tokens: dict[Hashable, float] = {}

    def of(self, replicas: Sequence[Hashable]) -> npt.NDArray[np.float64]:
        """Return that of some replicas, float64 [replicas]."""
        return np.array([self._known(replica) for replica in replicas])

    def add(self, replica: Hashable, tokens: int) -> None:
        """Count a request of which `replica` had to compute these tokens."""
        for each in self._tokens:
            self._tokens[each] *= self._memory
        self._tokens[replica] = self._known(replica) + tokens

    def forget(self, replica: Hashable) -> None:
        """Drop what a replica was given that is gone."""
        self._tokens.pop(replica, None)

    def _known(self, replica: Hashable) -> float:
        if replica not in self._tokens:
            self._tokens[replica] = sum(self._tokens.values()) / len(self._tokens) if self._tokens else 0.0
        return self._tokens[replica]
