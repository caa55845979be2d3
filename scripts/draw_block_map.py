"""Draw docs/block-map.svg: what `pagedkv generate --show-blocks` shows on a terminal, of a run that is made here.

python scripts/draw_block_map.py [FILE]
"""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

from rich.console import Console

from pagedkv.cli.block_map import BlockMap
from pagedkv.cli.generate import GenerateRequest, facts_of, report_of, write
from pagedkv.cli.loading import load_model
from pagedkv.cli.terminal import facts_table, threads_for

REQUEST = GenerateRequest(
    prompt="from math import cos, exp, log, pi, sin, sqrt",
    samples=4,
    max_new_tokens=96,
    block_size=4,
    show_blocks=True,
)
COMMAND = f'$ pagedkv generate "{REQUEST.prompt}" -n 4 --max-new-tokens 96 --block-size 4 --show-blocks'


def draw(console: Console) -> None:
    """Write the text, and show what the command shows below it."""
    loaded = load_model(REQUEST.model_path, REQUEST.device)
    ids = loaded.encode(REQUEST.prompt)
    with threads_for(loaded.model):
        output, pool, took = write(REQUEST, loaded, ids, REQUEST.pool_size(len(ids)), lambda piece: None)
    report = report_of(REQUEST, REQUEST.prompt, output, pool, took)
    report.compile_seconds = 0.0  # of this machine, at this time
    console.print(COMMAND, style="bold", highlight=False)
    console.print("…", style="dim")
    console.print(facts_table(facts_of(report)))
    console.print()
    console.print(BlockMap(pool.fullest))


def main() -> None:
    """Write the picture."""
    target = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/block-map.svg")
    console = Console(record=True, width=120, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    draw(console)
    picture = console.export_svg(title="pagedkv generate --show-blocks")
    # The picture stands alone: no font is fetched, any monospaced one will do.
    target.write_text(re.sub(r"@font-face \{.*?\}", "", picture, flags=re.S))


if __name__ == "__main__":
    main()
