"""The options of ``pagedkv bench``; what it needs is imported when it runs."""

from __future__ import annotations

from typing import Annotated

import typer

from pagedkv.cli.options import option
from pagedkv.cli.terminal import failures_in_one_line

__all__ = ["EXAMPLES", "bench"]

EXAMPLES = """Measure pagedkv on this machine: the books, attention over blocks, and the replay of a trace.

[bold]Examples[/bold]

  pagedkv bench

  pagedkv bench attention --dtypes bfloat16,int8 --batch 32 --context 4096

  pagedkv bench attention --device cuda

  pagedkv bench books --sequences 64 --json

Every figure is the median of as many calls as fit into --seconds; compare them within one run only.
"""

_BOOKS, _ATTENTION, _HOW = "The books", "Attention", "How"


def bench(
    parts: Annotated[
        list[str] | None,
        typer.Argument(metavar="[PART]…", help="books, attention, replay; without any, all that can run here."),
    ] = None,
    sequences: Annotated[
        int, option("--sequences", help="Running sequences, of --context tokens each, in a step.", panel=_BOOKS)
    ] = 256,
    prompt: Annotated[int, option("--prompt", help="Tokens of a prompt that is found cached.", panel=_BOOKS)] = 32768,
    batch: Annotated[int, option("--batch", help="Sequences that decode together.", panel=_ATTENTION)] = 16,
    q_heads: Annotated[int, option("--q-heads", help="Query heads.", panel=_ATTENTION)] = 32,
    kv_heads: Annotated[int, option("--kv-heads", help="Heads of keys and values.", panel=_ATTENTION)] = 8,
    head_dim: Annotated[int, option("--head-dim", help="Elements of a head.", panel=_ATTENTION)] = 128,
    dtypes: Annotated[
        str,
        option("--dtypes", help="Of keys and values: float32, bfloat16, float16, int8, fp8.", panel=_ATTENTION),
    ] = "float32,bfloat16,float16,int8",
    device: Annotated[str, option("--device", help="A torch device: cpu, cuda, cuda:1.", panel=_ATTENTION)] = "cpu",
    context: Annotated[int, option("--context", help="Tokens of every sequence.", panel=_HOW)] = 1024,
    block_size: Annotated[int, option("--block-size", help="Tokens per block.", panel=_HOW)] = 16,
    seconds: Annotated[float, option("--seconds", help="Time for every figure.", panel=_HOW)] = 1.0,
    json: Annotated[bool, option("--json", help="Print one JSON object instead.", panel=_HOW)] = False,
    debug: Annotated[bool, option("--debug", help="Show the traceback of an error.", panel=_HOW)] = False,
) -> None:
    """Check the options and run."""
    with failures_in_one_line(debug):
        from pagedkv.cli.bench import BenchRequest, run

        run(
            BenchRequest(
                parts=tuple(parts or ()),
                sequences=sequences,
                prompt=prompt,
                batch=batch,
                q_heads=q_heads,
                kv_heads=kv_heads,
                head_dim=head_dim,
                dtypes=tuple(name.strip() for name in dtypes.split(",") if name.strip()),
                device=device,
                context=context,
                block_size=block_size,
                seconds=seconds,
                json=json,
            )
        )
