"""The compiled parts of learned roundings, against the eager code and against derivatives in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dmquant.activations import ActivationSpec
from dmquant.cpu import learning
from dmquant.cpu.compiling import missing_compiler
from dmquant.rounding import adaround
from tests.calib.blocks.test_learn import ar, learned, problem
from tests.rounding.test_rounding import grid_of

pytestmark = pytest.mark.skipif(missing_compiler() is not None, reason="needs a C++ compiler")


@pytest.fixture
def eager(monkeypatch):
    """A function of no arguments after which nothing is compiled."""
    return lambda: monkeypatch.setattr(learning, "takes", lambda *tensors: False)


def in_float64(rounding, beta, factor, gradient):
    """Soft weights, and the gradient by V of their product with `gradient` and of the penalty."""
    v = rounding.v.detach().double().requires_grad_()
    h = torch.sigmoid(v if rounding.step is None else v / rounding.step.double())
    gate = (h * (adaround.ZETA - adaround.GAMMA) + adaround.GAMMA).clamp(0, 1)
    soft = torch.lerp(rounding.lower.double(), rounding.upper.double(), gate)
    ((soft * gradient).sum() + factor * (1 - (2 * gate - 1).abs().pow(beta)).sum()).backward()
    return soft.detach(), v.grad


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 70),
    format=st.sampled_from(["fp4", "fp6", "int3"]),
    scale_aware=st.booleans(),
    spread=st.sampled_from([0.1, 3.0, 300.0]),
    progress=st.floats(0.2, 1.0),
    seed=st.integers(0, 999),
)
def test_soft_weights_and_gradients_are_those_of_float64(rows, columns, format, scale_aware, spread, progress, seed):
    grid = grid_of(format, shape=(rows, columns), seed=seed)
    options = adaround.Options(scale_aware=scale_aware, regularizer=2.0)
    rounding, generator = adaround.start(grid, options), torch.Generator().manual_seed(seed)
    drawn = spread * torch.randn(rows, columns, generator=generator)
    rounding.v.data = drawn * (grid.step if scale_aware else 1)
    gradient = torch.randn(rows, columns, generator=generator)
    beta = 20 - 18 * (progress - 0.2) / 0.8
    expected, by_v = in_float64(rounding, beta, 0.5 * 2.0, gradient.double())
    soft = rounding()
    soft.backward(gradient)
    rounding.add_penalty_gradient_(progress, 0.5)
    assert ((soft - expected).abs() <= 3e-7 * expected.abs() + 1e-6 * (rounding.upper - rounding.lower)).all()
    size = rounding.step if scale_aware else 1  # a gradient by V' is one by V over the step
    edge = (rounding().detach() == rounding.lower) | (rounding().detach() == rounding.upper)  # float32 may clip first
    assert ((rounding.v.grad - by_v).abs() * size <= 2e-5 * (1 + (by_v * size).abs())).logical_or(edge).all()


def test_weights_that_are_decided_or_have_nowhere_to_go_are_not_moved():
    grid = grid_of()
    rounding = adaround.start(grid, adaround.Options())
    rounding.v.data = torch.where(torch.arange(grid.weight.numel()).view_as(grid.weight) % 2 == 0, 9.0, -9.0)
    rounding().sum().backward()
    rounding.add_penalty_gradient_(0.5, 1.0)
    assert not rounding.v.grad.any()


@pytest.mark.parametrize("scale_aware", [False, True])
def test_learning_goes_the_way_of_the_eager_code(scale_aware, eager):
    """But for weights whose gradient is nearly none, of which Adam takes no more than the sign."""
    runs, activations = [], ActivationSpec.parse("fp4", "token")
    for prepare in (lambda: None, eager):
        prepare()
        losses = []
        case = problem(ar, activations=activations, scale_aware=scale_aware)
        rate = 0.01 if scale_aware else 0.1
        done, kept = learned(
            case, lambda step, loss, to=losses: to.append(loss), iterations=60, learning_rate=rate, checks=1
        )
        runs.append((losses, done.error, kept["layer"].values))
    compiled, plain = runs
    assert compiled[0] == pytest.approx(plain[0], rel=1e-5)
    assert compiled[1] == pytest.approx(plain[1], rel=1e-4)
    assert (compiled[2] == plain[2]).float().mean() > 0.999


def test_what_is_not_compiled_is_left_to_the_eager_code():
    whole = torch.randn(4, 6)
    assert learning.takes(whole, None)
    assert not learning.takes(whole.T)
    assert not learning.takes(whole.double())
    assert not learning.takes(whole.to("meta"))
