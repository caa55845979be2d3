"""Screen of ``pagedkv top``: the block map widget, tiles and the table of requests."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from itertools import groupby
from typing import TYPE_CHECKING, Any, ClassVar

from rich.segment import Segment
from rich.style import Style
from rich.text import Text
from textual import events
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.css.query import NoMatches
from textual.message import Message
from textual.reactive import reactive
from textual.screen import ModalScreen
from textual.strip import Strip
from textual.widget import Widget
from textual.widgets import DataTable, Footer, Input, Sparkline, Static
from textual.worker import Worker, WorkerState

from pagedkv.cli.top_data import (
    COLUMNS,
    FAINT,
    Figures,
    History,
    MapCells,
    Recording,
    SnapshotFile,
    Source,
    block_line,
    fold,
    request_rows,
    short_id,
)
from pagedkv.errors import PagedKvError

if TYPE_CHECKING:
    from pagedkv.engine.snapshot import EngineSnapshot


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

    _cells: MapCells | None = None

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

    def watch_cursor(self) -> None:
        """Draw the cursor elsewhere."""
        self.refresh()
        self.post_message(self.Walked(self.cursor))

    def on_resize(self) -> None:
        """Fold the pool into the room that there is."""
        if self.snapshot is None or not self.size.height:
            return
        before = self.blocks_per_cell
        rows = self.size.height if self.cell else 2 * self.size.height
        self._cells = fold(self.snapshot, self.columns * rows, self.near)
        self.refresh()
        if self.blocks_per_cell != before:
            self.post_message(self.Folded())

    watch_snapshot = watch_near = on_resize

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

    def on_mouse_move(self, event: events.MouseEvent) -> None:
        """Follow the mouse."""
        x, y = event.x, event.y
        place = y * self.columns + x // len(self.cell) if self.cell else 2 * y * self.columns + x
        block = place * self.blocks_per_cell
        if self.snapshot is not None and 0 <= block < self.snapshot.total_blocks:
            self.cursor = block

    on_click = on_mouse_move


_KEYS = (
    ("Tab", "from the table to the map and back"),
    ("↑ ↓ ← →", "walk over the blocks, or the rows"),
    ("Enter", "let the blocks of a request stand out; again: all"),
    ("s  S", "sort by the next column, by the one before"),
    ("r", "the other way round"),
    ("/", "show only requests with this in their id or state"),
    ("Esc", "show all again"),
    ("p  Space", "hold still, go on"),
    (",  .", "one snapshot back, one on, in a recorded file"),
    ("d", "dark or light"),
    ("q", "leave"),
)
_KINDS = (
    ("free", "holds nothing"),
    ("active", "held by one sequence"),
    ("shared", "held by several: a common prefix, a fork"),
    ("cached", "not held, still findable, first to be reclaimed"),
    ("pinned", "never reclaimed"),
)


class HelpScreen(ModalScreen[None]):
    """Keys and colours; any of its keys closes it."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,question_mark,h,f1,q,enter", "app.pop_screen", "Close"),
    ]

    def compose(self) -> ComposeResult:
        """Lay out the text."""
        words = Text("Keys\n", style="bold")
        for key, meaning in _KEYS:
            words.append(f"  {key:<9} ", "bold").append(f"{meaning}\n", "not bold")
        words.append("\nBlocks\n", "bold")
        for (kind, meaning), colour in zip(_KINDS, COLOURS, strict=True):
            words.append("  ■ ", colour).append(f"{kind:<7} ", "bold").append(f"{meaning}\n", "not bold")
        words.append("\nA cell of several blocks has the colour of most of them.", "not bold dim")
        with VerticalScroll(id="help"):
            yield Static(words)


_TILES: tuple[tuple[str, str, Callable[[Figures], str]], ...] = (
    ("usage", "Blocks in use", lambda f: f"{f.usage:.0%}"),
    ("running", "Requests", lambda f: f"{f.running:,} running, {f.waiting:,} waiting"),
    ("hit_rate", "Prefix hit rate", lambda f: f"{f.hit_rate:.0%} of prompt tokens"),
    ("tokens_per_second", "Tokens per second", lambda f: f"{f.tokens_per_second:,.0f}"),
    (
        "reclaimed_per_second",
        "Reclaimed per second",
        lambda f: f"{f.reclaimed_per_second:,.0f}, {f.preemptions:,} preempted",
    ),
)


