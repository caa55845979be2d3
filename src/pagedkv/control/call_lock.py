"""The lock of a cache's calls, and what os.fork() makes of it.

A fork waits until no thread is inside a call, so that the child has books at rest and a lock that nobody holds. A call
that takes too long, because a subscriber waits for something, is not waited for: in the child that cache is refused.
"""

from __future__ import annotations

import os
import threading
import weakref
from typing import Any, NoReturn

from pagedkv.errors import InvalidOperation

PATIENCE_SECONDS = 5.0
"""How long a fork waits for all calls that are running."""

_owners: weakref.WeakSet[Any] = weakref.WeakSet()
_held: list[Any] = []
_not_held: list[Any] = []


class _Refusing:
    """Takes the place of a lock that no thread of this process can release."""

    def __enter__(self) -> NoReturn:
        reason = "another thread was inside a call of this cache when the process forked: make a new one in the child"
        raise InvalidOperation(reason)

    def __exit__(self, *error: object) -> None:
        pass

    def acquire(self, *arguments: object, **named: object) -> bool:
        return False


def new_lock(owner: Any) -> threading.RLock:
    """Return a lock for the ``_lock`` of `owner`, which a thread may take several times."""
    _owners.add(owner)
    return threading.RLock()


def _before_fork() -> None:
    patience = PATIENCE_SECONDS
    for owner in list(_owners):
        if owner._lock.acquire(timeout=patience):
            _held.append(owner)
        else:
            _not_held.append(owner)
            patience = 0.0


def _release() -> None:
    while _held:
        _held.pop()._lock.release()
    _not_held.clear()


def _in_child() -> None:
    for owner in _not_held:
        owner._lock = _Refusing()
    _release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_release, after_in_child=_in_child)
