"""The exam at load time: what it finds decides how a model is served, and whether at all."""

from __future__ import annotations

import copy
import functools
import logging

import pytest
import torch
import transformers
from tests.hf.models import GREEDY, build, prompt
from tests.hf.serving import generated

from pagedkv import InvalidOperation
from pagedkv.engine import LLM, RequestRefused, SamplingParams
from pagedkv.hf import PagedCache, generate, load_runner
from pagedkv.hf.exam import LENGTHS, NARROW, WAYS, Exam, sit_exam

NEW = 10
SERVED = {  # mode, and whether prompts are cut
    "llama": ("compiled", True),
    "llama4_tuned": ("gather", True),
    "phi3": ("gather", False),
    "dynamic": ("gather", False),
    "jamba": ("gather", False),
    "deepseek_v32": ("gather", False),
    "glm_moe_dsa": ("gather", False),
    "falcon_h1": ("gather", True),
    "zamba2": ("gather", True),
    "recurrent_gemma": ("gather", False),
}
PECULIAR = [name for name in SERVED if name != "llama"]


@pytest.fixture(autouse=True)
def quiet(caplog):
    caplog.set_level(logging.CRITICAL, "transformers")


def lone(name: str) -> torch.nn.Module:
    """Return a model of its own, whose rotary frequencies nobody has stretched."""
    return copy.deepcopy(build(name))


@functools.cache
def texts() -> list[list[int]]:
    return [prompt(1, length, seed=length)[0].tolist() for length in (57, 5, 25, 31, 32, 33)]


@functools.cache
def expected(name: str) -> list[list[int]]:
    return [generated(lone(name), text, NEW)[len(text) :] for text in texts()]


# ---------------------------------------------------------------- what it decides


@pytest.mark.parametrize("name", SERVED)
def test_the_exam_finds_the_way(name):
    runner = load_runner(build(name), num_blocks=8)
    assert (runner.mode, runner.chunkable) == SERVED[name]
    assert runner.reuses_prefixes == runner.chunkable
    assert runner.has_states == (name in ("falcon_h1", "zamba2", "jamba", "recurrent_gemma"))


@pytest.mark.parametrize(("blocks", "budget"), [(200, 16), (30, 16), (200, 512)])
@pytest.mark.parametrize("name", PECULIAR)
def test_the_engine_writes_what_generate_writes(name, blocks, budget):
    """Prompts beyond the budget and a pool that preempts included."""
    llm = LLM(build(name), num_blocks=blocks, block_size=4, max_batch_tokens=budget, max_num_seqs=4)
    outputs = llm.generate(texts(), SamplingParams(max_tokens=NEW, temperature=0, ignore_eos=True))
    assert [list(output.outputs[0].token_ids) for output in outputs] == expected(name)
    llm.core.runner.cache.check()
    assert llm.core.runner.cache.used_block_count == 0


@pytest.mark.parametrize("name", ["dynamic", "jamba", "deepseek_v32"])
def test_beams_of_what_is_not_cut_are_those_of_generate(name):
    ids = torch.tensor([texts()[2]])
    right = lone(name).generate(ids, attention_mask=torch.ones_like(ids), **GREEDY | dict(num_beams=3))[0]
    params = SamplingParams(max_tokens=GREEDY["max_new_tokens"], beam_width=3, ignore_eos=True)
    llm = LLM(build(name), num_blocks=100, block_size=4, max_batch_tokens=16)
    assert list(llm.generate(texts()[2], params)[0].outputs[0].token_ids) == right[len(texts()[2]) :].tolist()


