"""Block by block on a device that is too small: what is away is poisoned here, so that what computes with it fails."""

import copy

import pytest
import torch
from torch import nn

from dmquant.calib.blocks import resident
from dmquant.calib.blocks.resident import Resident
from tests.calib.runs import calibrated, captured, packed, recipe_of

DEVICE = torch.device("cpu", 0)  # as a device, another than that of host memory


@pytest.fixture
def away(monkeypatch):
    """The tensors that are away, by module; away, they are full of NaN or of 1s. Counts what was there at once."""
    stored, most = {}, []

    def move(module, device):
        if device == DEVICE:
            for tensor, content in stored.pop(module, {}).items():
                tensor.data = content
        elif module not in stored:
            stored[module] = {tensor: tensor.data for tensor in (*module.parameters(), *module.buffers())}
            for tensor in stored[module]:
                tensor.data = torch.full_like(tensor, float("nan") if tensor.is_floating_point() else 1)
        most.append(len(stored))

    monkeypatch.setattr(resident, "move", move)
    return stored, most


@pytest.mark.parametrize(
    ("model", "recipe"),
    [
        ("pixart-sigma", recipe_of()),
        ("pixart-sigma", recipe_of(learning={"unit": "window", "window": 2, "overlap": 1, "iterations": 4})),
        ("sd15", recipe_of(keep=False, rounding={"method": "gptq"})),
    ],
    ids=["learned", "window", "solved"],
)
def test_codes_are_the_same_and_no_block_computes_while_it_is_away(away, model, recipe, tmp_path):
    case = captured(model, tmp_path / "data")
    expected, _ = calibrated(case, recipe, tmp_path / "whole")
    placed, _ = calibrated(case, recipe, tmp_path / "placed", device=DEVICE)
    stored, most = away
    blocks = len([name for name in case[1] if any(layer.startswith(name) for layer in packed(expected))])
    assert not stored  # in the end all is there
    assert max(most) >= blocks - 1  # all but the block with the first parameter, if there is one
    assert most.count(max(most)) > blocks
    assert packed(placed).keys() == packed(expected).keys()
    for name, tensor in packed(expected).items():
        assert torch.equal(packed(placed)[name], tensor), name


def test_a_recipe_that_looks_at_all_of_a_backbone_has_all_of_it_on_the_device(away, tmp_path):
    case = captured("pixart-sigma", tmp_path / "data")
    static = recipe_of(rounding={"method": "nearest"}, activations="fp6", activation_scale="static:1")
    static = static.with_settings(activation_granularity="tensor")
    calibrated(case, static, tmp_path / "placed", device=DEVICE)
    assert not any(away[1])


def test_a_block_that_is_called_takes_the_place_of_the_one_before(away):
    backbone = nn.Sequential(nn.Linear(4, 4), *(nn.Linear(4, 4) for _ in range(3)))
    x, expected = torch.ones(2, 4), copy.deepcopy(backbone)(torch.ones(2, 4))
    placed = Resident(backbone, ["0", "1", "2", "3"], DEVICE)
    stored, _ = away
    with placed.only(["1", "2", "3"]):
        pass
    assert set(stored) == set(backbone[1:])  # the one with the first parameter stays
    assert backbone(x).isnan().all()
    with placed.as_called():
        assert torch.equal(backbone(x), expected)
        assert set(stored) == set(backbone[1:3])
    assert set(stored) == set(backbone[1:])
    placed.end()
    assert torch.equal(backbone(x), expected)
