"""``pagedkv check-model``: whether a model is served, and in which way, found by the exam that it sits at load time."""

from __future__ import annotations

import time
from typing import Annotated

import msgspec
import typer

from pagedkv.cli.loading import load_weights
from pagedkv.cli.model_source import ModelSource, find_model
from pagedkv.cli.terminal import DebugOption, JsonOption, facts_table, failures_in_one_line, output, print_json
from pagedkv.errors import InvalidOperation
from pagedkv.format import format_bytes

EXAMPLES = """Say whether a model can be served, in which way, and why not in a better one.

[bold]Examples[/bold]

  pagedkv check-model ~/models/SmolLM2-135M

  pagedkv check-model ~/models/SmolLM2-135M --json

The model computes a few hundred tokens in each way, and its logits are compared with those it gives without a cache.
The exit code is 1 where it is refused.
"""
REFUSED = 1


class Report(msgspec.Struct):
    """What ``pagedkv check-model --json`` prints: a refused model has no mode, reasons say why no better way."""

    model: str
    served: bool
    mode: str | None
    chunkable: bool
    reuses_prefixes: bool
    bytes_of_state: int
    reasons: list[str]
    seconds: float


def check_model(
    path: Annotated[
        str,
        typer.Argument(
            help="A folder in the Hugging Face format, a GGUF file, or a name in the Hugging Face cache or at the hub.",
            show_default=False,
        ),
    ],
    device: Annotated[str, typer.Option("--device", help="Where the model runs.")] = "cpu",
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Let the model sit its exam; the help text is `EXAMPLES`."""
    with failures_in_one_line(debug):
        report = examine(find_model(path, "PATH"), device)
        if json:
            print_json(report)
        else:
            output().print(facts_table(_lines(report)), soft_wrap=True)
    if not report.served:
        raise typer.Exit(REFUSED)


def examine(source: ModelSource, device: str) -> Report:
    """Load a model and let it sit its exam."""
    model = load_weights(source, device, "PATH")
    from pagedkv.hf.exam import sit_exam

    name, started = type(model).__name__, time.perf_counter()
    try:
        passed = sit_exam(model)
    except InvalidOperation as refusal:
        reason = str(refusal).removeprefix("Invalid operation: ").removeprefix("model: ")
        return Report(name, False, None, False, False, 0, [reason], _since(started))
    runner, reasons = passed.runner, list(dict.fromkeys(passed.reasons.values()))
    found = runner.mode, runner.chunkable, runner.reuses_prefixes, runner.cache.states.slot_memory_bytes
    return Report(name, True, *found, reasons, _since(started))


def _since(started: float) -> float:
    return round(time.perf_counter() - started, 3)


def _lines(report: Report) -> list[tuple[str, str]]:
    facts = [("model", report.model), ("served", f"yes, in {report.mode} mode" if report.served else "no")]
    if report.served:
        facts.append(("prompts", "in chunks of any length" if report.chunkable else "whole, never in chunks"))
        once = f"computed once{', behind snapshots of states' if report.bytes_of_state else ''}"
        facts.append(("equal prefixes", once if report.reuses_prefixes else "computed each time"))
        if report.bytes_of_state:
            facts.append(("a text's state", f"{format_bytes(report.bytes_of_state)} besides K and V"))
    return [*facts, *(("because", reason) for reason in report.reasons)]
