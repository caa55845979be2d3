"""What the keys and the colours of ``pagedkv top`` mean."""

from __future__ import annotations

from typing import ClassVar

from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Static

from pagedkv.cli.top_data import COLOURS

__all__ = ["HelpScreen"]

_KEYS = (
    ("Tab", "from the table to the map and back"),
    ("↑ ↓ ← →", "walk over the blocks, or the rows"),
    ("Enter", "let the blocks of a request stand out; again: all"),
    ("s  S", "sort by the next column, by the one before"),
    ("r", "the other way round"),
    ("/", "show only requests with this in their id or state"),
    ("Esc", "show all again"),
    ("p  Space", "hold still, go on"),
    (",  .", "one snapshot back, one on, in a recorded file"),
    ("d", "dark or light"),
    ("q", "leave"),
)
_KINDS = (
    ("free", "holds nothing"),
    ("active", "held by one sequence"),
    ("shared", "held by several: a common prefix, a fork"),
    ("cached", "held by nobody, still findable, first to be given up"),
    ("pinned", "never given up"),
)


class HelpScreen(ModalScreen[None]):
    """Keys and colours; any of its keys closes it."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,question_mark,h,f1,q,enter", "app.pop_screen", "Close"),
    ]

    def compose(self) -> ComposeResult:
        """Lay out the text."""
        words = Text("Keys\n", style="bold")
        for key, meaning in _KEYS:
            words.append(f"  {key:<9} ", "bold").append(f"{meaning}\n", "not bold")
        words.append("\nBlocks\n", "bold")
        for (kind, meaning), colour in zip(_KINDS, COLOURS, strict=True):
            words.append("  ■ ", colour).append(f"{kind:<7} ", "bold").append(f"{meaning}\n", "not bold")
        words.append("\nA cell of several blocks has the colour of most of them.", "not bold dim")
        with VerticalScroll(id="help"):
            yield Static(words)
