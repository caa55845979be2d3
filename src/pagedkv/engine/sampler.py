"""Sampling: logits of a step in, one token a row out; what a row gets does not depend on the rows beside it."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import compress

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pagedkv.engine.request import Logprob
from pagedkv.engine.sampling_kernels import draw, forbid, likeliest, uniforms
from pagedkv.engine.sampling_params import SamplingParams
from pagedkv.engine.token_grammar import GrammarState, Masks
from pagedkv.errors import InvalidLogits, bad_argument
from pagedkv.jit import compiled

# Log probabilities of chosen and of likeliest tokens, of the raw distribution.


def token_logprobs(logits: Tensor, token_ids: Sequence[int], top: Sequence[int]) -> list[dict[int, Logprob]]:
    """Return for each row the chosen token and, likeliest first, the `top` likeliest ones.

    As vLLM does by default (``logprobs_mode="raw_logprobs"``). Of equally likely tokens the lowest ids come first.

    Parameters
    ----------
    logits : float [n, vocab]
        As the model gave them.
    token_ids : sequence of int
        The chosen tokens, n.
    top : sequence of int
        How many likeliest tokens each row wants, n; 0 for the chosen one alone.

    Returns
    -------
    list of dict
        n of token id to :class:`Logprob`, the chosen one first, `top` or `top` + 1 entries each.
    """
    logits = logits.float()
    chosen = torch.as_tensor(token_ids, dtype=torch.int64, device=logits.device)[:, None]
    values = logits.gather(1, chosen)
    norms = torch.logsumexp(logits, dim=-1, keepdim=True)
    ranks = 1 + (logits > values).sum(dim=-1)
    most = min(max(top, default=0), logits.shape[1])
    likeliest, ids = _most_likely(logits, most)
    rows = zip(
        chosen[:, 0].tolist(),
        (values - norms)[:, 0].tolist(),
        ranks.tolist(),
        ids.tolist(),
        (likeliest - norms).tolist(),
        top,
        strict=True,
    )
    return [_entries(*row) for row in rows]


def _most_likely(logits: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Return the `most` highest logits of each row and their ids, equals by their ids."""
    if most == 0:
        return logits[:, :0], torch.empty(len(logits), 0, dtype=torch.int64, device=logits.device)
    values, ids = torch.topk(logits, min(most + 1, logits.shape[1]), dim=-1)
    tied = values[:, most:] == values[:, most - 1 : most]  # topk took some of several equals: any of them
    for row in tied.any(dim=-1).nonzero()[:, 0].tolist():
        ids[row, :most] = torch.sort(logits[row], descending=True, stable=True)[1][:most]
    ids = ids[:, :most].sort(dim=-1)[0]
    values, order = logits.gather(1, ids).sort(dim=-1, descending=True, stable=True)
    return values, ids.gather(1, order)


def _entries(
    token: int, logprob: float, rank: int, ids: list[int], logprobs: list[float], top: int
) -> dict[int, Logprob]:
    entries = {token: Logprob(logprob, rank)}
    for place, (other, value) in enumerate(zip(ids[:top], logprobs[:top], strict=True)):
        entries.setdefault(other, Logprob(value, place + 1))
    return entries


# Repetition, frequency and presence penalties: the tokens of a text, counted as it grows.

FIRST_CAPACITY = 64

Ids = npt.NDArray[np.int64]
Logits = npt.NDArray[np.float32]


@compiled
def _penalise(
    logits: Logits,
    ids: Ids,
    counts: npt.NDArray[np.int32],
    repetition: np.float32,
    frequency: np.float32,
    presence: np.float32,
) -> None:
    for place in range(len(ids)):
        token, count = ids[place], counts[place]
        value = logits[token]
        value = value / repetition if value > 0 else value * repetition
        value = value - frequency * np.float32(count)
        if count > 0:
            value = value - presence
        logits[token] = value


