"""llama.cpp for benchmarks/cpu_engines.py, through the low-level interface of llama-cpp-python.

Requests that come together are sequences of one batch; a prefix that they share is computed once, shared by all, and
kept for the next such batch. A request that comes alone continues the slot whose text it goes on with, or takes the one
that was used longest ago; each slot has cells of its own.
"""

from __future__ import annotations

from itertools import takewhile
from typing import Any

Tokens = list[int]
Item = tuple[int, int, int, bool]
"""A token, its position, its sequence, and whether its logits are wanted."""

SLOTS, CELLS_OF_SLOT = 8, 2304
BATCH, CELLS = 512, 8192
MOST_SEQUENCES = 64


def common(a: Tokens, b: Tokens) -> int:
    """Return how many tokens two texts have in common at the beginning."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


class Context:
    """A context of llama.cpp, and what to compute in it."""

    def __init__(self, library: Any, model: Any, threads: int, sequences: int, cells: int, shared: bool) -> None:
        import numpy

        parameters = library.llama_context_default_params()
        parameters.n_ctx, parameters.n_seq_max, parameters.kv_unified = cells, sequences, shared
        parameters.n_batch = parameters.n_ubatch = BATCH
        parameters.n_threads = parameters.n_threads_batch = threads
        self.library, self._numpy = library, numpy
        self.context = library.llama_init_from_model(model, parameters)
        self.memory = library.llama_get_memory(self.context)
        self.batch = library.llama_batch_init(BATCH, 0, 1)
        self.vocabulary = library.llama_vocab_n_tokens(library.llama_model_get_vocab(model))

    def feed(self, items: list[Item]) -> Tokens:
        """Compute tokens; returns the likeliest next ones of those whose logits are wanted."""
        likeliest: Tokens = []
        for start in range(0, len(items), BATCH):
            part = items[start : start + BATCH]
            self.batch.n_tokens = len(part)
            for row, (token, position, sequence, wanted) in enumerate(part):
                self.batch.token[row], self.batch.pos[row], self.batch.logits[row] = token, position, wanted
                self.batch.n_seq_id[row], self.batch.seq_id[row][0] = 1, sequence
            if self.library.llama_decode(self.context, self.batch):
                raise RuntimeError("llama_decode failed")
            likeliest += [self._likeliest(row) for row, item in enumerate(part) if item[3]]
        return likeliest

    def _likeliest(self, row: int) -> int:
        logits = self.library.llama_get_logits_ith(self.context, row)
        return int(self._numpy.ctypeslib.as_array(logits, (self.vocabulary,)).argmax())

    def forget(self, sequence: int, start: int = 0) -> None:
        """Drop the tokens of a sequence from a position on."""
        self.library.llama_memory_seq_rm(self.memory, sequence, start, -1)

    def write(self, prompts: list[Tokens], sequences: list[int], known: int, count: int) -> list[Tokens]:
        """Compute what is not known of the prompts, and so many tokens after them."""
        last = [len(prompt) - 1 for prompt in prompts]
        items = [
            (prompt[position], position, sequence, position == end)
            for prompt, sequence, end in zip(prompts, sequences, last, strict=True)
            for position in range(known, end + 1)
        ]
        texts = [[token] for token in self.feed(items)]
        for step in range(1, count):
            rows = zip(texts, last, sequences, strict=True)
            found = self.feed([(text[-1], end + step, sequence, True) for text, end, sequence in rows])
            for text, token in zip(texts, found, strict=True):
                text.append(token)
        return texts


class LlamaCpp:
    """An engine: one context for requests that come alone, one for those that come together."""

    facts: dict[str, int] = {}

    def __init__(self, threads: int) -> None:
        import llama_cpp

        self._library, self._threads = llama_cpp, threads
        self._slots: list[Tokens] = [[] for _ in range(SLOTS)]
        self._used = list(range(SLOTS))
        self._shared: Tokens = []

    def load(self, model: str, dtype: str, options: dict[str, Any]) -> None:
        library = self._library
        library.llama_backend_init()
        loaded = library.llama_model_load_from_file(model.encode(), library.llama_model_default_params())
        if not loaded:
            raise RuntimeError(f"llama.cpp cannot load {model}")
        self._alone = Context(library, loaded, self._threads, SLOTS, SLOTS * CELLS_OF_SLOT, shared=False)
        self._together = Context(library, loaded, self._threads, MOST_SEQUENCES + 1, CELLS, shared=True)

    def generate(self, prompts: list[Tokens], count: int) -> list[Tokens]:
        return self._batch(prompts, count) if len(prompts) > 1 else self._single(prompts[0], count)

    def _single(self, prompt: Tokens, count: int) -> list[Tokens]:
        slot = max(self._used, key=lambda number: common(self._slots[number], prompt))
        if 10 * common(self._slots[slot], prompt) < 9 * len(self._slots[slot]):
            slot = self._used[0]  # it holds another text
        self._used.remove(slot)
        self._used.append(slot)
        known = min(common(self._slots[slot], prompt), len(prompt) - 1)
        self._alone.forget(slot, known)
        texts = self._alone.write([prompt], [slot], known, count)
        self._slots[slot] = prompt + texts[0][:-1]
        return texts

    def _batch(self, prompts: list[Tokens], count: int) -> list[Tokens]:
        context, sequences = self._together, list(range(1, len(prompts) + 1))
        shared = min(min(common(prompts[0], prompt), len(prompt) - 1) for prompt in prompts)
        known = min(common(self._shared, prompts[0]), shared)
        for sequence in range(1, MOST_SEQUENCES + 1):
            context.forget(sequence)
        context.forget(0, known)
        self._shared = prompts[0][:shared]
        context.feed([(prompts[0][position], position, 0, False) for position in range(known, shared)])
        for sequence in sequences:
            self._library.llama_memory_seq_cp(context.memory, 0, sequence, -1, -1)
        return context.write(prompts, sequences, shared, count)
