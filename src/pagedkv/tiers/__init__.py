"""Tiers: keys and values beyond the pool: files that outlive the process, memory of the host, a server for many."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pagedkv.errors import TierError
    from pagedkv.tiers.book_tier import BookTier, Slots, TierStats
    from pagedkv.tiers.disk import DiskTier
    from pagedkv.tiers.fingerprint import fingerprint_of, fingerprint_of_files
    from pagedkv.tiers.host import HostTier
    from pagedkv.tiers.inspection import TierCheck, TierFacts, check_tier, clear_tier, inspect_tier
    from pagedkv.tiers.moving import demote, promote
    from pagedkv.tiers.resp import RespTier
    from pagedkv.tiers.tier import BlockFormat, Tier

__all__ = [
    "BlockFormat",
    "BookTier",
    "DiskTier",
    "HostTier",
    "RespTier",
    "Slots",
    "Tier",
    "TierCheck",
    "TierError",
    "TierFacts",
    "TierStats",
    "check_tier",
    "clear_tier",
    "demote",
    "fingerprint_of",
    "fingerprint_of_files",
    "inspect_tier",
    "promote",
]

_HOMES = {
    "BlockFormat": "pagedkv.tiers.tier",
    "BookTier": "pagedkv.tiers.book_tier",
    "DiskTier": "pagedkv.tiers.disk",
    "HostTier": "pagedkv.tiers.host",
    "RespTier": "pagedkv.tiers.resp",
    "Slots": "pagedkv.tiers.book_tier",
    "Tier": "pagedkv.tiers.tier",
    "TierCheck": "pagedkv.tiers.inspection",
    "TierError": "pagedkv.errors",
    "TierFacts": "pagedkv.tiers.inspection",
    "TierStats": "pagedkv.tiers.book_tier",
    "check_tier": "pagedkv.tiers.inspection",
    "clear_tier": "pagedkv.tiers.inspection",
    "demote": "pagedkv.tiers.moving",
    "fingerprint_of": "pagedkv.tiers.fingerprint",
    "fingerprint_of_files": "pagedkv.tiers.fingerprint",
    "inspect_tier": "pagedkv.tiers.inspection",
    "promote": "pagedkv.tiers.moving",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pagedkv.tiers' has no attribute {name!r}")
    try:
        module = importlib.import_module(_HOMES[name])
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        from pagedkv.errors import MissingExtra

        raise MissingExtra("torch", "torch") from error
    value = getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
