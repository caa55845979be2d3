"""Plant one-line faults in a copy of the tree, one at a time, and see whether the tests that matter notice.

The faults stand in tests/mutants.toml. A fault in a kernel meets its tests in plain Python first, where nothing has to
be compiled; what lives meets all of them compiled. Run from the root of the repository; it takes about half an hour::

    python scripts/mutants.py
    python scripts/mutants.py --only control/prefix
    python scripts/mutants.py --sample 10
    python scripts/mutants.py --check          whether each fault still has its line

The exit code is 1 where fewer than 95% are noticed, or a fault has lost its line.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "src"))

from pagedkv.kernel_cache import kernel_files  # noqa: E402

LISTED = tomllib.loads((ROOT / "tests" / "mutants.toml").read_text())
COPIED = ("src", "tests", "docs", "scripts", "benchmarks", "pyproject.toml", "constraints.txt", "Makefile", "README.md")
WANTED = 0.95


@dataclass(frozen=True)
class Mutant:
    """A line, or a piece of one that stands once in its file, and what it becomes."""

    path: str
    old: str
    new: str
    tests: tuple[str, ...]
    survives: str = ""  # why no test can notice it, for those that live

    @property
    def name(self) -> str:
        return f"{self.path.removeprefix('src/pagedkv/')}: {' '.join(self.old.split())}"

    def text(self, root: Path) -> str | None:
        """Return the file with the fault, or None where the line is not there once."""
        file = root / self.path
        text = file.read_text() if file.exists() else ""
        return text.replace(self.old, self.new) if text.count(self.old) == 1 else None


def mutants() -> list[Mutant]:
    """Read the list; ``tests`` is the name of one of its suites."""
    suites = {name: tuple(tests) for name, tests in LISTED["suites"].items()}
    return [Mutant(**{**each, "tests": suites[each["tests"]]}) for each in LISTED["mutants"]]


@contextmanager
def copied_tree() -> Iterator[Path]:
    """Yield a copy of the tree that faults may be planted in."""
    with tempfile.TemporaryDirectory(prefix="pagedkv-mutants-") as folder:
        for name in COPIED:
            source, target = ROOT / name, Path(folder) / name
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns(".hypothesis"))
            else:
                shutil.copy2(source, target)
        yield Path(folder)


def run_tests(root: Path, tests: Iterable[str], limit: float, **variables: str) -> bool | None:
    """Return whether the tests of a tree pass; None where they are not done in time, as a loop without end is not."""
    fixed = {"PYTHONPATH": str(root / "src"), "PYTHONDONTWRITEBYTECODE": "1", "HYPOTHESIS_PROFILE": "fail_fast"}
    environment = os.environ | fixed | variables
    environment.pop("CI", None)  # there a browser that is missing is a failure
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    with tempfile.TemporaryFile() as out:
        try:
            done = subprocess.run(command, cwd=root, env=environment, stdout=out, stderr=out, timeout=limit)
        except subprocess.TimeoutExpired:
            return None
        if done.returncode > 1:  # nothing was collected, or the fault keeps the package from being imported
            out.seek(0)
            told = out.read().decode(errors="replace")
            if "no tests ran" in told and "error" not in told.lower():
                raise SystemExit(f"no tests ran in {' '.join(tests)}")
    return done.returncode == 0


def run_plain(root: Path, tests: Iterable[str], limit: float) -> bool | None:
    """Run the tests that are quick in plain Python; a single one takes a few seconds there."""
    slow = LISTED["slow_in_plain"]
    quick = [test for test in tests if test not in slow]
    if not quick:
        return True
    left_out = [f"--deselect={test}" for test in slow]
    return run_tests(root, [*quick, *left_out, f"--timeout={limit / 10}"], limit, NUMBA_DISABLE_JIT="1")


def chosen(everything: list[Mutant], only: str, sample: int | None, seed: int) -> list[Mutant]:
    """Return those whose name holds a text, or so many of them at random."""
    found = [each for each in everything if only in each.name]
    if sample is None or sample >= len(found):
        return found
    return random.Random(seed).sample(found, sample)


@contextmanager
def planted(file: Path, text: str) -> Iterator[None]:
    """Write a fault, and afterwards the file as it was, of the same time: what was compiled of it stays good."""
    original, stat = file.read_text(), file.stat()
    file.write_text(text)
    try:
        yield
    finally:
        file.write_text(original)
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def fate_of(mutant: Mutant, root: Path, kernels: set[str], limit: float) -> str:
    """Plant a fault, run its tests and take it out again."""
    text = mutant.text(root)
    if text is None:
        return "no such line"
    file, is_in_kernel = root / mutant.path, mutant.path in kernels
    # Kernels with a fault are thrown away, so that those without are kept.
    with planted(file, text), tempfile.TemporaryDirectory(prefix="pagedkv-kernels-") as thrown_away:
        passed = run_plain(root, mutant.tests, limit) if is_in_kernel else True
        if passed:
            variables = {"NUMBA_CACHE_DIR": thrown_away} if is_in_kernel else {}
            passed = run_tests(root, mutant.tests, limit, **variables)
    return "LIVES" if passed else "dies" if passed is False else "dies (time)"


def main() -> int:
    """Print a table; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="TEXT", help="faults whose path or line holds this text")
    parser.add_argument("--sample", type=int, metavar="N", help="so many of them, drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds for the tests of one fault")
    parser.add_argument("--check", action="store_true", help="run nothing: see that every fault has its line")
    options = parser.parse_args()

    picked = chosen(mutants(), options.only, options.sample, options.seed)
    if not picked:
        raise SystemExit(f"--only: no fault has {options.only!r} in its path or line")
    if options.check:
        lost = [each.name for each in picked if each.text(ROOT) is None]
        print(
            *(f"no such line: {name}" for name in lost), f"{len(picked)} faults, {len(lost)} without a line", sep="\n"
        )
        return bool(lost)

    fates: dict[Mutant, str] = {}
    with copied_tree() as root:
        started = time.monotonic()
        kernels = {str(path.relative_to(ROOT)) for path in kernel_files(ROOT / "src" / "pagedkv").values()}
        plain = {test: None for each in picked if each.path in kernels for test in each.tests}
        tests = {test: None for each in picked for test in each.tests}
        if not (run_plain(root, plain, 10 * options.limit) and run_tests(root, tests, 10 * options.limit)):
            raise SystemExit("the tests fail without a fault")
        print(f"the tests pass without a fault: {len(tests)} files, {time.monotonic() - started:.0f} s", flush=True)
        for number, mutant in enumerate(picked, start=1):
            started = time.monotonic()
            fates[mutant] = fate_of(mutant, root, kernels, options.limit)
            took = time.monotonic() - started
            print(f"{number:3}/{len(picked)} {fates[mutant]:12} {took:5.0f} s  {mutant.name}", flush=True)
    living = [mutant for mutant, fate in fates.items() if not fate.startswith("dies")]
    share = 1 - len(living) / len(fates)
    print(f"{len(fates) - len(living)} of {len(fates)} faults were noticed: {share:.1%}, at least {WANTED:.0%} wanted")
    for mutant in living:
        print(f"  {fates[mutant]}: {mutant.name}\n      {mutant.survives or 'unexplained: it wants a test'}")
    return int(share < WANTED or "no such line" in fates.values())


if __name__ == "__main__":
    sys.exit(main())
