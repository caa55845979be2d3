"""Loads a model that lies on the disk, a folder or a GGUF file, and says what is wrong with it."""

from __future__ import annotations

import gc
import io
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from pagedkv.cli.model_source import ModelSource
from pagedkv.cli.terminal import Failure

# Of keys and values in the cache, the most exact first.
KV_DTYPES = ("float32", "bfloat16", "float16", "int8", "fp8")
# Of a model: as it is stored, which of a GGUF file is bfloat16, or turned into one of these.
DTYPES = ("auto", "float32", "bfloat16", "float16")
WEIGHTS = ("int8",)


def require_kv_dtype(name: str | None) -> None:
    """Raise ``Failure`` where ``--kv-dtype`` was given and cannot be."""
    if name is not None and name not in KV_DTYPES:
        raise Failure(f"--kv-dtype: expected {', '.join(KV_DTYPES)}, got {name}")


def require_weights(name: str | None) -> None:
    """Raise ``Failure`` where ``--weights`` was given and cannot be."""
    if name is not None and name not in WEIGHTS:
        raise Failure(f"--weights: expected {', '.join(WEIGHTS)}, got {name}")


def require_dtype(name: str) -> None:
    """Raise ``Failure`` where ``--dtype`` cannot be."""
    if name not in DTYPES:
        raise Failure(f"--dtype: expected {', '.join(DTYPES)}, got {name}")


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

    def chat_text(self, messages: Sequence[Mapping[str, str]], *, open_answer: bool = True) -> str:
        """Return a conversation as the chat template writes it, by default up to where the answer begins.

        `Failure` where the template does not take the messages.
        """
        try:
            text: str = self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=open_answer
            )
        except Exception as error:  # templates refuse by raising, a system message for instance
            raise Failure(f"the chat template of the model refuses the prompt: {_first_line(error)}") from error
        return text

    def encode_chat(self, prompt: str, system: str | None = None) -> list[int]:
        """Return the token ids of a user's message, behind a system message, up to where the answer begins.

        `Failure` as in `encode` and `chat_text`.
        """
        said = [] if system is None else [{"role": "system", "content": system}]
        said.append({"role": "user", "content": prompt})
        try:
            text = self.chat_text(said)
        except Failure as refusal:
            raise Failure(f"{refusal}; --raw goes on from the text itself") from refusal.__cause__
        return self.encode_part(text)

    def encode_part(self, text: str) -> list[int]:
        """Return the token ids of a part of a text, without those that open one; `Failure` as in `encode`."""
        return self._checked(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _checked(self, ids: list[int]) -> list[int]:
        if not ids:
            raise Failure("the prompt has no tokens")
        known = self.model.get_input_embeddings().num_embeddings
        if max(ids) >= known:
            raise Failure(f"the tokenizer does not fit the model: it gives token {max(ids)}, the model knows {known}")
        return ids


def load_model(source: ModelSource, device: str, dtype: str = "auto") -> LoadedModel:
    """Load a model that was found; `Failure` where a part of it is broken or missing, or there is no such device."""
    transformers, target = _transformers(), torch_device(device)
    tokenizer = load_tokenizer(source)
    return LoadedModel(_weights(transformers, source, dtype, "--model").to(target).eval(), tokenizer)


def load_tokenizer(source: ModelSource) -> Any:
    """Load the tokenizer of a model that was found; `Failure` where it cannot be read."""
    place, where = _place(source)
    try:
        return _transformers().AutoTokenizer.from_pretrained(place, **where, **_ONLY_HERE)
    except Exception as error:
        raise Failure(f"--model: {source.path} has no tokenizer that can be read: {_first_line(error)}") from error


def load_weights(source: ModelSource, device: str, argument: str) -> Any:
    """Load a model that was found without its tokenizer; `Failure` as of `load_model`, naming the argument."""
    transformers, target = _transformers(), torch_device(device)
    return _weights(transformers, source, "auto", argument).to(target).eval()


def _place(source: ModelSource) -> tuple[str, dict[str, str]]:
    """Return where transformers looks for a model, and which file it reads there."""
    if source.is_gguf:
        return str(source.path.parent), {"gguf_file": source.path.name}
    return str(source.path), {}


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


def _weights(transformers: Any, source: ModelSource, dtype: str, argument: str) -> Any:
    import torch

    place, where = _place(source)
    options: dict[str, Any] = {**where, **_ONLY_HERE, "dtype": "auto" if dtype == "auto" else getattr(torch, dtype)}
    if source.is_gguf:
        options["dtype"] = torch.bfloat16 if dtype == "auto" else options["dtype"]
        if hasattr(transformers, "GgufConfig"):  # newer ones leave weights packed, which only their own modules read
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    bars = redirect_stderr(io.StringIO()) if source.is_gguf else nullcontext()  # that nothing else turns off
    try:
        with bars:
            model, found = transformers.AutoModelForCausalLM.from_pretrained(place, output_loading_info=True, **options)
    except Exception as error:
        raise Failure(f"{argument}: cannot load {source.path}: {_first_line(error)}") from error
    missing = found["missing_keys"]
    if missing:  # transformers would fill them with random numbers
        raise Failure(f"{argument}: the weights of {source.path} lack {len(missing)} tensors, {min(missing)} for one")
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
