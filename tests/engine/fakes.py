"""A model that is nothing but a hash of the text that its cache really holds: quick, and it notices every mix-up."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from pagedkv import BlockManager
from pagedkv.engine import EngineCore, Request, SamplingParams
from pagedkv.engine.offload import ladder_for
from pagedkv.tiers import BlockFormat

VOCAB = 31
MIX = np.uint64(0x9E3779B97F4A7C15)


class TokenCache(BlockManager):
    """A BlockManager whose K and V are the token ids and positions themselves."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.tokens = np.full(self.total_blocks * self.block_size, -1, np.int64)
        self.places = np.full(self.total_blocks * self.block_size, -1, np.int64)
        self.origins: dict[int, int] = {}  # copied blocks to where that came from, since the last forward pass
        self.earlier: dict[int, int] = {}  # the same, between the two passes before
        self.texts: list[list[int]] = [[] for _ in range(self.total_states)]

    @property
    def storage(self) -> TokenStorage:
        return TokenStorage(self)

    @property
    def block_memory_bytes(self) -> int:
        return 2 * 8 * self.block_size

    def _copy_states(self, copies: Any) -> None:
        for source, destination in copies.tolist():
            self.texts[destination] = list(self.texts[source]) if source != destination else []

    def _copy(self, copies: Any) -> None:
        size = self.block_size
        for column in (self.tokens, self.places):
            rows = column.reshape(-1, size)
            rows[copies[:, 1]] = rows[copies[:, 0]]
        origins = [self.origins.get(source, source) for source in copies[:, 0].tolist()]
        self.origins.update(zip(copies[:, 1].tolist(), origins, strict=True))

    def origins_of(self, block: int) -> tuple[int | None, ...]:
        """Where what a block holds came from, since the last pass or the one before, at once or by another block."""
        origin = self.origins.get(block)
        return origin, self.earlier.get(block), None if origin is None else self.earlier.get(origin)


class TokenStorage:
    """What tiers need of a storage: blocks as tensors [layers, K and V, blocks, elements]."""

    device = torch.device("cpu")

    def __init__(self, cache: TokenCache) -> None:
        shape = -1, cache.block_size
        self._columns = [column.reshape(shape) for column in (cache.tokens, cache.places)]

    def read_blocks(self, blocks: Any) -> list[Any]:
        return [torch.from_numpy(np.array([column[blocks] for column in self._columns])[None])]

    def write_blocks(self, blocks: Any, contents: list[Any]) -> None:
        for column, content in zip(self._columns, contents[0][0].numpy(), strict=True):
            column[blocks] = content


