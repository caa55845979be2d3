"""Hugging Face transformers over the paged cache."""

from __future__ import annotations

from pagedkv.hf.cache import PagedCache
from pagedkv.hf.generate import generate
from pagedkv.hf.load import load_runner
from pagedkv.hf.pool import CacheReport, block_format
from pagedkv.hf.runner import ModelRunner
from pagedkv.hf.streaming import StreamingSession

__all__ = ["CacheReport", "ModelRunner", "PagedCache", "StreamingSession", "block_format", "generate", "load_runner"]
