"""Loads a model folder from the disk, never from a network, and says what is wrong with it."""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from pagedkv.cli.terminal import Failure

# Of keys and values in the cache, the most exact first.
KV_DTYPES = ("float32", "bfloat16", "float16", "int8", "fp8")
WEIGHTS = ("int8",)


@dataclass(frozen=True)
class LoadedModel:
    """A model with its tokenizer."""

    model: Any  # transformers.PreTrainedModel in evaluation mode, in the dtype of its folder
    tokenizer: Any  # transformers.PreTrainedTokenizerBase

    def encode(self, prompt: str) -> list[int]:
        """Return the token ids of a prompt; `Failure` where there are none, or the model has no embedding for one."""
        return self._checked(self.tokenizer(prompt)["input_ids"])

    @property
    def has_chat_template(self) -> bool:
        """Whether the model says how a conversation is written."""
        return bool(getattr(self.tokenizer, "chat_template", None))

    def encode_chat(self, prompt: str, system: str | None = None) -> list[int]:
        """Return the token ids of a user's message, behind a system message, up to where the answer begins.

        `Failure` as in `encode`, or where the template does not take the messages.
        """
        said = [] if system is None else [{"role": "system", "content": system}]
        said.append({"role": "user", "content": prompt})
        try:
            text = self.tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # templates refuse by raising, a system message for instance
            told = f"the chat template of the model refuses the prompt: {_first_line(error)}"
            raise Failure(f"{told}; --raw goes on from the text itself") from error
        return self._checked(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _checked(self, ids: list[int]) -> list[int]:
        if not ids:
            raise Failure("the prompt has no tokens")
        known = self.model.get_input_embeddings().num_embeddings
        if max(ids) >= known:
            raise Failure(f"the tokenizer does not fit the model: it gives token {max(ids)}, the model knows {known}")
        return ids


def check_folder(path: Path, argument: str = "--model") -> None:
    """Raise `Failure` where a folder cannot be a model, before anything heavy is imported."""
    if not path.exists():
        raise Failure(f"{argument}: there is no folder {path}")
    if not path.is_dir():
        raise Failure(f"{argument}: expected a folder in the Hugging Face format, got the file {path}")
    config = path / "config.json"
    if not config.is_file():
        raise Failure(f"{argument}: {path} has no config.json, so it is no Hugging Face model folder")
    try:
        parsed = json.loads(config.read_bytes())
    except (ValueError, OSError) as error:
        raise Failure(f"{argument}: {config} is no valid JSON: {error}") from error
    if not isinstance(parsed, dict) or "model_type" not in parsed:
        raise Failure(f"{argument}: {config} names no model_type")
    if not any(path.glob("*.safetensors")) and not any(path.glob("pytorch_model*.bin")):
        raise Failure(f"{argument}: {path} holds no weights: expected model.safetensors")


def load_model(path: Path, device: str) -> LoadedModel:
    """Load a checked folder; `Failure` where a part of it is broken or missing, or there is no such device."""
    transformers, target = _transformers(), torch_device(device)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, **_ONLY_HERE)
    except Exception as error:
        raise Failure(f"--model: {path} has no tokenizer that can be read: {_first_line(error)}") from error
    return LoadedModel(_weights(transformers, path, "--model").to(target).eval(), tokenizer)


def load_weights(path: Path, device: str, argument: str) -> Any:
    """Load a checked folder without its tokenizer; `Failure` as of `load_model`, naming the argument."""
    transformers, target = _transformers(), torch_device(device)
    return _weights(transformers, path, argument).to(target).eval()


_ONLY_HERE = {"local_files_only": True, "trust_remote_code": False}


def _transformers() -> Any:
    """Import transformers, quiet and without a network."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    with _out_of_sight("transformers"):
        import_module("torch")  # first: where it is missing, transformers goes on without it and prints advice
        transformers: Any = import_module("transformers")
        transformers.AutoModelForCausalLM, transformers.AutoTokenizer  # noqa: B018  # most is imported by these
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


@contextmanager
def _out_of_sight(module: str) -> Iterator[None]:
    """Import a module in the body, if it is not yet, without the garbage collector.

    It would look at everything that the module makes, again and again: a third of the time that the import takes.
    """
    if module in sys.modules:
        yield
        return
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()


def _weights(transformers: Any, path: Path, argument: str) -> Any:
    try:
        model, found = transformers.AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **_ONLY_HERE)
    except Exception as error:
        raise Failure(f"{argument}: cannot load {path}: {_first_line(error)}") from error
    missing = found["missing_keys"]
    if missing:  # transformers would fill them with random numbers
        raise Failure(f"{argument}: the weights of {path} lack {len(missing)} tensors, {min(missing)} for one")
    return model


def torch_device(name: str) -> Any:
    """Return a device of torch that can be used, or say why it cannot."""
    import torch

    try:
        device = torch.device(name)
        torch.empty(1, device=device).cpu()
    except Exception as error:
        raise Failure(f"--device {name} cannot be used: {_first_line(error)}") from error
    return device


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).partition("\n")[0]
