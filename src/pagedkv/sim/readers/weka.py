"""kv-cache-tester JSON ("weka" traces of coding agents): a session a file, or a session a line; or a folder of them.

``{"id", "block_size": 64, "hash_id_scope": "local", "requests": [{"t": s, "in", "out", "hash_ids"}, …]}``. An entry
with ``requests`` of its own is a sub-agent: same session, same ids, times from the start of the session. Ids are local
to a session unless ``hash_id_scope`` is ``"global"``; they name full blocks only. The sessions carry no date: all of
them begin at second 0.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from pagedkv.sim.collect import Collector
from pagedkv.sim.readers.base import Id, Reader, first_given
from pagedkv.sim.source import BAD_RECORD, Source, reason_of

MAX_DOCUMENT_BYTES = 256 * 2**20
HEAD_BYTES = 2**16


class _Request(msgspec.Struct, gc=False):
    t: float | None = None
    inputs: int | None = msgspec.field(name="in", default=None)
    out: int = 0
    # Decoded request by request, since a session repeats its ids in every request.
    hash_ids: msgspec.Raw = msgspec.Raw(b"[]")
    requests: list[_Request] | None = None


class _Session(msgspec.Struct, gc=False):
    requests: list[_Request]
    id: Id | None = None
    block_size: int | None = None
    hash_id_scope: str = "local"


_decode = msgspec.json.Decoder(_Session).decode
_decode_ids = msgspec.json.Decoder(list[Id]).decode


class WekaReader(Reader):
    """Sessions with nested sub-agents, times in seconds, 64 tokens a block."""

    name = "weka"
    default_block_tokens = 64
    in_order = False

    def __init__(self, collector: Collector, block_tokens: int | None = None) -> None:
        super().__init__(collector, block_tokens)
        self._num_sessions = 0

    def read(self, source: Source) -> None:
        """Read one file: a document over many lines, or one document a line."""
        documents = source.lines(MAX_DOCUMENT_BYTES) if _one_a_line(source) else source.whole(MAX_DOCUMENT_BYTES)
        for number, text in documents:
            try:
                session = _decode(text)
                self._file_says(session.block_size)
            except BAD_RECORD as error:
                source.bad(number, reason_of(error))
                continue
            self._add_session(source, session)

    def _add_session(self, source: Source, session: _Session) -> None:
        self._num_sessions += 1
        # The number tells files apart that give the same id, or none.
        name = (self._num_sessions, session.id)
        root = -1 if session.hash_id_scope == "global" else -1 - self._num_sessions
        for place, request in enumerate(_flat(session.requests), start=1):
            try:
                self._add_request(request, name, root)
            except BAD_RECORD as error:
                source.bad(place, reason_of(error), "request")

    def _add_request(self, request: _Request, session: tuple[int, Id | None], root: int) -> None:
        time, inputs = first_given("t", request.t), first_given("in", request.inputs)
        self._collector.add(time, inputs, request.out, session, _decode_ids(request.hash_ids), root)


def _one_a_line(source: Source) -> bool:
    """Tell whether the first line is a whole document, as far as its beginning shows."""
    first, newline, _ = source.head(HEAD_BYTES).lstrip().partition(b"\n")
    return not newline or first.rstrip().endswith(b"}")


def _flat(requests: list[_Request]) -> Iterator[_Request]:
    """Yield the requests in the order of the document, those of sub-agents in the place of the sub-agent."""
    waiting = [iter(requests)]
    while waiting:
        request = next(waiting[-1], None)
        if request is None:
            waiting.pop()
        elif request.requests is not None:
            waiting.append(iter(request.requests))
        else:
            yield request
