"""Lets a model write through the paged cache: a bounded text by ``generate()``, an endless one by sinks and window."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pagedkv
from pagedkv.cli.loading import LoadedModel
from pagedkv.cli.request import GenerateRequest
from pagedkv.cli.sampling import make_sampler
from pagedkv.cli.streamer import TextPieces, TokenStreamer
from pagedkv.cli.terminal import Failure

__all__ = ["Written", "write", "write_endlessly"]

Show = Callable[[str], None]


@dataclass(frozen=True)
class Written:
    """What a model wrote, and the pool when it had written it.

    Attributes
    ----------
    token_ids : list of list of int
        New tokens of each sample, the one that ended it included.
    stop_tokens : frozenset of int
    snapshot : pagedkv.CacheSnapshot
    cached_tokens, dropped_tokens : int
    block_bytes : int
        Of K and V of a block, over all layers.
    seconds : float
    """

    token_ids: list[list[int]]
    stop_tokens: frozenset[int]
    snapshot: pagedkv.CacheSnapshot
    cached_tokens: int
    dropped_tokens: int
    block_bytes: int
    seconds: float


def write(request: GenerateRequest, loaded: LoadedModel, ids: list[int], show: Show) -> Written:
    """Write what ``--max-new-tokens`` allows: one text, several samples, or the best of a beam search.

    Raises
    ------
    Failure
        The pool is too small.
    """
    import torch

    from pagedkv.hf import PagedCache

    cache = PagedCache(
        loaded.model.config,
        num_blocks=request.pool_size(len(ids)),
        block_size=request.block_size,
        strategy=request.strategy,
        dtype=request.kv_dtype,
    )
    stops = _stop_tokens(loaded)
    streamer = TokenStreamer(TextPieces(loaded.tokenizer.decode), stops, show)
    prompt = torch.tensor([ids], device=loaded.model.device)
    started = time.perf_counter()
    cached_tokens = cache.prompt(prompt)
    torch.manual_seed(request.seed)
    try:
        if request.samples > 1:
            _read_once(loaded.model, prompt, cache, request.samples)
        sequences = loaded.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            past_key_values=cache,
            max_new_tokens=request.token_limit,
            pad_token_id=_pad_token(loaded, stops),
            **_way_of_writing(request),
            **({} if request.beams > 1 else {"streamer": streamer}),
        )
    except pagedkv.OutOfMemory as error:
        raise _pool_is_full(request, cache.manager, len(ids)) from error
    seconds = time.perf_counter() - started
    rows = [_until_stop(row[len(ids) :], stops) for row in sequences.tolist()]
    snapshot, block_bytes = cache.manager.snapshot(), cache.manager.block_memory_bytes
    cache.release()
    return Written(rows, stops, snapshot, cached_tokens, 0, block_bytes, seconds)


def write_endlessly(request: GenerateRequest, loaded: LoadedModel, ids: list[int], show: Show) -> Written:
    """Write until the limit, if there is one, or Ctrl-C.

    Raises
    ------
    Failure
        The pool does not hold sinks and window, or the model cannot stream.
    """
    from pagedkv.hf.streaming import StreamingSession, blocks_for_streaming

    needed = blocks_for_streaming(request.sinks, request.window, request.block_size)
    if request.num_blocks is not None and request.num_blocks < needed:
        raise Failure(
            f"{request.sinks} sink and {request.window} window tokens take {needed} blocks of {request.block_size} "
            f"tokens, the pool has {request.num_blocks}: raise --num-blocks or lower --window-tokens"
        )
    session = StreamingSession(
        loaded.model,
        request.sinks,
        request.window,
        block_size=request.block_size,
        num_blocks=request.num_blocks,
        dtype=request.kv_dtype,
    )
    stops = _stop_tokens(loaded)
    streamer = TokenStreamer(TextPieces(loaded.tokenizer.decode), frozenset(), show)
    sampler = make_sampler(request.heat, request.top_p, request.seed)
    row: list[int] = []
    started = time.perf_counter()
    try:
        for token in session.generate(ids, request.token_limit, sampler=_never(stops, sampler)):
            row.append(token)
            streamer.take(token)
    except KeyboardInterrupt:
        pass  # the way to end a text without end
    streamer.end()
    seconds = time.perf_counter() - started
    cache = session.cache
    return Written([row], frozenset(), cache.snapshot(), 0, session.num_dropped, cache.block_memory_bytes, seconds)


def _read_once(model: Any, prompt: Any, cache: Any, samples: int) -> None:
    """Compute the prompt for one sequence and fork it; ``generate()`` would compute it for each.

    The last token is left over: its logits are what the samples begin with.
    """
    import torch

    read = prompt[:, cache.num_cached_tokens : -1]
    if read.shape[1]:
        with torch.inference_mode():
            model(read, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache.batch_repeat_interleave(samples)


def _never(tokens: frozenset[int], sampler: Callable[[Any], int]) -> Callable[[Any], int]:
    """Keep a sampler from drawing tokens that would end the text."""
    banned = sorted(tokens)

    def sample(logits: Any) -> int:
        logits = logits.clone()
        logits[banned] = float("-inf")
        return sampler(logits)

    return sample


def _way_of_writing(request: GenerateRequest) -> dict[str, Any]:
    if request.heat == 0:
        # The settings of sampling that the model's folder may bring would only raise a warning.
        plain = {"temperature": None, "top_p": None, "top_k": None}
        return {"do_sample": False, "num_beams": request.beams, **plain}
    return {
        "do_sample": True,
        "temperature": request.heat,
        "top_p": request.top_p,
        "num_return_sequences": request.samples,
    }


def _stop_tokens(loaded: LoadedModel) -> frozenset[int]:
    ends = loaded.model.generation_config.eos_token_id
    if ends is None:
        return frozenset()
    return frozenset(ends if isinstance(ends, list) else [ends])


def _pad_token(loaded: LoadedModel, stops: frozenset[int]) -> int:
    pad = loaded.model.generation_config.pad_token_id
    return pad if pad is not None else min(stops, default=0)


def _until_stop(row: list[int], stops: frozenset[int]) -> list[int]:
    """Cut off what fills a row up to the length of the longest."""
    end = next((place for place, token in enumerate(row) if token in stops), len(row))
    return row[: end + 1]


def _pool_is_full(request: GenerateRequest, manager: pagedkv.BlockManager, prompt_tokens: int) -> Failure:
    longest = request.rows * request.blocks_for(prompt_tokens + (request.token_limit or 0))
    return Failure(
        f"the pool of {manager.total_blocks} blocks of {manager.block_size} tokens is full: the whole call takes up to "
        f"{longest} blocks, so raise --num-blocks or lower --max-new-tokens"
    )
