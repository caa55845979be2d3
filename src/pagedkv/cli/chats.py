"""Chats with one model: what was said, as tokens, in files, and in the blocks that several of them share."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from pagedkv.cli.loading import LoadedModel
from pagedkv.cli.terminal import Failure
from pagedkv.cli.writing import written_by

if TYPE_CHECKING:
    from pagedkv.engine import LLM, RequestOutput, SamplingParams

Role = Literal["user", "assistant"]
Form = Literal["template", "roles", "text"]
FORMS: tuple[Form, ...] = ("template", "roles", "text")

ROLE_STOPS = ("\nuser:", "\nsystem:")
"""Where an answer ends in the form of roles: the model begins to speak for another."""


class Message(msgspec.Struct):
    """What one side said; of an answer also the tokens that the model wrote, as text may be cut into others again."""

    role: Role
    content: str
    token_ids: list[int] = []


class Chat(msgspec.Struct):
    """One chat, as it is kept in its file; `model` wrote the answers."""

    name: str
    system: str | None = None
    messages: list[Message] = []
    model: str = ""

    def forked(self, name: str) -> Chat:
        """Return a chat of another name that goes on from here."""
        return Chat(name, self.system, list(self.messages), self.model)


class ChatTokens:
    """How the chats of a model are written as tokens.

    A chat that goes on begins with the very tokens that were computed for it before, whatever the tokenizer would make
    of its text now: so all of it is found in the cache.

    Parameters
    ----------
    loaded : LoadedModel
    form : {"template", "roles", "text"}, optional
        By the model's chat template; as ``user: …`` and ``assistant: …``; or as one text on which the model goes on.
        The template by default, the text where there is none.

    Raises
    ------
    Failure
        The template was asked for, and there is none.
    """

    def __init__(self, loaded: LoadedModel, form: Form | None = None) -> None:
        if form == "template" and not loaded.has_chat_template:
            raise Failure("--form: expected roles or text, as the model has no chat template, got template")
        self.form: Form = form or ("template" if loaded.has_chat_template else "text")
        self._loaded = loaded

    @property
    def stops(self) -> tuple[str, ...]:
        """Strings at which an answer ends."""
        return ROLE_STOPS if self.form == "roles" else ()

    def text(self, chat: Chat, upto: int | None = None, *, open_answer: bool = True) -> str:
        """Return the text of a chat, or of its first messages, by default up to where an answer begins."""
        system = [] if chat.system is None else [("system", chat.system)]
        said = [*system, *((message.role, message.content) for message in chat.messages[:upto])]
        if self.form == "template":
            messages = [{"role": role, "content": content} for role, content in said]
            return self._loaded.chat_text(messages, open_answer=open_answer) if messages else ""
        if self.form == "roles":
            return "".join(f"{role}: {content}\n\n" for role, content in said) + "assistant:" * open_answer
        text = ""
        for role, content in said:
            text += "\n" * (role != "assistant" and bool(text) and not text.endswith("\n")) + content
        return text

    def token_ids(self, chat: Chat, *, open_answer: bool = True) -> list[int]:
        """Return the tokens of a chat, answers as the model wrote them; `Failure` as in `LoadedModel.encode`."""
        asked, said, known = "", "", list[int]()
        for place, message in enumerate(chat.messages):
            if message.token_ids:
                text = self.text(chat, place)
                known = [*self._extended(asked, said, known, text), *message.token_ids]
                asked, said = text, message.content
        return self._extended(asked, said, known, self.text(chat, open_answer=open_answer))

    def _extended(self, asked: str, said: str, known: list[int], text: str) -> list[int]:
        """Return the tokens of a text; those of its beginning, a prompt and the answer to it, are known."""
        rest = _behind(text, asked, said) if known else None
        if rest is not None:
            return [*known, *self._loaded.encode_part(rest)] if rest else known
        if not text:
            return []
        return self._loaded.encode_part(text) if self.form == "template" else self._loaded.encode(text)


def _behind(text: str, asked: str, said: str) -> str | None:
    """Return what follows on a prompt and the answer to it; None where a text does not begin with them.

    Space around an answer may be another one: templates strip it, or put some.
    """
    if not text.startswith(asked):
        return None
    rest = text[len(asked) :]
    if rest.startswith(said):
        return rest[len(said) :]
    rest, said = rest.lstrip(), said.strip()
    return rest[len(said) :] if said and rest.startswith(said) else None


# Files.


def private_folder(folder: Path) -> None:
    """Make a folder that its owner alone can read, where it is not there."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)


_NAME = re.compile(r"[\w][\w. -]{0,99}")


