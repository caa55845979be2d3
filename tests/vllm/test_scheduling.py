"""Both halves in a small engine: what the tiers bring is right or is computed, and the tokens are always the same."""

from __future__ import annotations

import random
import time
from concurrent.futures import Future
from pathlib import Path

import pytest
from tests.tiers.resp_server import RespServer
from tests.vllm.stand_in import BYTES, SIZE, Engine, Request

from pagedkv import InvalidOperation, TierError
from pagedkv.tiers import DiskTier, HostTier, RespTier
from pagedkv.tiers import resp_client as client
from pagedkv.tiers.tier import answered

SLOT = 4096 + 128


def prompt(length, seed=0):
    return random.Random(seed).choices(range(97), k=length)


def disk(folder, slots=64, **options):
    return DiskTier(folder, slots * SLOT, **options)


def written(prompts, max_tokens=6, salts=None):
    """What an engine without tiers that ever lasts writes."""
    engine = Engine([HostTier(BYTES)], writes=False, reads=False)
    try:
        return [request.all_token_ids for request in engine.ask(*prompts, max_tokens=max_tokens, salts=salts)]
    finally:
        engine.close()


@pytest.fixture
def server():
    made = RespServer()
    yield made
    made.stop()


@pytest.fixture
def closing():
    """Engines that end with the test."""
    engines = []
    yield engines
    for engine in engines:
        engine.close()


def ends(engine):
    """Everything has been given back."""
    engine.settle()
    half = engine.half
    assert half._loading.num_free == len(half._staging.rows) // 2
    assert half._storing.num_free == len(half._staging.rows) - len(half._staging.rows) // 2
    assert not half._texts and not half._loads and not half._stores and not half._sources


# What comes back.


def test_a_prefix_survives_a_restart(tmp_path):
    text = prompt(41)
    engine = Engine([disk(tmp_path)])
    (first,) = engine.ask(text, max_tokens=6)
    assert first.cached == 0
    engine.settle()
    engine.close()
    engine = Engine([disk(tmp_path)])
    (again,) = engine.ask(text, max_tokens=6)
    assert again.cached == 40 and again.all_token_ids == first.all_token_ids
    (longer,) = engine.ask(first.all_token_ids + prompt(9, 1))
    assert longer.cached == 44  # what was written is found as well, as far as it was read again
    assert engine.wrong == 0 and engine.half.figures.short == 0
    ends(engine)
    engine.close()


def test_the_last_token_is_always_computed(closing):
    closing.append(engine := Engine([HostTier("1MiB")]))
    engine.ask(prompt(40))
    engine.settle()
    engine.empty_pool()
    (again,) = engine.ask(prompt(40))
    assert again.cached == 36 and engine.wrong == 0


def test_only_what_the_pool_lacks_is_loaded(closing):
    closing.append(engine := Engine([HostTier("1MiB")]))
    engine.ask(prompt(41))
    engine.settle()
    (again,) = engine.ask(prompt(41))
    assert again.cached == 40 and engine.half.figures.loaded == 0
    engine.known = {key: block for key, block in engine.known.items() if len(key) - 1 <= 5 * SIZE}
    (again,) = engine.ask(prompt(41))
    assert again.cached == 40 and engine.half.figures.loaded == 5 and engine.wrong == 0
    ends(engine)


def test_tiers_are_asked_in_their_order_and_each_gets_what_it_lacks(tmp_path, server, closing):
    far = RespTier(server.url, timeout=60)
    closing.append(engine := Engine([far]))
    engine.ask(prompt(41))
    engine.settle()
    near = HostTier(6 * BYTES)
    closing.append(other := Engine([near, disk(tmp_path), RespTier(server.url, timeout=60)]))
    (asked,) = other.ask(prompt(41))
    assert asked.cached == 40
    assert len(server.values) == 10  # nothing of it was stored twice
    other.settle()
    assert near.books.cached_block_count == 6
    other.empty_pool()
    request = other.ask(prompt(41))[0]
    assert request.cached == 40 and other.wrong == 0
    assert other.half._tiers[1].stats.loaded == 4  # the rest of what is in memory


