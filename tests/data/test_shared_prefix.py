"""Sequences that begin with the same blocks: they are read once for all, and every bit is that of a sequence alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pagedkv.data.attention import paged_attention
from pagedkv.data.cpu_plan import ITEM, PIECE, SPLIT, Rules, Shape, plan_items
from pagedkv.data.quantised import GREATEST

NUM_BLOCKS, HEADS = 400, 2
DTYPES = [torch.float32, torch.bfloat16, torch.float16, *GREATEST]


def make(sequences: list[tuple[list[tuple[int, int]], int, int]], block_size: int) -> dict[str, np.ndarray]:
    """Return a batch; a sequence is runs of blocks (first, how many) one after another, a length and its queries."""
    tables = [np.concatenate([np.arange(first, first + count) for first, count in runs]) for runs, _, _ in sequences]
    block_tables = np.zeros((len(tables), max(map(len, tables))), np.int32)
    for row, table in zip(block_tables, tables, strict=True):
        row[: len(table)] = table % NUM_BLOCKS
    lens = np.array([min(length, len(t) * block_size) for t, (_, length, _) in zip(tables, sequences, strict=True)])
    counts = np.minimum([queries for _, _, queries in sequences], lens)
    return {
        "block_tables": block_tables,
        "seq_lens": lens.astype(np.int32),
        "cu_seqlens_q": np.cumsum([0, *counts]).astype(np.int32),
        "holes": np.zeros((len(tables), 2), np.int32),
    }


def pool(dtype: torch.dtype, block_size: int, dim: int) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    shape = 2, NUM_BLOCKS, block_size, HEADS, dim
    if dtype == torch.int8:
        keys, values = torch.randint(-127, 128, shape, generator=generator, dtype=torch.int32).to(dtype)
    else:
        keys, values = torch.randn(shape, generator=generator).to(dtype)
    if dtype not in GREATEST:
        return keys, values, {}
    scales = torch.rand(2, NUM_BLOCKS, block_size, HEADS, generator=generator) / 64
    return keys, values, {"key_scales": scales[0], "value_scales": scales[1]}


def check(batch: dict[str, np.ndarray], dtype: torch.dtype, block_size: int, group: int, dim: int, **more: Any) -> None:
    """Every sequence of a batch gets the bits that it gets alone, and they are right."""
    keys, values, scales = pool(dtype, block_size, dim)
    cu_seqlens = batch["cu_seqlens_q"]
    queries = torch.randn(int(cu_seqlens[-1]), HEADS * group, dim, generator=torch.Generator().manual_seed(1))
    options = {"scale": dim**-0.5, **scales, **more}
    together = paged_attention(queries, keys, values, **batch, **options, backend="cpu_invariant")
    for i in range(len(cu_seqlens) - 1):
        first, last = cu_seqlens[i], cu_seqlens[i + 1]
        part = {name: array[i : i + 1] for name, array in batch.items() if name != "cu_seqlens_q"}
        part["cu_seqlens_q"] = np.array([0, last - first], np.int32)
        alone = paged_attention(queries[first:last], keys, values, **part, **options, backend="cpu_invariant")
        assert torch.equal(together[first:last], alone), i
    plain = paged_attention(queries, keys, values, **batch, **options, backend="reference")
    torch.testing.assert_close(together, plain, rtol=1e-3, atol=1e-4)


def items_of(batch: dict[str, np.ndarray], block_size: int = 16, group: int = 1) -> Any:
    rules = Rules(np.float32(1), np.float32(0), True, 1 << 40)
    plan = plan_items(*batch.values(), rules, Shape(block_size, HEADS, group, 16, 16, 4))
    items = plan.items
    return [
        (sorted(plan.pieces[plan.members[a : a + n], PIECE.sequence].tolist()), start, end, num_before)
        for a, n, start, end, num_before in items[
            :, [ITEM.first_member, ITEM.num_members, ITEM.start, ITEM.end, ITEM.num_before]
        ].tolist()
    ]


def test_a_prefix_of_two_sequences_is_an_item_of_both():
    batch = make([([(0, 20), (50, 4)], 380, 1), ([(0, 20), (60, 4)], 350, 1), ([(100, 3)], 40, 1)], 16)
    assert items_of(batch) == [([0, 1], 0, 320, 0), ([2], 0, 40, 0), ([0], 320, 380, 1), ([1], 320, 350, 1)]


def test_what_is_shared_ends_with_the_shortest_and_goes_on_with_the_others():
    runs = [(0, 40)]
    batch = make([(runs, 640, 1), (runs, 639, 1), (runs, 200, 1)], 16)
    shared = [item for item in items_of(batch) if len(item[0]) > 1]
    assert shared == [([0, 1, 2], 0, 192, 0), ([0, 1], 192, SPLIT, 1), ([0, 1], SPLIT, 576, 0)]


def test_nested_prefixes_go_on_from_each_other():
    many = [([(0, 12), (20 + 20 * (i // 3), 8), (200 + 10 * i, 3)], 350, 1) for i in range(6)]
    items = items_of(make(many, 16))
    assert items[0] == ([0, 1, 2, 3, 4, 5], 0, 192, 0)
    assert sorted(items[1:3]) == [([0, 1, 2], 192, 320, 1), ([3, 4, 5], 192, 320, 1)]
    assert sorted(items[3:]) == [([i], 320, 350, 1) for i in range(6)]


def test_many_sequences_are_shared_out_to_several_items_that_all_have_to_be_waited_for():
    many = [([(0, 12), (20 + 20 * (i // 10), 10), (200 + 3 * i, 3)], 350, 1) for i in range(20)]
    items = items_of(make(many, 16))
    assert sum(len(members) for members, *_ in items[:3]) == 20
    assert {end for *_, end, _ in items[:3]} == {192}
    assert {num_before for *_, num_before in items[3:7]} == {3}


def test_holes_windows_and_short_prefixes_are_left_to_each():
    runs = [([(0, 20), (50 + i, 1)], 330, 1) for i in range(2)]
    batch = make(runs, 16)
    batch["holes"][0] = 0, 0
    assert len(items_of(batch)[0][0]) == 2
    batch["holes"][0] = 96, 112
    batch["seq_lens"][0] = 300
    assert all(len(members) == 1 for members, *_ in items_of(batch))
    assert all(
        len(members) == 1 for members, *_ in items_of(make([([(0, 6), (50 + i, 1)], 100, 1) for i in range(2)], 16))
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_gives_the_bits_of_a_sequence_alone(dtype):
    runs = [([(0, 36), (40 + 20 * (i % 2), 9), (100 + 8 * i, 5)], 700 + 7 * i, 1 + i % 2) for i in range(7)]
    check(make([*runs, ([(0, 50)], 800, 70), ([(0, 45)], 720, 1)], 16), dtype, 16, 3, 24)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_that_wait_for_each_other_change_no_bit(threads):
    runs = [([(0, 10), (20 + 20 * (i // 5), 14), (100 + 5 * i, 5)], 400 + i, 1) for i in range(15)]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for _ in range(20):
            check(make(runs, 16), torch.float32, 16, 2, 64)
    finally:
        torch.set_num_threads(before)


prefixes = st.sampled_from([(0, 0), (0, 9), (0, 40), (100, 40)])
middles = st.sampled_from([(0, 0), (60, 8), (60, 20), (40, 10)])
sequences = st.tuples(
    st.tuples(prefixes, middles, st.tuples(st.integers(200, 380), st.integers(1, 12))).map(list),
    st.integers(1, 1000),
    st.sampled_from([0, 1, 1, 1, 2, 3, 5, 40]),
)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(sequences, min_size=2, max_size=12),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.sampled_from([5, 16, 32]),
    st.integers(1, 5),
    st.fixed_dictionaries(
        {},
        optional={
            "window": st.sampled_from([1, 40, 300, 2000]),
            "softcap": st.just(3.0),
            "sinks": st.just(True),
            "causal": st.booleans(),
        },
    ),
    st.booleans(),
)
def test_any_tables_give_the_bits_of_a_sequence_alone(drawn, dtype, block_size, group, options, holed):
    batch = make(drawn, block_size)
    if options.pop("sinks", False):
        options["sinks"] = torch.arange(HEADS * group) / 4.0
    if holed:
        length = int(batch["seq_lens"][0])
        batch["seq_lens"][0] = max(length - block_size, int(batch["cu_seqlens_q"][1]))
        size = length - int(batch["seq_lens"][0])
        start = int(batch["seq_lens"][0]) // 2
        batch["holes"][0] = start, start + size
    check(batch, dtype, block_size, group, 16, **options)


def test_pieces_of_prompts_are_not_shared():
    batch = make([([(0, 30), (50, 3)], 500, 40), ([(0, 30), (60, 3)], 500, 1)], 16)
    assert all(len(members) == 1 for members, *_ in items_of(batch))
