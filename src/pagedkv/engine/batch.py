"""What one forward pass computes: parts of branches, and whose logits are wanted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pagedkv.control.plan import BatchPlan
from pagedkv.engine.request import Branch

__all__ = ["NO_DRAFTS", "Batch", "Part"]

Ids = npt.NDArray[np.int64]

NO_DRAFTS: Ids = np.empty(0, np.int64)


class Part:
    """The tokens of one branch that a forward pass computes.

    Parameters
    ----------
    branch : Branch
    count : int
        Tokens of the branch, from ``branch.computed`` on.

    Attributes
    ----------
    drafts : int64 [num_drafts]
        Guesses behind its last token, to be verified.
    reaches_end : bool
        Whether the next token can be chosen after this.
    num_scored : int
        Tokens at its beginning whose logits tell how likely the next tokens of the prompt are.
    """

    __slots__ = ("branch", "count", "drafts", "num_scored", "reaches_end")

    def __init__(self, branch: Branch, count: int) -> None:
        self.branch, self.count = branch, count
        self.drafts = NO_DRAFTS
        self.reaches_end = count == branch.pending
        request = branch.request
        self.num_scored = 0
        if request.prompt_logprobs is not None and len(request.prompt_logprobs) < request.num_prompt_tokens:
            self.num_scored = max(0, min(count, request.num_prompt_tokens - 1 - branch.computed))

    @property
    def num_query_tokens(self) -> int:
        """Tokens that go through the model."""
        return self.count + len(self.drafts)

    @property
    def query_ids(self) -> Ids:
        """The tokens that go through the model."""
        branch = self.branch
        ids = branch.ids[branch.computed : branch.computed + self.count]
        return np.concatenate([ids, self.drafts]) if len(self.drafts) else ids

    def wanted(self, start: int) -> Ids:
        """Return the query tokens whose logits are wanted, where the first one has the place `start`."""
        scored = np.arange(start, start + self.num_scored)
        end = start + self.num_query_tokens
        chosen = np.arange(end - len(self.drafts) - 1, end) if self.reaches_end else NO_DRAFTS
        return np.concatenate([scored, chosen])


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
        Places in `token_ids` of the query tokens whose logits are wanted: part by part, those that are scored, then,
        if it reaches the end of its branch, its last token and its drafts.
    """

    parts: Sequence[Part]
    plan: BatchPlan
    token_ids: Ids
    wanted: Ids


def query_tokens(parts: Sequence[Part]) -> Any:
    """Return the token ids of all parts as ``append_batch`` takes them; most often one each: a flat array then."""
    if all(part.num_query_tokens == 1 for part in parts):
        return np.array([[part.branch.token(part.branch.computed)] for part in parts])
    return [part.query_ids for part in parts]


def make_batch(parts: Sequence[Part], plan: BatchPlan) -> Batch:
    """Lay out the forward pass of `parts`, which `plan` has in the same order."""
    tokens = query_tokens(parts)
    if isinstance(tokens, np.ndarray) and not any(part.num_scored for part in parts):
        return Batch(parts, plan, tokens.reshape(-1), np.flatnonzero([part.reaches_end for part in parts]))
    starts = plan.cu_seqlens_q.tolist()
    wanted = [part.wanted(start) for part, start in zip(parts, starts, strict=False)]
    return Batch(parts, plan, np.concatenate([*tokens]), np.concatenate(wanted))
