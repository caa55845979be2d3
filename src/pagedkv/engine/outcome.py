"""What a forward pass means for the branches in it: tokens are chosen, drafts kept or taken back, texts end."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from pagedkv.engine.batch import Batch, Part
from pagedkv.engine.beam_steps import advance_beams, begin_beams
from pagedkv.engine.logprobs import Logprob, token_logprobs
from pagedkv.engine.request import Branch, Request
from pagedkv.engine.writing import Writer
from pagedkv.errors import OutOfMemory

if TYPE_CHECKING:
    from pagedkv.engine.core import EngineCore

__all__ = ["Outcome"]


class Outcome:
    """Turns the logits of one batch into tokens, and these into the next state of its branches.

    Parameters
    ----------
    batch : Batch
    core : EngineCore
    """

    def __init__(self, batch: Batch, core: EngineCore) -> None:
        self._batch, self._core = batch, core
        self._rows: list[Any] = []  # for the sampler
        self._places: list[int] = []  # of each row among the logits
        self._first_row: list[int] = []  # of each part
        self._logprobs: Any = None
        self._scored: list[tuple[Part, int]] = []  # whose prompts are scored, and the first place of their logits
        self._beams: dict[Request, list[tuple[int, int]]] = {}  # live beams, and the places of their logits
        place = 0
        for part in batch.parts:
            self._first_row.append(len(self._rows))
            if part.num_scored:
                self._scored.append((part, place))
                place += part.num_scored
            if part.reaches_end:
                self._expect(part, place)
                place += 1 + len(part.drafts)

    def _expect(self, part: Part, place: int) -> None:
        branch, request = part.branch, part.branch.request
        if request.params.beam_width is not None:
            self._beams.setdefault(request, []).append((branch.index, place))
        else:
            row = self._core.row_of(branch)
            self._rows.append(row)
            self._rows += [row.ahead((), choice) for choice in range(1, 1 + request.num_unborn)]
            self._rows += [row.ahead(part.drafts[: i + 1].tolist()) for i in range(len(part.drafts))]
            self._places += [place] * (1 + request.num_unborn)
            self._places += range(place + 1, place + 1 + len(part.drafts))

    def choose(self, logits: Any, sampler: Any) -> None:
        """Choose the tokens; nothing has changed if this fails."""
        self._logits = logits
        if self._rows:
            plain = len(self._places) == len(logits) and not self._beams and not self._scored
            plain = plain and self._places == list(range(len(self._places)))
            result = sampler.sample(logits if plain else logits[self._places], self._rows)
            self._tokens: list[int] = result.token_ids.tolist()
            self._logprobs = result.logprobs

    def apply(self) -> list[Request]:
        """Move every branch on; returns the requests that got tokens, in the order of arrival."""
        core, scheduler, cache = self._core, self._core.scheduler, self._core.runner.cache
        fresh: list[list[int]] = []
        for part, place in self._scored:
            logits = self._logits[place : place + part.num_scored]
            request = part.branch.request
            request.prompt_logprobs = [*(request.prompt_logprobs or ()), *_prompt_logprobs(part, logits)]
        for part, first in zip(self._batch.parts, self._first_row, strict=True):
            tokens = self._accepted(part, first)
            fresh.append(tokens)
            part.branch.computed += part.count
            if len(part.drafts):
                right = len(tokens) - 1
                core.count(draft_tokens=len(part.drafts), accepted_tokens=right)
                part.branch.computed += right
                cache.truncate(part.branch.seq_id, part.branch.held)
        cache.commit(self._batch.plan)
        touched: dict[Request, None] = {}
        for part, first, tokens in zip(self._batch.parts, self._first_row, fresh, strict=True):
            branch, request = part.branch, part.branch.request
            if tokens:
                touched[request] = None
                for index in range(1, 1 + request.num_unborn):
                    twin = scheduler.fork(branch, index)
                    twin.row = self._rows[first + index]
                    request.branches.append(twin)
                request.num_unborn = 0
                if len(tokens) > 1 and not len(part.drafts):
                    for i, twin in enumerate(request.branches):
                        self._write(twin, first + i, tokens[i : i + 1])
                else:
                    self._write(branch, first, tokens)
            if request.params.streaming is not None:
                for streaming in request.branches:
                    self._slide(streaming)
        for request, beams in self._beams.items():
            touched[request] = None
            self._move_beams(request, beams)
        return sorted(touched, key=lambda request: request.number)

    def _accepted(self, part: Part, first: int) -> list[int]:
        """Return the tokens that follow a part: with drafts, those that were guessed right and the one behind."""
        request = part.branch.request
        if not part.reaches_end or request.params.beam_width is not None:
            return []
        if request.num_unborn:
            return self._tokens[first : first + 1 + request.num_unborn]
        right = 0
        for draft in part.drafts.tolist():
            if self._tokens[first + right] != draft:
                break
            right += 1
        return self._tokens[first : first + right + 1]

    def _write(self, branch: Branch, first: int, tokens: list[int]) -> None:
        core, request = self._core, branch.request
        if branch.writer is None:
            branch.writer = Writer(request, core.tokenizer, core.eos_token_ids)
        if request.first_token is None:
            request.first_token = time.monotonic()
        for i, token in enumerate(tokens):
            branch.push(token)
            branch.row.accept(token)
            if self._logprobs is not None and request.params.logprobs is not None:
                entries = self._logprobs[first + i]
                branch.logprobs.append(entries)
                branch.cumulative_logprob += entries[token].logprob
            ending = branch.writer.add(token)
            core.count(generation_tokens=1)
            if ending is not None:
                branch.finish_reason, branch.stop_reason = ending
                core.scheduler.drop(branch)
                return

    def _move_beams(self, request: Request, beams: list[tuple[int, int]]) -> None:
        core = self._core
        if request.beams is None:
            request.beams, request.num_unborn = begin_beams(request, core.eos_token_ids, core.tokenizer), 0
        if request.first_token is None:
            request.first_token = time.monotonic()
        core.count(
            generation_tokens=advance_beams(
                request, self._logits[[place for _, place in sorted(beams)]], core.scheduler
            )
        )

    def _slide(self, branch: Branch) -> None:
        """Let a stream keep its sinks and its window only."""
        sink, window = branch.request.params.streaming or (0, 0)
        if not branch.is_running or branch.held <= sink + window:
            return
        try:
            branch.dropped += self._core.runner.cache.apply_streaming_llm(branch.seq_id, sink, window)
        except OutOfMemory:  # forks share the window and there is no room for copies
            self._core.scheduler.preempt(branch)


def _prompt_logprobs(part: Part, logits: Any) -> list[dict[int, Logprob]]:
    """Return how likely each token of a prompt is that follows a scored one."""
    branch, top = part.branch, part.branch.request.params.prompt_logprobs or 0
    following = branch.ids[branch.computed + 1 : branch.computed + 1 + part.num_scored]
    return token_logprobs(logits, following.tolist(), [top] * part.num_scored)
