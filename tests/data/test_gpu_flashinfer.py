"""What goes to FlashInfer, and what is refused; its kernel itself needs a GPU."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from tests.contracts.attention_cases import Shape, make_case

from pagedkv import BlockManager, InvalidOperation, MissingExtra, paged_attention
from pagedkv.data import gpu_flashinfer
from pagedkv.data.gpu_flashinfer import csr_arrays


class FakeFlashInfer:
    """Plays FlashInfer on the CPU: it reads its own arrays alone, in plain loops."""

    def __init__(self):
        self.num_plans = 0
        self.layouts, self.backends = [], []

    def BatchPrefillWithPagedKVCacheWrapper(self, workspace, layout, backend):  # noqa: N802
        self.backends.append(backend)
        self.layouts.append(layout)
        self.layout = layout
        return self

    def plan(self, qo_indptr, indptr, indices, last_page_len, **options):
        assert all(x.dtype == torch.int32 for x in (qo_indptr, indptr, indices, last_page_len))
        self.num_plans += 1
        self.arrays, self.options = (qo_indptr, indptr, indices, last_page_len), options

    def run(self, queries, pools):
        qo_indptr, indptr, indices, last_page_len = (x.tolist() for x in self.arrays)
        options, out = self.options, []
        keys, values = pools if self.layout == "NHD" else (pool.transpose(1, 2) for pool in pools)
        group = options["num_qo_heads"] // options["num_kv_heads"]
        for i in range(len(last_page_len)):
            blocks = indices[indptr[i] : indptr[i + 1]]
            length = (len(blocks) - 1) * options["page_size"] + last_page_len[i] if blocks else 0
            k, v = (pool[blocks].flatten(0, 1)[:length].repeat_interleave(group, 1) for pool in (keys, values))
            q = queries[qo_indptr[i] : qo_indptr[i + 1]]
            scores = torch.einsum("qhd,khd->hqk", q, k) * options["sm_scale"]
            if options["logits_soft_cap"]:
                scores = options["logits_soft_cap"] * torch.tanh(scores / options["logits_soft_cap"])
            distance = torch.arange(length - len(q), length)[:, None] - torch.arange(length)
            hidden = distance < 0 if options["causal"] else torch.zeros_like(distance, dtype=torch.bool)
            if options["window_left"] >= 0:
                hidden |= distance > options["window_left"]
            out.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(2), v))
        return torch.cat(out)


@pytest.fixture
def fake(monkeypatch):
    fake = FakeFlashInfer()
    monkeypatch.setitem(sys.modules, "flashinfer", fake)
    monkeypatch.setattr(gpu_flashinfer, "_is_on_gpu", lambda call: True)
    monkeypatch.setattr(gpu_flashinfer, "_kept", type("Empty", (), {})())
    return fake


def test_csr_arrays_name_every_token_once():
    manager = BlockManager(40, 4)
    for seq_id, count in enumerate((1, 4, 5, 8, 17)):
        manager.allocate(seq_id, count)
    plan = manager.plan(list(range(5)))
    indptr, indices, last_page_len = csr_arrays(plan.block_tables, plan.seq_lens, 4)
    assert indptr.tolist() == [0, 1, 2, 4, 6, 11] and last_page_len.tolist() == [1, 4, 1, 4, 1]
    assert indptr.dtype == indices.dtype == last_page_len.dtype == np.int32
    for i in range(5):
        blocks = indices[indptr[i] : indptr[i + 1]]
        slots = [b * 4 + o for n, b in enumerate(blocks) for o in range(4 if n < len(blocks) - 1 else last_page_len[i])]
        assert slots == plan.slot_mapping[plan.cu_seqlens_q[i] : plan.cu_seqlens_q[i + 1]].tolist()


def test_csr_arrays_of_empty_sequences():
    tables = np.array([[7, 99], [99, 99], [3, 5]], np.int32)
    indptr, indices, last_page_len = csr_arrays(tables, np.array([2, 0, 5], np.int32), 4)
    assert (indptr.tolist(), indices.tolist(), last_page_len.tolist()) == ([0, 1, 1, 3], [7, 3, 5], [2, 0, 1])
    indptr, indices, last_page_len = csr_arrays(tables[:0], np.zeros(0, np.int32), 4)
    assert indptr.tolist() == [0] and not len(indices) and not len(last_page_len)


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("options", [{}, {"causal": False}, {"window": 6}, {"softcap": 3.0}], ids=str)
def test_flashinfer_is_told_everything(fake, layout, options):
    case = make_case(Shape([(37, 37, 0, 0), (16, 1, 0, 0), (61, 5, 0, 0)], layout=layout, options=options))
    for _ in range(2):
        result = paged_attention(case.queries, case.keys, case.values, **case.options, backend="flashinfer")
        torch.testing.assert_close(result.double(), case.expected(), rtol=1e-5, atol=1e-5)
    assert fake.num_plans == 1 and fake.layouts == [layout] and fake.backends == ["auto"]
    case.options["scale"] = 0.5
    result = paged_attention(case.queries, case.keys, case.values, **case.options, backend="flashinfer")
    torch.testing.assert_close(result.double(), case.expected(), rtol=1e-5, atol=1e-5)
    assert fake.num_plans == 2


@pytest.mark.parametrize(
    "shape, text",
    [
        (Shape([(9, 1, 0, 0)], sinks=True), "sinks: expected none"),
        (Shape([(9, 1, 3, 4)]), "holes: expected none"),
        (
            Shape([(9, 1, 0, 0)], query_dtype=torch.float16),
            "queries: expected torch.float32 as keys, got torch.float16",
        ),
        (Shape([(9, 1, 0, 0)], options={"window": 3, "causal": False}), "window: expected causal attention"),
    ],
    ids=["sinks", "holes", "dtype", "window"],
)
def test_what_flashinfer_would_answer_otherwise_is_refused(fake, shape, text):
    case = make_case(shape)
    with pytest.raises(InvalidOperation, match=f"backend 'flashinfer': {text}"):
        paged_attention(case.queries, case.keys, case.values, **case.options, backend="flashinfer")
    assert not fake.num_plans


def test_a_hole_behind_the_visible_tokens_is_none(fake):
    case = make_case(Shape([(9, 1, 9, 4)]))
    result = paged_attention(case.queries, case.keys, case.values, **case.options, backend="flashinfer")
    torch.testing.assert_close(result.double(), case.expected(), rtol=1e-5, atol=1e-5)
    assert fake.backends == ["fa2"], "the kernel for few queries"


def test_tensors_on_the_cpu_are_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "flashinfer", FakeFlashInfer())
    case = make_case(Shape([(9, 1, 0, 0)]))
    with pytest.raises(InvalidOperation, match="queries: expected a tensor on a CUDA device, got one on cpu"):
        paged_attention(case.queries, case.keys, case.values, **case.options, backend="flashinfer")


def test_without_flashinfer_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    case = make_case(Shape([(9, 1, 0, 0)]))
    with pytest.raises(MissingExtra, match=r"pip install 'pagedkv\[flashinfer\]'"):
        paged_attention(case.queries, case.keys, case.values, **case.options, backend="flashinfer")
