"""Mistakes that a newcomer makes: each gets one line with the argument, what was expected, what came, and what next."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache as once
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from tests.cli.commands import call

from pagedkv import (
    BlockManager,
    BlockNotFound,
    InvalidOperation,
    KvCacheSpec,
    KvStorage,
    OutOfMemory,
    PagedKvCache,
    PagedKvError,
    SequenceNotFound,
    paged_attention,
    register_strategy,
)
from pagedkv.engine import LLM, SamplingParams
from pagedkv.sim import replay, sweep, synthesize
from pagedkv.tiers import BlockFormat, DiskTier, HostTier


class Mistake(NamedTuple):
    """What is called, and the pieces of the line that comes back, in their order."""

    call: Callable[[], Any]
    argument: str
    expected: str
    got: str
    next: str
    error: type[PagedKvError] = InvalidOperation


def books() -> BlockManager:
    """A pool of 8 blocks of 4 tokens; sequence 1 has six tokens, committed."""
    manager = BlockManager(8, 4)
    manager.allocate(1, [10, 11, 12, 13, 14, 15])
    manager.commit(1)
    return manager


def write(keys: Any, values: Any = None, layer: int = 0, plan: Any = None) -> None:
    made = PagedKvCache(8, 4, 2, 8, dtype="float32")
    made.allocate(1, [10, 11, 12, 13, 14, 15])
    made.write(
        layer, keys, torch.zeros(6, 2, 8) if values is None else values, made.plan([1]) if plan is None else plan
    )


def attend(**changes: Any) -> torch.Tensor:
    arguments: dict[str, Any] = {
        "queries": torch.zeros(2, 2, 8),
        "keys": torch.zeros(4, 4, 2, 8),
        "values": torch.zeros(4, 4, 2, 8),
        "block_tables": [[0], [1]],
        "seq_lens": [3, 4],
        "cu_seqlens_q": [0, 1, 2],
        "scale": 0.3,
    }
    return paged_attention(**(arguments | changes))


def commit_a_stale_plan() -> None:
    manager = books()
    plan = manager.append_batch([1], [[16, 17]])
    manager.truncate(1, 6)
    manager.append(1, [18, 19])
    manager.commit(plan)


def free_twice() -> None:
    manager = books()
    manager.free(1)
    manager.free(1)


def store(shape: tuple[int, int]) -> None:
    tier = HostTier("1MB").open(BlockFormat("model", 4, 64))
    try:
        tier.store([1, 2, 3, 4], np.zeros(shape, np.uint8))
    finally:
        tier.close()


class HalfAStrategy:
    def score_blocks(self, blocks, now):
        return blocks.last_access


class FloatScores(HalfAStrategy):
    def score_sequences(self, sequences, now):
        return sequences.num_tokens / 2


def evict_by_floats() -> None:
    manager = BlockManager(8, strategy=FloatScores())
    manager.allocate(1, 4)
    manager.evict()


@once
def llm() -> LLM:
    pytest.importorskip("transformers")
    from tests.hf.models import build

    return LLM(build("llama"), num_blocks=16, block_size=4)


POOL: dict[str, Mistake] = {
    "a name that no strategy has": Mistake(
        lambda: BlockManager(8, strategy="lfru"), "strategy", "one of adaptive", "'lfru'", "did you mean 'lru'?"
    ),
    "a class for an object": Mistake(
        lambda: BlockManager(8, strategy=FloatScores),
        "strategy",
        "an object with score_sequences",
        "class",
        "make one: FloatScores()",
    ),
    "half a strategy": Mistake(
        lambda: BlockManager(8, strategy=HalfAStrategy()),
        "strategy",
        "score_sequences and score_blocks",
        "HalfAStrategy object",
        "write its score_sequences",
    ),
    "a parameter that no strategy has": Mistake(
        lambda: BlockManager(8, strategy="priority:stages=3"),
        "strategy",
        "takes levels",
        "'stages=3'",
        "write priority:levels=…",
    ),
    "scores that are floats": Mistake(
        evict_by_floats, "FloatScores.score_sequences", "integers of shape (1,)", "float64", "make the scores int64"
    ),
    "a name with a space": Mistake(
        lambda: register_strategy("my strategy"), "name", "letters, digits", "'my strategy'", "leave spaces out"
    ),
    "a size that is a float": Mistake(lambda: BlockManager(8, 16.0), "block_size", "an int", "16.0", "write 16"),
    "a number as text": Mistake(lambda: BlockManager("8"), "num_blocks", "an int", "'8'", "write 8, without quotes"),
    "blocks of no tokens": Mistake(lambda: BlockManager(8, 0), "block_size", "an int in 1 …", "0", "1 is the least"),
    "a share in per cent": Mistake(
        lambda: BlockManager(8, eviction_threshold="90%"),
        "eviction_threshold",
        "a number in 0 … 1",
        "'90%'",
        "write 0.9",
    ),
    "a choice in capitals": Mistake(
        lambda: BlockManager(8, on_full="Evict"), "on_full", "one of raise, evict", "'Evict'", "did you mean 'evict'?"
    ),
    "yes and no": Mistake(
        lambda: BlockManager(8, prefix_caching="no"), "prefix_caching", "a bool", "'no'", "write True or False"
    ),
}
BOOKS: dict[str, Mistake] = {
    "text for tokens": Mistake(
        lambda: books().allocate(2, "hello"), "tokens", "token ids", "'hello'", "tokenizer.encode(text)"
    ),
    "words for tokens": Mistake(
        lambda: books().append(1, ["hel", "lo"]),
        "tokens",
        "ints in 1 dimension",
        "['hel', 'lo']",
        "tokenizer.encode(text)",
    ),
    "ids that are floats": Mistake(
        lambda: books().allocate(2, np.array([1.0, 2.0])),
        "tokens",
        "ints in 1 dimension",
        "float64 of shape (2,)",
        ".astype(np.int64)",
    ),
    "a mask for ids": Mistake(
        lambda: books().allocate(2, torch.ones(4, dtype=torch.bool)),
        "tokens",
        "ints in 1 dimension",
        "bool of shape (4,)",
        "ids[mask]",
    ),
    "a batch for one text": Mistake(
        lambda: books().allocate(2, torch.tensor([[1, 2, 3]])),
        "tokens",
        "ints in 1 dimension",
        "int64 of shape (1, 3)",
        "ids[0]",
    ),
    "texts of several lengths": Mistake(
        lambda: books().append(1, [[1, 2], [3]]), "tokens", "token ids", "[[1, 2], [3]]", "give one flat list"
    ),
    "padding": Mistake(lambda: books().allocate(2, [5, 6, -100]), "tokens", "at least 0", "-100", "leave padding out"),
    "a name for a sequence": Mistake(
        lambda: books().allocate("chat-1", [1]), "seq_id", "an int", "'chat-1'", "a dict of their names"
    ),
    "bytes for a salt": Mistake(
        lambda: books().allocate(2, [1], cache_salt=b"tenant"), "cache_salt", "a str", "b'tenant'", ".decode()"
    ),
    "a priority too high": Mistake(
        lambda: BlockManager(8, strategy="priority:3").allocate(1, 4, priority=3),
        "priority",
        "0 … 2",
        "3",
        "2 is the most",
    ),
    "a sequence that began already": Mistake(
        lambda: books().allocate(1, [1]), "sequence", "", "S1 exists already", "append(1, …) goes on with it"
    ),
    "a text beyond the pool": Mistake(
        lambda: books().allocate(2, 100),
        "",
        "requested 25 blocks",
        "6 available",
        "give it more with num_blocks",
        OutOfMemory,
    ),
    "a full pool": Mistake(
        lambda: books().allocate(2, 28),
        "",
        "requested 7 blocks",
        "6 available",
        "free() or evict() make room",
        OutOfMemory,
    ),
    "a sequence that never began": Mistake(
        lambda: books().append(7, [1]), "Sequence", "not found", "S7", "allocate(7, …) begins it", SequenceNotFound
    ),
    "a second free": Mistake(free_twice, "Sequence", "not found", "S1", "It was freed", SequenceNotFound),
    "one id for a batch": Mistake(
        lambda: books().append_batch(1, [5]), "seq_ids", "a flat list of ints", "1", "write [1]"
    ),
    "too many tokens for a batch": Mistake(
        lambda: books().append_batch([1], [5, 6]),
        "tokens",
        "one entry for each of 1 sequences",
        "2",
        "in the order of seq_ids",
    ),
    "a count for ids": Mistake(lambda: books().append_batch([1], 5), "tokens", "token ids", "5", "counts=…"),
    "a sequence twice": Mistake(
        lambda: books().append_batch([1, 1], [5, 6]), "seq_ids", "each sequence once", "S1 twice", "name it once"
    ),
    "more than there is to compute": Mistake(
        lambda: books().plan([1], 7), "num_query_tokens", "at most the tokens", "7 for S1", "append() the rest first"
    ),
    "a plan of before": Mistake(commit_a_stale_plan, "plan", "stale", "S1 has changed", "make a new one: plan([1])"),
    "truncate to make it longer": Mistake(
        lambda: books().truncate(1, 9), "num_tokens", "0 … 6", "9", "append() adds to them"
    ),
    "a commit beyond the end": Mistake(
        lambda: books().commit(1, upto=9), "upto", "at most the 6 tokens of S1", "9", "append() the rest first"
    ),
    "a block that is in use": Mistake(
        lambda: books().evict_block(0),
        "block_id",
        "a cached block that nobody holds",
        "B0, which 1 sequences hold",
        "free() them first",
    ),
    "a block beyond the pool": Mistake(
        lambda: books().block(8), "Block", "not found", "B8", "0 … total_blocks - 1", BlockNotFound
    ),
}
TENSORS: dict[str, Mistake] = {
    "a dtype by its short name": Mistake(
        lambda: PagedKvCache(8, dtype="fp16"), "dtype", "one of float16, bfloat16", "'fp16'", "did you mean 'float16'?"
    ),
    "a layout in small letters": Mistake(
        lambda: PagedKvCache(8, layout="nhd"), "layout", "one of NHD, HND", "'nhd'", "did you mean 'NHD'?"
    ),
    "a device that torch does not know": Mistake(
        lambda: PagedKvCache(8, device="gpu"), "device", "torch can use here", "'gpu'", "'cpu' always works"
    ),
    "an array for a tensor": Mistake(
        lambda: write(np.zeros((6, 2, 8))), "keys", "a torch.Tensor", "ndarray", "torch.from_numpy"
    ),
    "keys with a batch": Mistake(
        lambda: write(torch.zeros(1, 6, 2, 8)), "keys", "shape [6, 2, 8]", "[1, 6, 2, 8]", "squeeze(0)"
    ),
    "keys with heads first": Mistake(
        lambda: write(torch.zeros(2, 6, 8)), "keys", "shape [6, 2, 8]", "[2, 6, 8]", "transpose() it"
    ),
    "values that are too few": Mistake(
        lambda: write(torch.zeros(6, 2, 8), torch.zeros(5, 2, 8)),
        "values",
        "shape [6, 2, 8]",
        "[5, 2, 8]",
        "give 6 rows",
    ),
    "an id for a plan": Mistake(
        lambda: write(torch.zeros(6, 2, 8), plan=1), "plan", "a BatchPlan", "int", "plan([seq_id, …]) makes one"
    ),
    "a number for a spec": Mistake(lambda: KvStorage(8), "spec", "a KvCacheSpec", "int", "KvStorage(KvCacheSpec("),
    "a list of slots": Mistake(
        lambda: KvStorage(KvCacheSpec(8, 4, 2, 8)).gather(0, [1.0]), "slots", "an integer array", "list", "np.int64"
    ),
    "heads that do not divide": Mistake(
        lambda: attend(queries=torch.zeros(2, 3, 8)),
        "queries",
        "a multiple of 2 kv heads",
        "3 heads",
        "as many query heads",
    ),
    "a total that does not add up": Mistake(
        lambda: attend(cu_seqlens_q=[0, 1, 3]), "cu_seqlens_q", "to end at 2", "3", "add up the query tokens"
    ),
    "a backend by nearly its name": Mistake(
        lambda: attend(backend="tritn"), "backend", "one of auto, cpu", "'tritn'", "did you mean 'triton'?"
    ),
}
AROUND: dict[str, Mistake] = {
    "a size in words": Mistake(
        lambda: DiskTier("chats", "50 gigs"), "size", "40GiB or 80GB", "'50 gigs'", "units are KB"
    ),
    "rows of another model": Mistake(
        lambda: store((1, 65)), "rows", "uint8 [m, 64]", "uint8 [1, 65]", "64 bytes of a block"
    ),
    "a number as text": Mistake(
        lambda: SamplingParams(temperature="0.7"), "temperature", "a number", "'0.7'", "write 0.7, without quotes"
    ),
    "strings and ids that end a text": Mistake(
        lambda: SamplingParams(stop_token_ids="</s>"), "stop_token_ids", "a sequence of ints", "'</s>'", "stop=…"
    ),
    "a dict for parameters": Mistake(
        lambda: llm().generate([[1]], {"max_tokens": 3}),
        "params",
        "SamplingParams",
        "{'max_tokens': 3}",
        "write SamplingParams(",
    ),
    "text without a tokenizer": Mistake(
        lambda: llm().generate("hello"), "prompts", "token ids", "a str", "LLM(model, tokenizer)"
    ),
    "ids of another tokenizer": Mistake(
        lambda: llm().generate([[1, 97]]), "prompt", "0 … 96", "97", "the tokenizer of this model"
    ),
    "a tier alone": Mistake(
        lambda: LLM(llm().core.runner, tiers=HostTier("1MB")),
        "tiers",
        "a sequence of tiers",
        "HostTier",
        "write [tier]",
    ),
    "a list for a trace": Mistake(lambda: replay([[1, 2]], 100), "trace", "a Trace", "list", "read_trace(path)"),
    "one capacity for a sweep": Mistake(
        lambda: sweep(synthesize("chat", requests=9), ["lru"], 10), "blocks", "a sequence", "10", "write [10]"
    ),
    "traffic by nearly its name": Mistake(
        lambda: synthesize("chats"), "kind", "one of chat, agents", "'chats'", "did you mean 'chat'?"
    ),
}

COMMANDS: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "a command by nearly its name": (["generat"], ("command", "'generat'", "Did you mean 'generate'?")),
    "a file that is not there": (
        ["replay", "no-such.jsonl"],
        ("no-such.jsonl", "cannot be read", "No such file", "is the path right?"),
    ),
}
MISTAKES = {
    f"{group}: {name}": mistake
    for group, table in (("pool", POOL), ("books", BOOKS), ("tensors", TENSORS), ("around", AROUND))
    for name, mistake in table.items()
}


def line_of(error: PagedKvError) -> str:
    """What a user reads; texts that are fixed say what to do next in a note."""
    assert "\n" not in str(error)
    return " ".join([str(error), *getattr(error, "__notes__", ())])


def require_pieces(line: str, pieces: tuple[str, ...]) -> None:
    rest = line
    for piece in pieces:
        assert piece in rest, f"{piece!r} is not in {rest!r} of {line!r}"
        rest = rest[rest.index(piece) + len(piece) :]


def test_there_are_63_of_them():
    assert len(MISTAKES) + len(COMMANDS) == 63


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_gets_one_line_that_says_what_to_do(mistake):
    with pytest.raises(mistake.error) as caught:
        mistake.call()
    assert type(caught.value) is mistake.error
    line = line_of(caught.value)
    require_pieces(line, mistake[1:5])
    assert len(line) < 400


@pytest.mark.parametrize(("arguments", "pieces"), COMMANDS.values(), ids=COMMANDS)
def test_a_mistaken_command_gets_one_line(arguments, pieces):
    result = call(*arguments)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    require_pieces(result.stderr, pieces)
