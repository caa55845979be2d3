"""KvStorage against a plain dict: what is written is read back, and nothing else moves."""

from __future__ import annotations

import sys
import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pagedkv import BlockNotFound, InvalidOperation, KvCacheSpec, KvStorage, LayerSpec, OutOfMemory
from pagedkv.data.storage import SlotIndex

DTYPES = ("float16", "bfloat16", "float32")
LAYOUTS = ("NHD", "HND")


def poisoned(spec, device="cpu"):
    """A storage whose memory is all NaN, so that a slot that moved by mistake is seen."""
    storage = KvStorage(spec, device)
    for layer in range(storage.num_layers):
        storage.keys(layer).fill_(float("nan"))
        storage.values(layer).fill_(float("nan"))
    return storage


def token(storage, layer, seed):
    """Random K and V of one token, exact in the storage's dtype."""
    shape = storage.spec.layer_specs[layer]
    rng = torch.Generator().manual_seed(seed)
    keys = torch.randn(shape.num_kv_heads, shape.head_dim, generator=rng).to(storage.dtype)
    values = torch.randn(shape.num_kv_heads, shape.v_head_dim, generator=rng).to(storage.dtype)
    return keys, values


def batch(storage, layer, seeds):
    tokens = [token(storage, layer, seed) for seed in seeds]
    shape = storage.spec.layer_specs[layer]
    if not tokens:
        empty = (0, shape.num_kv_heads)
        return torch.empty(*empty, shape.head_dim), torch.empty(*empty, shape.v_head_dim)
    return torch.stack([keys for keys, _ in tokens]), torch.stack([values for _, values in tokens])


def in_nhd(storage, blocks):
    return blocks.transpose(1, 2) if storage.spec.layout == "HND" else blocks


def assert_holds(storage, model):
    """Every slot of the storage holds what the model says; a slot that the model does not know is still NaN."""
    size = storage.spec.block_size
    for layer in range(storage.num_layers):
        sides = [in_nhd(storage, side) for side in (storage.keys(layer), storage.values(layer))]
        for block in range(storage.spec.num_blocks):
            for offset in range(size):
                found = [side[block, offset] for side in sides]
                seed = model.get((layer, block * size + offset))
                if seed is None:
                    assert all(side.isnan().all() for side in found)
                else:
                    expected = token(storage, layer, seed)
                    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


uniform = st.builds(
    lambda count, layer: (layer,) * count,
    st.integers(1, 3),
    st.builds(LayerSpec, st.integers(1, 3), st.sampled_from([1, 2, 8, 12]), st.sampled_from([None, 4, 8])),
)
mixed = st.lists(
    st.builds(LayerSpec, st.integers(1, 3), st.sampled_from([1, 8]), st.sampled_from([None, 4])), min_size=1, max_size=3
).map(tuple)
specs = st.builds(
    lambda blocks, size, layers, dtype, layout: KvCacheSpec(blocks, size, layers=layers, dtype=dtype, layout=layout),
    st.integers(1, 5),
    st.integers(1, 4),
    uniform | mixed,
    st.sampled_from(DTYPES),
    st.sampled_from(LAYOUTS),
)


@given(specs, st.data())
def test_roundtrip_against_a_dict(spec, data):
    storage = poisoned(spec)
    model = {}
    seed = 0
    slots = st.lists(st.integers(0, spec.num_blocks * spec.block_size - 1), unique=True, max_size=6)
    blocks = st.integers(0, spec.num_blocks - 1)
    for _ in range(data.draw(st.integers(1, 6))):
        if data.draw(st.booleans()):
            layer, chosen = data.draw(st.integers(0, spec.num_layers - 1)), data.draw(slots)
            seeds = range(seed, seed := seed + len(chosen))
            storage.write(layer, *batch(storage, layer, seeds), np.array(chosen, np.int64))
            model |= {(layer, slot): seed for slot, seed in zip(chosen, seeds, strict=True)}
            for found, expected in zip(
                storage.gather(layer, np.array(chosen, np.int64)), batch(storage, layer, seeds), strict=True
            ):
                assert torch.equal(found, expected.to(found.dtype))
        else:
            pairs = data.draw(st.lists(st.tuples(blocks, blocks), unique_by=lambda pair: pair[1], max_size=4))
            storage.copy_blocks(np.array(pairs, np.int32).reshape(-1, 2))
            before, size = dict(model), spec.block_size
            for source, destination in pairs:
                for layer in range(spec.num_layers):
                    for offset in range(size):
                        copied = before.get((layer, source * size + offset))
                        if copied is None:
                            model.pop((layer, destination * size + offset), None)
                        else:
                            model[layer, destination * size + offset] = copied
    assert_holds(storage, model)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("head_dims", [(8, 8), (8, 12)])
