"""First contact: seconds and MB from `git clone` to a block manager's first call, a first text, a first served request.

Each way begins with nothing: a clone, an empty virtual environment, no compiled code. Writes docs/first-contact.md::

    python scripts/first_contact.py --output docs/first-contact.md
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
TORCH = "torch==2.13.0"
TEXT = ("generate", "def fibonacci(n):", "--max-new-tokens", "24")
PATIENCE = 600.0


@dataclass
class Way:
    """How far somebody has come, and what it took."""

    name: str
    extras: str
    seconds: dict[str, float] = field(default_factory=dict)
    processor: dict[str, float] = field(default_factory=dict)
    packages: dict[str, float] = field(default_factory=dict)
    megabytes: float = 0.0


def megabytes(path: Path) -> float:
    """Return what the files below a path take on the disk, each inode once."""
    files = {
        (found.st_dev, found.st_ino): found.st_blocks for found in (one.lstat() for one in [path, *path.rglob("*")])
    }
    return sum(files.values()) * 512 / 1e6


def packages(site: Path) -> dict[str, float]:
    """Return the MB of each top-level entry of site-packages, libraries beside a package counted to it."""
    found: dict[str, float] = {}
    for entry in site.iterdir():
        name = re.split(r"[.-]", entry.name)[0].lower()
        found[name] = found.get(name, 0.0) + megabytes(entry)
    return found


def processor_seconds() -> float:
    """Return the processor time of all processes that this one has waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def step(way: Way, name: str, do: Callable[[], object]) -> None:
    """Do one thing, and note what it took."""
    began, used = time.perf_counter(), processor_seconds()
    do()
    way.seconds[name] = time.perf_counter() - began
    way.processor[name] = processor_seconds() - used
    print(f"{way.name}: {name} {way.seconds[name]:.1f} s", file=sys.stderr, flush=True)


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command in an environment without this one's Python; end with what it said where it fails."""
    done = subprocess.run([*map(str, command)], cwd=cwd, env=bare(), capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}: {done.stderr[-2000:]}")
    return done.stdout


def bare() -> dict[str, str]:
    """Return the environment without what would lead to another Python, or to compiled code of before."""
    hidden = ("PYTHONPATH", "VIRTUAL_ENV", "NUMBA_CACHE_DIR", "PAGEDKV_API_KEYS")
    return {name: value for name, value in os.environ.items() if name not in hidden} | {"HOME": str(ROOT / "nowhere")}


def first_example(clone: Path) -> str:
    """Return README's first example."""
    (example, *_) = re.findall(r"^```python\n(.*?)^```", (clone / "README.md").read_text(), flags=re.M | re.S)
    return example


