"""The shape of a cache: block counts, head sizes, dtype, layout, and the byte arithmetic that follows from them."""

from __future__ import annotations

from dataclasses import dataclass

from pagedkv.errors import bad_argument
from pagedkv.typing import Dtype, DtypeName, Layout
from pagedkv.validate import likely, require_choice, require_int, shown

MAX_COUNT = 2**31 - 1
"""Block ids travel as int32."""

DTYPE_BYTES: dict[DtypeName, int] = {"float16": 2, "bfloat16": 2, "float32": 4, "int8": 1, "fp8": 1}
"""Bytes of one element of K or V, by dtype."""
_QUANTISED = ("int8", "fp8")
_TORCH_NAMES = {"float8_e4m3fn": "fp8"}
_SHORT_NAMES = {"fp16": "float16", "half": "float16", "bf16": "bfloat16", "fp32": "float32", "float": "float32"}
_SCALE_BYTES = 4
_LAYOUTS: tuple[Layout, ...] = ("NHD", "HND")


def dtype_name(dtype: object) -> DtypeName:
    """Return the name of a dtype of stored K and V; InvalidOperation if it is none."""
    # torch writes its dtypes as "torch.float16"; reading the name keeps torch out of this module.
    name = str(dtype).removeprefix("torch.")
    name = _TORCH_NAMES.get(name, name)
    for known in DTYPE_BYTES:
        if name == known:
            return known
    short = str(getattr(dtype, "__name__", name))
    hint = f"did you mean {_SHORT_NAMES[short]!r}?" if short in _SHORT_NAMES else likely(short, DTYPE_BYTES)
    raise bad_argument("dtype", f"one of {', '.join(DTYPE_BYTES)}", shown(dtype), hint)


@dataclass(frozen=True, init=False)
class LayerSpec:
    """The head shape of one layer.

    Parameters
    ----------
    num_kv_heads : int
        Heads of K and V, at least 1.
    head_dim : int
        Elements of one key head, at least 1.
    v_head_dim : int, optional
        Elements of one value head; ``head_dim`` where it is left out.

    Raises
    ------
    InvalidOperation
        An argument is not an int in its range.
    """

    num_kv_heads: int
    head_dim: int
    v_head_dim: int

    def __init__(self, num_kv_heads: int, head_dim: int, v_head_dim: int | None = None) -> None:
        values = {"num_kv_heads": num_kv_heads, "head_dim": head_dim}
        values["v_head_dim"] = head_dim if v_head_dim is None else v_head_dim
        for name, value in values.items():
            object.__setattr__(self, name, require_int(name, value, 1, MAX_COUNT))

    @property
    def elements_per_token(self) -> int:
        """Elements that one token takes in this layer, K and V together."""
        return self.num_kv_heads * (self.head_dim + self.v_head_dim)


