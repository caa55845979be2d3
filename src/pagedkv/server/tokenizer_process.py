"""Tokenizer in a process of its own, for long texts: what nobody waits for any more, or takes too long, ends with it.

A thread that has begun a text cannot be stopped, and a tokenizer in Python may take minutes for one long word. The
process starts with the first long text, needs neither torch nor the model, and ends when the server does, however.
"""

from __future__ import annotations

import asyncio
import logging
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")
SECONDS = 30
"""That one text, or the start, may take."""
GRACE_SECONDS = 1.0
"""That a text may still take when nobody waits for it: less than a process costs that begins anew."""

logger = logging.getLogger("pagedkv.server")


def encode(tokenizer: Any, text: str, special_tokens: bool) -> list[int]:
    """Return the token ids of a text, with those that open it or without."""
    ids: list[int] = tokenizer(text, add_special_tokens=special_tokens, verbose=False)["input_ids"]
    return ids


def decode(tokenizer: Any, token_ids: Sequence[int], special_tokens: bool) -> str:
    """Return the text of token ids, with the special ones or without."""
    text: str = tokenizer.decode(list(token_ids), skip_special_tokens=not special_tokens)
    return text


class TokenizerEnded(Exception):
    """The process of a tokenizer ended before it was through.

    Parameters
    ----------
    reason : str
    out_of_time : bool
        Whether because it took too long.

    Attributes
    ----------
    out_of_time : bool
    """

    def __init__(self, reason: str, out_of_time: bool = False) -> None:
        super().__init__(reason)
        self.out_of_time = out_of_time


class NoTokenizerProcess(Exception):
    """There can be no process for this tokenizer."""


class TokenizerProcess:
    """A tokenizer in a process of its own, which does one thing at a time.

    Parameters
    ----------
    tokenizer : object
        One that can be pickled.
    seconds : int
        That one thing may take.

    Attributes
    ----------
    is_over : bool
        It takes nothing any more.
    """

    def __init__(self, tokenizer: Any, seconds: int = SECONDS) -> None:
        self._tokenizer, self._seconds = tokenizer, seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._starting, self._busy = threading.Lock(), threading.Lock()
        self._was_ended = False
        self.is_over = False

    @property
    def pid(self) -> int | None:
        """Of the process, once it has been started."""
        return None if self._process is None else self._process.pid

    def run(self, function: Callable[..., T], *args: Any) -> T:
        """Return what a function of a module makes of the tokenizer there and of arguments; blocks.

        Raises
        ------
        NoTokenizerProcess
            It cannot be started.
        TokenizerEnded
            It ended before there was a result.
        RuntimeError
            The function raised something, which the text tells.
        """
        with self._busy:
            if self._process is None:
                self._start()
            result: T = self._ask((function, args))
            return result

    def end(self) -> None:
        """End it at once, whatever it does; may be called from any thread."""
        with self._starting:
            self._was_ended = self.is_over = True
        if self._process is not None:
            self._process.kill()
            if self._busy.acquire(blocking=False):  # else who waits for a result does the rest
                _reap(self._process)
                self._busy.release()

    def __del__(self) -> None:
        self.end()

    def _start(self) -> None:
        try:
            tokenizer = pickle.dumps(self._tokenizer)
            with self._starting:
                if not self._was_ended:
                    self._process = _popen(self._seconds)
            self._ask(tokenizer)
        except Exception as error:  # whatever a tokenizer's own pickling raises, here or there
            self.is_over = True
            if self._was_ended:
                raise
            raise NoTokenizerProcess(f"{type(error).__name__}: {error}") from error

    def _ask(self, question: Any) -> Any:
        process = self._process
        if self.is_over or process is None or process.stdin is None or process.stdout is None:
            raise TokenizerEnded("it was ended")
        try:
            pickle.dump(question, process.stdin)
            process.stdin.flush()
            succeeded, result = pickle.load(process.stdout)
        except (OSError, EOFError, pickle.UnpicklingError):
            self.is_over = True
            process.kill()
            _reap(process)
            is_late = process.returncode == -getattr(signal, "SIGALRM", 0)
            raise TokenizerEnded(f"it ended with {process.returncode}", is_late) from None
        if not succeeded:
            raise RuntimeError(result)
        return result


