"""The ways that benchmarks/engine.py compares, each in a process of its own that runs whenever it is asked."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

NUM_PROMPTS, SHORTEST, LONGEST, SHARED, NEW_TOKENS = 32, 16, 512, 128, 64
VOCAB, LAYERS, KV_HEADS, HEAD_SIZE = 8192, 8, 4, 64
BYTES_PER_TOKEN = 2 * LAYERS * KV_HEADS * HEAD_SIZE * 4
BLOCKS = 800
ENGINE, PLAIN, ONE, PADDED = "pagedkv", "pagedkv, products by torch", "one by one", "padded batch"

Run = Callable[[], list[list[int]]]


def made_model() -> Any:
    """Return the model, the same in every process."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers import logging as notices

    notices.set_verbosity_error()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=LAYERS,
        num_attention_heads=512 // HEAD_SIZE,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def made_prompts() -> list[list[int]]:
    """Return the prompts; those of at least ``SHARED`` tokens begin alike."""
    import numpy as np

    rng = np.random.default_rng(0)
    prefix = rng.integers(1, VOCAB, SHARED)
    lengths = rng.permutation(np.linspace(SHORTEST, LONGEST, NUM_PROMPTS).astype(int))
    texts = [rng.integers(1, VOCAB, length) for length in lengths]
    for text in texts:
        if len(text) >= SHARED:
            text[:SHARED] = prefix
    return [text.tolist() for text in texts]


def greedy(**more: Any) -> Any:
    """Return transformers' settings for the new tokens."""
    from transformers import GenerationConfig

    return GenerationConfig(do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=0, **more)


def one_by_one(model: Any, prompts: list[list[int]]) -> Run:
    """Return ``model.generate()`` of one prompt after the other."""
    import torch

    config = greedy()
    return lambda: [model.generate(torch.tensor([p]), generation_config=config)[0, len(p) :].tolist() for p in prompts]


def padded_batch(model: Any, prompts: list[list[int]]) -> Run:
    """Return ``model.generate()`` of all prompts at once, padded on the left."""
    import torch

    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    config = greedy()
    return lambda: model.generate(ids, attention_mask=mask, generation_config=config)[:, longest:].tolist()


def own_batching(model: Any, prompts: list[list[int]], **settings: Any) -> Run:
    """Return transformers' continuous batching."""
    from transformers import ContinuousBatchingConfig

    config, batching = greedy(eos_token_id=-1), ContinuousBatchingConfig(**settings)

    def run() -> list[list[int]]:
        done = model.generate_batch(prompts, generation_config=config, continuous_batching_config=batching)
        return [output.generated_tokens for output in done.values()]

    return run


class Engine:
    """Our engine; it starts every run with an empty prefix cache."""

    def __init__(self, model: Any, prompts: list[list[int]], fast_products: bool = True) -> None:
        from pagedkv.engine import LLM, SamplingParams

        self.llm = LLM(model, num_blocks=BLOCKS)
        self.prompts, self.params = prompts, SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True)
        if not fast_products:
            self.llm.core.runner._linears._forwards.clear()

    def __call__(self) -> list[list[int]]:
        self.llm.core.clear_prefix_cache()
        return [list(output.outputs[0].token_ids) for output in self.llm.generate(self.prompts, self.params)]

    def facts(self) -> dict[str, float]:
        """Return where the time of all steps went, and the size of the pool."""
        stats = self.llm.core.stats()
        cached = stats.prefix_hits / stats.prefix_queries
        shares = {
            name: 100 * getattr(stats, f"{name}_seconds") / stats.busy_seconds for name in ("bookkeeping", "sampling")
        }
        per_step = 1e3 * stats.bookkeeping_seconds / stats.steps
        return {**shares, "ms": per_step, "cached": cached, "pool": self.llm.core.runner.bytes_per_block * BLOCKS}


def peak_bytes() -> int:
    """Return the most memory that this process has had at a time."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def made_way(name: str, model: Any, settings: dict[str, Any]) -> Run:
    """Return one way over a model."""
    prompts = made_prompts()
    if name in (ENGINE, PLAIN):
        return Engine(model, prompts, fast_products=name == ENGINE)
    if name == ONE:
        return one_by_one(model, prompts)
    if name == PADDED:
        return padded_batch(model, prompts)
    return own_batching(model, prompts, **settings)


def work(name: str, threads: int, settings: dict[str, Any]) -> None:
    """Answer each line that comes in with one run."""
    import torch

    torch.set_num_threads(threads)
    answers, sys.stdout = sys.stdout, sys.stderr
    model = made_model()
    bare = peak_bytes()
    run = made_way(name, model, settings)
    if isinstance(run, Engine):
        run()  # the kernels are read from disk
    for _ in sys.stdin:
        waited, begun = time.perf_counter(), time.process_time()
        tokens = run()
        answer = {"seconds": time.process_time() - begun, "waited": time.perf_counter() - waited, "tokens": tokens}
        answer |= {"growth": peak_bytes() - bare, "facts": run.facts() if isinstance(run, Engine) else {}}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    work(sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3]))
