"""Hugging Face transformers over the paged cache."""

from __future__ import annotations

from pagedkv.hf.cache import PagedCache
from pagedkv.hf.generate import generate
from pagedkv.hf.streaming import StreamingSession

__all__ = ["PagedCache", "StreamingSession", "generate"]
