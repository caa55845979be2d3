"""The shipped model: always there, small enough, exact with any text, and no worse than it was measured."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from pagedkv.models import shipped_model_path

FOLDER_BYTES = 8_000_000
NATS_PER_BYTE = 0.75

# Written for this test, so that the model cannot have learned it.
SAMPLE = '''\
"""Count how often words follow each other in a text."""

import argparse
import collections
import sys


class Chain:
    """Remember which word came after which."""

    def __init__(self, order=1):
        if order < 1:
            raise ValueError("order must be at least 1, got %d" % order)
        self.order = order
        self.counts = collections.defaultdict(collections.Counter)

    def feed(self, words):
        """Take in a sequence of words."""
        for i in range(len(words) - self.order):
            key = tuple(words[i:i + self.order])
            self.counts[key][words[i + self.order]] += 1

    def most_common(self, key):
        if key not in self.counts:
            return None
        return self.counts[key].most_common(1)[0][0]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("filename", help="the text to read")
    parser.add_argument("--order", type=int, default=1)
    args = parser.parse_args(argv)
    with open(args.filename, encoding="utf-8") as f:
        words = f.read().split()
    chain = Chain(args.order)
    chain.feed(words)
    for key, counter in sorted(chain.counts.items()):
        print(" ".join(key), counter.most_common(3))
    return 0


if __name__ == "__main__":
    sys.exit(main())
'''


@pytest.fixture(scope="module", autouse=True)
def offline():
    """Let nothing reach a network: what loads here loads anywhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("socket.socket.connect", _refuse)
        yield


def _refuse(*_):
    raise OSError("the shipped model must load without a network")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(shipped_model_path())


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(shipped_model_path()).eval()


def test_folder_is_complete_and_small():
    files = {path.name: path.stat().st_size for path in shipped_model_path().iterdir()}
    wanted = "config.json generation_config.json model.safetensors tokenizer.json tokenizer_config.json MODEL_CARD.md"
    assert set(wanted.split()) <= set(files)
    assert sum(files.values()) <= FOLDER_BYTES


def test_finding_the_folder_does_not_import_torch():
    code = (
        "import sys, pagedkv.models as m; print(m.shipped_model_path(), *({'torch', 'transformers'} & {*sys.modules}))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == str(shipped_model_path())


def test_every_stored_tensor_is_bfloat16():
    with safe_open(shipped_model_path() / "model.safetensors", framework="pt") as file:
        dtypes = {file.get_tensor(name).dtype for name in file.keys()}
    assert dtypes == {torch.bfloat16}


def test_loads_as_it_was_stored(model):
    assert model.dtype == torch.bfloat16
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_has_grouped_query_heads_and_a_long_context(model):
    config = model.config
    assert config.model_type == "llama"
    assert config.num_attention_heads > config.num_key_value_heads > 1
    assert config.max_position_embeddings >= 4096


def test_model_and_tokenizer_agree(model, tokenizer):
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer.bos_token_id == model.config.bos_token_id == model.generation_config.bos_token_id
    assert tokenizer.eos_token_id == model.config.eos_token_id == model.generation_config.eos_token_id
    assert tokenizer.pad_token_id is not None


def test_a_prompt_begins_with_bos(tokenizer):
    assert tokenizer("x = 1")["input_ids"][0] == tokenizer.bos_token_id
    assert tokenizer("")["input_ids"] == [tokenizer.bos_token_id]


def _round_trip(tokenizer, text):
    return tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True)


@given(st.text())
def test_any_text_comes_back(tokenizer, text):
    assert _round_trip(tokenizer, text) == text


@given(st.text(alphabet=" \t\r\n\f.#:x_1", max_size=80))
def test_any_indentation_comes_back(tokenizer, text):
    assert _round_trip(tokenizer, text) == text


def test_every_byte_is_in_the_vocabulary(tokenizer):
    pieces = json.loads((shipped_model_path() / "tokenizer.json").read_text())["model"]["vocab"]
    assert sum(len(piece) == 1 for piece in pieces) == 256
    # All code points of one and two bytes, and some of each leading byte of three and four: every byte of UTF-8.
    points = [
        *range(0x800),
        *range(0x800, 0xD800, 0x400),
        *range(0xE000, 0x10000, 0x400),
        *range(0x10000, 0x110000, 0x1000),
    ]
    text = "".join(map(chr, points))
    assert _round_trip(tokenizer, text) == text


def test_newline_and_indentation_are_one_token(tokenizer):
    ids = tokenizer.encode("\n        ", add_special_tokens=False)
    assert len(ids) == 1


@torch.inference_mode()
def _nats(model, ids):
    logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
    return torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum").item()


def test_predicts_python_it_has_never_seen(model, tokenizer):
    ids = torch.tensor(tokenizer.encode(SAMPLE))
    per_byte = _nats(model, ids) / len(SAMPLE.encode())
    assert 0.0 < per_byte < NATS_PER_BYTE


def test_predicts_code_better_than_its_shuffled_tokens(model, tokenizer):
    ids = torch.tensor(tokenizer.encode(SAMPLE))
    order = torch.randperm(len(ids) - 1, generator=torch.Generator().manual_seed(0)) + 1
    shuffled = torch.cat([ids[:1], ids[order]])
    assert _nats(model, ids) < 0.6 * _nats(model, shuffled)


def test_long_prompts_do_not_fall_apart(model, tokenizer):
    """Past the window of most of its training the model still predicts far better than chance."""
    ids = torch.tensor(tokenizer.encode(SAMPLE * 5))[:2000]
    with torch.inference_mode():
        logits = model(input_ids=ids[None], use_cache=False).logits[0, 1500:-1].float()
    assert torch.nn.functional.cross_entropy(logits, ids[1501:]).item() < 0.5 * math.log(len(tokenizer))


@torch.inference_mode()
def test_greedy_text_is_the_same_every_time(model, tokenizer):
    inputs = tokenizer("def fibonacci(n):", return_tensors="pt", return_token_type_ids=False)
    first, second = (model.generate(**inputs, max_new_tokens=16, do_sample=False) for _ in range(2))
    assert first.shape == (1, inputs["input_ids"].shape[1] + 16) or first[0, -1] == tokenizer.eos_token_id
    assert torch.equal(first, second)
    assert tokenizer.decode(first[0], skip_special_tokens=True).startswith("def fibonacci(n):")
