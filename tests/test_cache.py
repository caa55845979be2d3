"""PagedKvCache: the books and the tensors as one."""

from __future__ import annotations

import pytest
import torch

from pagedkv import InvalidOperation, KvCacheSpec, PagedKvCache, paged_attention
from pagedkv.data import call

TINY = {"num_kv_heads": 2, "head_dim": 4, "dtype": "float32"}


def fill(cache, plan, seed=0):
    """Write random K and V where a plan says, and return them."""
    generator = torch.Generator().manual_seed(seed)
    spec = cache.spec
    keys = torch.randn(plan.total_tokens, spec.num_kv_heads, spec.head_dim, generator=generator)
    values = torch.randn(plan.total_tokens, spec.num_kv_heads, spec.v_head_dim, generator=generator)
    for layer in range(spec.num_layers):
        cache.write(layer, keys + layer, values - layer, plan)
    return keys, values


def dense(queries, keys, values):
    """Causal attention of the last queries over all keys, grouped heads and all."""
    repeat = queries.shape[1] // keys.shape[1]
    keys, values = (side.repeat_interleave(repeat, dim=1) for side in (keys, values))
    scores = torch.einsum("qhd,khd->hqk", queries, keys) * queries.shape[-1] ** -0.5
    total, count = keys.shape[0], queries.shape[0]
    ahead = torch.arange(total)[None] > torch.arange(total - count, total)[:, None]
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(ahead, -torch.inf).softmax(-1), values)


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("v_head_dim", [4, 3])
def test_the_walk_of_a_token(layout, v_head_dim):
    cache = PagedKvCache(32, 4, **TINY, num_layers=2, v_head_dim=v_head_dim, layout=layout)
    cache.allocate(1, list(range(12)))
    plan = cache.plan([1])
    keys, values = fill(cache, plan)
    cache.commit(plan)
    queries = torch.randn(12, 4, 4)
    for layer in range(2):
        expected = dense(queries, keys + layer, values - layer)
        assert torch.allclose(cache.attend(layer, queries, plan), expected, atol=1e-5)
    info = cache.allocate(2, [*range(9), 77])
    assert info.num_cached_tokens == 9, "two blocks shared, one token of the third copied"
    plan = cache.plan([2])
    new_keys, new_values = fill(cache, plan, seed=1)
    query = torch.randn(1, 4, 4)
    expected = dense(query, torch.cat([keys[:9], new_keys]), torch.cat([values[:9], new_values]))
    assert torch.allclose(cache.attend(0, query, plan), expected, atol=1e-5)


def test_a_batch_reads_only_its_own_blocks():
    cache = PagedKvCache(16, 4, **TINY)
    cache.storage.keys(0).fill_(float("nan"))
    cache.storage.values(0).fill_(float("nan"))
    for seq_id in (1, 2, 3):
        cache.allocate(seq_id, 0)
    plan = cache.append_batch([1, 2, 3], counts=[5, 1, 9])
    keys, values = fill(cache, plan)
    queries = torch.randn(15, 2, 4)
    found = cache.attend(0, queries, plan)
    for start, stop in zip(plan.cu_seqlens_q[:-1], plan.cu_seqlens_q[1:], strict=True):
        expected = dense(queries[start:stop], keys[start:stop], values[start:stop])
        assert torch.allclose(found[start:stop], expected, atol=1e-5)


def test_a_plan_is_checked_once_for_all_layers(monkeypatch):
    """What a plan says later does not matter: nothing unchecked is read."""
    checked = []
    original = call._first_fault
    monkeypatch.setattr(call, "_first_fault", lambda *arrays: checked.append(1) or original(*arrays))
    cache = PagedKvCache(8, 4, **TINY, num_layers=3)
    cache.allocate(1, 9)
    plan = cache.plan([1])
    fill(cache, plan)
    queries = torch.randn(9, 2, 4)
    found = cache.attend(0, queries, plan)
    plan.block_tables.fill(2**30)
    assert torch.equal(cache.attend(0, queries, plan), found)
    assert cache.attend(2, queries, plan).isfinite().all() and len(checked) == 1
    other = cache.plan([1], [1])
    other.block_tables.fill(2**30)
    with pytest.raises(InvalidOperation, match=f"block_tables: expected block ids below 8 .*, got {2**30}"):
        cache.attend(0, queries[:1], other)
    with pytest.raises(InvalidOperation, match="cu_seqlens_q: expected to end at 8, the number of queries, got 9"):
        cache.attend(0, queries[:8], cache.plan([1], [9]))


