"""Streaming through sinks and window, against an oracle that rebuilds everything in every step."""

from __future__ import annotations

import argparse
import copy
import functools
import inspect
import itertools
import math

import pytest
import torch
from tests.hf.described import tiny
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    BloomForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from pagedkv import BlockManager, InvalidOperation, OutOfMemory
from pagedkv.data import forward
from pagedkv.hf import load_runner, streaming
from pagedkv.hf.streaming import StreamingSession, blocks_for_streaming
from pagedkv.models import shipped_model_path

VOCAB = 97
SINKS, WINDOW = 5, 20
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    # Wide weights, so that attention is far from uniform and a key in the wrong place is seen in the logits.
    "initializer_range": 0.2,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Single tokens of small models are done before a second thread has woken up."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def llama(**more):
    return LlamaForCausalLM(LlamaConfig(**SMALL, **more))


def qwen3():
    return Qwen3ForCausalLM(Qwen3Config(**SMALL))


def yarn():
    return llama(rope_parameters=YARN, max_position_embeddings=256)


def mistral(window):
    return MistralForCausalLM(MistralConfig(**SMALL, sliding_window=window))


def gemma2(window):
    return Gemma2ForCausalLM(Gemma2Config(**SMALL, sliding_window=window, query_pre_attn_scalar=16))


def phi():
    return PhiForCausalLM(PhiConfig(**{k: v for k, v in SMALL.items() if k != "head_dim"}))


def built(make, seed=0):
    torch.manual_seed(seed)
    return make().eval()


def random_ids(count, seed=1):
    return torch.randint(0, VOCAB, (count,), generator=torch.Generator().manual_seed(seed))


