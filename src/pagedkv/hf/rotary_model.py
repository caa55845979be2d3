"""A transformers model whose attention is ours for single forward passes, and whose positions were measured."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pagedkv.errors import InvalidOperation
from pagedkv.hf.compat import AttentionInterface, attention_by
from pagedkv.hf.rope import Rope, rope_of

__all__ = ["Attender", "LayerCall", "RotaryModel"]

ATTENTION = "pagedkv_streaming"
"""Our attention function, and the keyword argument that carries the `Attender`. transformers makes no mask for it."""

WITHOUT_EFFECT = frozenset({"position_ids", "use_cache", "is_causal", "output_attentions", "cache_position"})
"""Keyword arguments that change nothing in causal attention over a cache."""


class LayerCall(NamedTuple):
    """What one attention layer asks for: tensors [batch, heads, queries, head_dim], its scale and its options."""

    layer: int
    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    sliding_window: int | None
    softcap: float | None


class Attender(Protocol):
    """Serves every attention layer of one forward pass."""

    def attend(self, call: LayerCall) -> Tensor:
        """Return Tensor [batch, queries, heads, v_head_dim]."""


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float, **kwargs: Any
) -> tuple[Tensor, None]:
    attender: Attender | None = kwargs.pop(ATTENTION, None)
    if attender is None:
        raise InvalidOperation(f"attention {ATTENTION!r} works inside of a StreamingSession only")
    call = LayerCall(
        module.layer_idx, query, key, value, scaling, kwargs.pop("sliding_window", None), kwargs.pop("softcap", None)
    )
    kwargs["attention_mask"] = attention_mask
    unknown = sorted(
        name for name, given in kwargs.items() if name not in WITHOUT_EFFECT and _asks_for_something(given)
    )
    if unknown:
        raise InvalidOperation(f"model expects plain attention, got {', '.join(unknown)} in {type(module).__name__}")
    return attender.attend(call), None


def _asks_for_something(argument: Any) -> bool:
    return isinstance(argument, Tensor) or bool(argument)


AttentionInterface.register(ATTENTION, _attention)


class _Probe:
    """Notes the keys of lone tokens. A token that sees itself alone gets its own value, whatever its position."""

    def __init__(self) -> None:
        self.calls: list[LayerCall] = []

    def attend(self, call: LayerCall) -> Tensor:
        if call.layer != len(self.calls):
            raise InvalidOperation(f"model expects layers that run in order, got {call.layer} for {len(self.calls)}")
        self.calls.append(call)
        group = call.query.shape[1] // call.value.shape[1]
        return call.value.repeat_interleave(group, 1).transpose(1, 2)


class RotaryModel:
    """A causal language model with rotary positions.

    What the model does with positions is measured, not guessed from its name: the hidden states of a lone token do not
    depend on where it stands, so its keys at two positions show, layer by layer, how they are turned.

    Parameters
    ----------
    model : PreTrainedModel
        In eval mode.
    num_visible : int
        Tokens that a query will see at most, itself included.
    last_position : int
        The highest position that will be used.

    Attributes
    ----------
    rope : Rope
    num_layers, num_kv_heads, head_dim, v_head_dim, vocab_size : int

    Raises
    ------
    InvalidOperation
        If the model cannot be served: no rotary positions, or others than ``Rope`` describes; layers of differing
        shapes; a sliding window shorter than `num_visible`; attention that is not plain.
    """

    def __init__(self, model: PreTrainedModel, num_visible: int, last_position: int) -> None:
        if not isinstance(model, PreTrainedModel):
            raise InvalidOperation(f"model expects a PreTrainedModel of transformers, got {type(model).__name__}")
        if model.training:
            raise InvalidOperation("model expects eval mode, call model.eval() first")
        self._model = model
        rope_of(model)
        self.vocab_size = int(model.get_input_embeddings().num_embeddings)  # type: ignore[arg-type]
        near = self._probe(0)
        # Read in between: frequencies that change with the length are those of short texts now, and were not before
        # if the model had a long one.
        self.rope: Rope = rope_of(model)
        far = self._probe(last_position)
        self.num_layers = len(far)
        self._check_layers(far, num_visible)
        for before, after in zip(near, far, strict=True):
            self._check_turn(before, after, last_position)
        self.num_kv_heads, self.head_dim = int(far[0].key.shape[1]), int(far[0].key.shape[3])
        self.v_head_dim = int(far[0].value.shape[3])

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self._model.dtype

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return self._model.device

    def run(self, attender: Attender, ids: Tensor, positions: Tensor, logits_to_keep: int = 0) -> Tensor:
        """Run the model with `attender` in all layers.

        Parameters
        ----------
        attender : Attender
        ids, positions : int64 Tensor [batch, n]
        logits_to_keep : int
            Only the logits of the last so many tokens; 0 for all.

        Returns
        -------
        Tensor [batch, n or logits_to_keep, vocab_size]
        """
        with attention_by(ATTENTION, self._model.config):
            output = self._model(
                input_ids=ids,
                position_ids=positions,
                use_cache=False,
                logits_to_keep=logits_to_keep,
                **{ATTENTION: attender},
            )
        logits: Tensor = output.logits
        return logits

    @torch.inference_mode()
    def _probe(self, position: int) -> list[LayerCall]:
        probe = _Probe()
        ids = torch.arange(min(8, self.vocab_size), device=self.device)[:, None]
        self.run(probe, ids, torch.full_like(ids, position))
        return probe.calls

    def _check_layers(self, calls: list[LayerCall], num_visible: int) -> None:
        expected = self._model.config.get_text_config().num_hidden_layers
        if len(calls) != expected:
            raise InvalidOperation(f"model expects {expected} layers with replaceable attention, got {len(calls)}")
        shapes = {(*call.key.shape[1:], call.value.shape[3]) for call in calls}
        if len(shapes) > 1:
            raise InvalidOperation(f"model expects layers of one shape, got {sorted(shapes)}")
        shortest = min((call.sliding_window for call in calls if call.sliding_window is not None), default=num_visible)
        if shortest < num_visible:
            raise InvalidOperation(
                f"window_tokens expects sinks, window and the token itself, {num_visible}, to fit into the model's own "
                f"sliding window, got {shortest}"
            )

    def _check_turn(self, near: LayerCall, far: LayerCall, distance: int) -> None:
        key, expected = near.key.transpose(1, 2), far.key.transpose(1, 2).float()
        # Several times what rounding does to angles and elements, and far below what another convention gives.
        tolerance = 0.01 if self.dtype == torch.float32 else 0.05
        fits = 2 * len(self.rope.inv_freq) <= key.shape[-1]
        if fits:
            error = self.rope.turn(key, torch.tensor([distance])) - expected
            fits = float(error.norm()) <= tolerance * float(expected.norm())
        if not fits:
            raise InvalidOperation(
                f"model expects rotary positions that turn the halves of a head against each other, got other keys in "
                f"layer {near.layer} of {type(self._model).__name__}"
            )
