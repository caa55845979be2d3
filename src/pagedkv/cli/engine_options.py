"""Options of a command that runs an engine: the model, the pool, and what lies beyond it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pagedkv.cli.loading import LoadedModel, require_dtype, require_kv_dtype, require_weights
from pagedkv.cli.terminal import Failure
from pagedkv.errors import InvalidOperation
from pagedkv.server.config import setting
from pagedkv.validate import require_size

if TYPE_CHECKING:
    from pagedkv.engine import AsyncEngine
    from pagedkv.tiers import Tier

_MODEL, _POOL, _TIERS = "The model", "The pool and the batch", "Beyond the pool"


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How the model is run; all but the first two are those of :class:`pagedkv.engine.LLM`, with its defaults."""

    device: str = setting("cpu", "A torch device: cpu, cuda, cuda:1.", group=_MODEL)
    dtype: str = setting("auto", "auto (as stored), float32, bfloat16, float16.", group=_MODEL)
    weights: str | None = setting(
        None, "Weights in 8 bits: int8, on the CPU, in compiled mode.", shown="as stored", group=_MODEL
    )
    cuda_graphs: bool | None = setting(
        None,
        "Replay decode steps as CUDA graphs.",
        flag="--cuda-graphs/--no-cuda-graphs",
        shown="on a CUDA device",
        group=_MODEL,
    )
    num_blocks: int | None = setting(None, "Blocks of the pool.", group=_POOL, shown="from the memory")
    kv_dtype: str | None = setting(
        None,
        "Of keys and values: float32, bfloat16, float16, or quantised: int8, fp8.",
        group=_POOL,
        shown="as the model",
    )
    block_size: int = setting(16, "Tokens per block.", group=_POOL)
    strategy: str = setting("lru", "What is evicted first: lru, lfu, fifo, …", group=_POOL)
    prefix_caching: bool = setting(True, "Reuse equal prefixes.", group=_POOL)
    max_num_seqs: int = setting(256, "Texts written at once.", group=_POOL)
    max_batch_tokens: int = setting(512, "Tokens of a step.", group=_POOL)

    def __post_init__(self) -> None:
        require_dtype(self.dtype)
        require_kv_dtype(self.kv_dtype)
        require_weights(self.weights)
        for name, plain in (("device", "cpu"), ("dtype", "auto")):
            if self.weights is not None and getattr(self, name) != plain:
                raise Failure(f"--{name}: expected {plain} beside --weights, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class TierOptions:
    """What is kept beyond the pool, and what is never given up in it."""

    disk: Path | None = setting(
        None, "A directory for keys and values: chats go on after a restart.", group=_TIERS, shown=False
    )
    disk_size: str | None = setting(None, "Bytes that it may take, such as 50GB.", group=_TIERS, shown=False)
    disk_read_only: bool = setting(
        False, "Find what another server writes to that directory, and store nothing there.", group=_TIERS
    )
    host_memory: str | None = setting(
        None, "Memory of the host for them, such as 8GiB, for pools on a device.", group=_TIERS, shown=False
    )
    resp: str | None = setting(
        None,
        "A Valkey or Redis server that several share: valkey://host:6379/0.",
        group=_TIERS,
        env="PAGEDKV_RESP",
        shown=False,
    )
    resp_ttl: int | None = setting(
        None, "Seconds that a block stays there after its last use.", group=_TIERS, shown="until there is no room"
    )
    warm: tuple[str, ...] = setting(
        (),
        "A file with a system prompt, or a JSON list of them, to compute and pin before the port opens.",
        group=_TIERS,
        shown=False,
    )

    def __post_init__(self) -> None:
        if self.disk_read_only:
            if self.disk is None:
                raise Failure("--disk-read-only: expected --disk beside it")
            if self.disk_size is not None:
                raise Failure("--disk-size: expected none beside --disk-read-only, as who writes has set it")
        elif (self.disk is None) != (self.disk_size is None):
            missing, given = ("--disk-size", "--disk") if self.disk_size is None else ("--disk", "--disk-size")
            raise Failure(f"{given}: expected {missing} beside it")
        if self.resp is None and self.resp_ttl is not None:
            raise Failure("--resp-ttl: expected --resp beside it")
        if self.resp is not None:
            self._shared(self.resp)
        for name in self.sizes:
            require_size(name, getattr(self, name))

    @property
    def sizes(self) -> list[str]:
        """The sizes that were given, nearest first."""
        return [name for name in ("host_memory", "disk_size") if getattr(self, name) is not None]

    def tiers(self) -> list[Tier]:
        """Return the tiers, nearest first; `Failure` where one cannot be."""
        from pagedkv.tiers import DiskTier, HostTier

        made: list[Tier] = []
        if self.host_memory is not None:
            made.append(HostTier(self.host_memory))
        if self.disk is not None:
            made.append(DiskTier(self.disk, self.disk_size, read_only=self.disk_read_only))
        if self.resp is not None:
            made.append(self._shared(self.resp))
        return made

    def _shared(self, url: str) -> Tier:
        from pagedkv.tiers import RespTier

        try:
            return RespTier(url, ttl=self.resp_ttl)
        except InvalidOperation as error:
            flag = {"url": "--resp", "ttl": "--resp-ttl"}[error.argument or ""]
            raise Failure(f"{flag}{error.reason.removeprefix(error.argument or '')}") from None


def make_engine(options: EngineOptions, loaded: LoadedModel, tiers: TierOptions, neighbours: int = 1) -> AsyncEngine:
    """Return the engine that the options describe, around a model that is loaded.

    Of the memory that pools take by default it takes an equal share with its neighbours.
    """
    from pagedkv.engine import LLM, AsyncEngine
    from pagedkv.engine.llm import default_blocks

    given = asdict(options)
    del given["device"], given["dtype"]
    if options.num_blocks is None and neighbours > 1:
        for_one = default_blocks(loaded.model, options.block_size, options.max_num_seqs)
        given["num_blocks"] = lambda size: max(1, for_one(size) // neighbours)
    try:
        return AsyncEngine(LLM(loaded.model, loaded.tokenizer, tiers=tiers.tiers(), keep_model=False, **given))
    except InvalidOperation as error:
        if error.argument != "size":
            raise
        flags = " or ".join(f"--{name.replace('_', '-')}" for name in tiers.sizes)
        raise Failure(f"{flags}{error.reason.removeprefix('size')}") from None
