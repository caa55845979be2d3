"""``pagedkv serve``: load a model, warm it up, listen, and print how to call it."""

from __future__ import annotations

import json
import shlex
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from pagedkv.cli.engine_options import EngineOptions, TierOptions, make_engine
from pagedkv.cli.loading import load_model
from pagedkv.cli.model_source import ModelArgument, ModelSource, find_model
from pagedkv.cli.serve_replicas import FleetOptions, require_replicas, restart_on_hangup, start_replicas
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
from pagedkv.errors import MissingExtra
from pagedkv.server.config import ServerConfig

if TYPE_CHECKING:
    from pagedkv.engine import AsyncEngine
    from pagedkv.replicas.engine import FleetEngine
    from pagedkv.server.engines import ServedEngine
    from pagedkv.server.warm import Pinned


_KEYS = "Who may call"


EXAMPLES = """Serve a language model behind the API that OpenAI's clients speak.

[bold]Examples[/bold]

  pagedkv serve

  pagedkv serve ./my-model --port 9000 --api-key-file keys.txt

  pagedkv serve --disk /var/cache/pagedkv --disk-size 50GB --warm system-prompt.txt

  pagedkv serve --config server.toml

  PAGEDKV_API_KEYS="alice-key bob-key" pagedkv serve --num-blocks 4096

  pagedkv serve --replicas 2 --routing prefix

  curl localhost:8000/v1/completions -H "Content-Type: application/json" -d '{"prompt": "import os"}'

Without a model the one is served that pagedkv brings. Nothing is downloaded but a model that is named as at the hub
(OWNER/NAME) and is not in the local Hugging Face cache. SIGTERM and Ctrl-C let running requests end.
"""


@options_from(EngineOptions, TierOptions, FleetOptions, ServerConfig)
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
        server, tiers = from_options(ServerConfig, options), from_options(TierOptions, options)
        fleet = from_options(FleetOptions, options)
        if fleet.is_fleet:
            run_fleet(source, engine_options, server, tiers, fleet)
        else:
            run(source, engine_options, server, tiers)


def _check_host_memory(options: EngineOptions, tiers: TierOptions) -> None:
    if tiers.host_memory is not None and options.device.startswith("cpu"):
        raise Failure("--host-memory: expected a pool on a device, got one on the CPU, which is in that memory already")


def run(source: ModelSource, options: EngineOptions, config: ServerConfig, tiers: TierOptions) -> None:
    """Serve a model until a signal comes."""
    from pagedkv.server.events import require_events
    from pagedkv.server.run import listen, run, show_logs
    from pagedkv.server.warm import pin_prompts, read_prompts

    _check_host_memory(options, tiers)
    require_events(config)
    prompts = read_prompts(tiers.warm)
    console = notes()
    with listen(config) as listener:
        with library_notices(console), console.status("loading the model"):
            loaded = load_model(source, options.device, options.dtype)
            num_parameters = loaded.model.num_parameters()
            engine = make_engine(options, loaded, tiers)
            del loaded
        url = f"http://{_shown(config.host)}:{listener.getsockname()[1]}"
        with threads_for(num_parameters), engine.llm:
            with library_notices(console), console.status("warming up"):
                engine.llm.warm_up()
                pinned = pin_prompts(engine, config, prompts)
            show_logs(config)
            run(engine, config, listener, on_ready=lambda: _greet(console, url, engine, config, tiers, pinned))


def _shown(host: str) -> str:
    if host in ("0.0.0.0", "::", ""):
        return "localhost"
    return f"[{host}]" if ":" in host else host


def run_fleet(
    source: ModelSource, options: EngineOptions, config: ServerConfig, tiers: TierOptions, fleet: FleetOptions
) -> None:
    """Serve many engines of a model until a signal comes."""
    from pagedkv.server.run import listen, run, show_logs
    from pagedkv.server.warm import read_prompts

    _check_host_memory(options, tiers)
    require_replicas(config, options.device)
    read_prompts(tiers.warm)
    console = notes()
    with listen(config) as listener:
        url = f"http://{_shown(config.host)}:{listener.getsockname()[1]}"
        with library_notices(console), console.status(f"starting {fleet.replicas} replicas"):
            engine, link, threads = start_replicas(source, options, config, tiers, fleet)
        show_logs(config)
        restart_on_hangup(link)
        run(engine, config, listener, on_ready=lambda: _greet_fleet(console, url, engine, config, fleet, threads))


def example_curl(url: str, *, with_key: bool) -> str:
    """Return a shell command that asks a server for a completion."""
    body = json.dumps({"prompt": "def fibonacci(n):", "max_tokens": 32, "temperature": 0})
    key = ' \\\n  -H "Authorization: Bearer $PAGEDKV_KEY"' if with_key else ""
    return f'curl {url}/v1/completions{key} \\\n  -H "Content-Type: application/json" \\\n  -d {shlex.quote(body)}'


_TIER_NAMES = {"CPU": "host memory", "DISK": "disk", "REMOTE": "shared server"}


def _greet(
    console: Console, url: str, engine: AsyncEngine, config: ServerConfig, tiers: TierOptions, pinned: Pinned
) -> None:
    facts = _facts(url, engine, config)
    for tier, figures in zip(engine.tiers, engine.stats().tiers, strict=True):
        name, place = _TIER_NAMES[figures.medium], f"{tiers.disk}, " if figures.medium == "DISK" else ""
        place += "read only, " if getattr(tier, "is_read_only", False) else ""
        blocks = f"{figures.blocks:,} of {figures.total_blocks:,} blocks"
        facts[name] = f"{place}{blocks}" if figures.total_blocks else str(getattr(tier, "place", ""))
    if pinned.tokens:
        facts["pinned"] = f"{pinned.tokens:,} tokens in {pinned.blocks:,} blocks"
    _show(console, url, config, facts)


def _greet_fleet(
    console: Console, url: str, engine: FleetEngine, config: ServerConfig, fleet: FleetOptions, threads: int
) -> None:
    count = engine.replica_count()
    scaled = f", {fleet.autoscale} as load asks" if fleet.autoscale else ""
    cores = f"{threads} core{'s' if threads > 1 else ''} each"
    facts = _facts(url, engine, config)
    facts["replicas"] = f"{count.ready}{scaled}, {cores}; requests are routed by {fleet.routing}"
    facts |= {_TIER_NAMES[medium]: "of each replica" for medium in engine.media}
    _show(console, url, config, facts)


def _facts(url: str, engine: ServedEngine, config: ServerConfig) -> dict[str, str]:
    """Return what is told of any server."""
    sizes = engine.sizes
    megabytes = sizes.bytes_per_block * sizes.total_blocks / 1e6
    keys = len(set(config.api_keys))
    apart = "share the cache" if config.shared_cache else "kept apart in the cache"
    return {
        "URL": f"{url}/v1",
        "live page": url,
        "model": config.model_name or "",
        "blocks": f"{sizes.total_blocks:,} of {sizes.block_size} tokens, {megabytes:,.1f} MB of K and V",
        "keys": f"{keys}, {apart}" if keys else "none: whoever reaches the port may call",
        "tools": _tools(engine, config),
    }


def _show(console: Console, url: str, config: ServerConfig, facts: dict[str, str]) -> None:
    table = facts_table(facts.items())
    console.print(Panel(table, title="pagedkv serves", title_align="left", expand=False, border_style="green"))
    console.print(Text(example_curl(url, with_key=bool(config.api_keys)) + "\n"), soft_wrap=True)


def _tools(engine: ServedEngine, config: ServerConfig) -> str:
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
