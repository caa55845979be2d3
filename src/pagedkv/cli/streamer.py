"""Turns the token ids that a model gives one by one into text that is printed as it comes."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

__all__ = ["TextPieces", "TokenStreamer"]

_UNFINISHED = "\ufffd"


class TextPieces:
    """Decodes a growing list of token ids piece by piece, at a cost that does not grow with the text.

    A token may hold a part of a character, and what a token looks like may depend on the one before it. So the last
    few tokens are decoded twice, without and with the new one; the difference is the new text, held back while it ends
    in an unfinished character.

    Parameters
    ----------
    decode : callable
        Token ids to text.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._context: list[int] = []  # tokens printed last
        self._waiting: list[int] = []  # tokens not printed yet

    def add(self, token: int) -> str:
        """Return the text that this token completes, "" while a character is unfinished."""
        self._waiting.append(token)
        before = self._decode(self._context)
        after = self._decode(self._context + self._waiting)
        if len(after) <= len(before) or after.endswith(_UNFINISHED):
            return ""
        self._context, self._waiting = self._waiting, []
        return after[len(before) :]

    def flush(self) -> str:
        """Return what is still held back."""
        before = self._decode(self._context)
        after = self._decode(self._context + self._waiting)
        self._context, self._waiting = [], []
        return after[len(before) :]


class TokenStreamer:
    """A transformers streamer that hands on the text of the first sequence; the others are only counted.

    Parameters
    ----------
    pieces : TextPieces
    stop_tokens : collection of int
        Tokens that end a text and are not shown.
    show : callable
        Takes each piece of text.
    """

    def __init__(self, pieces: TextPieces, stop_tokens: Collection[int], show: Callable[[str], None]) -> None:
        self._pieces = pieces
        self._stop_tokens = frozenset(stop_tokens)
        self._show = show
        self._seen_prompt = False
        self._ended = False

    def put(self, value: Any) -> None:
        """Take the prompt first, then one token of each sequence at a time."""
        if not self._seen_prompt:
            self._seen_prompt = True
            return
        for token in value[0].reshape(-1).tolist():
            self.take(token)

    def take(self, token: int) -> None:
        """Show one token of the first sequence."""
        if token in self._stop_tokens:
            self._ended = True
        if not self._ended:
            self._hand_on(self._pieces.add(token))

    def end(self) -> None:
        """Show what was held back."""
        self._hand_on(self._pieces.flush())

    def _hand_on(self, text: str) -> None:
        if text:
            self._show(text)
