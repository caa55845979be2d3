"""One exam for every strategy: the built-in ones and two that a user might write."""

from __future__ import annotations

import copy
import re

import numba
import numpy as np
import pytest
from tests.contracts.strategy_oracles import BLOCK_SCORES, InNumpy
from tests.contracts.user_strategies import Modulo, Recorder, SmallestFirst

from pagedkv import (
    FIFO,
    GDSF,
    LFU,
    LRU,
    S3FIFO,
    SIEVE,
    TTL,
    Adaptive,
    BlockManager,
    BlockRemoved,
    EvictionStrategy,
    InvalidOperation,
    LongestFirst,
    OutOfMemory,
    PagedKvCache,
    Priority,
    StreamingLLM,
    parse_strategy,
    register_strategy,
)
from pagedkv.control.protocol import block_view
from pagedkv.jit import borrowed, call_kernel

STRATEGIES = [
    LRU(),
    LFU(),
    LongestFirst(),
    Priority(4),
    StreamingLLM(2, 8),
    FIFO(),
    S3FIFO(),
    SIEVE(),
    GDSF(),
    TTL(7),
    Adaptive(),
    SmallestFirst(),
    Modulo(3),
]


@pytest.fixture(params=STRATEGIES, ids=str)
def strategy(request):
    return copy.deepcopy(request.param)


def work(manager, seed=3, sequences=40):
    """Mixed work that leaves live sequences and cached chains behind."""
    rng = np.random.default_rng(seed)
    for seq_id in range(sequences):
        ids = rng.integers(0, 2, rng.integers(1, 14)).tolist()
        manager.allocate(seq_id, ids, priority=int(rng.integers(0, 4)))
        manager.commit(seq_id)
        live = manager.sequence_ids
        manager.touch(int(rng.choice(live)))
        if rng.random() < 0.5:
            manager.free(int(rng.choice(live)))
    return manager


def test_it_is_a_strategy(strategy):
    assert isinstance(strategy, EvictionStrategy)
    assert BlockManager(1, strategy=strategy).eviction_strategy is strategy


def test_text_and_back(strategy):
    again = parse_strategy(str(strategy))
    assert again == strategy and hash(again) == hash(strategy) and str(again) == str(strategy)


def test_equal_by_value(strategy):
    assert strategy == copy.deepcopy(strategy)
    assert [other for other in STRATEGIES if other == strategy] == [strategy]


def test_scores_have_the_right_shapes(strategy):
    sizes = []

    class Shapes(Recorder):
        def score_blocks(self, blocks, now):
            scores = super().score_blocks(blocks, now)
            assert scores.shape == (len(blocks),) == blocks.block_id.shape and scores.dtype.kind in "iu"
            fields = (blocks.last_access, blocks.access_count, blocks.num_tokens, blocks.priority, blocks.depth)
            assert all(field.shape == scores.shape for field in (*fields, blocks.created, blocks.num_children))
            sizes.append(len(blocks))
            return scores

        def score_sequences(self, sequences, now):
            scores = super().score_sequences(sequences, now)
            assert scores.shape == (len(sequences),) == sequences.seq_id.shape and scores.dtype.kind in "iu"
            fields = (sequences.last_access, sequences.access_count, sequences.num_tokens, sequences.num_blocks)
            more = (sequences.num_cached_tokens, sequences.priority, sequences.created)
            assert all(field.shape == scores.shape for field in (*fields, *more))
            sizes.append(len(sequences))
            return scores

    manager = work(BlockManager(400, 2, strategy=Shapes(strategy)))
    manager.evict()
    assert len(sizes) > 5 and max(sizes) > 1


def test_eviction_is_a_total_order(strategy):
    recorder = Recorder(strategy)
    manager = work(BlockManager(400, 2, strategy=recorder))
    manager.select_eviction_target()
    live = manager.sequence_ids
    expected = sorted(live, key=lambda seq_id: (recorder.sequences[seq_id], seq_id))
    assert [manager.evict() for _ in live] == expected
    manager.check()