class ChatStore:
    """Chats in the JSON files of a folder, which their owner alone can read.

    Parameters
    ----------
    folder : Path
        Made when it is first written to.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, chat: Chat) -> None:
        """Write a chat, wholly or not at all; `Failure` where the disk refuses."""
        file = self._file(chat.name)
        try:
            private_folder(self.folder)
            new = file.with_suffix(".new")
            with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as target:
                target.write(msgspec.json.format(msgspec.json.encode(chat), indent=1))
            os.replace(new, file)
        except OSError as error:
            raise Failure(f"--sessions: cannot write {file}: {error.strerror or error}") from error

    def load(self, name: str) -> Chat:
        """Read a chat; `Failure` where there is none of this name, or its file is broken."""
        file = self._file(name)
        try:
            chat = msgspec.json.decode(file.read_bytes(), type=Chat)
        except FileNotFoundError:
            raise Failure(f"there is no chat {name!r} in {self.folder}") from None
        except (OSError, msgspec.MsgspecError) as error:
            raise Failure(f"cannot read {file}: {error}") from error
        chat.name = name
        return chat

    def names(self) -> list[str]:
        """Return the names of all chats, the last written one first."""
        files = [file for file in self.folder.glob("*.json") if _NAME.fullmatch(file.stem)]
        return [file.stem for file in sorted(files, key=lambda file: (-file.stat().st_mtime_ns, file.stem))]

    def _file(self, name: str) -> Path:
        if not _NAME.fullmatch(name):
            raise Failure(f"expected a name of letters, digits, spaces, dots and dashes, got {name!r}")
        return self.folder / f"{name}.json"


# The chats of one model over one engine.


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What came of a message, and what it took.

    Attributes
    ----------
    text : str
    finish_reason : str
        ``stop``, ``length``, or ``abort`` where Ctrl-C ended it.
    prompt_tokens, cached_tokens, disk_tokens : int
        Of the chat up to the answer; those that did not have to be computed; and of these, those that were loaded from
        the disk just now.
    new_tokens : int
    first_token : float
        Seconds to the first token; 0 where none came.
    seconds : float
        To the last one.
    """

    text: str
    finish_reason: str
    prompt_tokens: int
    cached_tokens: int
    disk_tokens: int
    new_tokens: int
    first_token: float
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Tokens after the first one over the time that they took."""
        writing = self.seconds - self.first_token
        return (self.new_tokens - 1) / writing if self.new_tokens > 1 and writing > 0 else 0.0


@dataclass(frozen=True, kw_only=True)
class Sharing:
    """What the open chats hold of the pool, and what they would hold otherwise; in blocks.

    Attributes
    ----------
    chats : int
    used : int
        Blocks of the pool that hold their text.
    apart : int
        If nothing were shared: one cache for each chat.
    preallocated : int
        If each had a cache of the longest length.
    block_bytes : int
    prompt_tokens, cached_tokens, disk_tokens : int
        Of all messages so far: read, not computed, and of these loaded from the disk.
    """

    chats: int
    used: int
    apart: int
    preallocated: int
    block_bytes: int
    prompt_tokens: int
    cached_tokens: int
    disk_tokens: int


class Chats:
    """The open chats of one model, one of them the current one.

    Parameters
    ----------
    llm : LLM
    tokens : ChatTokens
    model : str
        Its name.
    params : SamplingParams
        Of every answer; ``max_tokens`` is lowered to what there is room for, and ``seed`` counts up.
    current : Chat
    store : ChatStore, optional
        Where chats are looked for and saved.
    """

    def __init__(
        self,
        llm: LLM,
        tokens: ChatTokens,
        model: str,
        params: SamplingParams,
        current: Chat,
        store: ChatStore | None = None,
    ) -> None:
        self.llm, self.tokens, self.model, self.params, self.store = llm, tokens, model, params, store
        self.current = current
        self.open = {current.name: current}
        self.last: Answer | None = None
        self._num_answers = 0
        self._before = llm.stats()

    def say(self, text: str, show: Callable[[str], None]) -> Answer:
        """Let the model answer a message; `show` gets the answer piece by piece.

        Without a single token of an answer, because of Ctrl-C or an error, the message was never said.
        """
        said = self.current.messages
        said.append(Message("user", text))
        try:
            return self._answer(show)
        finally:
            if said[-1].role == "user":
                said.pop()

    def retry(self, show: Callable[[str], None]) -> Answer:
        """Let the model answer the last message again, by another seed; `Failure` where it has not answered yet."""
        said = self.current.messages
        if not said:
            raise Failure("there is no answer yet that could be tried again")
        before = said.pop()
        try:
            return self._answer(show)
        finally:
            if said[-1].role == "user":
                said.append(before)

    def _answer(self, show: Callable[[str], None]) -> Answer:
        ids, limit = self.tokens.token_ids(self.current), self.llm.sizes.max_model_len
        room = limit - len(ids)
        if room < 1:
            raise Failure(f"the chat has {len(ids):,} tokens, model and pool hold {limit:,}: /new begins another")
        seed = None if self.params.seed is None else self.params.seed + self._num_answers
        params = replace(self.params, max_tokens=min(self.params.max_tokens or room, room), seed=seed)
        output, answer = self._written(ids, params, show)
        self._num_answers += 1
        text = output.outputs[0]
        if answer.new_tokens:
            # The stop token is the template's to write; and where a stop string ended it, text and tokens differ.
            ended = text.finish_reason == "stop"
            kept = text.token_ids[: -1 if ended else None] if not isinstance(text.stop_reason, str) else ()
            self.current.messages.append(Message("assistant", text.text, list(kept)))
            self.current.model = self.model
        self.last = answer
        return answer

    def _written(
        self, ids: Sequence[int], params: SamplingParams, show: Callable[[str], None]
    ) -> tuple[RequestOutput, Answer]:
        loaded, started = self._loaded_tokens(), time.perf_counter()
        request = self.llm.request(list(ids), params)
        try:
            self.llm.core.add(request)
            output = written_by(self.llm, request, show, until_interrupted=True)
        except BaseException:
            self.llm.core.abort(request.request_id)
            raise
        seconds, metrics, text = time.perf_counter() - started, output.metrics, output.outputs[0]
        first = 0.0 if metrics.first_token is None else metrics.first_token - metrics.arrived
        cached = output.num_cached_tokens
        return output, Answer(
            text=text.text,
            finish_reason=text.finish_reason or "abort",
            prompt_tokens=len(ids),
            cached_tokens=cached,
            disk_tokens=min(cached, self._loaded_tokens() - loaded),
            new_tokens=len(text.token_ids),
            first_token=first,
            seconds=seconds,
        )

    def _loaded_tokens(self) -> int:
        return sum(tier.loads for tier in self.llm.stats().tiers) * self.llm.sizes.block_size

    # Which chat is the current one.

    def new(self, name: str) -> None:
        """Begin another chat under the system prompt of this one."""
        self._enter(Chat(self._free(name), self.current.system))

    def fork(self, name: str) -> None:
        """Go on in a copy of this chat; both share all that was said so far."""
        self._enter(self.current.forked(self._free(name)))

    def save(self, name: str | None = None) -> None:
        """Write the chat to its file; under another name, the chat is called so from now on."""
        store = self._needed_store()
        if name is None or name == self.current.name:
            store.save(self.current)
            return
        renamed = self.current.forked(self._free(name))
        store.save(renamed)
        del self.open[self.current.name]
        self._enter(renamed)

    def load(self, name: str) -> Answer | None:
        """Go on with a chat that is open or in a file, and bring its text into the pool, from the disk if it has it.

        Returns what that took; None where nothing was said in it yet.
        """
        chat = self.open.get(name) or self._needed_store().load(name)
        self._enter(self._readable(chat))
        ids = self.tokens.token_ids(chat, open_answer=False) if chat.messages else []
        if not 0 < len(ids) < self.llm.sizes.max_model_len:
            return None
        once = replace(self.params, max_tokens=1, stop=())
        return self._written(ids, once, lambda piece: None)[1]

    def take_over(self, others: Chats) -> None:
        """Go on with the chats that are open with another model."""
        self.open = {name: self._readable(chat) for name, chat in others.open.items()}
        self.current = others.current

    def _readable(self, chat: Chat) -> Chat:
        """Return a chat, without the tokens of its answers where another model wrote them."""
        if chat.model != self.model:
            chat.messages = [Message(message.role, message.content) for message in chat.messages]
        return chat

    def _enter(self, chat: Chat) -> None:
        self.open[chat.name] = self.current = chat

    def _free(self, name: str) -> str:
        if name in self.open or (self.store is not None and name in self.store.names()):
            raise Failure(f"there is a chat {name!r} already: /load {name} goes on with it")
        if not _NAME.fullmatch(name):
            raise Failure(f"expected a name of letters, digits, spaces, dots and dashes, got {name!r}")
        return name

    def _needed_store(self) -> ChatStore:
        if self.store is None:
            raise Failure("chats are kept in no folder, as --no-disk was given")
        return self.store

    # What is shared.

    def sharing(self) -> Sharing:
        """Return what the open chats hold of the pool now."""
        llm, cache, size = self.llm, self.llm.core.runner.cache, self.llm.sizes.block_size
        tree: dict[tuple[int, tuple[int, ...]], int] = {}
        apart = 0
        for chat in self.open.values():
            ids = self.tokens.token_ids(chat, open_answer=False) if chat.messages else []
            held = cache.match_blocks(ids) // size if ids else 0
            apart += held
            node = -1
            for block in range(held):
                node = tree.setdefault((node, tuple(ids[block * size : (block + 1) * size])), len(tree))
        stats, before = llm.stats(), self._before
        return Sharing(
            chats=len(self.open),
            used=len(tree),
            apart=apart,
            preallocated=len(self.open) * (llm.sizes.max_model_len // size),
            block_bytes=llm.sizes.bytes_per_block,
            prompt_tokens=stats.prompt_tokens - before.prompt_tokens,
            cached_tokens=stats.prefix_hits - before.prefix_hits,
            disk_tokens=self._loaded_tokens(),
        )

    def facts(self) -> list[tuple[str, Any]]:
        """Return the chats by name, each with how many messages it has and how it began; the current one is marked."""
        rows = []
        for name, chat in self.open.items():
            first = next((message.content for message in chat.messages), "")
            rows.append((name, f"{len(chat.messages)} messages  {' '.join(first.split())[:60]}"))
        return rows
