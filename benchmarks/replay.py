"""Replays: block accesses per second beside other replays of the same trace, the whole curve, a giant trace's memory.

Real traces are read from ``../shared/traces`` beside the repository; where they are missing, synthetic ones stand in
and no target is judged. Peers take part where they are installed: ``pip install libcachesim kvcache-simulator``.

Speeds are per second of processor time on one core, child processes included, because a machine that others use too
lets a wall clock tell little.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from replay_peers import PEERS

from pagedkv.sim.curves import lru_curve
from pagedkv.sim.reading import read_trace
from pagedkv.sim.replayer import replay
from pagedkv.sim.synth import synthesize
from pagedkv.sim.trace import Trace

TRACES = Path(__file__).resolve().parents[2] / "shared" / "traces"
CASES = (  # name, file, stand-in and its accesses, blocks, target in million block accesses per second
    ("chat", "mooncake_conversation.jsonl.gz", "chat", 300_000, 10_000, 8.0),
    ("coding agents", "coding_agents.jsonl.gz", "agents", 1_200_000, 4_000, 40.0),
)
GIANT = 100_000_000
GIANT_BLOCKS = 100_000
BYTES_PER_BLOCK = 128


def row(
    name: str, value: float | None, unit: str, target: float | None = None, at_most: bool = True, note: str = ""
) -> dict:
    """Return one line of the table."""
    judged = target is not None and value is not None
    met = (value <= target if at_most else value >= target) if judged else None
    return {"name": name, "value": value, "unit": unit, "target": target, "met": met, "note": note}


def processor_time() -> float:
    """Return the seconds that this process and those that it waited for have computed."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def seconds(call: Callable[..., object], *arguments: object) -> float:
    """Time one call, in processor time."""
    start = processor_time()
    call(*arguments)
    return processor_time() - start


# --- speed, beside peers ---------------------------------------------------------------------------------------------


def made_peers(trace: Trace, blocks: int) -> tuple[list, list[dict]]:
    """Prepare the peers that can take part; say of the others why they cannot."""
    peers, missing = [], []
    for kind in PEERS:
        try:
            peers.append(kind(trace, blocks))
        except ImportError:
            missing.append(row(kind.name, None, "", note="not installed"))
        except (OSError, RuntimeError, subprocess.SubprocessError) as error:
            missing.append(row(kind.name, None, "", note=f"does not run here: {error}"))
    return peers, missing


def checked(peer: object, hits_of_requests: object) -> str:
    """Compare the counts of a peer with ours; an exact one must agree, of the others it is told how far they are."""
    found, ours = peer(), int(hits_of_requests[peer.counts_from :].sum())
    if peer.exact and found != ours:
        raise SystemExit(f"{peer.name} finds {found} blocks, the replay {ours}")
    return "the same hit count" if found == ours else f"{found:,} hits where ours and the OrderedDict have {ours:,}"


def speed_rows(name: str, trace: Trace, blocks: int, target: float | None, rounds: int) -> list[dict]:
    """Time replays and peers in turn."""
    replay(trace.slice(0, 2), 64)
    peers, missing = made_peers(trace, blocks)
    hits = replay(trace, blocks).hits
    notes = {peer.name: checked(peer, hits) for peer in peers}
    ours: list[float] = []
    waited: list[float] = []
    theirs: dict[str, list[float]] = {peer.name: [] for peer in peers}
    for _ in range(rounds):
        begun = time.perf_counter()
        ours.append(seconds(replay, trace, blocks))
        waited.append(time.perf_counter() - begun)
        for peer in peers:
            theirs[peer.name].append(seconds(peer))
    million, median = trace.num_accesses / 1e6, statistics.median(ours)
    what = f"{name} at {blocks:,} blocks"
    clock = f"{million / statistics.median(waited):.3g} M/s by the wall clock"
    rows = [
        row(f"{what}: pagedkv, LRU, median of {rounds}", million / median, "M/s", target, False, clock),
        row(f"{what}: pagedkv, LRU, best of {rounds}", million / min(ours), "M/s"),
    ]
    for peer, times in theirs.items():
        ratio = statistics.median(t / o for t, o in zip(times, ours, strict=True))
        note = f"{ratio:.2f} times our time; {notes[peer]}"
        rows.append(row(f"{what}: {peer}", million / statistics.median(times), "M/s", note=note))
    return rows + [line | {"name": f"{what}: {line['name']}"} for line in missing]


def curve_rows(name: str, trace: Trace, target: float | None, rounds: int) -> list[dict]:
    """Time the exact LRU curve over all capacities."""
    lru_curve(trace.slice(0, 2))
    times = [seconds(lru_curve, trace) for _ in range(rounds)]
    return [row(f"{name}: the exact LRU curve, every capacity", statistics.median(times), "s", target)]


