"""What one forward pass computes: parts of branches, and whose logits are wanted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from pagedkv.control.plan import BatchPlan
from pagedkv.engine.request import Branch

__all__ = ["NO_DRAFTS", "Batch", "Part"]

Ids = npt.NDArray[np.int64]

NO_DRAFTS: Ids = np.empty(0, np.int64)


@dataclass(slots=True, eq=False)
class Part:
    """The tokens of one branch that a forward pass computes.

    Attributes
    ----------
    branch : Branch
    count : int
        Tokens of the branch, from ``branch.computed`` on.
    drafts : int64 [num_drafts]
        Guesses behind its last token, to be verified.
    """

    branch: Branch
    count: int
    drafts: Ids = field(default_factory=lambda: NO_DRAFTS)

    @property
    def num_query_tokens(self) -> int:
        """Tokens that go through the model."""
        return self.count + len(self.drafts)

    @property
    def reaches_end(self) -> bool:
        """Whether the next token can be chosen after this."""
        return self.count == self.branch.pending

    @property
    def query_ids(self) -> Ids:
        """The tokens that go through the model."""
        branch = self.branch
        ids = branch.ids[branch.computed : branch.computed + self.count]
        return np.concatenate([ids, self.drafts]) if len(self.drafts) else ids


@dataclass(slots=True, eq=False)
class Batch:
    """One forward pass.

    Attributes
    ----------
    parts : sequence of Part
        In the order of the plan.
    plan : BatchPlan
    token_ids : int64 [total_tokens]
    wanted : int64 [k]
        Places in `token_ids` of the query tokens whose logits are wanted: part by part, the last token of each part
        that reaches the end of its branch and its drafts.
    """

    parts: Sequence[Part]
    plan: BatchPlan
    token_ids: Ids
    wanted: Ids


def query_tokens(parts: Sequence[Part]) -> Any:
    """Return the token ids of all parts as ``append_batch`` takes them; most often one each: a flat array then."""
    if all(part.num_query_tokens == 1 for part in parts):
        return np.array([[part.branch.last_token if part.reaches_end else part.query_ids[0]] for part in parts])
    return [part.query_ids for part in parts]


def make_batch(parts: Sequence[Part], plan: BatchPlan) -> Batch:
    """Lay out the forward pass of `parts`, which `plan` has in the same order."""
    tokens = query_tokens(parts)
    if isinstance(tokens, np.ndarray):
        ids = tokens.reshape(-1)
        wanted = np.flatnonzero([part.reaches_end for part in parts])
        return Batch(parts, plan, ids, wanted)
    ids = np.concatenate(tokens)
    ends = np.cumsum([len(part) for part in tokens])
    places = [
        np.arange(end - len(part.drafts) - 1, end) for part, end in zip(parts, ends, strict=True) if part.reaches_end
    ]
    return Batch(parts, plan, ids, np.concatenate(places) if places else NO_DRAFTS)
