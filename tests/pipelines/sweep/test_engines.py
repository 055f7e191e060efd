"""Engines: every item is done once, a process that dies loses its item alone, and none outlives the command."""

import os
import signal
import sys
import textwrap
import time
import types
from pathlib import Path

import pytest
import torch

from dmquant.errors import UserError
from dmquant.pipelines.sweep.engines import ENGINES, Crew, check_alone, check_engine, local, on_ray
from tests.forked import Forked

ROOT = Path(__file__).parents[3]
PATIENCE = 120  # seconds for processes to start on a busy machine


def threads_and_square(number):
    if number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return torch.get_num_threads(), number**2


def process(number):
    return os.getpid()


def test_one_process_does_all_items_one_after_another():
    assert len({result for _, result in local(process, range(4), Crew(1, 1))}) == 1
    assert list(local(process, [], Crew(2, 1))) == []


def test_every_item_is_done_once_and_a_process_that_dies_loses_its_own_and_is_replaced():
    done = list(local(threads_and_square, [1, 2, 3, 4], Crew(2, 1)))
    outcomes = dict(done)
    assert len(done) == len(outcomes)
    assert isinstance(outcomes.pop(2), UserError)
    assert outcomes == {n: (1, n**2) for n in (1, 3, 4)}


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGINT])
def test_no_process_outlives_the_command(tmp_path, ending):
    script = f"""
        import os, pathlib, signal, sys, time
        from dmquant.pipelines.sweep.engines import Crew, local
        sys.path.insert(0, {str(tmp_path)!r})
        import work
        if __name__ == "__main__":
            list(local(work.sleep, [{str(tmp_path / "one")!r}, {str(tmp_path / "two")!r}], Crew(2, 1)))
    """
    (tmp_path / "work.py").write_text(
        "import os, pathlib, time\n"
        "def sleep(path):\n    pathlib.Path(path).write_text(str(os.getpid()))\n    time.sleep(600)\n"
    )
    (tmp_path / "script.py").write_text(textwrap.dedent(script))
    main = Forked([tmp_path / "script.py"], {"PYTHONPATH": f"{ROOT}:{tmp_path}"})
    try:
        pids = [int(_when(lambda name=name: (tmp_path / name).read_text())) for name in ("one", "two")]
    finally:
        main.send_signal(ending)
    assert main.wait(PATIENCE) != 0
    for pid in pids:
        _when(lambda pid=pid: not _lives(pid))


def _when(condition):
    """What `condition` gives as soon as that is something."""
    began = time.monotonic()
    while time.monotonic() - began < PATIENCE:
        try:
            if found := condition():
                return found
        except OSError:
            pass
        time.sleep(0.05)
    raise AssertionError("it did not happen in time")


def _lives(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_the_crew_shares_out_threads(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    assert Crew.of(None, None, "cpu") == Crew(1, 8)
    assert Crew.of(3, None, "cpu") == Crew(3, 2)
    assert Crew.of(16, None, "cpu") == Crew(16, 1)
    assert Crew.of(2, 1, "cpu") == Crew(2, 1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert Crew.of(None, None, "cuda") == Crew(4, 2, gpus=4)
    assert Crew.of(None, None, "cuda:1") == Crew(1, 8)


def test_an_engine_that_is_not_there_is_one_line(monkeypatch):
    with pytest.raises(UserError, match="did you mean 'local'") as raised:
        check_engine("locl")
    assert raised.value.exit_code == 2
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'dmquant\[ray\]'") as raised:
        check_engine("ray")
    assert raised.value.exit_code == 1
    check_engine("local")
    with pytest.raises(UserError, match="without a launcher"):
        check_alone(2)


class FakeRay(types.ModuleType):
    """As much of Ray as the engine calls, done at once in this process; what it was asked for is kept."""

    class exceptions:  # noqa: N801
        class RayError(Exception):
            pass

    def __init__(self):
        super().__init__("ray")
        self.options, self.most, self.started = {}, 0, 0
        self.open = {}

    def is_initialized(self):
        return self.started > 0

    def init(self, **options):
        self.started += 1

    def remote(self, **options):
        self.options = options

        def decorate(function):
            def submit(*arguments):
                reference = object()
                self.open[reference] = lambda: function(*arguments)
                self.most = max(self.most, len(self.open))
                return reference

            return types.SimpleNamespace(remote=submit)

        return decorate

    def wait(self, references):
        return references[:1], references[1:]

    def get(self, reference):
        return self.open.pop(reference)()

    def cancel(self, reference, force):
        assert force
        del self.open[reference]


def fail_at_two(number):
    if number == 2:
        raise FakeRay.exceptions.RayError("worker died\nlong story")
    return number


def test_ray_is_given_no_more_items_at_once_than_there_are_workers(monkeypatch):
    ray = FakeRay()
    monkeypatch.setitem(sys.modules, "ray", ray)
    assert ENGINES["ray"] is on_ray
    outcomes = dict(on_ray(fail_at_two, [1, 2, 3, 4], Crew(2, 1, gpus=1)))
    assert str(outcomes.pop(2)) == "Ray could not finish it: worker died"
    assert outcomes == {1: 1, 3: 3, 4: 4}
    assert (ray.most, ray.started) == (2, 1)
    assert ray.options == {"num_cpus": 1, "num_gpus": 1, "max_retries": 0}
    assert not ray.open


def test_what_still_runs_on_ray_is_cancelled_when_nobody_waits_for_it(monkeypatch):
    ray = FakeRay()
    monkeypatch.setitem(sys.modules, "ray", ray)
    running = on_ray(fail_at_two, [1, 3, 4], Crew(3, 1))
    assert next(running) == (1, 1)
    assert len(ray.open) == 2
    running.close()
    assert not ray.open
