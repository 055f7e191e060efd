"""What every test module is run with."""

import gc
import os
import tempfile

# Tests work on tiny tensors: several threads would only wait for one another, most of all on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# What is remembered from one command to the next is not this user's.
os.environ["DMQUANT_CACHE"] = tempfile.mkdtemp(prefix="dmquant-tests-")

import pytest

# Files that take longest, begun first where several processes take a file after another: then these end together.
LONG = ("tests/models/", "tests/calib/", "tests/diffusers/", "tests/tools/", "tests/pipelines/sweep/", "tests/test_")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: next((at for at, start in enumerate(LONG) if item.nodeid.startswith(start)), len(LONG)))


@pytest.fixture(scope="module", autouse=True)
def _imported_objects_are_not_collected():
    """Calibration collects garbage after every block, which takes most of its time where blocks are tiny."""
    gc.freeze()
    yield
    gc.unfreeze()
