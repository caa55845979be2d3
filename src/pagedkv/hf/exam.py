"""The exam that a model sits before it is served: which way through the cache gives the logits of the model without it.

Its texts are short, so the lengths at which a model treats tokens in another way (sliding windows, attention chunks,
scales and choices of sparse attention) are made shorter for the time of the exam. Whether rotary frequencies change
with the length of a text is known from the config: such a model takes prompts whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from pagedkv.errors import InvalidOperation, bad_argument
from pagedkv.hf.cache import PagedCache
from pagedkv.hf.compat import (
    DynamicCache,
    attention_by,
    forget_long_texts,
    has_changing_rope,
    has_states,
    longest_text,
    require_cache_argument,
)
from pagedkv.hf.direct import DIRECT
from pagedkv.hf.fitting import relative_error
from pagedkv.hf.pool import ModelKvCache
from pagedkv.hf.runner import ModelRunner

TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
"""How far logits may be from the model's own, in relation to their size. Rounding alone is some 1e-6 in float32."""
HALF_TOLERANCE = 0.05
"""The same in bfloat16 and float16, where rounding alone is up to 0.03, for three of four tokens, and twice as much for
all others: but where a mixture has experts, rounding decides ties between them, and such a token may be far off."""
MOST_TOLERANCE = 0.2
"""What that grows to at most: to three times what the model is from itself with another of transformers' attentions, as
other products round as well."""

LENGTH = 24
"""Tokens of each of the three texts of an exam."""
NARROW = 12
"""What the lengths in the way are made, where they are longer."""
LENGTHS = ("sliding_window", "attention_chunk_size", "floor_scale", "index_topk")
"""Names of the lengths, in configs and in modules, at which a model treats tokens in another way."""

Step = dict[int, int]


@dataclass(frozen=True, slots=True)
class Way:
    """How a model may be run: its mode, and whether prompts may be cut into chunks."""

    mode: str
    chunkable: bool


WAYS = (Way("compiled", True), Way("ragged", True), Way("gather", True), Way("gather", False))
"""The fastest first."""


@dataclass(slots=True)
class Passed:
    """What an exam found: the first way that is right, a small runner that has gone it, and why no faster way is."""

    way: Way
    runner: ModelRunner
    reasons: dict[Way, str] = field(default_factory=dict)


def sit_exam(
    model: Any, mode: str = "auto", block_size: int = 16, kv_dtype: Any = None, *, may_compile: bool = True
) -> Passed:
    """Find the way in which a model is to be run.

    Parameters
    ----------
    model : PreTrainedModel
        In eval mode.
    mode : {"auto", "compiled", "ragged", "gather"}
        Which ways are tried.
    block_size : int
    kv_dtype : optional
        Of the stored K and V.
    may_compile : bool
        Whether mode ``"compiled"`` is tried.

    Returns
    -------
    Passed

    Raises
    ------
    InvalidOperation
        If no way gives the logits of the model without a cache: it must not be served. Says why.
    """
    require_cache_argument(model)
    with narrowed(model):
        try:
            exam = Exam(model, block_size, kv_dtype)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            name = f"{type(model).__name__}: {error}"
            raise bad_argument("model", "one that computes logits of token ids alone", name) from error
        modes = {way.mode for way in WAYS if mode in ("auto", way.mode)} - (set() if may_compile else {"compiled"})
        return _first_right(model, mode, [way for way in WAYS if way.mode in modes], exam)


def _first_right(model: Any, mode: str, ways: list[Way], exam: Exam) -> Passed:
    exam.require_causal()
    reasons: dict[Way, str] = {}
    for way in ways:
        try:
            return Passed(way, exam.tried(way), reasons)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever a model does with tokens of other sequences, or with handles
            failure, reasons[way] = error, str(error).removeprefix("Invalid operation: ") or repr(error)
    if mode in ("compiled", "ragged"):
        raise InvalidOperation(f"mode: {mode!r} is not for {type(model).__name__}: {reasons[way]}") from failure
    raise InvalidOperation(f"model: no cache is right for {type(model).__name__}: {reasons[way]}") from failure


@contextmanager
def narrowed(model: Any) -> Iterator[None]:
    """Let the lengths at which a model treats tokens in another way be short for the time being."""
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    text = model.config.get_text_config(decoder=True)
    owners = [*(configs | {id(text): text}).values(), *model.modules()]
    kept = [(owner, name, getattr(owner, name, None)) for owner in owners for name in LENGTHS]
    kept = [each for each in kept if isinstance(each[2], (int, float)) and each[2] > NARROW]
    try:
        for owner, name, _ in kept:
            setattr(owner, name, NARROW)
        yield
    finally:
        for owner, name, length in kept:
            setattr(owner, name, length)


