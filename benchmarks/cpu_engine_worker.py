"""One engine in a process of its own, for benchmarks/cpu_engines.py: token ids come in, greedy tokens go out.

It runs in the Python of its engine, so it needs nothing but that engine, and imports it late. It writes a line when the
libraries are imported and one when the model is loaded; from then on every line that comes in is a job.

    PYTHON cpu_engine_worker.py ENGINE MODEL DTYPE THREADS OPTIONS
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any, Protocol

Tokens = list[int]


class Engine(Protocol):
    """What a job needs of an engine."""

    facts: dict[str, int]

    def generate(self, prompts: list[Tokens], count: int) -> list[Tokens]:
        """Return so many new tokens for each prompt, greedily and past any end of text."""


class Pagedkv:
    """Our engine."""

    def __init__(self, threads: int) -> None:
        import torch
        import transformers.modeling_utils  # noqa: F401  # not ours, and in memory before anything of the model is

        from pagedkv.engine import LLM, SamplingParams

        torch.set_num_threads(threads)
        self._make, self._params = LLM, SamplingParams

    def load(self, model: str, dtype: str, options: dict[str, Any]) -> None:
        self._llm = self._make(model, **options)
        self.facts = {"pool": self._llm.core.runner.bytes_per_block * options["num_blocks"]}

    def generate(self, prompts: list[Tokens], count: int) -> list[Tokens]:
        params = self._params(max_tokens=count, temperature=0.0, ignore_eos=True)
        return [list(output.outputs[0].token_ids) for output in self._llm.generate(prompts, params)]


class Transformers:
    """``model.generate()``, one prompt after the other."""

    facts: dict[str, int] = {}

    def __init__(self, threads: int) -> None:
        import torch
        import transformers.modeling_utils  # noqa: F401

        torch.set_num_threads(threads)
        self._torch = torch

    def load(self, model: str, dtype: str, options: dict[str, Any]) -> None:
        self._model = _loaded(model, dtype)
        self._model.generation_config.eos_token_id = None  # or a text ends early

    def generate(self, prompts: list[Tokens], count: int) -> list[Tokens]:
        return [self._one(prompt, count) for prompt in prompts]

    def _one(self, prompt: Tokens, count: int) -> Tokens:
        ids = self._torch.tensor([prompt])
        mask = self._torch.ones_like(ids)
        done = self._model.generate(ids, attention_mask=mask, max_new_tokens=count, do_sample=False, pad_token_id=0)
        tokens: Tokens = done[0, len(prompt) :].tolist()
        return tokens


def _loaded(model: str, dtype: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()


class Vllm:
    """vLLM; ``OMP_NUM_THREADS`` tells it the number of threads."""

    facts: dict[str, int] = {}

    def __init__(self, threads: int) -> None:
        from vllm import LLM, SamplingParams

        self._make, self._params = LLM, SamplingParams

    def load(self, model: str, dtype: str, options: dict[str, Any]) -> None:
        self._llm = self._make(model, **options)

    def generate(self, prompts: list[Tokens], count: int) -> list[Tokens]:
        params = self._params(max_tokens=count, temperature=0.0, ignore_eos=True)
        requests = [{"prompt_token_ids": prompt} for prompt in prompts]
        return [list(output.outputs[0].token_ids) for output in self._llm.generate(requests, params, use_tqdm=False)]


class Openvino:
    """OpenVINO GenAI with continuous batching and prefix caching.

    Options are properties of its CPU plugin, and ``cache_size`` in GB and ``max_num_batched_tokens`` of its scheduler.
    """

    facts: dict[str, int] = {}

    def __init__(self, threads: int) -> None:
        import numpy
        import openvino
        import openvino_genai

        self._numpy, self._openvino, self._genai, self._threads = numpy, openvino, openvino_genai, threads

    def load(self, model: str, dtype: str, options: dict[str, Any]) -> None:
        scheduler = self._genai.SchedulerConfig()
        scheduler.enable_prefix_caching = True
        properties = {"INFERENCE_NUM_THREADS": self._threads, **options}
        for name, usual in (("cache_size", 1), ("max_num_batched_tokens", 256)):
            setattr(scheduler, name, properties.pop(name, usual))
        self._pipeline = self._genai.ContinuousBatchingPipeline(model, scheduler, "CPU", properties)

    def generate(self, prompts: list[Tokens], count: int) -> list[Tokens]:
        config = self._genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = count
        config.ignore_eos, config.do_sample = True, False
        inputs = [self._openvino.Tensor(self._numpy.array([prompt], dtype=self._numpy.int64)) for prompt in prompts]
        done = self._pipeline.generate(inputs, [config] * len(prompts))
        return [[int(token) for token in result.m_generation_ids[0]] for result in done]


ENGINES = {"pagedkv": Pagedkv, "transformers": Transformers, "vllm": Vllm, "openvino": Openvino}


def made(name: str, threads: int) -> Any:
    """Import an engine."""
    if name == "llamacpp":
        from cpu_engine_llamacpp import LlamaCpp

        return LlamaCpp(threads)
    return ENGINES[name](threads)


def done(engine: Engine, job: dict[str, Any]) -> dict[str, Any]:
    """Do a job; an error is an answer, too."""
    begun = time.perf_counter()
    try:
        tokens = engine.generate(job["prompts"], job["count"])
    except Exception as error:
        return {"error": repr(error)}
    return {"seconds": time.perf_counter() - begun, "tokens": tokens}


def main() -> None:
    """Answer every line."""
    name, model, dtype, threads, options = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever an engine prints

    def answer(facts: dict[str, Any]) -> None:
        print(json.dumps(facts), file=answers, flush=True)

    engine = made(name, int(threads))
    answer({})
    sys.stdin.readline()
    begun = time.perf_counter()
    engine.load(model, dtype, json.loads(options))
    answer({"seconds": time.perf_counter() - begun, **engine.facts})
    for line in sys.stdin:
        answer(done(engine, json.loads(line)))


if __name__ == "__main__":
    main()
