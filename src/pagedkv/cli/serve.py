"""``pagedkv serve``: load a model, warm it up, listen, and say how to call."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from pagedkv.cli.generate import require_kv_dtype
from pagedkv.cli.loading import LoadedModel, check_folder, load_model
from pagedkv.cli.terminal import Failure, failures_in_one_line, library_notices, notes, option, threads_for
from pagedkv.errors import InvalidOperation, MissingExtra
from pagedkv.models import shipped_model_path

if TYPE_CHECKING:
    from pagedkv.engine import AsyncEngine
    from pagedkv.server import ServerConfig


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
        raise Failure(f"--dtype: expected {', '.join(DTYPES)}, got {options.dtype}")
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
                engine.llm.warm_up()
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
    sizes = engine.sizes
    megabytes = sizes.bytes_per_block * sizes.total_blocks / 1e6
    keys = len(set(config.api_keys))
    apart = "share the cache" if config.shared_cache else "kept apart in the cache"
    facts = {
        "URL": f"{url}/v1",
        "live page": url,
        "model": config.model_name,
        "blocks": f"{sizes.total_blocks:,} of {sizes.block_size} tokens, {megabytes:,.1f} MB of K and V",
        "keys": f"{keys}, {apart}" if keys else "none: whoever reaches the port may call",
    }
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    for label, value in facts.items():
        table.add_row(label, Text(value, overflow="fold"))
    console.print(Panel(table, title="pagedkv serves", title_align="left", expand=False, border_style="green"))
    console.print(Text(example_curl(url, with_key=bool(keys)) + "\n"), soft_wrap=True)


# The options of ``pagedkv serve``. What the command needs is imported when it runs.

EXAMPLES = """Serve a language model behind the API that OpenAI's clients speak.

[bold]Examples[/bold]

  pagedkv serve

  pagedkv serve ./my-model --port 9000 --api-key-file keys.txt

  PAGEDKV_API_KEYS="alice-key bob-key" pagedkv serve --num-blocks 4096

  curl localhost:8000/v1/completions -H "Content-Type: application/json" -d '{"prompt": "import os"}'

