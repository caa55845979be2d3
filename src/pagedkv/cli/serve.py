"""``pagedkv serve``: load a model, warm it up, listen, and print how to call it."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from pagedkv.cli.loading import LoadedModel, load_model, require_dtype, require_kv_dtype, require_weights
from pagedkv.cli.model_source import ModelArgument, ModelSource, find_model
from pagedkv.cli.terminal import (
    ConfigOption,
    DebugOption,
    Failure,
    facts_table,
    failures_in_one_line,
    from_options,
    library_notices,
    notes,
    option,
    options_from,
    read_text,
    threads_for,
)
from pagedkv.errors import InvalidOperation, MissingExtra
from pagedkv.server.config import ServerConfig, setting
from pagedkv.validate import require_size

if TYPE_CHECKING:
    from pagedkv.engine import AsyncEngine
    from pagedkv.server.warm import Pinned
    from pagedkv.tiers import Tier


_MODEL, _POOL, _TIERS, _KEYS = "The model", "The pool and the batch", "Beyond the pool", "Who may call"


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How the model is run; all but the first two are those of :class:`pagedkv.engine.LLM`, with its defaults."""

    device: str = setting("cpu", "A torch device: cpu, cuda, cuda:1.", group=_MODEL)
    dtype: str = setting("auto", "auto (as stored), float32, bfloat16, float16.", group=_MODEL)
    weights: str | None = setting(
        None, "Weights in 8 bits: int8, on the CPU, in compiled mode.", shown="as stored", group=_MODEL
    )
    cuda_graphs: bool = setting(False, "Replay decode steps as CUDA graphs; not yet tried.", group=_MODEL)
    num_blocks: int | None = setting(None, "Blocks of the pool.", group=_POOL, shown="from the memory")
    kv_dtype: str | None = setting(
        None,
        "Of keys and values: float32, bfloat16, float16, or quantised: int8, fp8.",
        group=_POOL,
        shown="as the model",
    )
    block_size: int = setting(16, "Tokens per block.", group=_POOL)
    strategy: str = setting("lru", "What is evicted first: lru, lfu, fifo, …", group=_POOL)
    prefix_caching: bool = setting(True, "Reuse equal prefixes.", group=_POOL)
    max_num_seqs: int = setting(256, "Texts written at once.", group=_POOL)
    max_batch_tokens: int = setting(512, "Tokens of a step.", group=_POOL)

    def __post_init__(self) -> None:
        require_dtype(self.dtype)
        require_kv_dtype(self.kv_dtype)
        require_weights(self.weights)
        for name, plain in (("device", "cpu"), ("dtype", "auto")):
            if self.weights is not None and getattr(self, name) != plain:
                raise Failure(f"--{name}: expected {plain} beside --weights, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class TierOptions:
    """What is kept beyond the pool, and what is never given up in it."""

    disk: Path | None = setting(
        None, "A directory for keys and values: chats go on after a restart.", group=_TIERS, shown=False
    )
    disk_size: str | None = setting(None, "Bytes that it may take, such as 50GB.", group=_TIERS, shown=False)
    disk_read_only: bool = setting(
        False, "Find what another server writes to that directory, and store nothing there.", group=_TIERS
    )
    host_memory: str | None = setting(
        None, "Memory of the host for them, such as 8GiB, for pools on a device.", group=_TIERS, shown=False
    )
    resp: str | None = setting(
        None,
        "A Valkey or Redis server that several share: valkey://host:6379/0.",
        group=_TIERS,
        env="PAGEDKV_RESP",
        shown=False,
    )
    resp_ttl: int | None = setting(
        None, "Seconds that a block stays there after its last use.", group=_TIERS, shown="until there is no room"
    )
    warm: tuple[str, ...] = setting(
        (),
        "A file with a system prompt, or a JSON list of them, to compute and pin before the port opens.",
        group=_TIERS,
        shown=False,
    )

    def __post_init__(self) -> None:
        if self.disk_read_only:
            if self.disk is None:
                raise Failure("--disk-read-only: expected --disk beside it")
            if self.disk_size is not None:
                raise Failure("--disk-size: expected none beside --disk-read-only, as who writes has set it")
        elif (self.disk is None) != (self.disk_size is None):
            missing, given = ("--disk-size", "--disk") if self.disk_size is None else ("--disk", "--disk-size")
            raise Failure(f"{given}: expected {missing} beside it")
        if self.resp is None and self.resp_ttl is not None:
            raise Failure("--resp-ttl: expected --resp beside it")
        if self.resp is not None:
            self._shared(self.resp)
        for name in self.sizes:
            require_size(name, getattr(self, name))

    @property
    def sizes(self) -> list[str]:
        """The sizes that were given, nearest first."""
        return [name for name in ("host_memory", "disk_size") if getattr(self, name) is not None]

    def tiers(self) -> list[Tier]:
        """Return the tiers, nearest first."""
        from pagedkv.tiers import DiskTier, HostTier

        made: list[Tier] = []
        if self.host_memory is not None:
            made.append(HostTier(self.host_memory))
        if self.disk is not None:
            made.append(DiskTier(self.disk, self.disk_size, read_only=self.disk_read_only))
        if self.resp is not None:
            made.append(self._shared(self.resp))
        return made

    def _shared(self, url: str) -> Tier:
        from pagedkv.tiers import RespTier

        try:
            return RespTier(url, ttl=self.resp_ttl)
        except InvalidOperation as error:
            flag = {"url": "--resp", "ttl": "--resp-ttl"}[error.argument or ""]
            raise Failure(f"{flag}{error.reason.removeprefix(error.argument or '')}") from None


EXAMPLES = """Serve a language model behind the API that OpenAI's clients speak.

[bold]Examples[/bold]

  pagedkv serve

  pagedkv serve ./my-model --port 9000 --api-key-file keys.txt

  pagedkv serve --disk /var/cache/pagedkv --disk-size 50GB --warm system-prompt.txt

  pagedkv serve --config server.toml

  PAGEDKV_API_KEYS="alice-key bob-key" pagedkv serve --num-blocks 4096

  curl localhost:8000/v1/completions -H "Content-Type: application/json" -d '{"prompt": "import os"}'

Without a model the one is served that pagedkv brings. Nothing is downloaded but a model that is named as at the hub
(OWNER/NAME) and is not in the local Hugging Face cache. SIGTERM and Ctrl-C let running requests end.
"""


@options_from(EngineOptions, TierOptions, ServerConfig)
def serve(
    context: typer.Context,
    model: ModelArgument = None,
    config: ConfigOption = None,
    api_key_file: Annotated[
        Path | None, option("--api-key-file", help="A file with one key a line.", default=False, panel=_KEYS)
    ] = None,
    *,
    debug: DebugOption = False,
    **options: Any,
) -> None:
    """Gather the options and serve; the help text is `EXAMPLES`."""
    with failures_in_one_line(debug, context):
        options["api_keys"] = (*options["api_keys"], *read_keys(api_key_file))
        for module in ("fastapi", "uvicorn"):
            if find_spec(module) is None:
                raise MissingExtra(module, "serve")
        engine_options = from_options(EngineOptions, options)
        source = find_model(model, "MODEL")
        options["model_name"] = options["model_name"] or source.name or "model"
        run(source, engine_options, from_options(ServerConfig, options), from_options(TierOptions, options))


def run(source: ModelSource, options: EngineOptions, config: ServerConfig, tiers: TierOptions) -> None:
    """Serve a model until a signal comes."""
    from pagedkv.server.events import require_events
    from pagedkv.server.run import listen, run, show_logs
    from pagedkv.server.warm import pin_prompts, read_prompts

    if tiers.host_memory is not None and options.device.startswith("cpu"):
        raise Failure("--host-memory: expected a pool on a device, got one on the CPU, which is in that memory already")
    require_events(config)
    prompts = read_prompts(tiers.warm)
    console = notes()
    with listen(config) as listener:
        with library_notices(console), console.status("loading the model"):
            loaded = load_model(source, options.device, options.dtype)
            num_parameters = loaded.model.num_parameters()
            engine = _engine(options, loaded, tiers)
            del loaded
        url = f"http://{_shown(config.host)}:{listener.getsockname()[1]}"
        with threads_for(num_parameters), engine.llm:
            with library_notices(console), console.status("warming up"):
                engine.llm.warm_up()
                pinned = pin_prompts(engine, config, prompts)
            show_logs(config)
            run(engine, config, listener, on_ready=lambda: _greet(console, url, engine, config, tiers, pinned))


def _engine(options: EngineOptions, loaded: LoadedModel, tiers: TierOptions) -> AsyncEngine:
    from pagedkv.engine import LLM, AsyncEngine

    given = asdict(options)
    del given["device"], given["dtype"]
    try:
        return AsyncEngine(LLM(loaded.model, loaded.tokenizer, tiers=tiers.tiers(), keep_model=False, **given))
    except InvalidOperation as error:
        if error.argument != "size":
            raise
        flags = " or ".join(f"--{name.replace('_', '-')}" for name in tiers.sizes)
        raise Failure(f"{flags}{error.reason.removeprefix('size')}") from None


def _shown(host: str) -> str:
    if host in ("0.0.0.0", "::", ""):
        return "localhost"
    return f"[{host}]" if ":" in host else host


def example_curl(url: str, *, with_key: bool) -> str:
    """Return a shell command that asks a server for a completion."""
    body = json.dumps({"prompt": "def fibonacci(n):", "max_tokens": 32, "temperature": 0})
    key = ' \\\n  -H "Authorization: Bearer $PAGEDKV_KEY"' if with_key else ""
    return f'curl {url}/v1/completions{key} \\\n  -H "Content-Type: application/json" \\\n  -d {shlex.quote(body)}'


_TIER_NAMES = {"CPU": "host memory", "DISK": "disk", "REMOTE": "shared server"}


def _greet(
    console: Console, url: str, engine: AsyncEngine, config: ServerConfig, tiers: TierOptions, pinned: Pinned
) -> None:
    sizes = engine.sizes
    megabytes = sizes.bytes_per_block * sizes.total_blocks / 1e6
    keys = len(set(config.api_keys))
    apart = "share the cache" if config.shared_cache else "kept apart in the cache"
    facts = {
        "URL": f"{url}/v1",
        "live page": url,
        "model": config.model_name or "",
        "blocks": f"{sizes.total_blocks:,} of {sizes.block_size} tokens, {megabytes:,.1f} MB of K and V",
        "keys": f"{keys}, {apart}" if keys else "none: whoever reaches the port may call",
        "tools": _tools(engine, config),
    }
    for tier, figures in zip(engine.tiers, engine.stats().tiers, strict=True):
        name, place = _TIER_NAMES[figures.medium], f"{tiers.disk}, " if figures.medium == "DISK" else ""
        place += "read only, " if getattr(tier, "is_read_only", False) else ""
        blocks = f"{figures.blocks:,} of {figures.total_blocks:,} blocks"
        facts[name] = f"{place}{blocks}" if figures.total_blocks else str(getattr(tier, "place", ""))
    if pinned.tokens:
        facts["pinned"] = f"{pinned.tokens:,} tokens in {pinned.blocks:,} blocks"
    table = facts_table(facts.items())
    console.print(Panel(table, title="pagedkv serves", title_align="left", expand=False, border_style="green"))
    console.print(Text(example_curl(url, with_key=bool(keys)) + "\n"), soft_wrap=True)


def _tools(engine: AsyncEngine, config: ServerConfig) -> str:
    from pagedkv.server.model import template_of
    from pagedkv.server.tools import form_of

    template = template_of(engine.tokenizer, config.chat_template, with_tools=True)
    form = form_of(template, config.tool_parser)
    return f"calls in the form {form}" if form else "refused: the form of calls is not known, see --tool-parser"


def read_keys(path: Path | None) -> tuple[str, ...]:
    """Return the keys of a file, one a line; empty lines and lines that begin with # do not count."""
    text = read_text("--api-key-file", path)
    if text is None:
        return ()
    lines = [line.strip() for line in text.splitlines()]
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if not keys:
        raise Failure(f"--api-key-file: {path} holds no key: expected one a line")
    return keys
