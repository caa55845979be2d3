"""vLLM as a process that tests and benchmarks talk to."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
# Two threads, all cores, little memory, nothing fetched: by default it binds one core and keeps the other for itself.
SETTINGS = {
    "OMP_NUM_THREADS": "2",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    "KMP_BLOCKTIME": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def interpreter() -> str:
    """Return the Python that has vLLM."""
    found = os.environ.get("PAGEDKV_VLLM_PYTHON") or str(ROOT / "build" / "vllm" / "bin" / "python")
    if not Path(found).exists():
        sys.exit(f"{found} is not there: `make test-vllm` makes it, or PAGEDKV_VLLM_PYTHON names one that has vLLM")
    return found


def preloaded(python: str) -> str:
    """Return the libraries that vLLM wants to be loaded first, as far as they are there."""
    places = [*Path("/usr/lib").glob("*/libtcmalloc_minimal.so.4"), *Path(python).parents[1].rglob("libiomp5.so")]
    return ":".join(str(place) for place in places[:2])


class VllmProcess:
    """One `vllm.LLM` that runs, and is asked.

    Parameters
    ----------
    model, log : Path
    connector : mapping, optional
        The ``kv_connector_extra_config``; None for vLLM alone.
    options
        Of `vllm.LLM`.
    """

    def __init__(self, model: Path, log: Path, connector: dict[str, Any] | None = None, **options: Any) -> None:
        python = interpreter()
        settings = {
            "model": str(model),
            "dtype": "float32",
            "max_model_len": 4096,
            "max_num_seqs": 16,
            "block_size": 32,
            "skip_tokenizer_init": True,
            "enable_prefix_caching": True,
            **options,
        }
        if connector is not None:
            settings["kv_transfer_config"] = {
                "kv_connector": "PagedKvConnector",
                "kv_connector_module_path": "pagedkv.vllm",
                "kv_role": "kv_both",
                "kv_connector_extra_config": connector,
            }
        path = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))
        environment = os.environ | SETTINGS | {"PYTHONPATH": path, "LD_PRELOAD": preloaded(python)}
        self.log = log
        with open(log, "ab") as out:
            self._process = subprocess.Popen(
                [python, str(Path(__file__).with_name("engine.py")), json.dumps(settings)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=out,
                env=environment,
                text=True,
                start_new_session=True,
            )
        self.seconds_to_start = self._answer()["seconds"]

    def ask(self, *prompts: list[int], max_tokens: int = 12, salt: str | None = None) -> dict[str, Any]:
        """Return the seconds, and of each prompt the tokens and how many of it were cached."""
        return self._tell(prompts=prompts, max_tokens=max_tokens, salt=salt)

    def empty_pool(self, wait: float = 1.0) -> None:
        """Let vLLM forget what its own pool has, once what is on its way to the tiers had time to arrive."""
        time.sleep(wait)
        self._tell(reset="pool")

    def clear(self) -> None:
        """Let vLLM and the connector forget everything."""
        self._tell(reset="all")

    def close(self) -> None:
        """End it as a user does."""
        if self._process.poll() is None and self._process.stdin is not None:
            self._process.stdin.close()
            self._process.wait(timeout=120)
        self.kill()

    def kill(self) -> None:
        """End all its processes at once, as the machine would."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(timeout=60)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()

    def _tell(self, **what: Any) -> dict[str, Any]:
        if self._process.stdin is None:
            raise RuntimeError("it was not started")
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline() if self._process.stdout is not None else ""
        if not line:
            self.kill()
            raise RuntimeError("vLLM has ended:\n" + self.log.read_text(errors="replace")[-4000:])
        answer: dict[str, Any] = json.loads(line)
        return answer
