"""States of recurrent layers in tests: a number stands for each text."""

from __future__ import annotations

import numpy as np


def state_of(text, salt=""):
    """Return a number for a text, as a model's state would be one."""
    number = 1 + len(salt)
    for token in text:
        number = (number * 31 + token + 1) % 1_000_003
    return number


def snapshot_texts(cache):
    """Return the slot, the text and the salt of every snapshot in the books."""
    state, size = cache._state, cache.block_size
    found = []
    for slot in np.flatnonzero(state.states["block"]).tolist():
        block, text = int(state.states[slot].block) - 1, []
        while block >= 0:
            text = state.contents[block * size : (block + 1) * size].tolist() + text
            block = int(state.blocks[block].parent)
        found.append((slot, text, cache._namespaces.salt_of(-1 - block)))
    return found
