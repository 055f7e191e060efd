"""Q-GaLore: what its small numbers hold, when its subspaces last, and that it learns as AdamW does."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dmquant.calib.tuning.eight_bit import BLOCK, GROUP, Int4, Int8, Moments, dynamic_map
from dmquant.calib.tuning.held import Held, Mirrored, as_stored, predicted_bytes, storable
from dmquant.calib.tuning.optimizers import AdamW, Lean, QGaLore
from dmquant.calib.tuning.student import facts_of, load_facts
from dmquant.calib.tuning.subspace import Subspace, leading

CPU = torch.device("cpu")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_dynamic_map_has_seven_decades_of_values_each_twice_as_dense_as_the_one_below():
    for signed, smallest in ((True, 5.5e-7), (False, 3.25e-7)):  # means of the parts of 0.1 to 1, times 1e-6
        values = dynamic_map(signed)
        assert len(values) == len(values.unique()) == 256
        assert values.max() == 1
        assert values[values > 0].min() == pytest.approx(smallest)
        counts = [int(((values > 10.0 ** (n - 1)) & (values < 10.0**n)).sum()) for n in range(-6, 1)]
        assert counts == [(1 if signed else 2) * 2**n for n in range(7)]
    inner = dynamic_map(True)[:-1]  # all but 1, which has no opposite
    assert torch.equal(inner, -inner.flip(0))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 5000), st.integers(0, 2**31), st.booleans(), st.floats(1e-12, 1e10))
def test_moments_are_the_nearest_of_the_map_times_the_largest_of_their_block(count, seed, signed, scale):
    values = torch.randn(count, generator=generator(seed)) * scale
    values = values if signed else values.square()
    moments = Moments.zeros((count,), signed, CPU)
    assert not moments.decode().any()
    moments.encode(values)
    for block, decoded in zip(values.split(BLOCK), moments.decode().split(BLOCK), strict=True):
        largest = block.abs().max()
        nearest = (block[:, None] / largest - dynamic_map(signed)).abs().amin(1) * largest
        assert torch.allclose((decoded - block).abs(), nearest, atol=1e-6 * largest.item(), rtol=0)


def test_stochastic_rounding_has_the_mean_of_what_it_rounds_and_the_variance_of_a_coin():
    weights = Int8.of(torch.tensor([-1.0, 1.0]).repeat(GROUP // 2), generator())
    step = float(weights.step[0])
    wanted = (weights.decode()[0] + (100 + 0.3) * step).expand(GROUP)
    drawn = []
    for seed in range(400):
        weights.assign(wanted, generator(seed))
        drawn.append(weights.decode())
    drawn = torch.stack(drawn)
    deviation = (0.3 * 0.7) ** 0.5 * step
    assert drawn.mean().item() == pytest.approx(wanted[0].item(), abs=5 * deviation / drawn.numel() ** 0.5)
    assert drawn.std().item() == pytest.approx(deviation, rel=0.02)


def test_weights_that_are_inside_their_range_keep_it_and_those_that_are_not_are_never_clipped():
    weights = Int8.of(torch.randn(3, 300, generator=generator()), generator())
    low, step, values = weights.low.clone(), weights.step.clone(), weights.decode()
    assert values.shape == (3, 300)
    weights.assign(values + 0.3 * step.max(), generator())
    assert torch.equal(weights.low, low)
    far = values.clone()
    far[0, 0] = 100.0
    weights.assign(far, generator())
    assert weights.decode()[0, 0].item() == pytest.approx(100, abs=float(weights.step[0]))
    assert torch.equal(weights.low[1:], low[1:])


def test_steps_below_half_a_step_of_the_grid_arrive_by_stochastic_rounding_and_never_by_nearest():
    target, rate = torch.linspace(-0.9, 0.9, GROUP), 0.2
    ends = torch.tensor([-1.0, 1.0]).repeat(GROUP // 2)
    stochastic, nearest = Int8.of(ends, generator()), Int8.of(ends, generator())
    began, step, draws = nearest.decode(), float(nearest.step[0]), generator(1)
    rounded = began.clone()
    for _ in range(2000):
        values = stochastic.decode()
        stochastic.assign(values - rate * step * (values - target).sign(), draws)
        moved = rounded - rate * step * (rounded - target).sign()
        rounded = ((moved - nearest.low[0]) / step).round() * step + nearest.low[0]
    assert torch.allclose(rounded, began, atol=1e-5)
    assert (stochastic.decode() - target).abs().mean() < 2 * step


def test_a_basis_of_four_bits_projects_gradients_nearly_as_its_own():
    gradient = torch.randn(256, 128, generator=generator())
    basis = leading(gradient, 32)
    exact, held = gradient @ basis, gradient @ Int4.of(basis).decode()
    assert torch.cosine_similarity(exact.flatten(), held.flatten(), dim=0) >= 0.99
    assert Int4.of(basis).packed.nbytes == basis.numel() // 2


@pytest.mark.parametrize("ends", [(1.0, 1.0), (0.5, 1.5), (-1.0, 1.0)])
def test_a_basis_of_four_bits_holds_directions_of_one_sign_too(ends):
    """q-galore-torch 1.0 loses up to all of them: its zero point cannot be negative."""
    gradient = torch.randn(300, 1, generator=generator()) @ torch.linspace(*ends, 256)[None]
    subspace = Subspace(rank=1, gap=1, stable=0.4)
    subspace.update(gradient)
    back = subspace.back(subspace.project(gradient), gradient.shape)
    assert torch.linalg.norm(back - gradient) < 0.1 * torch.linalg.norm(gradient)


@pytest.mark.parametrize("shape", [(48, 24), (24, 48), (24, 24)])
def test_a_basis_of_full_rank_loses_nothing_and_a_smaller_one_keeps_the_most(shape):
    gradient = torch.randn(shape, generator=generator()).double()
    tall = shape[0] >= shape[1]
    for rank in (24, 6):
        basis = leading(gradient, rank)
        back = gradient @ basis @ basis.T if tall else basis @ basis.T @ gradient
        lost = torch.linalg.svdvals(gradient)[rank:].square().sum().sqrt()
        assert torch.linalg.norm(gradient - back).item() == pytest.approx(lost.item(), abs=1e-9)


def test_the_gap_doubles_where_the_subspace_stays_whatever_its_signs_and_never_where_it_turns():
    constant = torch.randn(32, 16, generator=generator())
    stable, turning = Subspace(4, 3, 0.4), Subspace(4, 3, 0.4)
    draws = generator(1)
    for step in range(3 * 5 + 1):
        assert stable.gap == 3, step
        stable.update(constant if step % 2 else -constant)  # the same space, and an SVD's signs are its own
        turning.update(torch.randn(32, 16, generator=draws))
    assert stable.gap == 6
    assert turning.gap == 3
    assert sum(turning.overlaps) / 5 < 0.4  # of random subspaces: 4 / 16


def test_moments_turn_with_the_subspace():
    optimizer = QGaLore((64, 128), Lean(rank=0.5, gap=2), CPU)
    gradient = torch.randn(64, 128, generator=generator())
    for _ in range(2):
        optimizer.take(gradient)
        optimizer.step()
    before = optimizer.subspace.back(optimizer.first.decode(), (64, 128))
    optimizer.take(-gradient)
    optimizer.step()  # a new basis of the same space, of other signs perhaps
    first = optimizer.first.decode() + 0.1 * optimizer.subspace.project(gradient)  # without this gradient's part
    after = optimizer.subspace.back(first / 0.9, (64, 128))
    assert torch.cosine_similarity(before.flatten(), after.flatten(), dim=0) > 0.98


@pytest.mark.parametrize("kind", [AdamW, lambda shape, device: QGaLore(shape, Lean(rank=0.5, gap=1), device)])
def test_a_gradient_may_come_in_parts(kind):
    parts = torch.randn(3, 64, 96, generator=generator())
    whole, by_parts = kind((64, 96), CPU), kind((64, 96), CPU)
    for part in (parts[0], *parts[1:]):
        by_parts.take(part)
    whole.take(parts[0])
    whole.take(parts[1] + parts[2])
    assert torch.allclose(whole.step(), by_parts.step(), atol=1e-5)
    whole.take(parts[0])
    by_parts.take(parts[0])
    assert torch.allclose(whole.step(), by_parts.step(), atol=1e-5)  # nothing is left of the parts


def test_adamw_is_torchs_without_decay():
    values = torch.randn(7, 5, generator=generator())
    theirs = torch.nn.Parameter(values.clone())
    reference, ours, own = torch.optim.AdamW([theirs], lr=0.01, weight_decay=0.0), AdamW((7, 5), CPU), values.clone()
    for seed in range(20):
        theirs.grad = torch.randn(7, 5, generator=generator(seed))
        reference.step()
        ours.take(theirs.grad)
        own -= 0.01 * ours.step()
    assert torch.allclose(own, theirs, atol=1e-6)


def learned(lean, steps=250):
    """Loss and optimizer bytes of a matrix (256, 128) that learns a linear map from inputs of few directions."""
    mixed = torch.randn(16, 128, generator=generator(1)) / 4
    wanted, held = torch.randn(256, 128, generator=generator(2)), Held(torch.zeros(256, 128), lean, seed=3)
    draws, losses = generator(4), []
    for step in range(steps):
        held.rate = 0.05 * (1 - step / steps)
        x = torch.randn(64, 16, generator=draws) @ mixed + 0.1 * torch.randn(64, 128, generator=draws)
        loss = (x @ (held.read() - wanted).T).square().mean()
        loss.backward()
        held.step()
        losses.append(loss.item())
    return sum(losses[-20:]) / 20 / losses[0], held.optimizer_bytes


def test_q_galore_learns_within_a_twentieth_of_adamws_loss_in_less_than_a_third_of_its_memory():
    (adamw, its_bytes), (lean, our_bytes) = learned(None), learned(Lean())
    assert our_bytes <= 0.30 * its_bytes
    assert 1 - lean >= 0.95 * (1 - adamw)  # of what there was to learn


@pytest.mark.parametrize("lean", [None, Lean(gap=2)])
def test_a_tensor_that_is_stopped_and_loaded_takes_the_same_steps_to_the_byte(lean):
    def steps(held, count, seed):
        for number in range(count):
            held.rate = 0.01
            held.take(torch.randn(80, 64, generator=generator(seed + number)))
            held.step()

    straight, stopped, resumed = (Held(torch.ones(80, 64), lean, seed=5) for _ in range(3))
    steps(straight, 7, 0)
    steps(stopped, 4, 0)
    steps(resumed, 2, 50)
    load_facts({"a": resumed}, *facts_of({"a": stopped}))
    steps(resumed, 3, 4)
    assert torch.equal(straight.values(), resumed.values())
    assert all(
        torch.equal(*pair) for pair in zip(straight.state()[0].values(), resumed.state()[0].values(), strict=True)
    )


@pytest.mark.parametrize(
    ("shape", "lean"), [((256, 96), Lean()), ((96, 256), Lean()), ((96, 256), None), ((60,), Lean())]
)
def test_memory_is_predicted_and_no_gradient_is_left(shape, lean):
    held = Held(torch.ones(shape), lean)
    values = held.read()
    (values * torch.randn(shape, generator=generator())).sum().backward()
    owned = held.optimizer_bytes + sum(tensor.nbytes for tensor in held.snapshot().values())
    assert owned == pytest.approx(predicted_bytes(shape, lean), rel=0.05)
    assert not values.is_leaf or values.grad is None


def test_a_gradient_that_is_not_finite_changes_nothing_and_is_remembered():
    held = Held(torch.ones(3))
    held.rate = 1.0
    held.take(torch.tensor([1.0, torch.inf, 0.0]))
    held.step()
    assert held.broken
    assert torch.equal(held.values(), torch.ones(3))


def test_a_parameter_of_sixteen_bits_learns_by_steps_that_it_could_not_hold_itself():
    module = torch.nn.LayerNorm(4).bfloat16()
    held = Mirrored(module.weight, storable(module.weight))
    for _ in range(64):
        held.rate = 1e-3  # below 1 the next number is 1/256 away, and what is nearer to 1 would be lost each time
        module.weight.sum().backward()
        assert module.weight.grad is None
    assert module.weight.dtype == torch.bfloat16
    assert (module.weight.float() < 0.95).all()
    assert held.values().dtype == torch.float32


def test_what_is_stored_in_few_bits_is_computed_with_as_stored():
    assert storable(torch.tensor([0.5, 3.0])) == torch.bfloat16
    assert storable(torch.tensor([1 / 3])) == torch.float32
    values = torch.tensor([1 / 3], requires_grad=True)
    as_stored(values, torch.bfloat16).backward()
    assert as_stored(values, torch.bfloat16) == torch.tensor([1 / 3]).bfloat16().float()
    assert values.grad == 1
