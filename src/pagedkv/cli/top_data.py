"""Snapshots as rows, rates and cells, and where they come from: a server or a recorded file."""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from pagedkv.cli.terminal import Failure
from pagedkv.format import duration, format_bytes

if TYPE_CHECKING:
    import httpx
    import numpy as np
    import numpy.typing as npt

    from pagedkv.engine.snapshot import EngineSnapshot, EngineStats, RequestRecord
    from pagedkv.tiers.rung import TierFigures


# Rows, lines and cells of the map, as pure functions of a frozen snapshot.

FAINT = 8
"""Added to the kind of a cell that does not stand out while others do."""
MAX_HOLDERS = 4
SHORT = 24


@dataclass(frozen=True)
class Column:
    """A column of the table of requests: what it is sorted by, and the text that is shown of it.

    Numbers stand to the right, and the largest comes first.
    """

    name: str
    value: Callable[[RequestRecord], Any]
    text: Callable[[Any], str] = "{:,}".format
    is_number: bool = True


def short_id(request_id: str) -> str:
    """Return as much of an id as tells it from others."""
    return request_id if len(request_id) <= SHORT else f"{request_id[: SHORT - 1]}…"


COLUMNS = (
    Column("request", lambda r: r.request_id, str, False),
    Column("state", lambda r: r.state, str, False),
    Column("prompt", lambda r: r.prompt_tokens),
    Column("cached", lambda r: r.cached_tokens),
    Column("written", lambda r: r.output_tokens),
    Column("blocks", lambda r: r.blocks),
    Column("priority", lambda r: r.priority),
    Column("preempted", lambda r: r.num_preemptions),
    Column("age", lambda r: r.age, duration),
)


def request_rows(
    snapshot: EngineSnapshot, sort: str = "age", is_reversed: bool = False, wanted: str = ""
) -> list[tuple[str, ...]]:
    """Return one row a request that has `wanted` in its id or state, a text for each of `COLUMNS`.

    They are sorted by the column that `sort` names, texts up and numbers down; ties go by request id.
    """
    column = next(column for column in COLUMNS if column.name == sort)
    wanted = wanted.casefold()
    chosen = [r for r in snapshot.requests if wanted in r.request_id.casefold() or wanted in r.state]
    chosen.sort(key=lambda r: r.request_id)
    chosen.sort(key=column.value, reverse=column.is_number != is_reversed)
    return [tuple(each.text(each.value(record)) for each in COLUMNS) for record in chosen]


