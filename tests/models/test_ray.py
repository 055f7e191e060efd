"""Work on a real Ray, started here: what local processes give. `.ci/run` installs Ray and runs this file alone."""

import os

import pytest

pytest.importorskip("ray", reason="installed apart from what the other tests need, see .ci/run")

import ray

from dmquant.errors import UserError
from dmquant.pipelines.sweep.engines import Crew, on_ray
from tests.models import test_sweep
from tests.models.test_sweep import numbers, sweep

options = test_sweep.options


@pytest.fixture(scope="module", autouse=True)
def _cluster():
    ray.init(num_cpus=2, log_to_driver=False, include_dashboard=False)
    yield
    ray.shutdown()


def die_at_two(number):
    if number == 2:
        os._exit(1)
    return os.getpid(), 10 * number


def test_what_dies_is_an_error_and_takes_nothing_else_with_it():
    outcomes = dict(on_ray(die_at_two, [1, 2, 3, 4], Crew(2, 1)))
    assert isinstance(outcomes.pop(2), UserError)
    assert {number: result for number, (_, result) in outcomes.items()} == {1: 10, 3: 30, 4: 40}
    assert os.getpid() not in {process for process, _ in outcomes.values()}


def test_a_sweep_gives_the_same_numbers_as_local_processes(options, tmp_path):
    for engine in ("local", "ray"):
        sweep(options, tmp_path / engine, engine=engine, workers=2)
    assert numbers(tmp_path / "ray") == numbers(tmp_path / "local")