class FakeRunner:
    """Logits out of the tokens that the blocks hold; it refuses blocks that hold the wrong positions."""

    reuses_prefixes = True
    has_states = False
    window: int | None = None
    chunkable = True
    restarts_beyond: int | None = None
    max_positions: int | None = None
    vocab_size = VOCAB

    def __init__(self, num_blocks: int, block_size: int = 4, **options: Any) -> None:
        self.cache = TokenCache(num_blocks, block_size, **options)
        self.computed_tokens = 0
        self.fail = False
        self.batches: list[list[int]] = []

    def block_format(self) -> BlockFormat:
        return BlockFormat("fake", self.cache.block_size, self.cache.block_memory_bytes)

    def forward(self, plan: Any, token_ids: Any, wanted: Any) -> Any:
        if self.fail:
            raise RuntimeError("the model broke")
        cache, size = self.cache, self.cache.block_size
        # What is copied between a plan and its pass, for a text that is admitted then, is told by the next plan.
        made = [source in cache.origins_of(to) for source, to in plan.copies.tolist()]
        assert all(made), "a copy that the plan names was not made"
        cache.earlier, cache.origins = cache.origins, {}
        cache.tokens[plan.slot_mapping] = token_ids
        cache.places[plan.slot_mapping] = plan.text_positions
        self.computed_tokens += len(token_ids)
        self.batches.append(plan.num_query_tokens.tolist())
        if self.has_states:
            self._advance_states(plan, token_ids)
        rows = []
        for place in wanted.tolist():
            i = int(np.searchsorted(plan.cu_seqlens_q, place, side="right")) - 1
            positions = np.arange(plan.positions[place] + 1)
            hole = plan.holes[i]
            slots = np.where(positions >= hole[0], positions + hole[1] - hole[0], positions)
            slots = plan.block_tables[i, slots // size].astype(np.int64) * size + slots % size
            dropped = int(plan.num_dropped[i])
            texts = np.where(positions >= hole[0], positions + dropped, positions) if dropped else positions
            assert np.array_equal(cache.places[slots], texts), "a block holds another part of the text"
            rows.append(logits_of(cache.tokens[slots]))
        return torch.from_numpy(np.array(rows, np.float32).reshape(-1, VOCAB))

    def _advance_states(self, plan: Any, token_ids: Any) -> None:
        """Let each state go on with the tokens behind those that it has seen, as the blocks have them."""
        cache, cuts = self.cache, plan.cu_seqlens_q
        for i, slot in enumerate(cache.state_slots(plan).tolist()):
            first, last = int(cuts[i]), int(cuts[i + 1])
            past = int(plan.seq_lens[i]) - (last - first) + int(plan.num_dropped[i])
            text = cache.texts[slot]
            assert len(text) == past, "a state of another number of tokens"
            cache.texts[slot] = text + token_ids[first:last].tolist()
            if not plan.num_dropped[i]:
                places = np.arange(plan.seq_lens[i])
                slots = plan.block_tables[i, places // cache.block_size].astype(np.int64) * cache.block_size
                assert cache.tokens[slots + places % cache.block_size].tolist() == cache.texts[slot]

    def require_streaming(self, sink_tokens: int, window_tokens: int) -> None:
        pass

    def fork(self, src: int, dst: int) -> None:
        pass

    def release(self, seq_id: int) -> None:
        pass


class RecurrentRunner(FakeRunner):
    """One that keeps a state of each text besides what is in blocks."""

    has_states = True


def logits_of(tokens: Any) -> Any:
    """Return pseudo-random logits: most often of the last two tokens, so that texts repeat; else of the whole text."""
    with np.errstate(over="ignore"):
        weights = np.arange(1, len(tokens) + 1, dtype=np.uint64) * MIX
        whole = ((tokens.astype(np.uint64) + np.uint64(1)) * weights).sum()
        whole ^= whole >> np.uint64(29)
        state = whole if whole % np.uint64(5) == 0 else np.uint64(0)
        for token in tokens[-2:].tolist():
            state = (state ^ np.uint64(token % 5 + 1)) * MIX
            state ^= state >> np.uint64(29)
        values = (np.arange(VOCAB, dtype=np.uint64) + state) * MIX
        values ^= values >> np.uint64(31)
        values *= MIX
    return (values >> np.uint64(40)).astype(np.float32) / 2**22


def engine(num_blocks: int = 64, block_size: int = 4, *, runner: Any = None, **options: Any) -> EngineCore:
    """Return an engine over a fake model; options of the cache and of the engine."""
    tiers = options.pop("tiers", ())
    names = ("max_batch_tokens", "max_num_seqs", "eos_token_ids", "tenant_weights")
    own = {name: options.pop(name) for name in names if name in options}
    runner = runner or FakeRunner(num_blocks, block_size, **options)
    return EngineCore(runner, ladder=ladder_for(runner, tiers), **own)


def request(name: str, prompt: Any, **options: Any) -> Request:
    """Return a request; options of Request and of SamplingParams."""
    own = {key: options.pop(key) for key in ("priority", "cache_salt", "wants_updates", "tenant") if key in options}
    return Request(request_id=name, prompt_token_ids=prompt, params=SamplingParams(**options), **own)


def run(core: EngineCore, *, check: bool = True, most_steps: int = 5000) -> dict[str, Any]:
    """Step until nothing is left; returns the last output of each request."""
    outputs = {}
    for _ in range(most_steps):
        if not core.has_work:
            break
        core.wait()
        for output in core.step():
            outputs[output.request_id] = output
        if check:
            core.runner.cache.check()
    assert not core.has_work, "the engine does not come to its end"
    return outputs


def tokens_of(output: Any) -> list[tuple[int, ...]]:
    return [each.token_ids for each in output.outputs]


def alone(req: Request, **options: Any) -> list[tuple[int, ...]]:
    """Return the tokens that a request gets with a large engine to itself."""
    core = engine(256, 4, **options)
    twin = Request(
        request_id=req.request_id,
        prompt_token_ids=list(req.prompt_token_ids),
        params=req.params,
        cache_salt=req.cache_salt,
    )
    core.add(twin)
    return tokens_of(run(core, check=False)[req.request_id])
