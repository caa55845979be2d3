"""What a token costs around the model: scheduler, plan, sampler, text, outputs, threads, and the server's streams.

The shipped model's forward pass is replaced by one that hands out prepared logits: at once, for the engine alone, and
for the server after some work, during which other threads may run as beside a compiled one. What is left is the cost of
everything else. Texts are greedy and of 256 tokens. Processor time counts, as others may use the machine.

    python benchmarks/overhead.py [--streams 1 8 32] [--work MICROSECONDS] [--rounds N] [--json FILE]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import mmap
import select
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pagedkv.engine import LLM, AsyncEngine, SamplingParams
from pagedkv.models import shipped_model_path

NEW_TOKENS = 256
PROMPT = [5] * 20
STREAMS = (1, 8, 32)
WORK = 300  # µs, about what the shipped model takes for a token
TARGETS = {"engine": 50.0, "server": 200.0}  # µs a token of one stream

Row = dict[str, Any]


# --- an engine without a model ----------------------------------------------------------------------------------------


class Work:
    """So many seconds of work that needs no interpreter, and how many they were: in a file, for other processes."""

    def __init__(self, seconds: float, file: Path) -> None:
        megabyte = bytes(1 << 20)
        each = min(_seconds_of(lambda: hashlib.sha256(megabyte)) for _ in range(20))
        self._bytes = bytes(int(seconds / each * len(megabyte)))
        file.write_bytes(bytes(8))
        with open(file, "r+b") as opened:
            self._shared = mmap.mmap(opened.fileno(), 8)
        self._done = 0.0

    def __call__(self) -> None:
        """Do it."""
        self._done += _seconds_of(lambda: hashlib.sha256(self._bytes))
        self._shared[:] = struct.pack("d", self._done)


def _seconds_of(call: Callable[[], object]) -> float:
    begun = time.thread_time()
    call()
    return time.thread_time() - begun


def engine_without_model(work: Callable[[], object] | None = None) -> LLM:
    """Return an engine whose forward pass does some work, if any, and has this file's text for its opinion."""
    torch.set_num_threads(1)
    llm = LLM(str(shipped_model_path()), num_blocks=4096)
    llm.warm_up()
    runner = llm.core.runner
    ids = torch.tensor(llm.encode(Path(__file__).read_text())[: 2 * NEW_TOKENS])
    logits = torch.randn(len(ids), runner.vocab_size, generator=torch.Generator().manual_seed(0))
    logits[torch.arange(len(ids)), ids] = 100.0
    step = 0

    def forward(plan: Any, token_ids: Any, wanted: Any) -> torch.Tensor:
        nonlocal step
        step = (step + 1) % (len(ids) - len(wanted))
        if work is not None:
            work()
        return logits[step : step + len(wanted)]

    runner.forward = forward
    return llm


def offline(llm: LLM, streams: int, rounds: int) -> float:
    """Return the least processor time of a step with so many streams, in seconds."""
    prompts = [[place, *PROMPT] for place in range(streams)]
    params = SamplingParams(max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True)
    best = float("inf")
    for _ in range(1 + rounds):
        llm.reset()
        begun = time.process_time()
        llm.generate(prompts, params)
        best = min(best, time.process_time() - begun)
    return best / NEW_TOKENS


# --- a server without a model -----------------------------------------------------------------------------------------


def serve(seconds: float, folder: Path) -> None:
    """Serve such an engine until a signal comes; the port, and the seconds of its work, are written to files."""
    from pagedkv.server.config import ServerConfig
    from pagedkv.server.run import listen, run

    engine = AsyncEngine(engine_without_model(Work(seconds, folder / "work")))
    config = ServerConfig(port=0, model_name="model")
    with listen(config) as listener:
        port = listener.getsockname()[1]
        run(engine, config, listener, on_ready=lambda: (folder / "port").write_text(str(port)) and None)


