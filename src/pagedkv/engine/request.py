"""Requests, and the branches that they grow: the state that the scheduler moves between waiting and running."""

from __future__ import annotations

import enum
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from pagedkv.engine.outputs import FinishReason
from pagedkv.engine.sampling_params import SamplingParams

__all__ = ["Branch", "Request", "State"]

Ids = npt.NDArray[np.int64]
FIRST_CAPACITY = 256


class State(enum.Enum):
    """Where a branch is. A preempted one waits again."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False, kw_only=True)
class Request:
    """What a caller asks for.

    Parameters
    ----------
    request_id : str
        Unique among the requests that are under way.
    prompt_token_ids : int64 [num_prompt_tokens]
        Anything that NumPy makes such an array of.
    params : SamplingParams
    prompt : str, optional
        The text that the tokens were made of; handed back with the output.
    priority : int
        Higher goes first; within a priority, who came first.
    cache_salt : str
        Requests of different salts never share a block.
    session_id : str, optional
        Handed through.
    wants_updates : bool
        Whether every step that brings a token gives an output, or only the last one.
    arrived : float
        Seconds of ``time.monotonic``.

    Attributes
    ----------
    branches : list of Branch
        The texts that are being written: one, ``n`` after the prompt is computed, or the live beams.
    num_unborn : int
        Branches that will be forked off once the prompt is computed.
    """

    request_id: str
    prompt_token_ids: Any
    params: SamplingParams
    prompt: str | None = None
    priority: int = 0
    cache_salt: str = ""
    session_id: str | None = None
    wants_updates: bool = True
    arrived: float = field(default_factory=time.monotonic)

    number: int = 0
    seed: int = 0
    max_tokens: int = 0
    branches: list[Branch] = field(default_factory=list)
    beams: Any = None
    prompt_tuple: tuple[int, ...] = ()
    num_unborn: int = 0
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    prompt_logprobs: list[Any] | None = None
    first_scheduled: float | None = None
    first_token: float | None = None
    finished: float | None = None

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self.prompt_token_ids)

    @property
    def num_branches(self) -> int:
        """How many branches it has, or will have once its prompt is computed."""
        return max(len(self.branches), self.params.beam_width or self.params.n)

    @property
    def is_finished(self) -> bool:
        """Whether nothing is left to do."""
        return self.finished is not None


class Branch:
    """The prompt of a request and one text that continues it; while it runs it owns a sequence of the cache.

    ``ids[:length]`` are its tokens, ``ids[:computed]`` those whose K and V are written. The rest is what the next
    forward passes compute: a prompt, a prompt with a reply where the branch was preempted, or the newest token.

    Parameters
    ----------
    request : Request
    index : int
        Which of the request's texts.
    seq_id : int
        Of its sequence in the cache.
    """

    __slots__ = (
        "_ids",
        "awaits",
        "computed",
        "cumulative_logprob",
        "dropped",
        "finish_reason",
        "index",
        "length",
        "logprobs",
        "output_ids",
        "request",
        "row",
        "seq_id",
        "state",
        "stop_reason",
        "writer",
    )

    def __init__(self, request: Request, index: int, seq_id: int) -> None:
        self.request, self.index, self.seq_id = request, index, seq_id
        self.length = request.num_prompt_tokens
        self._ids: Ids = np.empty(self.length + min(request.max_tokens, FIRST_CAPACITY), np.int64)
        self._ids[: self.length] = request.prompt_token_ids
        self.output_ids: list[int] = []
        self.computed = 0
        self.dropped = 0  # of the computed tokens, those that streaming gave up
        self.state = State.WAITING
        self.awaits: tuple[Branch, int] | None = None  # who computes its prefix, and how many tokens of it
        self.logprobs: list[Any] = []
        self.cumulative_logprob = 0.0
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        self.row: Any = None  # what the sampler has to know
        self.writer: Any = None  # what turns tokens into text and finds the stops

    @property
    def ids(self) -> Ids:
        """Its tokens, a view int64 [length]."""
        return self._ids[: self.length]

    @property
    def is_running(self) -> bool:
        """Whether it holds blocks."""
        return self.state is State.RUNNING

    @property
    def pending(self) -> int:
        """Tokens whose K and V are still to be computed."""
        return self.length - self.computed

    @property
    def readable(self) -> int:
        """Tokens that may be computed whenever: beams compute their last ones all at once."""
        return self.pending - 1 if self.request.beams is not None else self.pending

    @property
    def held(self) -> int:
        """Tokens that its sequence holds."""
        return self.computed - self.dropped

    @property
    def rank(self) -> tuple[int, int, int]:
        """Whose turn it is: the lowest first."""
        return (-self.request.priority, self.request.number, self.index)

    def token(self, place: int) -> int:
        """Return one of its tokens."""
        return int(self._ids[place])

    def push(self, token: int) -> None:
        """Add a generated token."""
        if self.length == len(self._ids):
            self._ids = np.concatenate([self._ids, np.empty(max(len(self._ids), FIRST_CAPACITY), np.int64)])
        self._ids[self.length] = token
        self.length += 1
        self.output_ids.append(token)

    def twin(self, index: int, seq_id: int) -> Branch:
        """Return a branch that has read and written the same so far, without a writer and a row."""
        other = Branch(self.request, index, seq_id)
        other._ids = self._ids.copy()
        other.length, other.computed, other.dropped = self.length, self.computed, self.dropped
        other.output_ids = self.output_ids.copy()
        other.logprobs = self.logprobs.copy()
        other.cumulative_logprob = self.cumulative_logprob
        other.state = self.state
        return other
