from __future__ import annotations

import html
import io
import re
import shlex
from collections import defaultdict
from pathlib import Path

import pytest
from rich.console import Console
from tests.cli.commands import call

from pagedkv import BlockManager, CacheSnapshot
from pagedkv.cli.block_map import BlockMap
from pagedkv.control.types import ACTIVE, FREE


def drawn(
    snapshot: CacheSnapshot, width: int = 80, encoding: str = "utf-8", color: str | None = None, **options
) -> str:
    buffer = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(file=buffer, width=width, color_system=color, force_terminal=color is not None)
    console.print(BlockMap(snapshot, **options))
    buffer.flush()
    return buffer.buffer.getvalue().decode(encoding)


@pytest.fixture
def pool() -> BlockManager:
    """One block of each kind, and a few more: 2 pinned, 1 shared, 3 active, 2 cached, 12 free."""
    manager = BlockManager(20, block_size=4)
    manager.allocate(1, list(range(8)))
    manager.commit(1)
    manager.pin(1)
    manager.allocate(2, list(range(100, 108)))
    manager.commit(2)
    manager.allocate(3, list(range(200, 204)))
    manager.fork(3, 4)
    manager.allocate(5, 12)
    manager.free(1)
    manager.free(2)
    return manager


def test_every_kind_of_block_has_its_own_glyph(pool):
    assert drawn(pool.snapshot(), width=40) == (
        "20 blocks of 4 tokens\n 0 ◆◆░░▓███············\n█ active 3  ▓ shared 1  ░ cached 2\n◆ pinned 2  · free 12\n"
    )


def test_rows_wrap_to_the_width_in_groups_of_eight_and_count_on(pool):
    rows = drawn(pool.snapshot(), width=12).splitlines()[1:4]
    assert rows == [" 0 ◆◆░░▓███", " 8 ········", "16 ····"]


def test_a_terminal_without_unicode_gets_plain_glyphs(pool):
    assert " 0 @@oo%###............" in drawn(pool.snapshot(), encoding="ascii").splitlines()


def test_color_adds_codes_and_changes_no_glyph(pool):
    colored = drawn(pool.snapshot(), color="standard")
    assert "\x1b[32m███" in colored and "\x1b[1;35m▓" in colored and "\x1b[36m░░" in colored
    assert "\x1b[1;33m◆◆" in colored and "\x1b[2m············" in colored


def test_what_does_not_fit_is_counted(pool):
    lines = drawn(pool.snapshot(), width=12, max_rows=2).splitlines()
    assert lines[1:5] == [" 0 ◆◆░░▓███", " 8 ········", "and 4 blocks", "more: 4 free"]


def test_a_narrow_terminal_still_shows_every_block(pool):
    rows = drawn(pool.snapshot(), width=4, max_rows=100).splitlines()[1:21]
    assert [row[:2].strip() for row in rows] == [str(number) for number in range(20)]
    assert "".join(row[3:] for row in rows) == "◆◆░░▓███············"


def test_an_empty_pool_can_be_drawn():
    assert drawn(BlockManager(0).snapshot()).startswith("0 blocks of 16 tokens\n")


def test_kinds_follow_the_snapshot(pool):
    snapshot = pool.snapshot()
    kinds = snapshot.kinds
    assert (kinds == ACTIVE).sum() == ((snapshot.ref_count == 1) & ~snapshot.pinned).sum() == 3
    assert (kinds == FREE).sum() + snapshot.cached.sum() + pool.used_block_count == pool.total_blocks


def picture_lines() -> list[str]:
    """Return the lines of the picture in the README."""
    picture = (Path(__file__).parents[2] / "docs" / "block-map.svg").read_text()
    lines: dict[float, str] = defaultdict(str)
    for height, text in re.findall(r'<text[^>]*? y="([\d.]+)"[^>]*>(.*?)</text>', picture):
        lines[float(height)] += html.unescape(text).replace("\xa0", " ")
    return [lines[height].strip() for height in sorted(lines)]


def test_the_picture_in_the_readme_is_what_the_demo_shows():
    lines = picture_lines()
    _, *arguments = shlex.split(next(line for line in lines if line.startswith("$ "))[2:])
    result = call(*arguments, env={"COLUMNS": "104"})
    assert result.exit_code == 0 and arguments == ["demo"]
    shown = [re.sub(" +", "", line) for line in result.stdout.splitlines() if line.strip()]
    drawn = [re.sub(" +", "", line) for line in lines]
    first = shown.index(next(line for line in shown if line.startswith("texts15")))
    expected = [line for line in shown[first:] if not line.startswith(("newtokens", "compiling"))]
    assert [line for line in drawn if line in expected] == expected and len(expected) >= 8
