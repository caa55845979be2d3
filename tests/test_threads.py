"""Many threads share one cache, ids of every size, and bad input of every kind."""

from __future__ import annotations

import random
import re
import threading
from collections import Counter

import numpy as np
import pytest
import torch

from pagedkv import BlockManager, InvalidOperation, OutOfMemory, PagedKvCache, PagedKvError, SequenceNotFound


def in_threads(count, work):
    """Run ``work(number)`` in many threads and hand on the first error."""
    errors = []
    start = threading.Barrier(count)

    def run(number):
        try:
            start.wait()
            work(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("on_full", ["raise", "evict"])
def test_threads_share_one_cache(on_full):
    manager = BlockManager(64, 4, on_full=on_full)
    happened = Counter()
    calls = {
        "allocate": lambda rng, name, ids: manager.allocate(name, ids, cache_salt=rng.choice("ab")),
        "append": lambda rng, name, ids: manager.append(name, ids[:4]),
        "append_batch": lambda rng, name, ids: manager.append_batch([name, (name + 1) % 12], counts=1),
        "commit": lambda rng, name, ids: manager.commit(name),
        "fork": lambda rng, name, ids: manager.fork(name, 12 + rng.randrange(4)),
        "free": lambda rng, name, ids: manager.free(rng.randrange(16)),
        "truncate": lambda rng, name, ids: manager.truncate(name, 1),
        "evict": lambda rng, name, ids: manager.evict(),
        "match": lambda rng, name, ids: manager.match_prefix(ids, "a"),
        "report": lambda rng, name, ids: str(manager) + str(manager.sequence_ids),
    }

    def work(number):
        rng = random.Random(number)
        for step in range(150):
            kind = rng.choice(list(calls))
            ids = [rng.randrange(2) for _ in range(rng.randrange(1, 20))]
            try:
                calls[kind](rng, rng.randrange(12), ids)
                happened[kind] += 1
            except PagedKvError:
                pass
            if step % 50 == 0:
                manager.check()

    in_threads(8, work)
    manager.check()
    assert all(happened[kind] > 10 for kind in ("allocate", "append", "fork", "free", "commit"))
    for seq_id in manager.sequence_ids:
        manager.free(seq_id)
    assert manager.used_block_count == 0 and manager.free_block_count == 64
    assert manager.stats.total_allocations == manager.stats.total_frees


@pytest.mark.parametrize("read", [lambda manager: manager.stats, str, repr, BlockManager.snapshot])
def test_several_counters_are_read_under_the_lock(read):
    """Without it they are of different moments while another thread allocates: more frees than allocations, say."""
    manager = BlockManager(64, 4)
    entered = []

    class Watched:
        def __enter__(self):
            entered.append(True)

        def __exit__(self, *error):
            entered.append(False)

    manager._lock = Watched()
    read(manager)
    assert entered[0] and not entered[-1]


def test_only_one_of_many_threads_gets_an_id_and_a_block():
    manager = BlockManager(50, 1)
    won = []

    def work(number):
        for seq_id in range(100):
            try:
                won.append((manager.allocate(seq_id, 1).block_ids, seq_id))
            except (InvalidOperation, OutOfMemory):
                pass

    in_threads(8, work)
    assert len(won) == 50 == len({blocks for blocks, _ in won}) == len({seq_id for _, seq_id in won})
    manager.check()


def test_references_of_forks_made_in_threads_balance():
    manager = BlockManager(64, 4)
    manager.allocate(0, 30)

    def work(number):
        for turn in range(100):
            twin = 1 + number * 100 + turn
            manager.fork(0, twin)
            if turn % 2:
                manager.append(twin, 1)
                manager.free(twin)

    in_threads(6, work)
    manager.check()
    assert manager.block(manager.get_sequence(0).block_ids[0]).ref_count == 1 + 6 * 50


def test_threads_with_tensors_write_what_they_own():
    cache = PagedKvCache(64, 4, 1, 1, dtype="float32")

    def work(number):
        for turn in range(20):
            cache.allocate(number, 0)
            mark = torch.full((3, 1, 1), float(number * 100 + turn))
            for _ in range(4):
                cache.write(0, mark, mark, cache.append_batch([number], counts=3))
            found, _ = cache.storage.gather(0, cache.plan([number], 12).slot_mapping)
            assert found.flatten().tolist() == [float(number * 100 + turn)] * 12
            cache.free(number)

    in_threads(8, work)
    cache.check()
    assert cache.used_block_count == 0


# ---------------------------------------------------------------- ids of every size

WIDE = [0, 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**63 + 1, 2**64 - 1]


def test_sequence_ids_of_all_64_bits():
    manager = BlockManager(40, 2)
    for seq_id in WIDE:
        assert manager.allocate(seq_id, 1).seq_id == seq_id
    assert manager.sequence_ids == WIDE
    for batch in (WIDE, np.array(WIDE, np.uint64), WIDE[::-1], [2**63]):
        plan = manager.append_batch(batch, counts=1)
        assert plan.seq_ids.view(np.uint64).tolist() == list(batch)
        manager.commit(plan)
    for seq_id in WIDE:
        assert seq_id in manager and manager.touch(seq_id).seq_id == seq_id
    assert [manager.evict() for _ in WIDE] == WIDE
    manager.check()


@pytest.mark.parametrize("seq_id", [2**63, 2**64 - 1])
def test_a_wide_id_that_is_not_there_is_named(seq_id):
    manager = BlockManager(4, 2)
    manager.allocate(1, 1)
    calls = (
        lambda: manager.append_batch([seq_id]),
        lambda: manager.append_batch([1, seq_id]),
        lambda: manager.plan(np.array([seq_id], np.uint64)),
        lambda: manager.append(seq_id, 1),
        lambda: manager.commit(seq_id),
    )
    for call in calls:
        with pytest.raises(SequenceNotFound, match=f"S{seq_id}"):
            call()


@pytest.mark.parametrize("kind", [np.int8, np.int32, np.int64, np.uint8, np.uint64, list, tuple, torch.tensor])
def test_batches_of_every_integer_kind(kind):
    manager = BlockManager(8, 2)
    values = [3, 1]
    batch = kind(values) if kind in (list, tuple, torch.tensor) else np.array(values, kind)
    for seq_id in values:
        manager.allocate(seq_id, 1)
    assert manager.append_batch(batch, counts=batch).num_query_tokens.tolist() == values
    assert manager.plan(batch, 1).seq_ids.tolist() == values
    assert manager.allocate(9, batch).num_tokens == 2
    strided = np.array([3, 0, 1, 0])[::2]
    assert manager.append_batch(strided).seq_ids.tolist() == values


@pytest.mark.parametrize("ids", [[5, 6, 7], (5, 6, 7), np.array([5, 6, 7], np.uint16), torch.tensor([5, 6, 7])])
def test_token_ids_of_every_kind_are_the_same_tokens(ids):
    manager = BlockManager(16, 2)
    manager.allocate(1, [5, 6, 7])
    manager.commit(1)
    assert manager.match_prefix(ids) == 2 and manager.allocate(2, ids).num_cached_tokens == 2
    manager.append_batch([1], [ids])
    manager.append(2, ids)
    matrix = np.stack([np.asarray(ids)] * 2)
    assert manager.append_batch([1, 2], matrix).num_query_tokens.tolist() == [3, 3]


# ---------------------------------------------------------------- bad input


def loaded():
    cache = PagedKvCache(16, 4, 1, 2, dtype="float32", strategy="priority:3")
    cache.allocate(1, [1, 2, 3, 4, 5])
    cache.commit(1)
    cache.fork(1, 2)
    return cache


def seen(cache):
    snap = cache.snapshot()
    arrays = (snap.ref_count, snap.cached, snap.pinned, snap.indexed, snap.num_tokens)
    return [a.tolist() for a in arrays], snap.sequences, snap.stats, snap.tick, cache.storage.keys(0).numpy().tobytes()


COUNTS = [-1, 2**70, 1.5, 2.0, float("nan"), True, False, None, "3", b"3", np.float32(2), np.True_, object()]
TOKENS = [
    [-1],
    [1.0],
    [True],
    ["a"],
    [None],
    [[1, 2]],
    [[1], [2, 3]],
    [2**64],
    [2**63],
    np.ones(3),
    torch.ones(2),
    torch.ones(2, requires_grad=True),
    torch.ones(2, dtype=torch.bfloat16),
    torch.ones(2, 2, dtype=torch.long),
    {1, 2},
    {1: 2},
    iter([1]),
]


def named(value):
    """Return an id that is the same in every process: no addresses."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


IDS = [-1, 2**64, 1.0, True, None, "1", [1], np.float64(1), float("nan")]


@pytest.mark.parametrize("tokens", COUNTS + TOKENS, ids=named)
@pytest.mark.parametrize(
    "call",
    [
        lambda cache, tokens: cache.allocate(9, tokens),
        lambda cache, tokens: cache.append(1, tokens),
        lambda cache, tokens: cache.append_batch([1, 2], [tokens, tokens]),
    ],
)
def test_bad_tokens(call, tokens):
    cache = loaded()
    before = seen(cache)
    with pytest.raises(InvalidOperation, match="tokens"):
        call(cache, tokens)
    assert seen(cache) == before
    cache.check()


@pytest.mark.parametrize(
    "tokens",
    [
        -1,
        2**70,
        1.5,
        True,
        "12",
        [1],
        [1, 2, 3],
        [1, -1],
        [1.0, 2.0],
        [2**62, 2**62],
        np.ones((3, 1), int),
        {0: 1},
    ],
    ids=named,
)
def test_bad_counts_of_a_batch(tokens):
    cache = loaded()
    before = seen(cache)
    with pytest.raises(InvalidOperation, match="counts"):
        cache.append_batch([1, 2], counts=tokens)
    with pytest.raises(InvalidOperation, match="num_query_tokens"):
        cache.plan([1, 2], tokens)
    assert seen(cache) == before


@pytest.mark.parametrize("count", [2**30, 2**40, 2**61, 2**62 // 2])
def test_absurd_counts_do_not_wrap_around(count):
    cache = loaded()
    before = seen(cache)
    for call in (
        lambda: cache.append_batch([1, 2], counts=count),
        lambda: cache.append_batch([1, 2], counts=[count, count]),
        lambda: cache.append(1, count),
        lambda: cache.allocate(9, count),
    ):
        with pytest.raises(OutOfMemory) as caught:
            call()
        assert caught.value.requested >= count // 4 and caught.value.available == 14
    assert seen(cache) == before


@pytest.mark.parametrize("seq_id", IDS, ids=named)
def test_bad_sequence_ids(seq_id):
    cache = loaded()
    before = seen(cache)
    for call in (
        lambda: cache.allocate(seq_id, 1),
        lambda: cache.append(seq_id, 1),
        lambda: cache.append_batch([1, seq_id]),
        lambda: cache.plan([seq_id]),
        lambda: cache.commit([seq_id] if isinstance(seq_id, list) else seq_id),  # a list is a batch
        lambda: cache.fork(seq_id, 9),
        lambda: cache.fork(1, seq_id),
        lambda: cache.truncate(seq_id, 0),
        lambda: cache.free(seq_id),
        lambda: cache.touch(seq_id),
        lambda: cache.set_priority(seq_id, 0),
        lambda: cache.pin(seq_id),
        lambda: cache.unpin(seq_id),
        lambda: cache.apply_streaming_llm(seq_id, 1, 1),
        lambda: cache.get_sequence(seq_id),
    ):
        with pytest.raises(InvalidOperation, match="seq_id|src|dst"):
            call()
    assert seq_id not in cache
    assert seen(cache) == before


@pytest.mark.parametrize(
    "batch",
    [
        1,
        None,
        "12",
        [[1, 2]],
        [[1], [1, 2]],
        np.array([[1], [2]]),
        np.array([1.0]),
        [-1],
        np.array([-1]),
        {1, 2},
        [None],
    ],
    ids=named,
)
def test_bad_batches_of_ids(batch):
    cache = loaded()
    before = seen(cache)
    for call in (cache.append_batch, cache.plan):
        with pytest.raises(InvalidOperation, match="seq_ids"):
            call(batch)
    assert seen(cache) == before


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda cache: cache.truncate(1, 6), "num_tokens"),
        (lambda cache: cache.truncate(1, -1), "num_tokens"),
        (lambda cache: cache.truncate(1, 1.0), "num_tokens"),
        (lambda cache: cache.pin(1, 6), "num_tokens"),
        (lambda cache: cache.pin(1, -1), "num_tokens"),
        (lambda cache: cache.plan([1], 6), "num_query_tokens"),
        (lambda cache: cache.set_priority(1, 3), "priority"),
        (lambda cache: cache.set_priority(1, True), "priority"),
        (lambda cache: cache.allocate(9, 1, priority=-1), "priority"),
        (lambda cache: cache.allocate(9, 1, cache_salt=b"x"), "cache_salt"),
        (lambda cache: cache.allocate(9, 1, cache_salt=None), "cache_salt"),
        (lambda cache: cache.match_prefix([1], 3), "cache_salt"),
        (lambda cache: cache.match_prefix(3), "token_ids"),
        (lambda cache: cache.apply_streaming_llm(1, -1, 2), "sink_tokens"),
        (lambda cache: cache.apply_streaming_llm(1, 1, 2.0), "window_tokens"),
        (lambda cache: cache.evict_to_threshold(float("nan")), "target"),
        (lambda cache: cache.evict_to_threshold("0.5"), "target"),
        (lambda cache: cache.evict_to_threshold(True), "target"),
        (lambda cache: cache.subscribe(None), "callback"),
        (lambda cache: cache.block(-1), "block_id"),
        (lambda cache: cache.block(1.0), "block_id"),
        (lambda cache: cache.write(0, None, None, "plan"), "plan"),
        (lambda cache: cache.attend(0, None, None), "plan"),
        (lambda cache: cache.write(0, torch.ones(2, 1, 2), torch.ones(5, 1, 2), cache.plan([1], 5)), "keys"),
        (lambda cache: cache.write(0, torch.ones(5, 1, 2), torch.ones(5, 2, 2), cache.plan([1], 5)), "values"),
        (lambda cache: cache.write(1, torch.ones(5, 1, 2), torch.ones(5, 1, 2), cache.plan([1], 5)), "layer"),
    ],
)
def test_bad_arguments_are_named(call, name):
    cache = loaded()
    before = seen(cache)
    with pytest.raises(InvalidOperation, match=name):
        call(cache)
    assert seen(cache) == before
    cache.check()


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"num_blocks": -1}, "num_blocks"),
        ({"num_blocks": 2**31}, "num_blocks"),
        ({"num_blocks": 1.0}, "num_blocks"),
        ({"num_blocks": True}, "num_blocks"),
        ({"block_size": 0}, "block_size"),
        ({"block_size": -4}, "block_size"),
        ({"block_size": "16"}, "block_size"),
        ({"num_kv_heads": 0}, "num_kv_heads"),
        ({"head_dim": 0}, "head_dim"),
        ({"num_layers": -1}, "num_layers"),
        ({"dtype": "int4"}, "dtype"),
        ({"dtype": torch.int32}, "dtype"),
        ({"dtype": None}, "dtype"),
        ({"layout": "NDH"}, "layout"),
        ({"eviction_threshold": float("nan")}, "eviction_threshold"),
        ({"eviction_threshold": "0.9"}, "eviction_threshold"),
        ({"eviction_threshold": None}, "eviction_threshold"),
        ({"on_full": "panic"}, "on_full"),
        ({"prefix_caching": 1}, "prefix_caching"),
        ({"strategy": "most_hated"}, "strategy"),
    ],
)
def test_bad_caches(options, name):
    with pytest.raises(InvalidOperation, match=name):
        PagedKvCache(**{"num_blocks": 2, "block_size": 4, "num_kv_heads": 1, "head_dim": 2, **options})


def test_a_block_manager_has_no_tensors():
    manager = BlockManager(2)
    for side in ("keys", "values"):
        with pytest.raises(InvalidOperation, match=f"holds no {side}"):
            getattr(manager.block(0), side)
