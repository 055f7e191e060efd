"""Objectives: what each counts an error for, on outputs whose errors are known."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dmquant.calib.objectives import (
    UnitData,
    fisher,
    get_method,
    mse,
    prediction,
    sample_errors,
    sampler,
    squared_error,
)

SAMPLES, ROWS, TOKENS, CHANNELS = 6, 2, 20, 8


def seeded(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rows_of(batch):
    return [ROWS * index + row for index in batch for row in range(ROWS)]


def data_of(output, target, tail=None, importance=None):
    """A unit whose output is known, (samples * rows, ...); `tail` makes predictions of outputs."""

    def predict(batch, generator):
        own = output[rows_of(batch)]
        return own, tail(own)

    return UnitData(
        run=lambda batch, generator: output[rows_of(batch)],
        target=lambda batch: target[rows_of(batch)],
        learning=range(SAMPLES - 2),
        held_out=[SAMPLES - 2, SAMPLES - 1],
        predict=tail and predict,
        prediction=tail and (lambda batch: tail(target[rows_of(batch)])),
        importance=importance and (lambda batch: torch.tensor([importance[index] for index in batch])),
    )


@pytest.fixture
def outputs():
    """Output and target of all samples, the rows of very different sizes."""
    target = seeded(SAMPLES * ROWS, TOKENS, CHANNELS) * torch.logspace(-1, 1, SAMPLES * ROWS).view(-1, 1, 1)
    return target + 0.1 * seeded(*target.shape, seed=1), target


def started(method, data, **options):
    return method.start(data, method.Options(**options))


BATCH = [0, 3, 5]
IMPORTANCE = [0.1, 0.2, 0.7, 3.0, 1.0, 4.0]


@settings(max_examples=30, deadline=None)
@given(
    samples=st.integers(1, 4),
    rows=st.integers(1, 3),
    seed=st.integers(0, 999),
    dtype=st.sampled_from(["float32", "bfloat16"]),
)
def test_the_mean_of_the_samples_errors_is_the_squared_error(samples, rows, seed, dtype):
    shapes = (samples * rows, 3, 4), (samples * rows, 5)
    one, other = (
        [seeded(*shape, seed=seed + more).to(getattr(torch, dtype)) for shape in shapes]
        + [torch.ones(2, dtype=torch.int64)]
        for more in (0, 1)
    )
    errors = sample_errors(one, other, samples)
    assert errors.shape == (samples,)
    assert errors.mean().item() == pytest.approx(squared_error(one, other).item(), rel=1e-5)


def test_relative_errors_do_not_know_the_size_of_a_row(outputs):
    output, target = outputs
    sizes = torch.logspace(1, -1, len(output)).view(-1, 1, 1)
    errors = sample_errors(output, target, SAMPLES, relative=True)
    assert torch.allclose(sample_errors(output * sizes, target * sizes, SAMPLES, relative=True), errors, rtol=1e-3)
    by_row = [((output[row] - target[row]).square().sum() / target[row].square().sum()).item() for row in (2, 3)]
    assert errors[1].item() == pytest.approx(sum(by_row) / 2, rel=1e-4)


def test_a_row_that_is_zero_leaves_relative_errors_finite():
    target, output = torch.zeros(2, 4), torch.full((2, 4), 0.5)
    target[1] = 1
    assert torch.isfinite(sample_errors(output, target, 2, relative=True)).all()
    assert torch.isfinite(sample_errors(output, torch.zeros(2, 4), 2, relative=True)).all()


def test_the_sampler_weighs_samples_by_the_importance_of_their_steps(outputs):
    error = started(sampler, data_of(*outputs, importance=IMPORTANCE)).error(BATCH)
    of_samples = sample_errors(*outputs, SAMPLES, relative=True)
    assert error.item() == pytest.approx(sum(IMPORTANCE[i] * of_samples[i].item() for i in BATCH) / 3, rel=1e-5)
    alike = started(sampler, data_of(*outputs, importance=[1.0] * SAMPLES))
    assert alike.error(BATCH).item() == started(mse, data_of(*outputs), rows="relative").error(BATCH).item()


def test_without_a_weight_the_prediction_counts_for_nothing_and_is_not_made(outputs):
    def tail(output):
        raise AssertionError("the tail ran")

    data = data_of(*outputs, tail)
    objective = started(prediction, data, weight=0, every=1)
    plain = started(mse, data)
    assert objective.error(BATCH).item() == plain.error(BATCH).item()
    assert objective.loss(BATCH, None, 8).item() == plain.loss(BATCH, None, 8).item()


def test_an_exact_output_predicts_without_error(outputs):
    _, target = outputs
    objective = started(prediction, data_of(target, target, lambda output: output.square() + 1), weight=10)
    assert objective.error(BATCH).item() == 0


def test_the_predictions_error_is_relative_and_takes_the_size_of_the_output(outputs):
    output, target = outputs

    def weighted_part(factor):
        data = data_of(output, target, lambda output: factor * output.cumsum(-1))
        return started(prediction, data, weight=2.0).error(BATCH).item() - started(mse, data).error(BATCH).item()

    rows = rows_of(BATCH)
    relative = sample_errors(output[rows].cumsum(-1), target[rows].cumsum(-1), 3, relative=True).mean().item()
    size = target[rows_of([SAMPLES - 2, SAMPLES - 1])].square().mean().item()
    assert weighted_part(1.0) == pytest.approx(2 * size * relative, rel=1e-4)
    assert weighted_part(100.0) == pytest.approx(weighted_part(1.0), rel=1e-4)


def test_the_prediction_is_looked_at_every_few_steps(outputs):
    data = data_of(*outputs, lambda output: output.square())
    objective, plain = started(prediction, data, every=4), started(mse, data).error(BATCH)
    losses = torch.stack([objective.loss(BATCH, None, step) for step in range(1, 9)])
    assert [loss.item() == plain.item() for loss in losses] == [True, True, True, False] * 2
    assert losses[3].item() == losses[7].item() == objective.error(BATCH).item() > plain.item()


def test_with_guidance_an_error_that_both_rows_have_counts_once_and_their_difference_by_the_scale():
    target = seeded(SAMPLES * ROWS, CHANNELS) + 5
    shift, conditional = torch.full_like(target, 0.01), torch.zeros_like(target)
    conditional[1::2] = 0.01

    def error(difference, guidance):
        data = data_of(target + difference, target, lambda output: output)
        return started(prediction, data, guidance=guidance, weight=1e6).error(BATCH).item()

    assert error(shift, 3.0) == pytest.approx(error(shift, 1.0), rel=0.5)
    assert error(conditional, 3.0) > 5 * error(conditional, 1.0)


def test_steps_of_the_prediction_may_weigh_as_the_sampler_has_them(outputs):
    data = data_of(*outputs, lambda output: output, importance=IMPORTANCE)
    objective = started(prediction, data, steps="sampler")
    of_samples = sample_errors(*outputs, SAMPLES, relative=True)
    expected = sum(IMPORTANCE[i] * of_samples[i].item() for i in BATCH) / 3
    assert objective.of_prediction(outputs[0][rows_of(BATCH)], BATCH).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("per", "shape"), [("channel", (1, 1, CHANNELS)), ("element", (1, TOKENS, CHANNELS))])
def test_fisher_weighs_a_channel_by_how_far_the_prediction_depends_on_it(per, shape):
    """The diagonal of J^T J, which for a linear tail is the sum of squares of its rows."""
    weight = seeded(CHANNELS, 200) * torch.logspace(-1, 1, CHANNELS)[:, None]
    target = seeded(SAMPLES * ROWS, TOKENS, CHANNELS)
    data = data_of(target.clone().requires_grad_(), target, lambda output: output @ weight)
    objective = started(fisher, data, per=per)
    [found] = objective.weights
    exact = weight.square().sum(1)
    assert found.shape == shape
    assert found.mean().item() == pytest.approx(1, rel=1e-5)
    assert torch.allclose(found.mean(1).flatten(), exact / exact.mean(), rtol=0.5)
    off = target + torch.eye(CHANNELS)[-1]
    errors = (
        started(mse, data_of(off, target)).error(BATCH),
        (off - target).square().mul(found)[rows_of(BATCH)].mean(),
    )
    objective.data = data_of(off, target)
    assert objective.error(BATCH).item() == pytest.approx(errors[1].item(), rel=1e-5)
    assert objective.error(BATCH) > 3 * errors[0]


def test_what_they_need_is_known_before_they_start():
    def needs(name, **options):
        method = get_method(name)
        return set(method.needs(method.Options(**options)))

    assert needs("prediction") == needs("fisher") == {"tail"}
    assert needs("prediction", steps="sampler") == {"tail", "importance"}
    assert needs("sampler") == {"importance"}
