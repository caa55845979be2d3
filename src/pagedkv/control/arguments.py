"""What callers pass, checked once at the door and turned into arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pagedkv.control.plan import BatchPlan
from pagedkv.errors import bad_argument
from pagedkv.jit import compiled
from pagedkv.validate import MAX_INT, number_for, require_int, shown

_SIGNED = 2**63

Int64s = npt.NDArray[np.int64]

NO_IDS = np.empty(0, np.int64)

# What NumPy and torch raise where something is ragged or not to be had as an array.
_NO_ARRAY = (ValueError, TypeError, OverflowError, RuntimeError)


class Tokens(NamedTuple):
    """Tokens to be stored: how many, and their ids if they are known."""

    num_tokens: int
    ids: npt.NDArray[np.int64]
    known: bool


class BatchTokens(NamedTuple):
    """Tokens to be stored for a batch: how many for each sequence, and their ids one after the other if known."""

    counts: npt.NDArray[np.int64]
    ids: npt.NDArray[np.int64]
    known: bool


def fraction(name: str, value: Any) -> float:
    """Return `value` clamped to 0 … 1; NaN and what is no number is InvalidOperation."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)) or value != value:
        raise bad_argument(name, "a number in 0 … 1", shown(value), number_for(value))
    return min(1.0, max(0.0, float(value)))


def sequence_key(value: Any, name: str = "seq_id") -> int:
    """Return a sequence id as the signed 64-bit pattern that the arrays hold."""
    if isinstance(value, str):
        raise bad_argument(name, "an int", shown(value), "count your sequences, and keep a dict of their names")
    key = require_int(name, value, 0, 2 * _SIGNED - 1)
    return key if key < _SIGNED else key - 2 * _SIGNED


def sequence_number(key: Any) -> int:
    """Return the sequence id behind a signed 64-bit pattern."""
    return int(key) % (2 * _SIGNED)


def sequence_keys(values: Any, wide_ids: bool) -> npt.NDArray[np.int64]:
    """Return a batch of sequence ids as int64 ``[n]``.

    Unless ids from 2⁶³ on are in use (`wide_ids`), a negative one is not looked for: no sequence will be found.
    """
    try:
        array = np.asarray(values)
    except _NO_ARRAY:
        raise bad_argument("seq_ids", "a flat list of ints", shown(values), "give them one after the other") from None
    if array.size == 0 and array.ndim == 1:
        return NO_IDS
    # Copies, because plans keep them: the caller may use its array again.
    if array.ndim == 1 and array.dtype == np.int64:
        if not wide_ids or array.min() >= 0:
            return array.copy()
    elif array.ndim == 1 and array.dtype == np.uint64:
        return array.copy().view(np.int64)
    elif array.ndim == 1 and array.dtype.kind in "iu" and array.min() >= 0:
        return array.astype(np.int64)
    if array.ndim != 1:
        hint = f"write [{shown(values)}]" if array.ndim == 0 else "give them one after the other"
        raise bad_argument("seq_ids", "a flat list of ints", shown(values), hint)
    return np.array([sequence_key(value, "seq_ids") for value in values], np.int64)


@compiled
def _has_negative(ids: npt.NDArray[np.int64]) -> bool:
    """Tell whether an id is negative; NumPy's ``min`` takes four times as long to begin, Numba's to compile."""
    signs = np.int64(0)
    for i in range(len(ids)):
        signs |= ids[i]
    return bool(signs < 0)


def _id_array(name: str, values: Any, ndim: int = 1, what: str = "token ids") -> npt.NDArray[np.int64]:
    """Return ids as int64, flat and contiguous."""
    try:
        array = np.asarray(values)
    except _NO_ARRAY:
        raise bad_argument(name, f"{what}", shown(values), "give one flat list") from None
    if array.size == 0 and array.ndim <= ndim:
        return NO_IDS
    if array.ndim != ndim or array.dtype.kind not in "iu":
        got = shown(values) if array.dtype.kind in "US" else f"{array.dtype} of shape {array.shape}"
        raise bad_argument(name, f"ints in {ndim} dimension{'s' * (ndim > 1)}", got, _hint_for_ids(array, ndim))
    if array.dtype == np.uint64 and array.max() >= _SIGNED:
        raise bad_argument(name, f"{what} below 2**63", f"{array.max()}")
    ids = np.ascontiguousarray(array, dtype=np.int64).reshape(-1)
    if not ids.flags.writeable:
        ids = ids.copy()  # Numba would compile everything once more for an array that cannot be written
    if _has_negative(ids):
        raise bad_argument(name, f"{what} of at least 0", f"{ids.min()}", "leave padding out")
    return ids


def _hint_for_ids(array: npt.NDArray[Any], ndim: int) -> str:
    """Return what to do with an array that holds no ids, or has not the dimensions that they come in."""
    kind = array.dtype.kind
    if kind in "US":
        return "encode the text first: tokenizer.encode(text)"
    if kind == "b":
        return "a mask is no list of ids: give ids[mask]"
    if kind != "i" and kind != "u":
        return "make them ints first: .astype(np.int64), or .long() of a tensor"
    return "one text at a time: ids[0], or append_batch for many" if array.ndim > ndim else "give one flat list"


