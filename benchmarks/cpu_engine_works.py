"""What benchmarks/cpu_engines.py has every engine do.

a  one stream: 128 tokens in, 128 new ones; the time of one token is that of 129 new ones less that of one,
   which is asked before and after
b  the first token after a prompt of 2,000
c  32 requests at once that begin with the same 512 tokens, 16 to 48 of their own, 64 new ones each; nothing is cached
w  as c, but the 512 tokens were asked before
d  8 chats in turns, 5 rounds: a question of 30 to 50 tokens, its first token by itself, then an answer of 32
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cpu_engine_process import Answer

Tokens = list[int]
Ask = Callable[[list[Tokens], int], Answer]
HERE = Path(__file__).parent
VOCABULARY = 40_000  # at most, of ids drawn at random


@dataclass(frozen=True)
class Sizes:
    """How much there is to do."""

    prompt: int = 128
    stream: int = 128
    long_prompt: int = 2000
    requests: int = 32
    system: int = 512
    new: int = 64
    chats: int = 8
    turns: int = 5
    answer: int = 32


FULL = Sizes()
SHORT = Sizes(stream=48, long_prompt=1000, requests=8, system=256, new=24, chats=2, turns=2)


@dataclass(frozen=True)
class Outcome:
    """Seconds of a work (of one token, in ``a``), processor seconds of the same, the texts, and what else there is."""

    seconds: float
    processor: float
    texts: list[Tokens]
    note: str = ""
    others: float = 0.0
    """Part of the cores that other processes had meanwhile."""


class Source:
    """Prompts: pieces of this project's documentation, or of ids drawn at random where there is no tokenizer."""

    def __init__(self, folder: Path | None) -> None:
        file = folder / "tokenizer.json" if folder else None
        if file is not None and file.exists():
            from tokenizers import Tokenizer

            pages = sorted((HERE.parent / "docs").glob("*.md"))
            text = "\n\n".join(page.read_text(encoding="utf-8") for page in pages)
            self._ids: Tokens = Tokenizer.from_file(str(file)).encode(text).ids
        else:
            drawn = random.Random(0)
            self._ids = [drawn.randrange(100, VOCABULARY) for _ in range(50_000)]

    def cut(self, rng: random.Random, length: int) -> Tokens:
        """Return a piece that begins with a token of its own, so that no other prompt is its prefix."""
        start = rng.randrange(len(self._ids) - length)
        return [rng.randrange(100, VOCABULARY), *self._ids[start : start + length - 1]]


def one_stream(ask: Ask, source: Source, rng: random.Random, sizes: Sizes, most: int | None) -> Outcome:
    """a"""
    body = source.cut(rng, sizes.prompt)
    before = ask([[body[0] + 1, *body[1:]]], 1)
    whole = ask([body], sizes.stream + 1)
    after = ask([[body[0] + 2, *body[1:]]], 1)
    seconds = _less(whole.seconds, before.seconds, after.seconds) / sizes.stream
    processor = _less(whole.processor, before.processor, after.processor) / sizes.stream
    return Outcome(seconds, processor, whole.tokens)


def _less(whole: float, before: float, after: float) -> float:
    """Take the prompt's time off; where a disturbance made it longer than everything, it stays in."""
    prompt = min(before, after)
    return whole - prompt if prompt < whole else whole


def first_token(ask: Ask, source: Source, rng: random.Random, sizes: Sizes, most: int | None) -> Outcome:
    """b"""
    answer = ask([source.cut(rng, sizes.long_prompt)], 1)
    return Outcome(answer.seconds, answer.processor, answer.tokens)


def many(ask: Ask, source: Source, rng: random.Random, sizes: Sizes, most: int | None) -> Outcome:
    """c"""
    answer = ask(_requests(source, rng, sizes)[1][:most], sizes.new)
    return Outcome(answer.seconds, answer.processor, answer.tokens)


def many_warm(ask: Ask, source: Source, rng: random.Random, sizes: Sizes, most: int | None) -> Outcome:
    """w"""
    system, prompts = _requests(source, rng, sizes)
    ask([[*system, 5], [*system, 6]], 1)
    answer = ask(prompts[:most], sizes.new)
    return Outcome(answer.seconds, answer.processor, answer.tokens)


def _requests(source: Source, rng: random.Random, sizes: Sizes) -> tuple[Tokens, list[Tokens]]:
    system = source.cut(rng, sizes.system)
    return system, [system + source.cut(rng, rng.randrange(16, 49)) for _ in range(sizes.requests)]


def chats(ask: Ask, source: Source, rng: random.Random, sizes: Sizes, most: int | None) -> Outcome:
    """d"""
    system = source.cut(rng, 128)
    texts = [list(system) for _ in range(sizes.chats)]
    seconds = processor = 0.0
    waits: list[float] = []
    for _ in range(sizes.turns):
        questions = [source.cut(rng, rng.randrange(30, 50)) for _ in texts]
        first = []
        for text, question in list(zip(texts, questions, strict=True))[:most]:
            text += question
            answers = ask([text], 1), ask([text], sizes.answer)
            first.append(answers[0].seconds)
            seconds += sum(answer.seconds for answer in answers)
            processor += sum(answer.processor for answer in answers)
            text += answers[1].tokens[0]
        waits.append(1e3 * statistics.median(first))
    note = f"ms to the first token, by turn: {', '.join(f'{wait:.0f}' for wait in waits)}"
    return Outcome(seconds, processor, texts[:most], note)


Work = Callable[[Ask, Source, random.Random, Sizes, int | None], Outcome]
WORKS: dict[str, Work] = {"a": one_stream, "b": first_token, "c": many, "w": many_warm, "d": chats}
TITLES = {
    "a": "one stream",
    "b": "first token of a long prompt",
    "c": "many at once",
    "w": "many, their system prompt cached",
    "d": "chats",
}
