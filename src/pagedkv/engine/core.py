"""EngineCore: requests go in, one step after the other is made, outputs come out. Not for several threads at once."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Iterable
from typing import Any

from pagedkv.engine.admission import refuse_what_never_fits
from pagedkv.engine.intake import prepare
from pagedkv.engine.outcome import Outcome
from pagedkv.engine.outputs import RequestOutput
from pagedkv.engine.reporting import output_of
from pagedkv.engine.request import Branch, Request
from pagedkv.engine.runner import Runner
from pagedkv.engine.sampler import Sampler, SampleRow, random_seed
from pagedkv.engine.scheduler import Scheduler
from pagedkv.engine.snapshot import EngineSnapshot, take_snapshot
from pagedkv.engine.stats import EngineStats
from pagedkv.engine.tick_clock import TickClock
from pagedkv.errors import InvalidLogits, InvalidOperation
from pagedkv.spec import require_int

__all__ = ["EngineCore"]

logger = logging.getLogger("pagedkv")


class EngineCore:
    """Continuous batching over one runner.

    Parameters
    ----------
    runner : Runner
        A model over a paged cache. What the cache holds for others is left alone, but is not there for requests.
    tokenizer : optional
        Turns tokens into text; without one outputs have token ids only.
    eos_token_ids : iterable of int
        Tokens that end a text.
    max_batch_tokens : int
        Query tokens of a step; texts that are being written take part even beyond that.
    max_num_seqs : int
        Texts that are written at once.
    sampler : optional
        Chooses the tokens; :class:`pagedkv.engine.sampler.Sampler` by default.

    Raises
    ------
    InvalidOperation
        If an argument is out of range.
    """

    def __init__(
        self,
        runner: Runner,
        *,
        tokenizer: Any = None,
        eos_token_ids: Iterable[int] = (),
        max_batch_tokens: int = 512,
        max_num_seqs: int = 256,
        sampler: Any = None,
    ) -> None:
        require_int("max_batch_tokens", max_batch_tokens, 1, 2**31 - 1)
        require_int("max_num_seqs", max_num_seqs, 1, 2**31 - 1)
        self.runner, self.tokenizer = runner, tokenizer
        self.eos_token_ids = frozenset(eos_token_ids)
        self.scheduler = Scheduler(runner, max_batch_tokens=max_batch_tokens, max_num_seqs=max_num_seqs)
        self._sampler = Sampler() if sampler is None else sampler
        self._requests: dict[str, Request] = {}
        self._numbers = itertools.count()
        self._counts: dict[str, int] = dict.fromkeys(_COUNTED, 0)
        self._seconds = {"busy": 0.0, "forward": 0.0, "sampling": 0.0}
        self._clock = TickClock()

    @property
    def has_work(self) -> bool:
        """Whether a request is under way."""
        return bool(self._requests)

    def add(self, request: Request) -> None:
        """Take a request in.

        Raises
        ------
        InvalidOperation
            If an argument of the request makes no sense, or its id is in use.
        RequestRefused
            With the numbers, if it could never be computed, even with the whole engine to itself.
        """
        if request.request_id in self._requests:
            raise InvalidOperation(f"request_id expects one that is not in use, got {request.request_id!r}")
        prepare(request, self.runner)
        if request.params.stop and self.tokenizer is None:
            raise InvalidOperation("stop expects no strings, as the engine has no tokenizer")
        refuse_what_never_fits(request, self.runner, self.scheduler.max_num_seqs)
        request.number = next(self._numbers)
        request.seed = random_seed() if request.params.seed is None else request.params.seed
        request.branches = [self.scheduler.new_branch(request)]
        self._requests[request.request_id] = request

    def abort(self, request_id: str) -> RequestOutput | None:
        """End a request; its blocks are free at once.

        Returns
        -------
        RequestOutput or None
            What there is of it; None if no such request is under way.
        """
        request = self._requests.get(request_id)
        if request is None:
            return None
        for branch in request.branches:
            if branch.finish_reason is None:
                self.scheduler.drop(branch)
                branch.finish_reason = "abort"
                if branch.writer is not None:
                    branch.writer.close()
        self._counts["aborted_requests"] += 1
        return self._ended(request, aborted=True)

    def step(self) -> list[RequestOutput]:
        """Make one forward pass and return what it brought, in the order of arrival.

        If the runner or the sampler raises, the step never was: every text goes on from where it stood.
        """
        started = time.perf_counter()
        batch = self.scheduler.schedule()
        if batch is None:
            self._seconds["busy"] += time.perf_counter() - started
            return []
        outcome = Outcome(batch, self)
        before = time.perf_counter()
        try:
            logits = self.runner.forward(batch.plan, batch.token_ids, batch.wanted)
            computed = time.perf_counter()
            outcome.choose(logits, self._sampler)
            chosen = time.perf_counter()
            moved = outcome.apply()
        except InvalidLogits as error:
            self.scheduler.recall(batch.parts)
            return self._refused(error)
        except BaseException:
            self.scheduler.recall(batch.parts)
            raise
        outputs = [self._reported(request) for request in moved]
        self._clock.mark(batch.plan.tick, time.monotonic())
        self._counts["steps"] += 1
        self._seconds["forward"] += computed - before
        self._seconds["sampling"] += chosen - computed
        self._seconds["busy"] += time.perf_counter() - started
        return [output for output in outputs if output is not None]

    def clear_prefix_cache(self) -> int:
        """Forget all prefixes; returns how many blocks became free. What runs goes on."""
        return self.runner.cache.clear_prefix_cache()

    def stats(self) -> EngineStats:
        """Return the counters."""
        cache, scheduler = self.runner.cache, self.scheduler
        requests = list(self._requests.values())  # a copy, as other threads may ask
        running = sum(any(branch.is_running for branch in request.branches) for request in requests)
        return EngineStats(
            num_running=running,
            num_waiting=len(requests) - running,
            num_preemptions=scheduler.num_preemptions,
            prompt_tokens=scheduler.num_prompt_tokens,
            prefix_queries=scheduler.num_prompt_tokens,
            prefix_hits=scheduler.num_cached_tokens,
            blocks_total=cache.total_blocks,
            blocks_used=cache.used_block_count,
            blocks_cached=cache.cached_block_count,
            blocks_free=cache.free_block_count,
            block_size=cache.block_size,
            evictions=cache.stats.total_evictions,
            reclaimed=cache.stats.blocks_reclaimed,
            busy_seconds=self._seconds["busy"],
            forward_seconds=self._seconds["forward"],
            sampling_seconds=self._seconds["sampling"],
            **self._counts,
        )

    def snapshot(self) -> EngineSnapshot:
        """Return the pool, the requests and the counters at this moment, frozen."""
        return take_snapshot(self.runner.cache, self._requests.values(), self.stats(), self._clock)

    def count(self, **amounts: int) -> None:
        """Add to the counters of these names."""
        for name, amount in amounts.items():
            self._counts[name] += amount

    def row_of(self, branch: Branch) -> SampleRow:
        """Return what the sampler has to know of a branch."""
        if branch.row is None:
            request = branch.request
            branch.row = SampleRow(
                request.request_id,
                request.params,
                request.prompt_token_ids,
                seed=request.seed,
                choice=branch.index,
                end_ids=self.eos_token_ids,
            )
        row: SampleRow = branch.row
        return row

    def _refused(self, error: InvalidLogits) -> list[RequestOutput]:
        """End the requests for which the model gave no numbers; all others go on."""
        logger.error("%s", error)
        outputs = [self.abort(request_id) for request_id in error.request_ids]
        return [output for output in outputs if output is not None]

    def _reported(self, request: Request) -> RequestOutput | None:
        if all(branch.finish_reason is not None for branch in request.branches):
            self._counts["finished_requests"] += 1
            return self._ended(request)
        # Beams may still change their minds about every word.
        return output_of(request) if request.wants_updates and request.beams is None else None

    def _ended(self, request: Request, *, aborted: bool = False) -> RequestOutput:
        request.finished = time.monotonic()
        del self._requests[request.request_id]
        return output_of(request, aborted=aborted)


_COUNTED = (
    "finished_requests",
    "aborted_requests",
    "generation_tokens",
    "draft_tokens",
    "accepted_tokens",
    "steps",
)