class Oracle:
    """The paper's formulation, token by token in float64: unrotated keys, all turned anew in every step."""

    def __init__(self, model, sinks, window, *, move_sinks=True):
        self.model = copy.deepcopy(model).double()
        # From the float32 model: double() would not give the digits back, and models compute angles from these.
        self.rotary = model.model.rotary_emb
        self.sinks, self.window, self.move_sinks = sinks, window, move_sinks
        self.keys = [[] for _ in self.model.model.layers]
        self.values = [[] for _ in self.model.model.layers]
        self.seen = 0

    def turned(self, vectors, positions):
        """Turn [n, heads, head_dim] as complex numbers."""
        first, second = vectors.chunk(2, dim=-1)
        angles = positions.double()[:, None] * self.rotary.inv_freq.double()
        turn = torch.polar(torch.full_like(angles, self.rotary.attention_scaling), angles)[:, None]
        product = torch.complex(first, second) * turn
        return torch.cat((product.real, product.imag), -1)

    def positions(self, count):
        positions = torch.arange(count)
        if not self.move_sinks:
            positions[self.sinks :] += self.seen - count
        return positions

    def attended(self, layer, attention, hidden):
        size = attention.head_dim
        query, key, value = (
            projection(hidden).view(1, -1, size)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        if hasattr(attention, "q_norm"):
            query, key = attention.q_norm(query), attention.k_norm(key)
        self.keys[layer].append(key)
        self.values[layer].append(value)
        positions = self.positions(len(self.keys[layer]))
        keys, values = self.turned(torch.cat(self.keys[layer]), positions), torch.cat(self.values[layer])
        group = query.shape[1] // keys.shape[1]
        keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
        scores = torch.einsum("qhd,khd->hk", self.turned(query, positions[-1:]), keys) / math.sqrt(size)
        return attention.o_proj(torch.einsum("hk,khd->hd", scores.softmax(-1), values).reshape(1, -1))

    @torch.inference_mode()
    def step(self, token):
        self.seen += 1
        inner = self.model.model
        hidden = inner.embed_tokens(torch.tensor([int(token)]))
        for number, layer in enumerate(inner.layers):
            hidden = hidden + self.attended(number, layer.self_attn, layer.input_layernorm(hidden))
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        for kept in (*self.keys, *self.values):
            if len(kept) > self.sinks + self.window:
                del kept[self.sinks]
        return self.model.lm_head(inner.norm(hidden))[0]


@functools.cache
def rebuilt_logits(make, count):
    oracle = Oracle(built(make), SINKS, WINDOW)
    return torch.stack([oracle.step(token) for token in random_ids(count)])


@pytest.mark.parametrize("block_size", [1, 3, 16])
@pytest.mark.parametrize("make", [llama, qwen3, yarn], ids=lambda make: make.__name__)
def test_every_step_equals_a_rebuild_at_cache_positions(make, block_size):
    model = built(make)
    # The lowest limit there is: it is crossed about every 21 tokens.
    session = StreamingSession(model, SINKS, WINDOW, block_size=block_size, rebase_at=SINKS + 2 * WINDOW + 1)
    bases = set()
    for number, (token, want) in enumerate(zip(random_ids(300), rebuilt_logits(make, 300), strict=True)):
        torch.testing.assert_close(session.feed([token]).double(), want, atol=1e-4, rtol=0)
        assert session.cache.used_block_count <= blocks_for_streaming(SINKS, WINDOW, block_size)
        bases.add(session._runner.streams.keys.base(0))
        if number % 25 == 0:
            session.cache.check()
    assert session.num_tokens == 300
    assert session.num_dropped == 300 - SINKS - WINDOW
    assert len(bases) > 10


@pytest.mark.parametrize(("sinks", "window"), [(0, 1), (0, 9), (1, 1), (4, 3), (16, 16)])
def test_any_sinks_and_window(sinks, window):
    model = built(llama)
    session = StreamingSession(model, sinks, window, block_size=4)
    oracle = Oracle(model, sinks, window)
    for token in random_ids(80):
        torch.testing.assert_close(session.feed([token]).double(), oracle.step(token), atol=1e-4, rtol=0)
    session.cache.check()


def test_the_shipped_model_equals_a_rebuild():
    model = AutoModelForCausalLM.from_pretrained(shipped_model_path(), dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(shipped_model_path())
    session, oracle = StreamingSession(model, 4, 124), Oracle(model, 4, 124)
    for token in tokenizer(inspect.getsource(argparse))["input_ids"][:400]:
        torch.testing.assert_close(session.feed([token]).double(), oracle.step(token), atol=1e-4, rtol=0)
    assert session._runner.streams.keys.base(0) > 0


def test_the_oracle_sees_sinks_that_stay_behind():
    """The comparison above is worth something: sinks left at their text positions give other logits."""
    model = built(llama)
    right, wrong = Oracle(model, SINKS, WINDOW), Oracle(model, SINKS, WINDOW, move_sinks=False)
    worst = 0.0
    for number, token in enumerate(random_ids(100)):
        difference = (right.step(token) - wrong.step(token)).abs().max().item()
        if number <= SINKS + WINDOW:
            assert difference < 1e-9
        worst = max(worst, difference)
    assert worst > 0.1


@pytest.mark.parametrize(
    "make", [llama, qwen3, yarn, phi, lambda: mistral(26), lambda: gemma2(26)], ids=lambda make: make.__name__
)
def test_positions_that_start_again_change_nothing(make):
    model, ids = built(make), random_ids(300)
    often = StreamingSession(model, SINKS, WINDOW, rebase_at=SINKS + 2 * WINDOW + 1)
    never = StreamingSession(model, SINKS, WINDOW, rebase_at=4096)
    torch.testing.assert_close(often.feed(ids, all_logits=True), never.feed(ids, all_logits=True), atol=2e-4, rtol=0)
    assert never._runner.streams.keys.base(0) == 0 < often._runner.streams.keys.base(0)


@pytest.mark.parametrize(
    "make", [llama, qwen3, yarn, phi, lambda: mistral(64), lambda: gemma2(64)], ids=lambda make: make.__name__
)
def test_equal_to_the_stock_model_until_something_is_dropped(make):
    model, ids = built(make), random_ids(48)
    session = StreamingSession(model, 4, 43)
    with torch.inference_mode():
        want = model(ids[None], use_cache=False).logits[0]
    got = torch.cat((session.feed(ids[:20], all_logits=True), session.feed(ids[20:], all_logits=True)))
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)


def test_a_text_at_once_is_the_text_token_by_token():
    model, ids = built(llama), random_ids(70)
    one, many = StreamingSession(model, SINKS, WINDOW), StreamingSession(model, SINKS, WINDOW)
    at_once = one.feed(ids, all_logits=True)
    single = torch.stack([many.feed([token]) for token in ids])
    assert at_once.shape == (70, VOCAB)
    torch.testing.assert_close(at_once, single, atol=1e-5, rtol=0)
    torch.testing.assert_close(one.feed(ids[:3]), many.feed(ids[:3].tolist()), atol=1e-5, rtol=0)


def test_half_precision_stays_close():
    model, ids = built(llama), random_ids(200)
    exact = StreamingSession(model, SINKS, WINDOW)
    half = StreamingSession(model, SINKS, WINDOW, dtype="bfloat16", rebase_at=SINKS + 2 * WINDOW + 1)
    want = exact.feed(ids, all_logits=True).log_softmax(-1)
    got = half.feed(ids, all_logits=True).log_softmax(-1)
    # No drift: the last tokens are as close as the first ones.
    assert (got - want).abs()[100:].mean() < 2 * (got - want).abs()[:100].mean() < 0.1


# ---------------------------------------------------------------- generate


def test_greedy_text_is_the_stock_text_while_nothing_is_dropped():
    model, ids = built(llama), random_ids(10)
    stock = model.generate(ids[None], max_new_tokens=30, do_sample=False, eos_token_id=None, pad_token_id=0)
    session = StreamingSession(model, 4, 60)
    assert list(session.generate(ids, 30)) == stock[0, 10:].tolist()
    assert session.num_tokens == 40


def test_text_without_end_in_a_fixed_number_of_blocks():
    session = StreamingSession(built(llama), SINKS, WINDOW, block_size=4)
    text = list(itertools.islice(session.generate([1, 2, 3]), 200))
    assert len(text) == 200
    assert session.num_tokens == 203
    assert session.cache.stats.peak_blocks_used <= session.cache.total_blocks == blocks_for_streaming(SINKS, WINDOW, 4)
    session.cache.check()


def test_generation_goes_on_where_it_stopped():
    model = built(llama)
    whole, parts = StreamingSession(model, SINKS, WINDOW), StreamingSession(model, SINKS, WINDOW)
    want = list(whole.generate([7, 8], 60))
    assert [*parts.generate([7, 8], 25), *parts.generate(max_new_tokens=35)] == want


def test_sampler_and_stop_tokens():
    session = StreamingSession(built(llama), SINKS, WINDOW)
    tokens = iter(range(10, 90))
    assert list(session.generate([1], sampler=lambda logits: next(tokens), stop_token_ids=[14])) == [10, 11, 12, 13, 14]
    assert session.num_tokens == 6


@pytest.mark.parametrize("drawn", [VOCAB, -1, 1.0, None])
def test_a_sampler_that_draws_no_token(drawn):
    session = StreamingSession(built(llama), SINKS, WINDOW)
    with pytest.raises(InvalidOperation, match="sampler"):
        next(session.generate([1], sampler=lambda logits: drawn))
    assert session.num_tokens == 1
    drawn_as_tensor = next(session.generate(sampler=lambda logits: torch.tensor(7)))
    assert type(drawn_as_tensor) is int


def test_no_tokens_asked_for():
    session = StreamingSession(built(llama), SINKS, WINDOW)
    assert list(session.generate([1, 2], 0)) == []
    assert session.num_tokens == 2


def test_reset_forgets_everything():
    session, ids = StreamingSession(built(llama), SINKS, WINDOW), random_ids(60)
    first = session.feed(ids)
    session.reset()
    assert session.num_tokens == session.num_dropped == session.cache.used_block_count == 0
    assert torch.equal(session.feed(ids), first)


# ---------------------------------------------------------------- what must not happen


@pytest.mark.parametrize("mode", ["compiled", "ragged"])
@pytest.mark.parametrize("fed", [0, 3, 24, 25, 26, 90])
def test_a_failed_pass_changes_nothing(fed, mode, monkeypatch):
    monkeypatch.setattr(streaming, "load_runner", functools.partial(load_runner, mode=mode))
    model, ids = built(llama), random_ids(120)
    session, twin = (StreamingSession(model, SINKS, WINDOW, block_size=3, rebase_at=46) for _ in range(2))
    for each in (session, twin):
        if fed:
            each.feed(ids[:fed])

    def fail(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        if mode == "compiled":  # modules are not called, and hooks on them refused
            patched.setattr(forward, "run_in_threads", lambda kernel, arguments, *_, **__: fail(kernel(*arguments)))
        else:
            patched.setattr(model.model.layers[1], "forward", fail)
        session.feed([5])
    assert session.num_tokens == fed
    assert model.config._attn_implementation == "sdpa"
    session.cache.check()
    torch.testing.assert_close(
        session.feed(ids[fed:], all_logits=True), twin.feed(ids[fed:], all_logits=True), atol=1e-6, rtol=0
    )


def test_the_model_stays_as_it_was():
    model, ids = built(llama), random_ids(12)
    with torch.inference_mode():
        before = model(ids[None]).logits
        StreamingSession(model, SINKS, WINDOW).feed(ids)
        assert torch.equal(model(ids[None]).logits, before)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("bad", [[-1], [VOCAB], [1.5], [True], ["a"], [], [1, 2, VOCAB], None, 5, [[1]]])
def test_wrong_tokens_change_nothing(bad):
    session = StreamingSession(built(llama), SINKS, WINDOW)
    session.feed([1, 2])
    with pytest.raises(InvalidOperation, match="token_ids"):
        session.feed(bad)
    assert session.num_tokens == 2


def test_generate_refuses_before_it_runs():
    session = StreamingSession(built(llama), SINKS, WINDOW)
    with pytest.raises(InvalidOperation, match="token_ids: expected at least one token"):
        session.generate()
    with pytest.raises(InvalidOperation, match="token_ids"):
        session.generate([VOCAB])
    with pytest.raises(InvalidOperation, match="max_new_tokens"):
        session.generate([1], -1)
    with pytest.raises(InvalidOperation, match="sampler: expected a callable, got 3"):
        session.generate([1], sampler=3)
    for stops in (3, [VOCAB], ["a"]):
        with pytest.raises(InvalidOperation, match="stop_token_ids"):
            session.generate([1], stop_token_ids=stops)
    sizes = f"sink_tokens={SINKS}, window_tokens={WINDOW}"
    assert repr(session) == f"StreamingSession({sizes}, num_tokens=0, num_dropped=0)"


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"sink_tokens": -1}, "sink_tokens"),
        ({"window_tokens": 0}, "window_tokens"),
        ({"window_tokens": 2.5}, "window_tokens"),
        ({"block_size": 0}, "block_size"),
        ({"sink_tokens": 4, "window_tokens": 10, "rebase_at": 24}, "rebase_at"),
        ({"rebase_at": 2**16 + 1}, "rebase_at"),
        ({"dtype": "float8"}, "dtype"),
    ],
)
def test_wrong_arguments(arguments, name):
    with pytest.raises(InvalidOperation, match=name):
        StreamingSession(built(llama), **arguments)


