import itertools
import random
from collections import Counter

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dmquant.calib.data.sampling import SAMPLERS, Sampling, choose, held_out_steps
from dmquant.errors import UsageError

STEPS, COUNTS, PROMPTS, SEEDS = st.integers(1, 100), st.integers(1, 110), st.integers(2, 40), st.integers(0, 5)


def weights_of(sampler, steps):
    return [1.0 + step for step in range(steps)] if sampler == "importance" else None


def learned(samples):
    steps = {}
    for sample in samples:
        if not sample.held_out:
            steps.setdefault(sample.prompt, []).append(sample.step)
    return steps


@pytest.mark.parametrize("sampler", SAMPLERS)
@settings(deadline=None)
@given(steps=STEPS, count=COUNTS, prompts=PROMPTS, seed=SEEDS, share=st.floats(0.01, 0.99))
def test_every_sampler_keeps_what_was_asked_for_and_holds_the_rest_apart(sampler, steps, count, prompts, seed, share):
    sampling, weights = Sampling(sampler, count, share, seed), weights_of(sampler, steps)
    samples = choose(sampling, prompts, steps, weights)
    assert samples == choose(sampling, prompts, steps, weights)
    assert samples == sorted(set(samples), key=lambda sample: (sample.prompt, sample.step))
    assert {sample.prompt for sample in samples} == set(range(prompts))
    assert all(0 <= sample.step < steps for sample in samples)
    apart = [sample for sample in samples if sample.held_out]
    seen = [sample for sample in samples if not sample.held_out]
    assert apart
    assert seen
    assert not {sample.prompt for sample in apart} & {sample.prompt for sample in seen}
    if steps >= 8:
        assert not {sample.step for sample in apart} & {sample.step for sample in seen}
    wanted = min(count, steps - steps // 8)
    assert all(len(kept) == wanted for kept in learned(samples).values())


@settings(deadline=None)
@given(steps=st.integers(8, 300))
def test_held_out_steps_are_an_eighth_spread_over_the_inside_of_the_schedule(steps):
    apart = held_out_steps(steps)
    assert len(set(apart)) == steps // 8
    assert apart[0] > 0
    assert apart[-1] < steps - 1
    gaps = [after - before for before, after in zip([0, *apart], [*apart, steps - 1], strict=True)]
    assert max(gaps) - min(gaps) <= 1


def test_the_held_out_share_of_prompts():
    samples = choose(Sampling("uniform", 1, 0.125, 0), 64, 20)
    assert len({sample.prompt for sample in samples if sample.held_out}) == 8
    assert {s.prompt for s in choose(Sampling("uniform", 1, 0.125, 1), 64, 20) if s.held_out} != {
        s.prompt for s in samples if s.held_out
    }


@settings(deadline=None)
@given(steps=st.integers(1, 100), count=st.integers(1, 100))
def test_uniform_is_evenly_spaced_and_takes_the_same_steps_of_every_prompt(steps, count):
    assume(count <= steps)
    kept = SAMPLERS["uniform"](range(steps), count, None, None)
    gaps = [after - before for before, after in itertools.pairwise(kept)]
    assert all(steps // count <= gap <= -(-steps // count) for gap in gaps)
    assert abs(kept[0] - (steps - 1 - kept[-1])) <= steps / count
    prompts = learned(choose(Sampling("uniform", count, 0.5, 3), 6, steps)).values()
    assert all(one == next(iter(prompts)) for one in prompts)


@settings(deadline=None)
@given(bins=st.integers(1, 12), width=st.integers(1, 9), seed=SEEDS)
def test_stratified_takes_one_step_in_each_bin(bins, width, seed):
    kept = SAMPLERS["stratified"](range(bins * width), bins, random.Random(seed), None)
    assert [step // width for step in kept] == list(range(bins))


def test_stratified_reaches_every_step_evenly_over_the_prompts():
    samples = choose(Sampling("stratified", 4, 0.01, 0), 2000, 20)
    counts = Counter(sample.step for sample in samples if not sample.held_out)
    assert set(counts) == set(range(20)) - set(held_out_steps(20))
    # 18 steps in bins of 4 and 5: a step is kept with probability 1/4 or 1/5
    assert all(0.17 < count / 2000 < 0.29 for count in counts.values())


def test_importance_draws_in_proportion_to_the_weights():
    weights = [8.0, 4.0, 2.0, 1.0, 1.0, 0.0]
    samples = choose(Sampling("importance", 1, 0.001, 0), 8000, 6, weights)
    counts = Counter(sample.step for sample in samples)
    for step, weight in enumerate(weights):
        assert counts[step] / 8000 == pytest.approx(weight / 16, abs=0.02)


def test_importance_draws_without_replacement():
    """Two of three with weights 2, 1, 1: the heavy one is missing with probability 2 * 1/4 * 1/3 = 1/6."""
    kept = learned(choose(Sampling("importance", 2, 0.001, 0), 8000, 3, [2.0, 1.0, 1.0])).values()
    assert sum(0 not in steps for steps in kept) / len(kept) == pytest.approx(1 / 6, abs=0.015)


def test_prompts_and_seeds_draw_differently():
    one, other = (learned(choose(Sampling("stratified", 4, 0.1, seed), 30, 20)) for seed in (0, 1))
    assert len({tuple(steps) for steps in one.values()}) > 20
    assert one != other


def test_what_makes_no_sense_is_refused():
    with pytest.raises(UsageError, match=r"at least 2 prompts.*given 1"):
        choose(Sampling("uniform", 4, 0.1), 1, 20)
    with pytest.raises(UsageError, match="0 steps a prompt"):
        Sampling("uniform", 0, 0.1)
    with pytest.raises(UsageError, match=r"unknown timestep sampler 'stratifed': did you mean 'stratified'\?"):
        Sampling("stratifed", 4, 0.1)
    with pytest.raises(UsageError, match=r"fraction of 1\.0"):
        Sampling("uniform", 4, 1.0)
    with pytest.raises(UsageError, match="needs the weight of every step"):
        choose(Sampling("importance", 4, 0.1), 4, 20)
