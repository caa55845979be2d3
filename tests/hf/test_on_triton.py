"""A model over blocks that Triton's kernels write and read, as on a GPU; here in the interpreter."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pagedkv.data import attention, storage
from pagedkv.hf import load_runner

pytest.importorskip("triton")


def logits(model, calls, **options):
    """Two prompts in one batch, a fork, and three steps of what they choose."""
    runner = load_runner(model, num_blocks=32, block_size=4, mode="ragged", batch_invariant=False, **options)
    calls.clear()  # the exam's
    cache, prompts = runner.cache, {1: list(range(9)), 2: list(range(20, 25))}
    for seq_id, ids in prompts.items():
        cache.allocate(seq_id, ids)
    plan = cache.plan([1, 2])
    seen = [runner.forward(plan, sum(prompts.values(), []), np.array([8, 13]))]
    cache.commit(plan)
    runner.fork(1, 3)
    cache.fork(1, 3)
    seen[0] = seen[0][[0, 1, 0]]
    for step in range(3):
        ids = (seen[-1].argmax(-1) + torch.arange(3, device=model.device) * step).remainder(64).tolist()
        plan = cache.append_batch([1, 2, 3], list(ids))
        seen.append(runner.forward(plan, ids, np.arange(3)))
        cache.commit(plan)
    return torch.stack(seen)


@pytest.mark.parametrize("kv_dtype", [None, "int8"])
def test_the_same_logits(monkeypatch, kv_dtype):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = LlamaForCausalLM(config).eval()
    calls = []
    expected = logits(model, calls, kv_dtype=kv_dtype)
    monkeypatch.setattr(storage, "uses_triton", lambda *_: True)
    monkeypatch.setattr(attention, "_fastest_for", lambda call: calls.append(call) or "triton")
    found = logits(model.to(device), calls, kv_dtype=kv_dtype).cpu()
    assert len(calls) == 2 * 4
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
