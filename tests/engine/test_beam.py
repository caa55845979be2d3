from __future__ import annotations

import dataclasses

import pytest
import torch
from tests.hf.models import build
from torch import Tensor
from transformers import PreTrainedModel

from pagedkv.engine.beam import BeamRules, BeamState, BeamText, best_texts, first_beam, next_beams
from pagedkv.errors import InvalidOperation

PROMPT = [5, 17, 3, 88, 41, 2]


def search(model: PreTrainedModel, rules: BeamRules) -> BeamState:
    """Beam search with nothing but the step under test and whole forward passes."""
    state = first_beam()
    while not state.done:
        with torch.inference_mode():
            logits = model(torch.tensor([[*PROMPT, *text] for text in state.texts])).logits[:, -1].float()
        state = next_beams(state, torch.log_softmax(logits, dim=-1), rules)
    return state


def expected(model: PreTrainedModel, rules: BeamRules) -> tuple[list[list[int]], list[float]]:
    ends = list(rules.end_ids)
    with torch.inference_mode():
        out = model.generate(
            torch.tensor([PROMPT]),
            attention_mask=torch.ones(1, len(PROMPT), dtype=torch.int64),
            num_beams=rules.width,
            num_return_sequences=rules.width,
            do_sample=False,
            max_new_tokens=rules.max_tokens,
            length_penalty=rules.length_penalty,
            early_stopping=rules.early_stopping,
            eos_token_id=ends or None,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_scores=True,
        )
    texts = []
    for row, parents in zip(out.sequences.tolist(), out.beam_indices.tolist(), strict=True):
        texts.append(row[len(PROMPT) : len(PROMPT) + sum(parent >= 0 for parent in parents)])
    return texts, out.sequences_scores.tolist()


def ends_of(model: PreTrainedModel, count: int) -> list[int]:
    """Tokens that come up early: the likeliest ones after the prompt but for the first few."""
    with torch.inference_mode():
        logits = model(torch.tensor([PROMPT])).logits[0, -1]
    return logits.topk(3 + count)[1][3:].tolist()


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize(
    ("width", "ends", "penalty"), [(2, 1, 1.0), (4, 8, 1.0), (5, 20, 0.0), (3, 12, 2.0), (3, 6, -1.0)]
)
def test_the_same_texts_and_scores_as_transformers(name, early_stopping, width, ends, penalty):
    model = build(name)
    rules = BeamRules(
        width=width,
        max_tokens=14,
        end_ids=ends_of(model, ends),
        length_penalty=penalty,
        early_stopping=early_stopping,
    )
    texts, scores = expected(model, rules)
    found = best_texts(search(model, rules), width)
    assert [list(text.token_ids) for text in found] == texts
    assert [text.score for text in found] == pytest.approx(scores, rel=1e-5)
    assert all(text.ended == (text.token_ids[-1] in rules.end_ids) for text in found)


def test_without_end_tokens_all_texts_are_as_long_as_allowed():
    model = build("llama")
    rules = BeamRules(width=4, max_tokens=9)
    found = best_texts(search(model, rules), 4)
    assert [list(text.token_ids) for text in found] == expected(model, rules)[0]
    assert {len(text.token_ids) for text in found} == {9} and not any(text.ended for text in found)


def log_probs(*rows: list[float]) -> Tensor:
    return torch.log(torch.tensor(rows))


def test_one_beam_is_greedy():
    state = next_beams(first_beam(), log_probs([0.1, 0.6, 0.3]), BeamRules(width=1, max_tokens=9, end_ids=[0]))
    assert (state.texts, state.parents, state.done) == (((1,),), (0,), False)
    state = next_beams(state, log_probs([0.7, 0.1, 0.2]), BeamRules(width=1, max_tokens=9, end_ids=[0]))
    assert [text.token_ids for text in state.finished] == [(1, 0)] and state.done


def test_a_step_changes_nothing_it_was_given_and_says_which_beams_to_fork():
    rules = BeamRules(width=2, max_tokens=9)
    state = next_beams(first_beam(), log_probs([0.5, 0.4, 0.1]), rules)
    before, given = dataclasses.replace(state), log_probs([0.4, 0.3, 0.3], [0.1, 0.1, 0.8])
    copy = given.clone()
    after = next_beams(state, given, rules)
    assert state == before and torch.equal(given, copy)
    assert (after.texts, after.parents) == (((1, 2), (0, 0)), (1, 0))  # 0.32 and 0.2


def test_tokens_that_are_ruled_out_are_never_continued():
    rules = BeamRules(width=3, max_tokens=9, end_ids=[2])
    state = next_beams(first_beam(), log_probs([1.0, 0.0, 0.0]), rules)
    assert state.texts == ((0,),) and not state.done
    state = next_beams(state, log_probs([0.0, 0.0, 1.0]), rules)
    assert state.done and state.finished == (BeamText((0, 2), 0.0, True),)


def test_refusals():
    rules = BeamRules(width=2, max_tokens=1)
    state = next_beams(first_beam(), log_probs([0.5, 0.5]), rules)
    assert state.done
    with pytest.raises(InvalidOperation, match="state"):
        next_beams(state, log_probs([0.5, 0.5]), rules)
    with pytest.raises(InvalidOperation, match=r"log_probs: expected \[1, vocab\], got \[2, 2\]"):
        next_beams(first_beam(), log_probs([0.5, 0.5], [0.5, 0.5]), rules)
