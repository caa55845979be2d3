"""The served model: name, limits, tokenizing and detokenizing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from typing import Any, TypeVar

from pagedkv.engine import Structured
from pagedkv.errors import InvalidOperation, bad_argument
from pagedkv.server.admission import Turns
from pagedkv.server.config import ServerConfig
from pagedkv.server.engines import ServedEngine
from pagedkv.server.errors import ApiError
from pagedkv.server.structure import AskedStructure
from pagedkv.server.tokenizer_process import SECONDS, TokenizerEnded, TokenizerProcesses, decode, encode

T = TypeVar("T")
Begun = tuple[asyncio.Future[T], Callable[[], None] | None]
"""What is under way, and what is to be called when nobody waits for it."""
LONG_TEXT, LONG_FOR_PYTHON = 16_384, 2048
"""Characters, or tokens, up to which tokenizing takes a few milliseconds: by a tokenizer in Rust, and in Python."""
LONGEST_TOKEN = 16
"""Characters of a token at most, on the average of a text. Vocabularies have longer ones, of a hundred spaces say."""


def template_of(tokenizer: Any, given: str | None = None, *, with_tools: bool = False) -> str | None:
    """Return the chat template that is used: the one that is given or the tokenizer's, of several the one for tools."""
    template = given or getattr(tokenizer, "chat_template", None) or None
    if isinstance(template, dict):
        named: str | None = template.get("tool_use") if with_tools else None
        return named or template.get("default")
    return template


