from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, settings

from pagedkv.cli.machine import cuda_devices

# Without a GPU, Triton's kernels run in its interpreter; it has to be told before anything imports Triton.
if not cuda_devices():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Compiling and a busy machine make single examples slow; how long one takes is not what these tests are about.
settings.register_profile("default", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("thorough", parent=settings.get_profile("default"), max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none, so that ``-m gpu`` says why it did nothing."""
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not on_gpu:
        return
    import torch

    if not torch.cuda.is_available():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
