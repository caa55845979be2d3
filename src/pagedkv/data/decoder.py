"""What a decoder-only transformer is made of: weights, and the rules of its forward pass, whatever model they are of.

A description holds the tensors of the model itself wherever they lie row by row as they are needed, so it takes no
memory of its own; what has another order (a transposed weight, interleaved heads) is a copy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Linear:
    """``y = scale * (x @ weight.T) + bias``.

    Attributes
    ----------
    weight : Tensor [num_out, num_in]
        float32, bfloat16 or float16, or int8 with a scale; the elements of a row side by side, rows at any distance.
    bias : float32 Tensor [num_out], optional
    scale : float32 Tensor [num_out], optional
    is_packed : bool
        Whether the memory of the weight holds panels, as :func:`pagedkv.data.weights.packed` leaves it.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: Tensor | None = None
    is_packed: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Norm:
    """RMSNorm (Zhang & Sennrich, 2019), or LayerNorm (Ba et al., 2016) where it is centred.

    Attributes
    ----------
    weight : float32 Tensor [dim], optional
        What the normalised elements are multiplied by, as it stands: a model that adds 1 to it has done so here.
    bias : float32 Tensor [dim], optional
    eps : float
    is_centred : bool
        Whether the mean is taken off first.
    """

    weight: Tensor | None
    bias: Tensor | None = None
    eps: float = 1e-6
    is_centred: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Rope:
    """Rotary positions (Su et al., 2021).

    Attributes
    ----------
    tables : callable
        Given n, returns cosines and sines of the positions 0 … n - 1, float32 ``[n, width / 2]`` each, whatever they
        are scaled by included.
    width : int
        The leading elements of a head that are turned.
    is_interleaved : bool
        Whether element 2i is turned against 2i + 1; else i against i + width / 2.
    """

    tables: Callable[[int], tuple[Tensor, Tensor]]
    width: int
    is_interleaved: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Attention:
    """Grouped-query attention (Ainslie et al., 2023).

    Attributes
    ----------
    query, key, value, output : Linear
        Heads one after the other in the rows of the first three, and in the columns of the last.
    num_q_heads, num_kv_heads, head_dim, v_head_dim : int
    scale : float
        Of the scores.
    query_norm, key_norm : Norm, optional
        Over each head where their weight has `head_dim` elements, else over all heads of a token at once; before the
        rotary positions.
    rope : Rope, optional
        The same object in all layers that turn by the same tables.
    window : int, optional
        How many tokens a token sees, itself included.
    softcap : float, optional
    sinks : float32 Tensor [num_q_heads], optional
        A logit of each head that takes its share of the softmax and has no value.
    """

    query: Linear
    key: Linear
    value: Linear
    output: Linear
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    scale: float
    query_norm: Norm | None = None
    key_norm: Norm | None = None
    rope: Rope | None = None
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Mlp:
    """``down(act(gate(x)) * up(x))``, or ``down(act(up(x)))`` without a gate.

    Attributes
    ----------
    up, down : Linear
    gate : Linear, optional
    activation : {"silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "relu2", "swiglu_oai"}
        ``relu2`` is the square of relu. ``swiglu_oai`` is that of GPT-OSS, gated: the gate is cut off above 7 and
        multiplied by sigmoid(1.702 gate), the other factor is cut to -7 … 7, plus 1.
    """

    up: Linear
    down: Linear
    gate: Linear | None = None
    activation: str = "silu"


@dataclass(frozen=True, slots=True, eq=False)
class Experts:
    """A mixture of experts: each token goes through the `top_k` of the greatest softmax of ``router(x)``.

    Attributes
    ----------
    router : Linear
    experts : list of Mlp
        All of one shape and activation.
    top_k : int
    is_renormalised : bool
        Whether the weights of the chosen experts are divided by their sum.
    """

    router: Linear
    experts: list[Mlp]
    top_k: int
    is_renormalised: bool = True


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """One layer: ``x += scale * post(attention(norm(x)))``, then ``x += scale * post(mlp(norm(x)))``.

    Attributes
    ----------
    attention : Attention
    mlp : Mlp or Experts
    attention_norm, mlp_norm : Norm, optional
        Before attention, and before the MLP.
    attention_post_norm, mlp_post_norm : Norm, optional
        Over what they return, before it is added.
    is_parallel : bool
        Whether the MLP reads what attention reads, before anything is added: through `mlp_norm` if there is one, else
        through `attention_norm`.
    residual_scale : float
    """

    attention: Attention
    mlp: Mlp | Experts
    attention_norm: Norm | None = None
    mlp_norm: Norm | None = None
    attention_post_norm: Norm | None = None
    mlp_post_norm: Norm | None = None
    is_parallel: bool = False
    residual_scale: float = 1.0


@dataclass(frozen=True, slots=True, eq=False)
class Decoder:
    """A whole model, from token ids to logits.

    Attributes
    ----------
    embedding : Tensor [vocab_size, hidden_size]
        May be the weight of `head`.
    embedding_row_scale : float32 Tensor [vocab_size], optional
        What the rows of an int8 embedding are multiplied by.
    layers : list of Layer
    head : Linear
    norm, embedding_norm : Norm, optional
        After the last layer; after the embedding.
    embedding_is_packed : bool
        As that of a `Linear`.
    embedding_scale : float
        What embeddings are multiplied by.
    positions : Tensor [n, hidden_size], optional
        Learned positions that are added to the embeddings; that of position p stands at ``p + position_offset``.
    position_offset : int
    logit_scale : float
        What logits are multiplied by.
    logit_softcap : float, optional
        Applied after that.
    """

    embedding: Tensor
    layers: list[Layer] = field(repr=False)
    head: Linear
    norm: Norm | None = None
    embedding_norm: Norm | None = None
    embedding_row_scale: Tensor | None = None
    embedding_is_packed: bool = False
    embedding_scale: float = 1.0
    positions: Tensor | None = None
    position_offset: int = 0
    logit_scale: float = 1.0
    logit_softcap: float | None = None
