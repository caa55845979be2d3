"""Requests, their sequences and their outputs: the state that the scheduler moves between waiting and running."""

from __future__ import annotations

import enum
import time
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from pagedkv.control.strategies import MAX_PRIORITY, Priority
from pagedkv.engine.runner import Runner
from pagedkv.engine.sampling_params import SamplingParams
from pagedkv.errors import RequestRefused, bad_argument
from pagedkv.validate import require_int

# Outputs: frozen, cumulative, free of references into the engine.

FinishReason = Literal["stop", "length", "abort"]


class Logprob(NamedTuple):
    """How likely the model found a token.

    Attributes
    ----------
    logprob : float
        Natural logarithm of its probability under the raw logits: before penalties, biases and temperature.
    rank : int
        1 for the likeliest token; how many tokens are likelier, and one.
    """

    logprob: float
    rank: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestMetrics:
    """When things happened to a request, in seconds of ``time.monotonic``; None for what has not happened yet.

    Attributes
    ----------
    arrived, first_scheduled, first_token, finished : float
    num_preemptions : int
        How often its blocks were taken for others and its tokens computed again.
    """

    arrived: float
    first_scheduled: float | None = None
    first_token: float | None = None
    finished: float | None = None
    num_preemptions: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionOutput:
    """One text of a request, as far as it is written.

    Attributes
    ----------
    index : int
        Which of the ``n`` texts.
    text : str
        Empty without a tokenizer.
    token_ids : tuple of int
        The generated tokens.
    finish_reason : {"stop", "length", "abort"}, optional
        None while it goes on.
    stop_reason : int or str, optional
        The stop token or stop string that ended it, or what went wrong with the grammar that it follows.
    logprobs : list of dict, optional
        One dict a token, token id to its log probability, where they were asked for.
    cumulative_logprob : float, optional
        Sum of the log probabilities of the tokens, where they were asked for.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    cumulative_logprob: float | None = None

    @property
    def finished(self) -> bool:
        """Whether this text is complete."""
        return self.finish_reason is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOutput:
    """A request, as far as it is done. Outputs are cumulative: the last one holds everything.

    Attributes
    ----------
    request_id : str
    prompt : str, optional
        None if token ids were given.
    prompt_token_ids : tuple of int
    outputs : list of CompletionOutput
        ``n`` of them, in the order of their indices.
    finished : bool
    num_cached_tokens : int
        Tokens of the prompt whose K and V came from the cache when the request was first scheduled.
    metrics : RequestMetrics
    prompt_logprobs : list of dict, optional
        One entry a prompt token, the first is None, where they were asked for.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: list[CompletionOutput]
    finished: bool
    num_cached_tokens: int = 0
    metrics: RequestMetrics = field(default_factory=lambda: RequestMetrics(arrived=0.0))
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None


Ids = npt.NDArray[np.int64]
FIRST_CAPACITY = 256


