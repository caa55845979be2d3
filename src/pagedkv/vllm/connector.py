"""The connector as vLLM loads it: each half is one object of this class, in a process of its own."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
import vllm
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
)
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec, UniformTypeKVCacheSpecs
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from pagedkv.errors import bad_argument
from pagedkv.tiers.fingerprint import fingerprint_of_files
from pagedkv.tiers.tier import BlockFormat
from pagedkv.vllm.messages import Done, Plan, WorkerFacts
from pagedkv.vllm.options import ConnectorOptions
from pagedkv.vllm.paging import WorkerHalf
from pagedkv.vllm.scheduling import SchedulerHalf

logger = logging.getLogger("pagedkv")

_SOURCES = {"CPU": CacheHitSource.HOST, "DISK": CacheHitSource.DISK}


class StepPlan(KVConnectorMetadata):
    """A plan, as vLLM carries it to the workers."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan


class StepDone(KVConnectorWorkerMetadata):
    """What workers have done, as vLLM carries it back."""

    def __init__(self, done: Done) -> None:
        self.done = done

    def aggregate(self, other: StepDone) -> StepDone:
        """Return what both say."""
        return StepDone(self.done.aggregate(other.done))


class Handshake(KVConnectorHandshakeMetadata):
    """What a worker tells when it starts."""

    def __init__(self, facts: WorkerFacts) -> None:
        self.facts = facts