def test_sources_say_where_tokens_came_from(tmp_path, closing):
    closing.append(engine := Engine([HostTier(4 * BYTES), disk(tmp_path)]))
    engine.ask(prompt(41))
    engine.settle()
    engine.empty_pool()
    said = []
    engine.spoil = lambda plan: said.append(dict(engine.half._sources)) if plan.loads else None
    (request,) = engine.ask(prompt(41))
    assert said == [{request.request_id: {"CPU": 16, "DISK": 24}}]


def test_texts_that_begin_alike_are_copied_once(closing):
    closing.append(engine := Engine([HostTier("1MiB")], num_blocks=100))
    head, copied = prompt(40), []
    engine.spoil = lambda plan: copied.extend(len(copy.block_ids) for copy in plan.stores)
    engine.ask(*(head + prompt(8, seed) for seed in range(1, 7)))
    engine.settle()
    assert sum(copied) == 10 + 6 * 2
    assert engine.half._tiers[0].books.cached_block_count == 22
    ends(engine)


def test_parts_of_a_text_are_stored_one_after_the_other(server, closing):
    closing.append(engine := Engine([RespTier(server.url, timeout=60)]))
    slow = iter([0.3])
    server.before = lambda name: time.sleep(next(slow, 0)) if name == "SET" else None
    engine.ask(prompt(40), max_tokens=13)
    engine.settle()
    assert len(server.values) == 13


def test_one_that_was_preempted_before_it_wrote_is_loaded_again(closing):
    closing.append(engine := Engine([HostTier("1MiB")], num_blocks=30))
    engine.ask(prompt(41))
    engine.settle()
    request = Request("preempted", prompt(41))
    engine.half.arrived(request)
    for _ in range(2):
        while (found := engine.half.found(request, 0)) is None:
            pass
        assert found == 40
        engine.half.placed(request, range(11), 0, found)
        (worker,) = engine.workers
        worker.load(engine.half.plan({}, lambda _: []))
        engine.half.copied(worker.take_done())
    engine.half.finished("preempted")
    ends(engine)


# What is kept apart.


def test_salts_share_nothing(closing):
    closing.append(engine := Engine([HostTier("1MiB")]))
    engine.ask(prompt(41), salts=["a"])
    engine.settle()
    engine.empty_pool()
    for salt, cached in (("b", 0), (None, 0), ("a", 40)):
        (request,) = engine.ask(prompt(41), salts=[salt])
        assert request.cached == cached and request.all_token_ids == written([prompt(41)], 1, [salt])[0]
    engine.ask(prompt(41, 1), prompt(41, 1), salts=["a", "b"])
    engine.settle()
    engine.empty_pool()
    assert [each.cached for each in engine.ask(prompt(41, 1), prompt(41, 1), salts=["a", "b"])] == [40, 40]
    assert engine.wrong == 0


def test_another_model_finds_nothing_and_reads_nothing_of_it(tmp_path, server):
    for model, cached in (("one", 0), ("one", 40), ("two", 0), ("two", 40)):
        engine = Engine([disk(tmp_path), RespTier(server.url, timeout=60)], model=model)
        (request,) = engine.ask(prompt(41))
        assert request.cached == cached and engine.wrong == 0
        engine.settle()
        engine.close()


@pytest.mark.parametrize("fields", [{"lora_request": object()}, {"mm_features": [object()]}])
def test_what_depends_on_more_than_tokens_is_left_alone(closing, fields):
    closing.append(engine := Engine([HostTier("1MiB")]))
    engine.ask(prompt(41))
    engine.settle()
    engine.empty_pool()
    (request,) = engine.ask(prompt(41), **fields)
    assert request.cached == 0
    (request,) = engine.ask(prompt(41, 1), **fields)
    engine.settle()
    assert engine.half.figures.stored == 10


