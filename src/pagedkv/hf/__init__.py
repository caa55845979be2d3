"""Hugging Face transformers over the paged cache."""