@pytest.mark.parametrize(
    "pairs",
    [
        [(0, 1), (1, 2), (2, 3)],  # a chain
        [(2, 3), (1, 2), (0, 1)],  # the same chain, listed from its end
        [(0, 1), (1, 0)],  # a swap
        [(0, 1), (1, 2), (2, 0)],  # a ring
        [(0, 1), (0, 2), (0, 3)],  # one source, many copies
        [(1, 1)],
    ],
)
def test_copies_read_every_source_before_they_write(layout, head_dims, pairs):
    spec = KvCacheSpec(4, 2, 2, head_dims[0], v_head_dim=head_dims[1], num_layers=2, layout=layout)
    storage = KvStorage(spec)
    slots = np.arange(8)
    for layer in range(2):
        storage.write(layer, *batch(storage, layer, slots.tolist()), slots)
    storage.copy_blocks(np.array(pairs, np.int32))
    came_from = {destination: source for source, destination in pairs}
    model = {
        (layer, slot): came_from.get(slot // 2, slot // 2) * 2 + slot % 2
        for layer in range(2)
        for slot in slots.tolist()
    }
    assert_holds(storage, model)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("given_as", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_write_casts_to_the_storage_dtype(dtype, given_as):
    storage = KvStorage(KvCacheSpec(2, 4, 2, 8, dtype=dtype))
    keys, values = torch.randn(3, 2, 8).to(given_as), torch.randn(3, 2, 8).to(given_as)
    storage.write(0, keys, values, np.array([7, 0, 3]))
    found = storage.gather(0, np.array([7, 0, 3]))
    assert torch.equal(found[0], keys.to(storage.dtype))
    assert torch.equal(found[1], values.to(storage.dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_write_takes_any_strides_and_alignment(layout):
    storage = KvStorage(KvCacheSpec(2, 4, 2, 8, layout=layout))
    fused = torch.randn(4, 2, 24).half()
    flat = torch.randn(4 * 2 * 8 + 1).half()
    inputs = {
        "a slice of a fused projection": fused[..., 8:16],
        "heads first": torch.randn(2, 4, 8).half().transpose(0, 1),
        "every second token": torch.randn(8, 2, 8).half()[::2],
        "one broadcast token": torch.randn(1, 2, 8).half().expand(4, 2, 8),
        "memory off by one element": flat[1:].view(4, 2, 8),
    }
    slots = np.array([5, 0, 2, 7])
    for name, tokens in inputs.items():
        storage.write(0, tokens, tokens, slots)
        for found in storage.gather(0, slots):
            assert torch.equal(found, tokens), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bit_patterns_survive(layout):
    """Rows may be moved in wide elements: NaNs, infinities and subnormal numbers must come through as they are."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(-1, 2, 64)
    storage = KvStorage(KvCacheSpec(len(bits) // 4, 4, 2, 64, layout=layout))
    slots = np.random.default_rng(0).permutation(len(bits))
    storage.write(0, bits.view(torch.float16), bits.view(torch.float16).flip(0), slots)
    blocks = np.arange(storage.spec.num_blocks)
    storage.copy_blocks(np.stack([blocks, np.roll(blocks, -1)], axis=1))
    moved = (slots + 4) % len(bits)
    keys, values = storage.gather(0, moved)
    assert torch.equal(keys.view(torch.int16), bits)
    assert torch.equal(values.view(torch.int16), bits.flip(0))


@pytest.mark.parametrize(
    "as_given",
    [
        lambda slots: slots,
        lambda slots: slots.astype(np.int32),
        lambda slots: slots.astype(np.uint64),
        lambda slots: slots[::-1].copy()[::-1],
        lambda slots: torch.from_numpy(slots),
        lambda slots: torch.from_numpy(slots).to(torch.int32),
        lambda slots: np.repeat(slots, 2)[::2],
    ],
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_slots_of_any_integer_type(as_given, layout):
    storage = poisoned(KvCacheSpec(2, 4, 1, 2, layout=layout))
    slots = np.array([6, 1, 3])
    storage.write(0, *batch(storage, 0, [0, 1, 2]), as_given(slots))
    assert_holds(storage, {(0, 6): 0, (0, 1): 1, (0, 3): 2})


def test_slots_that_must_not_be_written_are_fine():
    storage = poisoned(KvCacheSpec(2, 4, 1, 2))
    slots = np.array([6, 1])
    slots.flags.writeable = False
    storage.write(0, *batch(storage, 0, [0, 1]), slots)
    assert_holds(storage, {(0, 6): 0, (0, 1): 1})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_slot_index_serves_all_layers(layout):
    storage = poisoned(KvCacheSpec(2, 4, 2, 8, num_layers=3, layout=layout))
    index = storage.slot_index(np.array([6, 1]))
    assert len(index) == 2
    assert storage.slot_index(index) is index
    for layer in range(3):
        storage.write(layer, *batch(storage, layer, [layer, 10 + layer]), index)
    assert_holds(storage, {(layer, slot): seed for layer in range(3) for slot, seed in ((6, layer), (1, 10 + layer))})
    with pytest.raises(InvalidOperation, match="slot_mapping: expected slots of this storage"):
        poisoned(storage.spec).gather(0, index)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("v_head_dim", [8, 4])
def test_blocks_of_equal_layers_are_live_views_in_nhd_order(layout, v_head_dim):
    storage = KvStorage(KvCacheSpec(3, 4, 2, 8, v_head_dim=v_head_dim, num_layers=5, layout=layout))
    keys, values = storage.block(1)
    assert keys.shape == (5, 4, 2, 8)
    assert values.shape == (5, 4, 2, v_head_dim)
    storage.write(3, *batch(storage, 3, [42]), np.array([1 * 4 + 2]))
    assert torch.equal(keys[3, 2], token(storage, 3, 42)[0])
    assert torch.equal(values[3, 2], token(storage, 3, 42)[1])
    keys[4, 0] = 7.0
    assert (storage.gather(4, np.array([4]))[0] == 7.0).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_blocks_of_differing_layers_are_lists_of_live_views(layout):
    storage = KvStorage(KvCacheSpec(3, 4, layers=(LayerSpec(2, 8), LayerSpec(1, 24, 16)), layout=layout))
    keys, values = storage.block_keys(2), storage.block_values(2)
    assert [tuple(view.shape) for view in keys] == [(4, 2, 8), (4, 1, 24)]
    assert [tuple(view.shape) for view in values] == [(4, 2, 8), (4, 1, 16)]
    storage.write(1, *batch(storage, 1, [5]), np.array([2 * 4 + 3]))
    assert torch.equal(values[1][3], token(storage, 1, 5)[1])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layer_views_share_memory_with_the_layer_tensor(layout):
    spec = KvCacheSpec(3, 4, 2, 8, num_layers=2, layout=layout)
    storage = KvStorage(spec)
    storage.add_layer(LayerSpec(1, 16))
    for layer in range(3):
        both = storage.layer_tensor(layer)
        assert both.shape == (2, 3, *storage.spec.block_shape(layer))
        assert both[0].data_ptr() == storage.keys(layer).data_ptr()
        assert both[1].data_ptr() == storage.values(layer).data_ptr()


def test_layer_tensor_is_refused_where_keys_and_values_differ():
    storage = KvStorage(KvCacheSpec(3, 4, 2, 8, v_head_dim=4))
    with pytest.raises(InvalidOperation, match="layer 0: keys and values differ in size"):
        storage.layer_tensor(0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_storage_grows_from_no_layers_at_all(layout):
    storage = KvStorage(KvCacheSpec(2, 4, num_layers=0, dtype="float32", layout=layout))
    assert (storage.num_layers, storage.memory_bytes, storage.block_keys(1)) == (0, 0, [])
    storage.copy_blocks(np.array([[0, 1]], np.int32))
    with pytest.raises(InvalidOperation, match="layer: the storage has no layers yet, got 0"):
        storage.keys(0)
    layers = (LayerSpec(2, 8), LayerSpec(2, 8), LayerSpec(1, 24, 16))
    for place, layer in enumerate(layers):
        assert storage.add_layer(layer) == place
        assert storage.spec == KvCacheSpec(2, 4, dtype="float32", layout=layout, layers=layers[: place + 1])
        assert storage.memory_bytes == storage.spec.total_memory_bytes
    for layer in range(3):
        storage.keys(layer).fill_(float("nan"))
        storage.values(layer).fill_(float("nan"))
        storage.write(layer, *batch(storage, layer, [layer]), np.array([3]))
    storage.copy_blocks(np.array([[0, 1]], np.int32))
    assert_holds(storage, {(layer, slot): layer for layer in range(3) for slot in (3, 7)})


def test_an_empty_pool_is_legal():
    storage = KvStorage(KvCacheSpec(0, 4, 2, 8))
    nothing = np.empty(0, np.int64)
    storage.write(0, torch.empty(0, 2, 8), torch.empty(0, 2, 8), nothing)
    storage.copy_blocks(np.empty((0, 2), np.int32))
    assert [len(side) for side in storage.gather(0, nothing)] == [0, 0]
    with pytest.raises(BlockNotFound):
        storage.block(0)


@pytest.mark.parametrize("head_dim", [8, 3])  # moved in wide elements, and one by one
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_are_not_followed_and_modes_do_not_matter(layout, head_dim):
    with torch.inference_mode():
        storage = KvStorage(KvCacheSpec(2, 4, 1, head_dim, dtype="float32", layout=layout))
        made_inside = torch.randn(1, 1, head_dim)
        storage.write(0, made_inside, made_inside, np.array([0]))
    tracked = torch.randn(1, 1, head_dim, requires_grad=True)
    storage.write(0, tracked * 2, tracked, np.array([1]))
    keys, values = storage.gather(0, np.array([0, 1]))
    assert not keys.requires_grad and not values.requires_grad
    assert not storage.keys(0).requires_grad
    assert torch.equal(keys, torch.cat([made_inside, tracked.detach() * 2]))


def test_memory_is_what_the_spec_says():
    for spec in (KvCacheSpec(5, 4, 3, 8, num_layers=2), KvCacheSpec(5, layers=(LayerSpec(1, 3, 5), LayerSpec(2, 4)))):
        assert KvStorage(spec).memory_bytes == spec.total_memory_bytes


def test_threads_may_write_different_slots():
    storage = poisoned(KvCacheSpec(8, 16, 2, 8))

    def write(part):
        for slot in range(part, 128, 4):
            storage.write(0, *batch(storage, 0, [slot]), np.array([slot]))

    threads = [threading.Thread(target=write, args=(part,)) for part in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_holds(storage, {(0, slot): slot for slot in range(128)})


# --- what is refused -------------------------------------------------------------------------------------------------

KEYS, SLOTS = torch.zeros(2, 2, 8), np.array([0, 1])
BAD_WRITES = {
    "layer outside": ((3, KEYS, KEYS, SLOTS), r"layer: expected an int in 0 … 1, got 3"),
    "layer negative": ((-1, KEYS, KEYS, SLOTS), r"layer: expected an int in 0 … 1, got -1"),
    "layer a bool": ((True, KEYS, KEYS, SLOTS), r"layer: expected an int, got True"),
    "layer a float": ((1.0, KEYS, KEYS, SLOTS), r"layer: expected an int, got 1.0"),
    "keys too many": ((0, torch.zeros(3, 2, 8), KEYS, SLOTS), r"keys: expected shape \[2, 2, 8\], got \[3, 2, 8\]"),
    "keys transposed": ((0, torch.zeros(2, 8, 2), KEYS, SLOTS), r"keys: expected shape \[2, 2, 8\], got \[2, 8, 2\]"),
    "keys of integers": ((0, KEYS.int(), KEYS, SLOTS), r"keys: expected a floating dtype, got torch.int32"),
    "keys complex": ((0, KEYS.cfloat(), KEYS, SLOTS), r"keys: expected a floating dtype, got torch.complex64"),
    "keys an array": ((0, KEYS.numpy(), KEYS, SLOTS), r"keys: expected a torch.Tensor, got ndarray"),
    "keys elsewhere": ((0, KEYS.to("meta"), KEYS, SLOTS), r"keys: expected a tensor on cpu, got one on meta"),
    "values too few": ((0, KEYS, torch.zeros(1, 2, 8), SLOTS), r"values: expected shape \[2, 2, 8\], got \[1, 2, 8\]"),
    "values none": ((0, KEYS, None, SLOTS), r"values: expected a torch.Tensor, got NoneType"),
    "slot behind": ((0, KEYS, KEYS, np.array([0, 8])), r"slot_mapping: expected slots in 0 … 7, got 8"),
    "slot negative": ((0, KEYS, KEYS, np.array([-1, 0])), r"slot_mapping: expected slots in 0 … 7, got -1"),
    "slot in a tensor": ((0, KEYS, KEYS, torch.tensor([0, 99])), r"slot_mapping: expected slots in 0 … 7, got 99"),
    "slots of floats": ((0, KEYS, KEYS, np.array([0.0, 1.0])), r"slot_mapping: expected integers, got float64"),
    "slots of bools": (
        (0, KEYS, KEYS, torch.tensor([True, False])),
        r"slot_mapping: expected integers, got torch.bool",
    ),
    "slots a list": ((0, KEYS, KEYS, [0, 1]), r"slot_mapping: expected an integer array or tensor, got list"),
    "slots a table": ((0, KEYS, KEYS, np.array([[0, 1]])), r"slot_mapping: expected shape \[n\], got \[1, 2\]"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", BAD_WRITES)
def test_a_refused_write_changes_nothing(name, layout):
    arguments, message = BAD_WRITES[name]
    storage = poisoned(KvCacheSpec(2, 4, 2, 8, num_layers=2, layout=layout))
    with pytest.raises(InvalidOperation, match=message):
        storage.write(*arguments)
    assert_holds(storage, {})


BAD_COPIES = {
    "source outside": ([(0, 1), (4, 2)], BlockNotFound, "Block not found: B4"),
    "destination outside": ([(0, 1), (0, 9)], BlockNotFound, "Block not found: B9"),
    "negative": ([(0, 1), (-1, 2)], BlockNotFound, "Block not found: B-1"),
    "one destination twice": ([(0, 2), (1, 2)], InvalidOperation, "expected distinct destinations, got B2 twice"),
    "three columns": ([(0, 1, 2)], InvalidOperation, r"copies: expected shape \[k, 2\], got \[1, 3\]"),
    "one row": ((0, 1), InvalidOperation, r"copies: expected shape \[k, 2\], got \[2\]"),
    "floats": ([(0.0, 1.0)], InvalidOperation, "copies: expected integers, got float64"),
}


@pytest.mark.parametrize("name", BAD_COPIES)
def test_refused_copies_change_nothing(name):
    pairs, kind, message = BAD_COPIES[name]
    storage = poisoned(KvCacheSpec(4, 2, 1, 2))
    storage.write(0, *batch(storage, 0, range(4)), np.arange(4))
    with pytest.raises(kind, match=message):
        storage.copy_blocks(np.array(pairs))
    assert_holds(storage, {(0, slot): slot for slot in range(4)})


def test_a_block_that_the_pool_does_not_have():
    storage = KvStorage(KvCacheSpec(2, 4, 2, 8))
    for block_id in (2, -1, 2**40):
        with pytest.raises(BlockNotFound, match=f"B{block_id}"):
            storage.block_keys(block_id)
    for block_id in (True, 0.0, "0", None):
        with pytest.raises(InvalidOperation, match="block_id: expected an int"):
            storage.block_values(block_id)


@pytest.mark.parametrize("device", ["nowhere", "cuda:99", 1.5, "cpu:x"])
def test_a_device_that_torch_does_not_have(device):
    with pytest.raises(InvalidOperation, match="device: expected a device that torch can use here"):
        KvStorage(KvCacheSpec(2), device)


def test_a_spec_or_a_layer_of_another_type():
    with pytest.raises(InvalidOperation, match="spec: expected a KvCacheSpec, got int"):
        KvStorage(16)
    storage = KvStorage(KvCacheSpec(2, num_layers=0))
    with pytest.raises(InvalidOperation, match="layer: expected a LayerSpec, got tuple"):
        storage.add_layer((2, 8))
    assert storage.num_layers == 0


def test_more_memory_than_there_is():
    spec = KvCacheSpec(2**31 - 1, 2**20, 64, 256)
    with pytest.raises(OutOfMemory, match="bytes cannot be allocated on cpu") as error:
        KvStorage(spec)
    assert error.value.requested == spec.num_blocks
    growing = KvStorage(KvCacheSpec(2**31 - 1, 2**20, num_layers=0))
    with pytest.raises(OutOfMemory):
        growing.add_layer(LayerSpec(64, 256))
    assert (growing.num_layers, growing.memory_bytes) == (0, 0)


@pytest.mark.skipif(sys.platform != "linux", reason="counts in the way of Linux")
def test_unwritten_memory_is_not_committed():
    def peak_bytes():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    resource = pytest.importorskip("resource")
    before = peak_bytes()
    storage = KvStorage(KvCacheSpec(2**12, 16, 8, 128, num_layers=8))
    storage.write(0, torch.ones(1, 8, 128), torch.ones(1, 8, 128), np.array([0]))
    assert storage.memory_bytes == 2**31
    assert peak_bytes() - before < 2**28


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_on_a_gpu(dtype, layout):
    spec = KvCacheSpec(8, 4, 2, 8, num_layers=2, dtype=dtype, layout=layout)
    storage, mirror = KvStorage(spec, "cuda"), KvStorage(spec)
    assert storage.device == torch.device("cuda", torch.cuda.current_device())
    slots = np.random.default_rng(0).permutation(32)
    copies = np.array([[0, 1], [1, 0], [2, 3]], np.int32)
    for layer in range(2):
        keys, values = batch(mirror, layer, range(32))
        mirror.write(layer, keys, values, slots)
        storage.write(layer, keys.cuda(), values.cuda(), storage.slot_index(slots))
    for each in (storage, mirror):
        each.copy_blocks(copies)
    for layer in range(2):
        assert torch.equal(storage.keys(layer).cpu(), mirror.keys(layer))
        assert torch.equal(storage.values(layer).cpu(), mirror.values(layer))
        for found, expected in zip(storage.gather(layer, slots), mirror.gather(layer, slots), strict=True):
            assert torch.equal(found.cpu(), expected)


def test_slot_index_is_a_documented_handle():
    storage = KvStorage(KvCacheSpec(2, 4))
    index = storage.slot_index(np.array([1, 5]))
    assert isinstance(index, SlotIndex)
    assert index.owner is storage
    assert index.slots.tolist() == [1, 5]
