"""Blocks between tensors as vLLM lays them out and rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pagedkv import InvalidOperation
from pagedkv.vllm.paging import KvPages

BLOCKS = 6


def fused(dtype=torch.float32):
    return torch.randn(BLOCKS, 2, 4, 6).to(dtype)


LAYOUTS = {
    "fused": lambda: fused(),
    "bfloat16": lambda: fused(torch.bfloat16),
    "float8": lambda: fused(torch.float8_e4m3fn),
    "heads inside": lambda: torch.randn(BLOCKS, 4, 2, 6).permute(0, 2, 1, 3),
    "latent": lambda: torch.randn(BLOCKS, 4, 9),
    "smaller blocks of the kernel": lambda: torch.randn(BLOCKS * 2, 2, 2, 6),
    "as wide, in other axes": lambda: torch.randn(BLOCKS, 4, 2, 6),
    "float8 in a wider tensor": lambda: torch.randn(BLOCKS, 3, 2, 4, 6).to(torch.float8_e4m3fn)[:, 1],
    "last axis outside": lambda: torch.randn(BLOCKS, 6, 2, 4).permute(0, 2, 3, 1),
    "a part of a wider tensor": lambda: torch.randn(BLOCKS, 3, 2, 4, 6)[:, 1],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_blocks_go_out_and_come_back_elsewhere(layout):
    caches = {"a": LAYOUTS[layout](), "b": LAYOUTS[layout]()}
    before = {name: kv.clone() for name, kv in caches.items()}
    pages = KvPages(caches, BLOCKS)
    rows = np.zeros((3, pages.row_bytes), np.uint8)
    pages.read([4, 0, 2], rows)
    pages.write([1, 5, 3], rows)
    for name, kv in caches.items():
        k = len(kv) // BLOCKS
        whole, old = (
            kv.reshape(BLOCKS, k, *kv.shape[1:]).float(),
            before[name].reshape(BLOCKS, k, *kv.shape[1:]).float(),
        )
        assert torch.equal(whole[[1, 5, 3]], old[[4, 0, 2]]) and torch.equal(whole[[4, 0, 2]], old[[4, 0, 2]])
    assert pages.row_bytes == sum(kv.numel() * kv.element_size() for kv in caches.values()) // BLOCKS


def test_rows_of_a_wider_memory_are_filled_in_place():
    pages = KvPages({"a": fused(), "b": fused()}, BLOCKS)
    memory = np.zeros((4, 3 * pages.row_bytes), np.uint8)
    part = memory[1:3, pages.row_bytes : 2 * pages.row_bytes]
    pages.read([1, 2], part)
    assert part.any() and not memory[0].any() and not memory[:, : pages.row_bytes].any()
    other = KvPages({"a": fused(), "b": fused()}, BLOCKS)
    other.write([1, 2], part)
    again = np.zeros((2, pages.row_bytes), np.uint8)
    other.read([1, 2], again)
    assert (again == part).all()


def test_layers_that_share_a_tensor_count_once():
    kv = fused()
    assert KvPages({"a": kv, "b": kv}, BLOCKS).row_bytes == KvPages({"a": kv}, BLOCKS).row_bytes


def test_layouts_differ_where_bytes_lie_elsewhere():
    layouts = {name: KvPages({"a": make()}, BLOCKS).layout for name, make in LAYOUTS.items()}
    assert (
        layouts["fused"] == layouts["a part of a wider tensor"]
        and layouts["float8"] == layouts["float8 in a wider tensor"]
    )
    assert len(set(layouts.values())) == len(LAYOUTS) - 2


@pytest.mark.parametrize("kv", [torch.zeros(2, 5, 4), [torch.zeros(6, 4)], torch.zeros(0, 3)])
def test_other_states_are_refused(kv):
    with pytest.raises(InvalidOperation, match="kv_caches"):
        KvPages({"a": kv}, BLOCKS)