def test_beams_do_not_follow_where_a_text_begins_anew():
    llm = LLM(build("phi3"), num_blocks=100, block_size=4)
    with pytest.raises(RequestRefused, match="the model begins anew beyond 32"):
        llm.generate(texts()[2], SamplingParams(max_tokens=NEW, beam_width=3, ignore_eos=True))
    with pytest.raises(RequestRefused, match=r"streaming = \(2, 8\), and the model takes prompts whole"):
        llm.generate(texts()[2], SamplingParams(max_tokens=NEW, streaming=(2, 8)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_failed_proof_is_never_served(dtype):
    """A model of one's own that adds to a lone token what it saw last, of whatever text: a few tokens of an exam."""
    model, last = lone("llama").to(dtype), []

    def remember(module, args, out):
        new = out + last[-1] if last and out.shape[1] == 1 else out
        last.append(new[:, -1:])
        return new

    model.model.embed_tokens.register_forward_hook(remember)
    with pytest.raises(InvalidOperation, match="no cache is right for LlamaForCausalLM: its logits are off by"):
        load_runner(model, num_blocks=8, mode="gather")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("minimax", "MiniMax uses cache of its own"),
        ("deepseek_v4", "layers keep DeepseekV4HCACache"),
        ("both_ways", "use_bidirectional_attention=True: its tokens see later ones"),
    ],
)
def test_a_model_is_refused_with_the_true_reason(name, reason):
    with pytest.raises(InvalidOperation, match=reason):
        LLM(build(name), num_blocks=8)


def test_a_model_that_needs_more_than_token_ids_is_refused_in_words():
    model = lone("llama")
    model.model.embed_tokens.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(InvalidOperation, match="computes logits of token ids alone, got LlamaForCausalLM: division"):
        load_runner(model, num_blocks=8)


def test_a_model_that_looks_ahead_is_found_out():
    model = lone("llama")
    model.model.embed_tokens.register_forward_hook(lambda module, args, out: out + out.roll(-1, dims=1))
    with pytest.raises(InvalidOperation, match="expected a causal one"):
        load_runner(model, num_blocks=8)


def test_a_model_that_rounding_takes_far_is_not_called_wrong(monkeypatch):
    """Weights so large that a model in bfloat16 is 0.04 to 0.1 from itself with another attention."""
    torch.manual_seed(0)
    shape = dict(hidden_size=192, intermediate_size=512, num_attention_heads=3, num_key_value_heads=3, vocab_size=999)
    config = transformers.LlamaConfig(num_hidden_layers=30, initializer_range=0.12, **shape)
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval()
    exam = Exam(model, 8, None)
    assert 0.03 < exam._own_noise() < 0.2
    assert sit_exam(model).way == WAYS[0]
    off = exam._plain * 1.06
    assert exam.distance(off, exam._plain, model.dtype) == ""
    exam._noise = 0.0
    assert (
        exam.distance(off, exam._plain, model.dtype)
        == "its logits are off by 0.06 of their size, expected at most 0.05"
    )
    exam._noise = 9.0
    assert "expected at most 0.2" in exam.distance(exam._plain * 1.3, exam._plain, model.dtype)


# ---------------------------------------------------------------- how it is sat


@pytest.mark.parametrize("name", ["mistral", "llama4_tuned", "deepseek_v32"])
def test_long_windows_are_narrow_for_the_exam_alone(name):
    model = lone(name)
    text = model.config.get_text_config(decoder=True)
    long = {each: 10_000 for each in LENGTHS if isinstance(getattr(text, each, None), (int, float))}
    assert long
    for each, length in long.items():
        setattr(text, each, length)
    seen = []
    model.register_forward_pre_hook(lambda *_: seen.append({each: getattr(text, each) for each in long}))
    sit_exam(model)
    assert seen and all(one == dict.fromkeys(long, NARROW) for one in seen)
    assert {each: getattr(text, each) for each in long} == long


def test_the_exam_is_short():
    """A few hundred tokens, so that a model of 135M parameters takes a second."""
    tokens, model = [], lone("llama")
    model.model.embed_tokens.register_forward_hook(lambda module, args, out: tokens.append(args[0].numel()))
    sit_exam(model)
    assert sum(tokens) < 250


# ---------------------------------------------------------------- PagedCache