def test_a_request_that_skips_the_cache_loads_nothing_and_is_stored(closing):
    closing.append(engine := Engine([HostTier("1MiB")]))
    (request,) = engine.ask(prompt(41), skip_reading_prefix_cache=True)
    engine.settle()
    engine.empty_pool()
    (request,) = engine.ask(prompt(41), skip_reading_prefix_cache=True)
    assert request.cached == 0 and engine.half.figures.stored == 10


def test_roles(tmp_path, closing):
    closing.append(engine := Engine([disk(tmp_path)], reads=False))
    engine.ask(prompt(41))
    engine.settle()
    engine.empty_pool()
    assert engine.ask(prompt(41))[0].cached == 0
    closing.append(reader := Engine([disk(tmp_path, read_only=True)], writes=False))
    assert reader.ask(prompt(41))[0].cached == 40
    reader.ask(prompt(41, 1))
    assert reader.half.figures.stored == 0


def test_clear_reaches_every_tier_and_what_is_on_its_way(tmp_path, closing):
    closing.append(engine := Engine([HostTier("1MiB"), disk(tmp_path)]))
    engine.ask(prompt(41))
    engine.spoil = lambda plan: plan.stores and engine.half.clear()  # between the plan and the copy
    engine.ask(prompt(30, 1))
    engine.spoil = lambda plan: None
    engine.settle()
    engine.empty_pool()
    for seed, length in ((0, 41), (1, 30)):
        assert engine.ask(prompt(length, seed))[0].cached == 0
    ends(engine)


# Faults: every one is a miss.