@dataclass(frozen=True, init=False)
class KvCacheSpec:
    """The shape of a paged cache, immutable and equal by value.

    Parameters
    ----------
    num_blocks : int
        Blocks of the pool; 0 is legal.
    block_size : int
        Tokens of a block.
    num_kv_heads, head_dim : int
        Heads of K and V, and elements of one key head.
    num_layers : int
        Layers of that shape; 0 is legal (a storage that grows layer by layer starts there).
    v_head_dim : int, optional
        Elements of one value head; ``head_dim`` where it is left out.
    dtype : str or torch.dtype
        ``"float16"``, ``"bfloat16"``, ``"float32"``, or quantised ``"int8"`` or ``"fp8"`` (float8_e4m3fn); kept as that
        name. Quantised K and V have a float32 scale for each head of each token, and bytes are counted with it.
    layout : str
        ``"NHD"``: a block is ``[block_size, num_kv_heads, head_dim]``; ``"HND"`` swaps the first two.
    layers : sequence of LayerSpec, optional
        One shape per layer, for models whose layers differ. ``num_kv_heads``, ``head_dim`` and ``v_head_dim`` then
        describe the first layer. Layers that turn out equal are kept as ``num_layers`` and None.

    Raises
    ------
    InvalidOperation
        An argument is of the wrong type or out of range; the text names it.

    Examples
    --------
    >>> KvCacheSpec(1024, block_size=16, num_kv_heads=32, head_dim=128).block_memory_bytes
    262144
    """

    num_blocks: int
    block_size: int
    num_kv_heads: int
    head_dim: int
    num_layers: int
    v_head_dim: int
    dtype: DtypeName
    layout: Layout
    layers: tuple[LayerSpec, ...] | None

    def __init__(
        self,
        num_blocks: int,
        block_size: int = 16,
        num_kv_heads: int = 8,
        head_dim: int = 64,
        *,
        num_layers: int = 1,
        v_head_dim: int | None = None,
        dtype: Dtype = "float16",
        layout: Layout = "NHD",
        layers: tuple[LayerSpec, ...] | None = None,
    ) -> None:
        first = LayerSpec(num_kv_heads, head_dim, v_head_dim)
        count = require_int("num_layers", num_layers, 0, MAX_COUNT)
        if layers is not None:
            layers = _checked_layers(layers, count)
            first, count = (layers or (first,))[0], len(layers)
        fields = {
            "num_blocks": require_int("num_blocks", num_blocks, 0, MAX_COUNT),
            "block_size": require_int("block_size", block_size, 1, MAX_COUNT),
            "num_kv_heads": first.num_kv_heads,
            "head_dim": first.head_dim,
            "num_layers": count,
            "v_head_dim": first.v_head_dim,
            "dtype": dtype_name(dtype),
            "layout": require_choice("layout", layout, _LAYOUTS),
            "layers": layers if layers and len(set(layers)) > 1 else None,
        }
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    @property
    def dtype_bytes(self) -> int:
        """Bytes of one element."""
        return DTYPE_BYTES[self.dtype]

    @property
    def layer_specs(self) -> tuple[LayerSpec, ...]:
        """The shape of every layer, ``num_layers`` of them."""
        return self.layers or (LayerSpec(self.num_kv_heads, self.head_dim, self.v_head_dim),) * self.num_layers

    @property
    def is_quantised(self) -> bool:
        """Whether K and V are held as small numbers with a scale for each head of each token."""
        return self.dtype in _QUANTISED

    @property
    def bytes_per_token(self) -> int:
        """Bytes of K and V of one token over all layers, scales included."""
        scale_bytes = 2 * _SCALE_BYTES if self.is_quantised else 0
        head_bytes = (self.head_dim + self.v_head_dim) * self.dtype_bytes + scale_bytes
        if self.layers is None:
            return self.num_layers * self.num_kv_heads * head_bytes
        return sum(
            layer.elements_per_token * self.dtype_bytes + layer.num_kv_heads * scale_bytes for layer in self.layers
        )

    @property
    def block_memory_bytes(self) -> int:
        """Bytes of K and V of one block over all layers."""
        return self.block_size * self.bytes_per_token

    @property
    def total_memory_bytes(self) -> int:
        """Bytes of the whole pool."""
        return self.num_blocks * self.block_memory_bytes

    @property
    def used_memory_bytes(self) -> int:
        """Bytes of the blocks that sequences hold: 0, as a shape has no sequences. A ``PagedKvCache`` has them."""
        return self.memory_bytes(0)

    def memory_bytes(self, num_blocks: int) -> int:
        """Bytes that ``num_blocks`` blocks take over all layers."""
        return require_int("num_blocks", num_blocks, 0, MAX_COUNT) * self.block_memory_bytes

    def block_shape(self, layer: int = 0, *, values: bool = False) -> tuple[int, int, int]:
        """Shape of one block's keys (or values) in a layer, in the order of ``layout``.

        Raises
        ------
        InvalidOperation
            There is no such layer.
        """
        shape = self.layer_specs[require_int("layer", layer, 0, self.num_layers - 1)]
        head_dim = shape.v_head_dim if values else shape.head_dim
        if self.layout == "HND":
            return shape.num_kv_heads, self.block_size, head_dim
        return self.block_size, shape.num_kv_heads, head_dim


def _checked_layers(layers: object, num_layers: int) -> tuple[LayerSpec, ...]:
    if not isinstance(layers, (tuple, list)) or not all(isinstance(layer, LayerSpec) for layer in layers):
        raise bad_argument("layers", "a tuple of LayerSpec", f"{layers!r}")
    if num_layers not in (1, len(layers)):
        raise bad_argument("num_layers", f"{len(layers)}, the number of layers given", f"{num_layers}")
    return tuple(layers)
