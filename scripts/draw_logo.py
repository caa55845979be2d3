"""Draw the logo: the block map of a small pool, taken from the block manager itself.

python scripts/draw_logo.py
"""

from __future__ import annotations

from pathlib import Path

from pagedkv import BlockManager
from pagedkv.control.types import BLOCK_KINDS

ROOT = Path(__file__).parents[1]
PLACES = (ROOT / "docs" / "logo.svg", ROOT / "src" / "pagedkv" / "server" / "page" / "icon.svg")

SIDE = 4
COLOURS = {"free": "#2f4a6b", "active": "#4aa3ff", "shared": "#c084fc", "cached": "#2dd4bf", "pinned": "#fbbf24"}


def pool() -> BlockManager:
    """Return a pool with blocks of every kind: a pinned prompt, two samples of another one, and what a third left."""
    manager = BlockManager(SIDE * SIDE, block_size=4)
    manager.allocate(1, range(8))
    manager.commit(1)
    manager.pin(1)
    manager.allocate(2, range(100, 116))
    manager.commit(2)
    manager.fork(2, 3)
    manager.append_batch([2, 3], [7, 8])
    manager.allocate(4, range(200, 212))
    manager.commit(4)
    manager.free(4)
    return manager


def draw(manager: BlockManager) -> str:
    """Return the picture of a pool, a square a block."""
    cells = []
    for block, kind in enumerate(manager.snapshot().kinds):
        x, y = 5 + 5.75 * (block % SIDE), 5 + 5.75 * (block // SIDE)
        cells.append(
            f'<rect x="{x:g}" y="{y:g}" width="4.75" height="4.75" rx="1.2" fill="{COLOURS[BLOCK_KINDS[kind]]}"/>'
        )
    board = '<rect width="32" height="32" rx="7" fill="#10243d"/>'
    size = 'viewBox="0 0 32 32" width="32" height="32"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{board}{"".join(cells)}</svg>\n'


def main() -> None:
    """Write the picture where it is shown."""
    for place in PLACES:
        place.write_text(draw(pool()))


if __name__ == "__main__":
    main()