class TokenCounts:
    """The tokens of one prompt and text, each with how often the text holds it; as long as there are different ones.

    The repetition penalty is for tokens of the prompt and of the text, presence and frequency penalty for those of the
    text alone: CTRL's (Keskar et al. 2019) and OpenAI's definitions, applied in this order, as vLLM does.

    Parameters
    ----------
    params : SamplingParams
    prompt_token_ids : int64 [n]
    """

    __slots__ = ("_counts", "_factors", "_ids", "_place_of", "_size")

    def __init__(self, params: SamplingParams, prompt_token_ids: npt.ArrayLike) -> None:
        penalties = (params.repetition_penalty, params.frequency_penalty, params.presence_penalty)
        self._factors = tuple(np.float32(value) for value in penalties)
        prompt = np.unique(np.asarray(prompt_token_ids, np.int64)) if params.repetition_penalty != 1 else ()
        self._size = len(prompt)
        self._ids: Ids = np.empty(self._size + FIRST_CAPACITY, np.int64)
        self._ids[: self._size] = prompt
        self._counts = np.zeros(len(self._ids), np.int32)
        self._place_of = {int(token): place for place, token in enumerate(prompt)}

    def add(self, token: int) -> None:
        """Count a token of the text."""
        place = self._place_of.get(token)
        if place is None:
            place = self._place_of[token] = self._size
            if place == len(self._ids):
                self._ids = np.concatenate([self._ids, np.empty(place, np.int64)])
                self._counts = np.concatenate([self._counts, np.zeros(place, np.int32)])
            self._ids[place] = token
            self._size += 1
        self._counts[place] += 1

    def apply(self, logits: Logits) -> None:
        """Change the logits of one row, float32 [vocab], in place."""
        _penalise(logits, self._ids[: self._size], self._counts[: self._size], *self._factors)

    def copy(self) -> TokenCounts:
        """Return the same counts for a text that goes its own way from here."""
        other = object.__new__(TokenCounts)
        other._factors, other._size = self._factors, self._size
        other._ids, other._counts = self._ids.copy(), self._counts.copy()
        other._place_of = self._place_of.copy()
        return other


MASK = 2**64 - 1


def random_seed() -> int:
    """Return a seed for a request that brings none."""
    return secrets.randbits(64)


class SampleRow:
    """What the sampler has to know of one text: its parameters, its random stream and what it has said so far.

    Parameters
    ----------
    request_id : str
        For errors.
    params : SamplingParams
    prompt_token_ids : int64 [n]
        Only looked at for a repetition penalty.
    seed : int
        Its random stream is a function of (seed, choice, position): pass :func:`random_seed` where params has none.
    choice : int
        Which of the request's texts.
    end_ids : sequence of int
        The model's end-of-text tokens, which `min_tokens` keeps away, as it does the stop tokens.
    grammar : GrammarState, optional
        What the text follows; it is this row's own.

    Attributes
    ----------
    position : int
        Tokens of the text so far.
    """

    __slots__ = (
        "banned", "biases", "choice", "counts", "grammar", "params", "position", "request_id", "seed", "shapes",
        "works",
    )  # fmt: skip

    def __init__(
        self,
        request_id: str,
        params: SamplingParams,
        prompt_token_ids: npt.ArrayLike,
        *,
        seed: int,
        choice: int = 0,
        end_ids: Iterable[int] = (),
        grammar: GrammarState | None = None,
    ) -> None:
        self.request_id, self.params, self.seed, self.choice = request_id, params, seed & MASK, choice
        self.position = 0
        self.counts = TokenCounts(params, prompt_token_ids) if params.penalises else None
        self.banned = np.array(sorted({*end_ids, *params.stop_token_ids}), np.int64) if params.min_tokens else None
        self.biases: tuple[Ids, Logits] | None = None
        if params.logit_bias:
            ids = np.fromiter(params.logit_bias, np.int64)
            self.biases = ids, np.fromiter(params.logit_bias.values(), np.float32)
        self.grammar = grammar
        shapers = (self.counts, self.biases, self.banned, grammar)
        self.shapes = any(each is not None for each in shapers)
        self.works = self.shapes or not params.greedy  # more than an argmax of raw logits

    def accept(self, token: int) -> None:
        """Take note of a token that was added to the text."""
        self.position += 1
        if self.counts is not None:
            self.counts.add(token)
        if self.grammar is not None:
            self.grammar.accept(token)

    def ahead(self, tokens: Sequence[int], choice: int | None = None) -> SampleRow:
        """Return the row of a text that goes on with these tokens; this one stays as it is.

        With a `choice` it is a fork's, of another text of the request; without one a draft's, which is dropped when
        the step is over.
        """
        other = object.__new__(SampleRow)
        for name in SampleRow.__slots__:
            setattr(other, name, getattr(self, name))
        other.counts = None if self.counts is None else self.counts.copy()
        other.grammar = None
        for token in tokens:
            other.accept(token)
        if choice is not None:
            other.choice = choice
        if self.grammar is not None:
            other.grammar = self.grammar.ahead(tokens) if choice is None else self.grammar.copy(tokens)
        return other

    def shape(self, logits: Logits) -> None:
        """Apply bias, the ban of `min_tokens` and penalties to float32 [vocab], in place; the grammar comes after."""
        if self.biases is not None:
            logits[self.biases[0]] += self.biases[1]
        if self.banned is not None and self.position < self.params.min_tokens:
            logits[self.banned] = -np.inf
        if self.counts is not None:
            self.counts.apply(logits)


