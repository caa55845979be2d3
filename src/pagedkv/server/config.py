"""Server configuration: each setting is spelled once for the library, the command line and a config file."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from pagedkv.errors import bad_argument
from pagedkv.server.tool_parsers import PARSERS

MIB = 1 << 20
_MODEL, _KEYS, _LIMITS, _SHOW = "The model", "Who may call", "Limits", "What to show"


def setting(
    default: Any,
    help: str,
    *,
    group: str | None = None,
    flag: str | None = None,
    env: str | None = None,
    shown: str | bool = True,
    from_file: bool = False,
) -> Any:
    """Return a field of a dataclass that is also an option of a command.

    Parameters
    ----------
    default : object
    help : str
        What it means, in a line.
    group : str, optional
        The panel of the help.
    flag : str, optional
        The option, where it is not the name of the field with dashes.
    env : str, optional
        A variable of the environment that sets it, too.
    shown : str or bool
        Whether the help shows the default, or as what.
    from_file : bool
        Whether the option names a file that holds the value.
    """
    told = {"help": help, "group": group, "flag": flag, "env": env, "shown": shown, "from_file": from_file}
    return field(default=default, metadata=told)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """What the operator of a server decides. All limits hold for the whole server; of most, a key has a share.

    Every field is an option of ``pagedkv serve`` and a key of its ``--config`` file.

    Raises
    ------
    InvalidOperation
        A value makes no sense.
    """

    host: str = setting("127.0.0.1", "The address to listen on; 0.0.0.0 for all.")
    port: int = setting(8000, "0 takes a free one.", flag="--port,-p")
    model_name: str | None = setting(
        None, "The name of the model in the API.", flag="--served-model-name", group=_MODEL, shown="that of the folder"
    )
    chat_template: str | None = setting(
        None, "A Jinja template instead of the tokenizer's.", group=_MODEL, shown=False, from_file=True
    )
    tool_parser: str | None = setting(
        None,
        f"How the model writes calls of tools: {', '.join(PARSERS)}.",
        group=_MODEL,
        shown="as its chat template says",
    )
    trust_request_chat_template: bool = setting(False, "Let requests bring chat templates.", group=_MODEL)
    api_keys: tuple[str, ...] = setting(
        (),
        "A key that may call; give it again for more. Other users of the machine can see it.",
        flag="--api-key",
        env="PAGEDKV_API_KEYS",
        group=_KEYS,
        shown=False,
    )
    operator_keys: tuple[str, ...] = setting(
        (),
        "A key that may also see and clear the cache of all.",
        flag="--operator-key",
        env="PAGEDKV_OPERATOR_KEYS",
        group=_KEYS,
        shown=False,
    )
    shared_cache: bool = setting(False, "Let different keys reuse each other's prefixes.", group=_KEYS)
    allow_origins: tuple[str, ...] = setting(
        (), "A web origin whose pages may call; * for all.", flag="--allow-origin", group=_KEYS, shown=False
    )
    allow_hosts: tuple[str, ...] = setting(
        (),
        "A host name by which clients may call, beside addresses and localhost; * for all. With keys all may.",
        flag="--allow-host",
        group=_KEYS,
        shown=False,
    )
    max_queue: int = setting(256, "Texts that may wait beside those that are written.", group=_LIMITS)
    max_body: int = setting(8 * MIB, "Bytes of a request body.", group=_LIMITS)
    max_bodies: int = setting(64 * MIB, "Bytes of all large request bodies under way.", group=_LIMITS)
    max_key_share: float = setting(
        0.5,
        "The part of requests, bodies and texts under way that one key may have, where there are several.",
        group=_LIMITS,
    )
    max_prompt_tokens: int | None = setting(
        None, "Tokens of a prompt.", group=_LIMITS, shown="what model and pool allow"
    )
    max_prompts: int = setting(1024, "Prompts of one request.", group=_LIMITS)
    max_responses: int = setting(
        64 * MIB, "Bytes of responses that are kept, with their conversations, for previous_response_id.", group=_LIMITS
    )
    max_connections: int = setting(
        1024, "HTTP requests under way at a time; four times as many connections may be idle.", group=_LIMITS
    )
    request_timeout: float = setting(600.0, "Seconds that a request may take.", group=_LIMITS)
    head_timeout: float = setting(10.0, "Seconds in which a request must begin and its head arrive.", group=_LIMITS)
    body_timeout: float = setting(30.0, "Seconds in which its body must arrive.", group=_LIMITS)
    write_timeout: float = setting(30.0, "Seconds that a client may not read.", group=_LIMITS)
    drain_timeout: float = setting(30.0, "Seconds that requests have after SIGTERM.", group=_LIMITS)
    vllm_metrics: bool = setting(False, "Export the metrics under vLLM's names, too.", group=_SHOW)
    record_events: Path | None = setting(None, "Write the KV events to this file.", group=_SHOW, shown=False)
    events_endpoint: str | None = setting(
        None, "Publish the KV events over ZMQ: tcp://*:5557", group=_SHOW, shown=False
    )
    events_token_ids: bool = setting(False, "Let published KV events carry token ids beyond this machine.", group=_SHOW)
    show_tokens: bool = setting(False, "Show token text of prompts in /v1/cache.", group=_SHOW)
    log_format: Literal["text", "json"] = setting("text", "text or json.", group=_SHOW)

    @property
    def has_tenants(self) -> bool:
        """Whether there are several keys."""
        return len({*self.api_keys, *self.operator_keys}) > 1

    @property
    def key_share(self) -> float:
        """The part of what may be under way that one key may have."""
        return self.max_key_share if self.has_tenants else 1.0

    def __post_init__(self) -> None:
        _check_numbers(self)
        if self.model_name == "":
            raise bad_argument("model_name", "a name", "an empty text")
        for name in ("api_keys", "operator_keys"):
            if not all(getattr(self, name)):
                raise bad_argument(name, "keys that are not empty")
        if self.operator_keys and not self.api_keys:
            raise bad_argument("operator_keys", "api_keys beside them: without them everybody may call")
        if not 0 < self.max_key_share <= 1:
            raise bad_argument("max_key_share", "a part above 0, at most 1", f"{self.max_key_share}")
        if self.tool_parser not in (None, *PARSERS):
            raise bad_argument("tool_parser", f"one of {', '.join(PARSERS)}", f"{self.tool_parser!r}")
        if self.log_format not in ("text", "json"):
            raise bad_argument("log_format", "'text' or 'json'", f"{self.log_format!r}")


_parameters = "".join(
    f"\n    {each.name} : {each.type}\n        {each.metadata['help']}" for each in fields(ServerConfig)
)
ServerConfig.__doc__ = str(ServerConfig.__doc__).replace(
    "    Raises\n", f"    Parameters\n    ----------{_parameters}\n\n    Raises\n"
)

_LEAST = {
    "port": 0,
    "max_queue": 0,
    "max_body": 1,
    "max_bodies": 1,
    "max_prompt_tokens": 1,
    "max_prompts": 1,
    "max_responses": 0,
    "max_connections": 1,
    "drain_timeout": 0,
}


def _check_numbers(config: ServerConfig) -> None:
    for name, least in _LEAST.items():
        value = getattr(config, name)
        if value is not None and (not value >= least or math.isinf(value)):
            raise bad_argument(name, f"at least {least}", f"{value}")
    if config.port > 65535:
        raise bad_argument("port", "at most 65535", f"{config.port}")
    for name in ("request_timeout", "head_timeout", "body_timeout", "write_timeout"):
        value = getattr(config, name)
        if not 0 < value < math.inf:
            raise bad_argument(name, "seconds above 0", f"{value}")
