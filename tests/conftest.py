from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings

from pagedkv.machine import cuda_devices

_SCRIPTS = Path(__file__).parents[1] / "scripts"

# Without a GPU, Triton's kernels run in its interpreter; it has to be told before anything imports Triton.
if not cuda_devices():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Compiling and a busy machine make single examples slow; how long one takes is not what these tests are about.
settings.register_profile("default", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("thorough", parent=settings.get_profile("default"), max_examples=1000)
# What fails is not made smaller, which may take minutes.
settings.register_profile(
    "fail_fast", parent=settings.get_profile("default"), phases=[Phase.explicit, Phase.reuse, Phase.generate]
)
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


@pytest.fixture(scope="module")
def window() -> Iterator[Any]:
    """A window of a real browser, where one is installed; in continuous integration one must be."""
    sys.path.insert(0, str(_SCRIPTS))
    try:
        import browser
    finally:
        sys.path.remove(str(_SCRIPTS))
    if not browser.is_installed():
        missing = "no chromium with chromedriver here"
        if os.environ.get("CI"):
            pytest.fail(missing)
        pytest.skip(missing)
    with browser.Browser(1280) as opened:
        yield opened
