"""Run every benchmark and write one Markdown page, docs/benchmarks.md.

Each benchmark is a script of this folder that takes ``--json FILE`` and writes a list of rows
``{name, value, unit, target, met, note}``; ``target`` and ``met`` are null where nothing was promised. Each runs in a
process of its own, one after the other, so that none disturbs another.

    python benchmarks/run.py [NAME …] [--output FILE] [--budget SECONDS]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pagedkv

HERE = Path(__file__).parent
OUTPUT = HERE.parent / "docs" / "benchmarks.md"
NAMES = (
    "cold_start",
    "control",
    "memory",
    "attention",
    "streaming",
    "curves",
    "replay",
    "engine",
    "overhead",
    "cpu_engines",
    "serving",
    "fairness",
    "tiers",
    "weights",
)
OPTIONS = {"cpu_engines": ["--short"]}
BUDGET = 900.0
PACKAGES = ("numpy", "numba", "torch", "transformers")

Row = dict[str, Any]


@dataclass(frozen=True)
class Result:
    """What one benchmark gave: its rows, or why there are none."""

    name: str
    rows: list[Row]
    seconds: float
    failure: str = ""


def run_benchmark(name: str, seconds_left: float) -> Result:
    script = HERE / f"{name}.py"
    if not script.exists():
        return Result(name, [], 0.0, "there is no such script")
    print(f"==> {script.name}", flush=True)
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        rows_file = Path(folder) / "rows.json"
        try:
            done = subprocess.run(
                [sys.executable, str(script), *OPTIONS.get(name, []), "--json", str(rows_file)],
                timeout=max(1.0, seconds_left),
            )
        except subprocess.TimeoutExpired:
            return Result(name, [], time.perf_counter() - begin, "it ran out of time")
        seconds = time.perf_counter() - begin
        if done.returncode or not rows_file.exists():
            return Result(name, [], seconds, f"it ended with code {done.returncode}")
        return Result(name, json.loads(rows_file.read_text()), seconds)


def run_all(names: Iterable[str], budget: float) -> list[Result]:
    end = time.perf_counter() + budget
    return [run_benchmark(name, end - time.perf_counter()) for name in names]


# --- the machine -----------------------------------------------------------------------------------------------------


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory() -> str:
    try:
        return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"
    except (ValueError, OSError, AttributeError):
        return "unknown"


def package_version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"


def machine_facts() -> list[tuple[str, str]]:
    versions = ", ".join([f"pagedkv {pagedkv.__version__}", *(f"{name} {package_version(name)}" for name in PACKAGES)])
    return [
        ("date", datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")),
        ("processor", f"{cpu_model()}, {usable_cores()} cores usable, {memory()}"),
        ("system", f"{platform.system()} {platform.release()} {platform.machine()}"),
        ("versions", f"Python {platform.python_version()}, {versions}"),
    ]


# --- the page --------------------------------------------------------------------------------------------------------


def shown(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    return str(value)


def cells(row: Row) -> list[str]:
    value = f"{shown(row['value'])} {row.get('unit') or ''}".strip()
    met = {None: "", True: "yes", False: "**no**"}[row.get("met")]
    texts = [row["name"], value, shown(row.get("target")), met, row.get("note") or ""]
    return [str(text).replace("|", "\\|").replace("\n", " ") for text in texts]


def table(rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in rows]


def section(result: Result) -> list[str]:
    command = " ".join([f"python benchmarks/{result.name}.py", *OPTIONS.get(result.name, [])])
    title = [f"## {result.name}", "", f"`{command}`, {result.seconds:.0f} s", ""]
    if result.failure:
        return [*title, f"No figures: {result.failure}.", ""]
    head = [["what", "measured", "target", "met", "note"], ["---", "---:", "---:", "---", "---"]]
    return [*title, *table(head + [cells(row) for row in result.rows]), ""]


def summary(results: list[Result]) -> str:
    judged = [row["met"] for result in results for row in result.rows if row.get("met") is not None]
    return f"{sum(judged)} of {len(judged)} targets met."


def page(results: list[Result]) -> str:
    lines = [
        "# Benchmarks",
        "",
        "Written by `make bench`. Ratios are taken within one run, interleaved; absolute times",
    ]
    lines += ["belong to this machine, which may be busy with other work.", ""]
    lines += table([["", ""], ["---", "---"], *([name, fact] for name, fact in machine_facts())])
    lines += ["", summary(results), ""]
    for result in results:
        lines += section(result)
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="Run the benchmarks and write docs/benchmarks.md")
    parser.add_argument("names", nargs="*", default=NAMES, help=f"which: {', '.join(NAMES)} (default: all)")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for all of them together")
    options = parser.parse_args()
    results = run_all(options.names, options.budget)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(page(results), encoding="utf-8")
    print(f"==> {options.output}: {summary(results)}")
    failed = [result for result in results if result.failure]
    for result in failed:
        print(f"{result.name}: {result.failure}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