Without a model the one is served that pagedkv brings. Nothing is ever downloaded. SIGTERM and Ctrl-C let running
requests end.
"""

_MODEL, _POOL, _KEYS = "The model", "The pool and the batch", "Who may call"
_LIMITS, _SHOW = "Limits", "What to show"


def serve(
    model: Annotated[
        Path | None,
        typer.Argument(help="A Hugging Face model folder.", show_default="the shipped model"),
    ] = None,
    host: Annotated[str, typer.Option("--host", help="The address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", "-p", min=0, max=65535, help="0 takes a free one.")] = 8000,
    name: Annotated[
        str | None,
        option("--served-model-name", help="Its name in the API.", default="that of the folder", panel=_MODEL),
    ] = None,
    device: Annotated[str, option("--device", help="A torch device: cpu, cuda, cuda:1.", panel=_MODEL)] = "cpu",
    dtype: Annotated[
        str, option("--dtype", help="auto (as stored), float32, bfloat16, float16.", panel=_MODEL)
    ] = "auto",
    cuda_graphs: Annotated[
        bool, option("--cuda-graphs", help="Replay decode steps as CUDA graphs; not yet tried.", panel=_MODEL)
    ] = False,
    chat_template: Annotated[
        Path | None,
        option("--chat-template", help="A Jinja file instead of the tokenizer's.", default=False, panel=_MODEL),
    ] = None,
    num_blocks: Annotated[
        int | None, option("--num-blocks", help="Blocks of the pool.", default="from the memory", panel=_POOL)
    ] = None,
    kv_dtype: Annotated[
        str | None,
        option(
            "--kv-dtype",
            help="Of keys and values: float32, bfloat16, float16, or quantised: int8, fp8.",
            default="as the model",
            panel=_POOL,
        ),
    ] = None,
    block_size: Annotated[int, option("--block-size", help="Tokens per block.", panel=_POOL)] = 16,
    strategy: Annotated[
        str, option("--strategy", help="What is given up first: lru, lfu, fifo, …", panel=_POOL)
    ] = "lru",
    prefix_caching: Annotated[
        bool, option("--prefix-caching/--no-prefix-caching", help="Reuse equal prefixes.", panel=_POOL)
    ] = True,
    max_num_seqs: Annotated[int, option("--max-num-seqs", help="Texts written at once.", panel=_POOL)] = 256,
    max_batch_tokens: Annotated[int, option("--max-batch-tokens", help="Tokens of a step.", panel=_POOL)] = 512,
    api_key: Annotated[
        list[str] | None,
        option(
            "--api-key",
            help="A key that may call; give it again for more. Other users of the machine can see it.",
            default=False,
            panel=_KEYS,
            env="PAGEDKV_API_KEYS",
        ),
    ] = None,
    api_key_file: Annotated[
        Path | None, option("--api-key-file", help="A file with one key a line.", default=False, panel=_KEYS)
    ] = None,
    operator_key: Annotated[
        list[str] | None,
        option(
            "--operator-key",
            help="A key that may also see and clear the cache of all.",
            default=False,
            panel=_KEYS,
            env="PAGEDKV_OPERATOR_KEYS",
        ),
    ] = None,
    shared_cache: Annotated[
        bool, option("--shared-cache", help="Let different keys reuse each other's prefixes.", panel=_KEYS)
    ] = False,
    allow_origin: Annotated[
        list[str] | None,
        option("--allow-origin", help="A web origin whose pages may call; * for all.", default=False, panel=_KEYS),
    ] = None,
    max_queue: Annotated[int, option("--max-queue", help="Texts that may wait.", panel=_LIMITS)] = 256,
    max_body: Annotated[int, option("--max-body", help="Bytes of a request body.", panel=_LIMITS)] = 8 << 20,
    max_prompt_tokens: Annotated[
        int | None,
        option("--max-prompt-tokens", help="Tokens of a prompt.", default="what model and pool allow", panel=_LIMITS),
    ] = None,
    max_prompts: Annotated[int, option("--max-prompts", help="Prompts of one request.", panel=_LIMITS)] = 1024,
    max_connections: Annotated[int, option("--max-connections", help="HTTP requests at a time.", panel=_LIMITS)] = 1024,
    request_timeout: Annotated[
        float, option("--request-timeout", help="Seconds that a request may take.", panel=_LIMITS)
    ] = 600.0,
    body_timeout: Annotated[
        float, option("--body-timeout", help="Seconds in which its body must arrive.", panel=_LIMITS)
    ] = 30.0,
    write_timeout: Annotated[
        float, option("--write-timeout", help="Seconds that a client may not read.", panel=_LIMITS)
    ] = 30.0,
    drain_timeout: Annotated[
        float, option("--drain-timeout", help="Seconds that requests have after SIGTERM.", panel=_LIMITS)
    ] = 30.0,
    vllm_metrics: Annotated[
        bool, option("--vllm-metrics", help="Export the metrics under vLLM's names, too.", panel=_SHOW)
    ] = False,
    record_events: Annotated[
        Path | None,
        option("--record-events", help="Write the KV events to this file.", default=False, panel=_SHOW),
    ] = None,
    events_endpoint: Annotated[
        str | None,
        option("--events-endpoint", help="Publish the KV events: tcp://*:5557", default=False, panel=_SHOW),
    ] = None,
    show_tokens: Annotated[
        bool, option("--show-tokens", help="Show token text of prompts in /v1/cache.", panel=_SHOW)
    ] = False,
    log_format: Annotated[str, option("--log-format", help="text or json.", panel=_SHOW)] = "text",
    debug: Annotated[bool, option("--debug", help="Show the traceback of an error.", panel=_SHOW)] = False,
) -> None:
    """Gather the options and serve."""
    with failures_in_one_line(debug):
        pass
        pass

        engine = EngineOptions(
            model=model,
            device=device,
            dtype=dtype,
            num_blocks=num_blocks,
            block_size=block_size,
            strategy=strategy,
            prefix_caching=prefix_caching,
            max_num_seqs=max_num_seqs,
            max_batch_tokens=max_batch_tokens,
            kv_dtype=kv_dtype,
            cuda_graphs=cuda_graphs,
        )
        run(
            engine,
            name=name,
            host=host,
            port=port,
            api_keys=(*(api_key or ()), *read_keys(api_key_file)),
            operator_keys=tuple(operator_key or ()),
            shared_cache=shared_cache,
            allow_origins=tuple(allow_origin or ()),
            chat_template=read_text("--chat-template", chat_template),
            max_queue=max_queue,
            max_body=max_body,
            max_prompt_tokens=max_prompt_tokens,
            max_prompts=max_prompts,
            max_connections=max_connections,
            request_timeout=request_timeout,
            body_timeout=body_timeout,
            write_timeout=write_timeout,
            drain_timeout=drain_timeout,
            vllm_metrics=vllm_metrics,
            record_events=record_events,
            events_endpoint=events_endpoint,
            show_tokens=show_tokens,
            log_format=log_format,
        )


# What ``pagedkv serve`` reads from files before it starts.


def read_keys(path: Path | None) -> tuple[str, ...]:
    """Return the keys of a file, one a line; empty lines and lines that begin with # do not count.

    Raises
    ------
    Failure
        It cannot be read, or holds no key.
    """
    text = read_text("--api-key-file", path)
    if text is None:
        return ()
    lines = [line.strip() for line in text.splitlines()]
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if not keys:
        raise Failure(f"--api-key-file: {path} holds no key: expected one a line")
    return keys


def read_text(option: str, path: Path | None) -> str | None:
    """Return the text of a file; None without one.

    Raises
    ------
    Failure
        It cannot be read.
    """
    if path is None:
        return None
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Failure(f"{option}: cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
