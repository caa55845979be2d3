"""pagedkv: the paged KV cache for LLM inference."""

__version__ = "0.1.0"
