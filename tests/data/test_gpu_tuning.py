"""How a configuration is chosen and kept; times are made up, as there is no device to take them on."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from tests.contracts.attention_cases import Shape, make_case

pytest.importorskip("triton")

from triton.runtime.errors import OutOfResources  # noqa: E402

from pagedkv import InvalidOperation  # noqa: E402
from pagedkv.data import gpu_tuning  # noqa: E402
from pagedkv.data.gpu_device import Config, Device, Heads, candidates  # noqa: E402

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
    monkeypatch.setattr(gpu_tuning, "_chosen", None)
    monkeypatch.setattr(gpu_tuning, "_unmeasured", {})
    measured = []

    def time(config, run):
        measured.append(config)
        run(config)
        return 1.0 if config == candidates(HEADS, DEVICE)[2] else 2.0

    monkeypatch.setattr(gpu_tuning, "_median_time", time)
    gpu_tuning.measured = measured
    yield gpu_tuning
    del gpu_tuning.measured


def choose(tuning, work=ENOUGH, heads=HEADS, **changes):
    call = make_case(Shape([(9, 1, 0, 0)], **changes)).call()
    return tuning.config_for(heads, call, lambda config: None, work)


def test_the_fastest_is_measured_once_and_kept(tuning, monkeypatch, tmp_path):
    configs = candidates(HEADS, DEVICE)
    assert choose(tuning) == configs[2] and tuning.measured == list(configs[:5]), "each takes seconds to compile"
    assert choose(tuning) == configs[2] and len(tuning.measured) == 5
    monkeypatch.setattr(tuning, "_chosen", None)  # another process
    assert choose(tuning) == configs[2] and len(tuning.measured) == 5
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


def test_the_file_is_read_once(tuning, monkeypatch):
    reads = []
    monkeypatch.setattr(tuning, "_load", lambda: reads.append(1) or {})
    for _ in range(3):
        choose(tuning, work=0)
    assert len(reads) == 1


def test_nothing_is_measured_where_it_would_mislead_or_wait(tuning, monkeypatch):
    first = candidates(HEADS, DEVICE)[0]
    assert choose(tuning, work=100) == first
    monkeypatch.setenv("PAGEDKV_AUTOTUNE", "0")
    assert choose(tuning) == first
    monkeypatch.delenv("PAGEDKV_AUTOTUNE")
    monkeypatch.setattr(tuning, "is_capturing", lambda device: True)
    assert choose(tuning) == first and not tuning.measured


def test_a_configuration_that_the_device_has_no_room_for_is_left_out(tuning, monkeypatch):
    def time(config, run):
        if config != candidates(HEADS, DEVICE)[1]:
            raise OutOfResources(2, 1, "shared memory")
        return 1.0

    monkeypatch.setattr(tuning, "_median_time", time)
    assert choose(tuning) == candidates(HEADS, DEVICE)[1]


def test_guesses_of_a_few_tokens_share_what_was_measured(tuning):
    """Rows are padded to a power of two: as many kernels, as many measurements."""
    for most in range(1, 9):
        choose(tuning, heads=replace(HEADS, most=most))
    assert len(tuning._chosen) == 2 and {config.tile_m for config in tuning._chosen.values()} == {16, 32}


class Launches:
    """A device on which only some configurations find room."""

    def __init__(self, fitting):
        self.fitting, self.seen = fitting, []

    def __call__(self, config):
        self.seen.append(config)
        if config not in self.fitting:
            raise OutOfResources(300_000, 232_448, "shared memory")


def test_a_smaller_configuration_runs_where_the_first_has_no_room(tuning):
    configs = candidates(HEADS, DEVICE)
    call = make_case(Shape([(9, 1, 0, 0)])).call()
    launches = Launches({configs[2], configs[3]})
    tuning.run_best(HEADS, call, launches, 0)
    assert launches.seen[-1] == configs[2]
    launches.seen.clear()
    tuning.run_best(HEADS, call, launches, 0)
    assert launches.seen == [configs[2]], "what does not fit is not tried at every call"


def test_one_that_is_not_measured_runs_where_no_measured_one_has_room(tuning, monkeypatch):
    configs = candidates(HEADS, DEVICE)
    call = make_case(Shape([(9, 1, 0, 0)])).call()
    launches = Launches({configs[-1]})
    monkeypatch.setattr(tuning, "_median_time", lambda config, run: run(config) or 1.0)
    tuning.run_best(HEADS, call, launches, ENOUGH)
    assert launches.seen[-1] == configs[-1]
    launches.seen.clear()
    tuning.run_best(HEADS, call, launches, ENOUGH)
    assert launches.seen == [configs[-1]]


def test_heads_that_no_configuration_has_room_for_are_refused(tuning):
    call = make_case(Shape([(9, 1, 0, 0)])).call()
    for work in (0, ENOUGH):
        with pytest.raises(InvalidOperation, match="expected heads that some has the memory for, got heads of 128"):
            tuning.run_best(HEADS, call, Launches(set()), work)


def test_a_device_whose_memory_is_taken_runs_unmeasured(tuning, monkeypatch, tmp_path):
    tried = []

    def time(config, run):
        tried.append(config)
        raise torch.cuda.OutOfMemoryError

    monkeypatch.setattr(tuning, "_median_time", time)
    assert choose(tuning) == choose(tuning) == candidates(HEADS, DEVICE)[0]
    assert len(tried) == 5, "it is not tried again at every call"
    assert not list(tmp_path.iterdir()), "another process may have the memory"
