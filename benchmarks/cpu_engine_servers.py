"""``pagedkv serve`` and the servers of the peers under 1, 8 and 32 clients, by turns, for benchmarks/cpu_engines.py.

A prompt is 200 words that all of a load have in common and 25 of its own; 48 new tokens, streamed, greedy, past any end
of the text. A peer takes part if its entry in the peers' file has ``server``: a command that understands ``--port``.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import sys
from pathlib import Path
from typing import Any

from serving import BIN, Load, Server, send

CLIENTS = (1, 8, 32)
NEW = 48
SETTINGS = {"max_tokens": NEW, "ignore_eos": True}
OURS = "pagedkv serve"

Row = dict[str, Any]


def prompts(clients: int, seed: int) -> list[str]:
    """Return two prompts a client, or 32."""
    pages = sorted((Path(__file__).parents[1] / "docs").glob("*.md"))
    words = " ".join(page.read_text(encoding="utf-8") for page in pages).split()
    rng = random.Random(f"{clients} {seed}")

    def cut(count: int) -> str:
        start = rng.randrange(len(words) - count)
        return " ".join(words[start : start + count])

    system = cut(200)
    return [f"{system} {cut(25)}" for _ in range(max(4, min(32, 2 * clients)))]


def servers_of(folder: Path, dtype: str, peers: Path | None) -> list[Server]:
    """Start ours and those of the peers."""
    command = [str(BIN / "pagedkv"), "serve", str(folder), "--served-model-name", "model", "--dtype", dtype]
    servers = [Server(OURS, command, "model", SETTINGS)]
    for name, entry in (json.loads(peers.read_text()) if peers else {}).items():
        if entry["dtype"] == dtype and "server" in entry:
            servers.append(Server(name, entry["server"], "model", SETTINGS, entry.get("env")))
    return servers


def between_tokens(load: Load) -> float:
    """Return the ms between two tokens of a text; pieces of several tokens count as what they are."""
    return 1e3 * sum(load.gaps) / max(1, len(load.texts) * (NEW - 1))


def row(name: str, loads: list[Load]) -> Row:
    """Say how a server did in its best round."""
    load = min(loads, key=between_tokens)
    first = 1e3 * statistics.median(load.first) if load.first else float("nan")
    note = f"{first:.0f} ms to the first token, {len(load.texts) * NEW / load.seconds:.0f} tokens/s"
    if load.failures:
        note += f"; {len(load.failures)} FAILED: {load.failures[0]}"
    value = round(between_tokens(load), 2)
    return {"name": name, "value": value, "unit": "ms a token", "target": None, "met": None, "note": note}


def server_rows(folder: Path, dtype: str, peers: Path | None, rounds: int) -> list[Row]:
    """Let clients at all servers of a dtype."""
    if dtype == "int8" or not (folder / "tokenizer.json").exists():
        return []
    servers = servers_of(folder, dtype, peers)
    rows: list[Row] = []
    try:
        troubles = {server.name: server.wait() for server in servers}
        able = [server for server in servers if not troubles[server.name]]
        for server in able:
            asyncio.run(send(server, prompts(2, -1), 2))
        for name, why in troubles.items():
            if why:
                print(f"{name} {why}", file=sys.stderr)
        for clients in CLIENTS:
            loads: dict[str, list[Load]] = {server.name: [] for server in able}
            for number in range(rounds):
                for server in able if number % 2 == 0 else able[::-1]:
                    loads[server.name].append(asyncio.run(send(server, prompts(clients, number), clients)))
            rows += [row(f"{dtype}, {clients} clients: {name}", found) for name, found in loads.items()]
    finally:
        for server in servers:
            server.close()
    return rows
