"""Weights that move into huge pages: the same numbers, at whole cache lines, one copy of them."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pagedkv.data import huge_pages
from pagedkv.data.huge_pages import CACHE_LINE, HUGE_PAGE, HugePages, MappedFiles, move_weights


class Model(torch.nn.Module):
    def __init__(self, tensors):
        super().__init__()
        for name, tensor in tensors.items():
            self.register_parameter(name, torch.nn.Parameter(tensor))


@pytest.fixture(autouse=True)
def small_models_move(monkeypatch):
    monkeypatch.setattr(huge_pages, "MIN_BYTES", 0)


def places(model):
    return [parameter.data_ptr() for parameter in model.parameters()]


def test_memory_begins_at_a_huge_page_and_tensors_at_cache_lines():
    room = HugePages()
    tensors = [room.empty(shape, torch.bfloat16) for shape in ((3, 5), (1,), (0, 4), (7, 64))]
    assert tensors[0].data_ptr() % HUGE_PAGE == 0
    assert [tensor.shape for tensor in tensors] == [(3, 5), (1,), (0, 4), (7, 64)]
    for number, tensor in enumerate(tensors):
        assert tensor.data_ptr() % CACHE_LINE == 0
        tensor.fill_(number)
    assert all((tensor == number).all() for number, tensor in enumerate(tensors))
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.numel()}) == 3


def test_room_for_more_than_is_reserved_at_once(monkeypatch):
    monkeypatch.setattr(huge_pages, "CHUNK", 1000)
    room = HugePages()
    tensors = [room.empty((size,), torch.uint8) for size in (900, 200, 5000, 300)]
    for number, tensor in enumerate(tensors):
        tensor.fill_(number)
    assert all((tensor == number).all() for number, tensor in enumerate(tensors))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_weights_of_a_mapped_file_move_and_stay_the_same(tmp_path, dtype):
    numbers = {name: torch.randn(300, size).to(dtype) for name, size in (("a", 1), ("b", 64), ("c", 333))}
    save_file(numbers, tmp_path / "weights.safetensors", {"odd": "x" * 3})
    model = Model(load_file(tmp_path / "weights.safetensors"))
    before = places(model)
    move_weights(model)
    assert not set(before) & set(places(model))
    assert all(place % CACHE_LINE == 0 for place in places(model))
    for name, parameter in model.named_parameters():
        assert parameter.dtype == dtype
        assert torch.equal(parameter, numbers[name])
    again = load_file(tmp_path / "weights.safetensors")
    assert all(torch.equal(tensor, numbers[name]) for name, tensor in again.items())


def test_weights_that_are_read_in_two_places_stay_one():
    shared = torch.nn.Parameter(torch.randn(8, 8))
    model = torch.nn.Module()
    model.embedding, model.head = torch.nn.Embedding(8, 8), torch.nn.Linear(8, 8, bias=False)
    model.embedding.weight = model.head.weight = shared
    move_weights(model)
    assert model.embedding.weight is model.head.weight


def test_weights_that_share_memory_stay_where_they_are():
    whole = torch.randn(8, 8)
    model = Model({"some": whole[:6], "others": whole[4:]})
    before = places(model)
    move_weights(model)
    assert places(model) == before


def test_weights_stay_where_memory_is_short(monkeypatch):
    model = Model({"a": torch.randn(8, 8)})
    before = places(model)
    monkeypatch.setattr(huge_pages, "free_memory", lambda: 2 * 8 * 8 * 4 - 1)
    move_weights(model)
    assert places(model) == before


def test_small_weights_stay(monkeypatch):
    model = Model({"a": torch.randn(8, 8)})
    before = places(model)
    monkeypatch.setattr(huge_pages, "MIN_BYTES", 8 * 8 * 4 + 1)
    move_weights(model)
    assert places(model) == before


def test_parameters_that_are_not_contiguous_stay():
    model = Model({"turned": torch.randn(8, 5).T, "plain": torch.randn(3)})
    before = places(model)
    numbers = model.turned.detach().clone()
    move_weights(model)
    assert places(model)[0] == before[0]
    assert places(model)[1] != before[1]
    assert torch.equal(model.turned, numbers)


def test_only_files_that_nobody_else_writes_are_given_back(tmp_path):
    maps = tmp_path / "maps"
    maps.write_text(
        "1000-3000 rw-p 00000000 fe:00 77 /weights of mine\n"
        "4000-5000 rw-s 00000000 fe:00 78 /shared\n"
        "6000-7000 rw-p 00000000 00:00 0 \n"
        "8000-9000 r--p 00000000 fe:00 79 /other\n"
    )
    assert MappedFiles(maps)._ranges == [(0x1000, 0x3000), (0x8000, 0x9000)]
    assert MappedFiles(tmp_path / "absent")._ranges == []


def test_a_mapped_file_takes_up_no_memory_once_its_weights_moved(tmp_path):
    save_file({"a": torch.randn(1 << 20)}, tmp_path / "weights.safetensors")
    model = Model(load_file(tmp_path / "weights.safetensors"))
    kept = model.a.data
    kept.sum()
    assert _resident(kept) > 3 << 20
    move_weights(model)
    assert _resident(kept) < 1 << 20
    assert torch.equal(kept, model.a)


def _resident(tensor):
    """Return the resident bytes of the mapping that a tensor lies in."""
    found = None
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if "-" in words[0] and not words[0].endswith(":"):
            begin, end = (int(word, 16) for word in words[0].split("-"))
            found = begin <= tensor.data_ptr() < end
        elif found and words[0] == "Rss:":
            return int(words[1]) << 10
    raise LookupError("no such mapping")
