"""The options of ``pagedkv serve``. What the command needs is imported when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pagedkv.cli.options import option
from pagedkv.cli.terminal import failures_in_one_line

__all__ = ["EXAMPLES", "serve"]

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
        from pagedkv.cli.serve import EngineOptions, run
        from pagedkv.cli.serve_keys import read_keys, read_text

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
