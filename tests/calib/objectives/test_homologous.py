"""Two targets for one unit, and an error that is measured after later blocks."""

import pytest
import torch

from dmquant.calib.blocks import block
from dmquant.calib.blocks.units import tasks_of
from dmquant.calib.objectives import SAME_INPUTS, UnitData, get_method, needs_of
from dmquant.errors import UsageError
from dmquant.recipe import Learning, Recipe
from tests.calib.blocks.test_units import B0, B1, BLOCKS
from tests.calib.blocks.test_windows import Net, Store, calibrated, case, error, is_same, recipe

HOMOLOGOUS, MSE = get_method("homologous"), get_method("mse")


def data(output, target, same):
    return UnitData(
        lambda batch, _: output[batch], lambda batch: target[batch], [0], [1], same_inputs=lambda b: same[b]
    )


def homologous(of, **options):
    return HOMOLOGOUS.start(of, HOMOLOGOUS.Options(**options)).error([0, 1, 2]).item()


def test_it_is_the_weighted_mean_of_the_errors_against_both_targets():
    output, target, same = torch.randn(3, 3, 4, 5, generator=torch.Generator().manual_seed(0)).unbind()
    target[1] *= 100  # a row that would outweigh the others
    of = data(output, target, same)
    one, other = homologous(of, same_inputs=0), homologous(of, full_precision=0)
    rows = [(output - one).square().flatten(1).sum(1) / one.square().flatten(1).sum(1) for one in (target, same)]
    assert one == pytest.approx(rows[0].mean().item(), rel=1e-5)
    assert other == pytest.approx(rows[1].mean().item(), rel=1e-5)
    assert homologous(of) == pytest.approx((one + other) / 2, rel=1e-5)
    assert homologous(of, full_precision=3, same_inputs=1) == pytest.approx((3 * one + other) / 4, rel=1e-5)
    assert homologous(data(same, target, same), full_precision=0) == 0
    plain = MSE.start(of, MSE.Options()).error([0, 1, 2]).item()
    assert homologous(of, same_inputs=0, rows="absolute") == pytest.approx(plain, rel=1e-5)


def test_with_one_target_alone_the_other_is_not_computed_and_with_none_it_is_refused():
    def needs(**options):
        return needs_of(Learning(objective={"method": "homologous"} | options).objective)

    assert needs() == {SAME_INPUTS}
    assert needs(same_inputs=0) == frozenset()
    with pytest.raises(UsageError, match="full_precision and same_inputs"):
        Recipe.load("adaround").with_settings(
            learning={"objective": {"method": "homologous", "full_precision": 0, "same_inputs": 0}}
        )


def test_the_targets_are_full_precision_throughout_and_from_the_unit_on(tmp_path, monkeypatch):
    """In the first unit they are the same; in the last one the second is that of float blocks behind quantized ones."""
    seen, make, everything = [], block.Decider._data, range(len(Store.samples))

    def watching(decider, *others):
        found = make(decider, *others)
        seen.append((found.target(everything), found.same_inputs(everything)))
        return found

    monkeypatch.setattr(block.Decider, "_data", watching)
    exact = case()
    backbone, _ = calibrated(exact, recipe(objective="homologous"), tmp_path)
    assert torch.equal(*seen[0])
    kwargs = Store().batch(everything)[1]
    half = Net([*backbone.blocks[:2], *exact[0].blocks[2:]])
    with torch.no_grad():
        expected = [one(**kwargs)[0] for one in (exact[0], half)]
    assert not torch.equal(*expected)
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(seen[-1], expected, strict=True))


def test_a_cross_block_error_is_that_of_a_later_output_as_far_as_there_are_blocks():
    def task(number, unit="block", ahead=1):
        return tasks_of(BLOCKS, number, Learning(unit=unit, objective={"method": "cross_block", "ahead": ahead}))[0]

    assert (task(1).output, task(1).layers, task(1).blocks) == ("b.1", B0, ("b.0", "b.1"))
    assert task(1, ahead=5).output == task(3).output == "b.2"
    assert (task(2, "layer").output, task(2, "layer").layers) == ("b.2", B1[:1])
    assert task(1, "window").output == "b.2"
    assert task(0).output == "embed"
    assert task(2, ahead=0) == tasks_of(BLOCKS, 2, Learning())[0]


def test_cross_block_learning_gains_and_with_nothing_ahead_it_is_the_plain_error(tmp_path):
    exact = case()
    none, _ = calibrated(exact, recipe("block", objective={"method": "cross_block", "ahead": 0}), tmp_path / "none")
    plain, _ = calibrated(exact, recipe("block"), tmp_path / "plain")
    assert is_same(none, plain)
    ahead, done = calibrated(exact, recipe("block", objective="cross_block", iterations=40), tmp_path / "ahead")
    nearest, _ = calibrated(exact, recipe("block", iterations=0), tmp_path / "nearest")
    assert done.blocks[0]["tasks"][0]["name"] == "blocks.1"
    assert error(exact, ahead) < 0.9 * error(exact, nearest)
