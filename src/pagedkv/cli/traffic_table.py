"""The parameters of synthetic traffic, as a table under the help of ``pagedkv trace synth``."""

from __future__ import annotations

from dataclasses import fields

from rich import box
from rich.table import Table

from pagedkv.cli.console import output

__all__ = ["MEANINGS", "print_parameters"]

MEANINGS = {
    "rate": "requests per second",
    "turns": "mean requests a session",
    "turns_spread": "its spread",
    "think_seconds": "median pause",
    "think_spread": "",
    "idle_share": "share of long pauses",
    "idle_seconds": "median long pause",
    "common_tokens": "before every prompt",
    "system_prompts": "different system prompts",
    "system_zipf": "their popularity",
    "system_tokens": "median that one adds",
    "system_spread": "",
    "first_tokens": "median first message",
    "first_spread": "",
    "message_tokens": "median later message",
    "message_spread": "",
    "output_tokens": "median answer",
    "output_spread": "",
    "max_tokens": "the longest input",
    "summary_tokens": "median after compaction",
    "documents": "different documents",
    "document_zipf": "their popularity",
    "document_tokens": "median of one",
    "document_spread": "",
    "documents_per_request": "in the first request",
    "subagent_share": "share that starts agents",
    "subagents": "most side by side",
    "subagent_turns": "mean requests of one",
}
"""What every field of `Traffic` means, in a few words."""
_SPREAD = "its spread"


def print_parameters() -> None:
    """Print name, meaning and the value of each kind; ``mixed`` takes those of the three."""
    from pagedkv.sim.traffic import TRAFFIC, Traffic

    table = Table(title="Parameters for --set", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1))
    table.add_column("name")
    table.add_column("meaning", style="dim")
    for kind in TRAFFIC:
        table.add_column(kind, justify="right")
    for field in fields(Traffic):
        name = "(--rate)" if field.name == "rate" else field.name
        values = [getattr(traffic, field.name) for traffic in TRAFFIC.values()]
        table.add_row(name, MEANINGS[field.name] or _SPREAD, *(f"{value:,g}" for value in values))
    output().print(table)
    output().print(
        "Draws are log-normal around the median, a spread is the standard deviation of the logarithm.\n"
        "Popularity is a power law with this exponent. max_tokens ends a session, or with summary_tokens compacts it.",
        style="dim",
    )
