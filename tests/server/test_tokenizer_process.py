"""Long texts are tokenized in a process of their own: it can be ended, it dies alone, and it stays behind nobody."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import httpx
import pytest
from tests.server.asgi import RawRequest, client_of, until
from tests.server.fakes import FakeEngine, shipped_tokenizer
from tests.server.local import thread
from tests.server.stub_tokenizer import Here, Python, Stub, Unpicklable

import pagedkv.server.run as server_run
from pagedkv.server import tokenizer_process
from pagedkv.server.model import LONG_FOR_PYTHON, LONG_TEXT, ServedModel
from pagedkv.server.tokenizer_process import NoTokenizerProcess, TokenizerEnded, TokenizerProcess, decode, encode

pytestmark = pytest.mark.anyio


def lives(pid: int | None) -> bool:
    """Whether there is such a process; one that nobody has waited for yet is none."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@contextmanager
def process_of(tokenizer: Any, seconds: int = 20) -> Iterator[TokenizerProcess]:
    process = TokenizerProcess(tokenizer, seconds)
    try:
        yield process
    finally:
        process.end()
        assert not lives(process.pid)


def test_it_gives_what_the_tokenizer_gives() -> None:
    text = "def f(x):\n    return 'β→' + x\n" * 300
    with process_of(shipped_tokenizer()) as process:
        for special in (True, False):
            ids = process.run(encode, text, special)
            assert ids == encode(shipped_tokenizer(), text, special)
            assert process.run(decode, ids, special) == decode(shipped_tokenizer(), ids, special)


def test_an_error_of_the_tokenizer_is_told_and_the_process_lives_on() -> None:
    with process_of(Stub()) as process:
        first = process.run(encode, "print", True)
        with pytest.raises(RuntimeError, match="ValueError: no such word"):
            process.run(encode, "fail", True)
        assert process.run(encode, "again", True) == first == [1, (process.pid or 0) % 4096]


def test_a_text_that_takes_too_long_ends_with_its_process() -> None:
    with process_of(Stub(), seconds=1) as process:
        with pytest.raises(TokenizerEnded) as ended:
            process.run(encode, "hang", True)
        assert ended.value.out_of_time and process.is_over and not lives(process.pid)
        with pytest.raises(TokenizerEnded):
            process.run(encode, "again", True)


@pytest.mark.parametrize("what", ["hang", "sleep"])
def test_it_can_be_ended_whatever_it_does(what: str) -> None:
    with process_of(Stub()) as process:
        process.run(encode, "start", True)
        timer = threading.Timer(0.1, process.end)
        timer.start()
        with pytest.raises(TokenizerEnded) as ended:
            process.run(encode, what, True)
        timer.join()
        assert not ended.value.out_of_time and not lives(process.pid)


def test_one_that_dies_is_no_riddle() -> None:
    with process_of(Stub()) as process, pytest.raises(TokenizerEnded, match="it ended with 3"):
        process.run(encode, "die", True)


@pytest.mark.parametrize("tokenizer", [Unpicklable(), Here()])
def test_a_tokenizer_that_cannot_be_elsewhere(tokenizer: Any) -> None:
    with process_of(tokenizer) as process, pytest.raises(NoTokenizerProcess):
        process.run(encode, "a", True)


PARENT = """
import threading
from tests.server.stub_tokenizer import Stub
from pagedkv.server.tokenizer_process import TokenizerProcess, encode
process = TokenizerProcess(Stub())
process.run(encode, "start", True)
threading.Thread(target=process.run, args=(encode, "sleep", True)).start()
print(process.pid, flush=True)
"""


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGKILL])
async def test_it_ends_with_its_parent_however_that_ends(ending: signal.Signals) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, env=environment) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert lives(child)
        parent.send_signal(ending)
        await until(lambda: not lives(child))


# In a server.


def long(word: str, size: int = LONG_TEXT) -> dict[str, Any]:
    return {"prompt": f"{word} " + "x" * size}


def engine_of(tokenizer: Any) -> FakeEngine:
    engine = FakeEngine(max_positions=8192)
    engine.tokenizer = tokenizer
    return engine


@asynccontextmanager
async def serving(tokenizer: Any, **settings: Any) -> AsyncIterator[tuple[httpx.AsyncClient, ServedModel]]:
    async with client_of(engine_of(tokenizer), **settings) as client:
        model = client.app.state.server.model  # type: ignore[attr-defined]
        try:
            yield client, model
        finally:
            model.close()


async def done_in(client: httpx.AsyncClient, body: dict[str, Any]) -> int:
    """The process in which a text was tokenized, as far as the tokenizer tells."""
    answer = await client.post("/tokenize", json=body)
    assert answer.status_code == 200, answer.text
    return int(answer.json()["tokens"][1])


HERE = os.getpid() % 4096