class TopApp(App[str | None]):
    """The pool, the requests and the rates of a source, every `interval` seconds; a recording takes what is shown."""

    CSS_PATH = "top.tcss"
    TITLE = "pagedkv top"
    ENABLE_COMMAND_PALETTE = False
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("q", "quit", "Quit"),
        Binding("p,space", "pause", "Pause"),
        Binding("s", "sort(1)", "Sort"),
        Binding("S", "sort(-1)", "Sort back", show=False),
        Binding("r", "reverse", "Reverse"),
        Binding("slash", "filter", "Filter"),
        Binding("escape", "clear", "All", show=False),
        Binding("comma", "step(-1)", "Back"),
        Binding("full_stop", "step(1)", "On"),
        Binding("d", "shade", "Dark/light"),
        Binding("question_mark,h,f1", "help", "Help"),
    ]

    def __init__(self, source: Source, interval: float = 0.5, recording: Recording | None = None) -> None:
        super().__init__()
        self.source, self.interval, self.recording = source, interval, recording
        self.history = History()
        self.snapshot: EngineSnapshot | None = None
        self.sort, self.is_reversed, self.wanted = "age", False, ""
        self.is_paused = self._is_asking = self._is_at_end = False
        self._trouble = ""

    def compose(self) -> ComposeResult:
        """Lay out the view."""
        yield Static(id="about")
        with Horizontal(id="tiles"):
            for name, title, _ in _TILES:
                with Vertical(classes="tile"):
                    yield Static(title, classes="title")
                    yield Static("–", id=f"figure-{name}", classes="figure")
                    yield Sparkline([], id=f"course-{name}")
        yield Static(id="legend")
        yield BlockMapView(id="map")
        yield Static(id="tiers", markup=False)
        yield Static(id="block")
        table: DataTable[Any] = DataTable(id="requests", cursor_type="row", zebra_stripes=True)
        yield table
        yield Input(placeholder="part of a request id, running, waiting", id="filter")
        yield Footer()

    def on_mount(self) -> None:
        """Ask for the first snapshot."""
        self._view = self.screen  # the help may lie above it while snapshots come
        table = self._view.query_one(DataTable)
        for column in COLUMNS:
            table.add_column(column.name.capitalize(), key=column.name)
        self._view.query_one("#filter").display = False
        table.focus()
        self.set_interval(self.interval, self.ask)
        self.ask()

    def ask(self) -> None:
        """Ask for the next snapshot, unless one is on its way; a server may be slow, the keys never are."""
        if not (self.is_paused or self._is_asking or self._is_at_end):
            self._is_asking = True
            self.run_worker(self.source.next, thread=True, exit_on_error=False, group="source")

    def on_worker_state_changed(self, event: Worker.StateChanged) -> None:
        """Take what the source gave."""
        if event.worker.group != "source" or not event.worker.is_finished:
            return
        self._is_asking = False
        with suppress(NoMatches):  # when the view is being left, its widgets go one by one
            self._take(event)

    def _take(self, event: Worker.StateChanged) -> None:
        if event.state is WorkerState.ERROR:
            self._fail(event.worker.error)
        elif event.state is WorkerState.SUCCESS:
            self._trouble = ""
            if event.worker.result is None:
                self._is_at_end = True
                self._draw_about()
            else:
                self.show(event.worker.result)

    def _fail(self, error: BaseException | None) -> None:
        if isinstance(error, Exception) and not isinstance(error, PagedKvError):
            raise error
        if self.snapshot is None:
            self.exit(str(error))  # there was nothing to see yet: the command says why
        self._trouble = str(error)
        self._draw_about()

    def show(self, snapshot: EngineSnapshot) -> None:
        """Draw a snapshot."""
        self.snapshot = snapshot
        if self.recording is not None:
            self.recording.add(snapshot)
        figures = self.history.add(snapshot)
        self._draw_tiles(figures)
        self._draw_legend(snapshot)
        self._draw_requests()
        self._draw_tiers()
        view = self._view.query_one(BlockMapView)
        view.snapshot = snapshot
        self._draw_block(view.cursor)
        self._draw_about()

    def _draw_about(self) -> None:
        state = "paused" if self.is_paused else "live" if self.source.is_live else "recorded"
        if isinstance(self.source, SnapshotFile):
            state = f"{state}, {self.source.place + 1} of {len(self.source)}"
        if self._trouble:
            state = self._trouble
        words = Text.assemble(("pagedkv top", "bold"), f"  {self.source.name}  ", (f"● {state}", "bold"))
        if self.snapshot is not None:
            words.append(f"  {self.snapshot.strategy}, blocks of {self.snapshot.block_size} tokens", "dim")
        if self.recording is not None:
            words.append("  recording", "bold")
        self._view.query_one("#about", Static).update(words)

    def _draw_tiles(self, figures: Figures) -> None:
        for name, _, text in _TILES:
            self._view.query_one(f"#figure-{name}", Static).update(text(figures))
            self._view.query_one(f"#course-{name}", Sparkline).data = self.history.course(name)

    def _draw_legend(self, snapshot: EngineSnapshot) -> None:
        words = Text()
        for (kind, count), colour in zip(snapshot.counts().items(), COLOURS, strict=True):
            words.append("■ ", colour).append(f"{kind} ").append(f"{count:,}   ", "bold")
        per_cell = self._view.query_one(BlockMapView).blocks_per_cell
        words.append("a cell is a block" if per_cell == 1 else f"a cell is {per_cell:,} blocks", "dim")
        self._view.query_one("#legend", Static).update(words)

    def _draw_tiers(self) -> None:
        lines, bands = self.history.tier_lines(), self._view.query_one("#tiers", Static)
        bands.display = bool(lines)
        bands.update("\n".join(lines))

    def _draw_requests(self) -> None:
        if self.snapshot is None:
            return
        table = self._view.query_one(DataTable)
        rows = request_rows(self.snapshot, self.sort, self.is_reversed, self.wanted)
        for column, head in zip(COLUMNS, table.ordered_columns, strict=True):
            mark = ("▲" if self.is_reversed == column.is_number else "▼") if column.name == self.sort else ""
            head.label = Text(
                f"{column.name.capitalize()} {mark}".strip(), justify="right" if column.is_number else "left"
            )
        chosen, offset = self._chosen(), table.scroll_offset
        table.clear()
        for row in rows:
            shown = (short_id(row[0]), *row[1:])
            cells = [Text(t, justify="right" if c.is_number else "left") for t, c in zip(shown, COLUMNS, strict=True)]
            table.add_row(*cells, key=row[0])
        place = next((i for i, row in enumerate(rows) if row[0] == chosen), None)
        if place is not None:
            table.move_cursor(row=place, scroll=False)
        table.scroll_to(offset.x, offset.y, animate=False)

    def _chosen(self) -> str | None:
        table = self._view.query_one(DataTable)
        if not table.row_count or not table.is_valid_row_index(table.cursor_row):
            return None
        return table.coordinate_to_cell_key((table.cursor_row, 0)).row_key.value  # type: ignore[arg-type]

    def _draw_block(self, block: int) -> None:
        snapshot, line = self.snapshot, "Tab to the map and walk with the arrow keys"
        if snapshot is not None and 0 <= block < snapshot.total_blocks:
            line = block_line(snapshot, block)
        self._view.query_one("#block", Static).update(line)

    def on_block_map_view_folded(self) -> None:
        """Say how many blocks a cell is now."""
        if self.snapshot is not None:
            self._draw_legend(self.snapshot)

    def on_block_map_view_walked(self, event: BlockMapView.Walked) -> None:
        """Say what the cursor stands on, and let its owner stand out."""
        self._draw_block(event.block)
        if self.snapshot is not None and event.block < self.snapshot.total_blocks:
            owner = int(self.snapshot.owner[event.block])
            self._view.query_one(BlockMapView).near = self.snapshot.requests[owner].request_id if owner >= 0 else None

    def on_data_table_row_selected(self, event: DataTable.RowSelected) -> None:
        """Let the blocks of a request stand out, or all again."""
        view = self._view.query_one(BlockMapView)
        view.near = None if view.near == event.row_key.value else event.row_key.value

    def on_input_changed(self, event: Input.Changed) -> None:
        """Filter as it is typed."""
        self.wanted = event.value
        self._draw_requests()

    def on_input_submitted(self) -> None:
        """Go back to the table, filtered."""
        self._view.query_one(DataTable).focus()

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Offer steps only where there is a file to step through."""
        return action != "step" or isinstance(self.source, SnapshotFile)

    def action_pause(self) -> None:
        """Hold still, or go on."""
        self.is_paused = not self.is_paused
        self._draw_about()

    def action_sort(self, by: int) -> None:
        """Sort by the next column."""
        names = [column.name for column in COLUMNS]
        self.sort = names[(names.index(self.sort) + by) % len(names)]
        self._draw_requests()

    def action_reverse(self) -> None:
        """Sort the other way round."""
        self.is_reversed = not self.is_reversed
        self._draw_requests()

    def action_filter(self) -> None:
        """Ask for a part of a request id."""
        field = self._view.query_one("#filter", Input)
        field.display = True
        field.focus()

    def action_clear(self) -> None:
        """Show all requests and all blocks alike."""
        field = self._view.query_one("#filter", Input)
        field.value = ""
        field.display = False
        self._view.query_one(BlockMapView).near = None
        self._view.query_one(DataTable).focus()

    def action_step(self, by: int) -> None:
        """Go through a recorded file by hand."""
        assert isinstance(self.source, SnapshotFile)
        self.is_paused, self._is_at_end = True, False
        snapshot = self.source.step(by)
        if snapshot is not None:
            self.show(snapshot)
        self._draw_about()

    def action_shade(self) -> None:
        """Change between dark and light."""
        self.theme = "textual-light" if self.theme == "textual-dark" else "textual-dark"

    def action_help(self) -> None:
        """Explain the keys and the colours."""
        self.push_screen(HelpScreen())
