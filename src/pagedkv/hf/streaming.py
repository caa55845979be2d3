"""StreamingSession: endless text in a fixed number of blocks, by attention sinks and a sliding window.

Source: Xiao et al. 2023, "Efficient Streaming Language Models with Attention Sinks". A token sees the first tokens of
the text (the sinks), the last ones (the window) and itself, and rotary positions are those *inside the cache*: the
sinks stand right before the window, however much text was dropped between them (:mod:`pagedkv.hf.rotary`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pagedkv.cache import PagedKvCache
from pagedkv.errors import InvalidOperation, OutOfMemory, bad_argument
from pagedkv.hf.load import load_runner
from pagedkv.hf.rotary import measured_rope, rebase_limit
from pagedkv.typing import Dtype
from pagedkv.validate import require_int

HIGHEST_REBASE_AT = 2**16  # float32 angles are off by 0.004 radians there
SEQ = 0


def blocks_for_streaming(sink_tokens: int, window_tokens: int, block_size: int) -> int:
    """Return how many blocks streaming ever holds: the sinks', and the window's with its two ragged ends."""
    return -(-sink_tokens // block_size) - (-window_tokens // block_size) + 1


class StreamingSession:
    """A language model that reads and writes text of any length in a fixed number of blocks.

    One sequence of a :class:`pagedkv.hf.ModelRunner`, driven as the engine drives one of many.

    Every token sees at most ``sink_tokens + window_tokens`` earlier ones and itself. Feeding a text at once or token
    by token gives the same: it is prefilled in one pass until sinks and window are full, and read one token at a time
    from there on, because each token drops another one.

    The model's attention function is replaced while it runs for the session: do not call it from other threads then.

    Parameters
    ----------
    model : PreTrainedModel
        A causal language model of transformers in eval mode, with rotary positions.
    sink_tokens, window_tokens : int
        How many first and last tokens are kept; at least 0 and 1.
    block_size : int
    num_blocks : int, optional
        Size of the pool; by default what streaming ever holds (:func:`blocks_for_streaming`).
    rebase_at : int, optional
        Rotary positions stay below; from ``sink_tokens + 2 * window_tokens + 1`` to 65536. By default the least for
        float32, where small positions mean exact angles, else 4096, as each key that is turned back is rounded anew.
    dtype : str or torch.dtype, optional
        Of keys and values; the model's by default. With ``"int8"`` or ``"fp8"`` the sinks, kept as they were once
        quantised, are quantised again each time they move, but from one and the same float32: no error builds up.

    Raises
    ------
    InvalidOperation
        If an argument is out of range, or the model cannot be served exactly: see
        :func:`pagedkv.hf.rotary.measured_rope`.
    OutOfMemory
        If `num_blocks` is too small.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        sink_tokens: int = 4,
        window_tokens: int = 508,
        *,
        block_size: int = 16,
        num_blocks: int | None = None,
        rebase_at: int | None = None,
        dtype: Dtype | None = None,
    ) -> None:
        self._sink = require_int("sink_tokens", sink_tokens, 0, 2**22)
        self._window = require_int("window_tokens", window_tokens, 1, 2**22)
        least = self._sink + 2 * self._window + 1
        dtype = getattr(model, "dtype", None) if dtype is None else dtype
        if rebase_at is None:
            rebase_at = rebase_limit(self._sink, self._window, dtype)
        rebase_at = require_int("rebase_at", rebase_at, least, max(least, HIGHEST_REBASE_AT))
        block_size = require_int("block_size", block_size, 1, 2**31 - 1)
        needed = blocks_for_streaming(self._sink, self._window, block_size)
        num_blocks = needed if num_blocks is None else require_int("num_blocks", num_blocks, 0, 2**31 - 2)
        if num_blocks < needed:
            raise OutOfMemory(needed, num_blocks, f"{sink_tokens} sink and {window_tokens} window tokens")
        visible = self._sink + self._window + 1
        rope = measured_rope(model, visible, rebase_at - 1)
        self._runner = load_runner(
            model,
            num_blocks=num_blocks,
            block_size=block_size,
            kv_dtype=dtype,
            prefix_caching=False,
            batch_invariant=False,
        )
        self._runner.streams.follow(rope, visible, rebase_at)
        self.reset()

    def reset(self) -> None:
        """Forget the text and give its blocks back."""
        if SEQ in self.cache:
            self.cache.free(SEQ)
            self._runner.release(SEQ)
        self.cache.allocate(SEQ, 0)
        self._held = 0
        self._num_dropped = 0
        self._logits: Tensor | None = None

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(sink_tokens={self._sink}, window_tokens={self._window}, "
            f"num_tokens={self.num_tokens}, num_dropped={self.num_dropped})"
        )

    @property
    def cache(self) -> PagedKvCache:
        """The pool; the text is its sequence 0."""
        return self._runner.cache

    @property
    def num_tokens(self) -> int:
        """How many tokens the text has, dropped ones counted."""
        return self._num_dropped + self._held

    @property
    def num_dropped(self) -> int:
        """How many tokens were dropped."""
        return self._num_dropped

    def feed(self, token_ids: Iterable[int] | Tensor, *, all_logits: bool = False) -> Tensor:
        """Read tokens.

        Parameters
        ----------
        token_ids : iterable of int, or integer Tensor [n]
            At least one.
        all_logits : bool
            Return the logits of every token, not of the last one only.

        Returns
        -------
        Tensor [vocab_size], or [n, vocab_size] with `all_logits`
            In the dtype of the model.

        Raises
        ------
        InvalidOperation
            If there is no token, or one that is not in the vocabulary; nothing is read then.
        """
        tokens = self._token_list("token_ids", token_ids)
        if not tokens:
            raise bad_argument("token_ids", "at least one token", "none")
        rows: list[Tensor] = []
        start = 0
        while start < len(tokens):
            # As long as nothing is dropped, causal attention over a chunk is what single tokens would see.
            end = start + max(1, self._sink + self._window - self._held)
            rows.append(self._step(tokens[start:end], all_logits))
            start = end
        self._logits = rows[-1][-1]
        return torch.cat(rows) if all_logits else self._logits

    def generate(
        self,
        token_ids: Iterable[int] | Tensor = (),
        max_new_tokens: int | None = None,
        *,
        sampler: Callable[[Tensor], int] | None = None,
        stop_token_ids: Sequence[int] = (),
    ) -> Iterator[int]:
        """Read a prompt and write on, without end unless `max_new_tokens` is given.

        Whatever was yielded is part of the text, so another ``feed`` or ``generate`` may follow.

        Parameters
        ----------
        token_ids : iterable of int, or integer Tensor [n]
            The prompt; may be empty where something was fed before.
        max_new_tokens : int, optional
        sampler : callable, optional
            Takes the logits, Tensor [vocab_size], and returns a token id; the likeliest by default.
        stop_token_ids : sequence of int
            Ends after one of these was yielded.

        Returns
        -------
        iterator of int

        Raises
        ------
        InvalidOperation
            At once if an argument is out of range, later if the sampler returns no token of the vocabulary.
        """
        if max_new_tokens is not None:
            max_new_tokens = require_int("max_new_tokens", max_new_tokens, 0, 2**62)
        if sampler is not None and not callable(sampler):
            raise bad_argument("sampler", "a callable", f"{sampler!r}")
        stops = frozenset(self._token_list("stop_token_ids", stop_token_ids))
        prompt = self._token_list("token_ids", token_ids)
        if not prompt and self._logits is None:
            raise bad_argument("token_ids", "at least one token, as nothing was fed yet")
        return self._write(prompt, max_new_tokens, sampler or _likeliest, stops)

    def _write(
        self, prompt: list[int], limit: int | None, sampler: Callable[[Tensor], int], stops: frozenset[int]
    ) -> Iterator[int]:
        if prompt:
            self.feed(prompt)
        written = 0
        while limit is None or written < limit:
            if self._logits is None:
                raise InvalidOperation("the session was reset while it generated")
            token = require_int("sampler", sampler(self._logits), 0, self._runner.vocab_size - 1)
            self.feed((token,))
            written += 1
            yield token
            if token in stops:
                return

    def _token_list(self, name: str, given: Iterable[int] | Tensor) -> list[int]:
        tokens = given.tolist() if isinstance(given, Tensor) else given
        if not isinstance(tokens, Iterable):
            raise bad_argument(name, "token ids", f"{given!r}")
        return [require_int(name, token, 0, self._runner.vocab_size - 1) for token in tokens]

    def _step(self, tokens: list[int], all_logits: bool) -> Tensor:
        plan = self.cache.append_batch([SEQ], counts=len(tokens))
        try:
            wanted = range(len(tokens)) if all_logits else [len(tokens) - 1]
            logits = self._runner.forward(plan, tokens, wanted)
        except BaseException:
            self.cache.truncate(SEQ, self._held)
            raise
        self.cache.commit(plan)
        self._held += len(tokens)
        if self._held > self._sink + self._window:
            self._num_dropped += self.cache.apply_streaming_llm(SEQ, self._sink, self._window)
            self._held = self._sink + self._window
        return logits.to(self._runner.model.dtype)


def _likeliest(logits: Tensor) -> int:
    return int(logits.argmax())
