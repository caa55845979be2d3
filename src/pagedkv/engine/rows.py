"""The rows that the sampler is given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(slots=True)
class Row:
    params: Any
    seed: int
    index: int
    position: int
    token_ids: Any


def row_of(branch: Any, index: int, ids: Any, eos: Any) -> Any:
    return Row(branch.request.params, branch.request.seed, index, len(ids), ids)
