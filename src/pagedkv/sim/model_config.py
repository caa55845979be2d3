"""Model configs: ``config.json`` of all families, by name, path or text; its fields, checked."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from pagedkv.errors import ModelConfigError

_PRESETS = Path(__file__).resolve().parent / "presets"
_MAX_BYTES = 16 * 2**20
MAX_COUNT = 2**31 - 1
_OUTSIDE = ("dtype", "torch_dtype", "tie_word_embeddings")  # of a nested config, where that is silent
_NESTED = ("text_config", "llm_config", "language_config", "thinker_config")
# What published configs leave to the defaults of their family.
_FAMILY_DEFAULTS = {
    "gemma3_text": {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 262_208},
}


class ConfigFields:
    """The fields of a config, typed: a wrong or missing one is a `ModelConfigError` that names it and the `source`.

    The values are as read from JSON; null counts as missing.
    """

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self.source = source
        self._values = {name: value for name, value in values.items() if value is not None}

    def __contains__(self, name: str) -> bool:
        return name in self._values

    @property
    def model_type(self) -> str:
        """The family, ``"llama"`` say; empty where the config does not tell."""
        return self.text("model_type", default="")

    def error(self, field: str, reason: str) -> ModelConfigError:
        """Return the error to raise for a field."""
        return ModelConfigError(self.source, field, reason)

    def first(self, names: tuple[str, ...]) -> tuple[str, Any]:
        """Return the first of the names that is there, and its value; the first name and None where none is."""
        return next(((name, self._values[name]) for name in names if name in self._values), (names[0], None))

    def integer(self, *names: str, default: int | None = None, low: int = 1) -> int:
        """Return an int in ``low … 2**31 − 1`` that the config keeps under one of the names."""
        name, value = self.first(names)
        if value is None:
            if default is None:
                others = f" (or {', '.join(names[1:])})" if names[1:] else ""
                raise self.error(name, f"expected an int ≥ {low}{others}, got nothing: the field is missing")
            return default
        return self.checked(name, value, low)

    def checked(self, name: str, value: object, low: int = 1) -> int:
        """Return a value as an int in ``low … 2**31 − 1``."""
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= MAX_COUNT:
            raise self.error(name, f"expected an int in {low} … {MAX_COUNT}, got {_shown(value)}")
        return value

    def optional(self, *names: str, low: int = 1) -> int | None:
        """Return an int, or None where the config has none of the names."""
        return self.integer(*names, low=low) if any(name in self for name in names) else None

    def flag(self, name: str, default: bool = False) -> bool:
        """Return true or false."""
        value = self._values.get(name, default)
        if not isinstance(value, bool):
            raise self.error(name, f"expected true or false, got {_shown(value)}")
        return value

    def text(self, name: str, default: str) -> str:
        """Return a string."""
        value = self._values.get(name, default)
        if not isinstance(value, str):
            raise self.error(name, f"expected a string, got {_shown(value)}")
        return value

    def items(self, name: str, count: int | None = None) -> list[Any] | None:
        """Return a list, of `count` entries where that is given, or None where the field is missing."""
        value = self._values.get(name)
        if value is None:
            return None
        if not isinstance(value, list) or (count is not None and len(value) != count):
            wanted = "a list" if count is None else f"a list with one entry for each of {count} layers"
            got = f"{len(value)} entries" if isinstance(value, list) else _shown(value)
            raise self.error(name, f"expected {wanted}, got {got}")
        return value

    def integers(self, name: str, count: int | None = None, low: int = 0) -> list[int] | None:
        """Return a list of ints, or None where the field is missing."""
        found = self.items(name, count)
        return None if found is None else [self.checked(name, value, low) for value in found]

    def nested(self, name: str) -> ConfigFields:
        """Return the fields of an object inside the config; no fields where it is missing."""
        value = self._values.get(name, {})
        if not isinstance(value, dict):
            raise self.error(name, f"expected an object, got {_shown(value)}")
        return ConfigFields(value, self.source)


def preset_names() -> tuple[str, ...]:
    """Return the names of the model shapes that come with the package."""
    return tuple(sorted(path.stem for path in _PRESETS.glob("*.json")))


def load_config(model: str | Path | Mapping[str, Any]) -> tuple[str, ConfigFields]:
    """Return a short name and the fields of a language model: those of the text part of a multimodal config.

    A model is a preset's name, a ``config.json``, a folder with one, a name in the local hub cache (``Qwen/Qwen3-8B``),
    JSON text that begins with ``{``, or the config.
    """
    source, name = "inline JSON", ""
    if isinstance(model, Mapping):
        values = dict(model)
    elif (text := str(model)).lstrip().startswith("{"):
        values = _decoded(text.encode(), source)
    elif text in preset_names():
        source = name = text
        values = _decoded((_PRESETS / f"{text}.json").read_bytes(), source)
    else:
        cached = None if os.path.lexists(text) else _in_hub_cache(text)
        file, raw = _read(cached or Path(text))
        source, values = str(file), _decoded(raw, str(file))
        name = text if cached else file.resolve().parent.name if file.name == "config.json" else file.stem
    fields = _language_part(values, source)
    return name or fields.model_type or "model", fields


def _read(path: Path) -> tuple[Path, bytes]:
    try:
        file = path / "config.json" if path.is_dir() else path
        with file.open("rb") as stream:
            raw = stream.read(_MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        wanted = "a config.json, a folder with one, a model of the local hub cache, or a known name"
        known = _near(str(path))
        raise ModelConfigError(_shown(str(path)), "", f"expected {wanted}: {known}; {reason}") from None
    if len(raw) > _MAX_BYTES:
        raise ModelConfigError(str(file), "", f"expected a config of at most {_MAX_BYTES >> 20} MiB, this is larger")
    return file, raw


def _near(name: str) -> str:
    """Return the presets and cached models that may have been meant; all presets where none is like the name."""
    known = {_folded(known.rpartition("/")[2]): known for known in (*_cached_names(), *preset_names())}
    asked = _folded(name.rstrip("/").rpartition("/")[2])
    parts = [known[key] for key in sorted(known) if len(asked) > 2 and (asked in key or key in asked)]
    close = [known[key] for key in difflib.get_close_matches(asked, known, n=6, cutoff=0.6)]
    return ", ".join(dict.fromkeys([*close, *parts][:8])) or ", ".join(preset_names())


def _folded(name: str) -> str:
    return re.sub("[-_. ]", "", name.lower())


def _hub_folder() -> Path:
    """Return where Hugging Face's hub keeps what it loaded, by its own variables."""
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return Path(os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub")).expanduser()


def _cached_names() -> list[str]:
    return sorted(
        folder.name.removeprefix("models--").replace("--", "/") for folder in _hub_folder().glob("models--*--*")
    )


def _in_hub_cache(name: str) -> Path | None:
    """Return the config of a cached model, named with or without its owner; of the revision that ``main`` is at."""
    asked = name.lower()
    found = [known for known in _cached_names() if asked in (known.lower(), known.lower().rpartition("/")[2])]
    if len(found) != 1:
        return None
    folder = _hub_folder() / f"models--{found[0].replace('/', '--')}"
    main = folder / "refs" / "main"
    wanted = folder / "snapshots" / main.read_text().strip() if main.is_file() else folder / "snapshots" / "none"
    configs = [wanted / "config.json", *sorted(folder.glob("snapshots/*/config.json"))]
    return next((config for config in configs if config.is_file()), None)


def _decoded(raw: bytes, source: str) -> dict[str, Any]:
    try:
        values = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ModelConfigError(source, "", f"expected a JSON object, this is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ModelConfigError(source, "", f"expected a JSON object, got {_shown(values)}")
    return values


def _language_part(values: dict[str, Any], source: str) -> ConfigFields:
    """Step into the text part of a multimodal config; what is said outside of it holds where it is silent."""
    for name in _NESTED:
        inner = values.get(name)
        if isinstance(inner, dict):
            outer: dict[str, Any] = {k: values[k] for k in _OUTSIDE if k in values}
            stated: dict[str, Any] = {key: value for key, value in inner.items() if value is not None}
            return _language_part({**outer, **stated}, source)
    defaults: dict[str, Any] = _FAMILY_DEFAULTS.get(str(values.get("model_type")), {})
    return ConfigFields({**defaults, **values}, source)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
