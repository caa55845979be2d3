"""A batch: the chunks of sequences that one forward pass computes, and where a chunk has to end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pagedkv.control.plan import BatchPlan
from pagedkv.engine.request import Sequence, SequenceState, shares_prefixes
from pagedkv.engine.runner import Runner

Ids = npt.NDArray[np.int64]

NO_DRAFTS: Ids = np.empty(0, np.int64)
MOST_AHEAD, AHEAD_OF_STOPS = 16, 3
"""Steps that are asked for ahead, and where a stop may end a text, behind which they are in vain; how many are worth it
is for the runner to say.
"""


def is_scored(sequence: Sequence) -> bool:
    """Tell whether how likely its prompt is has yet to be computed."""
    request = sequence.request
    return request.prompt_logprobs is not None and len(request.prompt_logprobs) < request.num_prompt_tokens


class ScheduledChunk:
    """The tokens of one sequence that a forward pass computes.

    Parameters
    ----------
    sequence : Sequence
    count : int
        Tokens of the sequence, from ``sequence.computed`` on.

    Attributes
    ----------
    drafts : int64 [num_drafts]
        Guesses behind its last token, to be verified.
    reaches_end : bool
        Whether the next token can be chosen after this.
    num_scored : int
        Tokens at its beginning whose logits tell how likely the next tokens of the prompt are.
    """

    __slots__ = ("sequence", "count", "drafts", "num_scored", "reaches_end")

    def __init__(self, sequence: Sequence, count: int) -> None:
        self.sequence, self.count = sequence, count
        self.drafts = NO_DRAFTS
        self.reaches_end = count == sequence.pending
        self.num_scored = 0
        if is_scored(sequence):
            self.num_scored = max(0, min(count, sequence.request.num_prompt_tokens - 1 - sequence.computed))

    @property
    def num_query_tokens(self) -> int:
        """Tokens that go through the model."""
        return self.count + len(self.drafts)

    @property
    def query_ids(self) -> Ids:
        """The tokens that go through the model."""
        sequence = self.sequence
        ids = sequence.ids[sequence.computed : sequence.computed + self.count]
        return np.concatenate([ids, self.drafts]) if len(self.drafts) else ids

    def wanted(self, start: int) -> Ids:
        """Return the query tokens whose logits are wanted, where the first one has the place `start`."""
        scored = np.arange(start, start + self.num_scored)
        end = start + self.num_query_tokens
        chosen = np.arange(end - len(self.drafts) - 1, end) if self.reaches_end else NO_DRAFTS
        return np.concatenate([scored, chosen])


@dataclass(slots=True, eq=False)
class Batch:
    """One forward pass.

    Attributes
    ----------
    chunks : list of ScheduledChunk
        In the order of the plan.
    plan : BatchPlan
    token_ids : int64 [total_tokens]
    wanted : int64 [k]
        Places in `token_ids` of the query tokens whose logits are wanted: chunk by chunk, those that are scored, then,
        if it reaches the end of its sequence, its last token and its drafts.
    """

    chunks: list[ScheduledChunk]
    plan: BatchPlan
    token_ids: Ids
    wanted: Ids

    @property
    def num_prompt_tokens(self) -> int:
        """How many of the tokens are of prompts, or of what a preempted text had."""
        return sum(chunk.count for chunk in self.chunks if chunk.count > 1)

    def steps_ahead(self) -> int:
        """Return how many more steps have the same sequences, each with one token more, if none of them ends before."""
        ahead = MOST_AHEAD
        for chunk in self.chunks:
            request = chunk.sequence.request
            left = request.max_tokens - len(chunk.sequence.output_ids) - 1
            decodes = chunk.num_query_tokens == 1 and chunk.reaches_end and not request.params.prompt_lookup
            most = AHEAD_OF_STOPS if request.params.stop or request.params.stop_token_ids else left
            ahead = min(ahead, left, most) if decodes else 0
        return ahead


def query_tokens(chunks: list[ScheduledChunk]) -> Any:
    """Return the token ids of all chunks as ``append_batch`` takes them; most often one each: a flat array then."""
    if all([chunk.count == 1 and chunk.drafts is NO_DRAFTS for chunk in chunks]):
        return np.array([chunk.sequence.token(chunk.sequence.computed) for chunk in chunks], np.int64)
    return [chunk.query_ids for chunk in chunks]


def make_batch(chunks: list[ScheduledChunk], plan: BatchPlan, tokens: Any) -> Batch:
    """Lay out the forward pass of `chunks`, which `plan` has in the same order, with their `query_tokens`."""
    if isinstance(tokens, np.ndarray) and not any([chunk.num_scored for chunk in chunks]):
        ends = [place for place, chunk in enumerate(chunks) if chunk.reaches_end]
        return Batch(chunks, plan, tokens, np.array(ends, np.int64))
    starts = plan.cu_seqlens_q.tolist()
    wanted = [chunk.wanted(start) for chunk, start in zip(chunks, starts, strict=False)]
    ids = tokens if isinstance(tokens, np.ndarray) else np.concatenate(tokens)
    return Batch(chunks, plan, ids, np.concatenate(wanted))


# Where a chunk has to end, what may follow it, and what sequences could share.


def drafts(sequence: Sequence, room: int, runner: Runner) -> Ids:
    """Return guesses at what a decoding sequence writes next, to be verified in one step."""
    request, params = sequence.request, sequence.request.params
    # The token that follows the drafts is chosen in the same pass.
    most = min(params.prompt_lookup or 0, room, request.max_tokens - len(sequence.output_ids) - 1)
    if most <= 0 or params.streaming or request.num_unforked or not runner.chunkable or runner.has_states:
        return NO_DRAFTS
    from pagedkv.engine.prompt_lookup import propose

    proposed = propose(sequence.ids, most)
    grammar = None if sequence.row is None else sequence.row.grammar
    return proposed if grammar is None else proposed[: grammar.num_valid(proposed)]


SCORED_BYTES = 2**26


class ReadingRoom:
    """How many tokens a sequence may read in a step, beside what the budget of the step says.

    Where the logits of prompts are wanted, all of a step together take `SCORED_BYTES` at most, but each prompt reads a
    token.

    Parameters
    ----------
    vocab_size : int
    """

    def __init__(self, vocab_size: int) -> None:
        self._most = self._left = SCORED_BYTES // (4 * vocab_size)

    def renew(self) -> None:
        """Begin a step."""
        self._left = self._most

    def of(self, sequence: Sequence) -> int:
        """Return how many tokens the sequence may read now."""
        streaming = sequence.request.params.streaming
        # Each token of a stream sees at most sinks and window, and itself.
        room = sequence.length if streaming is None else max(1, sum(streaming) - sequence.held)
        return min(room, max(1, self._left)) if is_scored(sequence) else room

    def chunk(self, sequence: Sequence, count: int) -> ScheduledChunk:
        """Return the chunk of a sequence that reads."""
        chunk = ScheduledChunk(sequence, count)
        self._left -= chunk.num_scored
        return chunk


def piece(sequence: Sequence, start: int, most: int, runner: Runner) -> int:
    """Return how many of the next `most` tokens from `start` on a step reads: to where a snapshot is worth keeping."""
    if not runner.has_states or not may_share(sequence) or not shares_prefixes(runner):
        return most
    size, end = runner.cache.block_size, start + most
    shared = runner.cache.match_blocks(sequence.ids, sequence.request.cache_salt)
    places = (sequence.parting, shared, (sequence.length - 1) // size * size)
    wanted = [place for place in places if start < place <= end]
    if not wanted and end < sequence.length and end // size * size > start:
        wanted = [end // size * size]
    return min(wanted, default=end) - start


def whole_length(sequence: Sequence, runner: Runner) -> int:
    """Return how many tokens of a text go through the model in one piece where a prompt is not cut."""
    prompt, limit = sequence.request.num_prompt_tokens, runner.restarts_beyond
    return prompt if limit is None or not prompt <= limit < sequence.length else limit + 1


def may_share(sequence: Sequence) -> bool:
    """Whether equal prefixes may be used: not where tokens are dropped, nor where the logits of a prompt are wanted."""
    params = sequence.request.params
    return params.streaming is None and params.prompt_logprobs is None


def common_prefix(one: Ids, other: Ids) -> int:
    """Return how many tokens two texts begin with alike."""
    length = min(len(one), len(other))
    differs = one[:length] != other[:length]
    first = int(np.argmax(differs)) if length else 0
    return first if length and differs[first] else length


def must_restart(sequence: Sequence, runner: Runner) -> bool:
    """Tell whether a text of a model that takes prompts whole has come to where it is computed anew."""
    limit = runner.restarts_beyond
    if limit is None or sequence.computed != limit or sequence.pending != 1:
        return False
    return whole_length(sequence, runner) > limit and sequence.request.params.streaming is None


# Beams of one search go together.


def belong_together(one: Sequence, other: Sequence) -> bool:
    """Tell whether two sequences are one, or beams of one search."""
    return one is other or (one.request is other.request and one.request.beams is not None)


def fellows(sequence: Sequence) -> list[Sequence]:
    """Return the running sequences that are preempted together with this one, itself among them if it runs."""
    together = [sequence] if sequence.request.beams is None else sequence.request.sequences
    return [each for each in together if each.is_running]


def _is_ready(sequence: Sequence) -> bool:
    """Beams are compared with each other, so they choose their next tokens in one step."""
    request = sequence.request
    return request.beams is None or all(b.state is SequenceState.RUNNING and b.pending == 1 for b in request.sequences)


def decoding_and_reading(running: list[Sequence]) -> tuple[list[ScheduledChunk], list[Sequence]]:
    """Return the chunks of those that write their next token, and those that have more to compute than one."""
    decoding, reading = [], []
    for sequence in running:
        pending = sequence.length - sequence.computed
        if pending > 1:
            reading.append(sequence)
        elif pending == 1 and _is_ready(sequence):
            decoding.append(ScheduledChunk(sequence, 1))
    return decoding, reading