def test_the_first_pass_of_a_fresh_cache_counts_no_token_twice():
    """Layers that ask how long they are, before they have a place in the pool."""
    model, ids = build("llama4_tuned"), prompt(1, 40)
    scaled = lone("llama4_tuned")
    for module in [scaled.config, *scaled.modules()]:
        if hasattr(module, "floor_scale"):
            module.floor_scale, module.attn_scale = 4, 0.5
    for each in (model, scaled):
        with torch.no_grad():
            right = each(ids, use_cache=False).logits
            got = each(ids, past_key_values=PagedCache(each.config, num_blocks=64, block_size=4)).logits
        torch.testing.assert_close(got, right)


@pytest.mark.parametrize("name", ["lfm2", "jamba", "falcon_h1", "deepseek_v32", "zamba2", "recurrent_gemma"])
def test_a_cache_serves_any_number_of_rows_after_another(name):
    cache = PagedCache(build(name).config, num_blocks=120, block_size=4)
    for rows, beams in ((1, 1), (3, 1), (1, 3), (2, 1)):
        ids = prompt(rows, 20, seed=rows)
        options = GREEDY | dict(num_beams=beams, attention_mask=torch.ones_like(ids))
        assert torch.equal(generate(build(name), ids, cache, **options), build(name).generate(ids, **options))


def test_a_cache_is_for_causal_models():
    with pytest.raises(InvalidOperation, match="config: expected a causal model, got Gemma3TextConfig"):
        PagedCache(build("both_ways").config)


def test_what_no_cache_of_transformers_serves_is_refused_in_words():
    model, ids = build("minimax"), prompt(1, 9)
    with pytest.raises(InvalidOperation, match="right over a PagedCache, got MiniMaxForCausalLM: MiniMax uses cache"):
        generate(model, ids, PagedCache(model.config), attention_mask=torch.ones_like(ids), **GREEDY)


def test_prefixes_are_not_reused_where_the_exam_finds_them_wrong():
    """A model of one's own that gives the first token of a pass more weight."""
    model, cache = lone("llama"), PagedCache(build("llama").config, num_blocks=64, block_size=4)

    def stress(module, args, out):
        return torch.cat([out[:, :1] * 3, out[:, 1:]], dim=1) if out.shape[1] > 1 else out

    model.model.embed_tokens.register_forward_hook(stress)
    for length in (20, 40):
        ids = prompt(1, 40)[:, :length]
        options = GREEDY | dict(attention_mask=torch.ones_like(ids))
        assert torch.equal(generate(model, ids, cache, **options), model.generate(ids, **options))
        assert cache.num_cached_tokens == 0


def test_a_model_sits_the_exam_of_a_cache_once():
    model, passes, ids = lone("llama"), [], prompt(1, 9)
    model.register_forward_pre_hook(lambda *_: passes.append(1))
    counts = []
    for _ in range(2):
        before = len(passes)
        generate(model, ids, PagedCache(model.config, num_blocks=32), attention_mask=torch.ones_like(ids), **GREEDY)
        counts.append(len(passes) - before)
    assert counts[0] > counts[1] == GREEDY["max_new_tokens"]


@pytest.mark.parametrize("family", ["OpenAIGPT", "XLM", "Rwkv"])
def test_a_model_that_takes_no_cache_is_refused_in_words(family: str) -> None:
    sizes = {
        "OpenAIGPT": {"n_embd": 32, "n_layer": 2, "n_head": 2},
        "XLM": {"emb_dim": 32, "n_layers": 2, "n_heads": 2},
    }
    config = getattr(transformers, f"{family}Config")(
        vocab_size=97, **sizes.get(family, {"hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32})
    )
    kind = {"OpenAIGPT": "OpenAIGPTLMHeadModel", "XLM": "XLMWithLMHeadModel", "Rwkv": "RwkvForCausalLM"}[family]
    model = getattr(transformers, kind)(config).eval()
    with pytest.raises(InvalidOperation, match=r"model: expected one whose forward\(\) takes past_key_values"):
        sit_exam(model)
    paged = PagedCache(transformers.LlamaConfig(num_hidden_layers=2), num_blocks=8)
    with pytest.raises(InvalidOperation, match="takes past_key_values"):
        generate(model, torch.tensor([[1, 2, 3]]), paged)
