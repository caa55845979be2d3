"""Admission: places are counted as they are taken and as they are given back."""

from __future__ import annotations

import pytest

from pagedkv.server.admission import Admission
from pagedkv.server.errors import ApiError


def test_every_place_that_a_request_took_is_given_back() -> None:
    admission = Admission(running=2, waiting=3)
    with admission.entered(3), admission.entered(2):
        assert admission.inside == admission.limit == 5
        with pytest.raises(ApiError) as caught, admission.entered(1):
            pass
        assert caught.value.status == 429 and admission.inside == 5
    assert admission.inside == 0
    with pytest.raises(RuntimeError), admission.entered(4):
        raise RuntimeError
    assert admission.inside == 0
