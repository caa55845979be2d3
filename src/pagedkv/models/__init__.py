"""The model that is always there: a small Llama that writes Python, shipped inside the package."""

from __future__ import annotations

from pathlib import Path

__all__ = ["shipped_model_path"]


def shipped_model_path() -> Path:
    """Return the Hugging Face folder of the shipped model.

    It holds ``config.json``, ``generation_config.json``, ``model.safetensors`` (bfloat16), ``tokenizer.json``,
    ``tokenizer_config.json`` and ``MODEL_CARD.md``, and loads without a network: any function that takes the path
    of a Hugging Face folder takes this one. Importing this module imports neither torch nor transformers.

    Returns
    -------
    pathlib.Path
        An absolute path.
    """
    return Path(__file__).resolve().parent / "pysmall"
