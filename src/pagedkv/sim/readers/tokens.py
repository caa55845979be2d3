"""Plain JSONL of token ids, one request a line.

``{"timestamp": s, "token_ids": [ids]}`` a line; optional ``output_length`` (or ``output_tokens``) and ``session_id``.
The tokens are cut into blocks, 16 tokens each unless stated, the partial last one included; blocks are compared token
by token. A distinct block takes about 14 bytes of memory a token, while the trace is read.
"""

from __future__ import annotations

from array import array

import msgspec

from pagedkv.sim.readers.base import Id, LineReader
from pagedkv.sim.source import BadRecord

INT = "i"


class _Line(msgspec.Struct, gc=False):
    timestamp: float
    token_ids: list[int]
    output_length: int | None = None
    output_tokens: int | None = None
    session_id: Id | None = None


_decode = msgspec.json.Decoder(_Line).decode


class TokensReader(LineReader):
    """One request a line, timestamps in seconds, its tokens instead of block ids."""

    name = "tokens"

    def add(self, text: bytes) -> None:
        """Take one line."""
        line = _decode(text)
        try:
            tokens = array(INT, line.token_ids)
        except OverflowError:
            raise BadRecord("token ids must fit in 32 bits") from None
        content = tokens.tobytes()
        width = self.block_tokens * tokens.itemsize
        blocks = [content[start : start + width] for start in range(0, len(content), width)]
        outputs = line.output_length if line.output_length is not None else line.output_tokens
        self._collector.add(line.timestamp, len(tokens), outputs or 0, line.session_id, blocks)
