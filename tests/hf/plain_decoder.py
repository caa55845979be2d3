"""A decoder run from its description, written out in plain torch, float32, without a cache: slow, to compare with."""

from __future__ import annotations

import torch
from torch import Tensor

from pagedkv.data.decoder import Attention, Decoder, Experts, Linear, Mlp, Norm, Rope


def logits_of(decoder: Decoder, token_ids: Tensor) -> Tensor:
    """Return the logits ``[n, vocab_size]`` of one text."""
    n = len(token_ids)
    x = decoder.embedding[token_ids].float() * decoder.embedding_scale
    if decoder.positions is not None:
        x = x + decoder.positions[torch.arange(n) + decoder.position_offset].float()
    x = norm(decoder.embedding_norm, x)
    for layer in decoder.layers:
        read = norm(layer.attention_norm, x)
        attended = norm(layer.attention_post_norm, attention(layer.attention, read))
        if layer.is_parallel:
            read = read if layer.mlp_norm is None else norm(layer.mlp_norm, x)
            x = x + layer.residual_scale * attended
        else:
            x = x + layer.residual_scale * attended
            read = norm(layer.mlp_norm, x)
        x = x + layer.residual_scale * norm(layer.mlp_post_norm, feed_forward(layer.mlp, read))
    logits = linear(decoder.head, norm(decoder.norm, x)) * decoder.logit_scale
    if decoder.logit_softcap is not None:
        logits = decoder.logit_softcap * torch.tanh(logits / decoder.logit_softcap)
    return logits


def linear(one: Linear, x: Tensor) -> Tensor:
    y = x @ one.weight.float().T
    return y if one.bias is None else y + one.bias


def norm(one: Norm | None, x: Tensor) -> Tensor:
    if one is None:
        return x
    if one.is_centred:
        x = x - x.mean(-1, keepdim=True)
    x = x / (x.pow(2).mean(-1, keepdim=True) + one.eps).sqrt()
    x = x if one.weight is None else x * one.weight
    return x if one.bias is None else x + one.bias


def head_norm(one: Norm | None, heads: Tensor) -> Tensor:
    """Normalise ``[n, num_heads, head_dim]``, each head or all of a token at once, as the weight is long."""
    if one is None or one.weight is None or len(one.weight) == heads.shape[-1]:
        return norm(one, heads)
    return norm(one, heads.flatten(1)).view(heads.shape)


def turn(rope: Rope | None, heads: Tensor) -> Tensor:
    """Turn ``[n, num_heads, head_dim]`` by the positions 0 … n - 1."""
    if rope is None:
        return heads
    cos, sin = rope.tables(len(heads))
    assert cos.shape == sin.shape == (len(heads), rope.width // 2) and cos.dtype == sin.dtype == torch.float32
    turned = heads.clone()
    for i in range(rope.width // 2):
        a, b = (2 * i, 2 * i + 1) if rope.is_interleaved else (i, i + rope.width // 2)
        turned[..., a] = heads[..., a] * cos[:, None, i] - heads[..., b] * sin[:, None, i]
        turned[..., b] = heads[..., b] * cos[:, None, i] + heads[..., a] * sin[:, None, i]
    return turned


def attention(one: Attention, x: Tensor) -> Tensor:
    n = len(x)
    q = turn(one.rope, head_norm(one.query_norm, linear(one.query, x).view(n, one.num_q_heads, one.head_dim)))
    k = turn(one.rope, head_norm(one.key_norm, linear(one.key, x).view(n, one.num_kv_heads, one.head_dim)))
    v = linear(one.value, x).view(n, one.num_kv_heads, one.v_head_dim)
    distance = torch.arange(n)[:, None] - torch.arange(n)
    is_seen = (distance >= 0) & (distance < (n if one.window is None else one.window))
    out = torch.empty(n, one.num_q_heads, one.v_head_dim)
    for head in range(one.num_q_heads):
        group = head // (one.num_q_heads // one.num_kv_heads)
        scores = q[:, head] @ k[:, group].T * one.scale
        if one.softcap is not None:
            scores = one.softcap * torch.tanh(scores / one.softcap)
        weights = scores.masked_fill(~is_seen, -torch.inf)
        if one.sinks is not None:
            weights = torch.cat([weights, one.sinks[head].expand(n, 1)], dim=1)
        weights = (weights - weights.amax(1, keepdim=True)).exp()
        weights = weights / weights.sum(1, keepdim=True)
        out[:, head] = weights[:, :n] @ v[:, group]
    return linear(one.output, out.flatten(1))


def feed_forward(one: Mlp | Experts, x: Tensor) -> Tensor:
    if isinstance(one, Mlp):
        return mlp(one, x)
    chances = torch.softmax(linear(one.router, x), dim=-1)
    out = torch.zeros_like(x)
    for row, chance in enumerate(chances):
        chosen = chance.topk(one.top_k).indices.tolist()
        total = chance[chosen].sum() if one.is_renormalised else 1.0
        for expert in chosen:
            out[row] += chance[expert] / total * mlp(one.experts[expert], x[row])
    return out


def mlp(one: Mlp, x: Tensor) -> Tensor:
    up = linear(one.up, x)
    if one.gate is None:
        return linear(one.down, activation(one.activation, up))
    gate = linear(one.gate, x)
    if one.activation == "swiglu_oai":
        gate = gate.clamp(max=7)
        return linear(one.down, (up.clamp(-7, 7) + 1) * gate * torch.sigmoid(1.702 * gate))
    return linear(one.down, activation(one.activation, gate) * up)


def activation(name: str, x: Tensor) -> Tensor:
    match name:
        case "silu":
            return x * torch.sigmoid(x)
        case "gelu":
            return x * 0.5 * (1 + torch.erf(x / 2**0.5))
        case "gelu_tanh":
            return x * 0.5 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))
        case "quick_gelu":
            return x * torch.sigmoid(1.702 * x)
        case "relu":
            return x.clamp(min=0)
        case "relu2":
            return x.clamp(min=0) ** 2
    raise ValueError(name)
