"""The fingerprint of a model and its cache: whatever keys and values depend on besides token ids."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from pagedkv.errors import bad_argument
from pagedkv.spec import KvCacheSpec
from pagedkv.validate import shown

if TYPE_CHECKING:
    from torch import Tensor


SCHEMA = 1
"""Raised when a release computes other K and V from the same weights, or lays them out in another way."""

_PIECE_BYTES = 16 * 2**20


def fingerprint_of(
    weights: Mapping[str, Tensor], settings: Mapping[str, object], spec: KvCacheSpec, adapter: str = ""
) -> str:
    """Return what tells blocks of this model from those of any other: 32 hexadecimal digits.

    All weights are read (xxh3, 128 bits, some 15 GB/s), as a name or a revision says nothing of what was trained,
    merged or quantised since.

    Parameters
    ----------
    weights : mapping of str to Tensor
        ``model.state_dict()``.
    settings : mapping
        What else the numbers depend on: ``model.config.to_dict()`` with its rope and attention settings, the kind of
        attention, numerics. What JSON does not know is taken by its ``str``.
    spec : KvCacheSpec
        Shapes of the layers, dtype, layout and block size; the number of blocks plays no part.
    adapter : str
        The name of an adapter that is in force, and its version.

    Raises
    ------
    InvalidOperation
        If an argument is of another type.
    """
    if not isinstance(weights, Mapping):
        raise bad_argument("weights", "a mapping of names to tensors", shown(weights))
    if not isinstance(settings, Mapping):
        raise bad_argument("settings", "a mapping", shown(settings))
    if not isinstance(spec, KvCacheSpec):
        raise bad_argument("spec", "a KvCacheSpec", shown(spec))
    if not isinstance(adapter, str):
        raise bad_argument("adapter", "a str", shown(adapter))
    whole = xxhash.xxh3_128()
    _add(whole, repr((SCHEMA, adapter, replace(spec, num_blocks=1))))
    _add(whole, json.dumps(dict(settings), sort_keys=True, default=str))
    for name in sorted(weights):
        tensor = weights[name].detach()
        _add(whole, repr((name, str(tensor.dtype), tuple(tensor.shape))))
        whole.update(_bytes_of(tensor))
    return whole.hexdigest()


def fingerprint_of_files(files: Sequence[Path], settings: Mapping[str, object]) -> str:
    """Return what tells blocks of a model from those of any other, where its weights are files: 32 hexadecimal digits.

    The files are read (xxh3, 128 bits); where they lie plays no part, and their order none.

    Parameters
    ----------
    files : sequence of Path
        All that the weights were loaded from.
    settings : mapping
        What else the numbers depend on: the model's settings, dtype, how keys and values lie in a block. What JSON does
        not know is taken by its ``str``.

    Raises
    ------
    OSError
        If a file cannot be read.
    """
    whole = xxhash.xxh3_128()
    _add(whole, repr((SCHEMA, "files")))
    _add(whole, json.dumps(dict(settings), sort_keys=True, default=str))
    for path in sorted(files, key=lambda path: path.name):
        _add(whole, repr((path.name, path.stat().st_size)))
        with open(path, "rb", buffering=0) as file:
            while piece := file.read(_PIECE_BYTES):
                whole.update(piece)
    return whole.hexdigest()


def _add(whole: xxhash.xxh3_128, text: str) -> None:
    """Add a text behind its length, so that two texts are never one."""
    data = text.encode()
    whole.update(len(data).to_bytes(8, "little"))
    whole.update(data)


def _bytes_of(tensor: Any) -> Any:
    import torch

    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
