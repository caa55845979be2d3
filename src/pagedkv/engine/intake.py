"""What a new request must be: checked once, before it is queued."""

from __future__ import annotations

from typing import Any

import numpy as np

from pagedkv.control.strategies import MAX_PRIORITY, Priority
from pagedkv.engine.request import Request
from pagedkv.engine.runner import Runner
from pagedkv.engine.sampling_params import SamplingParams
from pagedkv.errors import InvalidOperation
from pagedkv.spec import require_int

__all__ = ["prepare"]

ENDLESS = 2**40


def prepare(request: Request, runner: Runner) -> None:
    """Check the arguments of a request and settle what depends on the engine.

    Raises
    ------
    InvalidOperation
        If an argument makes no sense.
    """
    if not isinstance(request.params, SamplingParams):
        raise InvalidOperation(f"params expects SamplingParams, got {request.params!r}")
    request.params.require_vocab(runner.vocab_size)
    if not isinstance(request.cache_salt, str):
        raise InvalidOperation(f"cache_salt expects a str, got {request.cache_salt!r}")
    strategy = runner.cache.eviction_strategy
    highest = strategy.levels - 1 if isinstance(strategy, Priority) else MAX_PRIORITY
    require_int("priority", request.priority, 0, highest)
    request.prompt_token_ids = _checked_ids(request.prompt_token_ids, runner.vocab_size)
    request.prompt_tuple = tuple(request.prompt_token_ids.tolist())
    most = request.params.max_tokens
    request.max_tokens = _most_tokens(request, runner) if most is None else most
    request.prompt_logprobs = None if request.params.prompt_logprobs is None else [None]
    request.num_unborn = request.num_branches - 1


def _checked_ids(given: Any, vocab_size: int) -> Any:
    try:
        ids = np.array(given)
    except (ValueError, TypeError):
        ids = np.array(None)
    if ids.ndim != 1 or not len(ids) or ids.dtype.kind not in "iu":
        raise InvalidOperation(f"prompt expects a flat list of at least one token id, got {given!r:.80}")
    if ids.min() < 0 or ids.max() >= vocab_size:
        wrong = ids[(ids < 0) | (ids >= vocab_size)][0]
        raise InvalidOperation(f"prompt expects token ids in 0 … {vocab_size - 1}, got {wrong}")
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
