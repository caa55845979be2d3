"""Decode steps by CUDA graphs: what a step launches is recorded once for each kind of step, and then only replayed.

A decode step of a small model is mostly the host's work: thousands of launches of kernels that take microseconds. A
recording launches them all at once. It reads and writes the same memory for ever, so tokens, positions and the plan of
each step are copied to where it looks, and steps of nearly equal size share one recording: the larger one, in which
rows behind the plan's sequences are written nowhere and attend to nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pagedkv.cache import PagedKvCache
from pagedkv.control.plan import BatchPlan
from pagedkv.data.gpu_plan import DevicePlan

logger = logging.getLogger("pagedkv")

Ids = npt.NDArray[np.int64]
Record = Callable[[Callable[[], None]], Callable[[], None]]
"""Takes a function that launches work on the device and returns one that does the same launches again."""

MOST_SEQUENCES = 256
"""Steps of more sequences keep the device busy without."""
NARROWEST, WIDENING = 64, 4
"""Blocks of a sequence in the smallest recording, and by how much the next larger one has more."""


class CudaRecorder:
    """Records CUDA graphs that share one pool of memory, as no two of them run at a time.

    Parameters
    ----------
    device : torch.device
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None
        self._stream: Any = None

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        """Call `run` once as it is and once for the record, both on a stream of their own; return what replays it."""
        with torch.cuda.device(self._device):
            if self._pool is None:
                self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
            graph, here, aside = torch.cuda.CUDAGraph(), torch.cuda.current_stream(), self._stream
            aside.wait_stream(here)
            # torch.cuda.graph does not leave its stream when it fails; this context does.
            with torch.cuda.stream(aside):
                try:
                    run()  # kernels are compiled and libraries take their memory, which a graph could not hold
                finally:
                    here.wait_stream(aside)
                # Other threads may use the device meanwhile.
                with torch.cuda.graph(graph, self._pool, aside, capture_error_mode="thread_local"):
                    run()
        replay: Callable[[], None] = graph.replay
        return replay


@dataclass(slots=True)
class _Recording:
    """A recorded forward pass and the memory that it reads and writes, which the recording itself does not keep."""

    plan: DevicePlan
    ids: Tensor  # int64 [batch]
    rows: Tensor  # int64 [batch], all of them
    logits: Tensor  # float32 [batch, vocab_size], shared by all recordings
    replay: Callable[[], None]

    def load(self, plan: BatchPlan, ids: Ids, positions: Ids) -> None:
        """Put a step where the recording looks for it, without waiting for the device."""
        self.plan.load(replace(plan, positions=positions))
        padded = np.zeros(len(self.ids), np.int64)
        padded[: len(ids)] = ids
        self.ids.copy_(_staged(padded, self.ids.device), non_blocking=True)


class DecodeGraphs:
    """The recordings of one model over one cache.

    They serve steps in which each sequence has one query token. The first two steps of a kind are computed as ever,
    as a kind may come only once; then it is recorded, and later steps are replayed.

    Parameters
    ----------
    cache : PagedKvCache
        Whose blocks Triton's kernels write.
    forward : callable
        Given a plan and token ids, positions and wanted rows (int64 ``[tokens]`` on the device): the logits of these
        rows, ``[tokens, vocab_size]``. It must not wait for the device and must do the same work for the same shapes.
    vocab_size : int
    record : Record
        :class:`CudaRecorder` on a device.
    name : str
        Of the model, for the warning if it cannot be recorded.
    """

    def __init__(
        self,
        cache: PagedKvCache,
        forward: Callable[[DevicePlan, Tensor, Tensor, Tensor], Tensor],
        vocab_size: int,
        record: Record,
        name: str,
    ) -> None:
        self._cache, self._forward, self._vocab_size = cache, forward, vocab_size
        self._record, self._name = record, name
        self._logits = torch.empty(0, vocab_size)
        self._seen: set[tuple[int, int]] = set()
        self._recordings: dict[tuple[int, int], _Recording] = {}
        self._can_record = True

    def __len__(self) -> int:
        return len(self._recordings)

    def replay(self, plan: BatchPlan, ids: Ids, positions: Ids, rows: Ids) -> Tensor | None:
        """Compute a step by its recording.

        Returns
        -------
        float32 Tensor [len(rows), vocab_size] or None
            The logits of these query tokens; None where there is no recording.
        """
        recording = self._recordings.get(bucket_of(plan))
        if recording is None:
            return None
        recording.load(plan, ids, positions)
        chosen = on_device(rows, recording.logits.device)
        recording.replay()
        return recording.logits[chosen]  # a copy: the next replay writes over the memory

    def learn(self, plan: BatchPlan, ids: Ids, positions: Ids) -> None:
        """Record a step that was just computed, if it is the second of its kind.

        What it wrote into the blocks is written again. A model that cannot be recorded is never tried again; the logger
        ``pagedkv`` says why.
        """
        bucket = bucket_of(plan)
        if not self._can_record or bucket == _NONE:
            return
        if bucket not in self._seen:
            self._seen.add(bucket)
            return
        try:
            self._recordings[bucket] = self._recorded(bucket, plan, ids, positions)
        except Exception as error:  # whatever a model does that a graph cannot hold
            self._can_record = False
            self._recordings.clear()
            text = f"{type(error).__name__}: {error}".splitlines()[0]
            logger.warning("%s runs without CUDA graphs, as it could not be recorded: %s", self._name, text)

    @torch.inference_mode(False)  # what is born in inference mode could not be written outside of it
    @torch.no_grad()
    def _recorded(self, bucket: tuple[int, int], plan: BatchPlan, ids: Ids, positions: Ids) -> _Recording:
        batch, blocks = bucket
        static = self._cache.device_plan(batch, blocks, max_tokens=batch, max_query_tokens=1)
        static_ids, rows = torch.zeros_like(static.positions), torch.arange(batch, device=static.device)
        logits = self._room_for(batch, static.device)

        def run() -> None:
            logits.copy_(self._forward(static, static_ids, static.positions, rows))

        recording = _Recording(static, static_ids, rows, logits, run)
        recording.load(plan, ids, positions)
        recording.replay = self._record(run)
        return recording

    def _room_for(self, batch: int, device: torch.device) -> Tensor:
        """Return memory for logits; all of it together is less than four times what the largest recording needs."""
        if len(self._logits) < batch:
            rows = 1 << (batch - 1).bit_length()
            self._logits = torch.empty(rows, self._vocab_size, device=device)
        return self._logits[:batch]


_NONE = (0, 0)


def bucket_of(plan: BatchPlan) -> tuple[int, int]:
    """Return the sequences, and the blocks of one, that the recording for a plan has room for; (0, 0) if it gets none.

    Sequences are rounded up to 1, 2, 4, 8, 16, 24, …, blocks to 64, 256, 1024, …
    """
    count, width = plan.block_tables.shape
    if not 0 < count <= MOST_SEQUENCES or plan.total_tokens != count or (plan.num_query_tokens != 1).any():
        return _NONE
    blocks = NARROWEST
    while blocks < width:
        blocks *= WIDENING
    return 1 << (count - 1).bit_length() if count <= 8 else -(-count // 8) * 8, blocks


def on_device(array: Ids, device: torch.device) -> Tensor:
    """Return an array as a tensor on a device, without waiting for it."""
    return _staged(array, device).to(device, non_blocking=True)


def _staged(array: Ids, device: torch.device) -> Tensor:
    """Return an array as a tensor on the host, from where copies to a device need not be waited for."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory() if device.type == "cuda" else tensor