def block_line(snapshot: EngineSnapshot, block: int) -> str:
    """Return what there is to say about a block."""
    from pagedkv.control.types import BLOCK_KINDS, FREE

    kind, count = int(snapshot.kinds[block]), int(snapshot.ref_count[block])
    said = [BLOCK_KINDS[kind]]
    if count:
        times = "" if count == 1 else f"{count:,} times "
        said.append(f"held {times}by {_holders(snapshot, block)}")
    if kind != FREE:
        said += [f"depth {snapshot.depth[block]:,}", _last_use(snapshot, int(snapshot.age[block]))]
    return f"Block {block:,}: {', '.join(said)}"


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

    A cell has the kind that most of its blocks have, `FAINT` added where it does not stand out.
    """

    kinds: npt.NDArray[np.uint8]  # [num_cells]
    blocks_per_cell: int


def fold(snapshot: EngineSnapshot, room: int, near: str | None = None) -> MapCells:
    """Fold the pool into at most `room` cells, equally many blocks in each but the last.

    The blocks of the request that `near` names stand out.
    """
    import numpy as np

    from pagedkv.control.types import BLOCK_KINDS

    per_cell = max(1, -(-snapshot.total_blocks // room))
    num_cells, num_kinds = -(-snapshot.total_blocks // per_cell), len(BLOCK_KINDS)
    cell = np.arange(snapshot.total_blocks) // per_cell
    counts = np.bincount(cell * num_kinds + snapshot.kinds, minlength=num_cells * num_kinds)
    kinds = counts.reshape(num_cells, num_kinds).argmax(1).astype(np.uint8)
    place = next((i for i, r in enumerate(snapshot.requests) if r.request_id == near), None)
    if place is not None and snapshot.requests[place].blocks:
        mine = snapshot.blocks_of(place)
        kinds += np.uint8(FAINT)
        kinds[mine // per_cell] = snapshot.kinds[mine]
    return MapCells(kinds, per_cell)


BAND = 24


def tier_line(tier: TierFigures, before: TierFigures, seconds: float) -> str:
    """Return what there is to say of a tier, its counters before that many seconds for the rates."""
    filled = "blocks not told"
    if tier.total_blocks:
        full = round(BAND * tier.blocks / tier.total_blocks)
        filled = f"{'█' * full}{'░' * (BAND - full)}  {tier.blocks:,} of {tier.total_blocks:,} blocks"
    read, written = (
        format_bytes(max(0, getattr(tier, name) - getattr(before, name)) / seconds)
        for name in ("read_bytes", "written_bytes")
    )
    said = [filled, f"reads {read}/s", f"writes {written}/s", f"{tier.hits:,} hits"]
    said += [f"{count:,} {word}" for count, word in ((tier.corrupt, "corrupt"), (tier.failed, "failed")) if count]
    return f"{tier.medium:<7}{'  '.join(said)}"


# Rates, from one snapshot to the next.

POINTS = 240
RATE_SECONDS = 2.0
HIT_SECONDS = 30.0


@dataclass(frozen=True)
class Figures:
    """What the tiles show: fractions, requests, and rates over the last two seconds or so."""

    usage: float
    running: int
    waiting: int
    hit_rate: float
    tokens_per_second: float
    reclaimed_per_second: float
    preemptions: int


class History:
    """The snapshots' counters, as far back as the figures need."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, EngineStats]] = deque()
        self.figures: deque[Figures] = deque(maxlen=POINTS)

    def add(self, snapshot: EngineSnapshot) -> Figures:
        """Take a snapshot and return the figures; one from before the last begins a new history."""
        if self._seen and snapshot.taken < self._seen[-1][0]:
            self._seen.clear()
            self.figures.clear()
        self._seen.append((snapshot.taken, snapshot.stats))
        while len(self._seen) > 2 and snapshot.taken - self._seen[1][0] >= HIT_SECONDS:
            self._seen.popleft()
        figures = self._figures(snapshot)
        self.figures.append(figures)
        return figures

    def course(self, name: str) -> list[float]:
        """Return a figure over time, the newest last."""
        return [float(getattr(figures, name)) for figures in self.figures]

    def tier_lines(self) -> list[str]:
        """Return a line for each tier of the last snapshot: how full it is, reads, writes and hits."""
        (now, stats), (then, before) = self._seen[-1], self._since(RATE_SECONDS)
        seconds = max(now - then, 1e-9)
        pairs = zip_longest(stats.tiers, before.tiers[: len(stats.tiers)])
        return [tier_line(tier, tier if earlier is None else earlier, seconds) for tier, earlier in pairs]

    def _figures(self, snapshot: EngineSnapshot) -> Figures:
        stats = snapshot.stats
        then, before = self._since(RATE_SECONDS)
        seconds = max(snapshot.taken - then, 1e-9)
        return Figures(
            usage=stats.blocks_used / stats.blocks_total if stats.blocks_total else 0.0,
            running=stats.num_running,
            waiting=stats.num_waiting,
            hit_rate=self._hit_rate(stats),
            tokens_per_second=max(0, stats.generation_tokens - before.generation_tokens) / seconds,
            reclaimed_per_second=max(0, stats.reclaimed - before.reclaimed) / seconds,
            preemptions=stats.num_preemptions,
        )

    def _hit_rate(self, stats: EngineStats) -> float:
        _, before = self._since(HIT_SECONDS)
        asked = stats.prefix_queries - before.prefix_queries
        if asked > 0:
            return (stats.prefix_hits - before.prefix_hits) / asked
        return stats.prefix_hits / stats.prefix_queries if stats.prefix_queries else 0.0

    def _since(self, seconds: float) -> tuple[float, EngineStats]:
        """Return the newest counters that are at least so old, or the oldest there are."""
        now = self._seen[-1][0]
        return next((entry for entry in reversed(self._seen) if now - entry[0] >= seconds), self._seen[0])