@dataclass(eq=False, kw_only=True)
class ServedModel:
    """The model as the API sees it.

    Attributes
    ----------
    name : str
    tokenizer : optional
        Of transformers; without one only token ids are taken.
    vocab_size : int
        Token ids are below it.
    max_model_len : int
        Tokens of a prompt and its continuation.
    max_prompt_tokens : int
    max_num_seqs : int
        Sequences that the engine runs at once.
    has_tenants : bool
        Whether there are several keys.
    chat_template : str, optional
        Instead of the tokenizer's own.
    compile : callable, optional
        Makes ready what answers are to follow, as :meth:`pagedkv.engine.AsyncEngine.compile` does.
    created : int
        Seconds since 1970.
    """

    name: str
    tokenizer: Any
    vocab_size: int
    max_model_len: int
    max_prompt_tokens: int
    max_num_seqs: int
    has_tenants: bool = False
    chat_template: str | None = None
    compile: Callable[[Structured], None] | None = None
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        # Short texts never wait for long ones, and a tenant with long ones leaves a thread to the others.
        self._threads = ThreadPoolExecutor(5, "pagedkv-tokenizer")
        self._short, self._long = Turns(2, 2), Turns(2, 1 if self.has_tenants else 2)
        self._compiling = Turns(1, 1)
        self._longest_short = LONG_TEXT if getattr(self.tokenizer, "is_fast", True) else LONG_FOR_PYTHON
        self._processes = TokenizerProcesses(self.tokenizer, self._threads)

    @classmethod
    def of(cls, engine: ServedEngine, config: ServerConfig) -> ServedModel:
        """Read it off an engine."""
        sizes = engine.sizes
        prompt_limit = sizes.max_model_len - 1
        if config.max_prompt_tokens is not None:
            prompt_limit = min(prompt_limit, config.max_prompt_tokens)
        return cls(
            name=config.model_name or "default",
            tokenizer=engine.tokenizer,
            vocab_size=sizes.vocab_size,
            max_model_len=sizes.max_model_len,
            max_prompt_tokens=prompt_limit,
            max_num_seqs=sizes.max_num_seqs,
            has_tenants=config.has_tenants,
            chat_template=config.chat_template,
            compile=engine.compile,
        )

    def check_name(self, name: str | None) -> None:
        """See that a request means this model; 404 if not."""
        if name is not None and name != self.name:
            shown = name if len(name) <= 100 else f"{name[:100]}…"
            raise ApiError(
                404,
                f"there is no model {shown!r}; this server has {self.name!r}",
                param="model",
                code="model_not_found",
            )

    def template(self, given: str | None = None, *, with_tools: bool = False) -> str | None:
        """Return the chat template that is used: one that is given, the operator's or the tokenizer's, if any."""
        return template_of(self.tokenizer, given or self.chat_template, with_tools=with_tools)

    async def encode(
        self, text: str, tenant: str, *, special_tokens: bool = True, param: str = "prompt", cuts: bool = False
    ) -> list[int]:
        """Return the token ids of a text; 400 if it has more characters than can fit, or, with `cuts`, of its end."""
        self._need_tokenizer()
        if cuts:
            text = text[-self.max_characters :]
        self.check_text(len(text), param)
        return await self._apart(encode, text, special_tokens, tenant=tenant, size=len(text))

    async def decode(self, token_ids: Sequence[int], tenant: str, *, special_tokens: bool = True) -> str:
        """Return the text of token ids, with the special ones or without."""
        self._need_tokenizer()
        return await self._apart(decode, token_ids, special_tokens, tenant=tenant, size=len(token_ids))

    async def render_chat(self, render: Callable[[Any], str], tenant: str, characters: int) -> str:
        """Return what a function makes of the tokenizer and of so many characters."""
        self._need_tokenizer()
        return await self._apart(render, tenant=tenant, size=characters, in_thread=True)

    async def structured(self, asked: AskedStructure | None, tenant: str) -> Structured | None:
        """Return what an answer is to follow, compiled in a thread, one at a time; 400 if it makes no sense."""
        if asked is None:
            return None
        self._need_tokenizer()
        return await self._in_turn(self._compiling, tenant, partial(self._in_thread, self._compiled, asked))

    def _compiled(self, asked: AskedStructure) -> Structured:
        structured = asked.checked()
        try:
            if self.compile is not None:
                self.compile(structured)
        except InvalidOperation as error:
            raise asked.fault(error) from None
        return structured

    @cached_property
    def max_characters(self) -> int:
        """The most characters of a prompt: of no text more fit, but of one that is spaces for the most part."""
        names = self._need_tokenizer().get_vocab()
        longest = max((len(name.encode()) for name in names), default=1)
        return self.max_prompt_tokens * min(longest, LONGEST_TOKEN)

    def check_text(self, characters: int, param: str) -> None:
        """See that a text of so many characters can fit at all, before it is tokenized."""
        if characters > self.max_characters:
            message = (
                f"{param}: the text has {characters} characters, at most {self.max_characters} are taken, "
                f"as a prompt has at most {self.max_prompt_tokens} tokens"
            )
            raise ApiError(400, message, param=param, code="context_length_exceeded")

    def check_count(self, tokens: int, param: str) -> None:
        """See that there are no more tokens than a text can have."""
        if tokens > self.max_model_len:
            message = f"{param}: expected at most {self.max_model_len} tokens, got {tokens}"
            raise ApiError(400, message, param=param, code="context_length_exceeded")

    def check_ids(self, token_ids: Sequence[int], param: str) -> None:
        """See that the model knows the tokens; InvalidOperation if not."""
        if token_ids and not (min(token_ids) >= 0 and max(token_ids) < self.vocab_size):
            wrong = next(token for token in token_ids if not 0 <= token < self.vocab_size)
            raise bad_argument(param, f"token ids from 0 to {self.vocab_size - 1}", f"{wrong}")

    def check_length(self, tokens: int, max_tokens: int | None, param: str) -> None:
        """See that a prompt and what is to be written fit; the error has the numbers."""
        if tokens == 0:
            raise bad_argument(param, "at least one token", "none")
        code = "context_length_exceeded"
        if tokens > self.max_prompt_tokens:
            message = f"{param}: the prompt has {tokens} tokens, at most {self.max_prompt_tokens} are taken"
            raise ApiError(400, message, param=param, code=code)
        if max_tokens is not None and tokens + max_tokens > self.max_model_len:
            message = (
                f"This model's maximum context length is {self.max_model_len} tokens, but {tokens + max_tokens} were "
                f"requested: {tokens} of the prompt and {max_tokens} to write"
            )
            raise ApiError(400, message, param="max_tokens", code=code)

    def last_tokens(self, ids: list[int], count: int | None, max_tokens: int | None) -> list[int]:
        """Return so many last tokens of a prompt: all if `count` is None, as many as fit if it is -1."""
        if count is None:
            return ids
        if count == -1:
            count = max(1, min(self.max_prompt_tokens, self.max_model_len - (max_tokens or 1)))
        return ids[max(0, len(ids) - count) :]

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """The special tokens, which a text may be without, and their ids."""
        added = getattr(self.tokenizer, "added_tokens_decoder", {})
        return {token.content: number for number, token in added.items() if token.special}

    @cached_property
    def infilling(self) -> Infilling | None:
        """How the model is asked for what is missing in the middle of a text; None if its tokenizer has no marks."""
        found = (infilling_of(self.tokenizer, names, self.vocab_size) for names in INFILLINGS)
        return None if self.tokenizer is None else next((each for each in found if each is not None), None)

    def close(self) -> None:
        """End the threads, and the processes whatever they do."""
        self._processes.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _need_tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise ApiError(400, "this server has no tokenizer: it takes and gives token ids only", code="no_tokenizer")
        return self.tokenizer

    async def _apart(
        self, function: Callable[..., T], *args: Any, tenant: str, size: int, in_thread: bool = False
    ) -> T:
        """Let a function make something of the tokenizer, when it is the turn of this tenant.

        What is short is done in a thread, in a few milliseconds. What is long is done in a process, which is ended
        when it takes too long, or a while longer than anybody waits.
        """
        is_long = size > self._longest_short

        def begin() -> Begun[T]:
            if is_long and not in_thread and self._processes.usable:
                return self._processes.begin(function, *args)
            return self._in_thread(function, self.tokenizer, *args)

        return await self._in_turn(self._long if is_long else self._short, tenant, begin)

    def _in_thread(self, function: Callable[..., T], *args: Any) -> Begun[T]:
        return asyncio.get_running_loop().run_in_executor(self._threads, partial(function, *args)), None

    async def _in_turn(self, turns: Turns, tenant: str, begin: Callable[[], Begun[T]]) -> T:
        """Begin something when it is the turn of this tenant, and wait for it; what it returns abandons it."""
        await turns.enter(tenant)
        work, abandon = begin()

        def done(work: asyncio.Future[T]) -> None:
            turns.leave(tenant)
            if not work.cancelled():
                work.exception()  # nobody may wait for it any more

        work.add_done_callback(done)
        try:
            # Who leaves does not wait for the thread, but the turn lasts until it is through.
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            if abandon is not None:
                abandon()
            raise
        except TokenizerEnded as ended:
            raise _ended(ended) from ended


