"""FID, KID and CMMD against the same distances computed in other ways."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dmquant.diffusers.torchvision import ensure_torchvision_imports
from dmquant.evaluation import set_distances
from dmquant.evaluation.set_distances import frechet_distance, gaussian_kernel, polynomial_kernel, squared_mmd

ensure_torchvision_imports()

from torchmetrics.image.fid import _compute_fid
from torchmetrics.image.kid import poly_mmd


def features(n, dimension=12, seed=0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dimension, dimension, generator=generator)
    return torch.randn(n, dimension, generator=generator) @ mixing + shift


def torch_fidelitys_formula(a, b):
    """As torch-fidelity's metric_fid.py has it: numpy's covariances and scipy's matrix square root, in float64."""
    a, b = a.double().numpy(), b.double().numpy()
    sigma_a, sigma_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(sigma_a @ sigma_b)
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(sigma_a) + np.trace(sigma_b) - 2 * np.trace(root.real)


def by_symmetric_eigenvalues(a, b):
    """tr (A^1/2 B A^1/2)^1/2 from eigenvalues of symmetric matrices alone, which also holds for too few images."""
    a, b = a.double().numpy(), b.double().numpy()
    sigma_a, sigma_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(sigma_a)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    inner = np.linalg.eigvalsh(root @ sigma_b @ root).clip(0)
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(sigma_a) + np.trace(sigma_b) - 2 * np.sqrt(inner).sum()


@pytest.mark.parametrize(("n", "m"), [(200, 150), (60, 2000)])
def test_fid_is_torch_fidelitys_and_torchmetrics_to_a_millionth(n, m):
    a, b = features(n), features(m, seed=1, shift=0.3)
    statistics = [value for x in (a.double(), b.double()) for value in (x.mean(0), x.T.cov())]
    distance = frechet_distance(a, b)
    assert distance == pytest.approx(torch_fidelitys_formula(a, b), rel=1e-6)
    assert distance == pytest.approx(float(_compute_fid(*statistics)), rel=1e-6)


@pytest.mark.parametrize(("n", "m"), [(5, 7), (2, 2), (12, 3)])
def test_fid_of_fewer_images_than_features_is_exact_too(n, m):
    a, b = features(n), features(m, seed=1)
    assert frechet_distance(a, b) == pytest.approx(by_symmetric_eigenvalues(a, b), rel=1e-6)


def test_fid_of_a_shift_is_its_squared_length():
    a = features(300).double()
    assert frechet_distance(a, a + 2.0) == pytest.approx(12 * 4.0, rel=1e-9)


def test_fid_does_not_depend_on_how_the_sets_are_cut(monkeypatch):
    a, b = features(100), features(90, seed=1)
    whole = frechet_distance(a, b)
    monkeypatch.setattr(set_distances, "ROWS", 7)
    assert frechet_distance(a, b) == pytest.approx(whole, rel=1e-10)


@settings(deadline=None, max_examples=25)
@given(n=st.integers(2, 40), m=st.integers(2, 40), seed=st.integers(0, 1000))
def test_fid_is_symmetric_never_negative_and_blind_to_order(n, m, seed):
    a, b = features(n, seed=seed), features(m, seed=seed + 1)
    distance = frechet_distance(a, b)
    shuffled = a[torch.randperm(n, generator=torch.Generator().manual_seed(seed))]
    assert distance >= 0
    assert frechet_distance(b, a) == pytest.approx(distance, rel=1e-8, abs=1e-8)
    assert frechet_distance(shuffled, b) == pytest.approx(distance, rel=1e-8, abs=1e-8)
    assert frechet_distance(a, shuffled) == pytest.approx(0, abs=1e-6)


def test_kid_is_torchmetrics_over_one_subset_of_all():
    a, b = features(50), features(50, seed=1, shift=0.2)
    distance, _ = squared_mmd(a, b, polynomial_kernel, unbiased=True, paired=False)
    assert distance == pytest.approx(float(poly_mmd(a.double(), b.double())), rel=1e-9)


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize(("kernel", "unbiased"), [(polynomial_kernel, True), (gaussian_kernel, False)])
def test_the_standard_error_is_that_of_leaving_out_one_after_another(kernel, unbiased, paired):
    a, b = features(9).double(), features(9, seed=1).double()

    def without(x, index):
        return torch.cat([x[:index], x[index + 1 :]])

    def value(x, y):
        return squared_mmd(x, y, kernel, unbiased, paired)[0]

    def variance(values):
        return (len(values) - 1) * np.var(values)

    if paired:
        expected = variance([value(without(a, i), without(b, i)) for i in range(9)])
    else:
        expected = variance([value(without(a, i), b) for i in range(9)])
        expected += variance([value(a, without(b, i)) for i in range(9)])
    _, error = squared_mmd(a, b, kernel, unbiased, paired)
    assert error == pytest.approx(math.sqrt(expected), rel=1e-6)


def test_kid_does_not_depend_on_how_the_sets_are_cut(monkeypatch):
    a, b = features(50), features(40, seed=1)
    whole = squared_mmd(a, b, polynomial_kernel, unbiased=True, paired=False)
    monkeypatch.setattr(set_distances, "ROWS", 7)
    assert squared_mmd(a, b, polynomial_kernel, unbiased=True, paired=False) == pytest.approx(whole, rel=1e-9)


def test_kid_of_two_draws_of_one_distribution_is_zero_on_average():
    draws = torch.randn(80, 40, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = np.array(
        [
            squared_mmd(x, y, polynomial_kernel, unbiased=True, paired=False)[0]
            for x, y in zip(draws[::2], draws[1::2], strict=True)
        ]
    )
    assert (values < 0).any()
    assert abs(values.mean()) < 3 * values.std() / math.sqrt(len(values))


def test_kid_of_pairs_that_depend_on_one_another_is_unbiased():
    """Second images that repeat the first ones but for noise: the populations are nearly the same."""
    draws = torch.randn(60, 20, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = 0.05 * torch.randn(draws.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    pairs = list(zip(draws, draws + noise, strict=True))

    def mean_and_error(paired):
        values = [squared_mmd(x, y, polynomial_kernel, unbiased=True, paired=paired)[0] for x, y in pairs]
        return np.mean(values), np.std(values) / math.sqrt(len(values))

    mean, error = mean_and_error(paired=True)
    assert abs(mean) < 3 * error
    counted, error = mean_and_error(paired=False)
    assert counted < -10 * error, "with the pairs' own kernels it is far below zero"
