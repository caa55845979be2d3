from __future__ import annotations

import random

import pytest
import torch
from transformers import AutoTokenizer

from pagedkv.cli.generate import TextPieces, TokenStreamer, make_sampler
from pagedkv.models import shipped_model_path

TEXTS = ["def f(x):\n    return x\n", "naïve café — 東京 🚀🚀 ∑ \t\r\n", " leading", "", "🧑‍🚀" * 5]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(shipped_model_path(), local_files_only=True)


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_put_together_are_the_text(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = TextPieces(tokenizer.decode)
    assert "".join(map(pieces.add, ids)) + pieces.flush() == text


def test_no_piece_ends_inside_of_a_character(tokenizer):
    ids = tokenizer("🚀東", add_special_tokens=False)["input_ids"]
    assert len(ids) > 2  # its characters take several tokens each, or this shows nothing
    pieces = TextPieces(tokenizer.decode)
    shown = [pieces.add(token) for token in ids]
    assert [piece for piece in shown if piece] == ["🚀", "東"]


def test_bytes_that_are_no_text_come_out_at_the_end_as_the_decoder_shows_them(tokenizer):
    half = tokenizer("🚀", add_special_tokens=False)["input_ids"][:-1]
    pieces = TextPieces(tokenizer.decode)
    assert [pieces.add(token) for token in half] == [""] * len(half)
    assert pieces.flush() == tokenizer.decode(half) != ""


def test_random_tokens_lose_nothing(tokenizer):
    """Pieces may differ from one decode of everything only where bytes are no text."""
    numbers = random.Random(0)
    for _ in range(50):
        ids = [numbers.randrange(3, len(tokenizer)) for _ in range(30)]
        pieces = TextPieces(tokenizer.decode)
        told = "".join(map(pieces.add, ids)) + pieces.flush()
        assert told.replace("\\ufffd", "") == tokenizer.decode(ids).replace("\\ufffd", "")


def collect(values: list[torch.Tensor], stops=()) -> list[str]:
    shown: list[str] = []
    streamer = TokenStreamer(TextPieces(lambda ids: "".join(map(chr, ids))), stops, shown.append)
    for value in values:
        streamer.put(value)
    streamer.end()
    return shown


def test_the_prompt_is_not_shown_and_the_first_row_is():
    assert collect([torch.tensor([[1, 2, 3]]), torch.tensor([97, 120]), torch.tensor([98, 121])]) == ["a", "b"]


def test_drafted_tokens_come_several_at_a_time():
    assert collect([torch.tensor([[1]]), torch.tensor([[97, 98]]), torch.tensor([[99]])]) == ["a", "b", "c"]


def test_nothing_is_shown_from_the_stop_token_on():
    values = [torch.tensor([[1]]), *(torch.tensor([number]) for number in (97, 7, 98, 98))]
    assert collect(values, stops={7}) == ["a"]


# ---------------------------------------------------------------- sampling


def draws(count: int = 300, **options) -> list[int]:
    sampler = make_sampler(**({"temperature": 1.0, "top_p": 1.0, "seed": 0} | options))
    logits = torch.log(torch.tensor([0.1, 0.5, 0.3, 0.1]))
    return [sampler(logits) for _ in range(count)]


def test_temperature_zero_takes_the_likeliest():
    assert set(draws(temperature=0)) == {1}


def test_the_same_seed_draws_the_same_and_another_one_does_not():
    assert draws(seed=1) == draws(seed=1) != draws(seed=2)


@pytest.mark.parametrize(("top_p", "drawn"), [(0.4, {1}), (0.5, {1}), (0.6, {1, 2}), (1.0, {0, 1, 2, 3})])
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p, drawn):
    assert set(draws(top_p=top_p)) == drawn


def test_a_low_temperature_sharpens():
    assert draws(temperature=0.3).count(1) > draws(temperature=1.0).count(1) > draws(temperature=10.0).count(1)
