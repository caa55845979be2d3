"""The engine core: one step is schedule, forward pass, sampling, new state of the sequences, outputs."""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np

from pagedkv.control.types import CacheStats
from pagedkv.data.team import torch_alone
from pagedkv.engine.batch import Batch, ScheduledChunk
from pagedkv.engine.beam_steps import advance_beams, begin_beams
from pagedkv.engine.output import OutputDraft
from pagedkv.engine.request import Request, RequestOutput, Sequence, prepare, refuse_what_never_fits
from pagedkv.engine.runner import Runner
from pagedkv.engine.sampler import Sampler, SampleRow, are_likeliest, random_seed, token_logprobs
from pagedkv.engine.scheduler import Scheduler
from pagedkv.engine.snapshot import EngineSizes, EngineSnapshot, EngineStats, PinnedPrefix, TickClock, take_snapshot
from pagedkv.engine.text import Ending, OutputText
from pagedkv.engine.token_grammar import Grammars
from pagedkv.errors import InvalidLogits, InvalidOperation, OutOfMemory, bad_argument
from pagedkv.tiers.ladder import Ladder
from pagedkv.tiers.tier import Tier
from pagedkv.validate import require_int

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


logger = logging.getLogger("pagedkv")

_COUNTED = ("finished_requests", "aborted_requests", "generation_tokens", "draft_tokens", "accepted_tokens", "steps")