# Marks with which models are asked for what is missing in the middle of a text.


@dataclass(frozen=True, slots=True)
class Infilling:
    """The tokens that stand before, between and behind what is there of a text.

    Attributes
    ----------
    prefix, suffix : int
        Before the beginning, and before the end.
    middle : int, optional
        Behind both; without it the end stands before the beginning.
    ends : tuple of int
        Marks that end what the model writes.
    has_spaces : bool
        Whether the tokenizer puts a space before every text.
    """

    prefix: int
    suffix: int
    middle: int | None
    ends: tuple[int, ...]
    has_spaces: bool

    def prompt(self, before: list[int], after: list[int]) -> list[int]:
        """Return the tokens that ask for what is missing between two texts."""
        if self.middle is None:
            return [self.suffix, *after, self.prefix, *before]
        return [self.prefix, *before, self.suffix, *after, self.middle]


INFILLINGS: tuple[tuple[str | None, ...], ...] = (
    # Of the beginning, the end and the middle; then others that end what is written.
    (
        "<|fim_prefix|>",
        "<|fim_suffix|>",
        "<|fim_middle|>",
        "<|fim_pad|>",
        "<|repo_name|>",
        "<|file_sep|>",
        "<|file_separator|>",
    ),
    (
        "<fim_prefix>",
        "<fim_suffix>",
        "<fim_middle>",
        "<fim_pad>",
        "<filename>",
        "<file_sep>",
        "<reponame>",
        "<repo_name>",
    ),
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>", "<fim-pad>"),
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
    ("▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>"),
    ("[PREFIX]", "[SUFFIX]", None),
)
"""Of Qwen 2.5 Coder and CodeGemma, StarCoder and Granite, SantaCoder, DeepSeek Coder, Code Llama, Codestral."""


def infilling_of(tokenizer: Any, names: Sequence[str | None], vocab_size: int) -> Infilling | None:
    """Return the marks of these names; None if the tokenizer does not have them."""
    absent = (None, getattr(tokenizer, "unk_token_id", None))

    def token(name: str | None) -> int | None:
        found = None if name is None else tokenizer.convert_tokens_to_ids(name)
        return None if found in absent or not 0 <= found < vocab_size else int(found)

    prefix, suffix, middle, *others = map(token, names)
    if prefix is None or suffix is None or (middle is None and names[2] is not None):
        return None
    ends = tuple(each for each in (prefix, suffix, middle, *others) if each is not None)
    return Infilling(prefix, suffix, middle, ends, has_spaces=str(names[0]).startswith("▁"))


