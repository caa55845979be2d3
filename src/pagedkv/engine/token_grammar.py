"""Grammars over tokens: which tokens may come next in each text of a batch, as bit masks, by llguidance."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pagedkv.engine.structured import Structured, in_a_line, parser_limits
from pagedkv.errors import bad_argument

MOST_KEPT = 32
MOST_CHARACTERS_KEPT = 1 << 19
"""Of the texts of the grammars that are kept. Compiled, a character takes some 400 bytes."""
BESIDE_EACH_OTHER = 16
"""From so many texts on masks are computed by several threads: below, waking them takes longer."""

Masks = npt.NDArray[np.int32]


class GrammarState:
    """Where one text stands in its grammar.

    Parameters
    ----------
    matcher : llguidance.LLMatcher
    tokens
        Of the tokenizer, which all grammars of an engine share.
    drafts : tuple of int
        Tokens that the text goes on with, of which the matcher has not heard: the state of a draft to be verified.
    """

    __slots__ = ("drafts", "matcher", "tokens")

    def __init__(self, matcher: Any, tokens: _Tokens, drafts: tuple[int, ...] = ()) -> None:
        self.matcher, self.tokens, self.drafts = matcher, tokens, drafts

    @property
    def is_complete(self) -> bool:
        """Whether nothing may follow."""
        stopped: bool = self.matcher.is_stopped()
        return stopped

    @property
    def fault(self) -> str:
        """Why it can go on no more, as its parser met a limit; nothing if it has not."""
        return in_a_line(self.matcher.get_error()) if self.matcher.is_error() else ""

    def accept(self, token: int) -> None:
        """Take note of a token that was added to the text."""
        self.matcher.consume_token(token)

    def num_valid(self, tokens: npt.NDArray[np.int64]) -> int:
        """Return how many of some tokens may follow, one after the other."""
        count: int = self.matcher.validate_tokens(tokens.tolist())
        return count

    def copy(self, token_ids: Sequence[int] = ()) -> GrammarState:
        """Return the state of a text that goes its own way from here, with these tokens."""
        other = GrammarState(self.matcher.deep_copy(), self.tokens)
        for token in token_ids:
            other.accept(token)
        return other

    def ahead(self, drafts: Iterable[int]) -> GrammarState:
        """Return the state behind some drafts; the present one stays as it is."""
        return GrammarState(self.matcher, self.tokens, (*self.drafts, *drafts))


class Grammars:
    """The grammars of one tokenizer, compiled; those used last are kept. May be called from any thread.

    Parameters
    ----------
    tokenizer : transformers tokenizer, or None
    vocab_size : int
        Of the model.
    end_ids : iterable of int
        Tokens that end a text: allowed where the grammar may end.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, end_ids: Iterable[int]) -> None:
        self._tokenizer, self._vocab_size, self._end_ids = tokenizer, vocab_size, sorted(end_ids)
        self._lock, self._first = threading.Lock(), threading.Lock()
        self._kept: OrderedDict[str, GrammarState] = OrderedDict()
        self._tokens: _Tokens | None = None

    def kept(self, structured: Structured) -> GrammarState | None:
        """Return where a text begins in a grammar, if that is compiled."""
        with self._lock:
            state = self._kept.get(structured.definition)
            if state is not None:
                self._kept.move_to_end(structured.definition)
            return state

    def compile(self, structured: Structured) -> GrammarState:
        """Return where a text begins in a grammar; each text has a :meth:`GrammarState.copy` of it.

        Takes a millisecond, a large schema a second.

        Raises
        ------
        InvalidOperation
            The engine has no tokenizer whose tokens are known, or no text follows the grammar.
        MissingExtra
            llguidance is not installed.
        """
        state = self.kept(structured)
        return self._compiled(structured.definition) if state is None else state

    def _compiled(self, definition: str) -> GrammarState:
        import llguidance

        tokens = self._known_tokens()
        matcher = llguidance.LLMatcher(tokens.tokenizer, definition, log_level=0, limits=parser_limits())
        fault = matcher.get_error()
        matcher.compute_bitmask()  # what it learns by this serves all texts
        state = GrammarState(matcher, tokens)
        if fault or state.fault:
            got = in_a_line(fault) if fault else f"one that no text follows ({state.fault})"
            raise bad_argument("structured", "a schema or grammar that a text can follow", got)
        with self._lock:
            self._kept[definition] = state
            while len(self._kept) > 1 and (
                len(self._kept) > MOST_KEPT or sum(map(len, self._kept)) > MOST_CHARACTERS_KEPT
            ):
                self._kept.popitem(last=False)
        return state

    def _known_tokens(self) -> _Tokens:
        """Return the tokens as llguidance wants them: a second's work for the largest vocabulary."""
        with self._first:
            if self._tokens is None:
                self._tokens = _Tokens(self._tokenizer, self._vocab_size, self._end_ids)
            return self._tokens


class _Tokens:
    """The tokens of a tokenizer as llguidance wants them, and the threads that compute masks of them."""

    def __init__(self, tokenizer: Any, vocab_size: int, end_ids: list[int]) -> None:
        import llguidance
        import llguidance.hf

        if not getattr(tokenizer, "is_fast", False):
            raise bad_argument("structured", "none, as the engine has no tokenizer in Rust")
        size = max(vocab_size, len(tokenizer))
        try:
            self.tokenizer = llguidance.hf.from_tokenizer(tokenizer, size, end_ids or None)
        except ValueError as error:
            expected = "none, as this tokenizer does not say what its tokens are"
            raise bad_argument("structured", expected, in_a_line(str(error))) from error
        self._executor = llguidance.LLExecutor()
        self._words = -(-size // 32)

    def masks(self, states: Sequence[GrammarState]) -> Masks:
        """Return which tokens may come next in each text, one bit each: int32 [n, words], the lowest first.

        Parameters
        ----------
        states : sequence of GrammarState
            Behind that of a text those of its drafts, one token more each.
        """
        masks: Masks = np.full((len(states), self._words), -1, np.int32)
        address, size, count = masks.ctypes.data, masks.strides[0], len(states)
        alone: list[tuple[Any, int]] = []
        drafting: list[tuple[Any, int, list[int]]] = []
        place = 0
        while place < count:
            matcher, end = states[place].matcher, place + 1
            while end < count and states[end].matcher is matcher:
                end += 1
            if end - place == 1:
                alone.append((matcher, place))
            else:
                drafting.append((matcher, place, list(states[end - 1].drafts)))
            place = end
        if len(alone) >= BESIDE_EACH_OTHER:
            self._executor.unsafe_compute_mask_ptr(alone, address, size, count)
        else:
            for matcher, place in alone:
                matcher.unsafe_compute_mask_ptr(address + place * size, size)
        if drafting:
            self._executor.unsafe_compute_mask_ptr_with_draft_token(drafting, address, size, count)
        return masks
