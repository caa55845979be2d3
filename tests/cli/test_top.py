"""pagedkv top: pure rows, the history of rates, sources and recordings, and the app under Textual's pilot."""

from __future__ import annotations

import asyncio
import dataclasses

import httpx
import numpy as np
import pytest

pytest.importorskip("textual")
pytest.importorskip("fastapi")

from tests.cli.commands import call
from tests.server.fake_snapshots import FakeEngine
from textual.widgets import DataTable, Input, Static

from pagedkv.cli.terminal import Failure
from pagedkv.cli.top_data import (
    COLUMNS,
    FAINT,
    History,
    Recording,
    ServerSource,
    SnapshotFile,
    block_line,
    fold,
    open_source,
    request_rows,
    short_id,
)
from pagedkv.cli.top_screen import BlockMapView, HelpScreen, TopApp
from pagedkv.control.types import BLOCK_KINDS, CACHED, FREE, SHARED
from pagedkv.engine.snapshot import encode
from pagedkv.format import duration
from pagedkv.tiers.rung import TierFigures


@pytest.fixture(scope="module")
def snapshots():
    """Twenty snapshots, half a second apart."""
    engine, taken = FakeEngine(512), []
    for number in range(20):
        for _ in range(4):
            engine.step()
        taken.append(dataclasses.replace(engine.snapshot(), taken=1000 + number / 2))
    return taken


@pytest.fixture
def recorded(tmp_path, snapshots):
    recording = Recording(tmp_path / "pool.snapshots")
    for snapshot in snapshots:
        recording.add(snapshot)
    recording.close()
    return tmp_path / "pool.snapshots"


def numbers(rows, name):
    place = [column.name for column in COLUMNS].index(name)
    return [row[place] for row in rows]


def test_rows_are_sorted_and_filtered(snapshots):
    snapshot = snapshots[-1]
    by_written = [int(t) for t in numbers(request_rows(snapshot, "written"), "written")]
    assert by_written == sorted(by_written, reverse=True) and len(by_written) == len(snapshot.requests)
    assert [int(t) for t in numbers(request_rows(snapshot, "written", True), "written")] == sorted(by_written)
    names = numbers(request_rows(snapshot, "request"), "request")
    assert names == sorted(r.request_id for r in snapshot.requests)
    assert {*numbers(request_rows(snapshot, wanted="WAITING"), "state")} == {"waiting"}
    assert numbers(request_rows(snapshot, wanted=names[0].upper()), "request") == [names[0]]
    assert request_rows(snapshot, wanted="nobody") == []


def test_what_is_said_of_a_block(snapshots):
    snapshot = snapshots[-1]
    shared = int(np.flatnonzero(snapshot.kinds == SHARED)[0])
    line = block_line(snapshot, shared)
    assert line.startswith(f"Block {shared}: shared, held {snapshot.ref_count[shared]} times by cmpl-")
    cached = int(np.flatnonzero(snapshot.kinds == CACHED)[0])
    assert "held" not in block_line(snapshot, cached) and "depth" in block_line(snapshot, cached)
    assert f"last used {snapshot.age[cached]} ticks ago" in block_line(snapshot, cached)
    clock = ((0, 90.0 + snapshot.tick), (snapshot.tick, 90.0))
    timed = dataclasses.replace(snapshot, clock=clock)
    assert f"last used {duration(90.0 + int(snapshot.age[cached]))} ago" in block_line(timed, cached)
    empty = FakeEngine(4).snapshot()
    assert block_line(empty, 0) == "Block 0: free"


def test_long_ids_are_cut():
    assert short_id("async-1") == "async-1"
    assert short_id("chatcmpl-" + "0123456789abcdef" * 2) == "chatcmpl-0123456789abcd…"


@pytest.mark.parametrize(("seconds", "text"), [(0.04, "40 ms"), (9.96, "9.96 s"), (64, "1 min 4 s"), (600, "10 min")])
def test_durations(seconds, text):
    assert duration(seconds).replace("\u00a0", " ") == text


