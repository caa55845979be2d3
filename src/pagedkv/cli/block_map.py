"""Block map of a pool: one cell a block, drawn from a frozen snapshot."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

if TYPE_CHECKING:
    from pagedkv.control.events import CacheSnapshot


@dataclass(frozen=True)
class _Look:
    glyph: str
    plain: str  # where the terminal has no Unicode
    style: str


# By the kind of a block, as the legend has them.
_LOOKS = {
    "active": _Look("█", "#", "green"),
    "shared": _Look("▓", "%", "bold magenta"),
    "cached": _Look("░", "o", "cyan"),
    "pinned": _Look("◆", "@", "bold yellow"),
    "free": _Look("·", ".", "dim"),
}
_GROUP = 8
"""Rows hold a multiple of so many cells where the width allows it."""


@dataclass(frozen=True)
class BlockMap:
    """A rich renderable that draws a snapshot; it wraps to the width that it is given.

    Parameters
    ----------
    snapshot : CacheSnapshot
    max_rows : int
        What does not fit into so many rows is counted in one line instead.
    """

    snapshot: CacheSnapshot
    max_rows: int = 32

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield a title, the rows and the legend."""
        from pagedkv.control.types import BLOCK_KINDS

        kinds = [BLOCK_KINDS[kind] for kind in self.snapshot.kinds.tolist()]
        glyphs = {kind: look.plain if options.ascii_only else look.glyph for kind, look in _LOOKS.items()}
        yield Text(
            f"{len(kinds):,} blocks of {self.snapshot.block_size} tokens", style="bold", no_wrap=True, overflow="crop"
        )
        label_width = len(str(max(len(kinds) - 1, 0)))
        cells = _cells_per_row(options.max_width - label_width - 1)
        shown = kinds[: cells * self.max_rows]
        for start in range(0, len(shown), cells):
            yield _row(f"{start:{label_width}} ", shown[start : start + cells], glyphs)
        if len(shown) < len(kinds):
            yield Text(
                f"and {len(kinds) - len(shown):,} blocks more: {_counted(kinds[len(shown) :])}",
                style="dim",
                overflow="crop",
            )
        yield from _legend(kinds, glyphs, options.max_width)


def _cells_per_row(room: int) -> int:
    return room // _GROUP * _GROUP if room >= _GROUP else max(room, 1)


def _row(label: str, kinds: list[str], glyphs: dict[str, str]) -> Text:
    row = Text.assemble((label, "dim"), no_wrap=True, overflow="crop")
    for kind, run in groupby(kinds):
        row.append(glyphs[kind] * len(list(run)), style=_LOOKS[kind].style)
    return row


def _counted(kinds: list[str]) -> str:
    return ", ".join(f"{kinds.count(kind):,} {kind}" for kind in _LOOKS if kind in kinds)


def _legend(kinds: list[str], glyphs: dict[str, str], width: int) -> Iterator[Text]:
    """Yield as many entries a line as fit, none broken."""
    line = Text()
    for kind, look in _LOOKS.items():
        entry = Text.assemble((glyphs[kind], look.style), f" {kind} {kinds.count(kind):,}")
        if line and len(line) + 2 + len(entry) > width:
            yield line
            line = Text()
        line += Text("  ") + entry if line else entry
    yield line