@dataclass(frozen=True, slots=True)
class SampleResult:
    """The tokens of a step.

    Attributes
    ----------
    token_ids : int64 [k]
    logprobs : list of dict, or None
        k of token id to :class:`Logprob` for rows that asked, None for those that did not; None if none did.
    """

    token_ids: Ids
    logprobs: list[dict[int, Logprob] | None] | None


class Sampler:
    """Chooses tokens, one vectorised pass over a batch.

    In this order, which is vLLM's: logit bias, the ban of `min_tokens`, repetition, frequency and presence penalty, the
    grammar, temperature, min-p, top-k, top-p, draw. Greedy rows stop before the temperature. If every token is banned,
    the likeliest of the raw logits is taken, among those that the grammar allows. The draw inverts the cumulative
    distribution at a number that is a function of the row's seed, choice and position, so neither the batch nor the
    steps before it matter.
    """

    def sample(self, logits: Tensor | Logits, rows: Sequence[SampleRow]) -> SampleResult:
        """Choose one token a row. Changes neither logits nor rows: tell the rows with :meth:`SampleRow.accept`.

        Parameters
        ----------
        logits : float [k, vocab]
            As the model gave them; -inf is a token that the model rules out. A float32 array is as good as a tensor.
        rows : sequence of SampleRow
            k.

        Returns
        -------
        SampleResult

        Raises
        ------
        InvalidLogits
            A row holds NaN or +inf, or nothing but -inf; names the requests.
        InvalidOperation
            Not one row of logits a row.
        """
        if logits.ndim != 2 or logits.shape[0] != len(rows):
            raise bad_argument("logits", f"[{len(rows)}, vocab]", f"{list(logits.shape)}")
        if not rows:
            return SampleResult(np.empty(0, np.int64), None)
        best, tokens, finite = _likeliest(logits)
        if not finite:
            raise _not_finite(best, rows)
        if are_likeliest(rows):
            return SampleResult(tokens, None)
        logits, work = torch.as_tensor(logits), [row.works for row in rows]
        if all(work):
            tokens = _worked(logits, best, tokens, rows)
        elif any(work):
            few = np.flatnonzero(work)
            chosen = logits[torch.as_tensor(few, device=logits.device)]
            tokens[few] = _worked(chosen, best[few], tokens[few], list(compress(rows, work)))
        return SampleResult(tokens, _logprobs(logits, rows, tokens))


def are_likeliest(rows: Sequence[SampleRow]) -> bool:
    """Tell whether each row's token is the likeliest, and nobody asks how likely."""
    return not any([row.works or row.params.logprobs is not None for row in rows])


def _likeliest(logits: Tensor | Logits) -> tuple[Logits, Ids, bool]:
    """Return the highest logit of each row, the lowest id that has it, and whether all of them are finite."""
    if isinstance(logits, np.ndarray):
        return _likeliest_of_array(logits)
    if logits.device.type != "cpu" or logits.dtype != torch.float32:
        values, chosen = logits.max(dim=-1)
        best: Logits = values.to("cpu", torch.float32).numpy()
        return best, chosen.cpu().numpy(), bool(np.isfinite(best).all())
    return _likeliest_of_array(logits.contiguous().numpy())


