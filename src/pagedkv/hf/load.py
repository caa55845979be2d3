"""load_runner(): a ModelRunner whose mode was proved on the model itself, not guessed from its name."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from pagedkv.control.protocol import EvictionStrategy
from pagedkv.data.gpu_device import has_triton
from pagedkv.errors import InvalidOperation, MissingExtra, bad_argument
from pagedkv.hf.cache import ModelKvCache
from pagedkv.hf.compat import has_changing_rope
from pagedkv.hf.graphs import CudaRecorder
from pagedkv.hf.runner import ModelRunner, RecurrentStates
from pagedkv.spec import KvCacheSpec
from pagedkv.validate import require_int

logger = logging.getLogger("pagedkv")

MODES = ("auto", "ragged", "gather")
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
"""How far logits may be from the model's own, in relation to their size. Rounding alone is some 1e-6 in float32."""
HALF_TOLERANCE = 0.05
"""The same in bfloat16 and float16, where rounding alone is up to 0.02."""
STEPS = ((6, 5), (3, 1))
"""Query tokens of two sequences in two forward passes: prefill; the rest of a prompt beside a single token."""


def load_runner(
    model: Any,
    *,
    num_blocks: int | Callable[[int], int],
    block_size: int = 16,
    strategy: str | EvictionStrategy = "lru",
    prefix_caching: bool = True,
    kv_dtype: Any = None,
    mode: str = "auto",
    eviction_threshold: float = 0.9,
    batch_invariant: bool = True,
    cuda_graphs: bool = False,
) -> ModelRunner:
    """Load a model and put it over a paged cache.

    Ragged mode is taken only where a few tokens of random text, computed that way at load time, have the logits that
    the plain model gives; else gather mode, and the logger ``pagedkv`` says why.

    Parameters
    ----------
    model : str, path or PreTrainedModel
        A folder in the Hugging Face format, or a causal language model; put into eval mode.
    num_blocks : int, or callable
        Size of the pool; a callable is given the bytes of one block, over all layers, and returns the number.
    block_size, strategy, eviction_threshold
        As in :class:`pagedkv.PagedKvCache`.
    prefix_caching : bool
        Whether committed blocks stay findable; for a model with recurrent or convolution layers they never do.
    kv_dtype : str or torch.dtype, optional
        Of the stored K and V; that of the keys by default. ``"int8"`` and ``"fp8"`` are quantised; the mode is proved
        without.
    mode : {"auto", "ragged", "gather"}
        ``"ragged"`` fails where ``"auto"`` would go over to gather mode.
    batch_invariant : bool
        Whether logits in ragged mode on the CPU are to have the same bits whatever else is in a batch and however a
        text is cut (see docs/huggingface.md). It costs time in float32 where fewer than four tokens are computed.
    cuda_graphs : bool
        Whether decode steps are recorded and replayed as CUDA graphs (see docs/gpu.md), in ragged mode. A model that
        cannot be recorded runs without, and the logger says why.

    Returns
    -------
    ModelRunner

    Raises
    ------
    InvalidOperation
        If an argument is out of range, the model has no attention layer or an encoder, ragged mode was asked for and is
        not right, or CUDA graphs were and the model is on no CUDA device.
    MissingExtra
        If CUDA graphs were asked for and Triton is not installed.
    """
    if mode not in MODES:
        raise bad_argument("mode", f"one of {', '.join(MODES)}", f"{mode!r}")
    require_int("block_size", block_size, 1, 2**31 - 1)
    if isinstance(model, (str, PathLike)):
        model = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    if not isinstance(model, PreTrainedModel):
        raise bad_argument("model", "a folder or a PreTrainedModel", f"{type(model).__name__}")
    if cuda_graphs:
        _require_graphs(model, mode)
    model.train(False)
    RecurrentStates(model.config)  # refuses a model without attention layers, whatever the mode
    # What quantising costs is the caller's choice and no fault of the mode.
    is_quantised = kv_dtype is not None and KvCacheSpec(0, dtype=kv_dtype).is_quantised
    proved = _prove(model, mode, block_size, None if is_quantised else kv_dtype)
    spec = proved.cache.spec
    block_bytes = replace(spec, dtype=kv_dtype or spec.dtype).block_memory_bytes
    count = num_blocks(block_bytes) if callable(num_blocks) else num_blocks
    cache = ModelKvCache(
        count,
        block_size,
        num_layers=0,
        strategy=strategy,
        prefix_caching=prefix_caching and proved.reuses_prefixes,
        eviction_threshold=eviction_threshold,
    )
    runner = ModelRunner(model, cache, proved.mode, kv_dtype, batch_invariant)
    runner.table.follow(proved.table)
    if cuda_graphs and runner.mode == "gather":
        logger.warning("%s runs without CUDA graphs, as it runs in gather mode", type(model).__name__)
    elif cuda_graphs:
        runner.record_decoding(CudaRecorder(model.device))
    return runner


