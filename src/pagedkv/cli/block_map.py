"""The pool as a map: one cell a block, drawn from a frozen snapshot."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

if TYPE_CHECKING:
    from pagedkv.control.events import CacheSnapshot

__all__ = ["BlockMap", "block_kinds"]


@dataclass(frozen=True)
class _Kind:
    name: str
    glyph: str
    plain: str  # where the terminal has no Unicode
    style: str


_KINDS = (
    _Kind("active", "█", "#", "green"),
    _Kind("shared", "▓", "%", "bold magenta"),
    _Kind("cached", "░", "o", "cyan"),
    _Kind("pinned", "◆", "@", "bold yellow"),
    _Kind("free", "·", ".", "dim"),
)
_ACTIVE, _SHARED, _CACHED, _PINNED, _FREE = range(5)
_GROUP = 8
"""Rows hold a multiple of so many cells where the width allows it."""


def block_kinds(snapshot: CacheSnapshot) -> list[int]:
    """Return the kind of every block, an index into the legend: active, shared, cached, pinned, free.

    A pinned block counts as pinned whatever else it is; a block is shared where two or more sequences hold it.
    """
    kinds = []
    for refs, cached, pinned in zip(
        snapshot.ref_count.tolist(), snapshot.cached.tolist(), snapshot.pinned.tolist(), strict=True
    ):
        if pinned:
            kinds.append(_PINNED)
        elif refs:
            kinds.append(_SHARED if refs > 1 else _ACTIVE)
        else:
            kinds.append(_CACHED if cached else _FREE)
    return kinds


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
        kinds = block_kinds(self.snapshot)
        glyphs = [kind.plain if options.ascii_only else kind.glyph for kind in _KINDS]
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


def _row(label: str, kinds: list[int], glyphs: list[str]) -> Text:
    row = Text.assemble((label, "dim"), no_wrap=True, overflow="crop")
    for kind, run in groupby(kinds):
        row.append(glyphs[kind] * len(list(run)), style=_KINDS[kind].style)
    return row


def _counted(kinds: list[int]) -> str:
    return ", ".join(f"{kinds.count(number):,} {kind.name}" for number, kind in enumerate(_KINDS) if number in kinds)


def _legend(kinds: list[int], glyphs: list[str], width: int) -> Iterator[Text]:
    """Yield as many entries a line as fit, none broken."""
    line = Text()
    for number, kind in enumerate(_KINDS):
        entry = Text.assemble((glyphs[number], kind.style), f" {kind.name} {kinds.count(number):,}")
        if line and len(line) + 2 + len(entry) > width:
            yield line
            line = Text()
        line += Text("  ") + entry if line else entry
    yield line
