"""What ``pagedkv serve`` reads from files before it starts."""

from __future__ import annotations

from pathlib import Path

from pagedkv.cli.terminal import Failure

__all__ = ["read_keys", "read_text"]


def read_keys(path: Path | None) -> tuple[str, ...]:
    """Return the keys of a file, one a line; empty lines and lines that begin with # do not count.

    Raises
    ------
    Failure
        It cannot be read, or holds no key.
    """
    text = read_text("--api-key-file", path)
    if text is None:
        return ()
    lines = [line.strip() for line in text.splitlines()]
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if not keys:
        raise Failure(f"--api-key-file: {path} holds no key: expected one a line")
    return keys


def read_text(option: str, path: Path | None) -> str | None:
    """Return the text of a file; None without one.

    Raises
    ------
    Failure
        It cannot be read.
    """
    if path is None:
        return None
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Failure(f"{option}: cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
