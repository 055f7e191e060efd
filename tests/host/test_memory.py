"""Peak memory of a stage, and garbage."""

import contextlib
import gc
import sys
import weakref

import pytest
import torch

from dmquant.host.memory import new_garbage_only, peak_memory, return_freed_memory

MIB = 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="other systems only know the peak since the process began")
def test_the_peak_of_a_stage_counts_what_it_held_and_not_what_came_before():
    with peak_memory("cpu") as large:
        torch.ones(200 * MIB, dtype=torch.uint8).sum()
    with peak_memory("cpu") as small:
        torch.ones(MIB, dtype=torch.uint8).sum()
    assert large.bytes - small.bytes > 150 * MIB
    assert large.what == "resident memory of the process"
    assert small.bytes > 10 * MIB


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_cuda_the_peak_is_what_tensors_took():
    with peak_memory("cuda") as peak:
        torch.ones(200 * MIB, dtype=torch.uint8, device="cuda")
    assert 200 * MIB <= peak.bytes < 400 * MIB


def test_only_new_garbage_is_collected_and_all_of_it_afterwards():
    class Held:
        pass

    def circle():
        held = Held()
        held.itself = held
        return weakref.ref(held)

    with new_garbage_only():
        assert gc.get_freeze_count() > 10_000
        lost = circle()
        return_freed_memory()
        assert lost() is None
    assert gc.get_freeze_count() == 0
    with contextlib.suppress(KeyError), new_garbage_only():
        raise KeyError
    assert gc.get_freeze_count() == 0
