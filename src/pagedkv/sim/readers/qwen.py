"""Qwen-Bailian JSONL (Wang et al., USENIX ATC'25): one request a line, ids of 16-token blocks that are not chained.

``{"chat_id", "parent_chat_id" (-1: a root), "timestamp": s, "input_length", "output_length", "type", "turn",
"hash_ids"}``. Equal ids behind different prefixes are different blocks here, as for a real prefix cache. A session is
the tree of chats under one root; a parent that the file does not hold counts as a root.
"""

from __future__ import annotations

import msgspec

from pagedkv.sim.collect import Collector
from pagedkv.sim.readers.base import Id, LineReader

NO_CHAT = (-1, "-1", None)


class _Line(msgspec.Struct, gc=False):
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: list[Id]
    chat_id: Id | None = None
    parent_chat_id: Id | None = None


_decode = msgspec.json.Decoder(_Line).decode


class QwenReader(LineReader):
    """One request a line, timestamps in seconds, 16 tokens a block."""

    name = "qwen"

    def __init__(self, collector: Collector, block_tokens: int | None = None) -> None:
        super().__init__(collector, block_tokens)
        self._roots: dict[Id, Id] = {}

    def add(self, text: bytes) -> None:
        """Take one line."""
        line = _decode(text)
        parent = line.parent_chat_id
        root = line.chat_id if parent in NO_CHAT or parent is None else self._roots.get(parent, parent)
        self._collector.add(line.timestamp, line.input_length, line.output_length, root, line.hash_ids)
        if line.chat_id is not None and root is not None:
            self._roots[line.chat_id] = root
