"""Perplexity of a text that is streamed through sinks and window, beside what it could have been.

The text is held-out source of Python's standard library (scripts/corpus.py), which the shipped model has never seen,
file behind file. Four ways to predict each next token:

streaming    sinks + window in blocks, rotary positions inside the cache (pagedkv.hf.streaming)
recomputed   the same visible tokens, run through the model from scratch as a text of their own; every few positions
window only  the same session without sinks
dense        all tokens so far, stock transformers

All four are compared at the same positions: those where something was dropped already and the recomputed one exists.

    python benchmarks/streaming.py [--tokens N] [--every K] [--json FILE] [--plot FILE]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from pagedkv.hf.streaming import StreamingSession
from pagedkv.models import shipped_model_path

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
from corpus import standard_library  # noqa: E402

WAYS = ("streaming", "recomputed", "window only", "dense")
DENSE_CHUNK = 256
BINS = 20

Losses = npt.NDArray[np.float64]
Row = dict[str, Any]


@dataclass
class Study:
    """Losses in nats of the token behind each position; NaN where one was not taken."""

    losses: dict[str, Losses]
    seconds: dict[str, float] = field(default_factory=dict)

    def at(self, positions: npt.NDArray[np.int64], way: str) -> float:
        return float(np.exp(self.losses[way][positions].mean()))


def held_out_ids(tokenizer: Any, count: int) -> list[int]:
    """The first tokens of the held-out files of the library, as training joins files: ``BOS file EOS BOS file …``."""
    ids: list[int] = []
    for document in standard_library():
        if document.held_out and not document.is_test:
            ids += [*tokenizer(document.text)["input_ids"], tokenizer.eos_token_id]
            if len(ids) >= count:
                return ids[:count]
    raise SystemExit(f"the held-out files have only {len(ids):,} tokens, asked for {count:,}")


def loss(logits: Tensor, targets: Tensor) -> Losses:
    values: Losses = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none").double().numpy()
    return values


def stream(session: StreamingSession, ids: Tensor, full: int) -> Iterator[tuple[slice, Tensor]]:
    """Feed all but the last token and yield logits, first of what fits at once, then of token after token."""
    yield slice(0, full), session.feed(ids[:full], all_logits=True)
    for at in range(full, len(ids) - 1):
        yield slice(at, at + 1), session.feed(ids[at : at + 1])[None]


@torch.inference_mode()
def recompute(model: PreTrainedModel, ids: Tensor, at: int, sinks: int, window: int) -> Tensor:
    """Logits behind position `at` for sinks, window and the token itself as a fresh text."""
    visible = torch.cat((ids[:sinks], ids[at - window : at + 1]))
    logits: Tensor = model(visible[None], use_cache=False, logits_to_keep=1).logits[0]
    return logits


@torch.inference_mode()
def dense_losses(model: PreTrainedModel, ids: Tensor) -> Losses:
    cache, losses = DynamicCache(config=model.config), []
    inputs, targets = ids[:-1], ids[1:]
    for chunk, target in zip(inputs.split(DENSE_CHUNK), targets.split(DENSE_CHUNK), strict=True):
        losses.append(loss(model(chunk[None], past_key_values=cache).logits[0], target))
    return np.concatenate(losses)


def run(
    model: PreTrainedModel, ids: Tensor, sinks: int, window: int, every: int, rebase_at: int | None
) -> tuple[Study, StreamingSession]:
    full = sinks + window
    study = Study({way: np.full(len(ids) - 1, np.nan) for way in WAYS})
    spent = dict.fromkeys(WAYS, 0.0)
    sessions = {
        "streaming": StreamingSession(model, sinks, window, rebase_at=rebase_at),
        # As many tokens, so that only their choice differs.
        "window only": StreamingSession(model, 0, sinks + window, rebase_at=rebase_at),
    }
    streams = {way: stream(session, ids, full) for way, session in sessions.items()}
    # Side by side, and in CPU time, so that a busy machine disturbs the ratios little.
    at = 0
    while at < len(ids) - 1:
        for way, steps in streams.items():
            begin = time.process_time()
            where, logits = next(steps)
            spent[way] += (time.process_time() - begin) if where.start else 0.0
            study.losses[way][where] = loss(logits, ids[where.start + 1 : where.stop + 1])
        at = where.stop
        if where.start > full and where.start % every == 0:
            begin = time.process_time()
            logits = recompute(model, ids, where.start, sinks, window)
            spent["recomputed"] += time.process_time() - begin
            study.losses["recomputed"][where] = loss(logits, ids[where.start + 1 : where.stop + 1])
    begin = time.process_time()
    study.losses["dense"] = dense_losses(model, ids)
    spent["dense"] = time.process_time() - begin
    for session in sessions.values():
        session.cache.check()
    steps = len(ids) - 1 - full
    study.seconds = {"streaming": spent["streaming"] / steps, "recomputed": spent["recomputed"] / count_taken(study)}
    return study, sessions["streaming"]


def compared(study: Study) -> npt.NDArray[np.int64]:
    return np.flatnonzero(~np.isnan(study.losses["recomputed"]))


def count_taken(study: Study) -> int:
    return len(compared(study))


def rows_of(study: Study, session: StreamingSession, sinks: int, window: int) -> list[Row]:
    positions = compared(study)
    perplexity = {way: study.at(positions, way) for way in WAYS}
    base = perplexity["recomputed"]
    what = f"{len(study.losses['dense']):,} tokens through {sinks} + {window}, {len(positions):,} positions"

    def row(name: str, value: float, unit: str, note: str, target: str | None = None, met: bool | None = None) -> Row:
        return {"name": name, "value": round(value, 4), "unit": unit, "target": target, "met": met, "note": note}

    ratio = perplexity["streaming"] / base
    return [
        row("perplexity, recomputed", base, "", f"{what}; the yardstick"),
        row("perplexity, streaming", perplexity["streaming"], "", "sinks + window"),
        row("perplexity, window only", perplexity["window only"], "", f"{sinks + window} last tokens, no sinks"),
        row("perplexity, dense", perplexity["dense"], "", "all tokens so far, stock transformers"),
        row("streaming / recomputed", ratio, "x", "perplexity", "0.9 to 1.1", abs(ratio - 1) <= 0.1),
        row("window only / recomputed", perplexity["window only"] / base, "x", "perplexity"),
        row("dense / recomputed", perplexity["dense"] / base, "x", "perplexity"),
        row(
            "CPU time of recomputing / streaming a token",
            study.seconds["recomputed"] / study.seconds["streaming"],
            "x",
            f"streaming takes {1e3 * study.seconds['streaming']:.1f} ms of CPU a token",
        ),
        row(
            "blocks held at most",
            session.cache.stats.peak_blocks_used,
            "blocks",
            f"of {session.cache.block_size} tokens, for a text of {session.num_tokens:,}",
        ),
    ]


def draw(study: Study, path: Path, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    positions = compared(study)
    bins = np.array_split(positions, BINS)
    so_far = {
        way: losses[positions].cumsum() / np.arange(1, len(positions) + 1) for way, losses in study.losses.items()
    }
    figure, (upper, lower) = plt.subplots(2, 1, figsize=(8, 6), sharex=True, layout="constrained")
    for way, style in zip(WAYS, ("-o", "--x", "-", "-"), strict=True):
        perplexities = [study.at(each, way) for each in bins]
        upper.plot([each.mean() for each in bins], perplexities, style, label=way, markersize=4)
        lower.plot(positions[len(bins[0]) :], np.exp(so_far[way] - so_far["recomputed"])[len(bins[0]) :])
    upper.set(ylabel=f"perplexity, {BINS} stretches", yscale="log", title=title)
    upper.legend()
    lower.set(xlabel="position in the text", ylabel="so far, relative to recomputed", ylim=(0.9, 1.1))
    for axes in (upper, lower):
        axes.grid(alpha=0.3, which="both")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description="Perplexity of streaming, recomputing, window only and dense")
    parser.add_argument("--tokens", type=int, default=2000, help="length of the text (the full study: 20000)")
    parser.add_argument("--every", type=int, default=10, help="recompute at every so many positions")
    parser.add_argument("--sinks", type=int, default=4)
    parser.add_argument("--window", type=int, default=252)
    parser.add_argument("--rebase-at", type=int, help="highest rotary position (default: the session's)")
    parser.add_argument("--model", type=Path, default=shipped_model_path(), help="a Hugging Face folder")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--plot", type=Path, help="draw perplexity over position")
    options = parser.parse_args()
    if options.tokens < 2 * (options.sinks + options.window):
        parser.error("--tokens: expected at least twice sinks + window")
    torch.set_num_threads(1)  # single tokens of a small model: a second thread only waits
    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    ids = torch.tensor(held_out_ids(AutoTokenizer.from_pretrained(options.model), options.tokens))
    study, session = run(model, ids, options.sinks, options.window, options.every, options.rebase_at)
    rows = rows_of(study, session, options.sinks, options.window)
    print("| | | target | met | |\n| --- | ---: | ---: | --- | --- |")
    for each in rows:
        met = {None: "", True: "yes", False: "**no**"}[each["met"]]
        print(f"| {each['name']} | {each['value']} {each['unit']} | {each['target'] or ''} | {met} | {each['note']} |")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    if options.plot:
        draw(study, options.plot, f"{options.tokens:,} tokens through {options.sinks} sinks + {options.window}")


if __name__ == "__main__":
    main()
