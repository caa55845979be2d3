"""``pagedkv plan``: how much KV cache does this traffic need?"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from pagedkv.cli.console import library_notices, notes, output
from pagedkv.cli.terminal import Failure

if TYPE_CHECKING:
    from pagedkv.sim.plan_types import Hardware, Plan
    from pagedkv.sim.trace import Trace

__all__ = ["PlanRequest", "parse_size", "run"]

_UNITS = {f"{prefix}ib": 2 ** (10 * power) for power, prefix in enumerate("kmgtp", start=1)}
_UNITS |= {f"{prefix}b": 10 ** (3 * power) for power, prefix in enumerate("kmgtp", start=1)}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgtp]i?b)\s*", re.IGNORECASE)


@dataclass(frozen=True)
class PlanRequest:
    """What was asked for, as it was typed; the options tell what each means."""

    trace: Path
    model: str
    target: float = 0.9
    memory: str | None = None
    strategies: str | None = None
    kv_dtype: str | None = None
    window_as_full: bool = False
    tflops: float = 400.0
    mfu: float = 0.5
    decode_rate: float = 50.0
    format: str | None = None
    block_tokens: int | None = None
    skip_bad: bool = False
    jobs: int | None = None
    json: bool = False
    html: Path | None = None


def run(request: PlanRequest) -> None:
    """Read model and trace, make the plan, show it.

    Raises
    ------
    PagedKvError
        Whatever is wrong with the options, the model, the trace, or a strategy.
    """
    from pagedkv.cli.plan_output import print_json, print_screen
    from pagedkv.sim.model_shape import read_model
    from pagedkv.sim.planner import plan
    from pagedkv.sim.reading import read_trace

    if not 0 < request.target <= 1:
        raise Failure(
            f"--target expects a share of the attainable hits above 0 and at most 1, 0.9 is 90%; got {request.target:g}"
        )
    memory = None if request.memory is None else parse_size("--memory", request.memory)
    strategies, hardware = _strategies(request.strategies), _hardware(request)
    if request.html is not None and (request.html.is_dir() or not request.html.absolute().parent.is_dir()):
        raise Failure(f"--html expects a file in a folder that exists, got {request.html}")
    model = read_model(request.model, kv_dtype=request.kv_dtype, window_as_full=request.window_as_full)
    console = notes()
    with library_notices(console), console.status("reading the trace") as status:
        trace = read_trace(
            request.trace, format=request.format, block_tokens=request.block_tokens, skip_bad=request.skip_bad
        )
        made = plan(
            trace,
            model,
            target=request.target,
            memory=memory,
            strategies=strategies,
            hardware=hardware,
            jobs=request.jobs,
            progress=lambda done, asked: status.update(f"replaying {done:,} of {asked:,}"),
        )
    for count, what in ((trace.num_skipped, "broken lines skipped"), (trace.num_reordered, "requests sorted by time")):
        if count:
            console.print(f"{count:,} {what}", style="yellow")
    if request.html is not None:
        _write_report(request, made, trace)
    if request.json:
        print_json(made)
    else:
        print_screen(made, output())


def parse_size(option: str, text: str) -> int:
    """Return the bytes that ``"40GiB"`` (2³⁰) or ``"80GB"`` (10⁹) stands for.

    Raises
    ------
    Failure
        It is no size.
    """
    match = _SIZE.fullmatch(text)
    size = int(float(match[1]) * _UNITS[match[2].lower()]) if match and len(match[1]) < 20 else 0
    if not 0 < size < 2**62:
        raise Failure(f"{option} expects a size such as 40GiB or 80GB, got {text[:40]!r}")
    return size


def _strategies(text: str | None) -> list[str] | None:
    from pagedkv.cli.replay import search_folder_at_hand, split_names
    from pagedkv.sim.sweeps import named_strategy

    if text is None:
        return None
    names = split_names(text)
    if not names:
        raise Failure(f"--strategies expects names such as lru,s3fifo, got {text!r}")
    search_folder_at_hand(names)
    for name in names:
        named_strategy(name)
    return names


def _hardware(request: PlanRequest) -> Hardware:
    from pagedkv.sim.plan_types import Hardware

    for option, value, high in (
        ("--tflops", request.tflops, 1e12),
        ("--mfu", request.mfu, 1.0),
        ("--decode-rate", request.decode_rate, 1e9),
    ):
        if not 0 < value <= high:
            raise Failure(f"{option} expects a number above 0 and at most {high:g}, got {value:g}")
    return Hardware(request.tflops, request.mfu, request.decode_rate)


def _write_report(request: PlanRequest, plan: Plan, trace: Trace) -> None:
    from pagedkv.cli.replay_output import write_file
    from pagedkv.sim.report import plan_report

    words = ["pagedkv", "plan", request.trace.name, "--model", request.model]
    for field in fields(request):
        value = getattr(request, field.name)
        if field.name in ("trace", "model", "jobs", "json", "html") or value == field.default:
            continue
        words += [f"--{field.name.replace('_', '-')}", *([] if value is True else [str(value)])]
    command = shlex.join([*words, "--html", str(request.html)])
    write_file("--html", Path(str(request.html)), plan_report(plan, trace, command=command))
