"""TokenText: single tokens as text and as bytes."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

__all__ = ["TokenText"]

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
        self._known: dict[int, bytes] = {}

    def raw(self, token: int) -> bytes:
        """Return the bytes of a token."""
        found = self._known.get(token)
        if found is None:
            found = self._known[token] = self._raw(token)
        return found

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

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        return {"token": self.text(token), "logprob": max(LEAST, logprob), "bytes": list(self.raw(token))}

    def _raw(self, token: int) -> bytes:
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
