"""Products by oneDNN: the same numbers, in the same bits whatever the rows beside them, and gone afterwards."""

from __future__ import annotations

import pytest
import torch
from tests.hf.models import build

from pagedkv.hf.runner import OneDnnLinears


@pytest.fixture
def layer() -> torch.nn.Linear:
    torch.manual_seed(0)
    return torch.nn.Linear(192, 80)


class OnCpu(torch.nn.Sequential):
    device = torch.device("cpu")


def test_within_rounding_of_torch(layer):
    x = torch.randn(1, 24, 192)
    expected = layer(x)
    with torch.no_grad(), OneDnnLinears(OnCpu(layer)):
        assert torch.allclose(layer(x), expected, atol=1e-5)


def test_a_row_has_the_same_bits_in_every_batch(layer):
    x = torch.randn(64, 192)
    with torch.no_grad(), OneDnnLinears(OnCpu(layer)):
        whole = layer(x)
        for first, last in ((0, 4), (4, 12), (24, 60), (60, 64)):
            assert torch.equal(layer(x[first:last]), whole[first:last])


def test_the_layers_are_torchs_again_afterwards():
    model = build("llama")
    with pytest.raises(KeyError), OneDnnLinears(model):
        raise KeyError
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_forward_that_somebody_replaced_is_left_alone(layer):
    layer.forward = lambda x: x + 1
    with torch.no_grad(), OneDnnLinears(OnCpu(layer)):
        assert torch.equal(layer(torch.zeros(2)), torch.ones(2))
    assert "forward" in vars(layer)


def test_other_types_go_to_torch(layer):
    layer = layer.bfloat16()
    x = torch.randn(8, 192).bfloat16()
    expected = layer(x)
    with torch.no_grad(), OneDnnLinears(OnCpu(layer)):
        assert torch.equal(layer(x), expected)
