"""Tiers inside vLLM: a KV connector that keeps prefixes in memory of the host, on a disk and on a shared server."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pagedkv.vllm.connector import PagedKvConnector
    from pagedkv.vllm.options import ConnectorOptions

__all__ = ["ConnectorOptions", "PagedKvConnector"]

_HOMES = {"ConnectorOptions": "pagedkv.vllm.options", "PagedKvConnector": "pagedkv.vllm.connector"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pagedkv.vllm' has no attribute {name!r}")
    try:
        module = importlib.import_module(_HOMES[name])
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in ("vllm", "torch"):
            raise
        from pagedkv.errors import MissingExtra

        raise MissingExtra(missing, missing) from error
    value = getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
