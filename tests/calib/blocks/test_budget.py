"""The memory budget: what the largest unit takes, said before any work is done."""

import re

import pytest
import torch
from torch import nn

from dmquant.calib.blocks.budget import FITTED, LEARNED, WORKING, check_budget
from dmquant.calib.blocks.units import Block
from dmquant.errors import UsageError
from dmquant.host.memory import default_budget
from dmquant.pipelines.runs.bounds import parse_size
from dmquant.recipe import Learning


def model(widths=(8, 32)):
    return nn.Sequential(*(nn.Sequential(nn.Linear(width, width)) for width in widths))


def blocks(widths=(8, 32), saved=1000):
    return [
        Block(f"{number}", (f"{number}.0",), False, torch.zeros(2, width), number + 1, saved, 2 * width)
        for number, width in enumerate(widths)
    ]


def test_it_is_weights_and_activations_of_the_largest_unit():
    needed = check_budget(1 << 30, model(), blocks(), Learning(batch_size=4), True)
    assert needed == LEARNED * 32 * 32 + 4 * (2 * 1000 + 2 * 2 * 32 * 4 + WORKING * 64)
    assert check_budget(needed, model(), blocks(), Learning(batch_size=4), True) == needed


def test_what_learns_nothing_needs_no_memory_for_learning():
    needed = check_budget(1 << 30, model(), blocks(), Learning(batch_size=4), False)
    assert needed == FITTED * 32 * 32 + 4 * (2 * 2 * 32 * 4 + WORKING * 64)


def test_larger_batches_and_windows_take_more():
    def needed(**options):
        return check_budget(1 << 40, model(), blocks(saved=100_000), Learning(**options), True)

    assert needed(batch_size=8) > 1.5 * needed(batch_size=4)
    assert needed(batch_size=4, unit="window") > 1.5 * needed(batch_size=4)


def test_a_budget_too_small_names_the_unit_and_the_least_that_works():
    widths, options = (8, 256), Learning(batch_size=4)
    with pytest.raises(UsageError, match=r"1 alone takes ([\d.]+) (\w*B); use --memory-budget \1\2 or more") as caught:
        check_budget(1_000_000, model(widths), blocks(widths), options, True)
    assert "\n" not in str(caught.value)
    least = parse_size(re.search(r"--memory-budget (\S+)", str(caught.value)).group(1), "--memory-budget")
    check_budget(least, model(widths), blocks(widths), options, True)


@pytest.mark.parametrize("unit", ["layer", "block", "window"])
@pytest.mark.parametrize("share", [0.05, 0.4, 0.8, 0.99])
def test_a_budget_too_small_says_which_settings_fit_and_no_larger_ones_do(unit, share):
    """Two blocks of two layers each, whose activations take about as much as their weights."""
    backbone = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)) for _ in range(2)))
    layers = [Block(f"{at}", (f"{at}.0", f"{at}.1"), False, torch.zeros(2, 64), 2, 20_000, 128) for at in range(2)]

    def needed(budget=1 << 40, **changes):
        return check_budget(
            budget, backbone, layers, Learning(batch_size=8, unit=unit).model_copy(update=changes), True
        )

    budget = int(share * needed())
    with pytest.raises(UsageError) as caught:
        needed(budget)
    line, offered = str(caught.value), dict(re.findall(r"learning\.(\w+): (\w+)", str(caught.value)))
    size = int(offered.get("batch_size", 0))
    assert size == 0 or needed(batch_size=size) <= budget
    assert size == 7 or needed(batch_size=size + 1) > budget
    smaller = ["block", "layer"][["window", "block", "layer"].index(unit) :]
    fitting = [one for one in smaller if needed(unit=one) <= budget]
    assert offered.get("unit") == next(iter(fitting), None)
    assert ("is enough" in line) == (not offered)


def test_by_default_it_is_a_part_of_the_memory_there_is():
    assert 1 << 26 < default_budget() < 1 << 46


def test_on_a_gpu_it_is_a_part_of_the_gpus_memory_and_the_refusal_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (24_000_000, 80_000_000_000))
    assert default_budget(torch.device("cuda", 0)) == 12_000_000
    with pytest.raises(UsageError, match=r"a budget of 1.00 MB of GPU memory is too small: 1 alone takes"):
        check_budget(1_000_000, model((8, 256)), blocks((8, 256)), Learning(batch_size=4), True, where="GPU ")