def test_the_same_calls_give_the_same_evictions_and_blocks(strategy):
    runs = []
    for _ in range(2):
        heard = []
        manager = BlockManager(50, 2, strategy=strategy, on_full="evict")
        manager.subscribe(heard.append)
        work(manager, sequences=80)
        tables = [info.block_ids for info in manager.snapshot().sequences]
        runs.append((manager.sequence_ids, tables, heard, manager.stats))
    assert runs[0] == runs[1] and runs[0][3].total_evictions + runs[0][3].blocks_reclaimed > 0


def test_reclaim_follows_a_sorted_oracle_over_the_cached_leaves(strategy):
    recorder = Recorder(strategy)
    manager = work(BlockManager(300, 2, strategy=recorder))
    for seq_id in manager.sequence_ids[::2]:
        manager.free(seq_id)
    parents = {}
    for block in np.flatnonzero(manager.snapshot().indexed).tolist():
        parents[block] = int(manager._state.blocks[block].parent)
    cached = set(np.flatnonzero(manager.snapshot().cached).tolist())
    expected = []
    while cached:
        inner = {parents[block] for block in parents}
        leaf = min(cached - inner, key=lambda block: (recorder.blocks[block], block))
        expected.append(leaf)
        cached.discard(leaf)
        del parents[leaf]
    removed = []
    manager.subscribe(lambda event: removed.append(event.block_id) if isinstance(event, BlockRemoved) else None)
    blank = manager.free_block_count - manager.cached_block_count
    manager.allocate(1000, 2 * blank)
    assert removed == []
    for _ in expected:
        manager.append(1000, 2)
    assert removed == expected and len(expected) > 20
    manager.check()


def test_it_works_where_whole_sequences_make_room(strategy):
    manager = work(BlockManager(12, 2, strategy=strategy, on_full="evict"), sequences=100)
    assert manager.stats.total_evictions > 10
    manager.allocate(999, 24)
    assert manager.sequence_ids == [999]
    manager.check()


@numba.njit
def kept_for(state, block):
    state = borrowed(state)
    score = state.kernels.score
    return call_kernel(score, state, block) if score else state.blocks[block].last_access


@pytest.mark.parametrize("compiled", [s for s in STRATEGIES if type(s) in BLOCK_SCORES], ids=str)
def test_a_compiled_policy_scores_as_its_oracle(compiled):
    manager = work(BlockManager(60, 2, strategy=compiled, on_full="evict"), sequences=120)
    state = manager._state
    indexed = np.flatnonzero(state.blocks["indexed"]).astype(np.int32)
    scores = [int(kept_for(state.packed, block)) for block in indexed.tolist()]
    price = int(state.memory[0].inflation) if isinstance(compiled, GDSF) else 0
    assert manager.stats.blocks_reclaimed and (price > 0) == isinstance(compiled, GDSF)
    blocks, now = block_view(state, indexed), manager.snapshot().tick
    expected = InNumpy(compiled).score_blocks(blocks, now).tolist()
    assert [score - price for score in scores] == expected and len(set(scores)) > 10
    in_numpy = compiled.score_blocks(blocks, now)
    assert in_numpy.tolist() == expected and in_numpy.dtype == np.int64


@pytest.mark.parametrize("compiled", [s for s in STRATEGIES if type(s) in set(BLOCK_SCORES) - {GDSF}], ids=str)
def test_a_compiled_policy_evicts_as_its_oracle(compiled):
    runs = []
    for strategy in (compiled, InNumpy(compiled)):
        heard = []
        manager = BlockManager(50, 2, strategy=strategy, on_full="evict")
        manager.subscribe(heard.append)
        work(manager, sequences=120)
        runs.append((heard, manager.stats, manager.sequence_ids))
    assert runs[0] == runs[1] and runs[0][1].blocks_reclaimed > 20