def _require_graphs(model: Any, mode: str) -> None:
    if mode == "gather":
        raise bad_argument("cuda_graphs", "False in mode 'gather'", "True")
    if model.device.type != "cuda":
        raise bad_argument("cuda_graphs", "a model on a CUDA device", f"one on {model.device}")
    if not has_triton():
        raise MissingExtra("triton", "gpu")


def _prove(model: Any, mode: str, block_size: int, kv_dtype: Any) -> ModelRunner:
    """Return a small runner, in the mode that is right for the model, that has run it."""
    if mode != "gather":
        try:
            return _tried(model, "ragged", block_size, kv_dtype)
        except Exception as error:  # whatever a model does with tokens of other sequences, or with handles
            reason = str(error).removeprefix("Invalid operation: ")
            if mode == "ragged":
                raise InvalidOperation(f"mode: 'ragged' is not for {type(model).__name__}: {reason}") from error
            logger.warning("%s runs in gather mode, sequence by sequence: %s", type(model).__name__, reason)
    return _tried(model, "gather", block_size, kv_dtype)


def _tried(model: Any, mode: str, block_size: int, kv_dtype: Any) -> ModelRunner:
    blocks = sum(-(-sum(counts) // block_size) for counts in zip(*STEPS, strict=True))
    runner = ModelRunner(model, ModelKvCache(blocks, block_size, num_layers=0), mode, kv_dtype=kv_dtype)
    if mode == "ragged" and has_changing_rope(model.config):
        raise InvalidOperation("its rotary frequencies change with the longest text of a batch")
    if mode == "ragged" and not runner.reuses_prefixes:
        raise InvalidOperation("it has layers that keep a state outside of K and V")
    texts = _texts(runner.vocab_size)
    got, expected = _stepped(runner, texts), _plain(model, texts)
    error = float((got - expected).norm() / expected.norm())
    stored = runner.cache.storage.dtype
    tolerance = max(TOLERANCE.get(kind, HALF_TOLERANCE) for kind in (model.dtype, stored))
    if not error <= tolerance:
        text = f"its logits are off by {error:.2g} of their size, expected at most {tolerance:g}"
        if mode == "ragged":
            raise InvalidOperation(text)
        logger.warning("%s in gather mode: %s", type(model).__name__, text)
    return runner


def _texts(vocab_size: int) -> list[np.ndarray[Any, Any]]:
    random = np.random.default_rng(0)
    return [random.integers(0, vocab_size, sum(counts)) for counts in zip(*STEPS, strict=True)]


def _stepped(runner: ModelRunner, texts: list[np.ndarray[Any, Any]]) -> Tensor:
    """Return the logits of all tokens, text by text, out of mixed batches."""
    seq_ids = range(len(texts))
    for seq_id in seq_ids:
        runner.cache.allocate(seq_id, 0)
    rows: list[list[Tensor]] = [[] for _ in texts]
    done = [0] * len(texts)
    for counts in STEPS:
        parts = [text[start : start + count] for text, start, count in zip(texts, done, counts, strict=True)]
        plan = runner.cache.append_batch(list(seq_ids), counts=list(counts))
        logits = runner.forward(plan, np.concatenate(parts), np.arange(plan.total_tokens))
        for seq_id, part in enumerate(torch.split(logits, list(counts))):
            rows[seq_id].append(part)
            done[seq_id] += counts[seq_id]
        runner.cache.commit(plan)
    return torch.cat([part for parts in rows for part in parts])


def _plain(model: Any, texts: list[np.ndarray[Any, Any]]) -> Tensor:
    with torch.no_grad():
        return torch.cat(
            [model(torch.from_numpy(text).to(model.device)[None], use_cache=False).logits[0].float() for text in texts]
        )