class SequenceState(enum.Enum):
    """Where a sequence is. A preempted one waits again."""

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
    tenant : str
        Whose it is. Tenants share the steps, whatever the priorities of their requests.
    wants_updates : bool
        Whether every step that brings a token gives an output, or only the last one.
    arrived : float
        Seconds of ``time.monotonic``.

    Attributes
    ----------
    sequences : list of Sequence
        The texts that are being written: one, ``n`` after the prompt is computed, or the live beams.
    num_unforked : int
        Sequences that will be forked off once the prompt is computed.
    grammar : GrammarState, optional
        Where each text begins in what `params` asks it to follow.
    """

    request_id: str
    prompt_token_ids: Any
    params: SamplingParams
    prompt: str | None = None
    priority: int = 0
    cache_salt: str = ""
    session_id: str | None = None
    tenant: str = ""
    wants_updates: bool = True
    arrived: float = field(default_factory=time.monotonic)

    number: int = 0
    seed: int = 0
    max_tokens: int = 0
    sequences: list[Sequence] = field(default_factory=list)
    beams: Any = None
    grammar: Any = None
    prompt_tuple: tuple[int, ...] = ()
    num_unforked: int = 0
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    is_aborted: bool = False
    prompt_logprobs: list[Any] | None = None
    first_scheduled: float | None = None
    first_token: float | None = None
    finished: float | None = None

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self.prompt_token_ids)

    @property
    def num_sequences(self) -> int:
        """How many sequences it has, or will have once its prompt is computed."""
        return max(len(self.sequences), self.params.beam_width or self.params.n)

    @property
    def is_finished(self) -> bool:
        """Whether nothing is left to do."""
        return self.finished is not None


@dataclass(slots=True, eq=False, repr=False)
class Sequence:
    """The prompt of a request and one text that continues it; while it runs it owns a sequence of the cache.

    ``ids[:length]`` are its tokens, ``ids[:computed]`` those whose K and V are written. The rest is what the next
    forward passes compute: a prompt, a prompt with a reply where the sequence was preempted, or the newest token.

    Parameters
    ----------
    request : Request
    index : int
        Which of the request's texts.
    seq_id : int
        Of its sequence in the cache.
    """

    request: Request
    index: int
    seq_id: int
    output_ids: list[int] = field(init=False, default_factory=list)
    computed: int = field(init=False, default=0)
    dropped: int = field(init=False, default=0)  # of the computed tokens, those that streaming evicted
    state: SequenceState = field(init=False, default=SequenceState.WAITING)
    parting: int = field(init=False, default=0)  # where a text that waits parts from it: worth a snapshot
    awaits: tuple[Sequence, int] | None = field(init=False, default=None)  # who computes how many tokens of its prefix
    logprobs: list[Any] = field(init=False, default_factory=list)
    cumulative_logprob: float = field(init=False, default=0.0)
    finish_reason: FinishReason | None = field(init=False, default=None)
    stop_reason: int | str | None = field(init=False, default=None)
    row: Any = field(init=False, default=None)  # what the sampler has to know
    output_text: Any = field(init=False, default=None)  # what turns tokens into text and finds the stops
    length: int = field(init=False)
    _ids: Ids = field(init=False)

    def __post_init__(self) -> None:
        self.length = self.request.num_prompt_tokens
        self._ids = np.empty(self.length + min(self.request.max_tokens, FIRST_CAPACITY), np.int64)
        self._ids[: self.length] = self.request.prompt_token_ids

    @property
    def ids(self) -> Ids:
        """Its tokens, a view int64 [length]."""
        return self._ids[: self.length]

    @property
    def is_running(self) -> bool:
        """Whether it holds blocks."""
        return self.state is SequenceState.RUNNING

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

    def twin(self, index: int, seq_id: int) -> Sequence:
        """Return a sequence that has read and written the same so far, without an output text and a row."""
        other = Sequence(self.request, index, seq_id)
        other._ids = self._ids.copy()
        other.length, other.computed, other.dropped = self.length, self.computed, self.dropped
        other.output_ids = self.output_ids.copy()
        other.logprobs = self.logprobs.copy()
        other.cumulative_logprob = self.cumulative_logprob
        other.state = self.state
        return other


# What a new request must be: checked once, before it is queued.

ENDLESS = 2**40


def prepare(request: Request, runner: Runner) -> None:
    """Check the arguments of a request and settle what depends on the engine.

    Raises
    ------
    InvalidOperation
        If an argument makes no sense.
    """
    if not isinstance(request.params, SamplingParams):
        raise bad_argument("params", "SamplingParams", f"{request.params!r}", "write SamplingParams(…)")
    request.params.require_vocab(runner.vocab_size)
    if not isinstance(request.cache_salt, str):
        raise bad_argument("cache_salt", "a str", f"{request.cache_salt!r}")
    if not isinstance(request.tenant, str):
        raise bad_argument("tenant", "a str", f"{request.tenant!r}")
    strategy = runner.cache.eviction_strategy
    highest = strategy.levels - 1 if isinstance(strategy, Priority) else MAX_PRIORITY
    require_int("priority", request.priority, 0, highest)
    request.prompt_token_ids = _checked_ids(request.prompt_token_ids, runner.vocab_size)
    request.prompt_tuple = tuple(request.prompt_token_ids.tolist())
    most = request.params.max_tokens
    request.max_tokens = _most_tokens(request, runner) if most is None else most
    request.prompt_logprobs = None if request.params.prompt_logprobs is None else [None]
    request.num_unforked = request.num_sequences - 1


_WHOLE = "ids are whole numbers, one text at a time"


def _checked_ids(given: Any, vocab_size: int) -> Any:
    try:
        ids = np.array(given)
    except (ValueError, TypeError):
        ids = np.array(None)
    if ids.ndim != 1 or not len(ids) or ids.dtype.kind not in "iu":
        hint = "begin with the model's first token, if there is no text" if ids.ndim == 1 and not len(ids) else _WHOLE
        raise bad_argument("prompt", "a flat list of at least one token id", f"{given!r:.80}", hint)
    if ids.min() < 0 or ids.max() >= vocab_size:
        wrong = ids[(ids < 0) | (ids >= vocab_size)][0]
        hint = "encode the text with the tokenizer of this model"
        raise bad_argument("prompt", f"token ids in 0 … {vocab_size - 1}", f"{wrong}", hint)
    return ids.astype(np.int64)


def _most_tokens(request: Request, runner: Runner) -> int:
    """Return how many tokens fit behind the prompt: what ``max_tokens=None`` means; at least 1, to be refused."""
    if request.params.streaming is not None:
        return ENDLESS
    blocks, prompt = runner.cache.total_blocks, request.num_prompt_tokens
    if request.params.beam_width is not None:
        shared = prompt // runner.cache.block_size if shares_prefixes(runner) else 0
        blocks = shared + max(0, blocks - shared) // request.params.beam_width
    length = blocks * runner.cache.block_size + 1
    if runner.max_positions is not None:
        length = min(length, runner.max_positions)
    return max(1, length - prompt)


def shares_prefixes(runner: Runner) -> bool:
    """Tell whether equal prefixes of two requests are stored once."""
    return runner.reuses_prefixes and runner.cache.prefix_caching


def streaming_blocks(tokens: int, streaming: tuple[int, int], size: int) -> int:
    """Return how many blocks so many tokens of a stream take: the sinks', the window's with two ragged ends."""
    sink, window = streaming
    return min(-(-tokens // size), -(-sink // size) - (-window // size) + 1)


def blocks_at_most(request: Request, block_size: int, shared: bool) -> int:
    """Return how many blocks a request needs at once at most, with the pool to itself; its last token needs none."""
    params, prompt = request.params, request.num_prompt_tokens
    tokens = prompt + request.max_tokens - 1
    if params.streaming is not None:
        return streaming_blocks(tokens, params.streaming, block_size)
    blocks = -(-tokens // block_size)
    if params.beam_width is None:
        return blocks
    once = prompt // block_size if shared and params.prompt_logprobs is None else 0
    return once + params.beam_width * (blocks - once)


def refuse_what_never_fits(request: Request, runner: Runner, max_num_seqs: int, max_batch_tokens: int) -> None:
    """Raise if a request could not be computed with the whole engine to itself.

    Raises
    ------
    RequestRefused
        With the numbers.
    """
    prompt, cache = request.num_prompt_tokens, runner.cache
    needed = blocks_at_most(request, cache.block_size, shares_prefixes(runner))
    if runner.window is not None and runner.chunkable and request.num_sequences == 1:
        # A step reads a chunk behind the window; with ragged ends.
        needed = min(needed, -(-(runner.window - 1 + max_batch_tokens) // cache.block_size) + 2)
    most = None if request.max_tokens == ENDLESS else request.max_tokens
    text = f"{prompt} prompt tokens and max_tokens = {most}"
    if needed > cache.total_blocks:
        shorter = "lower max_tokens" if request.params.streaming is None else "stream through a smaller window"
        raise RequestRefused(
            f"{text} need {needed} blocks of {cache.block_size} tokens at once, the pool has {cache.total_blocks}: "
            f"{shorter} or raise num_blocks"
        )
    _refuse_what_would_be_cut(request, runner)
    positions = prompt + request.max_tokens
    if request.params.streaming is not None:
        positions = min(positions, sum(request.params.streaming) + 1)
    if runner.max_positions is not None and positions > runner.max_positions:
        raise RequestRefused(f"{text} are {positions} positions, the model has {runner.max_positions}: ask for less")
    if request.num_sequences > max_num_seqs:
        raise RequestRefused(f"{request.num_sequences} texts at once exceed max_num_seqs = {max_num_seqs}")


def _refuse_what_would_be_cut(request: Request, runner: Runner) -> None:
    """Refuse what would cut the prompt of a model that takes prompts whole."""
    prompt, streaming = request.num_prompt_tokens, request.params.streaming
    if not runner.chunkable and streaming is not None and prompt > sum(streaming):
        raise RequestRefused(
            f"{prompt} prompt tokens exceed streaming = {streaming}, and the model takes prompts whole"
        )
    limit, longest = runner.restarts_beyond, prompt + request.max_tokens - 1
    if limit is not None and request.params.beam_width is not None and prompt <= limit < longest:
        raise RequestRefused(
            f"beams of {longest} tokens: the model begins anew beyond {limit}, where beams cannot follow"
        )
