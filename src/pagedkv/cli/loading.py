"""Loads a model folder from the disk, never from a network, and says what is wrong with it."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from pagedkv.cli.terminal import Failure

# Of keys and values in the cache, the most exact first.
KV_DTYPES = ("float32", "bfloat16", "float16", "int8", "fp8")


@dataclass(frozen=True)
class LoadedModel:
    """A model with its tokenizer."""

    model: Any  # transformers.PreTrainedModel in evaluation mode, in the dtype of its folder
    tokenizer: Any  # transformers.PreTrainedTokenizerBase

    def encode(self, prompt: str) -> list[int]:
        """Return the token ids of a prompt; `Failure` where there are none, or the model has no embedding for one."""
        ids: list[int] = self.tokenizer(prompt)["input_ids"]
        if not ids:
            raise Failure("the prompt has no tokens")
        known = self.model.get_input_embeddings().num_embeddings
        if max(ids) >= known:
            raise Failure(f"the tokenizer does not fit the model: it gives token {max(ids)}, the model knows {known}")
        return ids


def check_folder(path: Path) -> None:
    """Raise `Failure` where a folder cannot be a model, before anything heavy is imported."""
    if not path.exists():
        raise Failure(f"--model: there is no folder {path}")
    if not path.is_dir():
        raise Failure(f"--model: expected a folder in the Hugging Face format, got the file {path}")
    config = path / "config.json"
    if not config.is_file():
        raise Failure(f"--model: {path} has no config.json, so it is no Hugging Face model folder")
    try:
        parsed = json.loads(config.read_bytes())
    except (ValueError, OSError) as error:
        raise Failure(f"--model: {config} is no valid JSON: {error}") from error
    if not isinstance(parsed, dict) or "model_type" not in parsed:
        raise Failure(f"--model: {config} names no model_type")
    if not any(path.glob("*.safetensors")) and not any(path.glob("pytorch_model*.bin")):
        raise Failure(f"--model: {path} holds no weights: expected model.safetensors")


def load_model(path: Path, device: str) -> LoadedModel:
    """Load a checked folder; `Failure` where a part of it is broken or missing, or there is no such device."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import_module("torch")  # first: where it is missing, transformers goes on without it and prints advice
    transformers: Any = import_module("transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    target = torch_device(device)
    only_here = {"local_files_only": True, "trust_remote_code": False}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, **only_here)
    except Exception as error:
        raise Failure(f"--model: {path} has no tokenizer that can be read: {_first_line(error)}") from error
    try:
        model, found = transformers.AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **only_here)
    except Exception as error:
        raise Failure(f"--model: cannot load {path}: {_first_line(error)}") from error
    _refuse_missing_weights(path, found["missing_keys"])
    return LoadedModel(model.to(target).eval(), tokenizer)


def torch_device(name: str) -> Any:
    """Return a device of torch that can be used, or say why it cannot."""
    import torch

    try:
        device = torch.device(name)
        torch.empty(1, device=device).cpu()
    except Exception as error:
        raise Failure(f"--device {name} cannot be used: {_first_line(error)}") from error
    return device


def _refuse_missing_weights(path: Path, missing: set[str]) -> None:
    # transformers would fill them with random numbers.
    if missing:
        raise Failure(f"--model: the weights of {path} lack {len(missing)} tensors, {min(missing)} for one")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).partition("\n")[0]
