"""Detokenizing and stop strings: text from tokens, one at a time; no half character is shown, nothing is taken back."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

from pagedkv.engine.request import FinishReason, Request

HALF = "\ufffd"  # what decoders show for bytes that are no character, or not yet
AT_ONCE = 64  # tokens that are decoded in one go
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
    ``tokenizers.decoders.DecodeStream`` knows no end of a text, so it loses what is held back there, and it raises, or
    gives another text than ``decode``, where such a run is invalid: half of all random texts of a Llama 2 tokenizer.

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
        return self._take((token,))

    def extend(self, tokens: Sequence[int]) -> str:
        """Take the next tokens and return the text that they settle, as one after the other would."""
        return "".join([self._take(tokens[start : start + AT_ONCE]) for start in range(0, len(tokens), AT_ONCE)])

    def _take(self, tokens: Sequence[int]) -> str:
        settled = 0  # tokens behind which no run of byte tokens is open
        for place, token in enumerate(tokens, 1):
            self._in_run = token in self._byte_ids or (self._in_run and not self._decode([token]))  # none ends by skips
            if not self._in_run:
                settled = place
        if not settled:
            self._window += tokens
            return ""
        self._window += tokens[:settled]
        piece = self._settle()
        self._window += tokens[settled:]
        return piece

    def _settle(self) -> str:
        """Return what is whole of the text of the window and not yet out, and forget what is no longer needed."""
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


# Stop strings.


class StopStrings:
    """Passes a text on, piece by piece, up to the first stop string.

    The first is the one that ends first; of those that end at the same place the longest. So the result does not
    depend on how the text is cut into pieces. What may yet turn out to be the beginning of a stop string is held back.
    Takes a constant time a character on average, whatever the stop strings are (Knuth, Morris and Pratt 1977, "Fast
    Pattern Matching in Strings"). Stop strings come from clients: with ``str.find`` in the tail of the text, a usual
    piece would take a fifth of the time, but a piece against a stop string of 200,000 letters up to 0.2 s, growing with
    the square of its length.

    Parameters
    ----------
    stops : sequence of str
        None of them empty.
    include : bool
        Pass the stop string on as well.

    Attributes
    ----------
    matched : str, optional
        The stop string that was found.
    """

    __slots__ = ("_borders", "_held", "_include", "_reached", "_stops", "matched")

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        self._stops = tuple(stops)
        self._borders = [_borders(stop) for stop in self._stops]
        self._reached = [0] * len(self._stops)  # how much of each stop string the text ends with
        self._held = ""
        self._include = include
        self.matched: str | None = None

    def push(self, piece: str, *, search: bool = True) -> str:
        """Take the next piece and return what may be passed on.

        Parameters
        ----------
        piece : str
        search : bool
            False lets the piece, and what was held back, pass unsearched.
        """
        if self.matched is not None:
            return ""
        if not search:
            self._reached = [0] * len(self._stops)
            return self.flush() + piece
        text, before = self._held + piece, len(self._held)
        for place, character in enumerate(piece, start=before + 1):
            found = self._advance(character)
            if found is not None:
                self.matched, self._held = found, ""
                return text[: place if self._include else place - len(found)]
        free = len(text) - max(self._reached, default=0)
        self._held = text[free:]
        return text[:free]

    def flush(self) -> str:
        """Return what is held back: the text ends here."""
        held, self._held = self._held, ""
        return held

    def _advance(self, character: str) -> str | None:
        longest: str | None = None
        for which, stop in enumerate(self._stops):
            reached, borders = self._reached[which], self._borders[which]
            while reached and stop[reached] != character:
                reached = borders[reached - 1]
            reached += stop[reached] == character
            self._reached[which] = reached
            if reached == len(stop) and (longest is None or len(stop) > len(longest)):
                longest = stop
        return longest


def _borders(stop: str) -> list[int]:
    """Return for each prefix the length of its longest proper prefix that it also ends with."""
    borders = [0] * len(stop)
    for place in range(1, len(stop)):
        length = borders[place - 1]
        while length and stop[length] != stop[place]:
            length = borders[length - 1]
        borders[place] = length + (stop[length] == stop[place])
    return borders


# The text of one sequence, and when it ends.

Ending = tuple[FinishReason, int | str | None]


def end_ids_of(request: Request, eos_token_ids: frozenset[int]) -> frozenset[int]:
    """Return the tokens that end the texts of a request."""
    own = frozenset(request.params.stop_token_ids)
    return own if request.params.ignore_eos else own | eos_token_ids


class OutputText:
    """The text of one sequence: takes its tokens and tells when it ends.

    Tokens become text when somebody asks for it, many at once, and in the thread of who asks; at once only where stop
    strings are looked for.

    Parameters
    ----------
    request : Request
    tokenizer : optional
        Without one there is no text.
    eos_token_ids : frozenset of int
    """

    __slots__ = (
        "_count", "_detokenizer", "_end_ids", "_is_closed", "_max", "_min", "_num_decoded", "_shows_end", "_stops",
        "_text", "_tokens",
    )  # fmt: skip

    def __init__(self, request: Request, tokenizer: Any, eos_token_ids: frozenset[int]) -> None:
        params = request.params
        self._max, self._min, self._count = request.max_tokens, params.min_tokens, 0
        self._end_ids = end_ids_of(request, eos_token_ids)
        self._shows_end = params.include_stop_str_in_output
        self._text, self._is_closed = "", False
        self._tokens: list[int] = []  # that are shown
        self._num_decoded = 0
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
        if not ends or self._shows_end:
            self._tokens.append(token)
        stops = self._stops
        if stops is not None:
            self._look_for(stops)
            if stops.matched is not None:
                return "stop", stops.matched
        if not ends and self._count < self._max:
            return None
        self.close()
        if ends:
            return "stop", token
        return ("length", None) if stops is None or stops.matched is None else ("stop", stops.matched)

    def close(self) -> None:
        """Release what is held back: nothing more comes."""
        self._is_closed = True
        if self._stops is not None:
            self._look_for(self._stops)
            self._text += self._stops.flush()

    @property
    def text(self) -> str:
        """What is settled so far: what may become a stop string, or half a character, is held back."""
        return self.so_far()()

    def so_far(self) -> Callable[[], str]:
        """Return what gives the present text later, in one thread at a time and in the order of the calls."""
        if self._stops is not None:
            return partial(str, self._text)
        return partial(self._settled, len(self._tokens), self._is_closed)

    def _settled(self, count: int, is_closed: bool) -> str:
        self._text += self._decoded(count, is_closed)
        return self._text

    def _look_for(self, stops: StopStrings) -> None:
        piece = self._decoded(len(self._tokens), self._is_closed)
        self._text += stops.push(piece, search=self._count > self._min)

    def _decoded(self, count: int, is_closed: bool) -> str:
        """Return what the tokens up to `count` add to the text; the last ones, if it is closed."""
        if self._detokenizer is None:
            return ""
        piece = self._detokenizer.extend(self._tokens[self._num_decoded : count])
        self._num_decoded = max(self._num_decoded, count)
        return piece + self._detokenizer.flush() if is_closed else piece
