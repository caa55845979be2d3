"""System prompts that are in the pool, pinned, before the server takes requests."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import ValidationError

from pagedkv.engine.batch import Ids, common_prefix
from pagedkv.errors import InvalidOperation, bad_argument
from pagedkv.server.auth import salts_of
from pagedkv.server.chat import ChatForm, encode_chat
from pagedkv.server.config import ServerConfig
from pagedkv.server.errors import ApiError
from pagedkv.server.model import ServedModel
from pagedkv.server.schemas import ChatMessage

if TYPE_CHECKING:
    from pagedkv.engine import AsyncEngine

SHARE = 2
"""Pinned prompts take at most one part in so many of the pool."""

# Two ways on: what both chats begin with is what every chat begins with.
_WAYS_ON = ("a", "1")


@dataclass(frozen=True)
class Pinned:
    """What was pinned: tokens of all prompts, and the blocks of the pool that they take."""

    tokens: int = 0
    blocks: int = 0


def read_prompts(paths: Iterable[Path | str]) -> list[list[ChatMessage]]:
    """Read how chats begin.

    A file whose name ends in ``.json`` holds a list: each entry is a system prompt, or a list of messages. Any other
    file is one system prompt, without the line breaks at its end.

    Raises
    ------
    InvalidOperation
        A file cannot be read, or holds something else.
    """
    return [messages for path in paths for messages in _read(Path(path))]


def _read(path: Path) -> list[list[ChatMessage]]:
    try:
        text = path.read_text("utf-8")
        if path.suffix != ".json":
            return [_messages(text.rstrip("\r\n"))]
        entries = json.loads(text)
        if not isinstance(entries, list):
            raise ValueError("expected a list of texts, or of lists of messages")
        return [_messages(entry) for entry in entries]
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise InvalidOperation(f"warm: cannot read {path}: {reason}", "warm") from None


def _messages(entry: Any) -> list[ChatMessage]:
    messages = [{"role": "system", "content": entry}] if isinstance(entry, str) else entry
    if not isinstance(messages, list) or not messages or entry == "":
        raise ValueError("expected texts, or lists of messages, none of them empty")
    try:
        return [ChatMessage.model_validate(message) for message in messages]
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"expected messages with a role and a content: {first['msg']}") from None


def pin_prompts(engine: AsyncEngine, config: ServerConfig, prompts: Sequence[list[ChatMessage]]) -> Pinned:
    """Bring the beginnings of chats from tiers, or compute them, and pin them in the pool: for each key its own.

    To be called before the first request.

    Parameters
    ----------
    engine : AsyncEngine
    config : ServerConfig
    prompts : sequence of list of ChatMessage
        As of `read_prompts`.

    Raises
    ------
    InvalidOperation
        They take more than half of the pool, or cannot be written as the model's template says; nothing is pinned then.
    RequestRefused
        One is too long for the model.
    """
    texts, size, salts = asyncio.run(_encode(engine, config, prompts)), engine.sizes.block_size, salts_of(config)
    blocks, most = _num_blocks(texts, size) * len(salts), engine.sizes.total_blocks // SHARE
    if blocks > most:
        keys = "" if len(salts) == 1 else f" ({blocks // len(salts)} for each of {len(salts)} keys)"
        raise bad_argument("warm", f"at most {most} blocks, a half of the pool", f"{blocks}{keys}")
    tokens = sum(
        engine.llm.pin(text.tolist(), cache_salt=salt) for salt in salts for text in texts if len(text) >= size
    )
    if blocks and not tokens:
        raise InvalidOperation("warm: the prefixes of this model are not reused", "warm")
    return Pinned(tokens, blocks)


async def _encode(engine: AsyncEngine, config: ServerConfig, prompts: Sequence[list[ChatMessage]]) -> list[Ids]:
    model = ServedModel.of(engine, config)
    try:
        return [await _beginning(model, messages) for messages in prompts]
    except ApiError as error:
        raise InvalidOperation(f"warm: {error.detail}", "warm") from error
    finally:
        model.close()


async def _beginning(model: ServedModel, messages: list[ChatMessage]) -> Ids:
    """Return the tokens that all chats begin with which begin with these messages."""
    role: Any = "assistant" if messages[-1].role == "user" else "user"
    chats = [[*messages, ChatMessage(role=role, content=text)] for text in _WAYS_ON]
    first, second = [np.array(await encode_chat(model, chat, ChatForm(), ""), np.int64) for chat in chats]
    return first[: common_prefix(first, second)]


def _num_blocks(texts: Sequence[Ids], size: int) -> int:
    """Return how many blocks the whole blocks of some texts take, equal prefixes once."""
    count, before = 0, np.zeros(0, np.int64)
    for text in sorted(texts, key=lambda text: text.tolist()):  # whose longest common prefix is with a neighbour
        count += len(text) // size - common_prefix(before, text) // size
        before = text
    return count