def test_one_object_serves_two_caches(strategy):
    def new_cache(strategy):
        manager, heard = BlockManager(90, 2, strategy=strategy), []
        manager.subscribe(heard.append)
        return manager, heard

    def serve(manager, seed):
        work(manager, seed)
        for seq_id in manager.sequence_ids:
            manager.free(seq_id)
        manager.check()

    (one, hears_one), (two, hears_two) = (new_cache(copy.deepcopy(strategy)) for _ in range(2))
    (first, hears_first), (second, hears_second) = (new_cache(strategy) for _ in range(2))
    for manager, seed in ((one, 1), (one, 2), (two, 3), (two, 4), (first, 1), (second, 3), (first, 2), (second, 4)):
        serve(manager, seed)
    assert (hears_first, hears_second) == (hears_one, hears_two)
    assert any(isinstance(event, BlockRemoved) for event in hears_first)


def test_a_call_that_does_not_fit_changes_nothing(strategy):
    manager = work(BlockManager(40, 2, strategy=strategy, on_full="evict"))
    manager._room._is_evicting = False
    before, heard = seen(manager), []
    manager.subscribe(heard.append)
    room = manager.free_block_count
    live = manager.sequence_ids[0]
    for call in (
        lambda: manager.allocate(500, 2 * room + 1),
        lambda: manager.allocate(500, [1, 0] * (room + 20)),
        lambda: manager.append(live, 2 * room + 4),
        lambda: manager.append_batch([live], counts=[2 * room + 4]),
    ):
        with pytest.raises(OutOfMemory):
            call()
    assert seen(manager) == before and heard == []
    manager.check()


def test_the_same_evictions_with_and_without_tensors(strategy):
    runs = []
    for cache in (
        BlockManager(50, 2, strategy=strategy, on_full="evict"),
        PagedKvCache(50, 2, 1, 2, strategy=strategy, on_full="evict"),
    ):
        heard = []
        cache.subscribe(heard.append)
        work(cache, sequences=80)
        cache.check()
        runs.append((heard, cache.stats, cache.snapshot().sequences))
    assert runs[0] == runs[1]


# ---------------------------------------------------------------- strategies that fail


class Broken(LRU):
    """Gives something else than scores from now on."""

    def __init__(self, answer):
        object.__setattr__(self, "answer", answer)
        object.__setattr__(self, "is_broken", False)

    def score_sequences(self, sequences, now):
        return self.answer(len(sequences)) if self.is_broken else super().score_sequences(sequences, now)

    def score_blocks(self, blocks, now):
        return self.answer(len(blocks)) if self.is_broken else super().score_blocks(blocks, now)


def fail(count):
    raise ZeroDivisionError("mine")


ANSWERS = {
    "too few": lambda count: np.zeros(count - 1, np.int64),
    "too many": lambda count: np.zeros(count + 1, np.int64),
    "a column": lambda count: np.zeros((count, 1), np.int64),
    "one number": lambda count: 3,
    "NaN": lambda count: np.full(count, np.nan),
    "floats": lambda count: np.zeros(count),
    "text": lambda count: ["x"] * count,
    "nothing": lambda count: None,
    "bools": lambda count: np.zeros(count, bool),
    "an error of its own": fail,
}


def seen(manager):
    snap = manager.snapshot()
    arrays = (snap.ref_count, snap.cached, snap.pinned, snap.indexed, snap.num_tokens)
    return [a.tolist() for a in arrays], snap.sequences, snap.stats, snap.tick, manager.free_block_count


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)
@pytest.mark.parametrize(
    ("method", "call"),
    [
        ("score_sequences", lambda manager: manager.select_eviction_target()),
        ("score_sequences", lambda manager: manager.evict()),
        ("score_sequences", lambda manager: manager.evict_to_threshold(0)),
        ("score_sequences", lambda manager: manager.allocate(9, 32)),
        ("score_blocks", lambda manager: manager.free(1)),
        ("score_blocks", lambda manager: manager.truncate(1, 2)),
        ("score_blocks", lambda manager: manager.apply_streaming_llm(1, 0, 2)),
    ],
)
def test_a_broken_strategy_is_named_and_changes_nothing(answer, method, call):
    strategy = Broken(answer)
    manager = BlockManager(8, 4, strategy=strategy, on_full="evict")
    for seq_id in (1, 2):
        manager.allocate(seq_id, [seq_id] * 12)
        manager.commit(seq_id)
    before = seen(manager)
    object.__setattr__(strategy, "is_broken", True)
    expected = ZeroDivisionError if answer is fail else InvalidOperation
    with pytest.raises(expected, match="mine" if answer is fail else f"Broken.{method}: expected to return integers"):
        call(manager)
    assert seen(manager) == before
    manager.check()
    object.__setattr__(strategy, "is_broken", False)
    assert [manager.evict(), manager.evict()] == [1, 2]
    manager.check()