def damaged(folder, flip):
    slab = folder / "slab"
    data = bytearray(slab.read_bytes())
    for at in range(0, len(data), 4096):
        if flip(at // 4096):
            data[at + 17] ^= 4
    slab.write_bytes(data)


@pytest.mark.parametrize("first_bad", [0, 3, 9])
def test_a_flipped_bit_costs_a_recompute_and_is_mended(tmp_path, first_bad):
    engine = Engine([disk(tmp_path)])
    engine.ask(prompt(41))
    engine.settle()
    engine.close()
    damaged(tmp_path, lambda slot: slot == first_bad)
    engine = Engine([disk(tmp_path)])
    for cached in (first_bad * SIZE, 40):
        (request,) = engine.ask(prompt(41), max_tokens=6)
        assert request.cached == cached and request.all_token_ids == written([prompt(41)])[0]
        engine.settle()
        engine.empty_pool()
    assert engine.wrong == 0 and engine.half.figures.short == 1
    ends(engine)
    engine.close()


def test_a_damaged_value_of_a_server_is_mended(server, closing):
    closing.append(engine := Engine([RespTier(server.url, timeout=60)]))
    engine.ask(prompt(41))
    engine.settle()
    key = list(server.values)[3]
    server.values[key] = server.values[key][:-1] + b"?"
    for cached in (12, 40):
        engine.empty_pool()
        assert engine.ask(prompt(41))[0].cached == cached
        engine.settle()
    assert engine.wrong == 0


def test_what_is_missing_between_two_tiers_is_computed_with_all_behind_it(closing):
    class Short(Silent):
        def load(self, token_ids, rows, cache_salt=""):
            self.inner.load(token_ids, rows, cache_salt).result()
            return answered(2)

    with HostTier(6 * BYTES) as near, HostTier("1MiB") as far:
        closing.append(engine := Engine([near, far]))
        engine.ask(prompt(41))
        engine.settle()
        closing.append(other := Engine([Short(inner=near), far]))
        assert other.ask(prompt(41))[0].cached == 8 and other.wrong == 0


def test_files_that_vanish_are_a_miss(tmp_path, closing):
    closing.append(engine := Engine([disk(tmp_path)]))
    engine.ask(prompt(41))
    engine.settle()
    engine.empty_pool()
    (tmp_path / "slab").write_bytes(b"")
    (request,) = engine.ask(prompt(41), max_tokens=6)
    assert request.cached == 0 and request.all_token_ids == written([prompt(41)])[0] and engine.wrong == 0


@pytest.mark.parametrize("fault", ["stalls", "hangs up", "damages", "refuses", "stops", "answers with others"])
def test_a_server_at_fault_is_a_miss(server, monkeypatch, closing, fault):
    monkeypatch.setattr(client, "LEAST_PAUSE", 0.0)
    closing.append(engine := Engine([RespTier(server.url, timeout=0.2)]))
    engine.ask(prompt(41))
    engine.settle()
    engine.empty_pool()
    keys = list(server.values)
    match fault:
        case "stalls":
            server.stalls_at = "GET"
        case "hangs up":
            server.hangs_up_at = "GET"
        case "damages":
            server.values = {key: value[:-1] + bytes([value[-1] ^ 1]) for key, value in server.values.items()}
        case "refuses":
            server.refusals = {"TOUCH": "LOADING", "GET": "LOADING", "SET": "OOM"}
        case "stops":
            server.stop()
        case "answers with others":
            server.values = dict(zip(keys, list(server.values.values())[1:] + [b""], strict=True))
    (request,) = engine.ask(prompt(41), max_tokens=6)
    assert request.cached == 0 and request.all_token_ids == written([prompt(41)])[0] and engine.wrong == 0
    engine.settle()
    ends(engine)


class Silent:
    """A tier that never answers what it is asked, or only when it is let."""

    medium = "SILENT"

    def __init__(self, *silent, inner=None):
        self.silent, self.futures, self.inner = silent, [], inner

    def _ask(self, name, *arguments):
        if name not in self.silent:
            return getattr(self.inner, name)(*arguments)
        self.futures.append(Future())
        return self.futures[-1]

    def match(self, token_ids, cache_salt=""):
        return self._ask("match", token_ids, cache_salt)

    def load(self, token_ids, rows, cache_salt=""):
        return self._ask("load", token_ids, rows, cache_salt)

    def store(self, token_ids, rows, cache_salt=""):
        return self._ask("store", token_ids, rows, cache_salt)

    def clear(self):
        raise TierError("SILENT", "does not answer")

    def close(self):
        pass


@pytest.mark.parametrize("silent", ["match", "load"])
def test_a_request_waits_no_longer_than_its_patience(closing, silent):
    with HostTier("1MiB") as inner:
        closing.append(engine := Engine([inner], model="model"))
        engine.ask(prompt(41))
        engine.settle()
        tier = Silent(silent, inner=inner)
        closing.append(other := Engine([tier], patience=0.05))
        (request,) = other.ask(prompt(41))
        assert request.cached == 0 and other.wrong == 0
        taken = len(other.half._loads)
        assert taken == (silent == "load")  # the tier may still write into these rows
        for future in tier.futures:
            future.set_result(0)
        ends(other)


def test_time_in_the_queue_is_no_time_spent_on_tiers(closing):
    closing.append(engine := Engine([HostTier("1MiB")], patience=0.05))
    engine.ask(prompt(41))
    engine.settle()
    engine.empty_pool()
    request = Request("queued", prompt(41))
    engine.half.arrived(request)
    time.sleep(0.1)
    while (found := engine.half.found(request, 0)) is None:
        pass
    assert found == 40


def test_a_tier_that_raises_is_a_miss(closing, caplog):
    class Broken(Silent):
        def _ask(self, name, *arguments):
            raise RuntimeError("broken")

    closing.append(engine := Engine([Broken(), HostTier("1MiB")]))
    engine.ask(prompt(41))
    engine.settle()
    engine.empty_pool()
    (request,) = engine.ask(prompt(41))
    assert request.cached == 40 and "broken" in caplog.text
    assert engine.half.clear() is False


def test_rows_that_are_others_by_now_are_computed(tmp_path, closing):
    closing.append(engine := Engine([HostTier("1MiB")], num_blocks=60))
    engine.ask(prompt(41))
    engine.settle()
    engine.empty_pool()

    def spoil(plan):
        for copy in plan.loads:
            engine.half._staging.tickets[copy.row + 2] = 0

    engine.spoil = spoil
    (request,) = engine.ask(prompt(41) + prompt(20, 1), max_tokens=6)
    assert request.all_token_ids == written([prompt(41) + prompt(20, 1)])[0]
    engine.spoil = lambda plan: None
    wrong, engine.wrong = engine.wrong, 0
    assert wrong  # that step computed upon what it did not have, and vLLM has computed it again
    engine.settle()
    engine.empty_pool()
    (request,) = engine.ask(prompt(41) + prompt(20, 1))
    assert engine.wrong == 0  # none of it was stored
    ends(engine)


# Room.


def test_a_prefix_beyond_the_staging_memory_comes_in_part(closing):
    closing.append(engine := Engine([HostTier("1MiB")], staging=12 * (BYTES + 8), num_blocks=60))
    (first,) = engine.ask(prompt(81), max_tokens=40)
    engine.settle()
    engine.empty_pool()
    (request,) = engine.ask(prompt(81))
    assert request.cached == 24 and engine.wrong == 0
    ends(engine)


def test_a_full_staging_memory_drops_stores_and_nothing_else(closing):
    tier = Silent("match", "load", "store")
    closing.append(engine := Engine([tier], staging=12 * (BYTES + 8), num_blocks=200, patience=0.01))
    engine.ask(*(prompt(41, seed) for seed in range(4)))
    assert engine.half.figures.dropped > 0
    for future in tier.futures:
        future.set_result(0)
    ends(engine)


def test_staging_of_less_than_two_blocks_is_refused():
    with pytest.raises(TierError, match="staging"):
        Engine([HostTier("1MiB")], staging=BYTES)


def test_what_is_no_tier_is_refused():
    with pytest.raises(InvalidOperation, match="tiers"):
        Engine([object()])


def test_the_staging_file_has_no_name_once_it_is_in_use(closing):
    closing.append(engine := Engine([HostTier("1MiB")]))
    assert Path(engine.half._staging.path).exists()
    engine.ask(prompt(41))
    assert not Path(engine.half._staging.path).exists()


def test_a_worker_that_cannot_reach_the_staging_memory_costs_a_recompute(closing):
    closing.append(engine := Engine([HostTier("1MiB")]))
    engine.half._staging.unlink()
    (request,) = engine.ask(prompt(41), max_tokens=6)
    assert request.all_token_ids == written([prompt(41)])[0]
    ends(engine)


# Everything at once.


@pytest.mark.parametrize(("seed", "ranks", "is_async"), [(0, 1, False), (1, 2, False), (2, 1, True), (3, 2, True)])
def test_chunks_preemptions_and_damage_never_change_a_token(tmp_path, seed, ranks, is_async):
    rng = random.Random(seed)
    heads = [prompt(rng.randint(10, 40), 100 + i) for i in range(4)]
    for round_ in range(3):
        tiers = [HostTier(8 * BYTES * ranks), disk(tmp_path, 40)]
        staging = 24 * (BYTES + 8)
        engine = Engine(tiers, num_blocks=45, staging=staging, seed=seed, ranks=ranks, is_async=is_async)
        for _ in range(3):
            prompts = [rng.choice(heads) + prompt(rng.randint(1, 25), rng.randint(0, 5)) for _ in range(4)]
            salts = [rng.choice([None, "a"]) for _ in prompts]
            requests = engine.ask(*prompts, max_tokens=8, salts=salts)
            assert [request.all_token_ids for request in requests] == written(prompts, 8, salts)
        assert engine.wrong == 0
        ends(engine)
        engine.half._tiers[1].books.check()
        assert round_ == 0 or engine.half.figures.loaded > 0
        engine.close()
        damaged(tmp_path, lambda slot: rng.random() < 0.2)
