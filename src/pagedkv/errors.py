"""The exception tree.

::

    PagedKvError
    ├── OutOfMemory          (MemoryError)   requested, available
    ├── SequenceNotFound     (KeyError)      seq_id
    ├── BlockNotFound        (KeyError)      block_id
    ├── InvalidOperation     (ValueError)    reason, argument, hint
    ├── MissingExtra         (ImportError)   extra
    ├── TraceError           (ValueError)    file, line, reason
    ├── ReplayFailed         (RuntimeError)  strategy, blocks, reason
    ├── ModelConfigError     (ValueError)    source, field, reason
    ├── RequestRefused       (ValueError)    reason
    ├── EngineDead           (RuntimeError)  reason
    ├── ReplicaLost          (RuntimeError)  replica, reason
    ├── TierError            (OSError)       place, reason
    ├── InvalidLogits        (ArithmeticError) request_ids
    └── CorruptedState       (AssertionError)

Every error leaves the cache as it was before the call.
"""

from __future__ import annotations

from typing import Any


class PagedKvError(Exception):
    """Base class of every error that pagedkv raises on purpose."""

    def __reduce__(self) -> Any:
        # Made anew of what its constructor takes, which are its attributes: Exception would pass the message.
        code = getattr(type(self).__init__, "__code__", None)
        if code is None:
            return super().__reduce__()
        return type(self), tuple(getattr(self, name) for name in code.co_varnames[1 : code.co_argcount])

    def __str__(self) -> str:
        # KeyError would show the repr of its argument.
        return str(self.args[0]) if self.args else ""


class OutOfMemory(PagedKvError, MemoryError):
    """An allocation needs more blocks than can be had, or a slot for a recurrent state.

    Attributes
    ----------
    requested : int
        Blocks that the call needs beyond those it can share.
    available : int
        Blocks that an allocation can have now: free, or cached and unpinned.
    hint : str
        What else is known.
    unit : str
        What is short.
    """

    def __init__(self, requested: int, available: int, hint: str = "", unit: str = "blocks") -> None:
        message = f"Out of memory: requested {requested} {unit}, {available} available"
        super().__init__(message + (f" ({hint})" if hint else ""))
        self.requested = requested
        self.available = available
        self.hint = hint
        self.unit = unit


class SequenceNotFound(PagedKvError, KeyError):
    """No live sequence has this id.

    Attributes
    ----------
    seq_id : int
    """

    def __init__(self, seq_id: int) -> None:
        super().__init__(f"Sequence not found: S{int(seq_id)}")
        self.seq_id = seq_id
        self.add_note(f"It was freed, evicted or never there: allocate({int(seq_id)}, …) begins it.")


class BlockNotFound(PagedKvError, KeyError):
    """No block of the pool has this id.

    Attributes
    ----------
    block_id : int
    """

    def __init__(self, block_id: int) -> None:
        super().__init__(f"Block not found: B{int(block_id)}")
        self.block_id = block_id
        self.add_note("The blocks of a pool are 0 … total_blocks - 1; a sequence's are in its block_ids.")


class InvalidOperation(PagedKvError, ValueError):
    """The arguments, or the state that they meet, do not allow the call.

    Attributes
    ----------
    reason : str
    argument : str or None
        The argument at fault, by its name; None where it is the state that does not allow the call.
    hint : str
        What to do next; the message ends with it, in brackets.
    """

    def __init__(self, reason: str, argument: str | None = None, hint: str = "") -> None:
        super().__init__(f"Invalid operation: {reason}" + (f" ({hint})" if hint else ""))
        self.reason = reason
        self.argument = argument
        self.hint = hint


def bad_argument(argument: str, expected: str, got: str | None = None, hint: str = "") -> InvalidOperation:
    """Return the error for one argument, in the one grammar: ``name: expected …, got … (what to do next)``."""
    came = "" if got is None else f", got {got}"
    return InvalidOperation(f"{argument}: expected {expected}{came}", argument, hint)


