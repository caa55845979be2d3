"""Hugging Face transformers over the paged cache."""

from __future__ import annotations

from pagedkv.hf.cache import PagedCache
from pagedkv.hf.generate import generate

__all__ = ["PagedCache", "generate"]
