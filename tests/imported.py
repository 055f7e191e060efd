"""All that processes of tests import, so that it is imported once (see `tests.forked`)."""

from dmquant.diffusers.torchvision import ensure_torchvision_imports

ensure_torchvision_imports()


import tests.calib.runs
import tests.faults.loaded
import tests.tiny  # noqa: F401
