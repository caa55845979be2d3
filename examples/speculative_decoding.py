"""Speculative decoding by truncate: drafts are appended, verified in one pass, and what was wrong is taken back.

The drafter looks for an earlier place in the text that ends like the present one, and proposes what followed there.
The text is that of greedy decoding, whatever the drafter says.
"""

from __future__ import annotations

import numpy as np

from pagedkv.hf import load_runner
from pagedkv.hf.runner import ModelRunner
from pagedkv.models import shipped_model_path


def look_up(ids: list[int], count: int, ngram: int = 2) -> list[int]:
    """Return up to `count` tokens that followed the last `ngram` tokens when they stood in the text before."""
    tail = ids[-ngram:]
    for start in range(len(ids) - ngram - 1, -1, -1):
        if ids[start : start + ngram] == tail:
            return ids[start + ngram : start + ngram + count]
    return []


def generate(runner: ModelRunner, prompt: list[int], length: int, drafts: int = 4) -> tuple[list[int], int]:
    """Return the text and how many forward passes it took."""
    cache, ids, passes = runner.cache, list(prompt), 1
    info = cache.allocate(1, ids)
    plan = cache.plan([1])
    logits = runner.forward(plan, np.array(ids[info.num_cached_tokens :]), np.array([plan.total_tokens - 1]))
    cache.commit(plan)
    ids.append(int(logits.argmax(-1)[0]))
    while len(ids) < len(prompt) + length:
        proposed = [ids[-1], *look_up(ids, min(drafts, len(prompt) + length - len(ids) - 1))]
        plan = cache.append_batch([1], [proposed])
        chosen = runner.forward(plan, np.array(proposed), np.arange(len(proposed))).argmax(-1).tolist()
        right = 1  # tokens of the proposal that greedy decoding would have written, the first one included
        while right < len(proposed) and proposed[right] == chosen[right - 1]:
            right += 1
        accepted = len(ids) - 1 + right
        cache.commit(plan, upto=[accepted])  # what was wrong is never findable
        cache.truncate(1, accepted)
        ids += chosen[:right]
        passes += 1
    cache.free(1)
    return ids[len(prompt) :], passes


def main(runner: ModelRunner | None = None) -> tuple[list[int], int]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shipped_model_path())
    runner = runner or load_runner(shipped_model_path(), num_blocks=64, block_size=4)
    prompt = "def add(a, b):\n    return a + b\n\n\ndef sub(a, b):\n    return a - b\n\n\ndef mul(a, b):\n"
    text, passes = generate(runner, tokenizer(prompt).input_ids, length=40)
    print(tokenizer.decode(text))
    print(f"{len(text)} tokens in {passes} passes")
    return text, passes


if __name__ == "__main__":
    main()
