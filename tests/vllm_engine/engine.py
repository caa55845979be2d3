"""vLLM in a process of its own, told what to do line by line: run by the interpreter that has vLLM.

python engine.py '{"model": …}', the arguments of vllm.LLM. Requests are lines of JSON on stdin, and answers on stdout.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM prints is not an answer
    from vllm import LLM, SamplingParams

    def say(**answer: Any) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    began = time.perf_counter()
    llm = LLM(**json.loads(sys.argv[1]))
    say(seconds=time.perf_counter() - began)
    for line in sys.stdin:
        asked = json.loads(line)
        if asked.get("reset"):
            say(done=llm.reset_prefix_cache(reset_connector=asked["reset"] == "all"))
            continue
        params = SamplingParams(temperature=0, max_tokens=asked["max_tokens"], ignore_eos=True, detokenize=False)
        salt = {"cache_salt": asked["salt"]} if asked.get("salt") else {}
        prompts = [{"prompt_token_ids": ids, **salt} for ids in asked["prompts"]]
        began = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        say(
            seconds=time.perf_counter() - began,
            tokens=[list(output.outputs[0].token_ids) for output in outputs],
            cached=[output.num_cached_tokens for output in outputs],
        )


if __name__ == "__main__":
    main()
