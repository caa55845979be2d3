"""Bad arguments of paged_attention: a typed error that names the argument, and nothing is written."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.contracts.attention_cases import Shape, make_case

from pagedkv import InvalidOperation, paged_attention

NAN, INF = float("nan"), float("inf")
SHAPE = Shape([(20, 3, 0, 0), (9, 1, 4, 5)], block_size=4, head_dim=8, v_head_dim=6)


def call(**changes):
    case = make_case(SHAPE)
    arguments = {"queries": case.queries, "keys": case.keys, "values": case.values, **case.options}
    arguments["out"] = torch.full((4, 4, 6), 7.0)
    for name, change in changes.items():
        arguments[name] = change(arguments.get(name)) if callable(change) else change
    tensors = [arguments.pop(name) for name in ("queries", "keys", "values")]
    return paged_attention(*tensors, **arguments), arguments["out"]


def with_entry(index, value):
    def change(array):
        array[index] = value
        return array

    return change


def test_the_case_itself_is_fine():
    result, _ = call()
    assert result.isfinite().all()


@pytest.mark.parametrize(
    "name, change, text",
    [
        ("queries", lambda q: q.numpy(), "queries: expected a torch.Tensor, got ndarray"),
        ("queries", lambda q: q[0], r"queries: expected shape \[total_tokens, .*\], got \[4, 8\]"),
        ("queries", lambda q: q.double(), "queries: expected float32, bfloat16 or float16, got torch.float64"),
        ("queries", lambda q: q[..., :7], "queries: expected head_dim 8 as keys, got 7"),
        ("queries", lambda q: q[:, :3], "queries: expected a multiple of 2 kv heads, got 3 heads"),
        ("queries", lambda q: q[:, :0], "queries: expected nothing empty"),
        (
            "queries",
            lambda q: q.repeat(1, 1, 2)[..., ::2],
            "queries: expected a contiguous last dimension, got stride 2",
        ),
        ("queries", lambda q: q.requires_grad_(), "queries: expected no gradients"),
        (
            "keys",
            lambda k: k[0],
            r"keys: expected shape \[num_blocks, block_size, num_kv_heads, dim\], got \[4, 2, 8\]",
        ),
        ("keys", lambda k: k.to(torch.int16), "keys: expected float32, .*, int8 or float8_e4m3fn, got torch.int16"),
        ("keys", lambda k: k.to("meta"), "keys: expected a tensor on cpu as queries, got meta"),
        ("values", lambda v: v[1:], r"values: expected shape \[12, 4, 2, 'v_head_dim'\], got \[11, 4, 2, 6\]"),
        ("values", lambda v: v.half(), "values: expected torch.float32 as keys, got torch.float16"),
        ("values", lambda v: v.transpose(2, 3), "values: expected a contiguous last dimension"),
        ("layout", "NDH", "layout: expected one of NHD, HND, got 'NDH'"),
        ("block_tables", None, "block_tables: expected an int32 array or tensor, got NoneType"),
        ("block_tables", lambda t: [[1, 2], [3]], "block_tables: expected an int32 array or tensor, got list"),
        ("block_tables", lambda t: t.astype(float), "block_tables: expected an int32 array or tensor, got float64"),
        ("block_tables", lambda t: t > 0, "block_tables: expected an int32 array or tensor, got bool"),
        (
            "block_tables",
            lambda t: torch.from_numpy(t).float(),
            "block_tables: expected an int32 .*, got torch.float32",
        ),
        ("seq_lens", lambda s: [2**31, 9], "seq_lens: expected numbers that fit int32, got 9 … 2147483648"),
        (
            "block_tables",
            lambda t: torch.from_numpy(t).to("meta"),
            "block_tables: expected .* CPU tensor, got one on meta",
        ),
        ("block_tables", lambda t: t[0], r"block_tables: expected 2 dimension\(s\), got shape \[6\]"),
        ("block_tables", lambda t: t[:1], r"block_tables: expected shape \[n, max_blocks\] = \[2, 6\], got \[1, 6\]"),
        ("block_tables", lambda t: t[:, :4], "block_tables: expected at least 5 columns for sequence 0, got 4"),
        ("block_tables", with_entry((1, 3), 12), "block_tables: expected block ids below 12 in sequence 1, got 12"),
        ("block_tables", with_entry((0, 4), -1), "block_tables: expected block ids below 12 in sequence 0, got -1"),
        ("seq_lens", lambda s: s[:1], r"block_tables: expected shape \[n, max_blocks\] = \[1, 6\], got \[2, 6\]"),
        ("seq_lens", with_entry(0, 2), "seq_lens: expected at least the 3 query tokens of sequence 0, got 2"),
        ("seq_lens", with_entry(0, -5), "seq_lens: expected at least the 3 query tokens of sequence 0, got -5"),
        (
            "seq_lens",
            with_entry(0, 2**31 - 1),
            "block_tables: expected at least 536870912 columns for sequence 0, got 6",
        ),
        ("cu_seqlens_q", lambda c: c[1:], r"cu_seqlens_q: expected shape \[n \+ 1\] = \[3\], got \[2\]"),
        ("cu_seqlens_q", with_entry(0, 1), "cu_seqlens_q: expected to begin with 0, got 1"),
        ("cu_seqlens_q", with_entry(2, 2), "cu_seqlens_q: expected never to decrease, got 2 after 3 at index 2"),
        ("cu_seqlens_q", with_entry(2, 5), "cu_seqlens_q: expected to end at 4, the number of queries, got 5"),
        ("holes", lambda h: h[:1], r"holes: expected shape \[n, 2\] = \[2, 2\], got \[1, 2\]"),
        ("holes", with_entry(1, (5, 4)), "holes: expected 0 <= start <= end .* in sequence 1, got start 5 and end 4"),
        ("holes", with_entry(1, (-1, 4)), "holes: expected 0 <= start <= end .* in sequence 1, got start -1 and end 4"),
        (
            "holes",
            with_entry(1, (10, 14)),
            "holes: expected .* start <= seq_len in sequence 1, got start 10 and end 14",
        ),
        ("scale", NAN, "scale: expected a finite number, got nan"),
        ("scale", "0.5", "scale: expected a number, got '0.5'"),
        ("scale", True, "scale: expected a number, got True"),
        ("causal", None, "causal: expected a bool, got None"),
        ("window", 0, "window: expected an int in 1 … 2147483647, got 0"),
        ("window", 2.5, "window: expected an int, got 2.5"),
        ("softcap", 0.0, "softcap: expected a number above 0, got 0.0"),
        ("softcap", INF, "softcap: expected a number above 0, got inf"),
        ("sinks", [0.0] * 4, "sinks: expected a floating torch.Tensor, got list"),
        ("sinks", torch.zeros(4, dtype=torch.int32), "sinks: expected a floating torch.Tensor, got torch.int32"),
        ("sinks", torch.zeros(2), r"sinks: expected shape \[num_q_heads\] = \[4\], got \[2\]"),
        ("sinks", torch.zeros(4, requires_grad=True), "sinks: expected no gradients"),
        (
            "out",
            lambda o: o[:3],
            r"out: expected torch.float32 \[4, 4, 6\] on cpu, got torch.float32 \[3, 4, 6\] on cpu",
        ),
        ("out", lambda o: o.half(), "out: expected torch.float32"),
        ("backend", "gpuu", "backend: expected one of auto, .*triton, got 'gpuu'"),
    ],
    ids=lambda x: x if isinstance(x, str) and x.islower() and len(x) < 14 else "",
)
def test_bad_argument(name, change, text):
    kept = []
    remember = {"out": lambda out: kept.append(out) or out} if name != "out" else {}
    with pytest.raises(InvalidOperation, match=text):
        call(**remember, **{name: change})
    assert all((out == 7.0).all() for out in kept)


def test_what_requires_grad_is_fine_where_gradients_are_off():
    case = make_case(SHAPE)
    with torch.no_grad():
        result = paged_attention(case.queries.requires_grad_(), case.keys.requires_grad_(), case.values, **case.options)
    assert not result.requires_grad


def test_tables_may_be_tensors_or_strided_or_read_only_arrays():
    expected, _ = call()
    names = ("block_tables", "seq_lens", "cu_seqlens_q", "holes")
    as_tensors, _ = call(**dict.fromkeys(names, torch.from_numpy))
    strided, _ = call(**dict.fromkeys(names, lambda array: np.repeat(array, 2, axis=-1)[..., ::2]))

    def locked(array):
        array.setflags(write=False)
        return array

    read_only, _ = call(**dict.fromkeys(names, locked))
    assert expected.equal(as_tensors) and expected.equal(strided) and expected.equal(read_only)


def test_tables_may_be_other_integers_or_lists():
    expected, _ = call()
    names = ("block_tables", "seq_lens", "cu_seqlens_q", "holes")
    for change in (np.int64, lambda array: torch.from_numpy(array).long(), lambda array: array.tolist()):
        result, _ = call(**dict.fromkeys(names, change))
        assert expected.equal(result)


def test_a_block_wholly_inside_a_hole_is_not_read():
    case = make_case(Shape([(9, 1, 3, 14)], block_size=4, head_dim=8, v_head_dim=6))
    expected = case.expected()
    case.options["block_tables"][0, 1:4] = -9
    result = paged_attention(case.queries, case.keys, case.values, **case.options)
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-5)
