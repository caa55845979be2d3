"""ServerConfig: what the operator decides."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pagedkv.errors import bad_argument

__all__ = ["ServerConfig"]

MIB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """What the operator of a server decides. All limits hold for the whole server.

    Parameters
    ----------
    model_name : str
        The name of the model in the API.
    host, port : str, int
        Where it listens; port 0 takes a free one.
    api_keys : tuple of str
        Who may call. None: everybody may.
    operator_keys : tuple of str
        Who may also see and clear the cache. None: everybody who may call, unless several tenants are kept apart.
    shared_cache : bool
        Let the holders of different keys reuse each other's prefixes.
    max_queue : int
        Sequences that may wait beyond those that the engine runs at once; more are answered with 429.
    max_body : int
        Bytes of a request body.
    max_prompt_tokens : int, optional
        Tokens of a prompt; None: what the model and the pool allow.
    max_prompts : int
        Prompts of one request.
    request_timeout, body_timeout, write_timeout : float
        Seconds: for a whole request, for its body to arrive, and for a client to take what is sent to it.
    max_connections : int
        HTTP requests under way at a time.
    drain_timeout : float
        Seconds that running requests have after SIGTERM.
    allow_origins : tuple of str
        Origins of web pages that may call; ``"*"`` for all.
    chat_template : str, optional
        A Jinja template instead of the tokenizer's.
    vllm_metrics : bool
        Export the metrics under vLLM's names, too.
    show_tokens : bool
        Let the cache endpoints show token text.
    record_events : Path, optional
        Write the KV events to this file.
    events_endpoint : str, optional
        Publish the KV events over ZMQ here.
    log_format : {"text", "json"}

    Raises
    ------
    InvalidOperation
        A value makes no sense.
    """

    model_name: str = "default"
    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    operator_keys: tuple[str, ...] = ()
    shared_cache: bool = False
    max_queue: int = 256
    max_body: int = 8 * MIB
    max_prompt_tokens: int | None = None
    max_prompts: int = 1024
    request_timeout: float = 600.0
    body_timeout: float = 30.0
    write_timeout: float = 30.0
    max_connections: int = 1024
    drain_timeout: float = 30.0
    allow_origins: tuple[str, ...] = ()
    chat_template: str | None = None
    vllm_metrics: bool = False
    show_tokens: bool = False
    record_events: Path | None = None
    events_endpoint: str | None = None
    log_format: Literal["text", "json"] = "text"

    def __post_init__(self) -> None:
        _check_numbers(self)
        if not self.model_name:
            raise bad_argument("model_name", "a name", "an empty text")
        for name in ("api_keys", "operator_keys"):
            if not all(getattr(self, name)):
                raise bad_argument(name, "keys that are not empty")
        if self.operator_keys and not self.api_keys:
            raise bad_argument("operator_keys", "api_keys beside them: without them everybody may call")
        if self.log_format not in ("text", "json"):
            raise bad_argument("log_format", "'text' or 'json'", f"{self.log_format!r}")


_LEAST = {"port": 0, "max_queue": 0, "max_body": 1, "max_prompts": 1, "max_connections": 1, "drain_timeout": 0}


def _check_numbers(config: ServerConfig) -> None:
    for name, least in _LEAST.items():
        value = getattr(config, name)
        if not value >= least or math.isinf(value):
            raise bad_argument(name, f"at least {least}", f"{value}")
    if config.port > 65535:
        raise bad_argument("port", "at most 65535", f"{config.port}")
    if config.max_prompt_tokens is not None and config.max_prompt_tokens < 1:
        raise bad_argument("max_prompt_tokens", "at least 1", f"{config.max_prompt_tokens}")
    for name in ("request_timeout", "body_timeout", "write_timeout"):
        value = getattr(config, name)
        if not 0 < value < math.inf:
            raise bad_argument(name, "seconds above 0", f"{value}")
