"""The compiled runner: the logits of the module, the tokens of generate(), and the same bits however a text is cut."""

from __future__ import annotations

import copy
import gc
import warnings

import numpy as np
import pytest
import torch
from tests.hf.described import FAMILIES, right_logits, tiny
from tests.hf.serving import WHOLE, generated, serve
from transformers import AutoModelForCausalLM

from pagedkv import InvalidOperation
from pagedkv.data.weights import quantised_rows
from pagedkv.engine import LLM, SamplingParams
from pagedkv.hf import ModelRunner, block_format, load_runner
from pagedkv.hf.compat import Conv1D
from pagedkv.hf.pool import ModelKvCache

NEW = 8


def runner_of(name: str, dtype: torch.dtype = torch.float32, **options: object) -> ModelRunner:
    return load_runner(tiny(name, dtype), **{"num_blocks": 200, "block_size": 4, "mode": "compiled", **options})


def texts(vocab_size: int) -> list[list[int]]:
    """Six prompts of 1 to 60 tokens, most of which begin alike."""
    ids = np.random.default_rng(1).integers(0, vocab_size, 100).tolist()
    return [ids[:20] + ids[20 + n : 20 + 2 * n] for n in (1, 9, 30, 40)] + [ids[3:4], ids[:20]]


def logits_of(runner: ModelRunner, text: list[int], cut: int) -> torch.Tensor:
    """Return the logits of all tokens of a text, computed in chunks."""
    parts = []
    for first in range(0, len(text), cut):
        ids = text[first : first + cut]
        if first:
            runner.cache.append(7, len(ids))
        else:
            runner.cache.allocate(7, len(ids))
        plan = runner.cache.plan([7])
        parts.append(runner.forward(plan, ids, np.arange(len(ids))))
        runner.cache.commit(plan)
    runner.cache.free(7)
    return torch.cat(parts)


def distance(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_the_module(name):
    runner = runner_of(name)
    for text in texts(runner.vocab_size)[:4]:
        expected = right_logits(tiny(name), torch.tensor(text))
        assert distance(logits_of(runner, text, WHOLE), expected) < 1e-4


@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_are_those_of_generate(name):
    runner, model = runner_of(name), tiny(name)
    prompts = texts(runner.vocab_size)
    for chunk, drafts in ((WHOLE, 0), (7, 3)):
        served = serve(runner, prompts, NEW, chunk=chunk, drafts=drafts)
        assert [each.text for each in served] == [generated(model, prompt, NEW) for prompt in prompts]
    runner.cache.check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss", "gpt_neox", "qwen3_moe"])
def test_cuts_change_no_bit(name, dtype):
    runner = runner_of(name, dtype)
    text = texts(runner.vocab_size)[3]
    whole = logits_of(runner, text, WHOLE)
    for cut in (1, 3, 17):
        assert torch.equal(logits_of(runner, text, cut), whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "stablelm"])
def test_half_precision_is_near_what_float32_gives(name, dtype):
    """Of the same weights, whose rounding in the module itself is several times as much; so no exam is sat."""
    runner = ModelRunner(tiny(name, dtype), ModelKvCache(200, 4, num_layers=0), "compiled")
    text = texts(runner.vocab_size)[2]
    exact, limit = right_logits(copy.deepcopy(tiny(name, dtype)).float(), torch.tensor(text)), 2e-2
    if "moe" in name:  # rounding decides ties between experts, in the module as here
        limit = max(limit, distance(right_logits(tiny(name, dtype), torch.tensor(text)).float(), exact))
    assert distance(logits_of(runner, text, WHOLE), exact) < limit


# Weights in 8 bits.


