"""The block map of ``pagedkv top``: two cells a character, as many blocks in a cell as must be."""

from __future__ import annotations

from functools import lru_cache
from itertools import groupby
from typing import TYPE_CHECKING, ClassVar

from rich.segment import Segment
from rich.style import Style
from textual import events
from textual.binding import Binding, BindingType
from textual.message import Message
from textual.reactive import reactive
from textual.strip import Strip
from textual.widget import Widget

from pagedkv.cli.top_rows import FAINT, MapCells, fold

if TYPE_CHECKING:
    from pagedkv.engine.snapshot_types import EngineSnapshot


COLOURS = ("#2b3850", "#4a9ff5", "#c084fc", "#1f9e90", "#fbbf24")
"""Of free, active, shared, cached and pinned blocks."""
_FAINT = ("#1a222f", "#22405f", "#4a3763", "#173f42", "#5d4a1c")
_CURSOR, _NOTHING = 100, 101
_UPPER_HALF = "▀"
_CELLS = ("■ ", "■")
"""A block as a line of its own draws it, the roomiest first; where both are too wide, two blocks share a character."""


@lru_cache(maxsize=1024)
def _style(upper: int, lower: int) -> Style:
    return Style(color=_colour(upper), bgcolor=_colour(lower) if lower != _NOTHING else None)


def _colour(kind: int) -> str:
    if kind == _CURSOR:
        return "#ffffff"
    if kind == _NOTHING:
        return "default"
    return _FAINT[kind - FAINT] if kind >= FAINT else COLOURS[kind]


class BlockMapView(Widget, can_focus=True):
    """Draws a snapshot and lets a cursor walk over its blocks."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("left", "walk(-1, 0)", "Walk", show=False),
        Binding("right", "walk(1, 0)", "Walk", show=False),
        Binding("up", "walk(0, -1)", "Walk", show=False),
        Binding("down", "walk(0, 1)", "Walk", show=False),
        Binding("home", "jump(0)", "First", show=False),
        Binding("end", "jump(-1)", "Last", show=False),
    ]

    snapshot: reactive[EngineSnapshot | None] = reactive(None, init=False)
    near: reactive[str | None] = reactive(None, init=False)
    cursor: reactive[int] = reactive(-1, init=False)

    class Walked(Message):
        """The cursor stands on another block."""

        def __init__(self, block: int) -> None:
            super().__init__()
            self.block = block

    class Folded(Message):
        """A cell stands for another number of blocks."""

    def __init__(self, id: str | None = None) -> None:
        super().__init__(id=id)
        self._cells: MapCells | None = None

    @property
    def cell(self) -> str:
        """The text of a cell; empty where a character shows two cells, one above the other."""
        total = self.snapshot.total_blocks if self.snapshot is not None else 0
        fitting = (text for text in _CELLS if total <= self.size.width // len(text) * self.size.height)
        return next(fitting, "")

    @property
    def columns(self) -> int:
        """Cells in a row."""
        return max(1, self.size.width // max(1, len(self.cell)))

    @property
    def blocks_per_cell(self) -> int:
        """How many blocks a cell stands for."""
        return self._cells.blocks_per_cell if self._cells else 1

    def watch_snapshot(self) -> None:
        """Fold the new snapshot."""
        self._fold()

    def watch_near(self) -> None:
        """Let other blocks stand out."""
        self._fold()

    def watch_cursor(self) -> None:
        """Draw the cursor elsewhere."""
        self.refresh()
        self.post_message(self.Walked(self.cursor))

    def on_resize(self) -> None:
        """Fold into the new room."""
        self._fold()

    def _fold(self) -> None:
        if self.snapshot is None or not self.size.height:
            return
        before = self.blocks_per_cell
        rows = self.size.height if self.cell else 2 * self.size.height
        self._cells = fold(self.snapshot, self.columns * rows, self.near)
        self.refresh()
        if self.blocks_per_cell != before:
            self.post_message(self.Folded())

    def render_line(self, y: int) -> Strip:
        """Draw a row of cells as one line, or two where room is scarce."""
        segments = [] if self._cells is None else self._segments(y)
        return Strip(segments).adjust_cell_length(self.size.width).apply_style(self.rich_style)

    def _segments(self, y: int) -> list[Segment]:
        if cell := self.cell:
            runs = [(kind, len(list(run))) for kind, run in groupby(self._row(y))]
            return [Segment(cell * count, _style(kind, _NOTHING)) for kind, count in runs if kind != _NOTHING]
        pairs = groupby(zip(self._row(2 * y), self._row(2 * y + 1), strict=True))
        return [Segment(_UPPER_HALF * len(list(run)), _style(*pair)) for pair, run in pairs if pair[0] != _NOTHING]

    def _row(self, row: int) -> list[int]:
        assert self._cells is not None
        start = row * self.columns
        kinds: list[int] = self._cells.kinds[start : start + self.columns].tolist()
        place = self.cursor // self._cells.blocks_per_cell - start
        if self.cursor >= 0 and 0 <= place < len(kinds):
            kinds[place] = _CURSOR
        return kinds + [_NOTHING] * (self.columns - len(kinds))

    def _move(self, block: int) -> None:
        if self.snapshot is not None and self.snapshot.total_blocks:
            self.cursor = min(max(0, block), self.snapshot.total_blocks - 1)

    def action_walk(self, right: int, down: int) -> None:
        """Move the cursor by cells."""
        step = (right + down * self.columns) * self.blocks_per_cell
        self._move(0 if self.cursor < 0 else self.cursor + step)

    def action_jump(self, block: int) -> None:
        """Move the cursor to the first or the last block."""
        if self.snapshot is not None:
            self._move(block % max(1, self.snapshot.total_blocks))

    def on_mouse_move(self, event: events.MouseMove) -> None:
        """Follow the mouse."""
        self._point(event.x, event.y)

    def on_click(self, event: events.Click) -> None:
        """Point at a cell."""
        self._point(event.x, event.y)

    def _point(self, x: int, y: int) -> None:
        place = y * self.columns + x // len(self.cell) if self.cell else 2 * y * self.columns + x
        block = place * self.blocks_per_cell
        if self.snapshot is not None and 0 <= block < self.snapshot.total_blocks:
            self.cursor = block
