"""A small engine in vLLM's place: it schedules, pages and computes as vLLM does, and knows what every key must be."""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass, field

import torch

from pagedkv.tiers import BlockFormat
from pagedkv.vllm.messages import Done
from pagedkv.vllm.paging import WorkerHalf
from pagedkv.vllm.scheduling import SchedulerHalf

SIZE, LAYERS, HEADS, DIM = 4, 2, 2, 3
PAGE = HEADS * SIZE * DIM * 4
BYTES = LAYERS * PAGE


@dataclass
class Request:
    """What the connector reads of one, and what the engine keeps."""

    request_id: str
    all_token_ids: list[int]
    max_tokens: int = 1
    cache_salt: str | None = None
    num_computed_tokens: int = 0
    skip_reading_prefix_cache: bool = False
    lora_request: object = None
    mm_features: list[object] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    num_prompt: int = 0
    cached: int = 0  # tokens that were not computed, in the pool or outside
    written: list[int] = field(default_factory=list)  # as the worker has them: the scheduler may not know the last yet

    @property
    def num_tokens(self):
        return len(self.all_token_ids)


def numbers(tokens, salt):
    """A number for each token of a text, of it and all before it: what its keys are, and what comes next."""
    state, found = zlib.crc32(repr(salt).encode()), []
    for token in tokens:
        state = zlib.crc32(b"%d," % token, state)
        found.append(state)
    return found


