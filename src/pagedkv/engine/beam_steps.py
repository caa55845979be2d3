"""Beam search in the scheduler: the rules choose, sequences are forked, continued and dropped after them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from pagedkv.engine.beam import BeamRules, BeamState, best_texts, first_beam, next_beams
from pagedkv.engine.request import CompletionOutput, Request, Sequence
from pagedkv.engine.scheduler import Scheduler
from pagedkv.engine.text import Detokenizer, end_ids_of


@dataclass(slots=True)
class Beams:
    """A beam search under way.

    Attributes
    ----------
    rules : BeamRules
    state : BeamState
    tokenizer
        For the texts at the end.
    """

    rules: BeamRules
    state: BeamState
    tokenizer: Any


def begin_beams(request: Request, eos_token_ids: frozenset[int], tokenizer: Any) -> Beams:
    """Return the search before its first step."""
    rules = BeamRules(
        width=request.params.beam_width or 1,
        max_tokens=request.max_tokens,
        end_ids=sorted(end_ids_of(request, eos_token_ids)),
        length_penalty=request.params.length_penalty,
    )
    return Beams(rules, first_beam(), tokenizer)


def advance_beams(request: Request, logits: Any, scheduler: Scheduler) -> int:
    """Continue every live beam by one token, or end the search; returns how many tokens were read.

    Parameters
    ----------
    request : Request
        Its sequences are the live beams, in the order of the rows.
    logits : float32 [live beams, vocab]
    scheduler : Scheduler
    """
    beams: Beams = request.beams
    log_probs = torch.log_softmax(logits, dim=-1)
    ends = beams.rules.end_ids
    if len(beams.state.texts[0]) < request.params.min_tokens and len(ends) < log_probs.shape[1]:
        log_probs[:, list(ends)] = -torch.inf
    state = beams.state = next_beams(beams.state, log_probs, beams.rules)
    if state.done:
        for sequence in request.sequences:
            scheduler.drop(sequence)
            sequence.finish_reason = "length"
        return 1
    request.sequences = _descendants(request.sequences, state.parents, scheduler)
    for index, sequence in enumerate(request.sequences):
        sequence.index = index
        sequence.push(state.texts[index][-1])
    return len(state.texts)


def _descendants(old: list[Sequence], parents: tuple[int, ...], scheduler: Scheduler) -> list[Sequence]:
    """Return a sequence for each parent: the parent itself for its first child, forks for the others."""
    for place, sequence in enumerate(old):  # first, so that no more sequences live than there are beams
        if place not in parents:
            scheduler.drop(sequence)
    taken: set[int] = set()
    new = []
    for index, parent in enumerate(parents):
        new.append(scheduler.fork(old[parent], index) if parent in taken else old[parent])
        taken.add(parent)
    return new


def beam_outputs(request: Request, aborted: bool) -> list[CompletionOutput]:
    """Return the best ``n`` texts that are finished, or those that lead where the search was aborted."""
    beams: Beams | None = request.beams
    if beams is None:
        return [CompletionOutput(index=0, text="", token_ids=(), finish_reason="abort" if aborted else None)]
    if aborted:
        leading = beams.state.texts[: request.params.n]
        return [
            CompletionOutput(index=i, text=_text(request, ids), token_ids=ids, finish_reason="abort")
            for i, ids in enumerate(leading)
        ]
    return [
        CompletionOutput(
            index=i,
            text=_text(request, found.token_ids[:-1] if found.ended else found.token_ids),
            token_ids=found.token_ids,
            finish_reason="stop" if found.ended else "length",
            stop_reason=found.token_ids[-1] if found.ended else None,
            cumulative_logprob=found.score * len(found.token_ids) ** request.params.length_penalty,
        )
        for i, found in enumerate(best_texts(beams.state, request.params.n))
    ]


def _text(request: Request, token_ids: tuple[int, ...]) -> str:
    tokenizer = request.beams.tokenizer
    if tokenizer is None:
        return ""
    words = Detokenizer(tokenizer, request.prompt_tuple, skip_special_tokens=request.params.skip_special_tokens)
    return "".join([*map(words.push, token_ids), words.flush()])
