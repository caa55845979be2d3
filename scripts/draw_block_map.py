"""Draw docs/block-map.svg: a pool in the middle of chat traffic, as `pagedkv generate --show-blocks` would draw it.

python scripts/draw_block_map.py [FILE]
"""

from __future__ import annotations

import io
import random
import re
import sys
from pathlib import Path

from rich.console import Console

from pagedkv import BlockManager
from pagedkv.cli.block_map import BlockMap

SYSTEM_PROMPT = list(range(400))


def busy_pool() -> BlockManager:
    """Let 24 chats with one pinned system prompt come and go; some draw several samples."""
    rng = random.Random(7)
    manager = BlockManager(768, block_size=16, on_full="evict")
    manager.allocate(0, SYSTEM_PROMPT)
    manager.commit(0)
    manager.pin(0)
    manager.free(0)
    for chat in range(1, 25):
        question = [rng.randrange(1000, 50_000) for _ in range(rng.randrange(60, 500))]
        manager.allocate(chat, SYSTEM_PROMPT + question)
        manager.commit(chat)
        samples = [chat] + [100 * chat + i for i in range(rng.choice([0, 0, 0, 2]))]
        for sample in samples[1:]:
            manager.fork(chat, sample)
        for _ in range(rng.randrange(20, 120)):
            manager.commit(manager.append_batch(samples, [[rng.randrange(50_000)] for _ in samples]))
        if rng.random() < 0.6:
            for sample in samples:
                manager.free(sample)
    return manager


def main() -> None:
    """Write the picture."""
    target = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/block-map.svg")
    console = Console(record=True, width=110, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(BlockMap(busy_pool().snapshot()))
    picture = console.export_svg(title="pagedkv: the block map")
    # The picture stands alone: no font is fetched, any monospaced one will do.
    target.write_text(re.sub(r"@font-face \{.*?\}", "", picture, flags=re.S))


if __name__ == "__main__":
    main()