class PagedKvConnector(KVConnectorBase_V1):
    """Keeps what vLLM computes in tiers, and gives it back: after a restart, and to others that share a server.

    To be named as ``kv_connector`` with ``kv_connector_module_path="pagedkv.vllm"`` and ``kv_role="kv_both"``; its
    options, in ``kv_connector_extra_config``, are those of :class:`pagedkv.vllm.options.ConnectorOptions`.

    The scheduler's half has the tiers. It reads blocks into memory that both processes share, and verifies them, before
    vLLM hears of them; the worker's half only copies between that memory and the pool. So what a tier cannot give is
    computed, as if nothing had been there.

    Parameters
    ----------
    vllm_config : VllmConfig
    role : KVConnectorRole
    kv_cache_config : KVCacheConfig

    Raises
    ------
    InvalidOperation
        If an option is wrong, or the model keeps anything but one kind of keys and values.
    TierError
        If a disk cannot be had.
    """

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        self._options = ConnectorOptions.of(self._kv_transfer_config.kv_connector_extra_config)
        self._config, self._pool = vllm_config, kv_cache_config
        self._block_size = _block_size_of(kv_cache_config)
        for name in ("pipeline_parallel_size", "decode_context_parallel_size", "prefill_context_parallel_size"):
            if (size := getattr(vllm_config.parallel_config, name, 1)) > 1:
                raise bad_argument(name, "1 with this connector", f"{size}")
        if role == KVConnectorRole.SCHEDULER:
            # What a worker cannot copy is computed; vLLM reads this after it made the connector.
            self._kv_transfer_config.kv_load_failure_policy = "recompute"
        self._scheduler: SchedulerHalf | None = None
        self._worker: WorkerHalf | None = None
        self._computed: dict[str, int] = {}

    @property
    def requires_kv_delivery(self) -> bool:
        """No: what is not stored is computed again."""
        return False

    # In the worker.

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Take the tensors of the pool."""
        names = self._pool.kv_cache_groups[0].layer_names
        layers = self._config.compilation_config.static_forward_context
        kinds = sorted({_kind_of(layers.get(name)) for name in names})
        size = self._config.parallel_config.tensor_parallel_size
        caches = {name: kv_caches[name] for name in names}
        rank = get_tensor_model_parallel_rank()
        self._worker = WorkerHalf(caches, self._pool.num_blocks, " ".join(kinds), rank, size)

    def get_handshake_metadata(self) -> Handshake | None:
        """Tell the scheduler's half what a block is."""
        return Handshake(self._worker.facts) if self._worker is not None else None

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Copy what the tiers had into the pool."""
        self._half_of_worker().load(self._plan())

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing is on its way by now."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """All layers of a block are copied together, when the step is over."""

    def wait_for_save(self) -> None:
        """Copy blocks that are full now out of the pool; the scheduler's half stores them meanwhile."""
        self._half_of_worker().store(self._plan())

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Return blocks that could not be filled, which vLLM then computes."""
        return self._half_of_worker().take_wrong()

    def build_connector_worker_meta(self) -> StepDone | None:
        """Tell the scheduler's half what was copied."""
        done = self._half_of_worker().take_done()
        return StepDone(done) if done is not None else None

    def _plan(self) -> Plan:
        plan: Plan = self._get_connector_metadata().plan
        return plan

    def _half_of_worker(self) -> WorkerHalf:
        if self._worker is None:
            raise RuntimeError("register_kv_caches was not called")
        return self._worker

    # In the scheduler.

    def set_xfer_handshake_metadata(self, metadata: dict[int, Handshake]) -> None:
        """Open the tiers, now that it is known what a block is."""
        facts = [metadata[rank].facts for rank in sorted(metadata)]
        hosts, sizes = {each.host for each in facts}, {each.row_bytes for each in facts}
        parallel = self._config.parallel_config
        if len(facts) != parallel.tensor_parallel_size or len(hosts) != 1 or len(sizes) != 1:
            got = f"{len(facts)} on {sorted(hosts)}"
            raise bad_argument("workers", f"{parallel.tensor_parallel_size} alike on one machine", got)
        options, transfer = self._options, self._kv_transfer_config
        block = BlockFormat(self._fingerprint(facts), self._block_size, sizes.pop() * len(facts))
        folder = f"replica-{parallel.data_parallel_index}" if parallel.data_parallel_size > 1 else ""
        self._scheduler = SchedulerHalf(
            options.tiers(folder),
            block,
            options.staging_bytes,
            num_workers=len(facts),
            patience=options.patience,
            reads=transfer.is_kv_consumer,
            writes=transfer.is_kv_producer,
        )
        logger.info("pagedkv: blocks of %d tokens, %d bytes: %s", block.block_size, block.block_bytes, options)

    def _fingerprint(self, facts: list[WorkerFacts]) -> str:
        """Return what keys and values depend on besides token ids."""
        model, cache = self._config.model_config, self._config.cache_config
        config = model.hf_config.to_dict()
        settings = {
            "vllm": vllm.__version__,
            "torch": torch.__version__,
            "model": {name: config[name] for name in config if name not in ("_name_or_path", "transformers_version")},
            "dtype": str(model.dtype),
            "quantization": model.quantization,
            "max_model_len": model.max_model_len,  # some ropes depend on it
            "disable_sliding_window": model.disable_sliding_window,
            "cache_dtype": cache.cache_dtype,
            "speculative": getattr(self._config.speculative_config, "model", None),
            "layouts": [each.layout for each in facts],
            "weights": self._options.fingerprint,
        }
        files = [] if self._options.fingerprint is not None else weight_files(model, self._config.load_config)
        return fingerprint_of_files(files, settings)

    def on_new_request(self, request: Any) -> None:
        """Ask the tiers as soon as a request comes."""
        self._half_of_scheduler().arrived(request)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Answer with what has come from the tiers and is verified, None as long as it is on its way."""
        self._computed[request.request_id] = num_computed_tokens
        return self._half_of_scheduler().found(request, num_computed_tokens), False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Plan the copies into blocks that were allocated."""
        computed = self._computed.pop(request.request_id, 0)
        ids = blocks.get_block_ids()[0] if num_external_tokens else []
        self._half_of_scheduler().placed(request, ids, computed, num_external_tokens)

    def get_external_cache_hit_sources(self, request: Any, num_external_tokens: int) -> dict[CacheHitSource, int]:
        """Say which tiers the tokens of a request came from."""
        found: dict[CacheHitSource, int] = {}
        for medium, count in self._half_of_scheduler().sources(request.request_id).items():
            source = _SOURCES.get(medium, CacheHitSource.EXTERNAL_UNSPECIFIED)
            found[source] = found.get(source, 0) + count
        return found

    def build_connector_meta(self, scheduler_output: Any) -> StepPlan:
        """Plan the copies of this step."""
        state = scheduler_output.kv_connector_block_state
        return StepPlan(
            self._half_of_scheduler().plan(
                scheduler_output.num_scheduled_tokens, lambda request_id: state.get_block_ids(request_id)[0]
            )
        )

    def update_connector_output(self, connector_output: Any) -> None:
        """Hand over to the tiers what workers have copied."""
        meta = connector_output.kv_connector_worker_meta
        if meta is not None:
            self._half_of_scheduler().copied(meta.done)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Forget a request; what is to be stored of it was copied when it was computed."""
        self._computed.pop(request.request_id, None)
        self._half_of_scheduler().finished(request.request_id)
        return False, None

    def reset_cache(self) -> bool:
        """Let every tier forget everything."""
        return self._half_of_scheduler().clear()

    def shutdown(self) -> None:
        """Finish what is under way, and let go of the tiers."""
        half, self._scheduler = self._scheduler, None
        if half is not None:
            half.close()

    def _half_of_scheduler(self) -> SchedulerHalf:
        if self._scheduler is None:
            raise RuntimeError("the workers have not told yet what a block is, or the connector was shut down")
        return self._scheduler


def _block_size_of(kv_cache_config: Any) -> int:
    """Return the tokens of a block, if every layer keeps keys and values of all tokens."""
    hint = "models with recurrent states, or with sliding windows alone, are not supported"
    groups = kv_cache_config.kv_cache_groups
    if len(groups) != 1:
        raise bad_argument("kv_cache_config", "one group of layers", f"{len(groups)}", hint)
    spec = groups[0].kv_cache_spec
    specs = list(spec.kv_cache_specs.values()) if isinstance(spec, UniformTypeKVCacheSpecs) else [spec]
    others = sorted({type(each).__name__ for each in specs if type(each) not in (FullAttentionSpec, MLAAttentionSpec)})
    if others:
        raise bad_argument("kv_cache_config", "layers that attend to all tokens", ", ".join(others), hint)
    size: int = spec.block_size
    return size


def _kind_of(layer: Any) -> str:
    """Return what else decides on the layout of a page: the backend, and what it packs keys for."""
    backend = getattr(layer, "attn_backend", None)
    name = backend.get_name() if backend is not None else type(layer).__name__
    return f"{name}:{getattr(layer, 'isa', '')}"


def weight_files(model_config: Any, load_config: Any) -> list[Path]:
    """Return the files that vLLM has loaded the weights from.

    Raises
    ------
    InvalidOperation
        If they are in no files that can be read.
    """
    place = Path(model_config.model_weights or model_config.model)
    hint = 'give the connector {"fingerprint": "…"}, a text of your own that changes whenever the weights do'
    if str(load_config.load_format) not in ("auto", "hf", "safetensors", "pt", "gguf", "mistral", "fastsafetensors"):
        raise bad_argument("load_format", "one with files of weights", f"{load_config.load_format}", hint)
    if not place.exists():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            cached = snapshot_download(
                str(place), revision=model_config.revision, cache_dir=load_config.download_dir, local_files_only=True
            )
        except (LocalEntryNotFoundError, ValueError) as error:
            raise bad_argument("model", "a folder, or a model in the hub's cache", str(place), hint) from error
        place = Path(cached)
    files = [place] if place.is_file() else sorted(path for path in place.iterdir() if path.is_file())
    for kinds in ((".safetensors",), (".bin", ".pt", ".pth", ".gguf")):
        found = [path for path in files if path.suffix in kinds]
        if found:
            return found
    raise bad_argument("model", "a folder with weights", str(place), hint)
