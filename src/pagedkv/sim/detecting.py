"""Recognise the format of a trace by its beginning."""

from __future__ import annotations

__all__ = ["detect", "HEAD_BYTES"]

HEAD_BYTES = 2**18
MAX_LINES = 20
# What no other format has, the most telling first.
_JSON_KEYS = (
    (b'"token_ids"', "tokens"),
    (b'"parent_chat_id"', "qwen"),
    (b'"chat_id"', "qwen"),
    (b'"hash_ids"', "mooncake"),
    (b'"input_length"', "mooncake"),
    (b'"input_tokens"', "mooncake"),
)
_WEKA_KEYS = (b'"requests"', b'"hash_id_scope"')
_CSV_COLUMNS = ((b"contexttokens", "azure"), (b"request tokens", "burstgpt"))


def detect(head: bytes) -> str | None:
    """Return the name of the format, or None.

    Parameters
    ----------
    head : bytes
        The first `HEAD_BYTES` of the file, unpacked.
    """
    if head and _begins_msgpack(head[0]):
        return "kv-events"
    text = head.lstrip()
    if text.startswith(b"{") and any(key in text for key in _WEKA_KEYS):
        return "weka"
    # A broken line at the beginning must not hide the rest.
    for line in text.split(b"\n")[:MAX_LINES]:
        found = _of_json(line) if line.lstrip().startswith(b"{") else _of_csv(line)
        if found is not None:
            return found
    return None


def _begins_msgpack(first: int) -> bool:
    """Tell whether a batch of events may begin with this byte: an array, a map or a frame; no text begins so."""
    return 0x80 <= first <= 0x9F or first in (0x00, 0xC4, 0xC5, 0xC6, 0xDC, 0xDD, 0xDE, 0xDF)


def _of_json(line: bytes) -> str | None:
    return next((name for key, name in _JSON_KEYS if key in line), None)


def _of_csv(line: bytes) -> str | None:
    lowered = line.lower()
    return next((name for column, name in _CSV_COLUMNS if column in lowered), None)
