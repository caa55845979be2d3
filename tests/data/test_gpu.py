"""What Triton's kernels do beside attention over host arrays: writes, copies, static plans, errors before launch."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.contracts.attention_cases import TOLERANCE, Shape, make_case

from pagedkv import (
    InvalidOperation,
    KvCacheSpec,
    KvStorage,
    LayerSpec,
    MissingExtra,
    PagedKvCache,
    SequenceNotFound,
    paged_attention,
)
from pagedkv.data import attention, gpu, gpu_device
from pagedkv.data.gpu_plan import DevicePlan
from pagedkv.data.quantised import GREATEST

pytest.importorskip("triton")

from triton.runtime.errors import OutOfResources  # noqa: E402

from pagedkv.data import gpu_kernels  # noqa: E402
from pagedkv.data.gpu_device import Config, Device, Heads, candidates, num_splits  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAYOUTS = ["NHD", "HND"]
DTYPES = ["float32", "bfloat16", "float16"]
BLOCKS, BLOCK_SIZE, HEADS, DIM, V_DIM = 7, 4, 3, 20, 12


def storages(layout="NHD", dtype="float32", v_head_dim=DIM, num_layers=2):
    """A storage of Triton's and one of torch's, both full of 7."""
    spec = KvCacheSpec(
        BLOCKS, BLOCK_SIZE, HEADS, DIM, num_layers=num_layers, v_head_dim=v_head_dim, dtype=dtype, layout=layout
    )
    both = [KvStorage(spec, DEVICE, backend=backend) for backend in ("triton", "torch")]
    for storage in both:
        for layer in range(num_layers):
            storage.keys(layer).fill_(7)
            storage.values(layer).fill_(7)
    return both


def assert_same(triton_storage, torch_storage):
    for layer in range(torch_storage.num_layers):
        assert triton_storage.keys(layer).equal(torch_storage.keys(layer))
        assert triton_storage.values(layer).equal(torch_storage.values(layer))


def tokens(count, v_head_dim=DIM, dtype=torch.float32, seed=0):
    rng = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(count, HEADS, dim, generator=rng).to(DEVICE, dtype) for dim in (DIM, v_head_dim))
    return keys, values


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "given, v_head_dim", [(torch.float32, DIM), (torch.float32, V_DIM), (torch.bfloat16, V_DIM), (torch.float64, DIM)]
)
def test_writes_equal_torchs(layout, dtype, v_head_dim, given):
    both = storages(layout, dtype, v_head_dim)
    slots = np.array([0, 27, 5, 6, 13])
    for storage in both:
        storage.write(1, *tokens(5, v_head_dim, given), slots)
        storage.write(0, *tokens(0, v_head_dim, given), slots[:0])
    assert_same(*both)
    assert both[0].keys(0).eq(7).all()


def test_writes_take_strided_rows():
    """A slice of the projection that made queries, keys and values at once."""
    both = storages()
    joined = torch.randn(4, 3 * HEADS, DIM, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    for storage in both:
        storage.write(0, joined[:, :HEADS], joined[:, HEADS : 2 * HEADS], np.array([3, 4, 9, 1]))
    assert_same(*both)


@pytest.mark.parametrize("v_head_dim", [DIM, V_DIM])
@pytest.mark.parametrize(
    "copies",
    [[(0, 1), (2, 3)], [(0, 1), (1, 2), (2, 0)], [(0, 1), (1, 0)], [(4, 4)], [(0, 1), (0, 2), (1, 3)]],
    ids=["apart", "chain", "swap", "itself", "fan"],
)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_block_copies_equal_torchs(v_head_dim, copies, dtype):
    both = storages("NHD", dtype, v_head_dim)
    for storage in both:
        for layer in range(2):
            storage.write(layer, *tokens(BLOCKS * BLOCK_SIZE, v_head_dim, seed=layer), np.arange(BLOCKS * BLOCK_SIZE))
        storage.add_layer(LayerSpec(1, 5, 3))
        storage.keys(2).fill_(1)
        storage.values(2).fill_(2)
        storage.copy_blocks(np.array(copies))
    assert_same(*both)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_quantised_writes(dtype, layout):
    """A number is its quantised one times the scale of its token and head; half goes to even."""
    limit = GREATEST[dtype]
    new_keys, new_values = tokens(5, V_DIM)
    new_keys[1, 2] = 0
    new_keys[2, 0, :4] = torch.tensor([limit, 2.5, -0.5, 3.5])
    new_keys[2, 0, 4:] = 0
    new_keys[3, 1] = 1e-3 * new_keys[3, 1]
    slots = torch.tensor([3, 19, 0, 27, 8], device=DEVICE)
    shape = (BLOCKS, BLOCK_SIZE, HEADS) if layout == "NHD" else (BLOCKS, HEADS, BLOCK_SIZE)
    pools, scales = [], []
    for dim in (DIM, V_DIM):
        pool, scale = torch.zeros(*shape, dim, device=DEVICE).to(dtype), torch.full(shape, 7.0, device=DEVICE)
        pools.append(pool if layout == "NHD" else pool.transpose(1, 2))
        scales.append(scale if layout == "NHD" else scale.transpose(1, 2))
    gpu_kernels.write_tokens(*pools, new_keys, new_values, slots, *scales)
    for pool, scale, new in zip(pools, scales, (new_keys, new_values), strict=True):
        # On the CPU, as torch multiplies by the reciprocal of a number on a GPU.
        pool, scale, new, slots = (tensor.cpu() for tensor in (pool, scale, new, slots))
        expected_scale = new.abs().amax(-1) / limit
        expected = torch.where(expected_scale[..., None] > 0, new / expected_scale[..., None], 0.0)
        expected = expected.round().to(dtype) if dtype == torch.int8 else expected.to(dtype)
        block, offset = slots // BLOCK_SIZE, slots % BLOCK_SIZE
        assert pool[block, offset].float().equal(expected.float())
        assert scale[block, offset].equal(expected_scale)
        scale[block, offset] = 7.0
        assert scale.eq(7.0).all(), "scales of other slots were written"


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize(
    "query_dtype, layout",
    [(torch.float32, "NHD"), (torch.float32, "HND"), (torch.bfloat16, "NHD"), (torch.float16, "HND")],
)
def test_attention_over_quantised_blocks(dtype, query_dtype, layout):
    """Equal to the oracle over the numbers that the quantised ones stand for; poisoned as ever."""
    sequences = [(37, 37, 4, 9), (61, 1, 4, 14), (33, 3, 0, 0), (300, 1, 0, 0)]
    case = make_case(Shape(sequences, layout=layout, sinks=True, options={"window": 50}))
    rng = torch.Generator().manual_seed(1)
    pools, scales = [], []
    for plain in (case.keys, case.values):
        scale = torch.rand(plain.shape[:3], generator=rng) * 0.02 + 0.005
        is_written = ~plain.isnan()
        quantised = torch.where(is_written, plain / scale[..., None], 0.0).round().clamp(-127, 127).to(dtype)
        plain[is_written] = (quantised.float() * scale[..., None])[is_written]
        scale[~is_written.any(-1)] = torch.nan
        pools.append(quantised)
        scales.append(scale)
    case.queries = case.queries.to(query_dtype)
    expected = case.expected()
    call = case.call()
    call.queries, call.sinks = call.queries.to(DEVICE), call.sinks.to(DEVICE)
    call.out = torch.empty_like(call.out, device=DEVICE)
    nhd = [x if layout == "NHD" else x.transpose(1, 2) for x in (*pools, *scales)]
    call.keys, call.values, call.key_scales, call.value_scales = (x.to(DEVICE) for x in nhd)
    gpu.attend(call)
    tolerance = 1e-5 if query_dtype == torch.float32 else 1e-2
    torch.testing.assert_close(call.out.cpu().double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("splits, tile_n", [(1, 16), (2, 64), (8, 16), (16, 64)])
def test_any_number_of_splits(monkeypatch, splits, tile_n):
    """Splits without a key among them, those of one key, and rows that see nothing in theirs."""
    monkeypatch.setattr(gpu, "num_splits", lambda *_: splits)
    monkeypatch.setattr(
        gpu, "_run_fitting", lambda heads, _, run: run(Config(64 if heads.most == 0 else 16, tile_n, 4, 1))
    )
    sequences = [(150, 1, 0, 0), (90, 3, 20, 9), (1, 1, 0, 0), (0, 0, 0, 0), (70, 20, 0, 0)]
    for options in ({}, {"window": 7}, {"scale": 1e-45, "softcap": 3.0}):
        case = make_case(Shape(sequences, num_kv_heads=1, group=3, sinks=bool(options), options=options))
        result = paged_attention(*case.tensors(DEVICE), **case.options_on(DEVICE), backend="triton").cpu()
        torch.testing.assert_close(result.double(), case.expected(), rtol=1e-5, atol=1e-5)


def caches(layout="NHD"):
    """The same cache by Triton and by the CPU kernels, and their buffers."""
    both = []
    for backend in ("triton", "torch"):
        cache = PagedKvCache(24, 4, HEADS, DIM, dtype="float32", layout=layout)
        cache._storage = KvStorage(cache.spec, DEVICE if backend == "triton" else "cpu", backend=backend)
        both.append(cache)
    return both


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_device_plan_serves_many_plans(layout):
    """As a CUDA graph uses it: the same buffers, shapes and grids, whatever the step."""
    by_triton, by_cpu = caches(layout)
    device_plan = by_triton.device_plan(max_seqs=4, max_blocks=10, max_tokens=16)
    buffers = [device_plan.slot_mapping, device_plan.batch.block_tables, device_plan.batch.seq_lens]
    places = [buffer.data_ptr() for buffer in buffers]
    steps = [{1: 9, 2: 3}, {1: 1, 2: 1}, {1: 1, 2: 1, 3: 14}, {3: 1}, {1: 2, 2: 2, 3: 2, 4: 5}, {4: 1, 1: 1}]
    for number, step in enumerate(steps):
        total = sum(step.values())
        plans = []
        for cache in (by_triton, by_cpu):
            for seq_id, count in step.items():
                if seq_id in cache:
                    cache.append(seq_id, count)
                else:
                    cache.allocate(seq_id, count)
            plans.append(cache.plan(list(step), list(step.values())))
        keys, values = tokens(16, seed=number)
        queries = torch.randn(16, 2 * HEADS, DIM, generator=torch.Generator().manual_seed(number)).to(DEVICE)
        keys[total:] = values[total:] = queries[total:] = torch.nan
        assert device_plan.load(plans[0]) is device_plan
        by_triton.write(0, keys, values, device_plan)
        by_cpu.write(0, keys[:total].cpu(), values[:total].cpu(), plans[1])
        result = by_triton.attend(0, queries, device_plan, window=11)
        expected = by_cpu.attend(0, queries[:total].cpu(), plans[1], window=11)
        torch.testing.assert_close(result[:total].cpu(), expected, rtol=1e-5, atol=1e-5)
        assert result[total:].eq(0).all()
        for cache, plan in zip((by_triton, by_cpu), plans, strict=True):
            cache.commit(plan)
    assert [buffer.data_ptr() for buffer in buffers] == places


def test_a_decode_plan_refuses_prompts():
    cache, _ = caches()
    plan = cache.device_plan(max_seqs=2, max_blocks=6, max_tokens=2, max_query_tokens=1)
    for seq_id in (1, 2, 3):
        cache.allocate(seq_id, 2)
    kept = [x.clone() for x in (plan.slot_mapping, plan.batch.seq_lens)]
    with pytest.raises(InvalidOperation, match="plan: expected at most 1 query tokens of one sequence, got 2"):
        plan.load(cache.plan([1]))
    with pytest.raises(InvalidOperation, match="plan: expected at most 2 sequences, got 3"):
        plan.load(cache.plan([1, 2, 3]))
    assert plan.slot_mapping.equal(kept[0]) and plan.batch.seq_lens.equal(kept[1])


def test_a_device_plan_refuses_what_does_not_fit():
    cache, by_cpu = caches()
    cache.allocate(1, 30)
    with pytest.raises(InvalidOperation, match="expected at most 16 query tokens, got 30"):
        cache.device_plan(4, 8, 16).load(cache.plan([1]))
    with pytest.raises(InvalidOperation, match="expected at most 7 blocks of one sequence, got 8"):
        cache.device_plan(4, 7, 32).load(cache.plan([1]))
    good = cache.plan([1])
    for wrong in (24, -1):
        tables = good.block_tables.copy()
        tables[0, 3] = wrong
        with pytest.raises(InvalidOperation, match=f"block_tables: expected block ids below 24 .*, got {wrong}"):
            cache.device_plan(4, 8, 32).load(replace(good, block_tables=tables))
    for wrong in (96, -1):
        slots = good.slot_mapping.copy()
        slots[2] = wrong
        with pytest.raises(InvalidOperation, match=f"slot_mapping: expected slots in 0 … 95, got {wrong}"):
            cache.device_plan(4, 8, 32).load(replace(good, slot_mapping=slots))

    loaded = cache.device_plan(4, 8, 32).load(cache.plan([1]))
    keys, values = tokens(32)
    queries = torch.zeros(32, HEADS, DIM, device=DEVICE)
    with pytest.raises(InvalidOperation, match="queries: expected 32 tokens as the DevicePlan, got 31"):
        cache.attend(0, queries[:31], loaded)
    with pytest.raises(InvalidOperation, match="backend: expected auto or triton for a DevicePlan, got 'cpu'"):
        cache.attend(0, queries, loaded, backend="cpu")
    with pytest.raises(InvalidOperation, match=r"keys: expected shape \[32, 3, 20\], got \[31, 3, 20\]"):
        cache.write(0, keys[:31], values, loaded)
    if DEVICE == "cpu":
        with pytest.raises(InvalidOperation, match="plan: expected a BatchPlan, as this storage has no Triton"):
            by_cpu.write(0, keys, values, loaded)
    other = DevicePlan(4, 8, 32, block_size=8, num_blocks=24, device=DEVICE)
    with pytest.raises(InvalidOperation, match="plan: expected one for 24 blocks of 4 tokens, got one for 24 of 8"):
        cache.write(0, keys, values, other)
    with pytest.raises(InvalidOperation, match="plan: expected a DevicePlan, got BatchPlan"):
        cache.storage.slots_of(cache.plan([1], [1]))


def test_a_stale_plan_is_refused_in_the_buffers_of_a_device_plan_as_well():
    cache, _ = caches()
    cache.allocate(1, 17)
    cache.commit(1)
    loaded = cache.device_plan(1, 8, 3).load(cache.append_batch([1], counts=3))
    keys, values = tokens(3)
    cache.write(0, keys, values, loaded)
    cache.fork(1, 2)
    cache.write(0, keys, values, loaded)
    cache.truncate(1, 18)
    cache.append(1, 2)
    before = cache.storage.keys(0).cpu().numpy().tobytes()
    with pytest.raises(InvalidOperation, match="the plan is stale: S1"):
        cache.write(0, keys + 1, values, loaded)
    assert cache.storage.keys(0).cpu().numpy().tobytes() == before
    loaded.load(cache.plan([1], 2))
    cache.write(0, keys, values, loaded)
    cache.free(1)
    with pytest.raises(SequenceNotFound, match="S1"):
        cache.write(0, keys, values, loaded)


def test_debug_mode_looks_at_what_is_on_the_device(monkeypatch):
    cache, _ = caches()
    cache.allocate(1, 30)
    plan = cache.device_plan(4, 8, 32).load(cache.plan([1]))
    queries = torch.zeros(32, HEADS, DIM, device=DEVICE)
    keys, values = tokens(32)
    monkeypatch.setenv("PAGEDKV_DEBUG", "1")
    cache.write(0, keys, values, plan)
    cache.attend(0, queries, plan)
    plan.batch.block_tables[0, 2] = 24
    with pytest.raises(InvalidOperation, match="block_tables: expected block ids below 24 in sequence 0, got 24"):
        cache.attend(0, queries, plan)
    plan.batch.block_tables[0, 2] = 0
    plan.slot_mapping[1] = 96
    with pytest.raises(InvalidOperation, match="slot_mapping: expected slots in 0 … 95, got 96"):
        cache.write(0, keys, values, plan)


def test_equal_arrays_are_uploaded_once():
    """All layers of a step share one copy; an array that changed in place is copied again."""
    from pagedkv.data.gpu_plan import uploaded

    case = make_case(Shape([(9, 1, 0, 0), (5, 2, 0, 0)]))
    call = case.call()
    call.queries = call.queries.to(DEVICE)
    first = uploaded(call)
    assert uploaded(call) is first
    call.batch.seq_lens = call.batch.seq_lens.copy()
    assert uploaded(call) is first
    call.batch.seq_lens[0] = 8
    second = uploaded(call)
    assert second is not first and second.seq_lens.tolist() == [8, 5] and first.seq_lens.tolist() == [9, 5]


def test_triton_is_refused_without_a_device_or_the_interpreter(monkeypatch):
    case = make_case(Shape([(9, 1, 0, 0)]))
    for module in (attention, gpu_device):
        monkeypatch.setattr(module, "require_runnable", gpu_device.require_runnable)
    monkeypatch.setattr(gpu_device, "is_interpreted", lambda: False)
    with pytest.raises(InvalidOperation, match="queries: backend 'triton': expected a tensor on a CUDA device"):
        paged_attention(case.queries, case.keys, case.values, **case.options, backend="triton")
    with pytest.raises(InvalidOperation, match="device: backend 'triton': expected a tensor on a CUDA device"):
        KvStorage(KvCacheSpec(1), "cpu", backend="triton")


def test_without_triton_the_error_says_how_to_install_it(monkeypatch):
    gpu_device.is_interpreted.cache_clear()
    monkeypatch.setitem(sys.modules, "triton", None)
    case = make_case(Shape([(9, 1, 0, 0)]))
    with pytest.raises(MissingExtra, match=r"pip install 'pagedkv\[gpu\]'"):
        paged_attention(case.queries, case.keys, case.values, **case.options, backend="triton")
    gpu_device.is_interpreted.cache_clear()


def test_the_cache_works_without_triton():
    """In a process that has none, as after an installation on a machine without a GPU."""
    program = """
