"""How long a small request of one tenant takes beside another that sends too much, and how long ``/health`` does.

``pagedkv serve`` serves the shipped model to two keys. Bob asks for four tokens, one request after the other. Beside
him and a probe of ``/health``, for some seconds each, alice sends a thousand prompts at once, bodies of 8 MB, prompts
of 4 million ids, texts as long as fit; and somebody without a key holds 4,000 connections open, which the server closes
after 3 seconds. Each runs in a process of its own, on the same machine, whose processor they share. Probes begin before
the attack does, bob asks once it is under way. Only loopback addresses are used.

    python benchmarks/fairness.py [--seconds N] [--only KIND ...] [--json FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from serving import BIN, DTYPE, Server, shipped_model_path

Row = dict[str, Any]
BODY = 8_388_000
IDLE = 4000
SENDERS = 4
PROMPTS = 1000
SETTLES, HEAD_TIMEOUT = 2.0, 3
TARGET_MEDIAN, TARGET_WORST, TARGET_HEALTH, TARGET_MEMORY = 3.0, 1.0, 0.2, 0.1


def headers(key: str) -> dict[str, str]:
    """Return the headers of a request with a key."""
    return {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}


# --- what alice sends, in a process of its own ------------------------------------------------------------------------


async def send_for_ever(url: str, path: str, body: bytes, senders: int = SENDERS) -> None:
    """Send the same body again and again, from so many clients."""

    async def send(client: httpx.AsyncClient) -> None:
        while True:
            with suppress(httpx.HTTPError):
                answer = await client.post(f"{url}{path}", content=body)
                if answer.status_code == 429:
                    await asyncio.sleep(1)  # as Retry-After says

    async with httpx.AsyncClient(headers=headers("alice"), timeout=120, limits=httpx.Limits()) as client:
        await asyncio.gather(*(send(client) for _ in range(senders)))


async def hold_connections(url: str) -> None:
    """Keep so many connections open, and open another for each that is closed."""
    host, _, port = url.removeprefix("http://").partition(":")

    async def hold() -> None:
        while True:
            with suppress(OSError):
                reader, writer = await asyncio.open_connection(host, int(port))
                await reader.read(1)
                writer.close()
            await asyncio.sleep(2)

    await asyncio.gather(*(hold() for _ in range(IDLE)))


def attack(kind: str, url: str) -> None:
    """Do it until the process is ended."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    text = json.dumps({"prompt": ("word = other\n" * (BODY // 13))[: BODY - 100], "max_tokens": 1}).encode()[:BODY]
    ids = b'{"prompt":[' + b"1," * (BODY // 2 - 20) + b"1]}"
    fitting = json.dumps({"prompt": "x = y\n" * 9000, "max_tokens": 1}).encode()
    short = json.dumps({"prompt": "x = y\n" * 100, "max_tokens": 100, "ignore_eos": True}).encode()
    work = {
        "bodies": lambda: send_for_ever(url, "/v1/completions", text),
        "tokenize": lambda: send_for_ever(url, "/tokenize", text),
        "ids": lambda: send_for_ever(url, "/v1/completions", ids),
        "texts": lambda: send_for_ever(url, "/tokenize", fitting),
        "prompts": lambda: send_for_ever(url, "/v1/completions", short, PROMPTS),
        "idle": lambda: hold_connections(url),
    }
    asyncio.run(work[kind]())


@contextmanager
def attacked(kind: str, url: str) -> Iterator[None]:
    """Run an attack beside the block."""
    with subprocess.Popen([sys.executable, __file__, "--attack", kind, "--url", url]) as process:
        try:
            yield
        finally:
            process.kill()


# --- what bob sees ----------------------------------------------------------------------------------------------------


@dataclass
class Seen:
    """Seconds that requests took, and what failed."""

    asks: list[float] = field(default_factory=list)
    probes: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


async def watch(url: str, seconds: float, settles: float = SETTLES) -> Seen:
    """Probe for a while, and ask after the first seconds of it, each on connections of its own."""
    seen, end = Seen(), time.monotonic() + settles + seconds
    body = json.dumps({"prompt": "def f(x):", "max_tokens": 4, "temperature": 0, "ignore_eos": True}).encode()

    async def timed(times: list[float], method: str, path: str, content: bytes | None) -> None:
        begun = time.perf_counter()
        try:
            answer = await client.request(method, f"{url}{path}", content=content)
            answer.raise_for_status()
            times.append(time.perf_counter() - begun)
        except httpx.HTTPError as error:
            seen.failures.append(f"{path}: {error!r:.100}")

    async def repeat(*what: Any, pause: float, after: float = 0.0) -> None:
        await asyncio.sleep(after)
        while time.monotonic() < end:
            await timed(*what)
            await asyncio.sleep(pause)

    every_one_a_connection = httpx.Limits(max_keepalive_connections=0)
    async with httpx.AsyncClient(headers=headers("bob"), timeout=60, limits=every_one_a_connection) as client:
        await asyncio.gather(
            repeat(seen.asks, "POST", "/v1/completions", body, pause=0.01, after=settles),
            repeat(seen.probes, "GET", "/health", None, pause=0.05),
        )
    return seen


def resident(pid: int) -> float:
    """Return the megabytes of memory that a process has."""
    fields = Path(f"/proc/{pid}/statm").read_text().split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


ATTACKS = {
    "prompts": "a thousand prompts at a time",
    "bodies": "four bodies of 8 MB at a time",
    "tokenize": "the same to /tokenize",
    "ids": "four prompts of 4 million ids at a time",
    "texts": "four texts as long as fit at a time, to /tokenize",
    "idle": "4,000 connections without a request",
}


def row(name: str, value: float, unit: str, note: str = "", target: str | None = None, met: bool | None = None) -> Row:
    """Return a line of the table."""
    return {"name": name, "value": value, "unit": unit, "target": target, "met": met, "note": note}


def rows_of(kind: str, seen: Seen, quiet: Seen) -> list[Row]:
    """Return the lines of one attack."""
    name = ATTACKS[kind]
    if not seen.asks or not seen.probes:
        return [
            row(f"{name}: nothing was answered", float("nan"), "s", "; ".join(seen.failures[:2]), "an answer", False)
        ]
    median, worst, probe = statistics.median(seen.asks), max(seen.asks), max(seen.probes)
    times = median / statistics.median(quiet.asks)
    failed = f"{len(seen.failures)} of {len(seen.asks) + len(seen.probes) + len(seen.failures)} failed"
    return [
        row(
            f"{name}: median of {len(seen.asks)}",
            1e3 * median,
            "ms",
            f"{times:.2f}× quiet",
            "≤ 3×",
            times <= TARGET_MEDIAN,
        ),
        row(f"{name}: worst", 1e3 * worst, "ms", failed, "≤ 1 s", worst <= TARGET_WORST and not seen.failures),
        row(
            f"{name}: /health, worst",
            1e3 * probe,
            "ms",
            f"{len(seen.probes)} probes",
            "≤ 200 ms",
            probe <= TARGET_HEALTH,
        ),
    ]


def measure(seconds: float, kinds: list[str]) -> list[Row]:
    """Measure quiet, then beside each attack."""
    with tempfile.TemporaryDirectory() as folder:
        keys = Path(folder) / "keys"
        keys.write_text("alice\nbob\n")
        options = ["--api-key-file", str(keys), "--head-timeout", str(HEAD_TIMEOUT)]
        command = [str(BIN / "pagedkv"), "serve", str(shipped_model_path()), *DTYPE, *options]
        server = Server("pagedkv serve", command, "pysmall")
        try:
            if trouble := server.wait():
                raise SystemExit(trouble)
            url, pid = server.url, server._process.pid
            with attacked("prompts", url):
                asyncio.run(watch(url, 2))  # kernels are compiled, those of large batches too
            asyncio.run(watch(url, 2, settles=0))
            quiet = asyncio.run(watch(url, seconds, settles=0))
            rows = [
                row(f"quiet: median of {len(quiet.asks)}", 1e3 * statistics.median(quiet.asks), "ms"),
                row("quiet: worst", 1e3 * max(quiet.asks), "ms"),
                row("quiet: /health, worst", 1e3 * max(quiet.probes), "ms"),
            ]
            before = resident(pid)
            for kind in kinds:
                with attacked(kind, url):
                    seen = asyncio.run(watch(url, seconds))
                rows += rows_of(kind, seen, quiet)
                time.sleep(3)
                after = resident(pid)
                print(f"{kind}: {after:.0f} MB", file=sys.stderr)
                if kind == "prompts":
                    before = after  # the pool has its memory only now
            grown = after / before - 1
            rows.append(row("memory before", before, "MB"))
            met = grown <= TARGET_MEMORY
            rows.append(row("memory after", after, "MB", f"{100 * grown:+.1f}%", "within 10%", met))
            return rows
        finally:
            server.close()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=4.0, help="in which bob asks beside each attack")
    parser.add_argument("--only", nargs="+", choices=ATTACKS, default=list(ATTACKS), help="these attacks alone")
    parser.add_argument("--json", type=Path, help="also write the lines to this file")
    parser.add_argument("--attack", choices=ATTACKS, help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.attack:
        with suppress(KeyboardInterrupt):
            attack(options.attack, options.url)
        return
    rows = measure(options.seconds, options.only)
    print("| what | measured | target | note |\n| --- | ---: | --- | --- |")
    for line in rows:
        verdict = "" if line["met"] is None else f"{line['target']}: {'met' if line['met'] else 'missed'}"
        print(f"| {line['name']} | {line['value']:.4g} {line['unit']} | {verdict} | {line['note']} |")
    if options.json:
        options.json.write_text(json.dumps(rows, ensure_ascii=False))


if __name__ == "__main__":
    main()
