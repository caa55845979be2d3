"""Prompt lookup decoding: draft tokens from an earlier place in the text.

Source: Saxena 2023, "Prompt Lookup Decoding". Every draft is checked by the model, so the text stays the same.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pagedkv.errors import bad_argument
from pagedkv.jit import compiled

LONGEST = 8  # a longer match is no better a sign
SHORTEST = 2

Ids = npt.NDArray[np.int64]


@compiled
def _follow(ids: Ids, longest: int, shortest: int, drafts: Ids) -> bool:
    length, best, source = len(ids), shortest - 1, -1
    for end in range(length - 2, shortest - 2, -1):
        matched = 0
        while matched < longest and matched <= end and ids[end - matched] == ids[length - 1 - matched]:
            matched += 1
        if matched > best:
            best, source = matched, end + 1
            if matched == longest:
                break
    if source < 0:
        return False
    for place in range(len(drafts)):
        behind = source + place - length  # a match that overlaps the tail goes on in the drafts themselves
        drafts[place] = ids[source + place] if behind < 0 else drafts[behind]
    return True


def propose(token_ids: Ids, count: int, *, longest: int = LONGEST, shortest: int = SHORTEST) -> Ids:
    """Guess how a text goes on, from the last place where its tail stood before.

    The place is where the longest piece of the tail stood, of `shortest` to `longest` tokens, of several the last one.
    One pass over the text, from its end; it stops at the first match of `longest` tokens.

    Parameters
    ----------
    token_ids : int64 [n]
        Prompt and text.
    count : int
        Drafts wanted.
    longest, shortest : int
        Tokens that have to match; `shortest` at least 1.

    Returns
    -------
    int64 [count], or [0] where the tail never stood before

    Raises
    ------
    InvalidOperation
        Token ids are no int64 vector, or a number is out of range.
    """
    if token_ids.dtype != np.int64 or token_ids.ndim != 1:
        raise bad_argument("token_ids", "int64 [n]", f"{token_ids.dtype} {list(token_ids.shape)}")
    if not 1 <= shortest <= longest:
        raise bad_argument("shortest", f"1 … longest = {longest}", f"{shortest}")
    if count < 0:
        raise bad_argument("count", "at least 0", f"{count}")
    drafts = np.empty(count, np.int64)
    return drafts if count and _follow(token_ids, longest, shortest, drafts) else drafts[:0]
