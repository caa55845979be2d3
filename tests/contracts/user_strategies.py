"""Strategies that a user might write."""

from __future__ import annotations

from collections import Counter

import numpy as np

from pagedkv import register_strategy


@register_strategy("smallest_first")
class SmallestFirst:
    """Evicts short sequences; gives up the shallowest leaves, the youngest first."""

    def score_sequences(self, sequences, now):
        return sequences.num_tokens

    def score_blocks(self, blocks, now):
        return blocks.depth * 1_000_000 - blocks.created

    def __eq__(self, other):
        return type(other) is SmallestFirst

    def __hash__(self):
        return 0

    def __str__(self):
        return "smallest_first"


@register_strategy("modulo")
class Modulo:
    """Ties everywhere: only ids can break them."""

    def __init__(self, divisor=2):
        self.divisor = divisor

    def score_sequences(self, sequences, now):
        return (sequences.seq_id % self.divisor).astype(np.int64)

    def score_blocks(self, blocks, now):
        return (blocks.block_id % self.divisor).astype(np.int32)

    def __eq__(self, other):
        return type(other) is Modulo and other.divisor == self.divisor

    def __hash__(self):
        return self.divisor

    def __str__(self):
        return f"modulo(divisor={self.divisor})"


class Recorder:
    """Passes on to a strategy and notes what it said of every block and sequence last."""

    def __init__(self, inner):
        self.inner, self.blocks, self.sequences = inner, {}, {}

    def score_blocks(self, blocks, now):
        scores = np.asarray(self.inner.score_blocks(blocks, now))
        self.blocks.update(zip(blocks.block_id.tolist(), scores.tolist(), strict=True))
        return scores

    def score_sequences(self, sequences, now):
        scores = np.asarray(self.inner.score_sequences(sequences, now))
        self.sequences.update(zip(sequences.seq_id.tolist(), scores.tolist(), strict=True))
        return scores


class PlainSieve:
    """SIEVE in plain Python, on hooks alone, for requests that come and go one after the other.

    A score is a lap of the hand, then the moment of insertion. A block whose turn of the lap went by while it was no
    leaf comes first with the score of then: it is put back where it belongs.
    """

    LAP = 1 << 40

    def __init__(self):
        self.lap = self.hand = self.clock = 0
        self.moments, self.parents, self.told, self.children = {}, {}, {}, Counter()
        self.visited, self.chain, self.moved = set(), [], False

    def score_sequences(self, sequences, now):
        return sequences.last_access

    def score_blocks(self, blocks, now):
        self.chain = []
        paths = blocks.prefix_hash.tolist()
        self.told.update((path, self._turn(path)) for path in paths)
        return np.array([self.told[path] for path in paths], np.int64)

    def on_hit(self, blocks, now):
        self.chain = blocks.prefix_hash.tolist()
        self.visited.update(self.chain)

    def on_store(self, blocks, now):
        self._start_over(self.chain[-1] if self.chain else None)
        for path in blocks.prefix_hash.tolist():
            self.clock += 1
            self.moments[path] = self.clock
            self.parents[path] = self.chain[-1] if self.chain else None
            self.children[self.parents[path]] += 1
            self.chain.append(path)

    def on_reclaim(self, block, now):
        path = int(block.prefix_hash[0])
        turn = self._turn(path)
        if turn > self.told[path]:
            self.told[path] = turn
            return turn
        self.lap, self.hand = divmod(turn, self.LAP)
        if path in self.visited:
            self.visited.remove(path)
            self.told[path] = turn + self.LAP
            return self.told[path]
        del self.moments[path], self.told[path]
        self.children[self.parents.pop(path)] -= 1
        self.moved = True
        return None

    def _turn(self, path):
        return (self.lap + (self.moments[path] <= self.hand)) * self.LAP + self.moments[path]

    def _start_over(self, held):
        """Back to the oldest leaf if none was newer than the last one given up, but for the one in use."""
        leaves = [path for path in self.moments if not self.children[path] and path != held]
        if self.moved and all(self.moments[path] <= self.hand for path in leaves):
            self.lap, self.hand = self.lap + 1, 0
        self.moved = False
