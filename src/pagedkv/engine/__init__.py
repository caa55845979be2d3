"""Continuous batching over one cache: many requests, one forward pass a step."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pagedkv.engine.async_engine import AsyncEngine
    from pagedkv.engine.core import EngineCore
    from pagedkv.engine.llm import LLM
    from pagedkv.engine.request import CompletionOutput, Logprob, Request, RequestMetrics, RequestOutput
    from pagedkv.engine.sampling_params import SamplingParams
    from pagedkv.engine.snapshot import EngineSizes, EngineSnapshot, EngineStats
    from pagedkv.engine.structured import Structured
    from pagedkv.errors import EngineDead, RequestRefused
    from pagedkv.tiers.rung import TierFigures

__all__ = [
    "AsyncEngine",
    "CompletionOutput",
    "EngineCore",
    "EngineDead",
    "EngineSizes",
    "EngineSnapshot",
    "EngineStats",
    "LLM",
    "Logprob",
    "Request",
    "RequestMetrics",
    "RequestOutput",
    "RequestRefused",
    "SamplingParams",
    "Structured",
    "TierFigures",
]

_HOMES = {
    "AsyncEngine": "pagedkv.engine.async_engine",
    "CompletionOutput": "pagedkv.engine.request",
    "EngineCore": "pagedkv.engine.core",
    "EngineDead": "pagedkv.errors",
    "EngineSizes": "pagedkv.engine.snapshot",
    "EngineSnapshot": "pagedkv.engine.snapshot",
    "EngineStats": "pagedkv.engine.snapshot",
    "LLM": "pagedkv.engine.llm",
    "Logprob": "pagedkv.engine.request",
    "Request": "pagedkv.engine.request",
    "RequestMetrics": "pagedkv.engine.request",
    "RequestOutput": "pagedkv.engine.request",
    "RequestRefused": "pagedkv.errors",
    "SamplingParams": "pagedkv.engine.sampling_params",
    "Structured": "pagedkv.engine.structured",
    "TierFigures": "pagedkv.tiers.rung",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pagedkv.engine' has no attribute {name!r}")
    try:
        module = importlib.import_module(_HOMES[name])
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "transformers"):
            raise
        from pagedkv.errors import MissingExtra

        raise MissingExtra(error.name, "hf") from error
    value = getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
