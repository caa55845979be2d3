"""load_runner(): a ModelRunner whose mode was proved on the model itself, not guessed from its name."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from os import PathLike
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel

from pagedkv.control.protocol import Strategy
from pagedkv.data.gpu_device import has_triton
from pagedkv.data.huge_pages import move_weights
from pagedkv.data.weights import WEIGHTS
from pagedkv.errors import InvalidOperation, MissingExtra, bad_argument
from pagedkv.hf.compat import paged_layers
from pagedkv.hf.exam import Passed, sit_exam
from pagedkv.hf.graphs import CudaRecorder
from pagedkv.hf.pool import ModelKvCache
from pagedkv.hf.runner import ModelRunner
from pagedkv.spec import KvCacheSpec, dtype_name
from pagedkv.typing import Dtype, Mode, Weights
from pagedkv.validate import likely, require_choice, require_flag, require_int, shown

logger = logging.getLogger("pagedkv")

MODES = ("auto", "compiled", "ragged", "gather")


def load_runner(
    model: str | PathLike[str] | PreTrainedModel,
    *,
    num_blocks: int | Callable[[int], int],
    block_size: int = 16,
    strategy: Strategy = "lru",
    prefix_caching: bool = True,
    kv_dtype: Dtype | None = None,
    mode: Mode = "auto",
    eviction_threshold: float = 0.9,
    batch_invariant: bool = True,
    cuda_graphs: bool | None = None,
    num_states: int | Callable[[int], int] = 64,
    weights: Weights | None = None,
    keep_model: bool = True,
) -> ModelRunner:
    """Load a model and put it over a paged cache.

    The model sits an exam first (see docs/huggingface.md): random texts, computed in the fastest way, must have the
    logits that it gives without a cache; else the next way is tried, and the logger ``pagedkv`` says why. A model for
    which no way is right is refused.

    Parameters
    ----------
    model : str, path or PreTrainedModel
        A folder in the Hugging Face format, or a causal language model; put into eval mode.
    num_blocks : int, or callable
        Size of the pool; a callable is given the bytes of one block, over all layers, and returns the number.
    block_size, strategy, eviction_threshold
        As in :class:`pagedkv.PagedKvCache`.
    prefix_caching : bool
        Whether committed blocks stay findable.
    kv_dtype : str or torch.dtype, optional
        Of the stored K and V; that of the keys by default. ``"int8"`` and ``"fp8"`` are quantised; the mode is proved
        without.
    mode : {"auto", "compiled", "ragged", "gather"}
        ``"auto"`` takes the first that is right for the model; one that was asked for fails where it is not.
    batch_invariant : bool
        Whether logits in ragged mode on the CPU are to have the same bits whatever else is in a batch and however a
        text is cut (see docs/huggingface.md). It costs time in float32 where fewer than four tokens are computed.
    cuda_graphs : bool, optional
        Whether decode steps are recorded and replayed as CUDA graphs (see docs/gpu.md), in ragged mode; by default
        where the model is on a CUDA device and Triton is installed. A model that cannot be recorded runs without, and
        the logger says why.
    num_states : int, or callable
        Slots for the states of recurrent, convolution and linear-attention layers: one for each sequence at a time, the
        rest for snapshots of them, by which prefixes are reused. A callable is given the bytes of one. None are made
        where a model has no such layers.
    weights : {"int8"}, optional
        What the weights are quantised to, row by row, after the exam; as they are by default. For the compiled mode,
        and K and V that are not quantised.
    keep_model : bool
        Whether a model that was given keeps its weights where they are, and beside quantised ones. Without, as with one
        of a folder, they move into huge pages if twice as much memory is free. In compiled mode they then belong to the
        runner, in the order in which they are multiplied, or make room for quantised ones, and the model runs no more.

    Returns
    -------
    ModelRunner

    Raises
    ------
    InvalidOperation
        If an argument is out of range, the model has no attention layer, is not causal or has an encoder, no way of
        running it is right, or not the mode that was asked for, or that its weights are to be quantised for, or CUDA
        graphs were asked for and the model is on no CUDA device.
    MissingExtra
        If CUDA graphs were asked for and Triton is not installed.
    """
    require_choice("mode", mode, MODES)
    require_int("block_size", block_size, 1, 2**31 - 1)
    if weights is not None:
        _check_weights(weights, mode)
    keeps_model = require_flag("keep_model", keep_model) and not isinstance(model, (str, PathLike))
    if isinstance(model, (str, PathLike)):
        model = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    if not isinstance(model, PreTrainedModel):
        hint = "AutoModelForCausalLM.from_pretrained(…) makes one"
        raise bad_argument("model", "a folder or a PreTrainedModel", f"{type(model).__name__}", hint)
    if cuda_graphs:
        _require_graphs(model, mode)
    model.train(False)
    if not keeps_model and weights is None:
        move_weights(model)
    paged_layers("model", model.config)  # refuses a model without attention layers, whatever the mode
    # What quantising costs is the caller's choice and no fault of the mode.
    is_quantised = kv_dtype is not None and KvCacheSpec(0, dtype=kv_dtype).is_quantised
    if is_quantised and mode == "compiled":
        raise bad_argument("mode", "another one for quantised keys and values", f"{mode!r}")
    if is_quantised and weights is not None:
        raise bad_argument("kv_dtype", f"one that is not quantised, for weights in {weights}", f"{kv_dtype!r}")
    kept_dtype = None if is_quantised else kv_dtype
    if weights is None:
        may_compile = not is_quantised and not cuda_graphs
        passed = sit_exam(model, mode, block_size, kept_dtype, may_compile=may_compile)
    else:
        passed = _compiled_exam(model, block_size, kept_dtype, weights)
    _warn(model, passed)
    if is_quantised and passed.way.mode == "ragged":
        logger.info("%s runs by its own modules, layer by layer: keys and values are quantised", type(model).__name__)
    proved = passed.runner
    spec = proved.cache.spec
    block_bytes = replace(
        spec, dtype=spec.dtype if kv_dtype is None else dtype_name(kv_dtype), block_size=block_size
    ).block_memory_bytes
    count = num_blocks(block_bytes) if callable(num_blocks) else num_blocks
    cache = ModelKvCache(
        count,
        block_size,
        num_layers=0,
        strategy=strategy,
        prefix_caching=prefix_caching and proved.reuses_prefixes,
        eviction_threshold=eviction_threshold,
        num_states=_checked_states(num_states, proved) if proved.has_states else 0,
        clock=time.monotonic,
    )
    runner = ModelRunner(model, cache, proved.mode, kv_dtype, batch_invariant, passed.way.chunkable)
    runner.follow(proved)
    if cuda_graphs and runner.mode == "gather":
        logger.warning("%s runs without CUDA graphs, as it runs in gather mode", type(model).__name__)
    elif cuda_graphs or (cuda_graphs is None and runner.mode == "ragged" and _has_graphs(model)):
        runner.record_decoding(CudaRecorder(model.device))
    del passed, proved  # which hold on to weights
    takes_weights = runner.mode == "compiled" and not keeps_model
    if takes_weights:
        runner.streams.measure_ahead()
    if weights is not None:
        runner.quantise_weights(keeps_model=keeps_model)
    elif takes_weights:
        runner.pack_weights()
    return runner


def _check_weights(weights: Any, mode: str) -> None:
    if weights not in WEIGHTS:
        hint = f"{likely(weights, WEIGHTS)}"
        raise bad_argument("weights", f"None or {', '.join(map(repr, WEIGHTS))}", shown(weights), hint)
    if mode not in ("auto", "compiled"):
        raise bad_argument("mode", f"'auto' or 'compiled' for weights in {weights}", f"{mode!r}")


def _compiled_exam(model: Any, block_size: int, kv_dtype: Any, weights: str) -> Passed:
    """Sit the exam for the one mode in which weights can be quantised."""
    try:
        return sit_exam(model, "compiled", block_size, kv_dtype)
    except InvalidOperation as error:
        if not error.reason.startswith("mode: "):
            raise
        reason = error.reason.removeprefix("mode: ")
        raise bad_argument("weights", "None", f"{weights!r}, and mode {reason}") from error


def _checked_states(num_states: int | Callable[[int], int], proved: ModelRunner) -> int:
    count = num_states(proved.cache.states.slot_memory_bytes) if callable(num_states) else num_states
    return require_int("num_states", count, 1, 2**31 - 2)


def _require_graphs(model: Any, mode: str) -> None:
    if mode in ("compiled", "gather"):
        raise bad_argument("cuda_graphs", f"False in mode {mode!r}", "True")
    if model.device.type != "cuda":
        raise bad_argument("cuda_graphs", "a model on a CUDA device", f"one on {model.device}")
    if not has_triton():
        raise MissingExtra("triton", "gpu")


def _has_graphs(model: Any) -> bool:
    return model.device.type == "cuda" and has_triton()


def _warn(model: Any, passed: Passed) -> None:
    """Say why a model is not run in the best way."""
    name = type(model).__name__
    for way, reason in passed.reasons.items():
        if way.mode == "compiled":
            logger.info("%s runs by its own modules, layer by layer: %s", name, reason)
        elif way.mode == "ragged":
            logger.warning("%s runs in gather mode, sequence by sequence: %s", name, reason)
        else:
            logger.warning("%s takes prompts whole, never in chunks: %s", name, reason)