def test_a_pool_that_is_too_small_says_what_it_takes():
    with pytest.raises(OutOfMemory, match="requested 34 blocks, 20 available") as caught:
        StreamingSession(built(llama), 4, 508, block_size=16, num_blocks=20)
    assert (caught.value.requested, caught.value.available) == (34, 20)


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=2))


def bloom():
    return BloomForCausalLM(BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=2))


def cohere():
    return CohereForCausalLM(CohereConfig(**{k: v for k, v in SMALL.items() if k != "head_dim"}))


def deepseek():
    return DeepseekV3ForCausalLM(
        DeepseekV3Config(
            **{k: v for k, v in SMALL.items() if k not in ("head_dim", "num_key_value_heads")},
            num_key_value_heads=4,
            kv_lora_rank=16,
            q_lora_rank=16,
            qk_rope_head_dim=8,
            qk_nope_head_dim=8,
            v_head_dim=8,
            first_k_dense_replace=3,
        )
    )


@pytest.mark.parametrize("make", [gpt2, bloom, cohere, deepseek], ids=lambda make: make.__name__)
def test_other_positions_are_refused(make):
    with pytest.raises(InvalidOperation, match="model: expected .*rotary"):
        StreamingSession(built(make), SINKS, WINDOW)


def test_sink_logits_are_refused():
    small = {**SMALL, "num_local_experts": 2, "num_experts_per_tok": 1}
    model = built(lambda: GptOssForCausalLM(GptOssConfig(**small)))
    with pytest.raises(InvalidOperation, match="plain attention, got s_aux"):
        StreamingSession(model, SINKS, WINDOW)


