"""``pagedkv serve``: load a model, warm it up, listen, and say how to call."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from pagedkv.cli.console import library_notices, notes
from pagedkv.cli.loading import LoadedModel, check_folder, load_model
from pagedkv.cli.request import require_kv_dtype
from pagedkv.cli.terminal import Failure
from pagedkv.cli.threads import threads_for
from pagedkv.errors import InvalidOperation, MissingExtra
from pagedkv.models import shipped_model_path

if TYPE_CHECKING:
    from pagedkv.engine import AsyncEngine
    from pagedkv.server import ServerConfig

__all__ = ["EngineOptions", "example_curl", "run"]

T = TypeVar("T")
_OPTIONS = {
    "api_keys": "api-key",
    "operator_keys": "operator-key",
    "allow_origins": "allow-origin",
    "model_name": "served-model-name",
}
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """What runs, and how; the names are those of the options."""

    model: Path | None
    device: str
    dtype: str
    num_blocks: int | None
    block_size: int
    strategy: str
    prefix_caching: bool
    max_num_seqs: int
    max_batch_tokens: int
    kv_dtype: str | None = None
    cuda_graphs: bool = False

    @property
    def path(self) -> Path:
        """The folder of the model."""
        return self.model or shipped_model_path()


def run(options: EngineOptions, *, name: str | None, **settings: Any) -> None:
    """Serve until a signal comes.

    Parameters
    ----------
    options : EngineOptions
    name : str, optional
        Of the model in the API.
    **settings
        Of :class:`pagedkv.server.ServerConfig`.

    Raises
    ------
    Failure
        An option makes no sense, or the model cannot be loaded.
    MissingExtra
        The packages of the server are not installed.
    """
    for module in ("fastapi", "uvicorn"):
        if find_spec(module) is None:
            raise MissingExtra(module, "serve")
    if options.dtype not in DTYPES:
        raise Failure(f"--dtype expects {', '.join(DTYPES)}, got {options.dtype}")
    require_kv_dtype(options.kv_dtype)
    check_folder(options.path)
    from pagedkv.server.events import require_events
    from pagedkv.server.run import listen, run, show_logs

    config = _as_options(lambda: _config(options, name, settings))
    _as_options(lambda: require_events(config))
    console = notes()
    with _as_options(lambda: listen(config)) as listener:
        with library_notices(console), console.status("loading the model"):
            loaded = load_model(options.path, options.device)
            engine = _as_options(lambda: _engine(options, loaded))
        url = f"http://{_shown(config.host)}:{listener.getsockname()[1]}"
        with threads_for(loaded.model):
            with library_notices(console), console.status("warming up"):
                _warm_up(engine)
            show_logs(config)
            run(engine, config, listener, on_ready=lambda: _greet(console, url, engine, config))


def _config(options: EngineOptions, name: str | None, settings: dict[str, Any]) -> ServerConfig:
    from pagedkv.server import ServerConfig

    return ServerConfig(model_name=name or options.path.resolve().name or "model", **settings)


def _engine(options: EngineOptions, loaded: LoadedModel) -> AsyncEngine:
    from pagedkv.engine import LLM, AsyncEngine

    model = loaded.model
    if options.dtype != "auto":
        import torch

        model = model.to(getattr(torch, options.dtype))
    return AsyncEngine(
        LLM(
            model,
            loaded.tokenizer,
            num_blocks=options.num_blocks,
            block_size=options.block_size,
            strategy=options.strategy,
            prefix_caching=options.prefix_caching,
            max_num_seqs=options.max_num_seqs,
            max_batch_tokens=options.max_batch_tokens,
            kv_dtype=options.kv_dtype,
            cuda_graphs=options.cuda_graphs,
        )
    )


def _as_options(call: Callable[[], T]) -> T:
    """Say an error of an argument as one of the option of that name."""
    try:
        return call()
    except InvalidOperation as error:
        argument, separator, rest = re.match(r"(\w*)(:?)(.*)", error.reason, re.S).groups()  # type: ignore[union-attr]
        option = _OPTIONS.get(argument, argument.replace("_", "-"))
        raise Failure(f"--{option}{separator}{rest}") from None


def _warm_up(engine: AsyncEngine) -> None:
    """Write a few tokens, so that kernels are compiled and the pool has its memory before the first client comes."""
    from pagedkv.engine import EngineCore, SamplingParams

    runner = engine.llm.core.runner
    longest = max(1, min(8, runner.cache.total_blocks * runner.cache.block_size - 2))
    core = EngineCore(runner)  # one of its own, so that nobody's counters begin with it
    core.add(engine.llm.request([0] * longest, SamplingParams(max_tokens=2, ignore_eos=True)))
    while core.has_work:
        core.step()
    core.clear_prefix_cache()


def _shown(host: str) -> str:
    if host in ("0.0.0.0", "::", ""):
        return "localhost"
    return f"[{host}]" if ":" in host else host


def example_curl(url: str, *, with_key: bool) -> str:
    """Return a shell command that asks a server for a completion."""
    body = json.dumps({"prompt": "def fibonacci(n):", "max_tokens": 32, "temperature": 0})
    key = ' \\\n  -H "Authorization: Bearer $PAGEDKV_KEY"' if with_key else ""
    return f'curl {url}/v1/completions{key} \\\n  -H "Content-Type: application/json" \\\n  -d {shlex.quote(body)}'


def _greet(console: Console, url: str, engine: AsyncEngine, config: ServerConfig) -> None:
    runner: Any = engine.llm.core.runner
    cache = runner.cache
    megabytes = runner.bytes_per_block * cache.total_blocks / 1e6
    keys = len(set(config.api_keys))
    apart = "share the cache" if config.shared_cache else "kept apart in the cache"
    facts = {
        "URL": f"{url}/v1",
        "live page": url,
        "model": config.model_name,
        "blocks": f"{cache.total_blocks:,} of {cache.block_size} tokens, {megabytes:,.1f} MB of K and V",
        "keys": f"{keys}, {apart}" if keys else "none: whoever reaches the port may call",
    }
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    for label, value in facts.items():
        table.add_row(label, Text(value, overflow="fold"))
    console.print(Panel(table, title="pagedkv serves", title_align="left", expand=False, border_style="green"))
    console.print(Text(example_curl(url, with_key=bool(keys)) + "\n"), soft_wrap=True)
