"""The public names of the simulator."""

from __future__ import annotations

import pagedkv.sim


def test_every_name_is_there_and_is_no_module():
    assert pagedkv.sim.__all__ == sorted(pagedkv.sim.__all__)
    for name in pagedkv.sim.__all__:
        assert callable(getattr(pagedkv.sim, name)), name
    assert set(pagedkv.sim.__all__) <= set(dir(pagedkv.sim))