def test_attend_is_paged_attention_over_the_plan():
    cache = PagedKvCache(16, 4, **TINY)
    cache.allocate(1, 0)
    plan = cache.append_batch([1], counts=7)
    fill(cache, plan)
    queries = torch.randn(7, 2, 4)
    expected = paged_attention(
        queries,
        cache.storage.keys(0),
        cache.storage.values(0),
        block_tables=plan.block_tables,
        seq_lens=plan.seq_lens,
        cu_seqlens_q=plan.cu_seqlens_q,
        scale=0.3,
        window=3,
        softcap=2.0,
        sinks=torch.ones(2),
    )
    found = cache.attend(0, queries, plan, scale=0.3, window=3, softcap=2.0, sinks=torch.ones(2))
    assert torch.equal(found, expected)


def test_forks_copy_all_layers_and_both_sides():
    cache = PagedKvCache(16, 4, **TINY, num_layers=3, v_head_dim=2)
    cache.allocate(1, 6)
    keys, values = fill(cache, cache.plan([1]))
    cache.fork(1, 2)
    cache.append(2, 1)
    plan = cache.plan([2], 7)
    for layer in range(3):
        found_keys, found_values = cache.storage.gather(layer, plan.slot_mapping[:6])
        assert torch.equal(found_keys, keys + layer) and torch.equal(found_values, values - layer)
    assert plan.copies.tolist() == [[cache.get_sequence(1).block_ids[1], cache.get_sequence(2).block_ids[1]]]
    assert len(cache.plan([2], 7).copies) == 0, "told of once"


def test_streaming_is_attention_over_what_is_left():
    cache = PagedKvCache(16, 4, **TINY)
    cache.allocate(1, 18)
    keys, values = fill(cache, cache.plan([1]))
    cache.apply_streaming_llm(1, 3, 6)
    plan = cache.append_batch([1], counts=1)
    new_keys, new_values = fill(cache, plan, seed=1)
    query = torch.randn(1, 2, 4)
    visible = [torch.cat([side[:3], side[12:], new]) for side, new in ((keys, new_keys), (values, new_values))]
    assert torch.allclose(cache.attend(0, query, plan), dense(query, *visible), atol=1e-5)


def test_memory_and_shapes():
    cache = PagedKvCache(8, 4, 2, 4, num_layers=3, dtype="bfloat16", v_head_dim=2)
    assert cache.spec == KvCacheSpec(8, 4, 2, 4, num_layers=3, dtype="bfloat16", v_head_dim=2)
    assert cache.block_memory_bytes == 4 * 2 * (4 + 2) * 2 * 3
    assert cache.total_memory_bytes == 8 * cache.block_memory_bytes and cache.used_memory_bytes == 0
    cache.allocate(1, 5)
    assert cache.used_memory_bytes == 2 * cache.block_memory_bytes
    assert tuple(cache.block(0).values.shape) == (3, 4, 2, 2) and cache.block(0).values.dtype == torch.bfloat16


def test_layers_are_added_as_a_model_runs():
    cache = PagedKvCache(8, 4, 2, 4, num_layers=0, dtype="float32")
    cache.allocate(1, 3)
    cache.fork(1, 2)
    cache.append(2, 1)
    assert cache.add_layer(1, 2) == 0 and cache.add_layer(2, 3, 5) == 1
    plan = cache.plan([1], 3)
    cache.write(1, torch.ones(3, 2, 3), torch.ones(3, 2, 5), plan)
    assert tuple(cache.storage.gather(1, plan.slot_mapping)[1].shape) == (3, 2, 5)


@pytest.mark.parametrize("queries", [None, 3, "x"])
def test_queries_that_are_no_tensor_are_named(queries):
    cache = PagedKvCache(4, 4, **TINY)
    cache.allocate(1, 3)
    with pytest.raises(InvalidOperation, match="queries: expected a torch.Tensor, got"):
        cache.attend(0, queries, cache.plan([1]))


@pytest.mark.parametrize(
    ("keys", "values", "name"),
    [
        (torch.ones(2, 2, 4), torch.ones(3, 2, 4), "keys"),
        (torch.ones(3, 2, 4), torch.ones(3, 2, 5), "values"),
        (torch.ones(3, 2, 4, dtype=torch.long), torch.ones(3, 2, 4), "keys"),
        (None, torch.ones(3, 2, 4), "keys"),
    ],
)
def test_a_write_that_does_not_fit_writes_nothing(keys, values, name):
    cache = PagedKvCache(4, 4, **TINY)
    cache.storage.keys(0).zero_()
    cache.storage.values(0).zero_()
    cache.allocate(1, 3)
    with pytest.raises(InvalidOperation, match=name):
        cache.write(0, keys, values, cache.plan([1]))
    assert not cache.storage.keys(0).any() and not cache.storage.values(0).any()
