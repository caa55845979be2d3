"""Draw docs/block-map.svg: what `pagedkv demo` shows below its texts, of a run that is made here.

python scripts/draw_block_map.py [FILE]
"""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

from rich.console import Console

from pagedkv.cli.block_map import BlockMap
from pagedkv.cli.demo import engine_for, facts_of, perform, script_for
from pagedkv.cli.loading import load_model
from pagedkv.cli.model_source import find_model
from pagedkv.cli.terminal import facts_table, threads_for
from pagedkv.cli.writing import warm_up


def draw(console: Console) -> None:
    """Write the texts, and show what the command shows below them."""
    source = find_model(None)
    loaded = load_model(source, "cpu")
    llm = engine_for(loaded)
    warm_up(llm)
    with threads_for(loaded.model.num_parameters()):
        report, pool = perform(llm, script_for(loaded), None, model=source.name)
    report.compile_seconds = 0.0  # of this machine, at this time
    console.print("$ pagedkv demo", style="bold", highlight=False)
    console.print("…", style="dim")
    console.print(facts_table(facts_of(report)))
    console.print()
    console.print(BlockMap(pool.fullest))


def main() -> None:
    """Write the picture."""
    target = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/block-map.svg")
    console = Console(record=True, width=104, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    draw(console)
    picture = console.export_svg(title="pagedkv demo")
    # The picture stands alone: no font is fetched, any monospaced one will do.
    target.write_text(re.sub(r"@font-face \{.*?\}", "", picture, flags=re.S))


if __name__ == "__main__":
    main()