class MissingExtra(PagedKvError, ImportError):
    """An optional dependency is not installed.

    Attributes
    ----------
    extra : str
        The extra that brings it: ``pip install 'pagedkv[<extra>]'``.
    """

    def __init__(self, module: str, extra: str) -> None:
        super().__init__(f"{module} is not installed; install it with: pip install 'pagedkv[{extra}]'")
        self.module = module
        self.extra = extra


class ModelConfigError(PagedKvError, ValueError):
    """A model's config cannot be read, or a field of it is missing or makes no sense.

    Attributes
    ----------
    source : str
        Where the config comes from: a path, the name of a preset, or ``inline JSON``.
    field : str
        The field at fault; empty where the whole config is.
    reason : str
        What was expected and what was found.
    """

    def __init__(self, source: str, field: str, reason: str) -> None:
        super().__init__(f"model config {source}: {field + ': ' if field else ''}{reason}")
        self.source = source
        self.field = field
        self.reason = reason


class ReplayFailed(PagedKvError, RuntimeError):
    """One replay of a sweep failed.

    Attributes
    ----------
    strategy : str
        As it was asked for.
    blocks : int
        Capacity.
    reason : str
    """

    def __init__(self, strategy: str, blocks: int, reason: str) -> None:
        super().__init__(f"The replay of {strategy} with {blocks} blocks failed: {reason}")
        self.strategy = strategy
        self.blocks = blocks
        self.reason = reason


class RequestRefused(PagedKvError, ValueError):
    """The engine will not take a request: it can never fit, or the queue is full.

    Attributes
    ----------
    reason : str
        Which limit, and the numbers.
    retry_after : float or None
        Seconds after which it may be worth asking again; None if it never is.
    """

    def __init__(self, reason: str, retry_after: float | None = None) -> None:
        super().__init__(f"Request refused: {reason}")
        self.reason = reason
        self.retry_after = retry_after


class EngineDead(PagedKvError, RuntimeError):
    """A step of the engine failed, or it was shut down: it takes no more requests.

    Attributes
    ----------
    reason : str
        What happened; the error of the step is the ``__cause__``.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(f"The engine has stopped: {reason}")
        self.reason = reason


class ReplicaLost(PagedKvError, RuntimeError):
    """The replica that wrote an answer has gone, and no other one could go on with it.

    Attributes
    ----------
    replica : str
        Its name; empty where it is not known.
    reason : str
        What happened.
    """

    def __init__(self, replica: str, reason: str) -> None:
        super().__init__(f"Replica {replica or '?'} is lost: {reason}")
        self.replica = replica
        self.reason = reason


class TierError(PagedKvError, OSError):
    """A tier cannot be had: its directory is somebody else's, in use, of another version, or has no room.

    Attributes
    ----------
    place : str
        The directory.
    reason : str
        What was expected and what was found. Nothing was changed.
    """

    def __init__(self, place: str, reason: str) -> None:
        super().__init__(f"tier {place}: {reason}")
        self.place = place
        self.reason = reason


class InvalidLogits(PagedKvError, ArithmeticError):
    """The model gave logits that no token can be chosen from: NaN, +inf, or nothing but -inf.

    Attributes
    ----------
    request_ids : tuple of str
        The requests whose logits they are.
    """

    def __init__(self, request_ids: tuple[str, ...]) -> None:
        names = ", ".join(request_ids)
        super().__init__(f"logits: expected finite numbers or -inf, got NaN, +inf or only -inf for request {names}")
        self.request_ids = request_ids


class TraceError(PagedKvError, ValueError):
    """A trace cannot be read.

    Attributes
    ----------
    file : str
    line : int or None
        Line of the file, counted from 1; None where the whole file is meant. In binary files and in files that hold
        one JSON document `place` says what is counted.
    reason : str
    place : str
        What `line` counts: ``"line"``, ``"batch"`` or ``"request"``.
    """

    def __init__(self, file: str, line: int | None, reason: str, place: str = "line") -> None:
        where = file if line is None else f"{file}, {place} {line}"
        super().__init__(f"{where}: {reason}")
        self.file = file
        self.line = line
        self.reason = reason
        self.place = place


class CorruptedState(PagedKvError, AssertionError):
    """``check()`` found a broken invariant: a bug in pagedkv, please report it with this message."""
