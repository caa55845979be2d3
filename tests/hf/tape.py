"""What a CUDA graph does, on a CPU: work is recorded once and repeated on the same memory, whatever the host knows.

Under a tape run torch's operations and, in the interpreter, Triton's kernels. A replay repeats them with the very
tensors of the recording and no Python in between, so that what would have to come from the host is what it was then.
What a graph cannot hold, as it needs an answer from the device, is an error, as it is in a capture.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_unflatten

REFUSED = ("_local_scalar_dense", "nonzero", "masked_select", "lift_fresh", "unique", "is_nonzero", "equal")


class Tape(TorchDispatchMode):
    """Keeps the work that is done under it, and the memory that is taken under it; all other memory has to be kept."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Callable[[], Any]] = []
        self._made: dict[int, torch.Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in REFUSED:
            raise RuntimeError(f"{func}: operation not permitted when stream is capturing")
        again = self._repeatable(func, args, kwargs or {})
        given = {_memory(x) for x in _tensors((args, kwargs))}
        result = func(*args, **kwargs or {})
        made = _tensors(result)
        if not all(_memory(x) in given for x in made):
            self.steps.append(lambda: _copy(made, again()))
        elif not func.is_view:
            self.steps.append(again)
        self._made |= {id(x): x for x in made}
        return result

    def launch(self, kernel: Any, args: Any, kwargs: Any) -> None:
        """Keep and run a kernel."""
        again = self._repeatable(kernel, args, kwargs)

        def run() -> None:
            with _disable_current_modes():
                again()

        run()
        self.steps.append(run)

    def _repeatable(self, func: Any, args: Any, kwargs: Any) -> Callable[[], Any]:
        """Return the call; it does not keep alive what was not made under the tape, as a graph does not."""
        leaves, spec = tree_flatten((args, kwargs))
        is_foreign = [isinstance(x, torch.Tensor) and id(x) not in self._made for x in leaves]
        kept = [weakref.ref(x) if foreign else x for x, foreign in zip(leaves, is_foreign, strict=True)]

        def again() -> Any:
            found = [x() if foreign else x for x, foreign in zip(kept, is_foreign, strict=True)]
            assert all(x is not None for x, foreign in zip(found, is_foreign, strict=True) if foreign), "freed memory"
            args, kwargs = tree_unflatten(found, spec)
            return func(*args, **kwargs)

        return again


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


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [x for x in tree_flatten(tree)[0] if isinstance(x, torch.Tensor)]


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _copy(made: list[torch.Tensor], result: Any) -> None:
    for old, new in zip(made, _tensors(result), strict=True):
        old.copy_(new)
