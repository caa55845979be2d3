"""What is new in texts that are handed out as a whole again and again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, cast

from pagedkv.engine import CompletionOutput

__all__ = ["Ending", "Piece", "Pieces", "whole"]

Ending = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Piece:
    """What is new in one text.

    Attributes
    ----------
    text : str
    token_ids : tuple of int
    logprobs : list of dict, optional
        One entry for each of the tokens.
    finish_reason : {"stop", "length"}, optional
    stop_reason : int or str, optional
    first : bool
        Whether nothing was told of this text before.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: list[dict[int, Any]] | None
    finish_reason: Ending | None
    stop_reason: int | str | None
    first: bool = True


class Pieces:
    """Tells for one text after the other what is new since it was asked last."""

    def __init__(self) -> None:
        self._told: dict[int, tuple[int, int]] = {}
        self._ended: set[int] = set()

    def of(self, index: int, output: CompletionOutput) -> Piece | None:
        """Return what is new in the text of this index; None if there is nothing to tell."""
        if index in self._ended:
            return None
        characters, tokens = self._told.get(index, (0, 0))
        piece = whole(output)
        text, token_ids = piece.text[characters:], piece.token_ids[tokens:]
        logprobs = None if piece.logprobs is None else piece.logprobs[tokens:]
        if not (text or logprobs or piece.finish_reason):
            return None
        first = index not in self._told
        # Tokens without text wait for the text that they become part of, so that a piece has both.
        self._told[index] = (max(characters, len(piece.text)), len(piece.token_ids))
        if piece.finish_reason:
            self._ended.add(index)
        return Piece(text, token_ids, logprobs, piece.finish_reason, piece.stop_reason, first)


def whole(output: CompletionOutput) -> Piece:
    """Return a whole text as one piece."""
    ending = cast("Ending | None", output.finish_reason)
    return Piece(output.text, tuple(output.token_ids), output.logprobs, ending, output.stop_reason)