def dequantised(name: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """Return a copy of a model whose matrices are what int8 makes of them."""
    model = copy.deepcopy(tiny(name, dtype)).float()
    transposed = {id(module.weight) for module in model.modules() if isinstance(module, Conv1D)}
    for key, parameter in model.named_parameters():
        if parameter.dim() < 2 or any(part in key for part in ("bias", "embed_positions", "wpe")):
            continue
        turned = id(parameter) in transposed or (name == "gpt_oss" and parameter.dim() == 3)
        matrices = parameter.data.mT if turned else parameter.data
        for matrix in matrices.reshape(-1, *matrices.shape[-2:]) if matrices.dim() == 3 else [matrices]:
            numbers, scales = quantised_rows(matrix)
            matrix.copy_(numbers.float() * scales[:, None])
    return model


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gemma3", "gpt_oss", "qwen3_moe", "phi"])
def test_logits_of_int8_weights_are_those_of_their_values(name):
    runner = runner_of(name, weights="int8")
    for text in texts(runner.vocab_size)[1:3]:
        expected = right_logits(dequantised(name), torch.tensor(text))
        assert distance(logits_of(runner, text, WHOLE), expected) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_cuts_change_no_bit_of_int8_weights(name, dtype):
    runner = runner_of(name, dtype, weights="int8")
    text = texts(runner.vocab_size)[3]
    whole = logits_of(runner, text, WHOLE)
    for cut in (1, 3, 17):
        assert torch.equal(logits_of(runner, text, cut), whole)


def test_a_given_module_is_kept_intact():
    model = copy.deepcopy(tiny("llama"))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    ids = torch.tensor(texts(100)[2])
    logits = right_logits(model, ids)
    runner = load_runner(model, num_blocks=50, weights="int8")
    logits_of(runner, ids.tolist(), WHOLE)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert torch.equal(right_logits(model, ids), logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gemma3", "gpt_oss", "qwen3_moe", "phi", "gpt_neox", "phi3"])
def test_a_folders_weights_are_packed_and_change_no_bit(name, dtype, tmp_path):
    tiny(name, dtype).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    kept, own = (load_runner(given, num_blocks=200, block_size=4) for given in (model, tmp_path))
    assert own.mode == "compiled"
    for text in texts(kept.vocab_size):
        assert torch.equal(logits_of(own, text, WHOLE), logits_of(kept, text, WHOLE))
        assert torch.equal(logits_of(own, text, 7), logits_of(kept, text, WHOLE))
    with pytest.raises(InvalidOperation, match="model: expected one that has its weights"):
        own.model(torch.tensor([[1]]))


def live_bytes(dtype: torch.dtype) -> int:
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some objects warn when they are looked at
        tensors = [each for each in gc.get_objects() if isinstance(each, torch.Tensor) and each.dtype == dtype]
    return sum({each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}.values())


def test_a_folder_lets_go_of_its_own_weights(tmp_path):
    tiny("qwen3_moe", torch.bfloat16).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    before = live_bytes(torch.bfloat16)
    runner = load_runner(tmp_path, num_blocks=50, block_size=4, weights="int8")
    own = sum(parameter.nbytes for parameter in model.parameters())
    pool = runner.bytes_per_block * runner.cache.total_blocks
    assert live_bytes(torch.bfloat16) - before <= pool + own // 20
    text = texts(runner.vocab_size)[2]
    kept = load_runner(model, num_blocks=50, block_size=4, weights="int8")
    assert torch.equal(logits_of(runner, text, WHOLE), logits_of(kept, text, WHOLE))
    with pytest.raises(InvalidOperation, match="model: expected one that has its weights"):
        runner.model(torch.tensor([[1]]))
    with pytest.raises(InvalidOperation, match="model: expected one that has its weights"):
        block_format(runner.model, runner.cache)


def test_a_model_in_int8_still_streams(tmp_path):
    model = tiny("llama")
    model.save_pretrained(tmp_path)
    texts_of = []
    for given in (tmp_path, model):
        runner = load_runner(given, num_blocks=50, block_size=4, weights="int8")
        runner.require_streaming(4, 20)
        text = texts(runner.vocab_size)[2]
        runner.cache.allocate(0, len(text))
        plan = runner.cache.plan([0])
        runner.forward(plan, text, [0])
        runner.cache.commit(plan)
        runner.cache.apply_streaming_llm(0, 4, 20)
        runner.cache.append(0, 1)
        plan = runner.cache.plan([0])
        texts_of.append(runner.forward(plan, [5], [0]))
    assert torch.equal(*texts_of)


def test_blocks_of_int8_weights_are_others(tmp_path):
    model = tiny("llama")
    model.save_pretrained(tmp_path)
    plain, kept, own = (
        load_runner(given, num_blocks=50, block_size=4, weights=weights)
        for given, weights in ((model, None), (model, "int8"), (tmp_path, "int8"))
    )
    prints = [runner.block_format().fingerprint for runner in (plain, kept, own)]
    assert prints[0] == block_format(model, plain.cache).fingerprint
    assert prints[1] == prints[2] != prints[0]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"weights": "int4"}, "weights: expected None or 'int8', got 'int4'"),
        ({"weights": 8}, "weights: expected None or 'int8', got 8"),
        ({"weights": "int8", "mode": "ragged"}, "mode: expected 'auto' or 'compiled' for weights in int8"),
        ({"weights": "int8", "kv_dtype": "int8"}, "kv_dtype: expected one that is not quantised"),
    ],
)
def test_what_int8_weights_are_not_for_is_refused(options, message):
    with pytest.raises(InvalidOperation, match=message):
        runner_of("llama", **{"mode": "auto", **options})


def test_a_model_that_is_not_compiled_keeps_its_weights():
    with pytest.raises(InvalidOperation, match="weights: expected None, got 'int8', and mode 'compiled' is not for"):
        load_runner(tiny("other_activation"), num_blocks=50, weights="int8")


def test_an_engine_writes_with_int8_weights(tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    prompt = texts(100)[2]
    params = SamplingParams(max_tokens=NEW, temperature=0, ignore_eos=True)
    with LLM(tmp_path, weights="int8", num_blocks=50) as llm:
        ids = llm.generate(prompt, params)[0].outputs[0].token_ids
    assert list(ids) == generated(dequantised("llama"), prompt, NEW)[len(prompt) :]
