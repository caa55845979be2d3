"""First contact: seconds and MB from `git clone` to a block manager's first call, a first text and a first served request.

Each way begins with nothing: a clone, an empty virtual environment, no compiled code. Writes docs/first-contact.md::

    python scripts/first_contact.py --output docs/first-contact.md
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shutil
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
    files = {(found.st_dev, found.st_ino): found.st_blocks for found in (one.lstat() for one in [path, *path.rglob("*")])}
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


def page(ways: list[Way], clone_megabytes: float, commit: str) -> str:
    """Return the page."""
    head = f"""# First contact

What it takes from `git clone` to a result, each time with nothing there: a shallow clone, an empty virtual environment, no compiled
code. Written by `python scripts/first_contact.py --output docs/first-contact.md` on two shared cores of a server, on which other
work ran, with Python {sys.version_info[0]}.{sys.version_info[1]} and {commit}. Seconds are those of a clock, the processor's in brackets. The clone came from
a disk and the packages from a mirror nearby: add what your network takes for the MB.

| until there is | install | MB on the disk | install, s | first time, s | together, s | again, s |
| --- | --- | ---: | ---: | ---: | ---: | ---: |
"""

    def both(way: Way, *names: str) -> str:
        seconds = sum(way.seconds[name] for name in names)
        return f"{seconds:.1f} ({sum(way.processor[name] for name in names):.1f})"

    rows = "".join(
        f"| {SAID[way.name]} | `pip install {'.' + way.extras if not way.extras else repr('.' + way.extras)}` "
        f"| {way.megabytes:,.0f} | {both(way, 'clone', 'venv', 'install')} | {both(way, 'first')} "
        f"| **{sum(way.seconds[name] for name in ('clone', 'venv', 'install', 'first')):.0f}** | {both(way, 'again')} |\n"
        for way in ways
    )
    base = ways[0].packages
    shown = [name for name in sorted(base, key=base.__getitem__, reverse=True) if name not in ("pip", "setuptools", "pkg_resources")]
    most = shown[:8]
    rest = sum(base[name] for name in shown[8:])
    table = "| package | MB |\n| --- | ---: |\n" + "".join(f"| {name} | {base[name]:,.1f} |\n" for name in most)
    table += f"| {len(shown) - 8} more entries | {rest:,.1f} |\n"
    return f"""{head}{rows}
The first time compiles what it needs ([compiled code](compiled-code.md)); the clone itself has {clone_megabytes:,.0f} MB. `torch` is that of
the index that pip is given: the CPU build (`--extra-index-url https://download.pytorch.org/whl/cpu`) takes about 0.7 GB, PyPI's for Linux brings CUDA
and takes several.

## The base install

{ways[0].megabytes:,.0f} MB, of which LLVM is the half: Numba compiles the kernels with it. pip and setuptools, which an empty virtual environment has, are not
counted.

{table}
"""


def main() -> None:
    """Go all ways and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repository", type=Path, default=ROOT, help="what is cloned: a folder")
    parser.add_argument("--torch-flags", default=os.environ.get("TORCH_FLAGS", ""), help="flags of pip for torch")
    parser.add_argument("--output", type=Path, help="write the page to this file")
    options = parser.parse_args()
    ways = [Way("block manager", ""), Way("text", "[hf]"), Way("served request", "[serve]")]
    clone_megabytes = 0.0
    for way in ways:
        folder = Path(tempfile.mkdtemp(prefix="first-contact-"))
        try:
            measure(way, options.repository.resolve(), folder, options.torch_flags.split())
            clone_megabytes = megabytes(folder / "pagedkv")
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    commit = run("git", "log", "-1", "--format=commit %h", cwd=options.repository).strip()
    text = page(ways, clone_megabytes, commit)
    if options.output:
        options.output.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
