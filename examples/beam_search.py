"""Beam search by forks: beams share the blocks of their common past, and only what differs is copied."""

from __future__ import annotations

import numpy as np

from pagedkv.hf import load_runner
from pagedkv.hf.runner import ModelRunner
from pagedkv.models import shipped_model_path


def beam_search(runner: ModelRunner, prompt: list[int], width: int, length: int) -> list[tuple[float, list[int]]]:
    """Return the `width` best texts of `length` tokens with their log probabilities, the best first."""
    cache = runner.cache
    cache.allocate(0, prompt)
    plan = cache.plan([0])
    beams, scores, next_id = [0], np.zeros(1), 1
    texts: list[list[int]] = [[]]
    ids = np.array(prompt[len(prompt) - plan.total_tokens :])
    for step in range(length):
        last = plan.cu_seqlens_q[1:].astype(np.int64) - 1
        log_probs = runner.forward(plan, ids, last).log_softmax(-1).numpy()
        cache.commit(plan)
        totals = scores[:, None] + log_probs  # [beams, vocab]
        best = np.argsort(-totals, axis=None, kind="stable")[:width]
        parents, tokens = np.unravel_index(best, totals.shape)
        scores, texts = totals[parents, tokens], [[*texts[p], int(t)] for p, t in zip(parents, tokens, strict=True)]
        if step == length - 1:
            break
        following = list(range(next_id, next_id + width))
        next_id += width
        for parent, child in zip(parents.tolist(), following, strict=True):
            cache.fork(beams[parent], child)  # no block is copied yet
        for seq_id in beams:
            cache.free(seq_id)
        beams, ids = following, tokens
        plan = cache.append_batch(beams, ids)  # who writes into a shared block gets a copy of it
    for seq_id in beams:
        cache.free(seq_id)
    return list(zip(scores.tolist(), texts, strict=True))


def main(runner: ModelRunner | None = None) -> list[tuple[float, list[int]]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shipped_model_path())
    runner = runner or load_runner(shipped_model_path(), num_blocks=256, block_size=4)
    found = beam_search(runner, tokenizer("def mean(values):\n    return").input_ids, width=4, length=12)
    for score, text in found:
        print(f"{score:8.3f}  {tokenizer.decode(text)!r}")
    stats = runner.cache.stats
    print(f"{stats.total_forks} forks copied {stats.blocks_copied} blocks")
    return found


if __name__ == "__main__":
    main()
