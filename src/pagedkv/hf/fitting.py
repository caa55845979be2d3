"""Which of the usual rules a module follows, found out by numbers: norms, activations, rotary positions, factors.

A rule is right if it gives what the module gave; names of classes are never asked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pagedkv.data.decoder import Linear, Mlp, Norm, Rope
from pagedkv.hf.tracing import Call

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""How far one operation may be from its rule, in relation to its size: rounding, and nothing of another rule."""


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Return how far numbers are from others in relation to their size; infinity if they are not comparable."""
    if got.numel() != expected.numel():
        return math.inf
    got, expected = got.float().reshape(-1), expected.float().reshape(-1)
    distance, size = float((got - expected).norm()), float(expected.norm())
    error = distance / size if size else (math.inf if distance else 0.0)
    return math.inf if math.isnan(error) else error


# Factors


def numbers_of(config: Any, dtype: torch.dtype) -> list[float]:
    """Return what a model may multiply by: 1, and the numbers of its config, as they stand and rounded to a dtype."""
    given = [float(value) for value in vars(config).values() if type(value) in (int, float) and 1e-6 < value < 1e6]
    given += [1 / value for value in given] + [config.hidden_size**0.5]
    rounded = [float(torch.tensor(value).to(dtype)) for value in given]
    return [1.0, *given, *(value for value in rounded if math.isfinite(value) and value)]


def fit_factor(states: Tensor, target: Tensor, numbers: list[float], rest: Tensor | None = None) -> tuple[float, float]:
    """Return the factor for which ``factor * states + rest`` is `target`, and how far it is from that.

    It is one of some numbers if one will do. Every element counts alike, whatever its size: a few of them may be so
    large that in a sum of squares nothing else shows.
    """
    right = target.float().reshape(-1)
    base = torch.zeros_like(right) if rest is None else rest.float().reshape(-1)
    unit = right.abs() + base.abs()
    unit += 1e-6 * unit.mean() + 1e-30
    scaled, wanted = states.float().reshape(-1) / unit, (right - base) / unit
    measured = float(wanted.double() @ scaled.double() / scaled.double().square().sum().clamp(min=1e-300))

    def error(factor: float) -> float:
        made = (states.float() * factor).to(states.dtype).float().reshape(-1) / unit
        return float((made - wanted).square().mean().sqrt())

    near = [1.0, *(number for number in numbers if abs(number - measured) <= 0.1 * abs(measured))]
    best = min(near, key=error)
    if error(best) > min(TOLERANCE[target.dtype] / 4, 2 * error(measured) + 1e-6):
        best = measured
    return best, error(best)


# Norms


def fit_norm(module: nn.Module, width: int, dtype: torch.dtype) -> Norm | None:
    """Return the norm over rows of a width that a module is, if it is one.

    It is asked about small numbers, too, where what is added to the variance shows.
    """
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    dtype = dtype if weight is None else weight.dtype
    if any(each is not None and each.shape != (width,) for each in (weight, bias)):
        return None
    names = ("variance_epsilon", "eps", "epsilon", "norm_eps")
    said = [float(getattr(module, name)) for name in names if getattr(module, name, None) is not None]
    rows = torch.randn(2, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    rows[1] *= 1e-3
    rows += rows.abs().mean(1, keepdim=True) / 2  # the mean is not zero
    try:
        with torch.no_grad():
            right = module(rows)
    except Exception:  # it takes something else
        return None
    if not isinstance(right, Tensor):
        return None
    scale = torch.ones(width, dtype=torch.float32) if weight is None else weight.detach().float()
    offset = None if bias is None else bias.detach().float()
    found = [
        Norm(w, offset, eps, centred)
        for eps in said or (1e-5, 1e-6, 1e-12, torch.finfo(dtype).eps)
        for w in (scale, 1 + scale)
        for centred in (False, True)
    ]
    best = min(found, key=lambda norm: relative_error(normalised(norm, rows), right))
    if any(relative_error(normalised(best, rows)[row], right[row]) > TOLERANCE[dtype] for row in range(2)):
        return None
    return best


def normalised(norm: Norm, states: Tensor) -> Tensor:
    """Return rows as a norm makes them, in float32."""
    x = states.float()
    if norm.is_centred:
        x = x - x.mean(-1, keepdim=True)
    x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.eps)
    x = x if norm.weight is None else x * norm.weight
    return x if norm.bias is None else x + norm.bias


# Activations

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}


def activated(name: str, up: Tensor, gate: Tensor | None) -> Tensor:
    """Return what a pair of factors of an MLP comes to, or one alone, in float32."""
    up = up.float()
    if gate is None:
        return ACTIVATIONS[name](up)
    gate = gate.float()
    if name == "swiglu_oai":
        gate = gate.clamp(max=7.0)
        return gate * torch.sigmoid(1.702 * gate) * (up.clamp(-7.0, 7.0) + 1)
    return ACTIVATIONS[name](gate) * up


def known_activations(modules: Iterable[nn.Module]) -> list[str]:
    """Return the activations that some modules are, in float32, where the like of gelu can be told apart; else all."""
    grid = torch.tensor([*range(-48, 49), -400, -120, 120, 400], dtype=torch.float32) / 8
    names = []
    for module in modules:
        try:
            with torch.no_grad():
                got = module(grid)
        except Exception:  # no function of numbers
            continue
        if isinstance(got, Tensor) and got.shape == grid.shape:
            names += [name for name, rule in ACTIVATIONS.items() if torch.allclose(got, rule(grid), 1e-5, 1e-5)]
    return names or [*ACTIVATIONS, "swiglu_oai"]


@dataclass(frozen=True, slots=True)
class Halves:
    """How the rows of `up` and of `gate` lie in those of one weight."""

    up: slice
    gate: slice | None = None


def halves(num_rows: int, intermediate_size: int) -> list[Halves]:
    """Return how the factors of an MLP may lie in so many rows: one alone, side by side, or in turns."""
    if num_rows == intermediate_size:
        return [Halves(slice(None))]
    if num_rows != 2 * intermediate_size:
        return []
    first, second = slice(0, intermediate_size), slice(intermediate_size, None)
    even, odd = slice(0, None, 2), slice(1, None, 2)
    return [Halves(second, first), Halves(first, second), Halves(odd, even), Halves(even, odd)]


def ways_to_activate(rows: Halves, names: Iterable[str]) -> Iterator[str]:
    """Yield the activations that there may be with or without a gate."""
    return (name for name in names if rows.gate is not None or name != "swiglu_oai")


# Mixtures of experts


@dataclass(frozen=True, slots=True, eq=False)
class Stack:
    """The weights of all experts in two tensors, an expert's rows one after the other in each.

    Attributes
    ----------
    ups : Tensor [num_experts, num_rows, hidden_size]
        Of `up`, or of `up` and `gate`; without memory of its own if it stands transposed in the module.
    downs : Tensor [num_experts, hidden_size, intermediate_size]
    up_bias : Tensor [num_experts, num_rows], optional
    down_bias : Tensor [num_experts, hidden_size], optional
    """

    ups: Tensor
    downs: Tensor
    up_bias: Tensor | None
    down_bias: Tensor | None

    def mlp(self, number: int, rows: Halves, activation: str) -> Mlp:
        """Return one expert."""

        def part(weight: Tensor, bias: Tensor | None, rows: slice) -> Linear:
            return Linear(weight[number, rows], None if bias is None else bias[number, rows])

        gate = None if rows.gate is None else part(self.ups, self.up_bias, rows.gate)
        up, down = part(self.ups, self.up_bias, rows.up), part(self.downs, self.down_bias, slice(None))
        return Mlp(up, down, gate, activation)


def stacks_of(module: nn.Module, hidden_size: int) -> list[Stack]:
    """Return the ways in which the weights of all experts may stand in a module; none if it holds something else."""
    held = dict(module.named_parameters())
    up = next((name for name in ("gate_up_proj", "up_proj") if name in held), "")
    names = {up, "down_proj", f"{up}_bias", "down_proj_bias"}
    if not up or "down_proj" not in held or not held.keys() <= names:
        return []
    biases = [
        None if bias is None else bias.detach().float() for bias in map(held.get, (f"{up}_bias", "down_proj_bias"))
    ]
    weights = held[up].detach(), held["down_proj"].detach()
    if any(weight.dim() != 3 for weight in weights):
        return []
    turned = weights[0].transpose(1, 2), weights[1].transpose(1, 2)
    return [
        Stack(ups, downs, *biases) for ups, downs in (weights, turned) if ups.shape[2] == hidden_size == downs.shape[1]
    ]


def fit_experts(call: Call, names: list[str]) -> tuple[Stack, Halves, str] | None:
    """Return how the experts of a module stand in it and what they compute, if that is known.

    They are asked about large numbers, too, where factors that are cut off show.
    """
    hidden, module = call.input, call.module
    chosen = next((each for each in call.given if torch.is_tensor(each) and not each.is_floating_point()), None)
    stacks = [] if hidden is None else stacks_of(module, hidden.shape[-1])
    if not stacks or hidden is None or chosen is None:
        return None
    num_experts, top_k = len(stacks[0].ups), chosen.shape[-1]
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(2, hidden.shape[-1], generator=generator)
    states[1] *= 20 / max(float((stack.ups[-1].float() @ states[1]).square().mean().sqrt()) for stack in stacks)
    states = states.to(hidden.dtype)
    index = torch.stack([torch.arange(top_k), num_experts - 1 - torch.arange(top_k)])
    weights = torch.zeros(2, top_k, dtype=torch.float32)
    weights[:, 0] = 0.75  # the others count for nothing: two experts are enough

    def renewed(each: Any) -> Any:
        if not torch.is_tensor(each):
            return each
        return (
            states if each is hidden else weights.to(each.dtype) if each.is_floating_point() else index.to(each.dtype)
        )

    right = module(*map(renewed, call.args), **{name: renewed(each) for name, each in call.kwargs.items()})
    best, least = None, TOLERANCE[hidden.dtype]
    for stack in stacks:
        experts = [stack.mlp(number, Halves(slice(None)), "") for number in (0, num_experts - 1)]
        factors = [_product(mlp.up, row) for mlp, row in zip(experts, states, strict=True)]
        downs = [Linear(mlp.down.weight.float(), mlp.down.bias) for mlp in experts]
        for rows in halves(stack.ups.shape[1], stack.downs.shape[2]):
            for name in ways_to_activate(rows, names):
                made = [
                    _product(down, activated(name, each[rows.up], None if rows.gate is None else each[rows.gate]))
                    for down, each in zip(downs, factors, strict=True)
                ]
                error = max(relative_error(0.75 * got, want) for got, want in zip(made, right, strict=True))
                if error < least:
                    best, least = (stack, rows, name), error
    return best


def _product(linear: Linear, states: Tensor) -> Tensor:
    """Return what a linear layer makes of some states, in float32."""
    return F.linear(states.float(), linear.weight.float(), linear.bias)


def fit_router(logits: Tensor, chosen: Tensor, weights: Tensor, tolerance: float) -> bool | None:
    """Return whether the weights of the chosen experts add up to 1; None if they are no part of a softmax.

    Parameters
    ----------
    logits : Tensor [num_tokens, num_experts]
    chosen : int64 Tensor [num_tokens, top_k]
    weights : Tensor [num_tokens, top_k]
    tolerance : float
        How far they may be off, in relation to their size.
    """
    picked = logits.float().gather(1, chosen)
    greatest = logits.float().topk(chosen.shape[1]).values
    if relative_error(picked.sort(descending=True).values, greatest) > tolerance:
        return None
    shares = logits.float().softmax(-1).gather(1, chosen)
    for is_renormalised, right in ((True, picked.softmax(-1)), (False, shares)):
        if relative_error(weights, right) <= tolerance:
            return is_renormalised
    return None


# Rotary positions


@dataclass(slots=True, eq=False)
class Turn:
    """One way to turn heads: a rope, and its tables at the positions of a trace, ``[num_tokens, width / 2]``."""

    rope: Rope
    cos: Tensor
    sin: Tensor

    def __call__(self, heads: Tensor) -> Tensor:
        """Turn ``[num_tokens, num_heads, head_dim]``, in float32."""
        width, x = self.rope.width, heads.float()
        one, two = self._pair(x[..., :width])
        cos, sin = self.cos[:, None], self.sin[:, None]
        turned = one * cos - two * sin, two * cos + one * sin
        joined = torch.stack(turned, -1).flatten(-2) if self.rope.is_interleaved else torch.cat(turned, -1)
        return torch.cat((joined, x[..., width:]), -1)

    def _pair(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.rope.is_interleaved:
            return x[..., ::2], x[..., 1::2]
        first, second = x.chunk(2, -1)
        return first, second


def turns_of(call: Call, positions: Tensor) -> list[Turn]:
    """Return the ways to turn heads by the cosines and sines that a module returns, if it returns some."""
    raw = _raw_tables(call, positions)
    if raw is None:
        return []
    turns = []
    width = raw[0].shape[-1]
    middle, full = slice(0, width // 2), slice(None)
    shapes: list[tuple[slice, int]] = []
    if width % 2 == 0 and all(torch.equal(*each.chunk(2, -1)) for each in raw):
        shapes.append((middle, width))
    if width % 2 == 0 and all(torch.equal(each[:, ::2], each[:, 1::2]) for each in raw):
        shapes.append((slice(0, None, 2), width))
    shapes.append((full, 2 * width))
    for columns, size in shapes:
        tables = _tables(call, columns)
        turns += [
            Turn(Rope(tables, size, interleaved), raw[0][:, columns], raw[1][:, columns])
            for interleaved in (False, True)
        ]
    return turns


def _tables(call: Call, columns: slice) -> Callable[[int], tuple[Tensor, Tensor]]:
    def tables(num_positions: int) -> tuple[Tensor, Tensor]:
        with torch.device("cpu"):  # whatever the default is
            found = _raw_tables(call, torch.arange(num_positions))
        assert found is not None
        return found[0][:, columns].contiguous(), found[1][:, columns].contiguous()

    return tables


def _raw_tables(call: Call, positions: Tensor) -> tuple[Tensor, Tensor] | None:
    """Ask a rotary module anew, in float32, for other positions."""
    returned = call.returned
    if torch.is_tensor(returned) and not returned.is_complex() or any(True for _ in call.module.parameters()):
        return None
    if not torch.is_tensor(returned) and not (isinstance(returned, tuple) and len(returned) == 2):
        return None

    def renewed(given: Any) -> Any:
        if not isinstance(given, Tensor):
            return given
        return torch.zeros(1, 1, 1, dtype=torch.float32) if given.is_floating_point() else positions[None]

    args, kwargs = map(renewed, call.args), {name: renewed(given) for name, given in call.kwargs.items()}
    with torch.no_grad():
        got = call.module(*args, **kwargs)
    pair = (got.real, got.imag) if torch.is_tensor(got) else got
    if not all(torch.is_tensor(each) and each.dim() >= 2 and each.is_floating_point() for each in pair):
        return None
    cos, sin = (each.reshape(-1, each.shape[-1]).float() for each in pair)
    return (cos, sin) if cos.shape == sin.shape and len(cos) == len(positions) else None