@pytest.mark.parametrize("wrong", [LRU, None, 3, object(), "no such one", "", "priority", "priority:x", "lru:3"])
def test_what_is_no_strategy_is_refused(wrong):
    with pytest.raises(InvalidOperation, match="strategy|levels"):
        BlockManager(1, strategy=wrong)


@pytest.mark.parametrize("wrong", ["", "3x", "a b", None, "lru:1"])
def test_names_that_cannot_be_registered(wrong):
    with pytest.raises(InvalidOperation, match="name: expected"):
        register_strategy(wrong, SmallestFirst)


@pytest.mark.parametrize(
    "text", ["streaming_llm:sink=4,sink=5,window=3", "streaming_llm:sink=4,sink_tokens=5,window=3"]
)
def test_an_argument_is_given_once(text):
    with pytest.raises(InvalidOperation, match="strategy: expected sink.* once"):
        parse_strategy(text)


def test_views_have_the_names_of_blocks_and_sequences():
    class Curious(LRU):
        def score_sequences(self, sequences, now):
            seen.append([sequences.seq_id, sequences.num_committed_tokens, sequences.num_dropped_tokens])
            return sequences.last_access

        def score_blocks(self, blocks, now):
            seen.append([blocks.id, blocks.block_id, blocks.ref_count])
            return blocks.last_access

    seen = []
    manager = BlockManager(8, 2, strategy=Curious())
    (first, second, _) = manager.allocate(5, [1, 2, 3, 4, 5]).block_ids
    manager.commit(manager.plan([5], 1))
    manager.select_eviction_target()
    manager.free(5)
    sequences, *_, blocks = [[column.tolist() for column in columns] for columns in seen]
    assert sequences == [[5], [5], [0]]
    assert blocks[0] == blocks[1] == [first, second] and set(blocks[2]) <= {0, 1}


def test_a_name_is_registered_once():
    with pytest.raises(InvalidOperation, match="registered already"):
        register_strategy("L-R_U", SmallestFirst)
    assert register_strategy("Smallest-First", SmallestFirst) is SmallestFirst
    assert parse_strategy("lru") == LRU()


def test_a_class_may_be_defined_anew():
    def define(doc):
        @register_strategy("from_a_notebook")
        class FromANotebook(SmallestFirst):
            __doc__ = doc

        return FromANotebook

    define("first")
    second = define("second")
    assert type(parse_strategy("from_a_notebook")) is second and second.__doc__ == "second"
    for other in (LRU, lambda: LRU()):
        with pytest.raises(InvalidOperation, match="registered already"):
            register_strategy("from_a_notebook", other)
    register_strategy("from_a_lambda", lambda: LRU())
    with pytest.raises(InvalidOperation, match="registered already"):
        register_strategy("from_a_lambda", lambda: LFU())


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: Priority(0), "levels: expected an int in 1 … "),
        (lambda: Priority(1.5), "levels: expected an int, got 1.5"),
        (lambda: StreamingLLM(-1, 2), "sink_tokens: expected an int of at least 0, got -1"),
        (lambda: TTL(-1), "ticks: expected an int in 0 … "),
        (lambda: TTL(2**32), "ticks: expected an int in 0 … "),
        (lambda: TTL(True), "ticks: expected an int, got True"),
        (lambda: TTL(1.5), "ticks: expected an int, got 1.5"),
        (lambda: parse_strategy("ttl:ticks=x"), "ticks: expected an int, got 'x'"),
    ],
)
def test_parameters_out_of_range(build, said):
    with pytest.raises(InvalidOperation, match=re.escape(said)):
        build()
