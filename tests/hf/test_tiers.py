"""A PagedCache with tiers: a chat goes on after a restart with the tokens that it has without, and nobody else's."""

from __future__ import annotations

import copy
import logging
import subprocess
import sys
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest
import torch
from tests.contracts.user_tiers import DictTier
from tests.hf.models import CONFIGS, GREEDY, build, left_padded, prompt

from pagedkv import InvalidOperation, TierError
from pagedkv.hf import PagedCache, generate
from pagedkv.hf.pool import block_format
from pagedkv.tiers import DiskTier, HostTier

SIZE = 4


def stock(model: Any, ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    mask = kwargs.pop("attention_mask", torch.ones_like(ids))
    return model.generate(ids, attention_mask=mask, **GREEDY | kwargs)


def paged(model: Any, ids: torch.Tensor, cache: PagedCache, **kwargs: Any) -> torch.Tensor:
    return generate(model, ids, cache, attention_mask=torch.ones_like(ids), **GREEDY | kwargs)


def with_disk(model: Any, path: Any, **options: Any) -> PagedCache:
    return PagedCache(model.config, 256, SIZE, tiers=[DiskTier(path / "tier", "10MB")], **options)


def chat(model: Any, path: Any, ids: torch.Tensor, **options: Any) -> tuple[torch.Tensor, int]:
    """One turn in a process of its own, as it were: its reply, and how many tokens were cached."""
    with with_disk(model, path, **options) as cache:
        reply = paged(model, ids, cache)
        cache.manager.check()
        assert cache.manager.used_block_count == 0
        return reply, cache.num_cached_tokens


def next_turn(reply: torch.Tensor) -> torch.Tensor:
    return torch.cat([reply, prompt(len(reply), 9, seed=5)], dim=1)


@pytest.mark.parametrize("name", [*CONFIGS, "gemma4", "llama4"])
def test_a_chat_goes_on_after_a_restart(name, tmp_path):
    model, ids = build(name), prompt(1, 30)
    first, cached = chat(model, tmp_path, ids)
    assert cached == 0 and torch.equal(first, stock(model, ids))
    turn = next_turn(first)
    # 30 + 24 tokens, of which the last was never computed: 53, in whole blocks of 4.
    second, cached = chat(model, tmp_path, turn)
    assert cached == 52 and torch.equal(second, stock(model, turn))


@pytest.mark.parametrize("kwargs", [{"prompt_lookup_num_tokens": 3}, {"do_sample": True, "top_k": 5}])
def test_speculation_and_sampling_go_on_too(kwargs, tmp_path):
    model, ids = build("llama"), prompt(1, 12).repeat(1, 3)
    for turn in range(3):
        torch.manual_seed(turn)
        expected = stock(model, ids, **kwargs)
        torch.manual_seed(turn)
        with with_disk(model, tmp_path) as cache:
            assert torch.equal(paged(model, ids, cache, **kwargs), expected)
            assert cache.num_cached_tokens >= ids.shape[1] - 16 or not turn
            cache.manager.check()
        ids = next_turn(expected)


@pytest.mark.parametrize("dtype", ["int8", "bfloat16"])
@pytest.mark.parametrize("attention", [None, "pagedkv"])
def test_in_place_and_in_other_types_too(attention, dtype, tmp_path):
    model, ids = build("llama", attention=attention), prompt(1, 30)
    without = PagedCache(model.config, 256, SIZE, dtype=dtype)
    turn = next_turn(paged(model, ids, without))
    expected = paged(model, turn, without)
    chat(model, tmp_path, ids, dtype=dtype)
    second, cached = chat(model, tmp_path, turn, dtype=dtype)
    assert cached == 52 and torch.equal(second, expected)


SECOND_PROCESS = """
import sys
from pathlib import Path
import torch
from tests.hf.models import build
from tests.hf.test_tiers import chat
reply, cached = chat(build("llama"), Path(sys.argv[1]), torch.tensor([eval(sys.argv[2])]))
print(cached, reply[0].tolist())
"""


def test_another_process_goes_on(tmp_path):
    model, ids = build("llama"), prompt(1, 30)
    turn = next_turn(chat(model, tmp_path, ids)[0])
    command = [sys.executable, "-c", SECOND_PROCESS, str(tmp_path), str(turn[0].tolist())]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"52 {stock(model, turn)[0].tolist()}"


def test_a_reply_is_stored_when_its_sequence_ends(tmp_path):
    """Be it by the next prompt, or when the cache is closed."""
    model, ids = build("llama"), prompt(1, 30)
    with with_disk(model, tmp_path) as cache:
        first = paged(model, ids, cache, release=False)
        other = paged(model, prompt(1, 21, seed=3), cache, release=False)
    for reply, expected in ((first, 52), (other, 44)):
        turn = next_turn(reply)
        second, cached = chat(model, tmp_path, turn)
        assert cached == expected and torch.equal(second, stock(model, turn))


def test_a_batch_and_its_beams(tmp_path):
    model, ids = build("llama"), prompt(3, 30)
    beams = {"num_beams": 3, "num_return_sequences": 3}
    with with_disk(model, tmp_path) as cache:
        first = paged(model, ids, cache, **beams)
    turns = next_turn(first)
    with with_disk(model, tmp_path) as cache:
        assert torch.equal(paged(model, turns, cache, **beams), stock(model, turns, **beams))
        assert cache.num_cached_tokens >= 28
        cache.manager.check()


def test_one_prompt_of_several_rows_is_stored_once():
    model, tier = build("llama"), HostTier("10MB")
    with PagedCache(model.config, 256, SIZE, tiers=[tier]) as cache:
        paged(model, prompt(1, 30).repeat(3, 1), cache, max_new_tokens=1)
        paged(model, prompt(1, 30), cache, max_new_tokens=1)
        cache.release()
        assert tier.match(prompt(1, 30)[0].numpy()).result() == 7 == tier.stats.stored


def test_a_damaged_file_costs_blocks_and_no_token(tmp_path):
    model, ids = build("llama"), prompt(1, 30)
    turn = next_turn(chat(model, tmp_path, ids)[0])
    slab = np.memmap(tmp_path / "tier" / "slab", np.uint8, "r+")
    slab[4096 * 6 + 1000] ^= 1
    slab.flush()
    second, cached = chat(model, tmp_path, turn)
    assert torch.equal(second, stock(model, turn)) and cached < 52
    assert chat(model, tmp_path, turn)[1] >= 52  # healed
    for name in ("slab", "records"):
        data = np.memmap(tmp_path / "tier" / name, np.uint8, "r+")
        data ^= np.random.default_rng(0).integers(0, 256, len(data), np.uint8)
        data.flush()
    second, cached = chat(model, tmp_path, turn)
    assert cached == 0 and torch.equal(second, stock(model, turn))


def test_other_weights_find_nothing(tmp_path, caplog):
    model, ids = build("llama"), prompt(1, 30)
    turn = next_turn(chat(model, tmp_path, ids)[0])
    other = build("llama", seed=1)
    with caplog.at_level(logging.WARNING, "pagedkv"):
        reply, cached = chat(other, tmp_path, turn)
    assert cached == 0 and torch.equal(reply, stock(other, turn))
    assert "held blocks of another model: they are dropped" in caplog.text


def test_two_salts_never_share(tmp_path):
    model, ids = build("llama"), prompt(1, 30)
    chat(model, tmp_path, ids, cache_salt="ann")
    assert chat(model, tmp_path, ids, cache_salt="bob")[1] == 0
    assert [chat(model, tmp_path, ids, cache_salt=salt)[1] for salt in ("ann", "bob")] == [28, 28]
    assert chat(model, tmp_path, ids)[1] == 0


def test_rows_with_padding_are_neither_stored_nor_found(tmp_path):
    model = build("llama")
    ids, mask = left_padded(2, 30)
    with with_disk(model, tmp_path) as cache:
        reply = generate(model, ids, cache, attention_mask=mask, **GREEDY)
        assert torch.equal(reply, stock(model, ids, attention_mask=mask))
    assert chat(model, tmp_path, ids[:1])[1] == 28  # the first row has none
    assert chat(model, tmp_path, ids[1:, 5:])[1] == 0


def test_changed_weights_begin_anew(tmp_path):
    model, ids = copy.deepcopy(build("llama")), prompt(1, 30)
    with with_disk(model, tmp_path) as cache:
        paged(model, ids, cache)
        with torch.no_grad():
            model.model.layers[0].self_attn.v_proj.weight.mul_(1.5)
        cache.manager.clear_prefix_cache()
        assert torch.equal(paged(model, ids, cache), stock(model, ids)) and cache.num_cached_tokens == 0
    turn = next_turn(stock(model, ids))
    reply, cached = chat(model, tmp_path, turn)
    assert cached == 52 and torch.equal(reply, stock(model, turn))


def test_clearing_reaches_the_tiers(tmp_path):
    model, ids = build("llama"), prompt(1, 30)
    with with_disk(model, tmp_path) as cache:
        paged(model, ids, cache)
        cache.manager.clear_prefix_cache()
    assert chat(model, tmp_path, ids)[1] == 0


def test_of_what_streamed_only_what_others_can_find_is_stored(tmp_path):
    model, ids = build("llama"), prompt(1, 30)
    with with_disk(model, tmp_path) as cache:
        paged(model, ids, cache, release=False)
        cache.crop(-1)
        cache.manager.apply_streaming_llm(cache.seq_ids[0], 4, 8)
    reply, cached = chat(model, tmp_path, ids)
    assert cached == 4 and torch.equal(reply, stock(model, ids))


def test_a_caller_who_frees_a_sequence_harms_nobody(tmp_path):
    model, ids = build("llama"), prompt(2, 30)
    with with_disk(model, tmp_path) as cache:
        paged(model, ids, cache, release=False)
        cache.manager.free(cache.seq_ids[0])
    assert [chat(model, tmp_path, ids[row : row + 1])[1] for row in (0, 1)] == [0, 28]


@pytest.mark.parametrize(("name", "num_states"), [("lfm2", 0), ("lfm2", 8), ("dynamic", 0)])
def test_models_whose_blocks_are_not_all_go_on_without(name, num_states, tmp_path, caplog):
    model, ids = build(name), prompt(1, 24)
    with caplog.at_level(logging.WARNING, "pagedkv"):
        reply, _ = chat(model, tmp_path, ids, num_states=num_states)
    assert torch.equal(reply, stock(model, ids)) and not (tmp_path / "tier").exists()
    (line,) = [line for line in caplog.messages if "tiers" in line]
    assert line.startswith(f"a PagedCache goes on without its tiers: {type(model).__name__} ")


def test_tiers_of_several_kinds_one_behind_the_other(tmp_path):
    model, ids = build("llama"), prompt(1, 30)
    turn = next_turn(chat(model, tmp_path, ids)[0])
    memory, mine = HostTier("1MB"), DictTier(SIZE)
    disk = DiskTier(tmp_path / "tier", "10MB")
    with PagedCache(model.config, 256, SIZE, tiers=(memory, mine, disk)) as cache:
        assert torch.equal(paged(model, turn, cache), stock(model, turn)) and cache.num_cached_tokens == 52
        cache.release()
        text = stock(model, turn)[0, :-1].numpy()
        assert mine.match(text).result() == len(text) // SIZE
        assert disk.stats.loaded == 13 and memory.stats.loaded == 0
    assert not memory.is_open and not disk.is_open


def test_a_tier_that_is_open_serves_several_caches(tmp_path):
    model, ids = build("llama"), prompt(1, 30)
    with with_disk(model, tmp_path) as cache:
        paged(model, ids, cache)
        block = block_format(model, cache.manager)
    with DiskTier(tmp_path / "tier", "10MB").open(block) as tier:
        for salt, cached in (("", 28), ("ann", 0)):
            with PagedCache(model.config, 256, SIZE, cache_salt=salt, tiers=[tier]) as cache:
                paged(model, ids, cache)
                assert cache.num_cached_tokens == cached
            assert tier.is_open
        other = build("llama", seed=1)
        with pytest.raises(InvalidOperation, match="is open for BlockFormat"):
            paged(other, ids, PagedCache(other.config, 256, SIZE, tiers=[tier]))


class Broken:
    medium = "REMOTE"

    def match(self, token_ids, cache_salt=""):
        raise ConnectionError("no route to the store")

    def load(self, token_ids, rows, cache_salt=""):
        return Future()

    store = load

    def clear(self):
        pass

    close = clear


def test_a_tier_that_fails_is_left_out(tmp_path, caplog):
    model, ids = build("llama"), prompt(1, 30)
    chat(model, tmp_path, ids)
    tiers = [Broken(), DiskTier(tmp_path / "tier", "10MB")]
    with caplog.at_level(logging.WARNING, "pagedkv"), PagedCache(model.config, 256, SIZE, tiers=tiers) as cache:
        for _ in range(2):
            assert torch.equal(paged(model, ids, cache), stock(model, ids)) and cache.num_cached_tokens >= 28
    assert caplog.messages.count("tier REMOTE failed and is left out: no route to the store") == 1


def test_a_pool_without_room_computes(tmp_path):
    model, ids = build("llama"), prompt(1, 30)
    turn = next_turn(chat(model, tmp_path, ids)[0])
    with PagedCache(model.config, 22, SIZE, tiers=[DiskTier(tmp_path / "tier", "10MB")]) as cache:
        assert torch.equal(paged(model, turn, cache), stock(model, turn))
        held = cache.manager.allocate(7, 13 * SIZE)
        assert torch.equal(paged(model, ids[:, :9], cache), stock(model, ids[:, :9])) and held.num_blocks == 13
        cache.manager.check()


# What is refused.


def test_a_directory_in_use_is_said_and_can_be_had_later(tmp_path):
    model, ids = build("llama"), prompt(1, 30)
    cache = with_disk(model, tmp_path)
    with with_disk(model, tmp_path) as first:
        paged(model, ids, first)
        with pytest.raises(TierError, match="is in use by process"):
            paged(model, ids, cache)
    assert torch.equal(paged(model, ids, cache), stock(model, ids)) and cache.num_cached_tokens >= 28
    cache.close()
    cache.close()
    assert torch.equal(paged(model, ids, cache), stock(model, ids))  # goes on without


def test_without_a_model_nobody_knows_what_the_blocks_are(tmp_path):
    model = build("llama")
    with with_disk(model, tmp_path) as cache:
        with pytest.raises(InvalidOperation, match=r"tiers: expected a cache that serves a model, .* call serve\(\)"):
            cache.prompt(prompt(1, 30))
        cache.serve(model)
        assert cache.prompt(prompt(1, 30)) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tiers": DiskTier("x", 1)}, "tiers: expected a sequence of tiers"),
        ({"tiers": ["disk"]}, "tiers: expected a sequence of tiers"),
        (
            {"tiers": [DiskTier("x", 1)], "prefix_caching": False},
            "prefix_caching: expected True for a cache with tiers",
        ),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(InvalidOperation, match=message):
        PagedCache(build("llama").config, **options)