import subprocess
import sys
sys.modules["triton"] = None
import torch
from pagedkv import MissingExtra, PagedKvCache
cache = PagedKvCache(4, 4, 1, 8, dtype="float32")
cache.allocate(1, 3)
plan, tokens = cache.plan([1]), torch.ones(3, 1, 8)
cache.write(0, tokens, tokens, plan)
assert cache.attend(0, tokens, plan, backend="reference").eq(1).all()
try:
    cache.attend(0, tokens, plan, backend="triton")
except MissingExtra as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "pip install 'pagedkv[gpu]'" in done.stdout, done.stderr


def test_storage_refuses_an_unknown_backend():
    with pytest.raises(InvalidOperation, match="backend: expected one of auto, torch, triton, got 'cuda'"):
        KvStorage(KvCacheSpec(1), backend="cuda")


@pytest.mark.parametrize("group", [1, 2, 3, 4, 7, 8, 16, 71])
@pytest.mark.parametrize("dim", [16, 64, 80, 128, 256, 576])
@pytest.mark.parametrize("item_bytes", [2, 4])
@pytest.mark.parametrize("shared", [64 << 10, 99 << 10, 227 << 10])
def test_there_is_a_configuration_for_every_shape(group, dim, item_bytes, shared):
    device = Device("some", 100, shared, 80)
    for most in (0, 1, Heads(group, dim, dim, item_bytes, item_bytes, 0).few):
        configs = candidates(Heads(group, dim, dim, item_bytes, item_bytes, most), device)
        assert configs and len(set(configs)) == len(configs) <= 10
        for config in configs:
            assert config.tile_m >= max(16, group * most) and config.tile_m >= group
            assert config.tile_m & (config.tile_m - 1) == 0


