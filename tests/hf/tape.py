"""What a CUDA graph does, on a CPU: work is recorded once and repeated on the same memory, whatever the host knows.

Under a tape run torch's operations and, in the interpreter, Triton's kernels. A replay repeats them with the very
tensors of the recording and no Python in between, so that what would have to come from the host is what it was then.
What a graph cannot hold, as it needs an answer from the device, is an error, as it is in a capture.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten

REFUSED = ("_local_scalar_dense", "nonzero", "masked_select", "lift_fresh", "unique", "is_nonzero", "equal")


class Tape(TorchDispatchMode):
    """Keeps the work that is done under it."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Callable[[], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket.__name__ in REFUSED:
            raise RuntimeError(f"{func}: operation not permitted when stream is capturing")
        given = {_memory(x) for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)}
        result = func(*args, **kwargs)
        made = [x for x in tree_flatten(result)[0] if isinstance(x, torch.Tensor)]
        if not all(_memory(x) in given for x in made):
            self.steps.append(lambda: _again(made, func(*args, **kwargs)))
        elif not func.is_view:
            self.steps.append(lambda: func(*args, **kwargs))
        return result

    def launch(self, kernel: Any, args: Any, kwargs: Any) -> None:
        """Keep and run a kernel."""

        def run() -> None:
            with _disable_current_modes():
                kernel(*args, **kwargs)

        run()
        self.steps.append(run)


class TapeRecorder:
    """A recorder for ``ModelRunner.record_decoding()``.

    Parameters
    ----------
    patch : MonkeyPatch

    Attributes
    ----------
    replays : int
        How often a recording was replayed.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        from triton.runtime.interpreter import GridExecutor

        self.replays = 0
        self._tape: Tape | None = None
        real = GridExecutor.__call__

        def call(executor: Any, *args: Any, **kwargs: Any) -> None:
            if self._tape is None:
                real(executor, *args, **kwargs)
            else:
                self._tape.launch(real, (executor, *args), kwargs)

        patch.setattr(GridExecutor, "__call__", call)

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        run()
        self._tape = tape = Tape()
        try:
            with tape:
                run()
        finally:
            self._tape = None

        def replay() -> None:
            self.replays += 1
            for step in tape.steps:
                step()

        return replay


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _again(made: list[torch.Tensor], result: Any) -> None:
    for old, new in zip(made, [x for x in tree_flatten(result)[0] if isinstance(x, torch.Tensor)], strict=True):
        old.copy_(new)
