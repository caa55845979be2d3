"""The GPU backend: Triton kernels over device blocks.

Everything that is wrong with a call is found before anything is launched.
"""

from __future__ import annotations

from pagedkv.data.arguments import AttentionCall
from pagedkv.data.gpu_device import require_runnable

__all__ = ["attend"]


def attend(call: AttentionCall) -> None:
    """Fill ``call.out``; the arrays of the batch are copied to the device once for all layers."""
    require_runnable("queries", call.queries.device)
    from pagedkv.data.gpu_launch import launch
    from pagedkv.data.gpu_plan import uploaded

    launch(call, uploaded(call))