# Sources of snapshots: a server, or a recorded file.

MAX_FRAME_BYTES = 2**30
TIMEOUT = 10.0


class ServerSource:
    """Asks a server at ``http://host:port``, a path before ``/v1`` included, with an API key if one is given."""

    is_live = True

    def __init__(self, address: str, key: str | None = None, transport: httpx.BaseTransport | None = None) -> None:
        import httpx

        self.name = address
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._client = httpx.Client(base_url=address, headers=headers, timeout=TIMEOUT, transport=transport)

    def next(self) -> EngineSnapshot:
        """Return a snapshot of now; `Failure` where there is no server, or it wants another key."""
        import httpx

        from pagedkv.engine.snapshot import decode

        try:
            answer = self._client.get("v1/cache/snapshot")
        except httpx.HTTPError as error:
            raise Failure(f"no answer from {self.name}: {error}") from None
        if answer.status_code in (401, 403):
            raise Failure(f"{self.name} wants an operator's key: --api-key, or PAGEDKV_API_KEY in the environment")
        if answer.status_code != 200:
            raise Failure(f"{self.name} answered {answer.status_code}: is it a pagedkv server?")
        return decode(answer.content)

    def close(self) -> None:
        """Close the connection."""
        self._client.close()


class SnapshotFile:
    """Reads the snapshots of a file in order: one of ``--record``, or a single one of ``/v1/cache/snapshot``."""

    is_live = False

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self.place = -1  # of the snapshot that was given last
        self._path = path
        self._frames = [*_frames(path)]
        if not self._frames:
            raise Failure(f"{path}: there is no snapshot in it")

    def __len__(self) -> int:
        return len(self._frames)

    def next(self) -> EngineSnapshot | None:
        """Return the next snapshot; None after the last one."""
        return self.step(1)

    def step(self, by: int) -> EngineSnapshot | None:
        """Return the snapshot so many places on or back; None beyond the ends."""
        from pagedkv.engine.snapshot import decode

        place = self.place + by
        if not 0 <= place < len(self._frames):
            return None
        self.place = place
        start, size = self._frames[place]
        with self._path.open("rb") as file:
            file.seek(start)
            return decode(file.read(size))

    def close(self) -> None:
        """Nothing is open between two reads."""


class Recording:
    """Appends snapshots to a file that is begun anew."""

    def __init__(self, path: Path) -> None:
        try:
            self._file: BinaryIO = path.open("wb")
        except OSError as error:
            raise Failure(f"{path}: cannot be written: {error.strerror}") from None

    def add(self, snapshot: EngineSnapshot) -> None:
        """Append a snapshot, complete at once."""
        from pagedkv.control.events import BIN_32
        from pagedkv.engine.snapshot import encode

        data = encode(snapshot)
        self._file.write(struct.pack(">BI", BIN_32, len(data)) + data)
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _frames(path: Path) -> Iterator[tuple[int, int]]:
    """Yield (offset, bytes) of each snapshot; what a recording that was cut short left at the end is skipped."""
    from pagedkv.control.events import BIN_32

    try:
        total = path.stat().st_size
        with path.open("rb") as file:
            place, first = 0, file.read(1)
            if first and first[0] != BIN_32:
                yield 0, total
                return
            while place + 5 <= total:
                file.seek(place)
                kind, size = struct.unpack(">BI", file.read(5))
                if kind != BIN_32 or size > MAX_FRAME_BYTES:
                    raise Failure(f"{path}: no snapshot begins at byte {place:,}")
                if place + 5 + size <= total:
                    yield place + 5, size
                place += 5 + size
    except OSError as error:
        raise Failure(f"{path}: cannot be read: {error.strerror}") from None


Source = ServerSource | SnapshotFile


def open_source(target: str, key: str | None = None) -> Source:
    """Return the source that a word of the command line means: an address, or else a file."""
    if target.startswith(("http://", "https://")):
        return ServerSource(target, key)
    path = Path(target)
    if not path.exists() and (target.startswith("localhost") or ":" in target):
        return ServerSource(f"http://{target}", key)
    return SnapshotFile(path)