@pytest.mark.parametrize("room", [1, 7, 100, 511, 512, 10_000])
def test_folding_takes_the_kind_of_most_blocks(snapshots, room):
    snapshot = snapshots[-1]
    cells = fold(snapshot, room)
    size = cells.blocks_per_cell
    assert len(cells.kinds) == -(-512 // size) <= max(room, 1)
    for place, kind in enumerate(cells.kinds.tolist()):
        counts = np.bincount(snapshot.kinds[place * size : (place + 1) * size], minlength=len(BLOCK_KINDS))
        assert counts[kind] == counts.max()


def test_the_blocks_of_one_request_stand_out(snapshots):
    snapshot = snapshots[-1]
    record = snapshot.requests[0]
    cells = fold(snapshot, 512, near=record.request_id)
    bright = {*np.flatnonzero(cells.kinds < FAINT).tolist()}
    assert bright == {*snapshot.blocks_of(0).tolist()} and len(bright) > 1
    assert np.array_equal(cells.kinds % FAINT, snapshot.kinds)
    assert np.array_equal(fold(snapshot, 512, near="nobody").kinds, snapshot.kinds)


def test_the_history_gives_rates(snapshots):
    history = History()
    for snapshot in snapshots:
        figures = history.add(snapshot)
    written = snapshots[-1].stats.generation_tokens - snapshots[-5].stats.generation_tokens
    assert figures.tokens_per_second == pytest.approx(written / 2.0) and written > 0
    hits = snapshots[-1].stats.prefix_hits - snapshots[0].stats.prefix_hits
    queries = snapshots[-1].stats.prefix_queries - snapshots[0].stats.prefix_queries
    assert figures.hit_rate == pytest.approx(hits / queries) and 0 < figures.hit_rate < 1
    assert len(history.course("usage")) == 20
    history.add(snapshots[3])
    assert len(history.course("usage")) == 1, "a step back begins anew"


def with_tiers(snapshots):
    """The same snapshots with a disk that fills up and a user's tier that says nothing of its size."""
    return [
        dataclasses.replace(
            snapshot,
            stats=dataclasses.replace(
                snapshot.stats,
                tiers=(
                    TierFigures(medium="DISK", blocks=10 * i, total_blocks=400, hits=i, read_bytes=i * 2**20),
                    TierFigures(medium="REMOTE", written_bytes=i * 4096, corrupt=2),
                ),
            ),
        )
        for i, snapshot in enumerate(snapshots)
    ]


def test_tiers_are_lines_with_rates(snapshots):
    history = History()
    for snapshot in with_tiers(snapshots[:11]):
        history.add(snapshot)
    disk, remote = (line.replace("\u00a0", " ") for line in history.tier_lines())
    assert disk == f"DISK   {'█' * 6}{'░' * 18}  100 of 400 blocks  reads 2 MiB/s  writes 0 B/s  10 hits"
    assert remote == "REMOTE blocks not told  reads 0 B/s  writes 8 KiB/s  0 hits  2 corrupt"
    history.add(snapshots[11])
    assert history.tier_lines() == []


def test_tiers_stand_under_the_map(tmp_path, snapshots):
    def recorded(name, some):
        recording = Recording(tmp_path / name)
        for snapshot in some:
            recording.add(snapshot)
        recording.close()
        return SnapshotFile(tmp_path / name)

    async def two(app, pilot):
        await pilot.press("p")
        lines = text_of(app, "#tiers").splitlines()
        assert [line.split()[0] for line in lines] == ["DISK", "REMOTE"]
        map_, tiers, block = (app.query_one(name).region for name in ("#map", "#tiers", "#block"))
        assert map_.bottom <= tiers.y < block.y and tiers.height == 2

    async def none(app, pilot):
        assert not app.query_one("#tiers").display

    drive(recorded("with", with_tiers(snapshots)), two, interval=0.05)
    drive(recorded("without", snapshots), none, interval=0.05)


def test_a_recording_is_read_back(recorded, snapshots):
    source = SnapshotFile(recorded)
    assert len(source) == 20
    for snapshot in snapshots:
        found = source.next()
        assert found.tick == snapshot.tick and np.array_equal(found.kinds, snapshot.kinds)
        assert found.requests == snapshot.requests
    assert source.next() is None and source.step(-19).tick == snapshots[0].tick and source.step(-1) is None


def test_a_single_snapshot_is_a_file_too(tmp_path, snapshots):
    (tmp_path / "one").write_bytes(encode(snapshots[0]))
    source = SnapshotFile(tmp_path / "one")
    assert source.next().tick == snapshots[0].tick and source.next() is None


def test_a_recording_that_was_cut_short_is_read_as_far_as_it_goes(recorded):
    whole = recorded.read_bytes()
    recorded.write_bytes(whole[:-10])
    assert len(SnapshotFile(recorded)) == 19


@pytest.mark.parametrize(("content", "words"), [(b"", "no snapshot in it"), (b"\xc6\xff\xff\xff\xff1234567", "byte 0")])
def test_other_files_are_refused(tmp_path, content, words):
    (tmp_path / "other").write_bytes(content)
    with pytest.raises(Failure, match=words):
        SnapshotFile(tmp_path / "other")


def test_what_a_word_means(recorded):
    assert isinstance(open_source(str(recorded)), SnapshotFile)
    for word in ("http://host:1/x", "localhost:8000", "10.0.0.1:8000"):
        source = open_source(word)
        assert isinstance(source, ServerSource) and source.name.endswith(word)
        source.close()
    with pytest.raises(Failure, match="cannot be read"):
        open_source("no-such-file")


@pytest.mark.parametrize(("status", "words"), [(401, "operator's key"), (404, "answered 404"), (None, "no answer")])
def test_a_server_that_gives_nothing(status, words):
    def answer(request):
        if status is None:
            raise httpx.ConnectError("refused")
        return httpx.Response(status)

    source = ServerSource("http://test", transport=httpx.MockTransport(answer))
    with pytest.raises(Failure, match=words):
        source.next()
    source.close()


def test_a_server_is_asked_with_the_key(snapshots):
    def answer(request):
        assert request.url.path == "/prefix/v1/cache/snapshot" and request.headers["authorization"] == "Bearer k"
        return httpx.Response(200, content=encode(snapshots[0]))

    source = ServerSource("http://test/prefix", "k", transport=httpx.MockTransport(answer))
    assert source.next().tick == snapshots[0].tick
    source.close()


def test_the_command_wants_a_terminal():
    result = call("top", "localhost:1")
    assert result.exit_code == 2 and "terminal" in result.stderr and "/v1/cache" in result.stderr


def test_help_names_both_sources():
    assert all(word in call("top", "--help").stdout for word in ("--record", "--api-key", "URL|FILE"))


def drive(source, script, size=(120, 40), **options):
    """Run the app and let a coroutine press its keys."""

    async def run():
        app = TopApp(source, **options)
        async with app.run_test(size=size) as pilot:
            while app.snapshot is None:
                await pilot.pause(0.02)
            await pilot.pause()
            await script(app, pilot)
        return app.return_value

    return asyncio.run(asyncio.wait_for(run(), 120))


def text_of(app, selector):
    return str(app.query_one(selector, Static).render())


def test_keys_sort_filter_and_help(recorded):
    async def script(app, pilot):
        await pilot.press("p")
        assert app.is_paused and "paused" in text_of(app, "#about")
        table = app.query_one(DataTable)
        assert table.row_count == len(app.snapshot.requests) > 3
        await pilot.press("s")
        assert app.sort == "request" and "Request ▲" in str(table.ordered_columns[0].label)
        names = [str(table.get_row_at(i)[0]) for i in range(table.row_count)]
        assert names == sorted(names)
        await pilot.press("r")
        assert [str(table.get_row_at(i)[0]) for i in range(table.row_count)] == names[::-1]
        await pilot.press("S")
        assert app.sort == "age"
        await pilot.press("slash", *names[0], "enter")
        assert table.row_count == 1 and app.focused is table
        await pilot.press("escape")
        assert table.row_count == len(names) and not app.query_one(Input).display
        await pilot.press("question_mark")
        assert isinstance(app.screen, HelpScreen)
        await pilot.press("escape")
        assert not isinstance(app.screen, HelpScreen)
        await pilot.press("d")
        assert app.theme == "textual-light"
        await pilot.press("q")

    assert drive(SnapshotFile(recorded), script, interval=0.05) is None


def test_the_map_is_walked_and_a_request_stands_out(recorded):
    async def script(app, pilot):
        await pilot.press("p")
        view = app.query_one(BlockMapView)
        view.focus()
        await pilot.press("home", "right", "right", "down")
        assert view.cursor == 2 + view.columns
        assert text_of(app, "#block").startswith(f"Block {view.cursor}: ")
        await pilot.press("end")
        assert view.cursor == 511
        view.cursor = int(app.snapshot.blocks_of(0)[-1])
        await pilot.pause()
        owner = app.snapshot.requests[int(app.snapshot.owner[view.cursor])].request_id
        assert view.near == owner and owner in text_of(app, "#block")
        app.query_one(DataTable).focus()
        await pilot.press("escape")
        assert view.near is None
        await pilot.press("enter")
        assert view.near == str(app.query_one(DataTable).get_row_at(0)[0])
        await pilot.press("enter")
        assert view.near is None
        await pilot.hover(BlockMapView, offset=(3, 0))
        assert view.cell == "■ " and view.cursor == 1, "a cell and a gap are two characters"

    drive(SnapshotFile(recorded), script, interval=0.05)


def test_a_recording_is_stepped_through(recorded, snapshots):
    async def script(app, pilot):
        await pilot.press("full_stop", "full_stop")
        place = app.source.place
        assert app.is_paused and place >= 2 and app.snapshot.tick == snapshots[place].tick
        await pilot.press("comma")
        assert app.snapshot.tick == snapshots[place - 1].tick and f"{place} of 20" in text_of(app, "#about")

    drive(SnapshotFile(recorded), script, interval=5.0)


def test_a_recording_ends_and_the_last_snapshot_stays(recorded, snapshots):
    async def script(app, pilot):
        while app.source.place < 19:
            await pilot.pause(0.02)
        await pilot.pause(0.2)
        assert app.snapshot.tick == snapshots[-1].tick and "20 of 20" in text_of(app, "#about")

    drive(SnapshotFile(recorded), script, interval=0.01)


class Live:
    """A source that goes on and fails when it is told to."""

    name, is_live = "http://test", True

    def __init__(self, engine):
        self.engine, self.asked, self.trouble = engine, 0, None

    def next(self):
        self.asked += 1
        if self.trouble:
            raise self.trouble
        self.engine.step()
        return self.engine.snapshot()

    def close(self):
        pass


def test_pause_asks_for_nothing_and_records_nothing(tmp_path):
    source, path = Live(FakeEngine(128)), tmp_path / "out"

    async def script(app, pilot):
        while source.asked < 3:
            await pilot.pause(0.02)
        await pilot.press("space")
        await pilot.pause(0.1)
        asked, size = source.asked, path.stat().st_size
        await pilot.pause(0.2)
        assert source.asked == asked and path.stat().st_size == size
        await pilot.press("space")
        while source.asked == asked:
            await pilot.pause(0.02)

    recording = Recording(path)
    drive(source, script, interval=0.02, recording=recording)
    recording.close()
    assert len(SnapshotFile(path)) >= 3


def test_a_server_that_goes_away_is_said_and_waited_for():
    source = Live(FakeEngine(128))

    async def script(app, pilot):
        source.trouble = Failure("no answer from http://test")
        while "no answer" not in text_of(app, "#about"):
            await pilot.pause(0.02)
        source.trouble = None
        while "live" not in text_of(app, "#about"):
            await pilot.pause(0.02)

    drive(source, script, interval=0.02)


def test_snapshots_come_while_the_help_is_open():
    source = Live(FakeEngine(128))

    async def script(app, pilot):
        await pilot.press("question_mark")
        asked = source.asked
        while source.asked < asked + 3:
            await pilot.pause(0.02)
        assert isinstance(app.screen, HelpScreen) and app.snapshot is not None
        await pilot.press("q")
        assert not isinstance(app.screen, HelpScreen)

    drive(source, script, interval=0.02)


def test_a_snapshot_that_comes_while_the_view_is_left():
    source = Live(FakeEngine(128))

    async def script(app, pilot):
        await app.query_one("#tiles").remove()
        asked = source.asked
        while source.asked < asked + 2:
            await pilot.pause(0.02)

    drive(source, script, interval=0.02)


def test_no_server_at_all_ends_the_view_with_the_reason():
    source = Live(FakeEngine(16))
    source.trouble = Failure("no answer from http://test")

    async def run():
        app = TopApp(source, 0.02)
        async with app.run_test() as pilot:
            while app._exit is False:
                await pilot.pause(0.02)
        return app.return_value

    assert asyncio.run(asyncio.wait_for(run(), 60)) == "no answer from http://test"


@pytest.mark.parametrize(("size", "cell"), [((40, 12), ""), ((100, 30), "■"), ((200, 60), "■ ")])
def test_it_fits_and_follows_the_terminal(recorded, size, cell):
    async def script(app, pilot):
        view = app.query_one(BlockMapView)
        assert view.columns * max(1, len(cell)) <= size[0] and view.cell == cell
        await pilot.resize_terminal(80, 24)
        await pilot.pause()
        assert view.columns == 78 and len(app.export_screenshot()) > 1000

    drive(SnapshotFile(recorded), script, size=size, interval=5.0)


def test_a_large_pool_is_folded(tmp_path):
    engine = FakeEngine(100_000, at_once=32)
    for _ in range(10):
        engine.step()

    async def script(app, pilot):
        await pilot.press("p")
        view = app.query_one(BlockMapView)
        assert (
            view.cell == "" and view.blocks_per_cell > 1 and f"{view.blocks_per_cell} blocks" in text_of(app, "#legend")
        )
        assert f"{app.snapshot.counts()['free']:,}" in text_of(app, "#legend")
        assert app.snapshot.kinds[-1] == FREE

    drive(Live(engine), script, interval=0.25)