@pytest.mark.parametrize(("tokenizer", "size"), [(Stub(), LONG_TEXT), (Python(), LONG_FOR_PYTHON)])
async def test_long_texts_alone_have_a_process(tokenizer: Any, size: int) -> None:
    async with serving(tokenizer) as (client, model):
        assert await done_in(client, long("a", size - 10)) == HERE
        assert not model._processes.processes
        elsewhere = await done_in(client, long("a", size))
        assert elsewhere != HERE and await done_in(client, long("a", size)) == elsewhere
        assert len(model._processes.processes) == 1


async def test_many_tokens_are_detokenized_there() -> None:
    engine = engine_of(Stub())
    engine.sizes = engine.sizes.__class__(**{**_fields(engine.sizes), "max_model_len": 2 * LONG_TEXT})
    async with client_of(engine) as client:
        for count, there in ((LONG_TEXT, False), (LONG_TEXT + 1, True)):
            answer = await client.post("/detokenize", json={"tokens": [1] * count})
            told, pid = answer.json()["prompt"].split()
            assert int(told) == count and (int(pid) != os.getpid()) is there
        client.app.state.server.model.close()  # type: ignore[attr-defined]


def _fields(sizes: Any) -> dict[str, Any]:
    return {name: getattr(sizes, name) for name in sizes.__dataclass_fields__}


@pytest.mark.parametrize("tokenizer", [Unpicklable(), Here()])
async def test_a_tokenizer_that_cannot_be_elsewhere_does_it_here(tokenizer: Any, caplog: Any) -> None:
    async with serving(tokenizer) as (client, model):
        assert [await done_in(client, long("a")) for _ in range(2)] == [HERE] * 2
        assert not model._processes.processes
    assert sum("the tokenizer has none of its own" in record.getMessage() for record in caplog.records) == 1


async def test_a_text_whose_client_left_is_ended_and_the_next_has_a_new_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tokenizer_process, "GRACE_SECONDS", 0.05)
    async with serving(Stub(), api_keys=("alice", "bob")) as (client, model):
        client.headers["authorization"] = "Bearer alice"
        await done_in(client, long("a"))
        (first,) = model._processes.processes
        body = {**long("hang"), "max_tokens": 1}
        request = RawRequest(client.app, "/tokenize", body, {"authorization": "Bearer alice"})  # type: ignore[attr-defined]
        task = request.start()
        await until(lambda: first._busy.locked())
        waiting = asyncio.create_task(done_in(client, long("b")))
        request.leave()
        await asyncio.wait_for(task, 10)
        assert await asyncio.wait_for(waiting, 20) != HERE
        assert not lives(first.pid) and first not in model._processes.processes


async def test_a_text_that_is_done_soon_after_its_client_left_costs_no_process() -> None:
    async with serving(Stub()) as (client, model):
        request = RawRequest(client.app, "/tokenize", long("a"))  # type: ignore[attr-defined]
        task = request.start()
        await until(lambda: bool(model._processes.processes))
        (process,) = model._processes.processes
        request.leave()
        await asyncio.wait_for(task, 10)
        await until(lambda: bool(model._processes._idle), 20)
        assert model._processes._idle == [process] and lives(process.pid)


@pytest.mark.parametrize(
    ("word", "status", "code"), [("die", 503, "tokenizer_ended"), ("hang", 400, "tokenizing_too_long")]
)
async def test_a_text_that_ends_its_process_is_answered_and_the_next_has_another(
    word: str, status: int, code: str
) -> None:
    async with serving(Stub()) as (client, model):
        model._processes._seconds = 1
        for path in ("/tokenize", "/v1/completions"):
            answer = await client.post(path, json=long(word))
            assert answer.status_code == status and answer.json()["error"]["code"] == code
            assert (await client.get("/health")).status_code == 200
        assert await done_in(client, long("a")) != HERE
        assert len(model._processes.processes) == 1


async def test_a_server_that_ends_leaves_no_process_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_run, "GRACE_SECONDS", 1)
    with thread(engine_of(Stub()), drain_timeout=0) as server:
        others = _children()
        httpx.post(f"{server.url}/tokenize", json=long("a"), timeout=20)
        (child,) = _children() - others
        asking = threading.Thread(target=_quietly, args=(server.url,))
        asking.start()
        asking.join(0.3)
        assert asking.is_alive() and lives(child)
    await until(lambda: not asking.is_alive() and not lives(child))  # what was killed takes a moment to die


def _quietly(url: str) -> None:
    try:
        httpx.post(f"{url}/tokenize", json=long("hang"), timeout=20)
    except httpx.HTTPError:
        pass


def _children() -> set[int]:
    """The tokenizers that this process has started."""
    me, found = os.getpid(), set()
    for entry in os.listdir("/proc"):
        try:
            with open(f"/proc/{entry}/stat") as stat, open(f"/proc/{entry}/cmdline") as command:
                if int(stat.read().rpartition(")")[2].split()[1]) == me and "tokenizer_process" in command.read():
                    found.add(int(entry))
        except (OSError, IndexError):
            continue
    return found