class TokenizerProcesses:
    """As many processes of a tokenizer as there are texts at a time.

    Parameters
    ----------
    tokenizer : object
    threads : Executor
        In which the processes are waited for.
    seconds : int
        That one text may take.

    Attributes
    ----------
    usable : bool
        False once there was none to be had, for a tokenizer that cannot be pickled say.
    processes : set of TokenizerProcess
        Those that there are.
    """

    def __init__(self, tokenizer: Any, threads: Executor, seconds: int = SECONDS) -> None:
        self._tokenizer, self._threads, self._seconds = tokenizer, threads, seconds
        self._idle: list[TokenizerProcess] = []
        self.processes: set[TokenizerProcess] = set()
        self.usable = bool(sys.executable)

    def begin(self, function: Callable[..., T], *args: Any) -> tuple[asyncio.Future[T], Callable[[], None]]:
        """Let a process do something; returns the result to be, and what is to be called when nobody waits for it."""
        process = self._idle.pop() if self._idle else TokenizerProcess(self._tokenizer, self._seconds)
        self.processes.add(process)
        loop = asyncio.get_running_loop()
        work = loop.run_in_executor(self._threads, self._run, process, function, args)

        def done(_: object) -> None:
            if process.is_over:
                self.processes.discard(process)
            else:
                self._idle.append(process)

        def abandon() -> None:
            ending = loop.call_later(GRACE_SECONDS, process.end)
            work.add_done_callback(lambda _: ending.cancel())

        work.add_done_callback(done)
        return work, abandon

    def close(self) -> None:
        """End all."""
        self.usable = False
        for process in self.processes:
            process.end()

    def _run(self, process: TokenizerProcess, function: Callable[..., T], args: Sequence[Any]) -> T:
        try:
            return process.run(function, *args)
        except NoTokenizerProcess as error:
            if self.usable:
                self.usable = False
                logger.warning(
                    "long texts are tokenized in this process, as the tokenizer has none of its own: %s", error
                )
        return function(self._tokenizer, *args)


def _popen(seconds: int) -> subprocess.Popen[bytes]:
    # Not of multiprocessing, which imports the main program again. The child sees the modules that we see.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    command = [sys.executable, "-m", "pagedkv.server.tokenizer_process", str(seconds)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)


def _reap(process: subprocess.Popen[bytes]) -> None:
    """Wait for the end of a process that was killed, and close its pipes, what is left in them included."""
    process.wait()
    for pipe in (process.stdin, process.stdout):
        with suppress(OSError):
            if pipe is not None:
                pipe.close()


# In the process.


def main() -> None:
    """Read a pickled tokenizer, then functions and their arguments; write whether each succeeded, and its result."""
    seconds = int(sys.argv[1])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the server, which ends this one when it has drained
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever libraries print is no answer
    questions: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(questions,), daemon=True).start()
    tokenizer: Any = None
    while True:
        question = questions.get()
        _end_after(seconds)
        answer: tuple[bool, Any] = (True, None)
        try:
            if tokenizer is None:
                tokenizer = pickle.loads(question)
            else:
                function, args = question
                answer = True, function(tokenizer, *args)
        except Exception as error:
            answer = False, f"{type(error).__name__}: {error}"
        _end_after(0)
        pickle.dump(answer, answers)
        answers.flush()


def _read(questions: queue.SimpleQueue[Any]) -> None:
    """Pass on what comes, and end the process with whoever sends it."""
    try:
        while True:
            questions.put(pickle.load(sys.stdin.buffer))
    finally:
        os._exit(0)


def _end_after(seconds: int) -> None:
    """Let the system end the process after so many seconds; 0: let it live. No code of ours has to run for it."""
    if hasattr(signal, "alarm"):
        signal.alarm(seconds)


if __name__ == "__main__":
    main()
