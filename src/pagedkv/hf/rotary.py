"""Rotary positions inside the cache: keys of streaming sequences that move after they were written."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedModel

from pagedkv.cache import PagedKvCache
from pagedkv.control.arguments import sequence_number
from pagedkv.control.plan import BatchPlan
from pagedkv.errors import InvalidOperation, bad_argument
from pagedkv.hf.compat import AttentionInterface, attention_by
from pagedkv.hf.pool import ModelKvCache, visible_slots
from pagedkv.typing import Dtype

# Rope: the rotation itself, outside of the model.


@dataclass(frozen=True, eq=False)
class Rope:
    """The frequencies with which a model turns its queries and keys.

    Pair ``i`` of a head is elements ``i`` and ``i + r / 2`` of its first ``r`` elements (the "rotate half" convention);
    elements from ``r`` on are not turned. Turning keeps lengths, so a factor that the model puts on its cosines and
    sines (``attention_scaling``) stays in the keys as it is, and nothing here needs to know it.

    Source: Su et al. 2021, "RoFormer", section 3.2.2.

    Attributes
    ----------
    inv_freq : float64 Tensor [r / 2]
        Radians per position, on the CPU.
    """

    inv_freq: Tensor

    def turn(self, keys: Tensor, steps: Tensor) -> Tensor:
        """Move keys by whole positions, backwards where negative.

        Angles are taken in float64, so a long way costs no accuracy.

        Parameters
        ----------
        keys : Tensor [..., n, num_kv_heads, head_dim]
        steps : int64 Tensor [n]

        Returns
        -------
        float32 Tensor [..., n, num_kv_heads, head_dim]
        """
        angles = steps.to(torch.float64)[:, None, None] * self.inv_freq
        cos, sin = angles.cos().to(keys.device, torch.float32), angles.sin().to(keys.device, torch.float32)
        half = len(self.inv_freq)
        keys = keys.float()
        first, second, rest = keys[..., :half], keys[..., half : 2 * half], keys[..., 2 * half :]
        return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), -1)


def rope_of(model: Any) -> Rope:
    """Read the frequencies of a transformers model.

    Raises
    ------
    InvalidOperation
        If the model does not have exactly one rotary embedding: it has other positions, or differing ones.
    """
    found = [module for name, module in model.named_modules() if name.rpartition(".")[2] == "rotary_emb"]
    if len(found) != 1 or not isinstance(getattr(found[0], "inv_freq", None), Tensor):
        raise InvalidOperation(
            f"model: expected one rotary embedding for all layers, got {len(found)} in {type(model).__name__}"
            if len(found) != 1
            else f"model: expected a rotary embedding with one inv_freq, got {type(found[0]).__name__}"
        )
    return Rope(found[0].inv_freq.detach().to("cpu", torch.float64, copy=True))


# Streamed keys: rotary positions count inside the cache.
#
# Source: Xiao et al. 2023, "Efficient Streaming Language Models with Attention Sinks". Attention under RoPE depends
# on distances only. So the window's keys stay as they were written, and only the few sinks move to where the window
# now begins: their keys are kept unrotated in float32 and turned afresh from there, so no error builds up, however
# coarse the dtype of the blocks is. What that dtype costs when a sink is first written is in the kept keys for good.

HALF_REBASE_AT = 4096  # angles are good to 0.0002 radians there, cosines in bfloat16 to 0.002

Ints = npt.NDArray[np.int64]


def rebase_limit(sink_tokens: int, window_tokens: int, dtype: Dtype | None) -> int:
    """Return the position that streaming with sinks and window should stay below.

    It is the least for float32, where small positions mean exact angles, else higher, as each key that is turned back
    is rounded anew.
    """
    least = sink_tokens + 2 * window_tokens + 1
    return least if "float32" in str(dtype) else max(HALF_REBASE_AT, least)


@dataclass(slots=True)
class _Stream:
    """The unrotated keys of the sinks [layers, sinks, heads, head_dim], and where things stand."""

    sinks: Tensor
    base: int = 0  # how many dropped tokens rotary positions leave out
    offset: int = -1  # of the sinks' positions; -1 before they are placed


class StreamedKeys:
    """Puts the keys of streaming sequences where the next forward pass must find them.

    Parameters
    ----------
    cache : PagedKvCache
        The blocks of a sink may belong to one sequence only, as its keys change.
    rope : Rope
    limit : callable
        Given the sink and the window tokens of a sequence, the position that it should stay below.
    """

    def __init__(self, cache: PagedKvCache, rope: Rope, limit: Callable[[int, int], int]) -> None:
        self._cache, self._rope, self._limit = cache, rope, limit
        self._streams: dict[int, _Stream] = {}

    def base(self, seq_id: int) -> int:
        """Return how many dropped tokens the rotary positions of a sequence leave out."""
        stream = self._streams.get(seq_id)
        return 0 if stream is None else stream.base

    def forget(self, seq_id: int) -> None:
        """Forget a sequence."""
        self._streams.pop(seq_id, None)

    def prepare(self, plan: BatchPlan) -> Ints:
        """Move keys for the forward pass of a plan.

        Returns
        -------
        int64 [total_tokens]
            The rotary position of each query token.
        """
        streaming = np.flatnonzero(plan.num_dropped)
        positions = plan.text_positions
        moved = []
        for i in streaming.tolist():
            first, last = plan.cu_seqlens_q[i : i + 2].tolist()
            if first == last:
                continue
            slots = visible_slots(plan, self._cache.block_size, slice(i, i + 1))
            stream, is_moved = self._turn(plan, i, slots, int(positions[last - 1]), last - first)
            positions[first:last] -= stream.base
            if is_moved and stream.sinks.shape[1]:
                moved.append((stream, slots[: stream.sinks.shape[1]]))
        if moved:
            self._place(moved)
        return positions

    def _turn(self, plan: BatchPlan, i: int, slots: Ints, last: int, num_new: int) -> tuple[_Stream, bool]:
        """Return the stream of a sequence, rebased if it is time, and whether its sinks have to move."""
        seq_id, dropped, num_sinks = int(plan.seq_ids[i]), int(plan.num_dropped[i]), int(plan.holes[i, 0])
        stream = self._streams.get(seq_id)
        if stream is None:
            # Its first drop: the sinks still stand at their own positions.
            keys = self._rope.turn(self._read(slots[:num_sinks]), -torch.arange(num_sinks))
            stream = self._streams[seq_id] = _Stream(keys)
        num_held = len(slots) - num_new
        if last - stream.base >= self._limit(num_sinks, num_held - num_sinks):
            self._rebase(stream, dropped, slots[num_sinks:num_held])
        before, stream.offset = stream.offset, dropped - stream.base
        return stream, before != stream.offset

    def _rebase(self, stream: _Stream, dropped: int, window: Ints) -> None:
        """Start again from small positions.

        A model takes angles in float32, and position times frequency is off by up to 2⁻²⁴ of itself: 0.0002 radians at
        position 4096, 0.06 at a million. So positions must not grow with the text. When they reach the limit, all of
        the window's keys are turned back by one angle, taken in float64. A key lives for ``window_tokens`` tokens and
        rebases are further apart than that, so it is turned back at most once.
        """
        steps = torch.full((len(window),), stream.base - dropped)
        self._write(self._rope.turn(self._read(window), steps), window)
        stream.base = dropped

    def _place(self, moved: list[tuple[_Stream, Ints]]) -> None:
        """Turn sinks to where their windows begin: each dropped token has moved it one further."""
        steps = [torch.arange(stream.sinks.shape[1]) + stream.offset for stream, _ in moved]
        keys = self._rope.turn(torch.cat([stream.sinks for stream, _ in moved], 1), torch.cat(steps))
        self._write(keys, np.concatenate([slots for _, slots in moved]))

    def _read(self, slots: Ints) -> Tensor:
        storage = self._cache.storage
        index = storage.slot_index(slots)
        return torch.stack([storage.gather(layer, index)[0] for layer in range(storage.num_layers)])

    def _write(self, keys: Tensor, slots: Ints) -> None:
        index = self._cache.storage.slot_index(slots)
        for layer, layer_keys in enumerate(keys):
            self._cache.storage.write_keys(layer, layer_keys, index)


# Measuring: what a model does with positions is not guessed from its name.

ATTENTION = "pagedkv_streaming"
"""The attention function that measures, and the keyword argument that carries its notes. transformers makes no mask."""

WITHOUT_EFFECT = frozenset({"position_ids", "use_cache", "is_causal", "output_attentions", "cache_position"})
"""Keyword arguments that change nothing in causal attention over a cache."""


class LayerCall(NamedTuple):
    """What one attention layer asks for when every token is alone: K and V [batch, heads, 1, dim], and its window."""

    key: Tensor
    value: Tensor
    sliding_window: int | None


def _note_call(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float, **kwargs: Any
) -> tuple[Tensor, None]:
    """Note the keys of lone tokens. A token that sees itself alone gets its own value, whatever its position."""
    calls: list[LayerCall] | None = kwargs.pop(ATTENTION, None)
    if calls is None:
        wanted = "inside of a StreamingSession only, and for models that hand keyword arguments on to their attention"
        raise InvalidOperation(f"attention {ATTENTION!r} works {wanted}, got none in {type(module).__name__}")
    if module.layer_idx != len(calls):
        raise bad_argument("model", "layers that run in order", f"{module.layer_idx} for {len(calls)}")
    calls.append(LayerCall(key, value, kwargs.pop("sliding_window", None)))
    kwargs.pop("softcap", None)
    kwargs["attention_mask"] = attention_mask
    unknown = sorted(
        name for name, given in kwargs.items() if name not in WITHOUT_EFFECT and _asks_for_something(given)
    )
    if unknown:
        raise bad_argument("model", "plain attention", f"{', '.join(unknown)} in {type(module).__name__}")
    return value.repeat_interleave(query.shape[1] // value.shape[1], 1).transpose(1, 2), None


def _asks_for_something(argument: Any) -> bool:
    return isinstance(argument, Tensor) or bool(argument)


AttentionInterface.register(ATTENTION, _note_call)


def measured_rope(model: Any, num_visible: int, last_position: int) -> Rope:
    """Return the frequencies of a causal language model, after proving on its keys that it turns them so.

    The hidden states of a lone token do not depend on where it stands, so its keys at two positions show, layer by
    layer, how they are turned.

    Parameters
    ----------
    model : PreTrainedModel
        In eval mode.
    num_visible : int
        Tokens that a query will see at most, itself included.
    last_position : int
        The highest position that will be used.

    Raises
    ------
    InvalidOperation
        If the model cannot stream: no rotary positions, or others than ``Rope`` describes; layers of differing shapes;
        a sliding window shorter than `num_visible`; attention that is not plain.
    """
    if not isinstance(model, PreTrainedModel):
        raise bad_argument("model", "a PreTrainedModel of transformers", type(model).__name__)
    if model.training:
        raise bad_argument("model", "eval mode, call model.eval() first")
    rope_of(model)
    near = _lone_tokens(model, 0)
    # Read in between: frequencies that change with the length are those of short texts now, and were not before if
    # the model had a long one.
    rope = rope_of(model)
    far = _lone_tokens(model, last_position)
    _check_layers(model, far, num_visible)
    for layer, (before, after) in enumerate(zip(near, far, strict=True)):
        if not _turns(rope, before.key, after.key, last_position):
            raise bad_argument(
                "model",
                "rotary positions that turn the halves of a head against each other",
                f"other keys in layer {layer} of {type(model).__name__}",
            )
    return rope


@torch.inference_mode()
def _lone_tokens(model: Any, position: int) -> list[LayerCall]:
    """Run a few tokens, each as a text of its own at `position`."""
    calls: list[LayerCall] = []
    ids = torch.arange(min(8, model.get_input_embeddings().num_embeddings), device=model.device)[:, None]
    with attention_by(ATTENTION, model.config):
        model(input_ids=ids, position_ids=torch.full_like(ids, position), use_cache=False, **{ATTENTION: calls})
    return calls


def _check_layers(model: Any, calls: list[LayerCall], num_visible: int) -> None:
    expected = model.config.get_text_config().num_hidden_layers
    if len(calls) != expected:
        raise bad_argument("model", f"{expected} layers with replaceable attention", f"{len(calls)}")
    shapes = {(*call.key.shape[1:], call.value.shape[3]) for call in calls}
    if len(shapes) > 1:
        raise bad_argument("model", "layers of one shape", f"{sorted(shapes)}")
    shortest = min((call.sliding_window for call in calls if call.sliding_window is not None), default=num_visible)
    if shortest < num_visible:
        raise bad_argument(
            "window_tokens",
            f"sinks, window and the token itself, {num_visible}, to fit into the model's own sliding window",
            f"{shortest}",
        )


def _turns(rope: Rope, near: Tensor, far: Tensor, distance: int) -> bool:
    """Tell whether `rope` turns the keys at position 0 into those at `distance`."""
    if 2 * len(rope.inv_freq) > near.shape[-1]:
        return False
    # Several times what rounding does to angles and elements, and far below what another convention gives.
    tolerance = 0.01 if near.dtype == torch.float32 else 0.05
    expected = far.transpose(1, 2).float()
    error = rope.turn(near.transpose(1, 2), torch.tensor([distance])) - expected
    return float(error.norm()) <= tolerance * float(expected.norm())


# The streaming sequences of a ModelRunner.


class RunnerStreams:
    """Sequences that ``cache.apply_streaming_llm()`` has cut, among others that are whole.

    Parameters
    ----------
    model : PreTrainedModel
        It is measured before the first sequence streams: see :func:`measured_rope`.
    cache : ModelKvCache

    Attributes
    ----------
    keys : StreamedKeys or None
        None before the model was measured.
    """

    def __init__(self, model: Any, cache: ModelKvCache) -> None:
        self._model, self._cache = model, cache
        self.keys: StreamedKeys | None = None
        self._dropped: dict[int, int] = {}  # of sequences whose blocks were looked at
        self._most_visible = 0  # tokens, for which the model was measured

    def positions(self, plan: BatchPlan) -> Ints:
        """Move keys for the forward pass of a plan and return the rotary position of each query token.

        Raises
        ------
        InvalidOperation
            If the model cannot stream, or the blocks of a sequence are not its own.
        """
        for i in np.flatnonzero(plan.num_dropped).tolist():
            self._check(plan, i)
        assert self.keys is not None  # made by the check of a first sequence
        return self.keys.prepare(plan)

    def refuse_fork(self, src: int) -> None:
        """Refuse to share keys that move."""
        if src in self._dropped:
            raise bad_argument("src", "a sequence that has not dropped tokens", f"S{sequence_number(src)}")

    def release(self, seq_id: int) -> None:
        """Forget a sequence."""
        if self._dropped.pop(seq_id, None) is not None and self.keys is not None:
            self.keys.forget(seq_id)

    def _check(self, plan: BatchPlan, i: int) -> None:
        seq_id, dropped = int(plan.seq_ids[i]), int(plan.num_dropped[i])
        if dropped < self._dropped.get(seq_id, 0):  # another sequence of the same id
            self.release(seq_id)
        if seq_id not in self._dropped:
            used = -(-int(plan.seq_lens[i] + plan.holes[i, 1] - plan.holes[i, 0]) // self._cache.block_size)
            if not self._cache.are_private(plan.block_tables[i, :used].astype(np.int64)):
                raise bad_argument(
                    "plan",
                    f"S{sequence_number(seq_id)}, which streams, to share no block and to have none in the "
                    "prefix index, as its keys move: allocate it by a count of tokens, and do not fork it",
                )
        self.measure(int(plan.holes[i, 0]), int(plan.seq_lens[i]))
        self._dropped[seq_id] = dropped

    def measure(self, num_sinks: int, num_visible: int) -> None:
        """Measure the model's rotary positions for queries that see so many tokens, themselves included.

        Raises
        ------
        InvalidOperation
            If the model cannot stream.
        """
        if num_visible > self._most_visible:
            self.follow(
                measured_rope(self._model, num_visible, self._limit(num_sinks, num_visible - num_sinks)), num_visible
            )

    def measure_ahead(self) -> None:
        """Measure the model for whatever may stream, as it will not run later; where it cannot, that is said then."""
        window = getattr(self._model.config.get_text_config(decoder=True), "sliding_window", None)
        for num_visible in (2**22, window):
            if num_visible and self.keys is None:
                with contextlib.suppress(InvalidOperation):
                    self.follow(measured_rope(self._model, num_visible, HALF_REBASE_AT), num_visible)

    def follow(self, rope: Rope, num_visible: int, rebase_at: int | None = None) -> None:
        """Take what was measured already, and where positions are to start again if that is not the usual place."""
        if self.keys is None:
            self.keys = StreamedKeys(self._cache, rope, self._limit if rebase_at is None else lambda *_: rebase_at)
        self._most_visible = num_visible

    def _limit(self, num_sinks: int, num_window: int) -> int:
        return rebase_limit(num_sinks, num_window, self._cache.storage.dtype)
