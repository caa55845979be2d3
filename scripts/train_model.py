"""Train the small language model that pagedkv ships.

    python scripts/train_model.py --out DIR --minutes 60
    python scripts/train_model.py --evaluate            # the shipped model, on text it has never seen

A Llama of 3.8 million parameters learns the source text of Python's standard library, later on together with its
tests (see ``corpus.py``), and is written as a Hugging Face folder. Needs pagedkv's ``hf`` extra; a CPU is enough.
The learning rate follows the share of the time that is gone, so any budget gives a finished model; ``--steps``
counts steps instead, which repeats a run exactly.
"""

from __future__ import annotations

import argparse
import math
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from corpus import BOS, EOS, select, train_tokenizer
from held_out import evaluate, show_samples
from rich.console import Console
from rich.progress import Progress
from token_loss import next_token_loss
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from pagedkv.models import shipped_model_path

VOCAB_SIZE = 4096
MAX_POSITIONS = 4096
TOKENS_PER_STEP = 4096
PEAK_LEARNING_RATE = 2e-3
FINAL_LEARNING_RATE = 5e-5
WARMUP_SHARE = 0.02
#: Share of windows that open at the first token of a file; the others open anywhere.
FILE_START_SHARE = 0.15
#: (from this share of the run on, share of windows from the library's tests). They come in when the library has
#: been read a few times and begins to be learned by heart.
TEST_SHARES = ((0.0, 0.0), (0.5, 0.5))
#: (from this share of the run on, window length): short windows are cheap, long ones teach long context.
WINDOW_LENGTHS = ((0.0, 256), (0.55, 512), (0.8, 2048))
CHECKPOINT_SECONDS = 240.0

T = TypeVar("T")

console = Console(soft_wrap=True)


@dataclass
class Budget:
    """How long a run lasts: minutes of wall time, or a number of steps."""

    minutes: float
    steps: int | None

    def share(self, step: int, seconds: float) -> float:
        """Return how much of the run is over, 0 to 1."""
        done = step / self.steps if self.steps else seconds / (60.0 * self.minutes)
        return min(done, 1.0)


def build_model(bos: int, eos: int) -> LlamaForCausalLM:
    """Return the untrained model: 4 layers, 8 query heads over 4 key-value heads of 32."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=bos,
        eos_token_id=eos,
        pad_token_id=eos,
    )
    return LlamaForCausalLM(config)


def build_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Learn the vocabulary and wrap it for transformers."""
    return PreTrainedTokenizerFast(
        tokenizer_object=train_tokenizer(texts, VOCAB_SIZE),
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        clean_up_tokenization_spaces=False,
    )


class Stream:
    """Files joined to one row of tokens, ``BOS file EOS BOS file EOS …``, in random order.

    Parameters
    ----------
    rows : list of list of int
        The tokens of each file, BOS in front.
    eos : int
    seed : int
    """

    def __init__(self, rows: list[list[int]], eos: int, seed: int) -> None:
        order = np.random.default_rng(seed).permutation(len(rows))
        files = [np.array([*rows[i], eos], dtype=np.int64) for i in order]
        ends = np.cumsum([len(file) for file in files])
        self.tokens = np.concatenate(files)
        self.starts = np.concatenate([[0], ends[:-1]]) + 1

    def draw(self, rng: np.random.Generator, length: int) -> np.ndarray:
        """Return a random stretch, int64[length]; now and then it opens at the first token of a file."""
        last = len(self.tokens) - length
        at_file = rng.random() < FILE_START_SHARE
        start = rng.choice(self.starts[self.starts <= last]) if at_file else rng.integers(last + 1)
        return self.tokens[start : start + length]