class Engine:
    """One pool and one connector.

    Parameters
    ----------
    tiers : sequence of Tier
    num_blocks : int
        Of the pool.
    staging : int
        Bytes of the staging memory.
    model : str
        The fingerprint; keys depend on it.
    seed : int
        Of chunks and preemptions; None for none of these.
    is_async : bool
        Whether a step is planned before the outcome of the one before is known.
    """

    def __init__(
        self,
        tiers,
        num_blocks=40,
        staging=64 * (BYTES + 8),
        model="model",
        seed=None,
        ranks=1,
        is_async=False,
        **options,
    ):
        self.is_async, self.outcomes = is_async, []
        self.model, self.num_blocks, self.random = model, num_blocks, random.Random(seed)
        self.is_wild = seed is not None
        shape = (num_blocks, HEADS, SIZE, DIM)
        self.pools = [
            {f"layer {i}": torch.full(shape, torch.nan) for i in range(LAYERS)} for _ in range(ranks)
        ]  # what was never written is not a number
        self.workers = [WorkerHalf(pool, num_blocks, rank=i, num_ranks=ranks) for i, pool in enumerate(self.pools)]
        block = BlockFormat(model, SIZE, BYTES * ranks)
        self.half = SchedulerHalf(tiers, block, staging * ranks, num_workers=ranks, **options)
        self.free = list(range(num_blocks))
        self.known: dict[tuple[str, ...], int] = {}  # blocks of the pool that can be found, by their text
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.wrong = 0  # keys that were read and are not what they must be
        self.spoil = lambda plan: None  # between a plan and the copies

    def ask(self, *prompts, max_tokens=1, salts=None, **fields):
        """Serve prompts at once; returns the requests."""
        requests = []
        for i, prompt in enumerate(prompts):
            salt = salts[i] if salts else None
            request = Request(f"{id(self)}-{self.random.random()}", list(prompt), max_tokens, salt, **fields)
            request.num_prompt, request.written = len(prompt), list(prompt)
            requests.append(request)
            self.half.arrived(request)
        self.waiting += requests
        for _ in range(100_000):
            if not self.waiting and not self.running:
                return requests
            self.step()
        raise AssertionError("a request waits for ever")

    def settle(self):
        """Wait until everything is stored."""
        while self.outcomes:
            self.hear(*self.outcomes.pop(0))
        for store in list(self.half._stores.values()):
            store.end.result(timeout=30)
        self.half.plan({}, lambda _: [])

    # One step, as vLLM's.

    def step(self):
        if self.is_wild and self.running and self.random.random() < 0.05:
            self.preempt(self.running[-1])
        scheduled = {}
        for request in list(self.running):
            count = self.chunk(len(request.written) - request.num_computed_tokens)
            if count and not self.allocate(request, request.num_computed_tokens + count):
                self.preempt(request)
            elif count:
                scheduled[request.request_id] = (request, count)
        for request in list(self.waiting):
            local = self.local_hit(request)
            found = self.half.found(request, local * SIZE)
            if found is None:
                continue
            start = local * SIZE + found
            assert start < request.num_tokens
            count = self.chunk(request.num_tokens - start)
            hits = [self.known[self.key(request, i)] for i in range(local)]
            request.blocks = hits
            self.free = [block for block in self.free if block not in hits]
            if not self.allocate(request, start + count):
                self.release(request)
                break
            request.num_computed_tokens, request.cached = start, start
            self.half.placed(request, request.blocks, local * SIZE, found)
            self.waiting.remove(request)
            self.running.append(request)
            scheduled[request.request_id] = (request, count)
        counts = {name: count for name, (_, count) in scheduled.items()}
        plan = self.half.plan(counts, lambda name: scheduled[name][0].blocks)
        self.spoil(plan)
        for worker in self.workers:
            worker.load(plan)
        for request, count in scheduled.values():
            self.compute(request, count)
        for worker in self.workers:
            worker.store(plan)
        wrong = set().union(*(worker.take_wrong() for worker in self.workers))
        done = [each for worker in self.workers if (each := worker.take_done())]
        self.outcomes.append((scheduled, wrong, done))
        while len(self.outcomes) > self.is_async:
            self.hear(*self.outcomes.pop(0))

    def hear(self, scheduled, wrong, done):
        """Take note of the outcome of a step."""
        if done:
            total = Done()
            for each in done:
                total = total.aggregate(each)
            self.half.copied(total)
        for request, _ in scheduled.values():
            if request in self.running:  # else it has ended meanwhile
                self.advance(request, wrong)

    def chunk(self, count):
        return min(count, self.random.randint(1, 3 * SIZE)) if self.is_wild else count

    def advance(self, request, wrong):
        bad = [i for i, block in enumerate(request.blocks) if block in wrong]
        if bad:  # as vLLM does with policy "recompute"
            request.num_computed_tokens = min(request.cached, bad[0] * SIZE)
            for block in request.blocks[bad[0] :]:
                self.known = {key: held for key, held in self.known.items() if held != block}
            del request.written[request.num_tokens :]
            return
        for i in range(min(request.num_computed_tokens, request.num_tokens) // SIZE):
            self.known[self.key(request, i)] = request.blocks[i]
        request.all_token_ids += request.written[request.num_tokens :][:1]
        if request.num_computed_tokens == request.num_tokens == request.num_prompt + request.max_tokens:
            self.running.remove(request)
            self.half.finished(request.request_id)
            self.release(request)

    def compute(self, request, count):
        """Read all keys before these tokens, and write their own and the next token."""
        start, stop = request.num_computed_tokens, request.num_computed_tokens + count
        places = torch.arange(stop)
        blocks, offsets = torch.tensor(request.blocks)[places // SIZE], places % SIZE
        wanted = torch.tensor(numbers(request.written[:stop], (request.cache_salt, self.model))) % 2**20
        for rank, pool in enumerate(self.pools):
            for i, kv in enumerate(pool.values()):
                keys = (wanted + i + 7 * rank).float()[:, None, None].expand(-1, HEADS, DIM)
                num_wrong = int((kv[blocks[:start], :, offsets[:start]] != keys[:start]).sum())
                self.wrong += num_wrong
                kv[blocks[start:], :, offsets[start:]] = keys[start:] + (1 if num_wrong else 0)
        request.num_computed_tokens = stop
        if stop == len(request.written) < request.num_prompt + request.max_tokens:
            request.written.append(numbers(request.written, request.cache_salt)[-1] % 97)

    # The pool.

    def key(self, request, i):
        return (request.cache_salt, *request.all_token_ids[: (i + 1) * SIZE])

    def local_hit(self, request):
        free, count = set(self.free), 0
        while (count + 1) * SIZE < request.num_tokens and self.known.get(self.key(request, count)) in free:
            count += 1
        return count

    def allocate(self, request, num_tokens):
        needed = -(-num_tokens // SIZE) - len(request.blocks)
        if needed > len(self.free):
            return False
        taken, self.free = self.free[: max(0, needed)], self.free[max(0, needed) :]
        self.known = {key: block for key, block in self.known.items() if block not in taken}
        request.blocks = request.blocks + taken
        return True

    def release(self, request):
        self.free += request.blocks
        request.blocks = []

    def preempt(self, request):
        if len(request.written) > request.num_tokens or any(request.request_id in each[0] for each in self.outcomes):
            return  # what is on its way comes first
        self.running.remove(request)
        self.release(request)
        request.num_computed_tokens = 0
        self.waiting.insert(0, request)

    def empty_pool(self):
        """Forget what the pool has, as a restart does."""
        self.known.clear()
        for pool in self.pools:
            for kv in pool.values():
                kv.fill_(torch.nan)

    def close(self):
        self.half.close()
