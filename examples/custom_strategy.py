"""A strategy of your own, judged on a trace before it serves anybody.

``ShallowFirst`` keeps what many texts can share: blocks near the beginning of a prefix outlive deep ones, unless those
were used more often. The class is an object for ``strategy=``; under its name it works on the command line as well.
"""

from __future__ import annotations

import numpy as np

from pagedkv import BlockManager, register_strategy
from pagedkv.control.protocol import Scores
from pagedkv.control.types import BlockView, SequenceView
from pagedkv.sim import ReplayResult, optimal, replay, synthesize


@register_strategy("shallow_first")
class ShallowFirst:
    """The lowest score goes first: few uses, then deep in its prefix, then long ago."""

    def score_sequences(self, sequences: SequenceView, now: int) -> Scores:
        return sequences.last_access

    def score_blocks(self, blocks: BlockView, now: int) -> Scores:
        uses = np.minimum(blocks.access_count, 15).astype(np.int64)
        shallow = 2**12 - np.minimum(blocks.depth, 2**12).astype(np.int64)
        scores: Scores = (uses * 2**13 + shallow) * 2**40 + blocks.last_access
        return scores

    def __str__(self) -> str:
        return "shallow_first"


def main() -> dict[str, ReplayResult]:
    trace = synthesize("chat", requests=2_000, seed=7)
    blocks = trace.num_distinct // 10
    results = {"shallow_first": replay(trace, blocks, ShallowFirst())}
    results |= {"lru": replay(trace, blocks, "lru"), "optimum": optimal(trace, blocks)}
    for name, result in results.items():
        print(f"{name:14} {result.hit_ratio:6.1%} of {result.accesses:,} blocks found, pool of {blocks:,}")

    manager = BlockManager(64, 4, strategy=ShallowFirst())  # the very same object serves
    manager.allocate(1, list(range(32)))
    manager.commit(1)
    manager.free(1)
    print(manager)
    return results


if __name__ == "__main__":
    main()
