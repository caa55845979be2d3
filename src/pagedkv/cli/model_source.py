"""Where a model comes from: a folder, a GGUF file, the local Hugging Face cache, or the hub where it can be reached."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from pagedkv.cli.terminal import Failure
from pagedkv.errors import MissingExtra
from pagedkv.models import shipped_model_path

HUB_SECONDS = 8.0
"""How long the hub may take to say whether it has a model: without a network a name alone can take minutes."""

_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(@[\w./-]+)?")
_WANTED = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
"""What is fetched of a model: PyTorch's older pickles, ONNX and the like are not."""


MODEL_HELP = "A Hugging Face model folder, a GGUF file, or a name in the Hugging Face cache or at the hub."
ModelArgument = Annotated[str | None, typer.Argument(help=MODEL_HELP, show_default="the shipped model")]
"""What a command takes as its first word."""


@dataclass(frozen=True)
class ModelSource:
    """A model that lies on this machine.

    Attributes
    ----------
    path : Path
        A folder in the Hugging Face format, or a GGUF file.
    name : str
        What a user calls it.
    """

    path: Path
    name: str

    @property
    def is_gguf(self) -> bool:
        """Whether it is one file, which transformers turns into plain weights when it is loaded."""
        return self.path.is_file()


def find_model(given: str | Path | None, argument: str = "--model") -> ModelSource:
    """Find the model that a user names, before anything heavy is imported; the shipped one where none is named.

    A path that is there goes before a name. A name is looked up in the local Hugging Face cache, and then at the hub,
    from which it is fetched if it can be reached.

    Raises
    ------
    Failure
        There is no such model, or it cannot be one; says what to do.
    MissingExtra
        A GGUF file was named, and what reads it is not installed.
    """
    path = shipped_model_path() if given is None else Path(given).expanduser()
    if path.is_file():
        return _gguf(path, argument)
    if path.exists() or not _is_name(given):
        check_folder(path, argument)
        return ModelSource(path, path.resolve().name)
    name, _, revision = str(given).partition("@")
    folder = _cached(name, revision or None)
    if folder is None and "/" not in name:  # rather a folder that is misspelt than one of the hub's oldest models
        raise Failure(f"{argument}: {_missing(name)}")
    folder = folder or _fetched(name, revision or None, argument)
    check_folder(folder, argument)
    return ModelSource(folder, name)


def _is_name(given: str | Path | None) -> bool:
    """Whether a text may be a name at the hub: one of its own, or of an owner, and no path."""
    return isinstance(given, str) and _NAME.fullmatch(given) is not None


def check_folder(path: Path, argument: str = "--model") -> None:
    """Raise `Failure` where a folder cannot be a model, before anything heavy is imported."""
    if not path.exists():
        raise Failure(f"{argument}: there is no folder {path}")
    if not path.is_dir():
        raise Failure(f"{argument}: expected a folder in the Hugging Face format, got the file {path}")
    config = path / "config.json"
    if not config.is_file():
        files = sorted(path.glob("*.gguf"))
        hint = f"; give it the file itself: {files[0]}" if files else ""
        raise Failure(f"{argument}: {path} has no config.json, so it is no Hugging Face model folder{hint}")
    try:
        parsed = json.loads(config.read_bytes())
    except (ValueError, OSError) as error:
        raise Failure(f"{argument}: {config} is no valid JSON: {error}") from error
    if not isinstance(parsed, dict) or "model_type" not in parsed:
        raise Failure(f"{argument}: {config} names no model_type")
    if not any(path.glob("*.safetensors")) and not any(path.glob("pytorch_model*.bin")):
        raise Failure(f"{argument}: {path} holds no weights: expected model.safetensors")


def _gguf(path: Path, argument: str) -> ModelSource:
    with path.open("rb") as file:
        is_gguf = file.read(4) == b"GGUF"
    if not is_gguf:
        raise Failure(f"{argument}: expected a folder in the Hugging Face format or a GGUF file, got the file {path}")
    for module in ("gguf", "accelerate"):
        if find_spec(module) is None:
            raise MissingExtra(module, "gguf")
    return ModelSource(path, path.stem)


# The local cache of huggingface_hub, and the hub itself.


def _cached(name: str, revision: str | None) -> Path | None:
    """Return the folder of a model in the local cache; None where it is not there."""
    hub = _hub()
    config = hub.try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(config).parent if isinstance(config, str) else None


def _fetched(name: str, revision: str | None, argument: str) -> Path:
    """Fetch a model from the hub into the local cache and return its folder."""
    hub = _hub()
    constants, missing = hub.constants, _missing(name)
    if constants.HF_HUB_OFFLINE:
        raise Failure(f"{argument}: {missing}; the hub was not asked, as HF_HUB_OFFLINE is set")
    try:
        _within(HUB_SECONDS, lambda: hub.HfApi().model_info(name, revision=revision, timeout=HUB_SECONDS / 2))
        folder = hub.snapshot_download(name, revision=revision, allow_patterns=list(_WANTED))
    except hub.errors.GatedRepoError:
        raise Failure(
            f"{argument}: {name} is given to whoever has accepted its terms: log in with `hf auth login`"
        ) from None
    except (hub.errors.RepositoryNotFoundError, hub.errors.RevisionNotFoundError):
        raise Failure(f"{argument}: {missing}, nor at {constants.ENDPOINT}") from None
    except KeyboardInterrupt:
        raise
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise Failure(
            f"{argument}: {missing}; {constants.ENDPOINT} cannot be reached ({reason}): give the folder or the GGUF "
            f"file of a model that is on this machine"
        ) from None
    return Path(folder)


def _missing(name: str) -> str:
    cache = _hub().constants.HF_HUB_CACHE
    return f"there is no folder {name}, and no model of that name in the Hugging Face cache {cache}"


def _hub() -> Any:
    try:
        import huggingface_hub
        from huggingface_hub import constants, errors  # noqa: F401  # attributes of the package from now on
    except ModuleNotFoundError:
        raise MissingExtra("huggingface_hub", "hf") from None
    return huggingface_hub


def _within(seconds: float, call: Callable[[], object]) -> None:
    """Call something that may not come back, and give up: looking a host up knows no timeout."""
    done: Future[None] = Future()

    def run() -> None:
        try:
            call()
            done.set_result(None)
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, daemon=True, name="hub").start()
    try:
        done.result(seconds)
    except TimeoutError:
        raise TimeoutError(f"no answer within {seconds:g} s") from None
