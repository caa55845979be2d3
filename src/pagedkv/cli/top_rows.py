"""What ``pagedkv top`` shows, as pure functions of a frozen snapshot: rows, lines, and the cells of the map."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from pagedkv.engine.snapshot_types import EngineSnapshot, RequestRecord

__all__ = ["COLUMNS", "FAINT", "Column", "MapCells", "block_line", "duration", "fold", "request_rows", "short_id"]

FAINT = 8
"""Added to the kind of a cell that does not stand out while others do."""
MAX_HOLDERS = 4
SHORT = 24


@dataclass(frozen=True)
class Column:
    """A column of the table of requests.

    Attributes
    ----------
    name, title : str
    value : callable
        RequestRecord to what it is sorted by.
    text : callable
        The value to what is shown.
    is_number : bool
        Numbers stand to the right, and the largest comes first.
    """

    name: str
    title: str
    value: Callable[[RequestRecord], Any]
    text: Callable[[Any], str] = "{:,}".format
    is_number: bool = True


def duration(seconds: float) -> str:
    """Return seconds as a few characters."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def short_id(request_id: str) -> str:
    """Return as much of an id as tells it from others."""
    return request_id if len(request_id) <= SHORT else f"{request_id[: SHORT - 1]}…"


COLUMNS = (
    Column("request", "Request", lambda r: r.request_id, str, False),
    Column("state", "State", lambda r: r.state, str, False),
    Column("prompt", "Prompt", lambda r: r.prompt_tokens),
    Column("cached", "Cached", lambda r: r.cached_tokens),
    Column("written", "Written", lambda r: r.output_tokens),
    Column("blocks", "Blocks", lambda r: r.blocks),
    Column("priority", "Priority", lambda r: r.priority),
    Column("preempted", "Preempted", lambda r: r.num_preemptions),
    Column("age", "Age", lambda r: r.age, duration),
)


def request_rows(
    snapshot: EngineSnapshot, sort: str = "age", is_reversed: bool = False, wanted: str = ""
) -> list[tuple[str, ...]]:
    """Return one row a request, a text for each of `COLUMNS`.

    Parameters
    ----------
    snapshot : EngineSnapshot
    sort : str
        Name of a column; texts ascend, numbers descend. Ties go by request id.
    is_reversed : bool
        The other way round.
    wanted : str
        Only requests that have this in their id or state.
    """
    column = next(column for column in COLUMNS if column.name == sort)
    wanted = wanted.casefold()
    chosen = [r for r in snapshot.requests if wanted in r.request_id.casefold() or wanted in r.state]
    chosen.sort(key=lambda r: r.request_id)
    chosen.sort(key=column.value, reverse=column.is_number != is_reversed)
    return [tuple(each.text(each.value(record)) for each in COLUMNS) for record in chosen]


def block_line(snapshot: EngineSnapshot, block: int) -> str:
    """Return what there is to say about a block."""
    from pagedkv.engine.snapshot_types import FREE, KINDS

    kind, count = int(snapshot.kinds[block]), int(snapshot.ref_count[block])
    said = [KINDS[kind]]
    if count:
        said.append(f"held by {_holders(snapshot, block)}" if count == 1 else f"held {count:,} times")
    if count > 1:
        said.append(f"by {_holders(snapshot, block)}")
    if kind != FREE:
        said += [f"depth {snapshot.depth[block]:,}", _last_use(snapshot, int(snapshot.age[block]))]
    return f"Block {block:,}: {', '.join(said)}".replace(" times, by", " times by")


def _last_use(snapshot: EngineSnapshot, age: int) -> str:
    seconds = snapshot.seconds_since(age)
    if seconds is not None:
        return f"last used {duration(seconds)} ago"
    return f"last used {age:,} ticks ago" if age else "used right now"


def _holders(snapshot: EngineSnapshot, block: int) -> str:
    names = [short_id(r.request_id) for place, r in enumerate(snapshot.requests) if block in snapshot.blocks_of(place)]
    shown = ", ".join(names[:MAX_HOLDERS]) or "a request that ended"
    return shown if len(names) <= MAX_HOLDERS else f"{shown} and {len(names) - MAX_HOLDERS} more"


@dataclass(frozen=True, eq=False)
class MapCells:
    """The pool, folded into as many cells as a terminal has room for.

    Attributes
    ----------
    kinds : uint8 [num_cells]
        The kind that most blocks of a cell have, `FAINT` added where the cell does not stand out.
    blocks_per_cell : int
    """

    kinds: npt.NDArray[np.uint8]
    blocks_per_cell: int


def fold(snapshot: EngineSnapshot, room: int, near: str | None = None) -> MapCells:
    """Fold the pool into at most `room` cells, equally many blocks in each but the last.

    Parameters
    ----------
    snapshot : EngineSnapshot
    room : int
        At least 1.
    near : str, optional
        The request whose blocks stand out.
    """
    import numpy as np

    from pagedkv.engine.snapshot_types import KINDS

    total = snapshot.total_blocks
    per_cell = max(1, -(-total // room))
    place = next((i for i, r in enumerate(snapshot.requests) if r.request_id == near), None)
    if per_cell == 1:
        kinds = snapshot.kinds.copy()
    else:
        cell = np.arange(total) // per_cell
        counts = np.bincount(cell * len(KINDS) + snapshot.kinds, minlength=-(-total // per_cell) * len(KINDS))
        kinds = counts.reshape(-1, len(KINDS)).argmax(1).astype(np.uint8)
    if place is not None and snapshot.requests[place].blocks:
        mine = snapshot.blocks_of(place)
        own = kinds[mine // per_cell] if per_cell == 1 else snapshot.kinds[mine]
        kinds = kinds + np.uint8(FAINT)
        kinds[mine // per_cell] = own
    return MapCells(kinds, per_cell)