def _ended(ended: TokenizerEnded) -> ApiError:
    if ended.out_of_time:
        return ApiError(400, f"tokenizing the text took longer than {SECONDS} seconds", code="tokenizing_too_long")
    return ApiError(503, "the process that tokenized the text has ended", code="tokenizer_ended", retry_after=1)


LEAST = -9999.0  # JSON has no infinity


class TokenText:
    """Shows single tokens; a token may be a part of a character only.

    Parameters
    ----------
    tokenizer : optional
        Without one a token is shown as its id.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.raw = cache(self._raw)

    def text(self, token: int) -> str:
        """Return the text of a token; its bytes in hex where it is no text by itself, as OpenAI has it."""
        raw = self.raw(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def length(self, token: int) -> int:
        """Return how many characters of the text begin with a token; special ones are not shown in it."""
        if self._tokenizer is not None and token in self._special:
            return 0
        # Every byte of UTF-8 begins a character but those that go on with one, which may be another token's.
        return sum(byte & 0xC0 != 0x80 for byte in self.raw(token))

    def chat_entry(self, token: int, likely: Mapping[int, Any], count: int) -> dict[str, Any]:
        """Return a token of a chat with `count` of the likeliest ones."""
        top = sorted(likely.items(), key=lambda item: -item[1].logprob)[:count]
        entry = self._entry(token, likely[token].logprob)
        return {**entry, "top_logprobs": [self._entry(other, found.logprob) for other, found in top]}

    def completion_entries(
        self, tokens: list[int] | tuple[int, ...], likely: list[Mapping[int, Any] | None], offset: int
    ) -> dict[str, Any]:
        """Return the log probabilities of tokens that begin at a place in the text, in characters."""
        texts = [self.text(token) for token in tokens]
        offsets = []
        for token in tokens:
            offsets.append(offset)
            offset += self.length(token)
        return {
            "tokens": texts,
            "token_logprobs": [
                None if found is None else max(LEAST, found[token].logprob)
                for token, found in zip(tokens, likely, strict=True)
            ],
            "top_logprobs": [
                None if found is None else {self.text(other): max(LEAST, of.logprob) for other, of in found.items()}
                for found in likely
            ],
            "text_offset": offsets,
        }

    def prompt_entries(self, likely: list[Any] | None, tokens: Sequence[int], count: int) -> list[Any] | None:
        """Return the log probabilities of a prompt as vLLM tells them, with `count` of the likeliest ones."""
        if likely is None:
            return None
        return [
            None
            if found is None
            else {
                str(other): {
                    "logprob": max(LEAST, of.logprob),
                    "rank": of.rank,
                    "decoded_token": self.text(other),
                }
                for other, of in found.items()
                if other == token or of.rank <= count
            }
            for token, found in zip(tokens, likely, strict=True)
        ]

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        return {"token": self.text(token), "logprob": max(LEAST, logprob), "bytes": list(self.raw(token))}

    def _raw(self, token: int) -> bytes:
        """Return the bytes of a token."""
        if self._tokenizer is None:
            return str(token).encode()
        name = self._tokenizer.convert_ids_to_tokens(token)
        if name is None:
            return b""
        if token in self._special:
            return str(name).encode()
        if self._is_byte_level and all(letter in _BYTES for letter in name):
            return bytes(_BYTES[letter] for letter in name)
        if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
            return bytes.fromhex(name[3:5])
        return str(name).replace("\u2581", " ").encode()

    @cached_property
    def _special(self) -> frozenset[int]:
        return frozenset(self._tokenizer.all_special_ids)

    @cached_property
    def _is_byte_level(self) -> bool:
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        return "ByteLevel" in str(getattr(backend, "decoder", ""))


def _byte_letters() -> dict[str, int]:
    """Return the letters that byte-level BPE writes for bytes: printable ones for themselves, the rest from 256 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = {chr(byte): byte for byte in plain}
    for place, byte in enumerate(sorted(set(range(256)) - set(plain))):
        letters[chr(256 + place)] = byte
    return letters


_BYTES = _byte_letters()
