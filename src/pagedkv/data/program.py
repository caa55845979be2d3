"""Program: a decoder as a list of operations over the weights, the activations and the pool, phase by phase."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pagedkv.data import forward_kernels as kernels
from pagedkv.data.cpu import LOG2_E, NO_WINDOW, flat_bits
from pagedkv.data.cpu_plan import Shape
from pagedkv.data.decoder import Attention, Decoder, Experts, Layer, Linear, Mlp, Norm, Rope
from pagedkv.data.forward_kernels import ACTIVATIONS, OPERATION
from pagedkv.data.forward_products import ADDED, TO_FLOATS, columns_of_item
from pagedkv.data.simd_llvm import LANES
from pagedkv.data.simd_products import unit_of
from pagedkv.data.storage import KvStorage
from pagedkv.data.weights import num_packed
from pagedkv.errors import InvalidOperation
from pagedkv.spec import MAX_COUNT

Floats = npt.NDArray[np.float32]


def _round_up(size: int) -> int:
    return -(-size // LANES) * LANES


@dataclass(frozen=True, slots=True)
class _Buffer:
    """Rows of activations: where row 0 begins, and how far apart rows are, in elements."""

    start: int
    width: int


class _Arena:
    """Room for buffers of `rows` rows in one flat array."""

    def __init__(self, rows: int) -> None:
        self._rows, self.size = rows, 0

    def buffer(self, width: int, rows: int | None = None) -> _Buffer:
        """Return room for rows that begin and end at whole vectors."""
        buffer = _Buffer(self.size, _round_up(width))
        self.size += (self._rows if rows is None else rows) * buffer.width
        return buffer


class _Constants:
    """Small float32 vectors, one after the other, each followed by zeros to a whole vector."""

    def __init__(self) -> None:
        self._parts: list[Floats] = []
        self._size = 0

    def place(self, vector: Tensor | None) -> int:
        """Return where a vector begins; -1 for none."""
        if vector is None:
            return -1
        start, numbers = self._size, vector.detach().float().flatten().numpy()
        self._parts.append(np.pad(numbers, (0, _round_up(len(numbers)) - len(numbers))))
        self._size += len(self._parts[-1])
        return start

    def array(self) -> Floats:
        """Return all of them."""
        return np.concatenate([*self._parts, np.zeros(LANES, np.float32)])


class Program:
    """The operations of a decoder, phase by phase.

    Parameters
    ----------
    decoder : Decoder
    storage : KvStorage
        Whose layers are those of the decoder, in their order.
    max_rows : int
    act_bytes : int
        Of each number that is multiplied.
    """

    def __init__(self, decoder: Decoder, storage: KvStorage, max_rows: int, act_bytes: int) -> None:
        self.decoder, self.storage, self.max_rows, self._act_bytes = decoder, storage, max_rows, act_bytes
        self.weights = flat_bits(decoder.embedding)
        self._base = decoder.embedding
        self.memory = flat_bits(storage.keys(0))
        self._memory_base = storage.keys(0)
        self._constants = _Constants()
        self._floats, self._acts = _Arena(max_rows), _Arena(max_rows)
        self._operations: list[dict[str, Any]] = []
        self._phases: list[int] = []
        self._places: list[int] = []
        self.ropes: list[Rope] = []
        self.rope_operations: list[tuple[int, int]] = []  # operation, place in `ropes`
        self.sets: list[tuple[Shape, int]] = []  # shape and window of layers that attend to the same
        self.picked_set: int | None = None  # that of a last layer in which only picked rows attend: its own comes last
        self._build()
        self.constants = self._constants.array()
        self.places = np.array(self._places, np.int64)
        self.num_floats, self.num_acts = self._floats.size, self._acts.size
        table = decoder.positions
        self.num_positions = MAX_COUNT if table is None else len(table) - decoder.position_offset
        self.phases = np.array([*self._phases, len(self._operations)])
        self.operations = np.zeros(len(self._operations), OPERATION)
        for record, fields in zip(self.operations, self._operations, strict=True):
            for name, given in fields.items():
                record[name] = given

    def _build(self) -> None:
        decoder, hidden = self.decoder, self.decoder.embedding.shape[1]
        self._x = self._floats.buffer(hidden)
        self._h, self._parallel_h = self._acts.buffer(hidden), self._acts.buffer(hidden)
        self._post = self._floats.buffer(hidden)
        attentions = [layer.attention for layer in decoder.layers]
        self._heads = self._floats.buffer(max(map(_heads_size, attentions)))
        self._attended = self._acts.buffer(max(each.num_q_heads * each.v_head_dim for each in attentions))
        inner = max((len(layer.mlp.up.weight) for layer in decoder.layers if isinstance(layer.mlp, Mlp)), default=0)
        self._inner = self._acts.buffer(inner)
        mixtures = [layer.mlp for layer in decoder.layers if isinstance(layer.mlp, Experts)]
        self.most_experts = max((len(each.experts) for each in mixtures), default=0)
        self.most_pairs = self.max_rows * max((each.top_k for each in mixtures), default=0)
        inner = max((len(each.experts[0].up.weight) for each in mixtures), default=0)
        self._routed = self._floats.buffer(self.most_experts)
        self._pair_inner = self._acts.buffer(inner, self.most_pairs)
        self._pair_out = self._floats.buffer(hidden, self.most_pairs)
        self._rows = kernels.ALL
        self._embed()
        for number, layer in enumerate(decoder.layers):
            self._layer(number, layer)
        is_gathered = self._rows == kernels.PICKED
        self._rows = kernels.PICKED
        self._norm(decoder.norm, self._x, self._h, picked=not is_gathered)
        vocabulary = len(decoder.head.weight)
        self._phase()
        logits = _Buffer(-1, vocabulary)
        self._linear(decoder.head, self._h, logits, scale=decoder.logit_scale)
        if decoder.logit_softcap is not None:
            self._phase()
            self._add(kernels.CAP, logits, logits, size_out=vocabulary, softcap=decoder.logit_softcap)
        self._phase()
        known = min(vocabulary, len(decoder.embedding))
        self._add(kernels.NEXT, logits, logits, size_out=known, set=len(self.sets))

    # --- operations ----------------------------------------------------------------------------------------------

    def _phase(self) -> None:
        self._phases.append(len(self._operations))

    def _add(self, code: int, source: _Buffer, target: _Buffer, **fields: Any) -> None:
        absent = dict.fromkeys(("bias", "factor", "query_norm", "key_norm", "rope", "sinks", "learned"), -1)
        places = {"source": source.start, "source_width": source.width}
        places |= {"target": target.start, "target_width": target.width, "rows": self._rows}
        self._operations.append(absent | {"code": code, "scale": 1.0} | places | fields)

    def _place_of(self, weight: Tensor) -> int:
        """Return where a weight begins, in elements from the first of the embedding."""
        if weight.dtype != self._base.dtype or weight.stride(1) != 1:
            raise InvalidOperation(f"weights of {self._base.dtype} and of {weight.dtype}")
        apart = weight.data_ptr() - self._base.data_ptr()
        if apart % weight.element_size():
            raise InvalidOperation("weights that are not aligned to their elements")
        return apart // weight.element_size()

    def _embed(self) -> None:
        decoder = self.decoder
        self._phase()
        self._add(
            kernels.EMBED,
            self._x,
            self._x,
            weight=0,
            row_stride=decoder.embedding.stride(0),
            packed=num_packed(decoder.embedding, decoder.embedding_is_packed),
            unit=unit_of(self._act_bytes, decoder.embedding.dtype == torch.int8),
            size_out=decoder.embedding.shape[1],
            scale=decoder.embedding_scale,
            factor=self._constants.place(decoder.embedding_row_scale),
            learned=self._constants.place(decoder.positions),
            position_offset=decoder.position_offset,
        )
        if decoder.embedding_norm is not None:
            self._norm(decoder.embedding_norm, self._x, self._x, goes=TO_FLOATS)

    def _norm(
        self, norm: Norm | None, source: _Buffer, target: _Buffer, *, picked: bool = False, **fields: Any
    ) -> None:
        """Add a phase that normalises rows; without a norm they are handed on."""
        self._phase()
        given = {}
        if norm is not None:
            places = {"factor": self._constants.place(norm.weight), "bias": self._constants.place(norm.bias)}
            given = {"function": 1, "eps": norm.eps, "is_centred": norm.is_centred} | places
        size = self.decoder.embedding.shape[1]
        self._add(kernels.NORM, source, target, size_out=size, picked=picked, **given | fields)

    def _linear(self, linear: Linear, source: _Buffer, target: _Buffer, at: int = 0, **fields: Any) -> None:
        """Add a product to the phase; its outputs go to the elements from `at` on."""
        size_out, size_in = linear.weight.shape
        is_activated, has_gate = bool(fields.get("is_activated")), bool(fields.get("has_gate"))
        self._add(
            source=source,
            target=_Buffer(target.start + at, target.width),
            size_in=size_in,
            size_out=size_out,
            weight=self._place_of(linear.weight),
            row_stride=linear.weight.stride(0),
            bias=self._constants.place(linear.bias),
            factor=self._constants.place(linear.scale),
            packed=num_packed(linear.weight, linear.is_packed),
            columns=columns_of_item(size_out, size_in * linear.weight.element_size(), is_activated, has_gate),
            **{"code": kernels.LINEAR, "goes": TO_FLOATS} | fields,
        )

    def _layer(self, number: int, layer: Layer) -> None:
        self._norm(layer.attention_norm, self._x, self._h)
        mlp_input = self._h
        self._attention(number, layer.attention)
        if layer.is_parallel and layer.mlp_norm is not None:
            mlp_input = self._parallel_h
            self._norm(layer.mlp_norm, self._x, mlp_input)
        if number == len(self.decoder.layers) - 1 and not layer.is_parallel and isinstance(layer.mlp, Mlp):
            self._gather(layer.attention)
        self._residual(layer.attention.output, self._attended, layer.attention_post_norm, layer.residual_scale)
        if not layer.is_parallel:
            self._norm(layer.mlp_norm, self._x, self._h)
        if isinstance(layer.mlp, Experts):
            self._experts(layer, layer.mlp, mlp_input)
            return
        self._mlp(layer.mlp, mlp_input)
        self._residual(layer.mlp.down, self._inner, layer.mlp_post_norm, layer.residual_scale)

    def _gather(self, attention: Attention) -> None:
        """Go on with the rows whose logits are wanted: the last layer writes K and V of the others, and no more."""
        attend = self._operations[-1]
        self.picked_set, attend["set"] = attend["set"], len(self.sets)
        self._phase()
        fields = {"size_in": self.decoder.embedding.shape[1], "size_out": attention.num_q_heads * attention.v_head_dim}
        self._add(kernels.GATHER, self._x, self._attended, **fields)
        self._rows = kernels.PICKED

    def _experts(self, layer: Layer, mixture: Experts, source: _Buffer) -> None:
        experts, first = mixture.experts, mixture.experts[0]
        hidden = self.decoder.embedding.shape[1]
        known: dict[str, Any] = {"num_experts": len(experts), "top_k": mixture.top_k}
        pairs = {"rows": kernels.PAIRS, **known}
        self._phase()
        self._linear(mixture.router, source, self._routed)
        self._phase()
        self._add(kernels.ROUTE, self._routed, self._routed, is_renormalised=mixture.is_renormalised, **known)
        self._phase()
        ups, gates = [mlp.up for mlp in experts], [mlp.gate for mlp in experts if mlp.gate is not None]
        fields = _activation(first) | self._starts(gates, "gates", "gate_biases", "gate_factors")
        _require_alike([*ups, *gates])
        self._expert_linear(ups, source, self._pair_inner, by_pair=1, **pairs, **fields)
        self._phase()
        self._expert_linear([mlp.down for mlp in experts], self._pair_inner, self._pair_out, **pairs)
        self._phase()
        if layer.mlp_post_norm is None:
            known |= {"goes": ADDED, "scale": layer.residual_scale}
            self._add(kernels.COMBINE, self._pair_out, self._x, size_out=hidden, **known)
        else:
            self._add(kernels.COMBINE, self._pair_out, self._post, size_out=hidden, goes=TO_FLOATS, **known)
            self._norm(layer.mlp_post_norm, self._post, self._x, goes=ADDED, scale=layer.residual_scale)

    def _expert_linear(self, linears: list[Linear], source: _Buffer, target: _Buffer, **fields: Any) -> None:
        """Add the products of all experts, each with the rows of its pairs."""
        _require_alike(linears)
        starts = self._starts(linears, "weights", "biases", "factors")
        shape = replace(linears[0], bias=None, scale=None)  # which are found by expert
        self._linear(shape, source, target, **{"code": kernels.EXPERTS} | starts | fields)

    def _starts(self, linears: list[Linear], *names: str) -> dict[str, int]:
        """Note where the weights, biases and scales of experts are; return where each of the three lists begins."""
        lists = (
            [self._place_of(each.weight) for each in linears],
            [self._constants.place(each.bias) for each in linears],
            [self._constants.place(each.scale) for each in linears],
        )
        starts = {}
        for name, places in zip(names, lists, strict=True):
            starts[name] = len(self._places)
            self._places += places
        return starts

    def _residual(self, linear: Linear, source: _Buffer, post_norm: Norm | None, scale: float) -> None:
        self._phase()
        if post_norm is None:
            self._linear(linear, source, self._x, goes=ADDED, scale=scale)
        else:
            self._linear(linear, source, self._post)
            self._norm(post_norm, self._post, self._x, goes=ADDED, scale=scale)

    def _attention(self, number: int, attention: Attention) -> None:
        dim, v_dim, num_kv_heads = attention.head_dim, attention.v_head_dim, attention.num_kv_heads
        query_size = attention.num_q_heads * dim
        value_at = query_size + num_kv_heads * dim
        self._phase()
        self._linear(attention.query, self._h, self._heads)
        self._linear(attention.key, self._h, self._heads, query_size)
        self._linear(attention.value, self._h, self._heads, value_at)
        keys, values = (_by_token(self.storage, side(number)) for side in (self.storage.keys, self.storage.values))
        sizes = {"num_kv_heads": num_kv_heads, "head_dim": dim, "v_head_dim": v_dim}
        places = {"num_q_heads": attention.num_q_heads} | sizes
        for name, side, size in (("key", keys, dim), ("value", values, v_dim)):
            if side.shape[2:] != (num_kv_heads, size):
                raise InvalidOperation(f"{name}s of shape {[num_kv_heads, size]} in blocks of {list(side.shape[2:])}")
            if side.dtype != self._memory_base.dtype:
                raise InvalidOperation("layers of several dtypes of K and V")
            places[f"{name}_base"] = (side.data_ptr() - self._memory_base.data_ptr()) // side.element_size()
            strides = zip((f"{name}_block", name, f"{name}_head"), side.stride()[:3], strict=True)
            places |= dict(strides)
        self._phase()
        if attention.rope is not None:
            if attention.rope not in self.ropes:
                self.ropes.append(attention.rope)
            self.rope_operations.append((len(self._operations), self.ropes.index(attention.rope)))
        self._add(kernels.HEADS, self._heads, self._heads, **places, **self._head_norms(attention), **_turns(attention))
        self._phase()
        softcap, scale = attention.softcap, attention.scale
        self._add(
            kernels.ATTEND,
            self._heads,
            self._attended,
            **places,
            scale=scale * LOG2_E if softcap is None else scale / softcap,
            softcap=0.0 if softcap is None else softcap * LOG2_E,
            sinks=max(0, self._constants.place(None if attention.sinks is None else attention.sinks.float() * LOG2_E)),
            num_sinks=0 if attention.sinks is None else attention.num_q_heads,
            layer=number,
            window=attention.window or NO_WINDOW,
            set=self._set_of(attention),
        )

    def _head_norms(self, attention: Attention) -> dict[str, Any]:
        norms = [norm for norm in (attention.query_norm, attention.key_norm) if norm is not None]
        if not norms:
            return {}
        if any(norm.weight is None for norm in norms):
            raise InvalidOperation("norms of queries or keys without a weight")
        sizes = {len(norm.weight) for norm in norms if norm.weight is not None}
        if len({(norm.eps, norm.is_centred) for norm in norms}) > 1:
            raise InvalidOperation("norms of queries and keys that differ")
        query, key = attention.query_norm, attention.key_norm
        return {
            "query_norm": -1 if query is None else self._constants.place(query.weight),
            "query_bias": -1 if query is None else self._constants.place(query.bias),
            "key_norm": -1 if key is None else self._constants.place(key.weight),
            "key_bias": -1 if key is None else self._constants.place(key.bias),
            "eps": norms[0].eps,
            "is_centred": norms[0].is_centred,
            "norm_size": attention.head_dim if sizes == {attention.head_dim} else 0,
        }

    def _set_of(self, attention: Attention) -> int:
        dim, v_dim = attention.head_dim, attention.v_head_dim
        group = attention.num_q_heads // attention.num_kv_heads
        item_bytes = self._memory_base.element_size()
        block_size = self.storage.spec.block_size
        shape = Shape(block_size, attention.num_kv_heads, group, dim, v_dim, item_bytes)
        kind = (shape, attention.window or NO_WINDOW)
        if kind not in self.sets:
            self.sets.append(kind)
        return self.sets.index(kind)

    def _mlp(self, mlp: Mlp, source: _Buffer) -> None:
        self._phase()
        self._linear(mlp.up, source, self._inner, **_activation(mlp), **self._gate(mlp))

    def _gate(self, mlp: Mlp) -> dict[str, int]:
        gate = mlp.gate
        if gate is None:
            return {}
        _require_alike([mlp.up, gate])
        places = self._place_of(gate.weight), self._constants.place(gate.bias), self._constants.place(gate.scale)
        return dict(zip(("gate", "gate_bias", "gate_factor"), places, strict=True))


def _activation(mlp: Mlp) -> dict[str, int]:
    """Return what a product needs whose outputs are activated."""
    return {"is_activated": 1, "function": ACTIVATIONS.index(mlp.activation), "has_gate": int(mlp.gate is not None)}


def _require_alike(linears: list[Linear]) -> None:
    if len({(each.weight.shape, each.weight.stride(), each.is_packed) for each in linears}) > 1:
        raise InvalidOperation("weights of one operation that have several shapes")


def _heads_size(attention: Attention) -> int:
    dim, v_dim = attention.head_dim, attention.v_head_dim
    return attention.num_q_heads * dim + attention.num_kv_heads * (dim + v_dim)


def _turns(attention: Attention) -> dict[str, Any]:
    rope = attention.rope
    if rope is None:
        return {}
    return {"rope": 0, "rope_width": rope.width, "is_interleaved": rope.is_interleaved}


def _by_token(storage: KvStorage, blocks: Tensor) -> Tensor:
    """Return ``[num_blocks, block_size, num_kv_heads, dim]`` whatever the layout."""
    return blocks.transpose(1, 2) if storage.spec.layout == "HND" else blocks
