"""Small trace files of every format."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path
from typing import Any

import msgspec

from pagedkv.control.events import append_event_batch

SHARED = Path(__file__).parents[2].parent / "shared" / "traces"
REAL = {name: SHARED / f"{name}.jsonl.gz" for name in ("mooncake_conversation", "coding_agents")}


def lines(*records: Any) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def mooncake(time: float = 0, inputs: int = 1000, outputs: int = 5, ids: Any = (1, 2), **more: Any) -> dict[str, Any]:
    return {"timestamp": time, "input_length": inputs, "output_length": outputs, "hash_ids": list(ids), **more}


def qwen(chat: int, parent: int, time: float, ids: Any, inputs: int = 32) -> dict[str, Any]:
    chats = {"chat_id": chat, "parent_chat_id": parent}
    lengths = {"timestamp": time, "input_length": inputs, "output_length": 5}
    return {**chats, **lengths, "type": "text", "turn": 1, "hash_ids": list(ids)}


def turn(t: float, ids: Any, inputs: int | None = None) -> dict[str, Any]:
    return {"t": t, "type": "s", "model": "m", "in": inputs or 64 * len(ids) + 3, "out": 7, "hash_ids": list(ids)}


def weka(name: str, *requests: Any, **more: Any) -> dict[str, Any]:
    return {"id": name, "models": ["m"], "block_size": 64, "hash_id_scope": "local", "requests": requests, **more}


def agent(t: float, *requests: Any) -> dict[str, Any]:
    return {"t": t, "type": "subagent", "agent_id": "a", "requests": requests}


def stored(hashes: list[Any], parent: Any = None, size: int = 4, *more: Any) -> list[Any]:
    return ["BlockStored", hashes, parent, list(range(size * len(hashes))), size, *more]


def stored_map(hashes: list[Any], parent: Any = None, size: int = 4, **more: Any) -> dict[str, Any]:
    fields = {"block_hashes": hashes, "parent_block_hash": parent, "token_ids": [], "block_size": size}
    return {"type": "BlockStored", **fields, **more}


def bare(*batches: Any) -> bytes:
    return b"".join(msgspec.msgpack.encode(batch) for batch in batches)


def framed(*batches: Any) -> bytes:
    file = io.BytesIO()
    for batch in batches:
        append_event_batch(file, batch)
    return file.getvalue()


BURST_HEADER = b"Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
AZURE_HEADER = b"TIMESTAMP,ContextTokens,GeneratedTokens\n"

_MOONCAKE = [
    mooncake(0, 1000, 5, [1, 2], session_id="a"),
    mooncake(500, 1500, 6, [1, 2, 3], session_id="b"),
    mooncake(1500.5, 700, 7, [1, 4]),
]
_BATCHES = [
    [0.0, [stored([1, 2])], 0],
    [1.0, [stored_map([b"\x01" * 32, b"\x02" * 32]), stored([3], 2)]],
    [2.5, [["BlockRemoved", [2], "GPU"], ["AllBlocksCleared"], {"type": "BlockRemoved", "block_hashes": [3]}]],
    {"ts": 3.0, "events": [stored([1, 2]), stored([5], None, 4, None, "CPU")]},
]

SAMPLES: dict[str, list[bytes]] = {
    "mooncake": [
        lines(*_MOONCAKE),
        gzip.compress(lines(*_MOONCAKE)),
        lines(mooncake(0, ids=["0x1f", "ab"]), mooncake(1, ids=[2**64 - 1, -(2**63), "0x1f"])),
        lines(
            {"created_time": 0, "input_tokens": 9, "output_tokens": 1},
            {"timestamp": 1, "input_length": 1, "output_length": 2},
        ),
        lines(
            mooncake(5, session_id=1),
            {"delay_ms": 10, "input_length": 9, "output_length": 1, "hash_ids": [], "session_id": 1},
        ),
    ],
    "qwen": [lines(qwen(1, -1, 0.0, [1, 2]), qwen(2, 1, 1.5, [1, 2, 3]), qwen(3, -1, 2.0, [9, 2]))],
    "weka": [
        json.dumps(
            weka("s", turn(0.0, [1, 2]), agent(1.0, turn(1.5, [1, 3])), turn(2.0, [1, 2, 4])), indent=1
        ).encode(),
        lines(weka("s", turn(0.0, [1, 2])), weka("t", turn(0.5, [1, 2]), hash_id_scope="global")),
    ],
    "burstgpt": [BURST_HEADER + b"5,s1,1.0,GPT-4,100,10,110,Conversation log\n7,,1.0,GPT-4,20,0,20,API log\n"],
    "azure": [AZURE_HEADER + b"2023-11-16 18:15:46.6805900,374,44\r\n2023-11-16 18:15:50.9951690+00:00,396,109\r\n"],
    "kv-events": [bare(*_BATCHES), framed(*_BATCHES)],
    "tokens": [lines({"timestamp": 0, "token_ids": list(range(40))}, {"timestamp": 1.5, "token_ids": [0, 1, 2, -1]})],
}
"""Valid files of every format."""