_CACHE_EXAMS: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


def sit_cache_exam(model: Any) -> bool:
    """Tell whether a PagedCache may reuse prefixes for a model.

    Each model sits this exam once: a batch in one piece and token by token, then a text behind a cached prefix. None is
    sat in training mode, nor by a model that does not run on token ids alone.

    Raises
    ------
    InvalidOperation
        If the model gives other logits over a PagedCache than over transformers' own.
    """
    if model.training:
        return True
    if model not in _CACHE_EXAMS:
        with narrowed(model):
            try:
                exam = Exam(model, 8, None)
            except (MemoryError, torch.OutOfMemoryError):
                raise
            except Exception:
                return True
            _CACHE_EXAMS[model] = _cache_exam(model, exam)
    return _CACHE_EXAMS[model]


def _cache_exam(model: Any, exam: Exam) -> bool:
    cache = PagedCache(model.config, num_blocks=16, block_size=8, num_states=4)
    try:
        right, got = exam.in_pieces(DynamicCache(config=model.config)), exam.in_pieces(cache)
        error = exam.distance(got, right, model.dtype)
        if not error:
            return exam.reuses_prefixes(cache)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as failure:
        error = str(failure).removeprefix("Invalid operation: ")
    raise bad_argument("model", "one that is right over a PagedCache", f"{type(model).__name__}: {error}")


def _has_experts(model: Any) -> bool:
    return any("expert" in name for name, _ in model.named_modules())


