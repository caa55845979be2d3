"""Requests per second, time to first token and between tokens: ``pagedkv serve`` beside ``transformers serve``.

Both serve the shipped model and run at the same time; at each number of clients they take turns, so that one of them is
idle while the other works. Clients wait for an answer before they send the next request, stream it, and ask greedily.
Two times are told: by the clock, which includes whatever else the machine does, and the processor time of the server.
transformers' server takes part where it runs: ``pip install accelerate psutil``.

    python benchmarks/serving.py [--clients 1 8 32 128] [--requests N] [--json FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from pagedkv.models import shipped_model_path

BIN = Path(sys.executable).parent
CLIENTS = (1, 8, 32, 128)
NEW_TOKENS = 32
PEER_OPTIONS = ("--cb-block-size", "16", "--cb-num-blocks", "1200", "--cb-max-batch-tokens", "256", "--device", "cpu")
"""Room for all clients and little more: its default takes most of the memory, and its masks grow with the cache."""
DTYPE = ("--dtype", "float32")  # in less, rounding alone makes other texts
STARTS_WITHIN = 300.0
WORDS = (
    "import os def read ( path ) : return open data lines class Node self value for item in items if not None".split()
)
OURS, THEIRS = "pagedkv serve", "transformers serve --continuous-batching"

Row = dict[str, Any]


def made_prompts(count: int) -> list[str]:
    """Return prompts of 8 to 160 words, half of which begin alike."""
    rng = np.random.default_rng(0)
    shared = " ".join(rng.choice(WORDS, 64))
    texts = [" ".join(rng.choice(WORDS, rng.integers(8, 96))) for _ in range(count)]
    return [f"{shared} {text}" if i % 2 else text for i, text in enumerate(texts)]


# --- a server ---------------------------------------------------------------------------------------------------------


class Server:
    """One server process on a free port; what `settings` holds goes into every request."""

    def __init__(
        self,
        name: str,
        command: list[str],
        model: str,
        settings: Mapping[str, Any] | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.name, self.model = name, model
        self.settings = {"max_tokens": NEW_TOKENS, **(settings or {})}
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self._log = tempfile.TemporaryFile()
        offline = os.environ | {"HF_HUB_OFFLINE": "1"} | dict(env or {})
        self._process = subprocess.Popen(
            [*command, "--port", str(port)], stdout=self._log, stderr=subprocess.STDOUT, env=offline
        )

    def wait(self) -> str:
        """Wait until it answers; returns why it does not, or nothing."""
        end = time.monotonic() + STARTS_WITHIN
        while time.monotonic() < end:
            if self._process.poll() is not None:
                self._log.seek(0)
                lines = self._log.read().decode(errors="replace").strip().splitlines()
                return f"ended with code {self._process.returncode}: {lines[-1] if lines else ''}"
            try:
                if httpx.get(f"{self.url}/health", timeout=1).status_code == 200:
                    return ""
            except httpx.HTTPError:
                time.sleep(0.2)
        return f"does not answer within {STARTS_WITHIN:g} s"

    def processor_seconds(self) -> float:
        """Return the processor time that it has had, where the system tells."""
        try:
            fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return float("nan")
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        """End it."""
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


# --- clients ----------------------------------------------------------------------------------------------------------


@dataclass
class Load:
    """What the clients saw: seconds to the first token, between tokens, and the texts."""

    first: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    texts: dict[int, str] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0
    processor: float = 0.0


async def ask(client: httpx.AsyncClient, server: Server, number: int, prompt: str, load: Load) -> None:
    """Send one request and read its stream."""
    body = {"model": server.model, "prompt": prompt, "temperature": 0, "stream": True, **server.settings}
    begun, last, text = time.perf_counter(), 0.0, ""
    try:
        async with client.stream("POST", f"{server.url}/v1/completions", json=body) as answer:
            answer.raise_for_status()
            async for line in answer.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                piece = "".join(choice.get("text") or "" for choice in json.loads(line[6:]).get("choices", ()))
                if piece:
                    now = time.perf_counter()
                    (load.gaps if last else load.first).append(now - (last or begun))
                    last, text = now, text + piece
    except httpx.HTTPError as error:
        load.failures.append(repr(error))
    load.texts[number] = text


async def send(server: Server, prompts: list[str], clients: int) -> Load:
    """Let so many clients work through the prompts."""
    load, left = Load(), iter(enumerate(prompts))
    limits = httpx.Limits(max_connections=clients)

    async with httpx.AsyncClient(timeout=120, limits=limits) as client:

        async def work() -> None:
            for number, prompt in left:
                await ask(client, server, number, prompt, load)

        processor, begun = server.processor_seconds(), time.perf_counter()
        await asyncio.gather(*(work() for _ in range(clients)))
        load.seconds = time.perf_counter() - begun
        load.processor = server.processor_seconds() - processor
    return load


# --- the table --------------------------------------------------------------------------------------------------------


def row(name: str, value: float | None, unit: str, note: str) -> Row:
    """Return one line of the table; of no figure here a target speaks."""
    value = None if value is None else round(value, 3)
    return {"name": name, "value": value, "unit": unit, "target": None, "met": None, "note": note}


def percentiles(seconds: list[float]) -> str:
    """Return the middle, 90% and 99% in ms."""
    if not seconds:
        return "none"
    return " / ".join(f"{1e3 * value:.0f}" for value in np.percentile(seconds, (50, 90, 99)))


def rows_of(server: Server, clients: int, load: Load, beside: Load | None) -> list[Row]:
    """Say how a server did."""
    count = len(load.texts)
    note = f"{1e3 * load.processor / count:.0f} ms of processor time a request; p50 / p90 / p99 in ms: "
    note += f"first token {percentiles(load.first)}, between tokens {percentiles(load.gaps)}"
    if load.failures:
        note += f"; {len(load.failures)} of {count} FAILED: {load.failures[0]}"
    rows = [row(f"{clients} clients: {server.name}", count / load.seconds, "requests/s", note)]
    if beside is not None:
        different = sum(load.texts[number] != text for number, text in beside.texts.items())
        note = f"{load.processor / beside.processor:.2f}× the processor time; {different} of {count} texts differ"
        rows.append(row(f"{clients} clients: time of {server.name} / ours", load.seconds / beside.seconds, "×", note))
    return rows


def measure(clients: list[int], most: int) -> list[Row]:
    """Start both servers and let the clients at them."""
    model = str(shipped_model_path())
    ours = Server(OURS, [str(BIN / "pagedkv"), "serve", model, "--served-model-name", "model", *DTYPE], "model")
    command = [str(BIN / "transformers"), "serve", model, "--continuous-batching", *PEER_OPTIONS, *DTYPE]
    servers = [ours]
    try:
        if (BIN / "transformers").exists():
            servers.append(Server(THEIRS, command, model))
        troubles = {server.name: server.wait() for server in servers}
        if troubles[OURS]:
            raise SystemExit(f"{OURS} {troubles[OURS]}")
        rows = [row(THEIRS, None, "", troubles.get(THEIRS, "is not installed"))] if troubles.get(THEIRS, "-") else []
        able = [server for server in servers if not troubles[server.name]]
        for server in able:
            asyncio.run(send(server, made_prompts(2), 1))  # the model is loaded, kernels are compiled
        for count in clients:
            prompts = made_prompts(max(8, min(most, 2 * count)))
            loads = {server.name: asyncio.run(send(server, prompts, count)) for server in able}
            for server in able:
                rows += rows_of(server, count, loads[server.name], None if server is ours else loads[OURS])
        return rows
    finally:
        for server in servers:
            server.close()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=CLIENTS, help="how many at a time")
    parser.add_argument("--requests", type=int, default=128, help="most requests at one number of clients")
    parser.add_argument("--json", type=Path, help="also write the lines to this file")
    options = parser.parse_args()
    rows = measure(options.clients, options.requests)
    print("| what | measured | note |\n| --- | ---: | --- |")
    for line in rows:
        value = "" if line["value"] is None else f"{line['value']:.3g} {line['unit']}"
        print(f"| {line['name']} | {value} | {line['note']} |")
    if options.json:
        options.json.write_text(json.dumps(rows, ensure_ascii=False))


if __name__ == "__main__":
    main()
