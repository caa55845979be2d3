"""From tokens to text, and when to stop."""

from __future__ import annotations

from typing import Any

from pagedkv.engine.outputs import FinishReason
from pagedkv.engine.request import Request

__all__ = ["Writer"]

Ending = tuple[FinishReason, int | str | None]


class Writer:
    """Follows one text: tokens come in, it says when the text is over.

    Parameters
    ----------
    request : Request
    tokenizer : optional
        Without one there is no text and there are no stop strings.
    eos_token_ids : frozenset of int
    """

    __slots__ = ("_count", "_detokenizer", "_max", "_min", "_stop_ids", "_stopper", "text")

    def __init__(self, request: Request, tokenizer: Any, eos_token_ids: frozenset[int]) -> None:
        params = request.params
        self._max, self._min, self._count = request.max_tokens, params.min_tokens, 0
        self._stop_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else eos_token_ids)
        self.text = ""
        self._detokenizer = self._stopper = None

    def add(self, token: int) -> Ending | None:
        """Take the next token; returns why the text ends with it, if it does."""
        self._count += 1
        if token in self._stop_ids and self._count >= self._min:
            return "stop", token
        return ("length", None) if self._count >= self._max else None