def test_splits_fill_the_device_and_stay_worth_their_while():
    config, device = Config(16, 64, 4, 3), Device("some", 132, 227 << 10, 90)

    def splits(programs, longest):
        return num_splits(programs, longest, config, device)

    assert [splits(programs, 131072) for programs in (1, 8, 64, 100, 132, 133, 256, 4096)] == [64, 33, 4, 2, 2, 1, 1, 1]
    assert [splits(8, longest) for longest in (0, 300, 512, 1024, 4096)] == [1, 1, 2, 4, 16], "four tiles for each"
    assert splits(0, 0) == 1


class Launches:
    """A device on which only some configurations find room."""

    def __init__(self, fitting):
        self.fitting, self.seen = fitting, []

    def __call__(self, config):
        self.seen.append(config)
        if config not in self.fitting:
            raise OutOfResources(300_000, 232_448, "shared memory")


@pytest.fixture
def hopper(monkeypatch):
    device = Device("some", 132, 227 << 10, 90)
    monkeypatch.setattr(gpu, "device_of", lambda _: device)
    monkeypatch.setattr(gpu, "_refused", set())
    return device


def test_a_smaller_configuration_runs_where_the_first_has_no_room(hopper):
    heads, call = Heads(4, 128, 128, 2, 2, 1), make_case(Shape([(9, 1, 0, 0)])).call()
    configs = candidates(heads, hopper)
    launches = Launches({configs[2], configs[3]})
    gpu._run_fitting(heads, call, launches)
    assert launches.seen == list(configs[:3])
    launches.seen.clear()
    gpu._run_fitting(heads, call, launches)
    assert launches.seen == [configs[2]], "what does not fit is not tried at every call"


def test_heads_that_no_configuration_has_room_for_are_refused(hopper):
    call = make_case(Shape([(9, 1, 0, 0)])).call()
    for _ in range(2):
        with pytest.raises(InvalidOperation, match="expected heads that some has the memory for, got heads of 128"):
            gpu._run_fitting(Heads(4, 128, 128, 2, 2, 1), call, Launches(set()))


def test_halves_are_computed_in_their_own_dtype_where_keys_fit():
    case = make_case(Shape([(9, 1, 0, 0)], dtype=torch.float16))
    call = case.call()
    assert gpu.compute_dtype(call) == torch.float16
    call.queries = call.queries.bfloat16()
    assert gpu.compute_dtype(call) == torch.float32
    assert TOLERANCE[torch.float16] == 1e-2
