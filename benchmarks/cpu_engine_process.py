"""A worker's process as benchmarks/cpu_engines.py sees it: jobs, processor time and memory of it and its children."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

IDLE = 0.1
"""A machine is idle while less than this part of its cores is used."""
WORKER = Path(__file__).with_name("cpu_engine_worker.py")
PROC = Path("/proc")
Tokens = list[int]


class EngineFailed(Exception):
    """An engine did not start, ended, or answered with an error."""


@dataclass(frozen=True)
class Spec:
    """How to start an engine, and which works it takes part in."""

    name: str
    engine: str
    model: str
    dtype: str
    python: str
    works: str = "abcwd"
    options: dict[str, Any] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """Seconds by the clock and of the processor, and the new tokens."""

    seconds: float
    processor: float
    tokens: list[Tokens]


# --- what the system says of a process and its children ---------------------------------------------------------------


def tree(pid: int) -> Iterator[int]:
    """Yield the ids of a process and of all below it."""
    yield pid
    for children in PROC.glob(f"{pid}/task/*/children"):
        with contextlib.suppress(OSError):
            for child in children.read_text().split():
                yield from tree(int(child))


def processor_seconds(pid: int) -> float:
    """Return the processor time of the tree."""
    total = 0
    for each in tree(pid):
        with contextlib.suppress(OSError):
            fields = (PROC / str(each) / "stat").read_text().rpartition(")")[2].split()
            total += int(fields[11]) + int(fields[12])
    return total / os.sysconf("SC_CLK_TCK")


def machine_seconds() -> float:
    """Return the processor time that the whole machine has spent, on anything."""
    try:
        fields = (PROC / "stat").read_text().split("\n", 1)[0].split()[1:]
    except OSError:
        return 0.0
    user, nice, system, _, _, interrupts, soft = map(int, fields[:7])
    return (user + nice + system + interrupts + soft) / os.sysconf("SC_CLK_TCK")


def wait_until_idle(most: float) -> None:
    """Wait until hardly anything runs on the machine, but only so many seconds."""
    end = time.monotonic() + most
    while time.monotonic() < end:
        begun = machine_seconds()
        time.sleep(0.5)
        if machine_seconds() - begun < IDLE * 0.5 * (os.cpu_count() or 1):
            return


def memory(pid: int, name: str) -> int:
    """Return the bytes of a field such as VmRSS or VmHWM, summed over the tree."""
    total = 0
    for each in tree(pid):
        with contextlib.suppress(OSError):
            lines = (PROC / str(each) / "status").read_text().splitlines()
            total += sum(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
    return total


def forget_peak(pid: int) -> None:
    """Have the peak of a process begin anew."""
    with contextlib.suppress(OSError):
        (PROC / str(pid) / "clear_refs").write_text("5")


# --- the process ------------------------------------------------------------------------------------------------------


class EngineProcess:
    """An engine that is loaded and waits for jobs.

    Attributes
    ----------
    bare_data, bare_code : int
        Bytes of memory with all libraries imported and nothing loaded: written, and read from files.
    """

    def __init__(self, spec: Spec, threads: int, env: dict[str, str]) -> None:
        self.spec = spec
        self._log = tempfile.TemporaryFile()
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads)} | env | spec.env
        arguments = (spec.engine, spec.model, spec.dtype, str(threads), json.dumps(spec.options))
        self._process = subprocess.Popen(
            [spec.python, str(WORKER), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment,
        )
        try:
            self._load()
        except EngineFailed:
            self.close()
            raise

    def _load(self) -> None:
        self._read()
        forget_peak(self._process.pid)
        self.bare_data = memory(self._process.pid, "RssAnon")
        self.bare_code = memory(self._process.pid, "RssFile")
        self._write("load")
        loaded = self._read()
        self.pool = int(loaded.get("pool", 0))
        self.seconds_to_load = float(loaded["seconds"])
        self.peak_while_loading = self.peak()

    def _write(self, line: str) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        except OSError as error:
            raise EngineFailed(f"{self.spec.name} ended: {self._last_words()}") from error

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            raise EngineFailed(f"{self.spec.name} ended: {self._last_words()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise EngineFailed(f"{self.spec.name}: {answer['error']}")
        return answer

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"code {self._process.returncode}"

    def ask(self, prompts: list[Tokens], count: int) -> Answer:
        """Have so many tokens written for each prompt."""
        begun = processor_seconds(self._process.pid)
        self._write(json.dumps({"prompts": prompts, "count": count}))
        answer = self._read()
        processor = processor_seconds(self._process.pid) - begun
        return Answer(answer["seconds"], processor, answer["tokens"])

    def processor_seconds(self) -> float:
        """Return the processor time so far."""
        return processor_seconds(self._process.pid)

    def peak(self) -> int:
        """Return the most bytes of memory since the libraries were imported."""
        return memory(self._process.pid, "VmHWM")

    def libraries(self) -> int:
        """Return the bytes of the libraries as imported, without what the engine has given back of their code."""
        return self.bare_data + min(self.bare_code, memory(self._process.pid, "RssFile"))

    def close(self) -> None:
        """End the process."""
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for stream in (self._process.stdout, self._log):
            if stream is not None:
                stream.close()
