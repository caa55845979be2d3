"""Text from tokens, one at a time: what is said stays said, and no half character is ever shown."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

HALF = "\ufffd"  # what decoders show for bytes that are no character, or not yet
CONTEXT = 6  # tokens of the prompt; the first token of what is decoded may lose a space, the others do not

_byte_ids_of: WeakKeyDictionary[Any, frozenset[int]] = WeakKeyDictionary()


class Detokenizer:
    """Turns the tokens of one text into pieces that add up to the text of all of them.

    The prompt is context: the pieces are what decoding prompt and text together has after the prompt, so a text that
    goes on with a new word begins with a space. Without a prompt they add up to ``tokenizer.decode(token_ids)``. Spaces
    are not cleaned up, as that would take back what is said.

    Only the few last tokens are decoded: those whose text is not yet out, and those before which gave the last piece,
    as context. Held back are a character whose bytes are not all there, and byte tokens (``<0xE2>``, as SentencePiece
    has them) until the next other token: an invalid byte turns the whole run of them into replacement characters.

    Parameters
    ----------
    tokenizer : transformers tokenizer, or tokenizers.Tokenizer
    prompt_token_ids : sequence of int
    skip_special_tokens : bool
    """

    __slots__ = ("_byte_ids", "_decode", "_in_run", "_out", "_shown", "_window")

    def __init__(
        self, tokenizer: Any, prompt_token_ids: Sequence[int] = (), *, skip_special_tokens: bool = True
    ) -> None:
        self._decode = _decoder(tokenizer, skip_special_tokens)
        self._byte_ids = _byte_ids(tokenizer)
        self._window = self._context(prompt_token_ids)
        self._in_run = False  # of byte tokens
        self._out = len(self._window)  # tokens of the window whose text is out
        self._shown = self._decode(self._window)  # text of the window that is out

    def push(self, token: int) -> str:
        """Take the next token and return the text that it settles; often its own, sometimes none."""
        self._window.append(token)
        in_run = token in self._byte_ids or (self._in_run and not self._decode([token]))  # skipped tokens end no run
        self._in_run = in_run
        if in_run:
            return ""
        text = self._decode(self._window)
        whole = not text.endswith(HALF)
        piece = self._show(text if whole else text[:-1])
        if whole and piece:
            self._window = self._window[self._out :]
            self._out = len(self._window)
            self._shown = self._decode(self._window)
        return piece

    def flush(self) -> str:
        """Return what is held back: the text ends here."""
        return self._show(self._decode(self._window))

    def copy(self) -> Detokenizer:
        """Return one that has seen the same tokens."""
        other = object.__new__(Detokenizer)
        for name in Detokenizer.__slots__:
            setattr(other, name, getattr(self, name))
        other._window = self._window.copy()
        return other

    def _show(self, text: str) -> str:
        """Return what the text has beyond what is shown; only a prompt that ends in half a character may differ."""
        if self._shown.startswith(text):
            return ""
        shown = self._shown if text.startswith(self._shown) else os.path.commonprefix((self._shown, text))
        self._shown = text
        return text[len(shown) :]

    def _context(self, prompt: Sequence[int]) -> list[int]:
        start = max(0, len(prompt) - CONTEXT)
        while start > 0 and (prompt[start] in self._byte_ids or not self._decode([int(prompt[start])])):
            start -= 1
        return [int(token) for token in prompt[start:]]


def _backend(tokenizer: Any) -> Any:
    """Return the tokenizers.Tokenizer inside, None if there is none."""
    inside = getattr(tokenizer, "backend_tokenizer", None)
    return tokenizer if inside is None and hasattr(tokenizer, "token_to_id") else inside


def _decoder(tokenizer: Any, skip_special_tokens: bool) -> Callable[[list[int]], str]:
    backend = _backend(tokenizer)
    if backend is not None:
        return partial(backend.decode, skip_special_tokens=skip_special_tokens)
    return partial(tokenizer.decode, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)


def _byte_ids(tokenizer: Any) -> frozenset[int]:
    """Return the tokens that stand for single bytes, by their names."""
    known = _byte_ids_of.get(tokenizer)
    if known is None:
        backend = _backend(tokenizer)
        id_of = tokenizer.convert_tokens_to_ids if backend is None else backend.token_to_id
        absent = (None, getattr(tokenizer, "unk_token_id", None))
        ids = {id_of(f"<0x{byte:02X}>") for byte in range(256)}
        known = _byte_ids_of[tokenizer] = frozenset(ids.difference(absent))
    return known
