"""Options of the connector, as ``kv_connector_extra_config`` names them, and the tiers that they stand for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from pagedkv.errors import bad_argument
from pagedkv.tiers.disk import DiskTier
from pagedkv.tiers.host import HostTier
from pagedkv.tiers.resp import RespTier
from pagedkv.tiers.tier import Tier
from pagedkv.validate import require_flag, require_number, require_size, shown


@dataclass(frozen=True, kw_only=True)
class ConnectorOptions:
    """What is kept where. At least one of `host`, `disk` and `resp` is given; they are asked in this order.

    Parameters
    ----------
    host : int or str, optional
        Bytes of the host's memory for blocks: ``"4GiB"``. Gone when vLLM ends.
    disk : str, optional
        A folder for the blocks of one model, on a local disk.
    disk_size : int or str
        The most bytes of its files, allocated when vLLM starts.
    durable : bool
        Whether a store is on the medium before it is findable: see :class:`pagedkv.tiers.DiskTier`.
    daily_writes : int or str, optional
        Most bytes that are written to the disk in a day.
    resp : str, optional
        The address of a server that many share: ``"valkey://host:6379/0"``.
    namespace : str
        What its keys begin with.
    ttl : int, optional
        Seconds that a block stays there after its last use.
    timeout : float
        The most seconds that the server has for an answer.
    patience : float
        The most seconds that a request waits for all tiers together when its turn has come, before it is computed.
    staging : int or str
        Memory shared by vLLM's processes, through which blocks travel: half of it is the most that one request loads.
    fingerprint : str, optional
        What stands for the weights, where they are in no files that can be read: change it whenever they change.

    Raises
    ------
    InvalidOperation
        If an option is unknown or out of range, or nothing says where to keep blocks.
    """

    host: int | str | None = None
    disk: str | None = None
    disk_size: int | str = "10GiB"
    durable: bool = False
    daily_writes: int | str | None = None
    resp: str | None = None
    namespace: str = "pagedkv"
    ttl: int | None = None
    timeout: float = 2.0
    patience: float = 5.0
    staging: int | str = "512MiB"
    fingerprint: str | None = None

    def __post_init__(self) -> None:
        if self.host is None and self.disk is None and self.resp is None:
            hint = 'kv_connector_extra_config is {"disk": "/path", "disk_size": "10GiB"}, for instance'
            raise bad_argument("kv_connector_extra_config", "disk, host or resp", "none of them", hint)
        require_size("staging", self.staging)
        require_flag("durable", self.durable)
        require_number("patience", self.patience, 0, 3600, above=True)
        if self.disk is not None and (not isinstance(self.disk, str) or not self.disk):
            raise bad_argument("disk", "a path", shown(self.disk), "name a folder of its own for the blocks")
        if self.fingerprint is not None and (not isinstance(self.fingerprint, str) or not self.fingerprint):
            raise bad_argument("fingerprint", "a str that is not empty", shown(self.fingerprint))
        self.tiers()  # each says what is wrong with its own options

    @classmethod
    def of(cls, extra_config: Mapping[str, object]) -> ConnectorOptions:
        """Return the options of a ``kv_connector_extra_config``."""
        known = [each.name for each in fields(cls)]
        for name in extra_config:
            if name not in known:
                wanted = "an option of the connector: " + ", ".join(known)
                raise bad_argument("kv_connector_extra_config", wanted, shown(name))
        make: Callable[..., ConnectorOptions] = cls
        return make(**extra_config)

    @property
    def staging_bytes(self) -> int:
        """Bytes of the staging memory."""
        return require_size("staging", self.staging)

    def tiers(self, folder: str = "") -> list[Tier]:
        """Return the tiers, nearest first, not open yet; those on a disk in a `folder` of the one that is named."""
        made: list[Tier] = []
        if self.host is not None:
            made.append(HostTier(self.host, pinned=False))  # the device is another process's
        if self.disk is not None:
            place = Path(self.disk, folder)
            made.append(DiskTier(place, self.disk_size, durable=self.durable, daily_writes=self.daily_writes))
        if self.resp is not None:
            made.append(RespTier(self.resp, namespace=self.namespace, ttl=self.ttl, timeout=self.timeout))
        return made