class EngineCore:
    """Continuous batching over one runner. Not for several threads at once.

    Parameters
    ----------
    runner : Runner
        A model over a paged cache. What the cache holds for others is left alone, but is not there for requests.
    tokenizer : optional
        Turns tokens into text; without one outputs have token ids only.
    eos_token_ids : iterable of int
        Tokens that end a text; those that the model has no logit of never come.
    max_batch_tokens : int
        Query tokens of a step; texts that are being written take part even beyond that.
    max_num_seqs : int
        Texts that are written at once; where the model keeps states, at most as many as there are slots for them.
    tenant_weights : mapping, optional
        Tenants to their parts of what is computed and held, in proportion; 1 for those that are not in it.
    sampler : optional
        Chooses the tokens; :class:`pagedkv.engine.sampler.Sampler` by default.
    ladder : Ladder, optional
        Tiers, open for the blocks of the runner's cache, whose prefixes must be reusable; closed with the engine.

    Raises
    ------
    InvalidOperation
        If an argument is out of range.
    """

    def __init__(
        self,
        runner: Runner,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        eos_token_ids: Iterable[int] = (),
        max_batch_tokens: int = 512,
        max_num_seqs: int = 256,
        tenant_weights: Mapping[str, float] | None = None,
        sampler: Sampler | None = None,
        ladder: Ladder | None = None,
    ) -> None:
        require_int("max_batch_tokens", max_batch_tokens, 1, 2**31 - 1)
        require_int("max_num_seqs", max_num_seqs, 1, 2**31 - 1)
        self.runner, self.tokenizer = runner, tokenizer
        self.eos_token_ids = frozenset(each for each in eos_token_ids if 0 <= each < runner.vocab_size)
        self._end_ids = np.array(sorted(self.eos_token_ids), np.int64)
        for tenant, weight in (tenant_weights or {}).items():
            if not 0 < weight < math.inf:
                raise bad_argument("tenant_weights", "numbers above 0", f"{weight!r} for {tenant!r}")
        self.scheduler = Scheduler(
            runner,
            max_batch_tokens=max_batch_tokens,
            max_num_seqs=max_num_seqs,
            weights=tenant_weights,
            ladder=ladder,
        )
        self._sampler, self.has_own_sampler = Sampler() if sampler is None else sampler, sampler is not None
        self._forward_in_place = getattr(runner, "forward_in_place", None)
        self.grammars = Grammars(tokenizer, runner.vocab_size, self.eos_token_ids)
        self._requests: dict[str, Request] = {}
        self._numbers = itertools.count()
        self._clock = TickClock()
        self._is_idle = False  # the last step found nothing to compute
        self._pins: dict[int, None] = {}  # the newest last
        self._count_from_zero()

    @property
    def sizes(self) -> EngineSizes:
        """What never changes."""
        runner, cache, scheduler = self.runner, self.runner.cache, self.scheduler
        pool = cache.total_blocks * cache.block_size
        return EngineSizes(
            block_size=cache.block_size,
            total_blocks=cache.total_blocks,
            bytes_per_block=getattr(runner, "bytes_per_block", 0),
            vocab_size=runner.vocab_size,
            max_model_len=pool if runner.max_positions is None else min(pool, runner.max_positions),
            max_num_seqs=scheduler.max_num_seqs,
            max_batch_tokens=scheduler.max_batch_tokens,
        )

    @property
    def tiers(self) -> tuple[Tier, ...]:
        """Where K and V are kept beyond the pool, nearest first."""
        offload = self.scheduler.offload
        return () if offload is None else tuple(rung.tier for rung in offload.ladder.rungs)

    @property
    def has_work(self) -> bool:
        """Whether a request is under way."""
        return bool(self._requests)

    @property
    def patience(self) -> float | None:
        """Seconds until a step may have something to compute, if no tier answers before; None: not before a request."""
        if not self._requests:
            return None
        offload = self.scheduler.offload
        return offload.patience() if self._is_idle and offload is not None else 0.0

    def wait(self) -> None:
        """Wait as long as all requests wait for tiers."""
        offload, patience = self.scheduler.offload, self.patience
        if patience and offload is not None:
            offload.ladder.news.wait(patience)

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
            raise bad_argument("request_id", "one that is not in use", f"{request.request_id!r}")
        prepare(request, self.runner)
        if request.params.stop and self.tokenizer is None:
            hint = "stop_token_ids=… ends a text without one"
            raise bad_argument("stop", "no strings, as the engine has no tokenizer", f"{request.params.stop!r}", hint)
        refuse_what_never_fits(request, self.runner, self.scheduler.max_num_seqs, self.scheduler.max_batch_tokens)
        if request.params.streaming is not None:
            self.runner.require_streaming(*request.params.streaming)
        if request.params.structured is not None and request.grammar is None:
            request.grammar = self.grammars.compile(request.params.structured)
        request.number = next(self._numbers)
        request.seed = random_seed() if request.params.seed is None else request.params.seed
        request.sequences = [self.scheduler.new_sequence(request)]
        self._requests[request.request_id] = request
        self._is_idle = False

    def abort(self, request_id: str) -> RequestOutput | None:
        """End a request; its blocks are free at once.

        Returns
        -------
        RequestOutput or None
            What there is of it; None if no such request is under way.
        """
        request = self.end(request_id)
        return None if request is None else OutputDraft(request).output()

    def end(self, request_id: str) -> Request | None:
        """End a request as `abort` does; returns it, or None."""
        request = self._requests.get(request_id)
        if request is None:
            return None
        for sequence in request.sequences:
            if sequence.finish_reason is None:
                self.scheduler.drop(sequence)
                sequence.finish_reason = "abort"
                if sequence.output_text is not None:
                    sequence.output_text.close()
        self._counts["aborted_requests"] += 1
        self._is_idle = False
        request.is_aborted = True
        return self._ended(request)

    def step(self, longest_call: float | None = None) -> list[RequestOutput]:
        """Make one forward pass and return what it brought, in the order of arrival; see `advance`."""
        return [OutputDraft(request).output() for request in self.advance(longest_call)]

    def advance(self, longest_call: float | None = None) -> list[Request]:
        """Make one forward pass and return the requests of which there is something to tell, in the order of arrival.

        The runner may compute steps ahead for up to `longest_call` seconds; how long is its own to say by default.
        If the runner or the sampler raises, the step never was: every text goes on from where it stood.
        """
        started = time.perf_counter()
        offload = self.scheduler.offload
        if offload is not None:
            offload.poll()
        batch = self._schedule()
        self._is_idle = batch is None
        if batch is None:
            self._seconds["busy"] += time.perf_counter() - started
            return []
        output = StepOutput(batch, self)
        scheduled = time.perf_counter()
        try:
            if output.needs_torch or self._forward_in_place is None:
                logits = self.runner.forward(batch.plan, batch.token_ids, batch.wanted)
            else:
                ahead = 0 if self.scheduler.waiting else batch.steps_ahead()
                logits = self._forward_in_place(
                    batch.plan, batch.token_ids, batch.wanted, ahead, self._end_ids, longest_call
                )
            computed = time.perf_counter()
            with torch_alone() if output.needs_torch else nullcontext():
                output.sample(logits, self._sampler)
                sampled = time.perf_counter()
                touched = output.apply()
        except InvalidLogits as error:
            self.scheduler.recall(batch.chunks)
            return self._refused(error)
        except BaseException:
            self.scheduler.recall(batch.chunks)
            raise
        self._clock.mark(batch.plan.tick, time.monotonic())
        if offload is not None:
            offload.measure(batch.num_prompt_tokens, computed - scheduled)
        self._counts["steps"] += 1
        self._seconds["forward"] += computed - scheduled
        self._seconds["sampling"] += sampled - computed
        reported = [request for request in touched if self._is_news(request)]
        self._seconds["busy"] += time.perf_counter() - started
        return reported

    def clear_prefix_cache(self) -> int:
        """Forget all prefixes, in tiers too; returns how many blocks became free. What runs goes on.

        Raises
        ------
        TierError
            If a tier refuses; all else is forgotten.
        """
        count: int = self.runner.cache.clear_prefix_cache()
        self._pins.clear()
        if self.scheduler.offload is not None:
            self.scheduler.offload.clear()
        return count

    def pin(self, token_ids: Iterable[int], cache_salt: str = "") -> PinnedPrefix:
        """Keep the leading blocks of a text that are in the pool, until `unpin` or until all is forgotten.

        Where a request could not be computed otherwise, pins are taken back, the newest first.

        Raises
        ------
        OutOfMemory
            If not one block of the pool is free.
        """
        cache, seq_id = self.runner.cache, next(self.scheduler.seq_ids)
        info = cache.allocate(seq_id, [*token_ids, 0], cache_salt=cache_salt)  # the last token is never found
        if info.num_cached_tokens:
            cache.pin(seq_id, info.num_cached_tokens)
            self._pins[seq_id] = None
        cache.free(seq_id)
        return PinnedPrefix(seq_id, info.num_cached_tokens)

    def unpin(self, handle: int) -> None:
        """Take a pin back; one that is gone already is ignored."""
        if handle in self._pins:
            del self._pins[handle]
            self.runner.cache.unpin(handle)

    def _schedule(self) -> Batch | None:
        """Lay out the next step; where pins leave no room for it, they go."""
        while True:
            try:
                return self.scheduler.schedule()
            except OutOfMemory:
                if not self._pins:
                    raise
                self.unpin(next(reversed(self._pins)))

    @contextmanager
    def without_tiers(self) -> Iterator[None]:
        """Leave the tiers alone for a while: nothing is looked up there, stored or forgotten."""
        offload, self.scheduler.offload = self.scheduler.offload, None
        try:
            yield
        finally:
            self.scheduler.offload = offload

    def close(self) -> None:
        """Finish what is under way between pool and tiers, and close these. The engine goes on without them."""
        offload, self.scheduler.offload = self.scheduler.offload, None
        if offload is not None:
            offload.close()

    def reset(self) -> int:
        """Forget all prefixes and count from zero again; returns how many blocks became free.

        Raises
        ------
        InvalidOperation
            If requests are under way.
        """
        if self.has_work:
            raise InvalidOperation(f"{len(self._requests)} requests are under way; reset() takes an engine at rest")
        self._count_from_zero()
        return self.clear_prefix_cache()

    def _count_from_zero(self) -> None:
        self._counts: dict[str, int] = dict.fromkeys(_COUNTED, 0)
        self._seconds = {"busy": 0.0, "forward": 0.0, "sampling": 0.0}
        self._cache_before = self.cache_stats()
        scheduler = self.scheduler
        scheduler.num_preemptions = scheduler.num_prompt_tokens = scheduler.num_cached_tokens = 0

    def cache_stats(self) -> CacheStats:
        """Return the counters of the cache since it was made."""
        return self.runner.cache.stats

    def stats(self) -> EngineStats:
        """Return the counters."""
        cache, scheduler, counted, before = self.runner.cache, self.scheduler, self.cache_stats(), self._cache_before
        requests = list(self._requests.values())  # a copy, as other threads may ask
        running = sum(any(sequence.is_running for sequence in request.sequences) for request in requests)
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
            evictions=counted.total_evictions - before.total_evictions,
            reclaimed=counted.blocks_reclaimed - before.blocks_reclaimed,
            busy_seconds=self._seconds["busy"],
            forward_seconds=self._seconds["forward"],
            sampling_seconds=self._seconds["sampling"],
            tiers=() if scheduler.offload is None else scheduler.offload.ladder.figures,
            **self._counts,
        )

    def snapshot(self) -> EngineSnapshot:
        """Return the pool, the requests and the counters at this moment, frozen."""
        return take_snapshot(self.runner.cache, self._requests.values(), self.stats(), self._clock)

    def count(self, **amounts: int) -> None:
        """Add to the counters of these names."""
        for name, amount in amounts.items():
            self._counts[name] += amount

    def row_of(self, sequence: Sequence) -> SampleRow:
        """Return what the sampler has to know of a sequence."""
        if sequence.row is None:
            request = sequence.request
            sequence.row = SampleRow(
                request.request_id,
                request.params,
                request.prompt_token_ids,
                seed=request.seed,
                choice=sequence.index,
                end_ids=self.eos_token_ids,
                grammar=None if request.grammar is None else request.grammar.copy(),
            )
        row: SampleRow = sequence.row
        return row

    def _refused(self, error: InvalidLogits) -> list[Request]:
        """End the requests for which the model gave no numbers; all others go on."""
        logger.error("%s", error)
        return [request for request in map(self.end, error.request_ids) if request is not None]

    def _is_news(self, request: Request) -> bool:
        """Whether somebody wants to know of a request that got tokens; one that is finished is forgotten here."""
        if None not in [sequence.finish_reason for sequence in request.sequences]:
            self._counts["finished_requests"] += 1
            self._ended(request)
            return True
        # Beams may still change their minds about every word.
        return request.wants_updates and request.beams is None

    def _ended(self, request: Request) -> Request:
        request.finished = time.monotonic()
        del self._requests[request.request_id]
        return request


