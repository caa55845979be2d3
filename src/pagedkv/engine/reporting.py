"""Outputs of requests."""

from __future__ import annotations

from pagedkv.engine.beam_steps import beam_outputs
from pagedkv.engine.outputs import CompletionOutput, RequestMetrics, RequestOutput
from pagedkv.engine.request import Branch, Request

__all__ = ["output_of"]


def output_of(request: Request, *, aborted: bool = False) -> RequestOutput:
    """Return what there is of a request."""
    return RequestOutput(
        request_id=request.request_id,
        prompt=request.prompt,
        prompt_token_ids=request.prompt_tuple,
        outputs=beam_outputs(request, aborted) if request.params.beam_width else [*map(_completion, request.branches)],
        finished=request.is_finished,
        num_cached_tokens=request.num_cached_tokens,
        metrics=RequestMetrics(
            arrived=request.arrived,
            first_scheduled=request.first_scheduled,
            first_token=request.first_token,
            finished=request.finished,
            num_preemptions=request.num_preemptions,
        ),
        prompt_logprobs=request.prompt_logprobs,
    )


def _completion(branch: Branch) -> CompletionOutput:
    wants_logprobs = branch.request.params.logprobs is not None
    return CompletionOutput(
        index=branch.index,
        text=branch.writer.text if branch.writer is not None else "",
        token_ids=tuple(branch.output_ids),
        finish_reason=branch.finish_reason,
        stop_reason=branch.stop_reason,
        logprobs=branch.logprobs.copy() if wants_logprobs else None,
        cumulative_logprob=branch.cumulative_logprob if wants_logprobs else None,
    )
