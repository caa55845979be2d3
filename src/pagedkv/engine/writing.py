"""From tokens to text, and when to stop."""

from __future__ import annotations

from typing import Any

from pagedkv.engine.outputs import FinishReason
from pagedkv.engine.request import Request
from pagedkv.engine.stopping import StopStrings
from pagedkv.engine.text import Detokenizer

__all__ = ["Ending", "Writer", "end_ids_of"]

Ending = tuple[FinishReason, int | str | None]


def end_ids_of(request: Request, eos_token_ids: frozenset[int]) -> frozenset[int]:
    """Return the tokens that end the texts of a request."""
    own = frozenset(request.params.stop_token_ids)
    return own if request.params.ignore_eos else own | eos_token_ids


class Writer:
    """Follows one text: tokens come in, text goes out, and it says when the text is over.

    Parameters
    ----------
    request : Request
    tokenizer : optional
        Without one there is no text.
    eos_token_ids : frozenset of int

    Attributes
    ----------
    text : str
        What is settled so far: what may become a stop string, or half a character, is held back.
    """

    __slots__ = ("_count", "_detokenizer", "_end_ids", "_max", "_min", "_shows_end", "_stops", "text")

    def __init__(self, request: Request, tokenizer: Any, eos_token_ids: frozenset[int]) -> None:
        params = request.params
        self._max, self._min, self._count = request.max_tokens, params.min_tokens, 0
        self._end_ids = end_ids_of(request, eos_token_ids)
        self._shows_end = params.include_stop_str_in_output
        self.text = ""
        self._detokenizer: Detokenizer | None = None
        if tokenizer is not None:
            self._detokenizer = Detokenizer(
                tokenizer, request.prompt_tuple, skip_special_tokens=params.skip_special_tokens
            )
        self._stops = StopStrings(params.stop, include=params.include_stop_str_in_output) if params.stop else None

    def add(self, token: int) -> Ending | None:
        """Take the next token; returns why the text ends with it, if it does."""
        self._count += 1
        ends = token in self._end_ids and self._count > self._min
        if self._detokenizer is not None and (not ends or self._shows_end):
            self._say(self._detokenizer.push(token))
        if self._stops is not None and self._stops.matched is not None:
            return "stop", self._stops.matched
        if not ends and self._count < self._max:
            return None
        self.close()
        if ends:
            return "stop", token
        matched = None if self._stops is None else self._stops.matched
        return ("length", None) if matched is None else ("stop", matched)

    def close(self) -> None:
        """Let go of what is held back: nothing more comes."""
        if self._detokenizer is not None:
            self._say(self._detokenizer.flush())
        if self._stops is not None:
            self.text += self._stops.flush()

    def _say(self, piece: str) -> None:
        self.text += piece if self._stops is None else self._stops.push(piece, search=self._count > self._min)