# These two are kept because every step asks for the same. Nobody writes to the arrays.


@lru_cache(maxsize=16)
def equal_counts(count: int, n: int) -> npt.NDArray[np.int64]:
    """Return `count` for each of `n` sequences."""
    return np.full(n, count, np.int64)


@lru_cache(maxsize=16)
def _one_count(count: int, n: int) -> BatchTokens:
    return BatchTokens(parse_counts("counts", count, n), NO_IDS, False)


def is_count(value: Any) -> bool:
    """Tell whether `value` is a single number rather than a list of ids."""
    return type(value) is int or isinstance(value, (int, float, np.number)) or getattr(value, "ndim", 1) == 0


def parse_tokens(tokens: Any) -> Tokens:
    """Read a count or a list of token ids."""
    if isinstance(tokens, str):
        raise bad_argument("tokens", "a number or token ids", shown(tokens), _hint_for_ids(np.asarray(tokens), 1))
    if is_count(tokens):
        if not isinstance(tokens, (int, float, np.number)):
            tokens = tokens.item()
        return Tokens(require_int("tokens", tokens), NO_IDS, False)
    ids = _id_array("tokens", tokens)
    return Tokens(len(ids), ids, True)


def parse_ids(name: str, token_ids: Any) -> npt.NDArray[np.int64]:
    """Read a list of token ids; a count is refused."""
    if is_count(token_ids):
        raise bad_argument(name, "token ids", shown(token_ids), "give the list of ids, not their number")
    return _id_array(name, token_ids)


def parse_batch_tokens(tokens: Any, counts: Any, n: int) -> BatchTokens:
    """Read what each of `n` sequences is to store: ids (flat: one each; ``[n, k]``; or lists), or how many tokens."""
    if tokens is None:
        if counts is None or type(counts) is int:
            return _one_count(1 if counts is None else counts, n)
        return BatchTokens(parse_counts("counts", counts, n), NO_IDS, False)
    if counts is not None:
        raise bad_argument("counts", "None where tokens are given", shown(counts), "leave one of the two out")
    if is_count(tokens) or isinstance(tokens, str) or not is_listing(tokens):
        wanted = "token ids, one or a list for each sequence"
        raise bad_argument("tokens", wanted, shown(tokens), "a number of unknown tokens is counts=…")
    _require_length(len(tokens), n, "tokens")
    if getattr(tokens, "ndim", 0) == 2:
        return BatchTokens(equal_counts(tokens.shape[1], n), _id_array("tokens", tokens, ndim=2), True)
    if n and not hasattr(tokens, "dtype") and not is_count(tokens[0]):
        return _parse_lists(tokens)
    return BatchTokens(equal_counts(1, n), _id_array("tokens", tokens), True)


def parse_commit(given: Any, upto: Any, wide_ids: bool) -> tuple[Int64s, Int64s, Int64s | None, int]:
    """Read a plan, a sequence id or several, and how many of their first tokens are written, -1 for all.

    Answers (keys, counts, the most that a plan allows, when it was made).
    """
    if isinstance(given, BatchPlan):
        most = given.seq_lens.astype(np.int64)
        return given.seq_ids, most if upto is None else parse_counts("upto", upto, len(most)), most, given.tick
    keys = sequence_keys(given, wide_ids) if is_listing(given) else np.array([sequence_key(given)])
    counts = equal_counts(-1, len(keys)) if upto is None else parse_counts("upto", upto, len(keys))
    return keys, counts, None, 2**62


def parse_counts(name: str, counts: Any, n: int) -> npt.NDArray[np.int64]:
    """Read one count for all, or a flat list of counts: int64 ``[n]``."""
    if is_count(counts):
        return equal_counts(require_int(name, counts, 0, MAX_INT // max(1, n)), n)
    if not is_listing(counts):
        raise bad_argument(name, "a count, or one for each sequence", shown(counts), "give an int or a list of ints")
    _require_length(len(counts), n, name)
    listed = _id_array(name, counts, what="counts")
    if len(listed) and listed.max() > MAX_INT // n:  # so that their sum is a count too
        raise bad_argument(name, f"counts of at most {MAX_INT // n}", f"{listed.max()}")
    return listed


def is_listing(values: Any) -> bool:
    """Tell whether `values` is a list of some kind rather than one thing; text is one thing."""
    return hasattr(values, "__len__") and hasattr(values, "__getitem__") and not isinstance(values, Mapping)


def _parse_lists(lists: Sequence[Any]) -> BatchTokens:
    arrays = [_id_array(f"tokens[{i}]", ids) for i, ids in enumerate(lists)]
    counts = np.fromiter(map(len, arrays), np.int64, len(arrays))
    return BatchTokens(counts, np.concatenate(arrays) if arrays else NO_IDS, True)


def _require_length(got: int, n: int, name: str) -> None:
    if got != n:
        raise bad_argument(name, f"one entry for each of {n} sequences", f"{got}", f"give {n}, in the order of seq_ids")