# --- the giant, in a process of its own ------------------------------------------------------------------------------


def peak_bytes() -> int:
    """Return the most memory that this process has had at a time."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def resident_bytes() -> int:
    """Return the memory that this process has now, or its peak where only that is told."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return peak_bytes()


def giant(accesses: int) -> dict[str, float]:
    """Make a trace, replay it, and say what that took."""
    replay(synthesize("chat", accesses=1000), 64)
    bare = peak_bytes()
    started = processor_time()
    trace = synthesize("chat", accesses=accesses)
    made = processor_time() - started
    begun, started = time.perf_counter(), processor_time()
    replay(trace, GIANT_BLOCKS)
    return {
        "accesses": trace.num_accesses,
        "distinct": trace.num_distinct,
        "made": made,
        "seconds": processor_time() - started,
        "waited": time.perf_counter() - begun,
        "bare": bare,
        "peak": peak_bytes(),
        "trace": size_of(trace),
    }


def memory(accesses: int) -> dict[str, float]:
    """Replay with room for every distinct block, and say how much memory each of them takes."""
    replay(synthesize("chat", accesses=1000), 64)
    trace = synthesize("chat", accesses=accesses)
    before = resident_bytes()
    replay(trace, trace.num_distinct)
    return {"distinct": trace.num_distinct, "bytes": (peak_bytes() - before) / trace.num_distinct}


def size_of(trace: Trace) -> int:
    """Return the bytes of a trace's arrays."""
    return sum(array.nbytes for array in vars(trace).values() if isinstance(array, np.ndarray))


ALONE = {"giant": giant, "memory": memory}


def alone(what: str, accesses: int) -> dict[str, float]:
    """Call one of these in a process of its own, so that its peak is its own."""
    command = [sys.executable, __file__, "--alone", what, "--giant", str(accesses)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def giant_rows(accesses: int) -> list[dict]:
    """Replay the giant, and a tenth of it for the memory that a block takes."""
    facts, blocks = alone("giant", accesses), alone("memory", accesses // 10)
    gib, million = 2**30, 1e6
    what = f"synthetic chat, {facts['accesses'] / million:,.0f} M accesses, {facts['distinct'] / million:,.1f} M blocks"
    parts = f"{facts['bare'] / gib:.2f} GiB before the trace is made, {facts['trace'] / gib:.2f} GiB the trace"
    waited = f"{facts['waited']:.3g} s by the wall clock"
    bound = "by how much the process grows while it replays"
    target = BYTES_PER_BLOCK if accesses >= GIANT else None  # a small trace disappears in what the process has anyway
    return [
        row(f"{what}: made in", facts["made"], "s"),
        row(f"{what}: LRU at {GIANT_BLOCKS:,} blocks", facts["seconds"], "s", note=waited),
        row("the same in block accesses", facts["accesses"] / facts["seconds"] / million, "M/s"),
        row("its peak memory, the making included", facts["peak"] / gib, "GiB", note=parts),
        row(f"bytes per block, all {blocks['distinct']:,} cached", blocks["bytes"], "bytes", target, note=bound),
    ]


def measure(rounds: int, accesses: int) -> list[dict]:
    """Run everything; returns the lines of the table."""
    rows = []
    for name, file, kind, size, blocks, target in CASES:
        real = (TRACES / file).exists()
        trace = read_trace(TRACES / file) if real else synthesize(kind, accesses=size)
        name = f"{name} trace" if real else f"synthetic {name}"
        rows += speed_rows(name, trace, blocks, target if real else None, rounds)
        rows += curve_rows(name, trace, 1.0 if real else None, rounds)
    return rows + (giant_rows(accesses) if accesses else [])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="also write the lines to this file")
    parser.add_argument("--rounds", type=int, default=9, help="interleaved runs of each replay")
    parser.add_argument("--giant", type=int, default=GIANT, help="block accesses of the giant trace; 0 for none")
    parser.add_argument("--alone", choices=ALONE, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        print(json.dumps(ALONE[options.alone](options.giant)))
        return
    rows = measure(options.rounds, options.giant)
    print("| what | value | target | met | note |\n| --- | ---: | ---: | --- | --- |")
    for line in rows:
        value = "" if line["value"] is None else f"{line['value']:.3g} {line['unit']}"
        target = "" if line["target"] is None else f"{line['target']:g} {line['unit']}"
        met = {None: "", True: "yes", False: "**no**"}[line["met"]]
        print(f"| {line['name']} | {value} | {target} | {met} | {line['note']} |")
    if options.json:
        options.json.write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