# One step's output: which logits are whose, the tokens chosen from them, and what these do to the sequences.


class StepOutput:
    """Turns the logits of one batch into tokens, and these into the next state of its sequences.

    Parameters
    ----------
    batch : Batch
    core : EngineCore
    """

    def __init__(self, batch: Batch, core: EngineCore) -> None:
        self._batch, self._core = batch, core
        self._rows: list[SampleRow] = []  # for the sampler
        self._places: list[int] = []  # of each row among the logits
        self._first_row: list[int] = []  # of each chunk
        self._tokens: list[int] = []  # of each row
        self._logprobs: Any = None
        self._num_written = 0
        self._scored: list[tuple[ScheduledChunk, int]] = []  # prompts, and the first place of their logits
        self._beams: dict[Request, list[tuple[int, int]]] = {}  # live beams, and the places of their logits
        place = 0
        for chunk in batch.chunks:
            self._first_row.append(len(self._rows))
            if chunk.num_scored:
                self._scored.append((chunk, place))
                place += chunk.num_scored
            if chunk.reaches_end:
                self._expect(chunk, place)
                place += 1 + len(chunk.drafts)

    def _expect(self, chunk: ScheduledChunk, place: int) -> None:
        """Note whose logits stand at `place`: one row a sample that begins here, one more a draft."""
        sequence, request = chunk.sequence, chunk.sequence.request
        if request.params.beam_width is not None:
            self._beams.setdefault(request, []).append((sequence.index, place))
            return
        row = self._core.row_of(sequence)
        self._rows.append(row)
        self._places.append(place)
        if request.num_unforked:
            self._rows += [row.ahead((), choice) for choice in range(1, 1 + request.num_unforked)]
            self._places += [place] * request.num_unforked
        if len(chunk.drafts):
            drafts = chunk.drafts.tolist()
            self._rows += [row.ahead(drafts[: i + 1]) for i in range(len(drafts))]
            self._places += range(place + 1, place + 1 + len(drafts))

    @property
    def needs_torch(self) -> bool:
        """Whether more happens to the logits than that each row's token is the likeliest."""
        if self._scored or self._beams or len(self._rows) != len(self._batch.chunks) or self._core.has_own_sampler:
            return True
        return not are_likeliest(self._rows)

    def sample(self, logits: Any, sampler: Any) -> None:
        """Choose a token for every row; nothing has changed if this fails."""
        self._logits = logits
        if self._rows:
            all_in_order = self._places == list(range(logits.shape[0]))
            result = sampler.sample(logits if all_in_order else logits[self._places], self._rows)
            self._tokens, self._logprobs = result.token_ids.tolist(), result.logprobs

    def apply(self) -> list[Request]:
        """Move every sequence on; returns the requests that got tokens, in the order of arrival."""
        for chunk, place in self._scored:
            self._score_prompt(chunk, place)
        accepted = [self._accepted(*each) for each in zip(self._batch.chunks, self._first_row, strict=True)]
        for chunk, tokens in zip(self._batch.chunks, accepted, strict=True):
            self._advance(chunk, len(tokens))
        self._core.runner.cache.commit(self._batch.plan)
        touched = dict.fromkeys(self._beams)
        for chunk, first, tokens in zip(self._batch.chunks, self._first_row, accepted, strict=True):
            if tokens:
                touched[chunk.sequence.request] = None
                self._extend(chunk.sequence, first, tokens)
            if chunk.sequence.request.params.streaming is not None:
                self._slide(chunk.sequence.request)
        for request, beams in self._beams.items():
            self._advance_beams(request, sorted(beams))
        self._core.count(generation_tokens=self._num_written)
        return sorted(touched, key=lambda request: request.number)

    def _score_prompt(self, chunk: ScheduledChunk, place: int) -> None:
        """Note how likely each token of a prompt is that follows a scored one."""
        sequence, request = chunk.sequence, chunk.sequence.request
        following = sequence.ids[sequence.computed + 1 : sequence.computed + 1 + chunk.num_scored].tolist()
        logits, top = self._logits[place : place + chunk.num_scored], request.params.prompt_logprobs or 0
        scored = token_logprobs(logits, following, [top] * chunk.num_scored)
        request.prompt_logprobs = [*(request.prompt_logprobs or ()), *scored]

    def _accepted(self, chunk: ScheduledChunk, first: int) -> list[int]:
        """Return the tokens that follow a chunk: one a sample that begins here, or the right drafts and one more."""
        request = chunk.sequence.request
        if not chunk.reaches_end or request.params.beam_width is not None:
            return []
        if request.num_unforked:
            return self._tokens[first : first + 1 + request.num_unforked]
        if not len(chunk.drafts):
            return self._tokens[first : first + 1]
        right = 0
        for draft in chunk.drafts.tolist():
            if self._tokens[first + right] != draft:
                break
            right += 1
        return self._tokens[first : first + right + 1]

    def _advance(self, chunk: ScheduledChunk, num_accepted: int) -> None:
        """Count what was computed, and take back the drafts that were wrong."""
        sequence = chunk.sequence
        sequence.computed += chunk.count
        if len(chunk.drafts):
            right = num_accepted - 1
            self._core.count(draft_tokens=len(chunk.drafts), accepted_tokens=right)
            sequence.computed += right
            self._core.runner.cache.truncate(sequence.seq_id, sequence.held)

    def _extend(self, sequence: Sequence, first: int, tokens: list[int]) -> None:
        """Add tokens to a text; samples that begin here are forked first, and each gets one of them."""
        request = sequence.request
        if not request.num_unforked:
            self._write(sequence, first, tokens)
            return
        for index in range(1, 1 + request.num_unforked):
            sample = self._core.scheduler.fork(sequence, index)
            sample.row = self._rows[first + index]
            request.sequences.append(sample)
        request.num_unforked = 0
        for i, sample in enumerate(request.sequences):
            self._write(sample, first + i, tokens[i : i + 1])

    def _write(self, sequence: Sequence, first: int, tokens: list[int]) -> None:
        """Add tokens to one text, up to the one that ends it."""
        core, request = self._core, sequence.request
        if sequence.output_text is None:
            sequence.output_text = OutputText(request, core.tokenizer, core.eos_token_ids)
        if request.first_token is None:
            request.first_token = time.monotonic()
        for i, token in enumerate(tokens):
            sequence.push(token)
            sequence.row.accept(token)
            if self._logprobs is not None and request.params.logprobs is not None:
                entries = self._logprobs[first + i]
                sequence.logprobs.append(entries)
                sequence.cumulative_logprob += entries[token].logprob
            ending = sequence.output_text.add(token)
            if sequence.row.grammar is not None:
                ending = _ending_by_grammar(sequence, ending)
            self._num_written += 1
            if ending is not None:
                sequence.finish_reason, sequence.stop_reason = ending
                core.scheduler.drop(sequence)
                return

    def _advance_beams(self, request: Request, beams: list[tuple[int, int]]) -> None:
        core = self._core
        if request.beams is None:
            request.beams, request.num_unforked = begin_beams(request, core.eos_token_ids, core.tokenizer), 0
        if request.first_token is None:
            request.first_token = time.monotonic()
        logits = self._logits[[place for _, place in beams]]
        self._num_written += advance_beams(request, logits, core.scheduler)

    def _slide(self, request: Request) -> None:
        """Drop what lies between the sinks and the window of a text without end."""
        sink, window = request.params.streaming or (0, 0)
        for sequence in request.sequences:
            if sequence.is_running and sequence.held > sink + window:
                try:
                    sequence.dropped += self._core.runner.cache.apply_streaming_llm(sequence.seq_id, sink, window)
                except OutOfMemory:  # forks share the window and there is no room for copies
                    self._core.scheduler.preempt(sequence)


def _ending_by_grammar(sequence: Sequence, ending: Ending | None) -> Ending | None:
    """Return why a text ends that follows a grammar: where nothing may follow, or its parser met a limit."""
    grammar = sequence.row.grammar
    if not grammar.is_complete:
        return ending
    fault = grammar.fault
    if ending is None:
        sequence.output_text.close()
    if fault:
        return "abort", f"structured: {fault}"
    return ("stop", None) if ending is None or ending[0] == "length" else ending
