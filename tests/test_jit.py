"""Compiled kernels: never old code, compiled once among processes, kept where it can be, in nobody's way."""

from __future__ import annotations

import ast
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import pagedkv
from pagedkv.kernel_cache import kernel_files

PACKAGE = Path(pagedkv.__file__).parent
WAITING = "pagedkv: waiting for another process that compiles its kernels"
COMPILING = "pagedkv: compiling its kernels"

# A kernel that calls another one. Its compile lasts until there is a file "go", if "hold" tells it to wait.
KERNEL = """
import json, os, sys, time
from numba import types
from numba.extending import intrinsic
from pagedkv.jit import compiled, watch_compiles

@intrinsic
def held(context, number):
    if os.path.exists("hold"):
        open(f"compiling-{os.getpid()}", "w").close()
        while not os.path.exists("go"):
            time.sleep(0.01)
    return types.int64(types.int64), lambda context, builder, signature, args: args[0]

@compiled
def inner(number):
    return number + 1

@compiled
def outer(number):
    return held(inner(number)) * 10

def run():
    compiles = []
    with watch_compiles(lambda name, seconds: compiles.append((name, seconds))):
        answer = outer(4)
    loads = sum(outer.stats.cache_hits.values()) if hasattr(outer, "stats") else 0
    names = [name for name, seconds in compiles if seconds > 0]
    print(json.dumps([answer, names, loads]))

if __name__ == "__main__":
    run()
"""


def environment(**changes: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("NUMBA_")}
    return kept | {"PYTHONPATH": str(PACKAGE.parent), "PYTHONDONTWRITEBYTECODE": "1"} | changes


def run(code: str, folder: Path, **changes: str) -> str:
    """Run a program in a new process with an own cache, and return what it printed; errors of it are shown."""
    given = {"NUMBA_CACHE_DIR": str(folder / "cache")} | changes
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, cwd=folder, env=environment(**given), capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