class Windows:
    """Training windows of the library and its tests, drawn at random; a step always draws the same ones."""

    def __init__(self, library: Stream, tests: Stream, bos: int, seed: int) -> None:
        self.library, self.tests, self.bos, self.seed = library, tests, bos, seed

    def batch(self, step: int, share: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Return inputs and targets, int64[windows, length]; every window begins with BOS, as a prompt does."""
        rng = np.random.default_rng((self.seed, step))
        length, test_share = at(share, WINDOW_LENGTHS), at(share, TEST_SHARES)
        count = TOKENS_PER_STEP // length
        rows = [(self.tests if rng.random() < test_share else self.library).draw(rng, length) for _ in range(count)]
        targets = np.stack(rows)
        inputs = np.concatenate([np.full((count, 1), self.bos), targets[:, :-1]], axis=1)
        return torch.from_numpy(inputs), torch.from_numpy(targets)


def at(share: float, steps: Sequence[tuple[float, T]]) -> T:
    """Return the value of the last step that this share of the run has reached."""
    return [value for start, value in steps if share >= start][-1]


def learning_rate(share: float) -> float:
    """Linear warm-up, then half a cosine down."""
    if share < WARMUP_SHARE:
        return PEAK_LEARNING_RATE * (share / WARMUP_SHARE + 0.01)
    turn = (share - WARMUP_SHARE) / (1.0 - WARMUP_SHARE)
    return FINAL_LEARNING_RATE + (PEAK_LEARNING_RATE - FINAL_LEARNING_RATE) * 0.5 * (1.0 + math.cos(math.pi * turn))


def build_optimizer(model: LlamaForCausalLM) -> torch.optim.AdamW:
    """AdamW; only matrices decay."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=PEAK_LEARNING_RATE, betas=(0.9, 0.95), fused=True)


def export(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the Hugging Face folder, weights in bfloat16."""
    half = LlamaForCausalLM(model.config).to(torch.bfloat16)
    half.load_state_dict(model.state_dict())
    config = model.config
    half.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    half.save_pretrained(out)
    tokenizer.save_pretrained(out)


def train(out: Path, checkpoint: Path, budget: Budget, seed: int, resume: bool) -> None:
    """Run the training loop; a checkpoint every few minutes also writes a usable folder to ``out``."""
    torch.manual_seed(seed)
    library, tests = (select(held_out=False, tests=tests) for tests in (False, True))
    tokenizer = build_tokenizer(library)
    model = build_model(tokenizer.bos_token_id, tokenizer.eos_token_id)
    optimizer = build_optimizer(model)
    streams = [Stream(tokenizer(texts)["input_ids"], tokenizer.eos_token_id, seed) for texts in (library, tests)]
    windows = Windows(*streams, tokenizer.bos_token_id, seed)
    console.print(f"{model.num_parameters():,} parameters; {len(library)} files, {len(streams[0].tokens):,} tokens")
    console.print(f"and {len(tests)} files of tests, {len(streams[1].tokens):,} tokens")
    step, seconds = 0, 0.0
    if resume:
        state = torch.load(checkpoint)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, seconds = state["step"], state["seconds"]
        console.print(f"resumed at step {step}")

    def save() -> None:
        partial = checkpoint.with_suffix(".partial")
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "seconds": seconds}
        torch.save(state, partial)
        os.replace(partial, checkpoint)
        export(model, tokenizer, out)

    tick, last_save, losses = time.monotonic(), seconds, []
    with Progress(console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("training", total=1.0)
        while (share := budget.share(step, seconds)) < 1.0:
            losses.append(train_step(model, optimizer, windows, step, share))
            step += 1
            now = time.monotonic()
            seconds, tick = seconds + now - tick, now
            progress.update(task, completed=share, description=f"step {step} loss {losses[-1]:.3f}")
            if step % 100 == 0:
                pace = f"{seconds:6.0f} s, {step * TOKENS_PER_STEP / seconds:5.0f} tokens/s"
                console.print(f"step {step:5d} {share:4.0%} loss {np.mean(losses[-100:]):.4f} {pace}")
            if seconds - last_save > CHECKPOINT_SECONDS:
                save()
                last_save = seconds
    save()
    console.print(f"{step} steps, {step * TOKENS_PER_STEP:,} tokens in {seconds / 60:.1f} minutes; written to {out}")


def train_step(
    model: LlamaForCausalLM, optimizer: torch.optim.AdamW, windows: Windows, step: int, share: float
) -> float:
    """Take one optimizer step and return its loss in nats per token."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(share)
    inputs, targets = windows.batch(step, share)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.model(input_ids=inputs, use_cache=False).last_hidden_state
    loss = next_token_loss(hidden.flatten(0, 1), model.lm_head.weight, targets.flatten())
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder to write the model to, or to evaluate")
    parser.add_argument("--minutes", type=float, default=60.0, help="wall time to train for (default 60)")
    parser.add_argument("--steps", type=int, help="train for this many steps instead")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the first weights and the drawing of windows (default 0)"
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument(
        "--checkpoint", type=Path, default=Path(tempfile.gettempdir()) / "pagedkv-train.pt", help="where to save state"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    parser.add_argument("--evaluate", action="store_true", help="only measure the held-out loss and show samples")
    args = parser.parse_args()
    disable_progress_bar()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.evaluate:
        args.out = args.out or shipped_model_path()
    else:
        if args.out is None:
            parser.error("--out says where the model goes")
        if not args.minutes > 0.0 or (args.steps is not None and args.steps < 1):
            parser.error("--minutes and --steps must be positive")
        if args.resume and not args.checkpoint.is_file():
            parser.error(f"--resume: there is no checkpoint at {args.checkpoint}")
        train(args.out, args.checkpoint, Budget(args.minutes, args.steps), args.seed, args.resume)
    evaluate(args.out, console)
    show_samples(args.out, console)


if __name__ == "__main__":
    main()
