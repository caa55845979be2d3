"""The invariant backend: the same bits however a text is cut into calls, whatever is beside it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from pagedkv.data.attention import paged_attention

TOKENS, BLOCK = 700, 16
CUTS = [[0, 700], [0, 1, 8, 71, 400, 433, 700], [0, 300, 317, 318, 350, 500, 700], [*range(0, 700, 7), 700]]
RULES = {"plain": {}, "window": {"window": 100}, "softcap": {"softcap": 5.0}, "sinks": {"sinks": torch.arange(8) / 4.0}}


def text(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = (TOKENS, 8, 32), (50, BLOCK, 4, 32), (50, BLOCK, 4, 32)
    return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)


def attend(tensors: tuple[torch.Tensor, ...], parts: list[tuple[int, int]], **more: Any) -> torch.Tensor:
    """Attend with the query tokens of some parts of the text, each as a sequence of its own."""
    queries, keys, values = tensors
    table = np.random.default_rng(0).permutation(len(keys)).astype(np.int32)
    return paged_attention(
        torch.cat([queries[first:last] for first, last in parts]),
        keys,
        values,
        block_tables=np.tile(table, (len(parts), 1)),
        seq_lens=np.array([last for _, last in parts], np.int32),
        cu_seqlens_q=np.cumsum([0, *(last - first for first, last in parts)]).astype(np.int32),
        scale=0.2,
        **more,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rules", RULES)
def test_every_cut_gives_the_same_bits(rules, dtype):
    tensors = text(dtype)
    results = [
        torch.cat(
            [
                attend(tensors, [part], backend="cpu_invariant", **RULES[rules])
                for part in zip(cuts, cuts[1:], strict=False)
            ]
        )
        for cuts in CUTS
    ]
    for result in results[1:]:
        assert torch.equal(result, results[0])
    plain = attend(tensors, [(0, TOKENS)], backend="reference", **RULES[rules])
    # Where the processor multiplies bfloat16, weights are narrowed to that: 2 ** -9 of values about one.
    tolerance = {"rtol": 1e-2, "atol": 4e-3} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(results[0], plain, **tolerance)


def test_neighbours_and_threads_change_no_bit():
    tensors, parts = text(torch.float32), [(0, 33), (50, 250), (699, 700), (7, 7), (100, 164)]
    threads = torch.get_num_threads()
    alone = torch.cat([attend(tensors, [part], backend="cpu_invariant") for part in parts])
    try:
        torch.set_num_threads(2 if threads == 1 else 1)
        assert torch.equal(attend(tensors, parts, backend="cpu_invariant"), alone)
    finally:
        torch.set_num_threads(threads)
