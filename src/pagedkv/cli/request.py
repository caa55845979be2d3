"""What the user asked ``pagedkv generate`` for, checked before anything heavy is loaded."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path

from pagedkv.cli.terminal import Failure
from pagedkv.models import shipped_model_path

__all__ = ["KV_DTYPES", "GenerateRequest", "require_kv_dtype"]

KV_DTYPES = ("float32", "bfloat16", "float16", "int8", "fp8")

_MAX_NEW_TOKENS = 128
_TEMPERATURE = 0.7
_SINK_TOKENS = 4
_WINDOW_TOKENS = 508
_MAX_COUNT = 2**31 - 2


@dataclass(frozen=True)
class GenerateRequest:
    """The options of ``pagedkv generate``; None stands for an option that was not given.

    Raises
    ------
    Failure
        An option is out of range or does not go with another one; the text names it.
    """

    prompt: str
    model: str | None = None
    samples: int = 1
    beams: int = 1
    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float = 1.0
    seed: int = 0
    device: str = "cpu"
    kv_dtype: str | None = None
    block_size: int = 16
    num_blocks: int | None = None
    strategy: str = "lru"
    stream: bool = False
    sink_tokens: int | None = None
    window_tokens: int | None = None
    echo: bool = True
    show_blocks: bool = False
    json: bool = False

    def __post_init__(self) -> None:
        self._check_ranges()
        self._check_pairs()

    def _check_ranges(self) -> None:
        require_kv_dtype(self.kv_dtype)
        _require_count("-n", self.samples, 1)
        _require_count("--beams", self.beams, 1)
        _require_count("--max-new-tokens", self.max_new_tokens, 1)
        _require_count("--seed", self.seed, 0, 2**63 - 1)
        _require_count("--block-size", self.block_size, 1)
        _require_count("--num-blocks", self.num_blocks, 1)
        _require_count("--sink-tokens", self.sink_tokens, 0)
        _require_count("--window-tokens", self.window_tokens, 1)
        if self.temperature is not None and not 0 <= self.temperature < math.inf:
            raise Failure(f"--temperature expects a number of at least 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise Failure(f"--top-p expects a number above 0 and at most 1, got {self.top_p}")

    def _check_pairs(self) -> None:
        if self.beams > 1 and self.samples > 1:
            raise Failure("-n and --beams do not go together: samples are drawn at random, beams are not")
        if self.beams > 1 and self.temperature:
            raise Failure("--temperature and --beams do not go together: beam search does not sample")
        if self.samples > 1 and self.temperature == 0:
            raise Failure("-n needs a --temperature above 0: at 0 all samples are the same")
        if self.stream and (self.samples > 1 or self.beams > 1):
            raise Failure(f"--stream writes one text: it does not go with {'-n' if self.samples > 1 else '--beams'}")
        for name, value in (("--sink-tokens", self.sink_tokens), ("--window-tokens", self.window_tokens)):
            if value is not None and not self.stream:
                raise Failure(f"{name} goes with --stream only")

    @property
    def model_path(self) -> Path:
        """The folder of the model."""
        return shipped_model_path() if self.model is None else Path(self.model).expanduser()

    @property
    def rows(self) -> int:
        """Sequences that are written side by side."""
        return max(self.samples, self.beams)

    @property
    def token_limit(self) -> int | None:
        """New tokens of a sample; None without end."""
        if self.max_new_tokens is None and not self.stream:
            return _MAX_NEW_TOKENS
        return self.max_new_tokens

    @property
    def heat(self) -> float:
        """The temperature; 0 for the likeliest token."""
        if self.temperature is not None:
            return self.temperature
        return 0.0 if self.beams > 1 else _TEMPERATURE

    @property
    def sinks(self) -> int:
        """First tokens that ``--stream`` keeps."""
        return _SINK_TOKENS if self.sink_tokens is None else self.sink_tokens

    @property
    def window(self) -> int:
        """Last tokens that ``--stream`` keeps."""
        return _WINDOW_TOKENS if self.window_tokens is None else self.window_tokens

    def read_prompt(self) -> str:
        """Return the prompt, from stdin if it is ``-``.

        Raises
        ------
        Failure
            It is empty, or no UTF-8.
        """
        try:
            text = sys.stdin.read() if self.prompt == "-" else self.prompt
            text.encode()
        except UnicodeError:
            raise Failure("the prompt is not valid UTF-8") from None
        if not text:
            raise Failure("the prompt is empty" + (": nothing came from stdin" if self.prompt == "-" else ""))
        return text

    def blocks_for(self, num_tokens: int) -> int:
        """Return how many blocks a sequence of so many tokens takes."""
        return -(-num_tokens // self.block_size)

    def pool_size(self, prompt_tokens: int) -> int:
        """Return ``--num-blocks``, or what this call can need at most.

        Raises
        ------
        Failure
            The pool does not even hold the prompt.
        """
        if self.num_blocks is None:
            return self._largest_need(prompt_tokens)
        held = min(prompt_tokens, self.sinks + self.window) if self.stream else prompt_tokens
        needed = self.blocks_for(held)
        if needed > self.num_blocks:
            raise Failure(
                f"the prompt of {prompt_tokens} tokens takes {needed} blocks of {self.block_size} tokens, the pool has "
                f"{self.num_blocks}: raise --num-blocks to {needed + 1} or more"
            )
        return self.num_blocks

    def _largest_need(self, prompt_tokens: int) -> int:
        if self.token_limit is None or self.stream:
            held = max(prompt_tokens, self.sinks + self.window)
            return self.blocks_for(held) + 2  # the hole has two edges, each inside of a block
        per_row = self.blocks_for(prompt_tokens + self.token_limit)
        spare = 2 if self.beams > 1 else 1  # beams are forked anew before the old ones are freed
        return -(-per_row * self.rows * spare // 16) * 16


def require_kv_dtype(name: str | None) -> None:
    """Raise ``Failure`` where ``--kv-dtype`` was given and cannot be."""
    if name is not None and name not in KV_DTYPES:
        raise Failure(f"--kv-dtype expects {', '.join(KV_DTYPES)}, got {name}")


def _require_count(name: str, value: int | None, low: int, high: int = _MAX_COUNT) -> None:
    if value is not None and not low <= value <= high:
        raise Failure(f"{name} expects an integer in {low} … {high}, got {value}")