def _likeliest_of_array(arrays: Logits) -> tuple[Logits, Ids, bool]:
    best, tokens = np.empty(len(arrays), np.float32), np.empty(len(arrays), np.int64)
    finite = likeliest(arrays, arrays.view(np.int32), best, best.view(np.int32), tokens)
    return best, tokens, finite


def _not_finite(best: Logits, rows: Sequence[SampleRow]) -> InvalidLogits:
    bad = np.flatnonzero(~np.isfinite(best)).tolist()
    return InvalidLogits(tuple(dict.fromkeys(rows[place].request_id for place in bad)))


def _worked(logits: Tensor, best: Logits, tokens: Ids, rows: Sequence[SampleRow]) -> Ids:
    """Choose tokens for rows that are more than an argmax of raw logits; `best` and `tokens` are of these."""
    if any(row.shapes for row in rows):
        raw, bound = logits, [place for place, row in enumerate(rows) if row.grammar is not None]
        logits = logits.to("cpu", torch.float32, copy=True, memory_format=torch.contiguous_format)
        arrays = logits.numpy()
        for place, row in enumerate(rows):
            if row.shapes:
                row.shape(arrays[place])
        masks = _forbid(arrays, rows, bound) if bound else None
        best, chosen, _ = _likeliest(logits)
        tokens = np.where(np.isneginf(best), tokens, chosen)
        if masks is not None:
            for place, mask in zip(bound, masks, strict=True):
                if np.isneginf(best[place]):
                    tokens[place] = _likeliest_allowed(raw[place], mask)
    chance = np.array([not row.params.greedy for row in rows]) & ~np.isneginf(best)
    if chance.any():
        logits = logits.to("cpu", torch.float32).contiguous()
        places = np.flatnonzero(chance)
        if len(places) < len(rows):
            logits, best, rows = logits[torch.as_tensor(places)], best[places], list(compress(rows, chance))
        tokens[places] = _drawn(logits, best, rows)
    return tokens


def _forbid(logits: Logits, rows: Sequence[SampleRow], bound: Sequence[int]) -> Masks:
    """Rule out what the grammars of some rows do not allow next; returns their masks."""
    states = [state for place in bound if (state := rows[place].grammar) is not None]
    masks = states[0].tokens.masks(states)
    forbid(logits, np.array(bound), masks)
    return masks


def _likeliest_allowed(logits: Tensor, mask: npt.NDArray[np.int32]) -> int:
    """Return the likeliest token that a grammar allows where nothing is left of it, as end tokens are banned, say."""
    row = logits.to("cpu", torch.float32, copy=True).numpy()[None]
    forbid(row, np.zeros(1, np.int64), mask[None])
    allowed = np.unpackbits(mask.view(np.uint8), bitorder="little")
    return int(row.argmax() if row.max() > -np.inf else allowed.argmax())


def _drawn(logits: Tensor, highest: Logits, rows: Sequence[SampleRow]) -> Ids:
    params = [row.params for row in rows]
    seeds = np.array([row.seed for row in rows], np.uint64)
    numbers = uniforms(seeds, np.array([row.choice for row in rows]), np.array([row.position for row in rows]))
    arrays, tokens = logits.numpy(), np.empty(len(rows), np.int64)
    draw(
        arrays,
        arrays.view(np.int32),
        np.stack([highest, logits.amin(dim=-1).numpy()], axis=1),
        np.array([p.temperature for p in params], np.float32),
        np.array([p.top_k for p in params], np.int64),
        np.array([p.top_p for p in params]),
        np.array([p.min_p for p in params]),
        numbers,
        tokens,
    )
    return tokens


def _logprobs(logits: Tensor, rows: Sequence[SampleRow], tokens: Ids) -> list[dict[int, Logprob] | None] | None:
    asking = [place for place, row in enumerate(rows) if row.params.logprobs is not None]
    if not asking:
        return None
    top = [rows[place].params.logprobs or 0 for place in asking]
    found = token_logprobs(logits[torch.as_tensor(asking, device=logits.device)], tokens[asking].tolist(), top)
    logprobs: list[dict[int, Logprob] | None] = [None] * len(rows)
    for place, entries in zip(asking, found, strict=True):
        logprobs[place] = entries
    return logprobs
