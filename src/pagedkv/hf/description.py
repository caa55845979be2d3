"""Reads a model of transformers into the description of a decoder: its weights in place, and the rules between them.

A model is run once on a few tokens. What reads what, and by which rule, follows from the tensors that went between its
modules: each step of the description has to give the numbers that the model gave, or there is no description. Names of
classes are asked only whether a weight is a plain one. Whatever the model holds and the description has no use for is a
reason to refuse: it may matter elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from itertools import permutations
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from pagedkv.data.decoder import Attention, Decoder, Experts, Layer, Linear, Mlp, Norm
from pagedkv.errors import InvalidOperation, bad_argument
from pagedkv.hf.compat import Conv1D, has_changing_rope, is_hooked, longest_text
from pagedkv.hf.fitting import (
    TOLERANCE,
    Halves,
    Turn,
    activated,
    fit_experts,
    fit_factor,
    fit_norm,
    fit_router,
    halves,
    known_activations,
    numbers_of,
    relative_error,
    turns_of,
    ways_to_activate,
)
from pagedkv.hf.tracing import AttentionCall, Call, Trace, same, trace


def describe(model: Any) -> Decoder:
    """Return what a model of transformers is made of.

    The tensors are those of the model wherever its weights lie row by row; see `copied_bytes`.

    Parameters
    ----------
    model : PreTrainedModel
        A causal language model on the CPU in eval mode, in float32, bfloat16 or float16.

    Returns
    -------
    Decoder

    Raises
    ------
    InvalidOperation
        If it does anything that the description has no words for; says what.
    """
    _require_plain_model(model)
    try:
        with torch.no_grad(), torch.device("cpu"):
            return _Reader(model).decoder()
    except MemoryError:
        raise
    except Exception as error:  # whatever a model's own code does with a few tokens
        if getattr(error, "argument", None) == "model":
            raise
        reason = str(error) if isinstance(error, InvalidOperation) else repr(error)
        raise _refusal(f"one that cannot be traced: {reason}") from error


def _parts(description: Any) -> Iterator[Any]:
    """Yield a description and all that it is made of."""
    yield description
    names = [one.name for one in fields(description)] if is_dataclass(description) else []
    inner = description if isinstance(description, list) else [getattr(description, name) for name in names]
    for each in inner:
        yield from _parts(each)


def tensors_of(description: Any) -> Iterator[Tensor]:
    """Yield every tensor of a description, or of a part of one."""
    return (part for part in _parts(description) if isinstance(part, Tensor))


def state_of(model: nn.Module, decoder: Decoder) -> tuple[Any, ...]:
    """Return what a description of a model depends on: where tensors lie, and the values of those read elsewhere."""
    try:
        _require_plain_model(model)
    except InvalidOperation as refusal:
        return (str(refusal),)
    matrices = [decoder.embedding, *(part.weight for part in _parts(decoder) if isinstance(part, Linear))]
    in_place, digest, places = {each.untyped_storage().data_ptr() for each in matrices}, xxhash.xxh3_128(), list[Any]()
    for name, tensor in (*model.named_parameters(remove_duplicate=False), *model.named_buffers()):
        places.append((name, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype))
        if tensor.untyped_storage().data_ptr() not in in_place:
            digest.update(tensor.detach().reshape(-1).contiguous().view(torch.uint8).numpy().data)
    return *places, digest.digest()


def copied_bytes(decoder: Decoder, model: nn.Module) -> int:
    """Return how many bytes of a description are not the memory of the model."""
    own = {each.untyped_storage().data_ptr() for each in (*model.parameters(), *model.buffers())}
    found = {each.data_ptr(): each.nbytes() for each in map(Tensor.untyped_storage, tensors_of(decoder))}
    return sum(size for place, size in found.items() if place not in own)


def _refusal(reason: str) -> InvalidOperation:
    return bad_argument("model", "a decoder of the usual pattern", reason)


def _require_plain_model(model: Any) -> None:
    """Refuse a model whose modules are not what they seem, or that is not at rest on the CPU."""
    config = model.config.get_text_config(decoder=True)
    if getattr(model, "hf_quantizer", None) is not None or getattr(config, "quantization_config", None) is not None:
        raise _refusal("one with quantised weights")
    if getattr(config, "is_encoder_decoder", False) or getattr(config, "add_cross_attention", False):
        raise _refusal("one with cross attention")
    if has_changing_rope(model.config):
        raise _refusal("one whose rotary frequencies change with the length of a text")
    if "mrope_section" in (getattr(config, "rope_parameters", None) or {}):
        raise _refusal("one with positions on several axes")
    if getattr(config, "clip_qkv", None) is not None:
        raise _refusal("one that clips queries, keys and values")
    for name, module in model.named_modules():
        what = f"{name or type(model).__name__}, a {type(module).__name__}"
        if module.training:
            raise _refusal(f"{what} in training mode: call model.eval()")
        if is_hooked(module):
            raise _refusal(f"{what} with hooks or a forward() of its own")
        if hasattr(module, "parametrizations"):
            raise _refusal(f"{what} with parametrised weights")
    for name, parameter in model.named_parameters():
        if parameter.device.type != "cpu" or parameter.dtype not in TOLERANCE:
            raise _refusal(f"{name} of {parameter.dtype} on {parameter.device}")


@dataclass(slots=True, eq=False)
class _Branch:
    """Attention, or an MLP: what it is, what it reads, and what it returns."""

    part: Any
    input: Tensor
    output: Tensor


class _Reader:
    """One reading of one model."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._config = model.config.get_text_config(decoder=True)
        self._names = {id(module): name for name, module in model.named_modules()}
        self._embedding: Tensor = model.get_input_embeddings().weight
        self._dtype = self._embedding.dtype
        self._tolerance = TOLERANCE[self._dtype]
        self._numbers = numbers_of(self._config, self._dtype)
        self._used: list[tuple[int, int]] = []
        self._text = "."
        limit = longest_text(model.config) or 1000
        places = sorted({0, 1, 2, 5, limit // 2, limit - 1})
        tokens = torch.linspace(1, len(self._embedding) - 1, len(places), dtype=torch.float64).long()
        self._trace: Trace = trace(model, tokens, torch.tensor(places))
        self._calls = [call for call in self._trace.calls if isinstance(call, Call)]
        self._called = {id(call.module) for call in self._calls}
        self._turns: list[Turn] = []
        for call in self._calls:
            if isinstance(call.module, (nn.Linear, Conv1D)) and not _is_linear(call):
                raise _refusal(f"{self._name(call.module)}, not a plain Linear")
            self._turns += turns_of(call, self._trace.positions)

    def decoder(self) -> Decoder:
        """Return the whole description."""
        layers = [self._calls_within(module) for module in self._layers()]
        described = []
        start = states = layers[0][-1].input
        for calls in layers:
            whole = calls[-1]
            if whole.output is None or not same(whole.input, states):
                raise _refusal(f"{self._name(whole.module)}, which does not read the layer before it")
            described.append(self._layer(calls, states, whole.output))
            states = whole.output
        decoder = Decoder(layers=described, **self._begin(start), **self._end(states))
        self._require_all_used()
        return decoder

    # Finding one's way

    def _name(self, module: nn.Module) -> str:
        return f"{self._names.get(id(module), '?')}, a {type(module).__name__}"

    def _layers(self) -> list[nn.Module]:
        """Return the layers, the members of a list that have one attention each."""
        attended = [call.module for call in self._trace.calls if isinstance(call, AttentionCall)]
        if not attended:
            raise _refusal("one whose attention is no attention function of transformers")
        for module in self._model.modules():
            if isinstance(module, nn.ModuleList) and len(module) == len(attended):
                inside = [{id(each) for each in layer.modules()} for layer in module]
                if all(id(each) in members for each, members in zip(attended, inside, strict=True)):
                    self._text = f".{self._names[id(module)]}".rpartition(".")[0] + "."
                    return list(module)
        raise _refusal("one that has no list of layers with one attention each")

    def _calls_within(self, module: nn.Module) -> list[Any]:
        """Return the calls of a module and what is inside of it, its own last."""
        inside = {id(each) for each in module.modules()}
        found = [call for call in self._trace.calls if id(call.module) in inside]
        if sum(call.module is module for call in found) != 1 or found[-1].module is not module:
            raise _refusal(f"{self._name(module)}, which is not called once")
        return found

    def _take(self, *tensors: Tensor | None) -> None:
        """Write down that the description has all of some tensors."""
        for each in tensors:
            if each is not None:
                self._used.append((each.data_ptr(), each.data_ptr() + each.numel() * each.element_size()))

    def _require_all_used(self) -> None:
        """Refuse a model that holds more, but for what token ids never reach: encoders of images, say."""
        for name, held in [*self._model.named_parameters(), *self._model.named_buffers()]:
            owner = name.rpartition(".")[0]
            is_outside = not f".{name}".startswith(self._text)
            if is_outside and id(self._model.get_submodule(owner)) not in self._called:
                continue
            first, last = held.data_ptr(), held.data_ptr() + held.numel() * held.element_size()
            is_mask = not held.is_floating_point() or name.endswith("inv_freq")
            if not is_mask and first != last and not any(low <= first and last <= high for low, high in self._used):
                raise _refusal(f"{name}, which has no place in it")

    # The parts

    def _linear(self, call: Call) -> Linear:
        """Return a linear layer; a transposed one is a copy."""
        module: Any = call.module
        weight, bias = module.weight, module.bias
        self._take(weight, bias)
        weight = weight.detach()
        if weight.dtype != self._dtype:
            raise _refusal(f"{self._name(module)} of {weight.dtype} among {self._dtype}")
        rows = weight.t().contiguous() if isinstance(module, Conv1D) else weight
        if rows.stride(1) != 1:
            rows = rows.contiguous()
        return Linear(rows, None if bias is None else bias.detach().float())

    def _norm(self, call: Call) -> Norm:
        assert call.input is not None
        norm = fit_norm(call.module, call.input.shape[-1], self._dtype)
        if norm is None:
            raise _refusal(f"{self._name(call.module)}, which is neither RMSNorm nor LayerNorm")
        self._take(getattr(call.module, "weight", None), getattr(call.module, "bias", None))
        return norm

    def _before(self, calls: list[Any], states: Tensor) -> tuple[Norm | None, Tensor]:
        """Return the norm that made some states, if one did, and what it read."""
        for call in calls:
            if _may_be_norm(call) and same(call.output, states):
                return self._norm(call), call.input
        return None, states

    def _after(self, calls: list[Any], states: Tensor) -> tuple[Norm | None, Tensor]:
        """Return the norm that reads some states, if one does, and what it returns."""
        for call in calls:
            if _may_be_norm(call) and same(call.input, states):
                return self._norm(call), call.output
        return None, states

    # A layer

    def _layer(self, calls: list[Any], start: Tensor, end: Tensor) -> Layer:
        asked = next(call for call in calls if isinstance(call, AttentionCall))
        inside = {id(each) for each in asked.module.modules()}
        of_attention = [call for call in calls if id(call.module) in inside]
        others = [call for call in calls if isinstance(call, Call) and id(call.module) not in inside]
        name = self._name(calls[-1].module)
        attention = self._attention(of_attention, asked)
        mlp = self._mixture(others, name) or self._mlp(others, name)

        attention_norm, read = self._before(others, attention.input)
        if not same(read, start):
            raise _refusal(f"{name}, whose attention does not read what the layer reads")
        attention_post_norm, attended = self._after(others, attention.output)
        mlp_post_norm, added = self._after(others, mlp.output)
        mlp_norm, middle = None, mlp.input
        is_parallel = same(mlp.input, attention.input)
        if not is_parallel:
            mlp_norm, middle = self._before(others, mlp.input)
            is_parallel = same(middle, start)
        scale = self._residual_scale(name, start, attended, None if is_parallel else middle, added, end)
        return Layer(
            attention.part,
            mlp.part,
            attention_norm,
            mlp_norm,
            attention_post_norm,
            mlp_post_norm,
            is_parallel,
            scale,
        )

    def _residual_scale(
        self, name: str, start: Tensor, attended: Tensor, middle: Tensor | None, added: Tensor, end: Tensor
    ) -> float:
        """Return what the branches are multiplied by before they are added."""
        attended, added = attended.reshape(start.shape), added.reshape(start.shape)
        if middle is None:
            scale, error = fit_factor(attended + added, end, self._numbers, start)
        else:
            middle = middle.reshape(start.shape)
            scale, error = fit_factor(attended, middle, self._numbers, start)
            other, further = fit_factor(added, end, [scale], middle)
            error = max(error, further) if other == scale else math.inf
        if error > self._tolerance / 4:
            raise _refusal(f"{name}, which adds up its parts in another way")
        return scale

    # Attention

    def _attention(self, calls: list[Any], asked: AttentionCall) -> _Branch:
        name = self._name(asked.module)
        place = calls.index(asked)
        linears = [call for call in calls if _is_linear(call)]
        inputs = [call for call in linears if calls.index(call) < place]
        outputs = [call for call in linears if calls.index(call) > place]
        if not inputs or len(outputs) != 1 or not all(same(call.input, inputs[0].input) for call in inputs):
            raise _refusal(f"{name}, whose projections are not queries, keys, values and an output")
        if relative_error(outputs[0].input, asked.output):
            raise _refusal(f"{name}, which does more with what it attended to than to project it")
        norms = [call for call in calls[:place] if _may_be_norm(call)]
        parts = self._projections(name, inputs, norms, asked)
        self._take(asked.sinks)
        attention = Attention(
            **parts,
            output=self._linear(outputs[0]),
            window=asked.window,
            softcap=asked.softcap,
            sinks=None if asked.sinks is None else asked.sinks.detach().float().reshape(-1),
        )
        return _Branch(attention, inputs[0].input, outputs[0].output)

    def _projections(self, name: str, calls: list[Call], norms: list[Call], asked: AttentionCall) -> dict[str, Any]:
        """Return queries, keys and values, with their norms and positions: what gives what attention was given."""
        num_q_heads, num_tokens, head_dim = asked.query.shape
        num_kv_heads, v_head_dim = len(asked.key), asked.value.shape[-1]
        states = torch.cat([_rows(call.output) for call in calls], dim=1)
        for rows in _qkv_layouts(states.shape[1], num_q_heads, num_kv_heads, head_dim, v_head_dim):
            query, key, value = (states[:, each] for each in rows)
            if relative_error(value.view(num_tokens, num_kv_heads, -1).transpose(0, 1), asked.value):
                continue
            query_norm, queries = self._normed(norms, query, num_q_heads)
            key_norm, keys = self._normed(norms, key, num_kv_heads)
            turn, q_factor, k_factor = self._turn(queries, keys, asked)
            if q_factor is None or k_factor is None:
                continue
            sources = [self._linear(call) for call in calls]
            return dict(
                query=_rows_of(sources, rows[0]),
                key=_rows_of(sources, rows[1]),
                value=_rows_of(sources, rows[2]),
                num_q_heads=num_q_heads,
                num_kv_heads=num_kv_heads,
                head_dim=head_dim,
                v_head_dim=v_head_dim,
                scale=asked.scale * q_factor * k_factor,
                query_norm=query_norm,
                key_norm=key_norm,
                rope=None if turn is None else turn.rope,
            )
        raise _refusal(f"{name}, which makes queries, keys and values in another way")

    def _normed(self, norms: list[Call], states: Tensor, num_heads: int) -> tuple[Norm | None, Tensor]:
        """Return the norm over queries or keys, if there is one, and the heads that it makes."""
        heads = states.view(len(states), num_heads, -1)
        for call in norms:
            assert call.input is not None and call.output is not None
            if call.input.numel() != states.numel():
                continue
            is_turned = call.input.dim() == 4 and call.input.shape[1] == num_heads and len(states) != num_heads
            read, made = (each.transpose(1, 2) if is_turned else each for each in (call.input, call.output))
            if not relative_error(read, heads):
                return self._norm(call), made.reshape(heads.shape)
        return None, heads

    def _turn(self, queries: Tensor, keys: Tensor, asked: AttentionCall) -> tuple[Any, ...]:
        """Return how heads are turned by their positions, and what queries and keys are multiplied by besides."""
        right = asked.query.transpose(0, 1), asked.key.transpose(0, 1)
        best: tuple[Any, ...] = None, None, None
        least = self._tolerance
        ways = [None, *(turn for turn in self._turns if turn.rope.width <= queries.shape[-1])]
        for turn in ways:
            made = (queries, keys) if turn is None else (turn(queries), turn(keys))
            factors = [self._multiple(got, want) for got, want in zip(made, right, strict=True)]
            error = max(relative_error(m * f, r) for m, f, r in zip(made, factors, right, strict=True))
            if error < least:
                least, best = error, (turn, *factors)
        return best

    def _multiple(self, heads: Tensor, right: Tensor) -> float:
        """Return what heads are multiplied by to be the right ones: 1 if that will do."""
        if relative_error(heads, right) <= self._tolerance:
            return 1.0
        return float((heads.double() * right.double()).sum() / heads.double().square().sum())

    # MLPs

    def _mlp(self, calls: list[Any], name: str) -> _Branch:
        linears = [call for call in calls if _is_linear(call)]
        if len(linears) < 2 or not all(same(call.input, linears[0].input) for call in linears[:-1]):
            raise _refusal(f"{name}, whose MLP is not two factors and a product")
        *firsts, down = linears
        states = torch.cat([_rows(call.output) for call in firsts], dim=1)
        right = _rows(down.input)
        known = known_activations(_plain_leaves(calls))
        ways = [
            (rows, activation)
            for rows in halves(states.shape[1], right.shape[1])
            for activation in ways_to_activate(rows, known)
        ]

        def error(way: tuple[Halves, str]) -> float:
            rows, activation = way
            gate = None if rows.gate is None else states[:, rows.gate]
            return relative_error(activated(activation, states[:, rows.up], gate), right)

        best = min(ways, key=error, default=None)
        if best is None or error(best) > self._tolerance:
            raise _refusal(f"{name}, whose MLP has an unknown activation")
        (rows, activation), numbers = best, torch.arange(states.shape[1])
        sources = [self._linear(call) for call in firsts]
        gate = None if rows.gate is None else _rows_of(sources, numbers[rows.gate])
        mlp = Mlp(_rows_of(sources, numbers[rows.up]), self._linear(down), gate, activation)
        return _Branch(mlp, linears[0].input, down.output)

    def _mixture(self, calls: list[Any], name: str) -> _Branch | None:
        """Return a mixture of experts, if the layer has one."""
        call = next((call for call in calls if any(each.dim() == 3 for each in _own_parameters(call))), None)
        if call is None:
            return None
        found = fit_experts(call, known_activations(_plain_leaves(calls)))
        if found is None:
            raise _refusal(f"{self._name(call.module)}, whose experts compute in another way")
        stack, rows, activation = found
        self._take(*_own_parameters(call))
        if stack.ups.stride(2) != 1:  # it stands transposed
            stack = replace(stack, ups=stack.ups.contiguous(), downs=stack.downs.contiguous())
        num_experts, given = len(stack.ups), [each for each in call.given if torch.is_tensor(each)]
        chosen = next(each for each in given if not each.is_floating_point())
        weights = next((each for each in given if each.shape == chosen.shape and each is not chosen), chosen)
        routers = [other for other in calls if _routes(other, call, num_experts)]
        if len(routers) != 1 or any(_is_linear(other) and other not in routers for other in calls):
            raise _refusal(f"{name}, whose mixture has more than a router and experts")
        router = self._router(routers[0])
        logits = nn.functional.linear(_rows(call.input).float(), router.weight.float(), router.bias)
        if relative_error(routers[0].output, logits) <= self._tolerance:
            logits = routers[0].output  # rounded as its softmax is
        is_renormalised = fit_router(logits, chosen, weights, self._tolerance)
        if is_renormalised is None:
            raise _refusal(f"{name}, whose router is no softmax")
        experts = [stack.mlp(number, rows, activation) for number in range(num_experts)]
        return _Branch(Experts(router, experts, chosen.shape[1], is_renormalised), call.input, call.output)

    def _router(self, call: Call) -> Linear:
        module: Any = call.module
        bias = getattr(module, "bias", None)
        self._take(module.weight, bias)
        return Linear(module.weight.detach(), None if bias is None else bias.detach().float())

    # Beginning and end

    def _begin(self, start: Tensor) -> dict[str, Any]:
        """Return how token ids become the states that the first layer reads."""
        norm, states = self._before(self._calls, start)
        embedding = self._model.get_input_embeddings()
        self._take(self._embedding, *(each for each in embedding.buffers() if each.numel() == 1))
        if states.shape[-1] != self._embedding.shape[-1]:
            raise _refusal("one whose embeddings have another size than its layers")
        table, offset, added = self._positions(embedding, states)
        embedded = self._embedding.detach()[self._trace.token_ids].reshape(states.shape)
        scale, error = fit_factor(embedded, states, self._numbers, added)
        if error > self._tolerance / 4:
            raise _refusal("one that does more with embeddings than to scale them and to add positions")
        return dict(
            embedding=self._embedding.detach(),
            embedding_norm=norm,
            embedding_scale=scale,
            positions=table,
            position_offset=offset,
        )

    def _positions(self, embedding: nn.Module, states: Tensor) -> tuple[Tensor | None, int, Tensor | None]:
        """Return the table of learned positions, where it begins, and its rows in the trace; if there is one."""
        for call in self._calls:
            if not isinstance(call.module, nn.Embedding) or call.module is embedding or call.output is None:
                continue
            weight, got = call.module.weight, call.output
            for offset in range(8):
                rows = self._trace.positions + offset
                if int(rows[-1]) < len(weight) and not relative_error(weight[rows], got):
                    self._take(weight)
                    return weight.detach(), offset, got.reshape(1, *states.shape[-2:]).expand(states.shape)
        return None, 0, None

    def _end(self, states: Tensor) -> dict[str, Any]:
        """Return how the states that the last layer returns become logits."""
        head = self._model.get_output_embeddings()
        call = next((call for call in self._calls if call.module is head), None)
        if call is None or not _is_linear(call) or call.input is None:
            raise _refusal("one without a plain Linear as its head")
        norm, read = self._before(self._calls, call.input)
        if not same(read, states):
            raise _refusal("one that does more with the states of its last layer than to normalise them")
        cap = getattr(self._config, "final_logit_softcapping", None)
        raw, logits, scale = _rows(call.output), self._trace.logits, 1.0
        if cap is None:
            scale, error = fit_factor(raw, logits.to(raw.dtype), self._numbers)
        else:
            error = relative_error(torch.tanh(raw.float() / cap) * cap, logits)
        if error > self._tolerance:
            raise _refusal("one that does more with logits than to scale and to cap them")
        return dict(norm=norm, head=self._linear(call), logit_scale=scale, logit_softcap=cap)


def _is_linear(call: Any) -> bool:
    return isinstance(call, Call) and type(call.module) in (nn.Linear, Conv1D)


def _own_parameters(call: Any) -> list[nn.Parameter]:
    return list(call.module.parameters(recurse=False)) if isinstance(call, Call) else []


def _routes(call: Call, experts: Call, num_experts: int) -> bool:
    """Tell whether a module has a row of weights for each expert and reads what they read."""
    assert experts.input is not None
    shapes = [each.shape for each in _own_parameters(call) if each.dim() > 1]
    return (
        shapes == [(num_experts, experts.input.shape[-1])]
        and call.input is not None
        and same(call.input, experts.input)
    )


def _plain_leaves(calls: list[Call]) -> list[nn.Module]:
    """Return the modules that hold nothing: activations among them."""
    held = [(call.module, [*call.module.children(), *call.module.parameters()]) for call in calls]
    return [module for module, parts in held if not parts]


def _may_be_norm(call: Any) -> bool:
    """Tell whether a module made new states of the same size, and holds at most vectors."""
    if not isinstance(call, Call) or call.input is None or call.output is None or _is_linear(call):
        return False
    if list(call.module.children()) or any(each.dim() > 1 for each in call.module.parameters()):
        return False
    return call.input.shape == call.output.shape and not same(call.input, call.output)


def _rows(states: Tensor | None) -> Tensor:
    """Return states as one row a token."""
    assert states is not None
    return states.reshape(-1, states.shape[-1])


def _qkv_layouts(
    num_rows: int, num_q_heads: int, num_kv_heads: int, head_dim: int, v_head_dim: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield how queries, keys and values may lie in the rows of one projection, or of several one after the other."""
    sizes = num_q_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * v_head_dim
    if num_rows != sum(sizes):
        return
    numbers = torch.arange(num_rows)
    for order in permutations(range(3)):
        parts = dict(zip(order, torch.split(numbers, [sizes[each] for each in order]), strict=True))
        yield parts[0], parts[1], parts[2]
    groups = numbers.view(num_kv_heads, -1)  # the query heads of a group, its key, its value
    query, key, value = torch.split(groups, [sizes[0] // num_kv_heads, head_dim, v_head_dim], dim=1)
    yield query.reshape(-1), key.reshape(-1), value.reshape(-1)


def _rows_of(sources: list[Linear], rows: Tensor) -> Linear:
    """Return some rows of linear layers that stand one after the other: in place where they are evenly apart in one."""
    first, last = int(rows[0]), int(rows[-1])
    step = int(rows[1]) - first if len(rows) > 1 else 1
    is_even = len(rows) == 1 or bool((rows.diff() == step).all())
    begin = 0
    for source in sources:
        size = len(source.weight)
        if is_even and begin <= first and last < begin + size:
            part = slice(first - begin, last - begin + 1, step)
            return Linear(source.weight[part], None if source.bias is None else source.bias[part])
        begin += size
    weight = torch.cat([source.weight for source in sources])[rows]
    if all(source.bias is None for source in sources):
        return Linear(weight)
    biases = [
        torch.zeros(len(each.weight), dtype=torch.float32) if each.bias is None else each.bias for each in sources
    ]
    return Linear(weight, torch.cat(biases)[rows])
