"""How a configuration is chosen and kept; times are made up, as there is no device to take them on."""

from __future__ import annotations

import json

import pytest
import torch
from tests.contracts.attention_cases import Shape, make_case

pytest.importorskip("triton")

from pagedkv.data import gpu_tuning  # noqa: E402
from pagedkv.data.gpu_shapes import Config, Device, Heads, candidates  # noqa: E402

HEADS = Heads(4, 128, 128, 2, 2, 1)
DEVICE = Device("some", 132, 227 << 10, 90)
ENOUGH = 1 << 20


@pytest.fixture
def tuning(monkeypatch, tmp_path):
    """Tuning as on a device whose fastest configuration is the third candidate."""
    monkeypatch.setenv("PAGEDKV_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(gpu_tuning, "is_interpreted", lambda: False)
    monkeypatch.setattr(gpu_tuning, "is_capturing", lambda device: False)
    monkeypatch.setattr(gpu_tuning, "device_of", lambda device: DEVICE)
    monkeypatch.setattr(gpu_tuning, "_chosen", {})
    measured = []

    def time(config, run):
        measured.append(config)
        run(config)
        return 1.0 if config == candidates(HEADS, DEVICE)[2] else 2.0

    monkeypatch.setattr(gpu_tuning, "_median_time", time)
    gpu_tuning.measured = measured
    yield gpu_tuning
    del gpu_tuning.measured


def choose(tuning, work=ENOUGH, **changes):
    call = make_case(Shape([(9, 1, 0, 0)], **changes)).call()
    return tuning.config_for(HEADS, call, lambda config: None, work)


def test_the_fastest_is_measured_once_and_kept(tuning, monkeypatch, tmp_path):
    configs = candidates(HEADS, DEVICE)
    assert choose(tuning) == configs[2] and tuning.measured == configs
    assert choose(tuning) == configs[2] and len(tuning.measured) == len(configs)
    monkeypatch.setattr(tuning, "_chosen", {})  # another process
    assert choose(tuning) == configs[2] and len(tuning.measured) == len(configs)
    kept = json.loads((tmp_path / "pagedkv" / "gpu-configurations.json").read_text())
    assert list(kept.values()) == [list(configs[2])]


def test_another_kind_of_call_is_measured_for_itself(tuning):
    choose(tuning)
    before = len(tuning.measured)
    choose(tuning, dtype=torch.float16)
    choose(tuning, options={"window": 5})
    assert len(tuning.measured) == 3 * before


@pytest.mark.parametrize("text", ["", "no json", "[]", '{"a": 1}', '{"a": ["x"]}'])
def test_a_file_that_cannot_be_understood_is_none(tuning, tmp_path, text):
    (tmp_path / "pagedkv").mkdir()
    (tmp_path / "pagedkv" / "gpu-configurations.json").write_text(text)
    assert choose(tuning) == candidates(HEADS, DEVICE)[2]


def test_a_folder_that_cannot_be_written_is_no_error(tuning, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PAGEDKV_CACHE_DIR", str(tmp_path / "file"))
    assert choose(tuning) == candidates(HEADS, DEVICE)[2]


def test_a_kept_configuration_that_is_no_candidate_is_measured_again(tuning):
    choose(tuning)
    for key in tuning._chosen:
        tuning._chosen[key] = Config(16, 4096, 4, 9)
    assert choose(tuning) == candidates(HEADS, DEVICE)[2]


def test_nothing_is_measured_where_it_would_mislead_or_wait(tuning, monkeypatch):
    first = candidates(HEADS, DEVICE)[0]
    assert choose(tuning, work=100) == first
    monkeypatch.setenv("PAGEDKV_AUTOTUNE", "0")
    assert choose(tuning) == first
    monkeypatch.delenv("PAGEDKV_AUTOTUNE")
    monkeypatch.setattr(tuning, "is_capturing", lambda device: True)
    assert choose(tuning) == first and not tuning.measured


def test_a_configuration_that_the_device_has_no_room_for_is_left_out(tuning, monkeypatch):
    from triton.runtime.errors import OutOfResources

    def time(config, run):
        if config != candidates(HEADS, DEVICE)[1]:
            raise OutOfResources(2, 1, "shared memory")
        return 1.0

    monkeypatch.setattr(tuning, "_median_time", time)
    assert choose(tuning) == candidates(HEADS, DEVICE)[1]
