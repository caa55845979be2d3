"""K and V go from a pool to a tier and, after a restart, back: the same bytes under the same tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.contracts.user_tiers import DictTier

from pagedkv import BlockManager, InvalidOperation, KvCacheSpec, KvStorage, LayerSpec, OutOfMemory, PagedKvCache
from pagedkv.tiers import BlockFormat, DiskTier, HostTier, demote, fingerprint_of, promote
from pagedkv.tiers.moving import read_rows, write_rows

IDS = np.random.default_rng(0).integers(0, 1000, 75).tolist()  # four blocks of 16 and a tail


def cache(dtype="float32", **options):
    return PagedKvCache(20, 16, 2, 8, num_layers=3, dtype=dtype, **options)


def computed(pool, seq_id, ids, salt="", seed=0):
    """Write K and V that follow from the seed, as a forward pass would."""
    pool.allocate(seq_id, ids, cache_salt=salt)
    plan = pool.plan([seq_id])
    generator = torch.Generator().manual_seed(seed)
    for layer in range(3):
        keys, values = torch.randn(2, plan.total_tokens, 2, 8, generator=generator)
        pool.write(layer, keys, values, plan)
    pool.commit(plan)


def states(pool, seq_id, count):
    """K and V of the first blocks of a sequence, as bytes."""
    return read_rows(pool.storage, pool.get_sequence(seq_id).block_table[:count])


def block_of(pool, fingerprint="model"):
    return BlockFormat(fingerprint, pool.block_size, pool.block_memory_bytes)


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "fp8"])
def test_k_and_v_survive_a_restart(tmp_path, dtype, layout):
    pool = cache(dtype, layout=layout)
    computed(pool, 1, IDS)
    before = states(pool, 1, 4)
    with DiskTier(tmp_path / "tier", "1MB").open(block_of(pool)) as tier:
        assert demote(pool, tier, 1, IDS).result() == 4
    pool = cache(dtype, layout=layout)
    for tensor in (memory for part in pool.storage._pools for memory in part.memory):
        tensor.view(torch.uint8).fill_(255)
    with DiskTier(tmp_path / "tier", "1MB").open(block_of(pool)) as tier:
        assert promote(pool, tier, 7, IDS) == 64 == pool.match_prefix(IDS)
        assert promote(pool, tier, 7, IDS) == 64 and tier.stats.loaded == 4
    assert pool.num_sequences == 0
    assert pool.allocate(8, IDS).num_cached_tokens == 64
    assert (states(pool, 8, 4) == before).all()
    pool.check()


@pytest.mark.parametrize("make", [lambda pool: HostTier("1MB").open(block_of(pool)), lambda pool: DictTier(16)])
def test_only_what_the_pool_lacks_is_loaded_and_only_what_the_tier_lacks_is_stored(make):
    pool, other = cache(), cache()
    tier = make(pool)
    computed(pool, 1, IDS)
    longer = [*IDS[:64], *range(40)]
    computed(pool, 2, longer)
    assert demote(pool, tier, 1, IDS).result() == 4
    assert demote(pool, tier, 2, longer).result() == 6
    computed(other, 1, IDS[:40], seed=5)
    own = states(other, 1, 2)
    assert promote(other, tier, 9, longer) == 96
    assert (states(other, 1, 2) == own).all() and other.match_prefix([*longer, 1]) == 96
    if isinstance(tier, HostTier):
        assert (tier.stats.stored, tier.stats.loaded) == (6, 4)
    other.free(1)
    other.allocate(3, [*longer, 1])
    assert (states(other, 3, 6) == np.concatenate([own, states(pool, 2, 6)[2:]])).all()
    other.check()
    tier.close()


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_what_the_tier_has_already_is_not_read_again(dtype):
    pool = cache(dtype)
    tier = HostTier("1MB").open(block_of(pool))
    computed(pool, 1, IDS)
    for _ in range(2):
        assert demote(pool, tier, 1, IDS).result() == 4 == tier.stats.stored
    computed(pool, 2, [7, 8])
    assert demote(pool, tier, 2, [7, 8]).result() == 0


@pytest.mark.parametrize("held", [55, 33, 7])
def test_a_block_that_the_pool_has_in_part_is_the_whole_one_of_the_tier(held, tmp_path):
    """Its first tokens are copied from a block of another text; that copy comes before what is loaded, never behind."""
    pool, other = cache(), cache()
    ids = IDS[:64]
    computed(pool, 1, ids)
    before = states(pool, 1, 4)
    computed(other, 1, [*ids[:held], *range(2000, 2030)], seed=5)
    own = states(other, 1, held // 16)
    with DiskTier(tmp_path / "tier", "1MB").open(block_of(pool)) as tier:
        demote(pool, tier, 1, ids).result()
        assert promote(other, tier, 9, ids) == 64
    plan = other.append_batch([1], [5])  # whatever was left to copy is copied by now
    for layer in range(3):
        other.write(layer, *torch.zeros(2, 1, 2, 8), plan)
    other.commit(plan)
    other.allocate(2, [*ids, 1])
    assert other.get_sequence(2).num_cached_tokens == 64 and other.stats.partial_hit_tokens == held % 16
    assert (states(other, 2, 4) == np.concatenate([own, before[len(own) :]])).all()
    other.check()


@pytest.mark.parametrize("lost", [3, 1, 0])
def test_a_load_that_fails_leaves_nothing_of_a_block_that_the_pool_has_in_part(lost, tmp_path):
    pool, other = cache(), cache()
    ids = IDS[:64]
    computed(pool, 1, ids)
    computed(other, 1, [*ids[: lost * 16 + 7], *range(2000, 2030)], seed=5)
    with DiskTier(tmp_path / "tier", "1MB").open(block_of(pool)) as tier:
        demote(pool, tier, 1, ids).result()
        slab = np.memmap(tmp_path / "tier" / "slab", np.uint8, "r+")
        slab[lost * -(-pool.block_memory_bytes // 4096) * 4096 + 77] ^= 4
        assert promote(other, tier, 9, ids) == lost * 16 == other.match_blocks(ids)
    assert other.match_prefix(ids) == lost * 16 + 7
    other.check()


def test_blocks_that_are_not_written_yet_are_not_stored():
    pool = cache()
    tier = HostTier("1MB").open(block_of(pool))
    computed(pool, 1, IDS[:40])
    pool.append(1, IDS[40:])
    assert demote(pool, tier, 1, IDS).result() == 2 == tier.match(IDS).result()


def test_one_flipped_bit_costs_what_is_behind_it(tmp_path):
    pool = cache()
    computed(pool, 1, IDS)
    with DiskTier(tmp_path / "tier", "1MB").open(block_of(pool)) as tier:
        demote(pool, tier, 1, IDS).result()
    slab = np.memmap(tmp_path / "tier" / "slab", np.uint8, "r+")
    slab[2 * -(-pool.block_memory_bytes // 4096) * 4096 + 77] ^= 4
    slab.flush()
    other = cache()
    with DiskTier(tmp_path / "tier", "1MB").open(block_of(pool)) as tier:
        assert promote(other, tier, 1, IDS) == 32 == other.match_prefix(IDS)
        assert tier.stats.corrupt == 1
        assert demote(pool, tier, 1, IDS).result() == 4  # healed
        assert promote(other, tier, 1, IDS) == 64
    other.check()


def test_salts_share_nothing(tmp_path):
    pool, other = cache(), cache()
    computed(pool, 1, IDS, "a")
    with DiskTier(tmp_path / "tier", "1MB").open(block_of(pool)) as tier:
        demote(pool, tier, 1, IDS, "a").result()
    with DiskTier(tmp_path / "tier", "1MB").open(block_of(pool)) as tier:
        assert promote(other, tier, 1, IDS) == 0 == promote(other, tier, 1, IDS, "b")
        assert promote(other, tier, 1, IDS, "a") == 64
    assert other.match_prefix(IDS) == 0 and other.match_prefix(IDS, "a") == 64


def test_what_cannot_be_moved_changes_nothing():
    pool = cache()
    tier = HostTier("1MB").open(block_of(pool))
    computed(pool, 1, IDS)
    demote(pool, tier, 1, IDS).result()
    full = PagedKvCache(5, 16, 2, 8, num_layers=3, dtype="float32")
    full.allocate(1, 32)
    with pytest.raises(OutOfMemory):
        promote(full, tier, 2, IDS)
    with pytest.raises(InvalidOperation, match="exists already"):
        promote(full, tier, 1, IDS)
    full.check()
    assert full.num_sequences == 1 and full.match_prefix(IDS) == 0
    with pytest.raises(InvalidOperation, match="token_ids: expected 75, the tokens of S1, got 74"):
        demote(pool, tier, 1, IDS[:-1])
    with pytest.raises(InvalidOperation, match="token_ids: expected 75, the tokens of S1, got 76"):
        demote(pool, tier, 1, [*IDS, 1])
    with pytest.raises(InvalidOperation, match="recurrent states"):
        promote(cache(num_states=2), tier, 1, IDS)
    pool.apply_streaming_llm(1, 16, 16)
    with pytest.raises(InvalidOperation, match="S1, which streamed"):
        demote(pool, tier, 1, IDS)


def test_rows_hold_layers_of_any_shape():
    spec = KvCacheSpec(6, 4, dtype="float16", layers=(LayerSpec(2, 8), LayerSpec(1, 6, 10), LayerSpec(3, 5)))
    storage = KvStorage(spec)
    for part in storage._pools:
        for memory in part.memory:
            memory.copy_(torch.randn(memory.shape))
    rows = read_rows(storage, np.array([4, 1]))
    assert rows.shape == (2, spec.block_memory_bytes)
    write_rows(storage, np.array([0, 5]), rows)
    for layer in range(3):
        assert (storage.keys(layer)[[0, 5]] == storage.keys(layer)[[4, 1]]).all()
        assert (storage.values(layer)[[0, 5]] == storage.values(layer)[[4, 1]]).all()


# Fingerprints.

WEIGHTS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(3, dtype=torch.int64)}
SETTINGS = {"rope_theta": 10_000.0, "rope": {"type": "yarn", "factor": 4}, "sliding_window": None}
SPEC = KvCacheSpec(10, 16, 2, 8, num_layers=3)


def test_a_fingerprint_stays_the_same():
    same = fingerprint_of(dict(reversed(WEIGHTS.items())), dict(reversed(SETTINGS.items())), SPEC)
    assert same == fingerprint_of(WEIGHTS, SETTINGS, KvCacheSpec(99, 16, 2, 8, num_layers=3)) and len(same) == 32


@pytest.mark.parametrize(
    "changed",
    [
        {"weights": {**WEIGHTS, "a": WEIGHTS["a"] + torch.tensor([0, 0, 1e-6])}},
        {"weights": {**WEIGHTS, "a": WEIGHTS["a"].reshape(3, 2)}},
        {"weights": {"a": WEIGHTS["a"], "c": WEIGHTS["b"]}},
        {"weights": {"a": WEIGHTS["a"]}},
        {"weights": {**WEIGHTS, "b": WEIGHTS["b"].to(torch.int32)}},
        {"weights": {"a": WEIGHTS["a"].to(torch.bfloat16), "b": WEIGHTS["b"]}},
        {"settings": {**SETTINGS, "rope_theta": 10_001.0}},
        {"settings": {**SETTINGS, "rope": {"type": "yarn", "factor": 8}}},
        {"settings": {**SETTINGS, "sliding_window": 512}},
        {"spec": KvCacheSpec(10, 32, 2, 8, num_layers=3)},
        {"spec": KvCacheSpec(10, 16, 2, 8, num_layers=3, dtype="bfloat16")},
        {"spec": KvCacheSpec(10, 16, 2, 8, num_layers=3, layout="HND")},
        {"spec": KvCacheSpec(10, 16, 2, 8, num_layers=4)},
        {"adapter": "lora v2"},
    ],
)
def test_whatever_k_and_v_depend_on_changes_the_fingerprint(changed):
    given = {"weights": WEIGHTS, "settings": SETTINGS, "spec": SPEC, "adapter": ""}
    assert fingerprint_of(**{**given, **changed}) != fingerprint_of(**given)


def test_bad_arguments_of_a_fingerprint():
    for changed in ({"weights": [1]}, {"settings": 3}, {"spec": BlockManager(1)}, {"adapter": None}):
        given = {"weights": WEIGHTS, "settings": SETTINGS, "spec": SPEC, "adapter": ""}
        with pytest.raises(InvalidOperation, match=next(iter(changed))):
            fingerprint_of(**{**given, **changed})