class Kernel:
    """The program KERNEL in a folder, where it can be run by several processes that share a cache."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: list[subprocess.Popen[str]] = []
        (folder / "kernel.py").write_text(KERNEL)

    def start(self, **changes: str) -> subprocess.Popen[str]:
        given = environment(**({"NUMBA_CACHE_DIR": str(self.folder / "cache")} | changes))
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen([sys.executable, "kernel.py"], cwd=self.folder, env=given, **pipes)
        self.processes.append(process)
        return process

    def run(self, **changes: str) -> tuple[list[Any], str]:
        return self.end(self.start(**changes))

    def end(self, process: subprocess.Popen[str]) -> tuple[list[Any], str]:
        """Return what it printed, and what it said to the terminal or the log."""
        printed, said = process.communicate(timeout=120)
        assert process.returncode == 0, said
        return json.loads(printed), said

    def hold(self) -> None:
        (self.folder / "hold").touch()

    def go(self) -> None:
        (self.folder / "go").touch()

    def compiling(self) -> list[int]:
        """Return the processes that got as far as to compile."""
        return [int(path.name.split("-")[1]) for path in self.folder.glob("compiling-*")]


def wait_for(condition: Any) -> None:
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not happen")


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stderr is not None
    assert select.select([process.stderr], [], [], 60)[0], "it said nothing"
    return process.stderr.readline()


@pytest.fixture
def kernel(tmp_path: Path) -> Iterator[Kernel]:
    kernel = Kernel(tmp_path)
    yield kernel
    for process in kernel.processes:
        process.kill()
        process.communicate()


# New sources, new code


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the package's sources, that may be changed."""
    shutil.copytree(PACKAGE, tmp_path / "src" / "pagedkv", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "src" / "pagedkv"


# Loads what is expensive once, then answers each question in a new process, which imports pagedkv by itself.
PROBE = """
import importlib, json, os, sys
import numba, numpy, torch

numba.njit(lambda x: x + 1)(1)  # fills Numba's own tables

def answer(names):
    from pagedkv.jit import watch_compiles
    compiles, answers = [], []
    with watch_compiles(lambda name, seconds: compiles.append(name)):
        for name in names:
            answers.append(importlib.import_module(name).probe())
    print(json.dumps([answers, len(compiles)]), flush=True)

for line in sys.stdin:
    child = os.fork()
    if not child:
        try:
            answer(line.split())
        except BaseException as error:
            print(json.dumps(repr(error)), flush=True)
        finally:
            os._exit(0)
    os.waitpid(child, 0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork, to be quick")
def test_a_changed_constant_in_any_kernel_file_gives_new_code_at_once(copy: Path, tmp_path: Path) -> None:
    files = kernel_files(copy)
    assert len(files) > 20
    probes = {}
    for number, (module, path) in enumerate(files.items()):
        path.write_text(path.read_text() + "\nPROBED_CONSTANT = 1\n")
        probe = f"from {module} import PROBED_CONSTANT\nfrom pagedkv.jit import compiled\n\n\n@compiled\ndef probe():\n"
        (copy / f"probe_{number}.py").write_text(probe + "    return PROBED_CONSTANT\n")
        probes[module] = f"pagedkv.probe_{number}"
    given = environment(PYTHONPATH=str(copy.parent), NUMBA_CACHE_DIR=str(tmp_path / "cache"))
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    with subprocess.Popen([sys.executable, "-c", PROBE], env=given, stderr=subprocess.DEVNULL, **pipes) as process:

        def ask(*names: str) -> Any:
            process.stdin.write(" ".join(names) + "\n")
            return json.loads(process.stdout.readline())

        everything = list(probes.values())
        assert ask(*everything) == [[1] * len(files), len(files)]
        assert ask(*everything) == [[1] * len(files), 0]
        for number, (module, path) in enumerate(files.items()):
            path.write_text(path.read_text().replace("PROBED_CONSTANT = 1\n", f"PROBED_CONSTANT = {number + 1000}\n"))
            assert ask(probes[module]) == [[number + 1000], 1], module
        process.stdin.close()


@pytest.mark.slow
def test_a_changed_constant_of_the_books_is_seen_at_once(copy: Path, tmp_path: Path) -> None:
    count = (
        "from pagedkv import BlockManager\nbooks = BlockManager(4, 4)\n"
        "books.allocate(7, [1, 2, 3])\nprint('counted', books._state.blocks['access_count'].max())"
    )
    assert "counted 1\n" in run(count, tmp_path, PYTHONPATH=str(copy.parent))
    changes = 0
    for path in kernel_files(copy).values():
        text, found = re.subn(r"\.access_count = 1\b", ".access_count = 77", path.read_text())
        changes += found
        path.write_text(text)
    assert changes == 1
    assert "counted 77\n" in run(count, tmp_path, PYTHONPATH=str(copy.parent))


def test_every_compiled_function_is_in_a_file_that_counts() -> None:
    code = (
        "import importlib, sys\nfrom numba.core.dispatcher import Dispatcher\n"
        "from pagedkv.kernel_cache import kernel_files\n"
        "for name in kernel_files(): importlib.import_module(name)\n"
        "import pagedkv.engine, pagedkv.sim, pagedkv.data.cpu\n"
        "modules = [m for name, m in list(sys.modules.items()) if name.startswith('pagedkv')]\n"
        "print(*{v.__module__ for m in modules for v in vars(m).values() if isinstance(v, Dispatcher)})"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    modules = set(done.stdout.split())
    assert len(modules) > 10 and modules <= set(kernel_files())


def test_kernel_files_name_each_other_in_full() -> None:
    """Imports relative to a package would not be followed."""
    for module, path in kernel_files().items():
        for node in ast.walk(ast.parse(path.read_text())):
            assert not isinstance(node, ast.ImportFrom) or node.level == 0, module


def test_what_no_kernel_uses_may_change(copy: Path) -> None:
    assert {f"pagedkv.{name}" for name in ("cli.app", "server", "cache")}.isdisjoint(kernel_files(copy))


def test_settings_that_change_the_code_are_in_the_digest(tmp_path: Path) -> None:
    code = "from pagedkv.kernel_cache import kernel_digest; print(kernel_digest())"
    assert run(code, tmp_path) == run(code, tmp_path)
    assert run(code, tmp_path) != run(code, tmp_path, NUMBA_BOUNDSCHECK="1")


def test_code_of_sources_that_changed_under_a_process_is_not_kept(copy: Path, tmp_path: Path) -> None:
    code = KERNEL.replace("\nif __name__", "\nfrom pathlib import Path\nPath(sys.argv[1]).touch()\nif __name__")
    (tmp_path / "kernel.py").write_text(code)
    given = environment(PYTHONPATH=str(copy.parent), NUMBA_CACHE_DIR=str(tmp_path / "cache"))
    for _ in range(2):
        command = [sys.executable, "kernel.py", str(copy / "jit.py")]
        done = subprocess.run(command, cwd=tmp_path, env=given, capture_output=True, text=True, check=True)
        assert json.loads(done.stdout)[1] == ["__main__.inner", "__main__.outer"]
    assert not list((tmp_path / "cache").rglob("*.nbc"))


def test_code_of_the_last_three_states_of_the_sources_is_kept(copy: Path, kernel: Kernel) -> None:
    digests = []
    for number in range(5):
        (copy / "jit.py").write_text((copy / "jit.py").read_text() + f"# {number}\n")
        kernel.run(PYTHONPATH=str(copy.parent))
        names = {path.name for path in (kernel.folder / "cache").rglob("*.nbc")}
        found = {match[1] for name in names if (match := re.search(r"-([0-9a-f]{16})-[0-9a-f]{16}\.nbc$", name))}
        digests.append(next(iter(found - set(digests))))
        assert found == set(digests[-3:])
        assert len(names) == 2 * len(found)


def test_a_damaged_file_is_replaced(kernel: Kernel) -> None:
    kernel.run()
    files = list((kernel.folder / "cache").rglob("*.nbc"))
    for path in files:
        path.write_bytes(path.read_bytes()[:100])
    assert kernel.run()[0][:2] == [50, ["__main__.inner", "__main__.outer"]]
    assert kernel.run()[0][:2] == [50, []]
    assert set((kernel.folder / "cache").rglob("*.nbc")) == set(files)


# One process compiles


def test_of_four_processes_one_compiles(kernel: Kernel) -> None:
    kernel.hold()
    processes = [kernel.start() for _ in range(4)]
    said = {process.pid: first_line(process) for process in processes}
    wait_for(kernel.compiling)
    (holder,) = kernel.compiling()
    assert COMPILING in said.pop(holder)
    assert set(said.values()) == {WAITING + "\n"}
    kernel.go()
    for process in processes:
        (answer, compiles, loads), more = kernel.end(process)
        is_holder = process.pid == holder
        assert answer == 50 and more == ""
        assert compiles == (["__main__.inner", "__main__.outer"] if is_holder else [])
        assert loads == (0 if is_holder else 1)


@pytest.mark.skipif(sys.platform == "win32", reason="a process is killed by a signal")
def test_a_process_goes_on_when_the_one_that_compiles_dies(kernel: Kernel) -> None:
    kernel.hold()
    holder = kernel.start()
    wait_for(kernel.compiling)
    waiter = kernel.start()
    assert first_line(waiter) == WAITING + "\n"
    (kernel.folder / "hold").unlink()
    holder.send_signal(signal.SIGKILL)
    (answer, compiles, loads), _ = kernel.end(waiter)
    assert (answer, compiles, loads) == (50, ["__main__.outer"], 0)  # the inner one was kept before
    assert kernel.run()[0][:2] == [50, []]


def test_a_process_does_not_wait_for_ever(kernel: Kernel) -> None:
    limit = "import pagedkv.kernel_cache\npagedkv.kernel_cache._WAIT_SECONDS = 0.2\n"
    kernel.hold()
    kernel.start()
    wait_for(kernel.compiling)
    (kernel.folder / "hold").unlink()
    code = limit + "import runpy\nrunpy.run_path('kernel.py', run_name='__main__')"
    said = run(code, kernel.folder)
    assert '[50, ["__main__.outer"], 0' in said and "waited too long for another process" in said


def test_locks_that_do_not_work_are_done_without(kernel: Kernel) -> None:
    kernel.run()
    (lock,) = (kernel.folder / "cache").rglob("pagedkv.lock")
    for path in [*lock.parent.glob("*.nbc"), lock]:
        path.unlink()
    lock.mkdir()
    assert kernel.run()[0][:2] == [50, ["__main__.inner", "__main__.outer"]]
    assert kernel.run()[0][:2] == [50, []]


def test_a_failed_compile_lets_others_go_on(tmp_path: Path) -> None:
    (tmp_path / "kernel.py").write_text(KERNEL.replace("number + 1", "number + 'a'"))
    code = (
        "from numba.core.errors import TypingError\nfrom pagedkv import kernel_cache\n"
        "import kernel, subprocess, sys, os\n"
        "try: kernel.outer(4)\nexcept TypingError: pass\nelse: raise AssertionError\n"
        "assert kernel_cache._running == []\n"
        "if len(sys.argv) == 1: subprocess.run([*sys.orig_argv, 'again'], check=True, timeout=60)\n"
    )
    assert "waiting" not in run(code, tmp_path)


# In nobody's way


def test_a_structref_is_defined_after_the_import(tmp_path: Path) -> None:
    (tmp_path / "users.py").write_text(
        "import pagedkv.cache, numba\nfrom numba.core import types\nfrom numba.experimental import structref\n\n"
        "@structref.register\nclass PointType(types.StructRef):\n    pass\n\n"
        "class Point(structref.StructRefProxy):\n    def __new__(cls, x):\n"
        "        return structref.StructRefProxy.__new__(cls, x)\n\n"
        "structref.define_proxy(Point, PointType, ['x'])\n\n"
        "@numba.njit\ndef x_of(point):\n    return point.x\n\n"
        "print('x is', x_of(Point(3)))\n"
    )
    code = "import runpy; runpy.run_path('users.py', run_name='users')"
    assert run(code, tmp_path) == "x is 3\n"


def test_no_listener_hears_the_users_compiles(tmp_path: Path) -> None:
    code = "import pagedkv.jit\nfrom numba.core import event\nprint(event._registered['numba:compile'])"
    assert run(code, tmp_path) == "[]\n"


def test_the_first_compile_is_a_line_in_the_log(kernel: Kernel) -> None:
    said = kernel.run()[1]
    (entry, _) = (kernel.folder / "cache").rglob("*.nbc")
    assert said == f"{COMPILING}; this happens once, the result is kept in {entry.parent}\n"
    assert kernel.run()[1] == ""


def test_the_directory_is_known_before_anything_is_compiled(tmp_path: Path) -> None:
    directory = Path(run("from pagedkv.jit import cache_directory\nprint(cache_directory())", tmp_path).rstrip())
    assert directory.parent == tmp_path / "cache" and directory.is_dir()


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_a_terminal_sees_a_line_that_counts_and_is_cleared(kernel: Kernel) -> None:
    import pty

    terminal, end = pty.openpty()
    given = environment(NUMBA_CACHE_DIR=str(kernel.folder / "cache"), COLUMNS="70")
    command = [sys.executable, "kernel.py"]
    subprocess.run(command, cwd=kernel.folder, env=given, stdout=subprocess.DEVNULL, stderr=end, check=True)
    os.close(end)
    shown = b""
    try:
        while part := os.read(terminal, 4096):
            shown += part
    except OSError:  # the end, on Linux
        pass
    os.close(terminal)
    lines = shown.decode().split("\r")
    assert lines[1].startswith(f"{COMPILING}, once: 0 done, now __main__.outer")
    assert any(line.startswith(f"{COMPILING}, once: 1 done, now __main__.outer") for line in lines)
    assert lines[-2].strip() == "" and lines[-1] == "" and "\n" not in shown.decode()
    assert max(len(line) for line in lines) == 69 == len(lines[-2])


# Where it is kept


def test_where_nothing_can_be_written_the_code_is_not_kept(copy: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (copy / "__pycache__").touch()
    home = str(tmp_path / "file" / "below")
    given = {"PYTHONPATH": str(copy.parent), "NUMBA_CACHE_DIR": home, "HOME": home, "XDG_CACHE_HOME": home}
    code = (
        "import pagedkv.jit\nimport pagedkv.probe_nowhere as probe\n"
        "print(probe.one(1), probe.two(1), pagedkv.jit.cache_directory())"
    )
    kernels = "from pagedkv.jit import compiled\n\n\n@compiled\ndef one(x):\n    return x\n\n\n@compiled\ndef two(x):\n"
    (copy / "probe_nowhere.py").write_text(kernels + "    return x + 1\n")
    printed, said = run(code, tmp_path, **given).splitlines()
    assert printed == "1 2 None"
    assert said.startswith(f"{COMPILING} in every process") and "NUMBA_CACHE_DIR" in said


def test_code_that_was_shipped_is_loaded_where_nothing_can_be_written(copy: Path, tmp_path: Path) -> None:
    """As in a container whose image was built by another user than the one that runs it."""
    (tmp_path / "file").touch()
    (copy / "probe.py").write_text("from pagedkv.jit import compiled\n\n\n@compiled\ndef probe(x):\n    return x\n")
    home = str(tmp_path / "file" / "below")
    code = "import pagedkv.jit as jit\nimport pagedkv.probe\nprint(pagedkv.probe.probe(1), jit.cache_directory())"
    given = {"PYTHONPATH": str(copy.parent), "NUMBA_CACHE_DIR": "", "HOME": home, "XDG_CACHE_HOME": home}
    assert run(code, tmp_path, **given).startswith(f"1 {copy / '__pycache__'}\n{COMPILING}")
    # Root may write everywhere, so the directory is made to refuse by hand.
    refuse = (
        "import tempfile\n\ndef refuse(*args, **kwargs): raise PermissionError\n\ntempfile.TemporaryFile = refuse\n"
    )
    assert run(refuse + code, tmp_path, **given) == "1 None\n"


def test_a_full_disk_costs_a_warning(kernel: Kernel) -> None:
    full = (
        "import pathlib\n\ndef full(*args): raise OSError(28, 'No space left on device')\n\n"
        "import runpy\nimport pagedkv.jit\npathlib.Path.write_bytes = full\n"
        "runpy.run_path('kernel.py', run_name='__main__')"
    )
    said = run(full, kernel.folder)
    assert said.startswith("[50,") and said.count("cannot be kept") == 1 and "No space left" in said


def test_without_compiling_the_functions_are_plain_python(tmp_path: Path) -> None:
    code = KERNEL.replace("held(inner(number))", "inner(number)")
    (tmp_path / "kernel.py").write_text(code)
    assert run("import kernel; kernel.run()", tmp_path, NUMBA_DISABLE_JIT="1") == "[50, [], 0]\n"


PARTS = """
from pagedkv.jit import compiled

@compiled
def part(number):
    return number + 1

@compiled
def whole(number):
    return 2 * part(number)
"""


@pytest.mark.parametrize("calls", [("whole", "part"), ("part", "whole"), ("whole", "part", "whole", "part")])
def test_a_kernel_is_kept_apart_for_python_and_as_a_part_of_others(tmp_path: Path, calls: tuple[str, ...]) -> None:
    """One has no wrapper for Python: called from there it would jump to nowhere."""
    (tmp_path / "parts.py").write_text(PARTS)
    for call in calls:
        printed = run(f"import parts; print(parts.{call}(20))", tmp_path, PYTHONPATH=f"{PACKAGE.parent}:{tmp_path}")
        assert printed.splitlines()[0] == {"part": "21", "whole": "42"}[call]


ENTERED = """
import numpy as np
from pagedkv.jit import compiled, enter, entry_of, watch_compiles

@compiled
def inner(numbers, nothing, place):
    if place >= len(numbers):
        raise ValueError("beyond")
    if nothing is None:
        numbers[place] += 1

@compiled
def outer(entry, numbers, count):
    for place in range(count):
        enter(entry, numbers, None, place)

compiles, numbers = [], np.zeros(3, np.float32)
with watch_compiles(lambda name, seconds: compiles.append(name.split(".")[-1])):
    entry = entry_of(inner, (numbers, None, 0))
    inner(numbers, None, 2)
    outer(entry, numbers, 3)
    try:
        outer(entry, numbers, 4)
    except ValueError as error:
        print(error)
print(numbers.tolist(), compiles)
try:
    outer(entry, numbers.astype(np.float64), 1)
except Exception as error:
    print(type(error).__name__)
"""


def test_a_kernel_is_entered_by_others_without_being_compiled_for_them(tmp_path: Path) -> None:
    """And what is wrong with its arguments is an error of the compiler, not a call with other types."""
    (tmp_path / "entered.py").write_text(ENTERED)
    for compiles in (["inner", "outer"], []):
        printed = run("import entered", tmp_path, PYTHONPATH=f"{PACKAGE.parent}:{tmp_path}").splitlines()
        assert printed[:3] == ["beyond", f"[2.0, 2.0, 3.0] {compiles}", "TypingError"]


def test_interpreted_kernels_are_entered_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "entered.py").write_text(ENTERED)
    path = f"{PACKAGE.parent}:{tmp_path}"
    printed = run("import entered", tmp_path, PYTHONPATH=path, NUMBA_DISABLE_JIT="1").splitlines()
    assert printed == ["beyond", "[2.0, 2.0, 3.0] []"]


COUNTED_PARTS = """
import gc
from pagedkv.jit import called, compiled, watch_compiles

@called
def part(number):
    return number + 1

@compiled
def whole(number):
    return 2 * part(number)

@compiled
def wrong(number):
    return number.no_such_thing

seen = []
with watch_compiles(lambda name, seconds: seen.append(gc.isenabled())):
    whole(20)
try:
    wrong(20)
except Exception as error:
    seen.append(type(error).__name__)
print(seen, gc.isenabled())
(code,) = part._part.overloads.values()
print(code.library._codegen._engine.is_symbol_defined(code.fndesc.llvm_func_name))
"""


def test_python_collects_no_garbage_during_a_compile_alone(tmp_path: Path) -> None:
    (tmp_path / "parts.py").write_text(COUNTED_PARTS)
    printed = run("import parts", tmp_path, PYTHONPATH=f"{PACKAGE.parent}:{tmp_path}")
    assert "[False, False, 'TypingError'] True" in printed


GARBAGE = """
import gc, weakref
from pagedkv.jit import compiled, watch_compiles

class Ring:
    def __init__(self):
        self.ring = self

@compiled
def double(number):
    return 2 * number

gc.disable()
left = weakref.ref(Ring())
before, after = left() is not None, []
with watch_compiles(lambda name, seconds: after.append(left() is not None)):
    double(20)
print(before, after, gc.isenabled())
"""


def test_what_a_compile_leaves_over_is_collected_at_its_end(tmp_path: Path) -> None:
    (tmp_path / "garbage.py").write_text(GARBAGE)
    printed = run("import garbage", tmp_path, PYTHONPATH=f"{PACKAGE.parent}:{tmp_path}")
    assert "True [False] False" in printed


def test_a_part_has_no_machine_code_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "parts.py").write_text(COUNTED_PARTS)
    printed = run("import parts", tmp_path, PYTHONPATH=f"{PACKAGE.parent}:{tmp_path}")
    assert printed.splitlines()[1] == "False"


# Ctrl-C

INTERRUPTED = """
import os, signal, sys, threading, time
from numba import types
from numba.extending import intrinsic
from pagedkv.jit import compiled

@intrinsic
def pressed(context, number):
    for _ in range(int(sys.argv[1])):
        os.kill(os.getpid(), signal.SIGINT)
        sum(range(1000))
    return types.int64(types.int64), lambda context, builder, signature, args: args[0]

@compiled
def kernel(number):
    return pressed(number) + 1

def call():
    try:
        seen.append(kernel(1))
    except KeyboardInterrupt:
        seen.append("Ctrl-C")
    seen.append(len(kernel.overloads))

seen = []
before = signal.default_int_handler
if sys.argv[2] == "own":
    before = lambda number, frame: seen.append(["own", number == signal.SIGINT, frame is not None])
signal.signal(signal.SIGINT, before if sys.argv[2] != "ignored" else signal.SIG_IGN)
if sys.argv[2] == "thread":
    came = []
    threading.Thread(target=call).start()
    while len(seen) < 2:
        try:
            time.sleep(0.01)
        except KeyboardInterrupt:
            came.append("Ctrl-C")
    seen += came
else:
    call()
is_back = signal.getsignal(signal.SIGINT) == (before if sys.argv[2] != "ignored" else signal.SIG_IGN)
print([*seen, is_back])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="a process is interrupted by a signal")
@pytest.mark.parametrize(
    ("presses", "handler", "expected"),
    [
        (1, "default", ["Ctrl-C", 1, True]),  # once it is compiled
        (2, "default", ["Ctrl-C", 0, True]),  # at once
        (1, "own", [["own", True, True], 2, 1, True]),
        (2, "own", [["own", True, True], ["own", True, True], 2, 1, True]),
        (1, "ignored", [2, 1, True]),
        (1, "thread", [2, 1, "Ctrl-C", True]),
    ],
)
def test_ctrl_c_waits_for_the_end_of_a_compile(
    tmp_path: Path, presses: int, handler: str, expected: list[object]
) -> None:
    (tmp_path / "interrupted.py").write_text(INTERRUPTED)
    code = f"import runpy, sys; sys.argv = ['', '{presses}', '{handler}']; runpy.run_path('interrupted.py')"
    assert run(code, tmp_path).splitlines()[0] == str(expected)


RETURNED = """
import numba.core.serialize
from typing import NamedTuple
import numpy as np
from pagedkv.jit import compiled

def interrupted(*args):
    raise KeyboardInterrupt

numba.core.serialize._numba_unpickle = interrupted

class Pair(NamedTuple):
    first: np.ndarray
    second: np.ndarray

@compiled
def arrays(number):
    return number, np.arange(number), np.zeros((number, 1), np.float32)

@compiled
def pair(number):
    return Pair(np.arange(number), np.ones(number))

_, some, zeros = arrays(3)
print(some.tolist(), zeros.tolist(), zeros.dtype, pair(2))
"""


def test_no_python_that_ctrl_c_could_interrupt_runs_where_a_kernel_hands_back_arrays(tmp_path: Path) -> None:
    """Numba calls Python for the class of each array, and does not look whether that failed."""
    (tmp_path / "returned.py").write_text(RETURNED)
    for _ in range(2):  # compiled, then from the disk
        printed = run("import returned", tmp_path, PYTHONPATH=f"{PACKAGE.parent}:{tmp_path}")
        expected = "[0, 1, 2] [[0.0], [0.0], [0.0]] float32 Pair(first=array([0, 1]), second=array([1., 1.]))"
        assert printed.splitlines()[0] == expected
