"""Where ``pagedkv top`` gets its snapshots: a server, or a file that holds some."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Protocol

from pagedkv.cli.terminal import Failure

if TYPE_CHECKING:
    import httpx

    from pagedkv.engine.snapshot_types import EngineSnapshot

__all__ = ["Recording", "ServerSource", "SnapshotFile", "Source", "open_source"]

BIN_32 = 0xC6
MAX_FRAME_BYTES = 2**30
TIMEOUT = 10.0


class Source(Protocol):
    """Gives snapshots, one a call.

    Attributes
    ----------
    name : str
    is_live : bool
        Whether the next snapshot is a new one of a running engine.
    """

    name: str
    is_live: bool

    def next(self) -> EngineSnapshot | None:
        """Return the next snapshot; None after the last one."""

    def close(self) -> None:
        """Give back what is open."""


class ServerSource:
    """Asks a server.

    Parameters
    ----------
    address : str
        ``http://host:port``, a path before ``/v1`` included.
    key : str, optional
        The API key.
    transport : httpx.BaseTransport, optional
        Something else than the network.
    """

    is_live = True

    def __init__(self, address: str, key: str | None = None, transport: httpx.BaseTransport | None = None) -> None:
        import httpx

        self.name = address
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._client = httpx.Client(base_url=address, headers=headers, timeout=TIMEOUT, transport=transport)

    def next(self) -> EngineSnapshot:
        """Return a snapshot of now.

        Raises
        ------
        Failure
            There is no server, or it wants another key.
        """
        import httpx

        from pagedkv.engine.snapshot_wire import decode

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
    """Reads the snapshots of a file in order: one of ``--record``, or a single one of ``/v1/cache/snapshot``.

    Parameters
    ----------
    path : Path

    Raises
    ------
    Failure
        There is no snapshot in it.
    """

    is_live = False

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._path = path
        self._frames = [*_frames(path)]
        if not self._frames:
            raise Failure(f"{path}: there is no snapshot in it")
        self._place = -1

    def __len__(self) -> int:
        return len(self._frames)

    @property
    def place(self) -> int:
        """Which snapshot was given last."""
        return self._place

    def next(self) -> EngineSnapshot | None:
        """Return the next snapshot; None after the last one."""
        return self.step(1)

    def step(self, by: int) -> EngineSnapshot | None:
        """Return the snapshot so many places on or back; None beyond the ends."""
        from pagedkv.engine.snapshot_wire import decode

        place = self._place + by
        if not 0 <= place < len(self._frames):
            return None
        self._place = place
        start, size = self._frames[place]
        with self._path.open("rb") as file:
            file.seek(start)
            return decode(file.read(size))

    def close(self) -> None:
        """Nothing is open between two reads."""


class Recording:
    """Appends snapshots to a file.

    Parameters
    ----------
    path : Path
        Begun anew.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._file: BinaryIO = path.open("wb")
        except OSError as error:
            raise Failure(f"{path}: cannot be written: {error.strerror}") from None

    def add(self, snapshot: EngineSnapshot) -> None:
        """Append a snapshot, complete at once."""
        from pagedkv.engine.snapshot_wire import encode

        data = encode(snapshot)
        self._file.write(struct.pack(">BI", BIN_32, len(data)) + data)
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _frames(path: Path) -> Iterator[tuple[int, int]]:
    """Yield (offset, bytes) of each snapshot; what a recording that was cut short left at the end is let go."""
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


def open_source(target: str, key: str | None = None) -> Source:
    """Return the source that a word of the command line means: an address, or else a file."""
    if target.startswith(("http://", "https://")):
        return ServerSource(target, key)
    path = Path(target)
    if not path.exists() and (target.startswith("localhost") or ":" in target):
        return ServerSource(f"http://{target}", key)
    return SnapshotFile(path)