def served(python: Path, clone: Path) -> None:
    """Start a server, ask it for a completion as soon as it answers, and let it end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [python.parent / "pagedkv", "serve", "--port", str(port)],
        cwd=clone, env=bare(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        body = json.dumps({"prompt": "def fibonacci(n):", "max_tokens": 24}).encode()
        url, header = f"http://127.0.0.1:{port}/v1/completions", {"Content-Type": "application/json"}
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                with urllib.request.urlopen(urllib.request.Request(url, body, header), timeout=60) as answer:
                    assert json.load(answer)["choices"][0]["text"]
                    break
            except (urllib.error.URLError, ConnectionError):
                if server.poll() is not None or time.monotonic() > deadline:
                    sys.exit("the server did not come")
                time.sleep(0.05)
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait()


def measure(way: Way, repository: Path, folder: Path, torch: list[str]) -> None:
    """Go one way from the clone to what somebody came for, and once more."""
    clone, venv = folder / "pagedkv", folder / "venv"
    python = venv / "bin" / "python"
    step(way, "clone", lambda: run("git", "clone", "--quiet", "--depth", "1", repository.as_uri(), clone, cwd=folder))
    step(way, "venv", lambda: run(sys.executable, "-m", "venv", venv, cwd=folder))
    (site,) = venv.glob("lib/*/site-packages")
    empty = megabytes(site)
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", "constraints.txt"]

    def install() -> None:
        if way.extras:
            run(*pip, *torch, TORCH, cwd=clone)
        run(*pip, f".{way.extras}", cwd=clone)

    step(way, "install", install)
    way.megabytes = megabytes(site) - empty
    way.packages = packages(site)
    for name in ("first", "again"):
        if way.name == "block manager":
            step(way, name, lambda: run(python, "-c", first_example(clone), cwd=folder))
        elif way.name == "text":
            step(way, name, lambda: run(python.parent / "pagedkv", *TEXT, cwd=folder))
        else:
            step(way, name, lambda: served(python, clone))


SAID = {
    "block manager": "README's first example of the block manager",
    "text": '`pagedkv generate "def fibonacci(n):" --max-new-tokens 24`',
    "served request": "`pagedkv serve`, until a completion of 24 tokens is there",
}


WAYS = (("block manager", ""), ("text", "[hf]"), ("served request", "[serve]"))
WITH_PYTHON = ("pip", "setuptools", "pkg_resources", "_distutils_hack", "distutils")


def quickest(runs: list[Way]) -> Way:
    """Return a way with the least of each step that any run took: other work on the machine only adds."""
    best = runs[0]
    for other in runs[1:]:
        for name in best.seconds:
            best.seconds[name] = min(best.seconds[name], other.seconds[name])
            best.processor[name] = min(best.processor[name], other.processor[name])
    return best


def row(way: Way) -> str:
    """Return a line of the table."""

    def both(*names: str) -> str:
        clock, used = (sum(times[name] for name in names) for times in (way.seconds, way.processor))
        return f"{clock:.1f} ({used:.1f})"

    install = f"pip install '.{way.extras}'" if way.extras else "pip install ."
    whole = sum(way.seconds[name] for name in ("clone", "venv", "install", "first"))
    times = " | ".join((both("clone", "venv", "install"), both("first"), f"**{whole:.0f}**", both("again")))
    return f"| {SAID[way.name]} | `{install}` | {way.megabytes:,.0f} | {times} |\n"


def table_of(base: dict[str, float], most: int = 8) -> str:
    """Return what the base install has, the largest first."""
    sizes = sorted(((size, name) for name, size in base.items() if name not in WITH_PYTHON), reverse=True)
    lines = [f"| {name} | {size:,.1f} |" for size, name in sizes[:most]]
    rest = sum(size for size, _ in sizes[most:])
    return "\n".join(
        ["| package | MB |", "| --- | ---: |", *lines, f"| {len(sizes) - most} smaller ones | {rest:,.1f} |"]
    )


def page(ways: list[Way], clone_megabytes: float, torch: str, runs: int) -> str:
    """Return the page."""
    python = f"{sys.version_info[0]}.{sys.version_info[1]}"
    return f"""# First contact

What it takes from `git clone` to a result, each time with nothing there: a shallow clone, an empty virtual environment,
no compiled code. Written by `python scripts/first_contact.py --output docs/first-contact.md`, on two shared cores of a
server on which other work ran: the quicker of {runs} runs, step by step. Python {python}, torch {torch}. Seconds are
those of a clock, in brackets those of the processors, which other work does not make more. The clone came from a disk
and the packages from a mirror nearby: add what your network takes.

| until there is | install | MB | install, s | first time, s | together, s | again, s |
| --- | --- | ---: | ---: | ---: | ---: | ---: |
{"".join(map(row, ways))}
The first time compiles what it needs ([compiled code](compiled-code.md)). The clone has {clone_megabytes:,.0f} MB.
torch: the build for CPUs, which `pip install --extra-index-url https://download.pytorch.org/whl/cpu torch` gets; PyPI's
for Linux brings CUDA, several GB.

## The base install

{ways[0].megabytes:,.0f} MB without pip and setuptools, which an empty virtual environment has. Half of it is LLVM, with
which Numba compiles the kernels.

{table_of(ways[0].packages)}
"""


def main() -> None:
    """Go all ways and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repository", type=Path, default=ROOT, help="what is cloned: a folder")
    parser.add_argument("--torch-flags", default=os.environ.get("TORCH_FLAGS", ""), help="flags of pip for torch")
    parser.add_argument("--runs", type=int, default=2, help="how often each way is gone")
    parser.add_argument("--output", type=Path, help="write the page to this file")
    options = parser.parse_args()
    gone: dict[str, list[Way]] = {name: [] for name, _ in WAYS}
    clone_megabytes, torch = 0.0, ""
    for _ in range(options.runs):
        for name, extras in WAYS:
            way = Way(name, extras)
            with tempfile.TemporaryDirectory(prefix="first-contact-", ignore_cleanup_errors=True) as folder:
                measure(way, options.repository.resolve(), Path(folder), options.torch_flags.split())
                clone_megabytes = megabytes(Path(folder) / "pagedkv")
                if extras:
                    code = "import torch; print(torch.__version__)"
                    torch = run(Path(folder) / "venv" / "bin" / "python", "-c", code, cwd=Path(folder)).strip()
            gone[name].append(way)
    text = page([quickest(runs) for runs in gone.values()], clone_megabytes, torch, options.runs)
    if options.output:
        options.output.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
