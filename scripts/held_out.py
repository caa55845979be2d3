"""How good the model is: its loss on files it has never seen, and what it writes."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from corpus import select
from rich.console import Console
from rich.text import Text
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

WINDOW = 1024
PROMPTS = ("def fibonacci(n):", "import os\n\nclass Reader:\n    ", 'def main():\n    """')
STYLES = {"greedy": {"do_sample": False}, "sampled": {"do_sample": True, "temperature": 0.8, "top_p": 0.95}}


def load(folder: Path) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Return tokenizer and model, in float32 so that the figures do not depend on the machine's bfloat16."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return AutoTokenizer.from_pretrained(folder), model.eval()


@torch.inference_mode()
def text_loss(
    tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, text: str, window: int = WINDOW
) -> tuple[float, int]:
    """Return the summed loss of a text in nats, and its tokens.

    The text falls into windows of ``window`` tokens, each behind a BOS of its own; every token is predicted once.
    """
    ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False))
    total = 0.0
    for piece in ids.split(window):
        inputs = torch.cat([torch.tensor([tokenizer.bos_token_id]), piece[:-1]])
        logits = model(input_ids=inputs[None], use_cache=False).logits[0]
        total += torch.nn.functional.cross_entropy(logits, piece, reduction="sum").item()
    return total, len(ids)


def evaluate(folder: Path, console: Console) -> float:
    """Print the loss on the held-out files of the library (not its tests) and return it in bits per byte."""
    tokenizer, model = load(folder)
    texts = select(held_out=True, tests=False)
    losses, counts = zip(*(text_loss(tokenizer, model, text) for text in texts), strict=True)
    nats, tokens = sum(losses), sum(counts)
    size = sum(len(text.encode()) for text in texts)
    bits = nats / size / math.log(2.0)
    console.print(f"held out: {len(texts)} files, {size:,} bytes, {tokens:,} tokens, windows of {WINDOW} tokens")
    console.print(f"loss: {nats / tokens:.4f} nats/token, {nats / size:.4f} nats/byte, {bits:.4f} bits/byte")
    return bits


@torch.inference_mode()
def show_samples(folder: Path, console: Console, seed: int = 0) -> None:
    """Print a greedy and a sampled continuation of each prompt."""
    tokenizer, model = load(folder)
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        for style, options in STYLES.items():
            torch.manual_seed(seed)
            tokens = model.generate(**inputs, max_new_tokens=96, **options)[0]
            console.rule(style)
            console.print(Text(tokenizer.decode(tokens, skip_special_tokens=True)))
