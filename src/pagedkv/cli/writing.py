"""Writing for a command: one request to an engine, step by step onto the screen, and the pool as it was meanwhile."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rich.status import Status

if TYPE_CHECKING:
    from pagedkv import CacheSnapshot
    from pagedkv.engine import LLM, Request, RequestOutput


class PoolWatch:
    """A runner that remembers its pool as it was in the forward pass that held most blocks.

    The engine frees a text when it ends, so afterwards there is nothing left to draw.
    """

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self.fullest: CacheSnapshot = runner.cache.snapshot()
        self._most = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def forget(self) -> None:
        """Look for the fullest moment from now on."""
        self._most, self.fullest = 0, self._runner.cache.snapshot()

    def forward(self, plan: Any, token_ids: Any, wanted: Any) -> Any:
        """Run the model."""
        logits = self._runner.forward(plan, token_ids, wanted)
        cache = self._runner.cache
        if cache.used_block_count > self._most:
            self._most, self.fullest = cache.used_block_count, cache.snapshot()
        return logits


def written_by(llm: LLM, request: Request, show: Callable[[str], None], until_interrupted: bool) -> RequestOutput:
    """Step until the request is done, or until Ctrl-C, and return its last output; `show` gets the first text."""
    output: RequestOutput | None = None
    shown = 0

    def show_new(text: str) -> None:
        nonlocal shown
        piece, shown = text[shown:], len(text)  # before it is shown: Ctrl-C must not bring it twice
        if piece:
            show(piece)

    try:
        while output is None or not output.finished:
            llm.core.wait()
            for output in llm.core.step():
                show_new(output.outputs[0].text)
    except KeyboardInterrupt:
        if not until_interrupted:
            raise
        output = llm.core.abort(request.request_id) or output
        if output is None:
            raise
        show_new(output.outputs[0].text)
    return output


def warm_up(llm: LLM) -> None:
    """Compute a few tokens, so that the texts that follow wait for no compiling.

    Unlike ``LLM.warm_up`` it forgets nothing, after which a runner would read its model anew for the first text; less
    than a block leaves nothing behind. Tiers are left alone.
    """
    from pagedkv.engine import SamplingParams

    with llm.core.without_tiers():
        llm.generate([[0] * max(1, min(8, llm.sizes.max_model_len - 2))], SamplingParams(max_tokens=2, ignore_eos=True))


def of_folder(generation_config: Any, *names: str) -> dict[str, Any]:
    """Return these sampling settings as the model's ``generation_config.json`` has them, where it has them."""
    given = {name: getattr(generation_config, name, None) for name in names}
    return {name: value for name, value in given.items() if value is not None}


def shown_safely(text: str) -> str:
    """Return a text for stdout: what a model writes must not steer the terminal."""
    return text.replace("\x1b", "␛") if sys.stdout.isatty() else text


class Screen:
    """The text on stdout, the first sample live and the others when they are done; a spinner on stderr until then.

    The prompt is printed before each text. A silent screen shows no text at all, only how far it is.
    """

    def __init__(self, prompt: str, samples: int, status: Status, silent: bool) -> None:
        self._prompt, self._samples, self._status, self._silent = prompt, samples, status, silent
        self._begun = False
        self._ends_with_newline = True
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="replace")  # a terminal without Unicode must not end the text

    def __enter__(self) -> Screen:
        self._status.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        self._status.stop()
        if kind is not None and not issubclass(kind, BrokenPipeError):
            self._end_line()

    def show(self, piece: str) -> None:
        """Show a piece of the first text."""
        if self._silent:
            self._status.update("writing")
            return
        if not self._begun:
            self._begin(0)
        self._write(piece)

    def finish(self, texts: list[str]) -> None:
        """Show what was not shown yet of all the texts."""
        for number, text in enumerate([] if self._silent else texts):
            if number or not self._begun:
                self._begin(number)
                self._write(text)
            self._end_line()

    def _end_line(self) -> None:
        if not self._ends_with_newline:
            self._write("\n")

    def _begin(self, number: int) -> None:
        self._status.stop()
        self._begun = True
        if self._samples > 1:
            self._write(f"--- sample {number + 1} of {self._samples} ---\n")
        self._write(self._prompt)

    def _write(self, text: str) -> None:
        if text:
            sys.stdout.write(shown_safely(text))
            sys.stdout.flush()
            self._ends_with_newline = text.endswith("\n")
