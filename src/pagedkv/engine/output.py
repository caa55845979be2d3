"""Outputs of requests: what there is of one is noted in the step, and told, with its texts, to whoever reads it."""

from __future__ import annotations

from pagedkv.engine.beam_steps import beam_outputs
from pagedkv.engine.request import CompletionOutput, Request, RequestMetrics, RequestOutput, Sequence


class OutputDraft:
    """The output of a request as it is now, but for its texts: these are made of tokens when it is read.

    So a step does not wait for texts, and what nobody reads, as something newer came before, costs next to nothing.
    The drafts of one request are read in one thread at a time, the older ones first.

    Parameters
    ----------
    request : Request

    Attributes
    ----------
    finished : bool
    """

    __slots__ = ("_beams", "_metrics", "_prompt_logprobs", "_request", "_texts", "finished")

    def __init__(self, request: Request) -> None:
        self._request, self.finished = request, request.is_finished
        self._prompt_logprobs = request.prompt_logprobs
        self._metrics = (
            request.arrived,
            request.first_scheduled,
            request.first_token,
            request.finished,
            request.num_preemptions,
        )
        searches = request.params.beam_width is not None
        self._beams = beam_outputs(request, request.is_aborted) if searches else None
        self._texts = [] if searches else [_TextDraft(sequence) for sequence in request.sequences]

    def output(self) -> RequestOutput:
        """Return it."""
        request = self._request
        arrived, first_scheduled, first_token, finished, num_preemptions = self._metrics
        return RequestOutput(
            request_id=request.request_id,
            prompt=request.prompt,
            prompt_token_ids=request.prompt_tuple,
            outputs=[text.output() for text in self._texts] if self._beams is None else self._beams,
            finished=self.finished,
            num_cached_tokens=request.num_cached_tokens,
            metrics=RequestMetrics(
                arrived=arrived,
                first_scheduled=first_scheduled,
                first_token=first_token,
                finished=finished,
                num_preemptions=num_preemptions,
            ),
            prompt_logprobs=self._prompt_logprobs,
        )


class _TextDraft:
    """One text of a request as it is now: tokens are only ever added to it."""

    __slots__ = ("_count", "_finish_reason", "_logprob", "_sequence", "_stop_reason", "_text")

    def __init__(self, sequence: Sequence) -> None:
        self._sequence, self._count = sequence, len(sequence.output_ids)
        self._text = None if sequence.output_text is None else sequence.output_text.so_far()
        self._finish_reason, self._stop_reason = sequence.finish_reason, sequence.stop_reason
        self._logprob = sequence.cumulative_logprob

    def output(self) -> CompletionOutput:
        """Return it."""
        sequence = self._sequence
        wants_logprobs = sequence.request.params.logprobs is not None
        return CompletionOutput(
            index=sequence.index,
            text="" if self._text is None else self._text(),
            token_ids=tuple(sequence.output_ids[: self._count]),
            finish_reason=self._finish_reason,
            stop_reason=self._stop_reason,
            logprobs=sequence.logprobs[: self._count] if wants_logprobs else None,
            cumulative_logprob=self._logprob if wants_logprobs else None,
        )