def test_a_mask_is_not_dropped_in_silence():
    model = built(llama)

    class Masked(LlamaForCausalLM):
        def forward(self, **kwargs):
            size = kwargs["input_ids"].shape[1]
            return super().forward(**kwargs, attention_mask=torch.zeros(1, 1, size, size))

    model.__class__ = Masked
    with pytest.raises(InvalidOperation, match="plain attention, got attention_mask"):
        StreamingSession(model, SINKS, WINDOW)


def test_our_attention_works_in_a_session_only():
    model = built(llama)
    StreamingSession(model, SINKS, WINDOW)
    model.config._attn_implementation = "pagedkv_streaming"
    with pytest.raises(InvalidOperation, match="inside of a StreamingSession only"):
        model(random_ids(3)[None])


def test_a_model_that_hands_no_keyword_arguments_on_to_its_attention_is_refused():
    with pytest.raises(InvalidOperation, match="got none in NemotronAttention"):
        StreamingSession(tiny("nemotron"), SINKS, WINDOW)


def test_frequencies_that_change_with_the_length_are_refused():
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    model = built(lambda: llama(rope_parameters=rope, max_position_embeddings=64))
    with pytest.raises(InvalidOperation, match="model: expected rotary"):
        StreamingSession(model, SINKS, WINDOW, rebase_at=4096)
    StreamingSession(model, SINKS, WINDOW, rebase_at=60)


@pytest.mark.parametrize("make", [mistral, gemma2])
def test_a_sliding_window_of_the_model_that_is_too_short_is_refused(make):
    with pytest.raises(InvalidOperation, match="sliding window, got 25"):
        StreamingSession(built(lambda: make(25)), SINKS, WINDOW)


def test_a_model_in_training_is_refused():
    with pytest.raises(InvalidOperation, match="eval"):
        StreamingSession(llama(), SINKS, WINDOW)
    with pytest.raises(InvalidOperation, match="PreTrainedModel"):
        StreamingSession("model", SINKS, WINDOW)


@pytest.mark.parametrize("block_size", [1, 2, 3, 4, 7, 16])
def test_the_number_of_blocks_is_enough_and_is_reached(block_size):
    for sinks, window in [(0, 1), (0, 16), (1, 7), (4, 20), (5, 32), (16, 16)]:
        manager = BlockManager(100, block_size, prefix_caching=False)
        manager.allocate(0, 0)
        for _ in range(sinks + window + 3 * block_size):
            manager.append(0, 1)
            manager.apply_streaming_llm(0, sinks, window)
        assert manager.stats.peak_blocks_used == blocks_for_streaming(sinks, window, block_size)