class Exam:
    """The texts of an exam, and the logits that are right for them."""

    def __init__(self, model: Any, block_size: int, kv_dtype: Any) -> None:
        self._model, self._block_size, self._kv_dtype = model, min(block_size, 8), kv_dtype
        self._length = min(LENGTH, longest_text(model.config) or LENGTH)
        self._vocab_size = int(model.config.get_text_config(decoder=True).vocab_size)
        self._texts = np.random.default_rng(0).integers(0, self._vocab_size, (3, self._length))
        self._texts[2, : self._shared] = self._texts[0, : self._shared]
        self._plain = self._run(self._texts)
        self._noise: float | None = None

    @property
    def _shared(self) -> int:
        return self._length * 3 // 4

    def require_causal(self) -> None:
        """Raise InvalidOperation if a token's logits depend on the tokens behind it."""
        half, changed = self._length // 2, self._texts.copy()
        changed[:, half:] = (changed[:, half:] + 1) % self._vocab_size
        error = self.distance(self._run(changed)[:, :half], self._plain[:, :half], self._model.dtype)
        if error:
            name = f"{type(self._model).__name__}: where later tokens are others, {error}"
            raise bad_argument("model", "a causal one", name)

    def tried(self, way: Way) -> ModelRunner:
        """Return a runner that has gone this way and was right; raises the reason if it is not for the model."""
        config, runner = self._model.config, self._runner(way)
        if way.chunkable and has_changing_rope(config):
            raise InvalidOperation("its rotary frequencies change with the longest text of a batch")
        if way.mode in ("compiled", "ragged") and runner.has_states:
            raise InvalidOperation("it has layers that keep a state outside of K and V")
        right = self._plain if way.chunkable else self.in_pieces(DynamicCache(config=config))
        error = self._error(runner, way, right)
        if error and runner.window is not None:
            runner = self._runner(way)
            runner.window = None
            error = self._error(runner, way, right)
        if error:
            raise InvalidOperation(error)
        return runner

    def _error(self, runner: ModelRunner, way: Way, right: Tensor) -> str:
        """Say how far the logits of a way are from the right ones, if it is too far."""
        steps = self._cut_steps() if way.chunkable else self._whole_steps()
        got, expected = self._served(runner, steps, right)
        return self.distance(got, expected, self._model.dtype, runner.cache.storage.dtype)

    def _cut_steps(self) -> list[Step]:
        """The first text in chunks of 7, 1 and 16 beside the second in one piece; the third, which begins alike."""
        first = min(7, self._length - 2)
        return [{0: first, 1: self._length - 2}, {0: 1, 1: 1}, {0: self._length - first - 1, 1: 1}, {2: 0}]

    def _whole_steps(self) -> list[Step]:
        """Two texts in one piece, but for their last tokens."""
        return [{0: self._length - 2}, {0: 1, 1: self._length - 2}, {0: 1, 1: 1}, {1: 1}]

    def _runner(self, way: Way) -> ModelRunner:
        num_blocks = 3 * -(-self._length // self._block_size)
        cache = ModelKvCache(num_blocks, self._block_size, num_layers=0, num_states=6 if has_states(self._model) else 0)
        return ModelRunner(self._model, cache, way.mode, kv_dtype=self._kv_dtype, chunkable=way.chunkable)

    def _served(self, runner: ModelRunner, steps: list[Step], right: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits of all tokens that a runner computes, and the right ones."""
        cache, got, expected = runner.cache, [], []
        done: dict[int, int] = {}
        for step in steps:
            for text, count in step.items():  # a count of 0 means the rest
                ids = self._texts[text, done.get(text, 0) :][: count or self._length]
                if text in done:
                    if text == 1 and runner.window is not None:
                        cache.apply_streaming_llm(text, 0, runner.window - 1)
                    cache.append(text, ids)
                else:
                    done[text] = cache.allocate(text, ids if runner.reuses_prefixes else len(ids)).num_cached_tokens
            plan = cache.plan(list(step))
            counts = plan.num_query_tokens.tolist()
            places = [(text, done[text], done[text] + count) for text, count in zip(step, counts, strict=True)]
            tokens = np.concatenate([self._texts[text, first:last] for text, first, last in places])
            got.append(runner.forward(plan, tokens, np.arange(plan.total_tokens)))
            cache.commit(plan)
            expected += [right[text, first:last] for text, first, last in places]
            done |= {text: last for text, _, last in places}
        return torch.cat(got), torch.cat(expected)

    def in_pieces(self, cache: Any) -> Tensor:
        """Return the logits of the first two texts over a cache, in one piece but for their last two tokens."""
        cuts = (0, self._length - 2, self._length - 1, self._length)
        parts = [self._run(self._texts[:2, first:last], cache) for first, last in pairwise(cuts)]
        return torch.cat(parts, dim=1)

    def reuses_prefixes(self, cache: PagedCache) -> bool:
        """Tell whether a text is right behind a prefix that a cache holds of another."""
        for text in (0, 2):
            ids = self._texts[text : text + 1]
            past = cache.prompt(ids)
            cuts = sorted({past, max(past, cache.last_snapshot(self._length)), self._length})
            for first, last in pairwise(cuts):
                cache.expect(ids[:, first:last])
                got, right = self._run(ids[:, first:last], cache), self._plain[text : text + 1, first:last]
                if self.distance(got, right, self._model.dtype):
                    return False
        return True

    def _run(self, ids: Any, cache: Any = None) -> Tensor:
        """Return the logits of the model, ``[texts, length, vocab]``."""
        forget_long_texts(self._model)
        tokens = torch.from_numpy(np.ascontiguousarray(ids)).to(self._model.device)
        text = self._model.config.get_text_config(decoder=True)
        needs_blocks = text._attn_implementation == DIRECT and not isinstance(cache, PagedCache)
        with torch.no_grad(), attention_by("eager", text) if needs_blocks else nullcontext():
            logits: Tensor = self._model(tokens, past_key_values=cache, use_cache=cache is not None).logits
        return logits.float()

    def _half_error(self, got: Tensor, expected: Tensor) -> float:
        """Return how far logits in half precision are from the right ones: most of them, or half of the farthest."""
        errors = ((got - expected).norm(dim=-1) / expected.norm(dim=-1)).flatten()
        error = float(errors.quantile(0.75))
        return error if _has_experts(self._model) else max(error, float(errors.max()) / 2)

    def _own_noise(self) -> float:
        """Return how far the logits of the model are from those that another attention gives, by rounding alone."""
        if self._noise is None:
            text = self._model.config.get_text_config(decoder=True)
            with attention_by("sdpa" if text._attn_implementation == "eager" else "eager", text):
                try:
                    self._noise = self._half_error(self._run(self._texts), self._plain)
                except (MemoryError, torch.OutOfMemoryError):
                    raise
                except Exception:  # it has no other
                    self._noise = 0.0
        return self._noise

    def distance(self, got: Tensor, expected: Tensor, *dtypes: torch.dtype) -> str:
        """Say how far logits are from the right ones, if it is too far."""
        tolerance = max(TOLERANCE.get(dtype, HALF_TOLERANCE) for dtype in dtypes)
        if tolerance == HALF_TOLERANCE:
            error = self._half_error(got, expected)
            if error > tolerance:
                tolerance = max(tolerance, min(3 * self._own_noise(), MOST_TOLERANCE))
        else:
            error = relative_error(got, expected)
        if error <= tolerance:
            return ""
        return f"its logits are off by {error:.2g} of their size, expected at most {tolerance:g}"
