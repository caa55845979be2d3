"""Tenants: whose line is next, and deficit round robin over the tokens of a step.

After M. Shreedhar and G. Varghese, "Efficient Fair Queuing Using Deficit Round Robin", SIGCOMM 1995.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterator, Mapping
from heapq import merge
from itertools import islice

from pagedkv.engine.request import Sequence


def rank(sequence: Sequence) -> tuple[int, int, int]:
    """Return whose turn it is within a tenant: the lowest first."""
    return sequence.rank


class WaitingLines:
    """The sequences that wait: a line of each tenant, in the order of rank. Who is preempted goes before later ones.

    Attributes
    ----------
    lines : dict
        Tenants to lines that are not empty, in the order of whose turn it is.
    """

    def __init__(self) -> None:
        self.lines: dict[str, list[Sequence]] = {}

    def __len__(self) -> int:
        return sum(map(len, self.lines.values()))

    def __bool__(self) -> bool:
        return bool(self.lines)

    def __iter__(self) -> Iterator[Sequence]:
        return merge(*self.lines.values(), key=rank)

    def in_turn(self, most: int) -> dict[str, deque[Sequence]]:
        """Return the first so many of each line; whose turn ended last, or who came last, is the last."""
        return {tenant: deque(islice(line, most)) for tenant, line in self.lines.items()}

    def end_turn(self, tenant: str) -> None:
        """Put the line of a tenant behind all others: one of its texts has begun, or ended."""
        if tenant in self.lines:
            self.lines[tenant] = self.lines.pop(tenant)

    def add(self, sequence: Sequence) -> None:
        """Put a sequence where its rank says, in O(log n) comparisons."""
        insort(self.lines.setdefault(sequence.request.tenant, []), sequence, key=rank)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, in O(log n) comparisons."""
        line = self.lines[sequence.request.tenant]
        place = bisect_left(line, sequence.rank, key=rank)
        while line[place] is not sequence:
            place += 1
        del line[place]
        if not line:
            del self.lines[sequence.request.tenant]


class DeficitRoundRobin:
    """Splits the tokens of each step between tenants.

    Each round gives every tenant that wants more a part of what is left, by its weight, and it may compute as many
    tokens as it has been given. What it was given and did not come to, it keeps for the next step; what it did not
    want, it loses. What it computes in any case is charged: it gets less until that is made up for, but nobody owes
    more than a step. No token is left while somebody wants it.

    Parameters
    ----------
    most : int
        Tokens of a step.
    weights : mapping, optional
        Tenants to their weights, above 0; 1 for those that are not in it.
    """

    def __init__(self, most: int, weights: Mapping[str, float] | None = None) -> None:
        self._most = most
        self._weights = dict(weights or {})
        self._credit: dict[str, float] = {}

    def weight(self, tenant: str) -> float:
        """Return the weight of a tenant."""
        return self._weights.get(tenant, 1.0)

    def charge(self, tenant: str, tokens: int) -> None:
        """Count tokens that a tenant computes beyond what `split` gives it."""
        self._credit[tenant] = max(self._credit.get(tenant, 0.0) - tokens, -float(self._most))

    def forget(self, tenant: str) -> None:
        """Forget a tenant, which has nothing to compute any more."""
        self._credit.pop(tenant, None)

    def split(self, tokens: int, wanted: Mapping[str, int]) -> dict[str, int]:
        """Return how many of the tokens each tenant gets, at most as many as it wants.

        Parameters
        ----------
        tokens : int
            What there is to give, together.
        wanted : mapping
            Tenants to the tokens that they could compute.
        """
        credit, given = self._credit, dict.fromkeys(wanted, 0)
        # Whose turn the end of the last step cut off has most, so it is the first one now.
        hungry = sorted((t for t in wanted if wanted[t] > 0), key=lambda t: -credit.get(t, 0.0))
        while tokens > 0 and hungry:
            self._refill(hungry, tokens)
            for tenant in hungry:
                count = min(math.floor(credit[tenant]), wanted[tenant] - given[tenant], tokens)
                if count > 0:
                    given[tenant] += count
                    credit[tenant] -= count
                    tokens -= count
            for tenant in hungry:
                if given[tenant] == wanted[tenant]:
                    credit[tenant] = min(credit[tenant], 0.0)
            hungry = [tenant for tenant in hungry if given[tenant] < wanted[tenant]]
        return given

    def _refill(self, hungry: list[str], tokens: int) -> None:
        """Give the credit of a round; of as many rounds as it takes until somebody can have a token."""
        total = sum(map(self.weight, hungry))
        parts = {tenant: tokens * self.weight(tenant) / total for tenant in hungry}
        rounds = max(1.0, min((1 - self._credit.get(tenant, 0.0)) / parts[tenant] for tenant in hungry))
        for tenant, part in parts.items():
            # Sums of fractions that ought to be whole are whole.
            self._credit[tenant] = round(self._credit.get(tenant, 0.0) + rounds * part, 6)
