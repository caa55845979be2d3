"""Beam search, one pure function a step: log probabilities in, the live beams of the next step out.

The rules are those of transformers' ``generate(num_beams=…)``, so the texts are the same: of the best continuations
the first `width` may finish, the best unfinished ones live on, and a finished text keeps its place as long as no better
one comes. Scores of finished texts are their log probability divided by length to the power of `length_penalty`
(Wu et al. 2016, "Google's Neural Machine Translation System", with a plain length).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from pagedkv.errors import bad_argument


@dataclass(frozen=True, slots=True, kw_only=True)
class BeamRules:
    """What stays the same through a search.

    Parameters
    ----------
    width : int
        Beams.
    max_tokens : int
        A text ends with so many.
    end_ids : sequence of int
        Tokens that end a text.
    length_penalty : float
    early_stopping : bool or "never"
        True ends the search with `width` finished texts; False when the best live beam, at its length now, is no
        better than the worst finished one; "never" when no live beam can become better.
    """

    width: int
    max_tokens: int
    end_ids: Sequence[int] = ()
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False


@dataclass(frozen=True, slots=True)
class BeamText:
    """A text and how it scores.

    Attributes
    ----------
    token_ids : tuple of int
    score : float
        Log probability divided by length to the power of the penalty.
    ended : bool
        By an end token, not for its length.
    """

    token_ids: tuple[int, ...]
    score: float
    ended: bool


@dataclass(frozen=True, slots=True)
class BeamState:
    """A search between two steps.

    Attributes
    ----------
    texts : tuple of tuple of int
        Of the live beams, the best first.
    scores : tuple of float
        Their log probabilities.
    parents : tuple of int
        Which live beam of the step before each one continues: the forks to make.
    finished : tuple of BeamText
        The best first, at most `width`.
    done : bool
        The search is over.
    """

    texts: tuple[tuple[int, ...], ...]
    scores: tuple[float, ...]
    parents: tuple[int, ...]
    finished: tuple[BeamText, ...] = ()
    done: bool = False


def first_beam() -> BeamState:
    """Return the search before its first step: one live beam, the prompt."""
    return BeamState(texts=((),), scores=(0.0,), parents=(0,))


def next_beams(state: BeamState, log_probs: Tensor, rules: BeamRules) -> BeamState:
    """Continue every live beam by one token.

    Parameters
    ----------
    state : BeamState
    log_probs : float32 [live beams, vocab]
        Log probabilities of the next token; -inf is a token that is ruled out.
    rules : BeamRules

    Returns
    -------
    BeamState

    Raises
    ------
    InvalidOperation
        The search is done, or there is not one row a live beam.
    """
    if state.done:
        raise bad_argument("state", "a search that goes on", "one that is done")
    if log_probs.dim() != 2 or log_probs.shape[0] != len(state.texts):
        raise bad_argument("log_probs", f"[{len(state.texts)}, vocab]", f"{list(log_probs.shape)}")
    length = len(state.texts[0]) + 1
    scores, parents, tokens = _continuations(state, log_probs, rules)
    ends = frozenset(rules.end_ids)
    full = length >= rules.max_tokens
    finished = list(state.finished)
    live: list[int] = []
    for place, token in enumerate(tokens):
        if not (full or token in ends):
            live.append(place)
        elif place < rules.width:
            text = (*state.texts[parents[place]], token)
            finished.append(BeamText(text, _penalised(scores[place], length, rules.length_penalty), token in ends))
    live = live[: rules.width]
    finished.sort(key=lambda text: -text.score)
    after = BeamState(
        texts=tuple((*state.texts[parents[place]], tokens[place]) for place in live),
        scores=tuple(scores[place] for place in live),
        parents=tuple(parents[place] for place in live),
        finished=tuple(finished[: rules.width]),
    )
    return replace(after, done=_is_done(after, length, rules))


def best_texts(state: BeamState, count: int) -> tuple[BeamText, ...]:
    """Return the `count` best finished texts, fewer if there are not so many."""
    return state.finished[:count]


def _continuations(state: BeamState, log_probs: Tensor, rules: BeamRules) -> tuple[list[float], list[int], list[int]]:
    """Return score, live beam and token of the best continuations, best first: enough for `width` that do not end."""
    vocab = log_probs.shape[1]
    sums = (log_probs + torch.tensor(state.scores, dtype=torch.float32, device=log_probs.device)[:, None]).flatten()
    wanted = max(2, 1 + len(frozenset(rules.end_ids))) * rules.width
    scores, places = torch.topk(sums, min(wanted, len(sums)))
    possible = scores > -torch.inf
    scores, places = scores[possible], places[possible]
    return scores.tolist(), (places // vocab).tolist(), (places % vocab).tolist()


def _penalised(score: float, length: int, penalty: float) -> float:
    return float(np.float32(score) / np.float32(length**penalty))


def _is_done(state: BeamState, length: int, rules: BeamRules) -> bool:
    if not state.texts:
        return True
    if len(state.finished) < rules.width:
        return False
    if rules.early_stopping is True:
        return True
    patient = rules.early_stopping == "never" and rules.length_penalty > 0
    best = _penalised(state.scores[0], rules.max_tokens if patient else length, rules.length_penalty)
    return best <= state.finished[-1].score