class Server:
    """A process that serves an engine without a model."""

    def __init__(self, work: float, folder: Path) -> None:
        self._folder, file = folder, folder / "port"
        command = [sys.executable, __file__, "--serve", str(folder), "--work", str(1e6 * work)]
        self._process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        while not (file.exists() and file.read_text()):
            if self._process.poll() is not None:
                raise SystemExit(f"the server ended with code {self._process.returncode}")
            time.sleep(0.1)
        self._port = int(file.read_text())

    def processor_seconds(self) -> float:
        """Return the processor time that its threads have had but for the work."""
        tasks = Path(f"/proc/{self._process.pid}/task").iterdir()
        spent = sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9
        return spent - float(struct.unpack("d", (self._folder / "work").read_bytes())[0])

    def ask(self, streams: int) -> tuple[float, float]:
        """Read so many streams at once; returns seconds, and those of the processor but for the work, of a step."""
        body = {"prompt": PROMPT, "max_tokens": NEW_TOKENS, "temperature": 0, "stream": True, "ignore_eos": True}
        payload = json.dumps(body).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(payload)}\r\n"
        head += "Content-Type: application/json\r\n\r\n"
        sockets = [socket.create_connection(("127.0.0.1", self._port)) for _ in range(streams)]
        tails = dict.fromkeys(sockets, b"")
        processor, begun = self.processor_seconds(), time.perf_counter()
        for each in sockets:
            each.sendall(head.encode() + payload)
        while tails:
            for each in select.select(list(tails), [], [])[0]:
                data = each.recv(65536)
                if not data:
                    raise SystemExit("the server closed a stream")
                tails[each] = (tails[each] + data)[-64:]
                if b"[DONE]" in tails[each]:
                    del tails[each]
        seconds, processor = time.perf_counter() - begun, self.processor_seconds() - processor
        for each in sockets:
            each.close()
        return seconds / NEW_TOKENS, processor / NEW_TOKENS

    def close(self) -> None:
        """End it."""
        self._process.terminate()
        self._process.wait()


# --- the table --------------------------------------------------------------------------------------------------------


def row(name: str, seconds: float, note: str, target: float | None = None) -> Row:
    """Return one line of the table, in µs."""
    value = round(1e6 * seconds, 1)
    met = None if target is None else value <= target
    return {"name": name, "value": value, "unit": "µs", "target": target, "met": met, "note": note}


def measure(streams: list[int], work: float, rounds: int) -> list[Row]:
    """Measure the engine, then the server."""
    rows, llm = [], engine_without_model()
    for count in streams:
        seconds = offline(llm, count, rounds)
        target = TARGETS["engine"] if count == 1 else None
        rows.append(row(f"engine, {count} streams: a token", seconds / count, f"a step {1e6 * seconds:.0f} µs", target))
    with tempfile.TemporaryDirectory() as folder:
        server = Server(work, Path(folder))
        try:
            for count in streams:
                results = [server.ask(count) for _ in range(1 + rounds)][1:]
                waited, processor = (min(result[which] for result in results) for which in (0, 1))
                note = (
                    f"a step {1e6 * processor:.0f} µs, {1e6 * waited:.0f} µs by the clock with {1e6 * work:.0f} of work"
                )
                target = TARGETS["server"] if count == 1 else None
                rows.append(row(f"server, {count} clients: a token", processor / count, note, target))
        finally:
            server.close()
    return rows


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, nargs="+", default=STREAMS, help="how many at a time")
    parser.add_argument("--work", type=float, default=WORK, help="of the server's forward pass, in microseconds")
    parser.add_argument("--rounds", type=int, default=5, help="the best of so many counts")
    parser.add_argument("--json", type=Path, help="also write the lines to this file")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve(options.work / 1e6, options.serve)
    rows = measure(options.streams, options.work / 1e6, options.rounds)
    print("| what | measured | target | met | note |\n| --- | ---: | ---: | --- | --- |")
    for line in rows:
        target = "" if line["target"] is None else f"{line['target']:g} {line['unit']}"
        met = {None: "", True: "yes", False: "**no**"}[line["met"]]
        print(f"| {line['name']} | {line['value']:.4g} {line['unit']} | {target} | {met} | {line['note']} |")
    if options.json:
        options.json.write_text(json.dumps(rows, ensure_ascii=False))


if __name__ == "__main__":
    main()
