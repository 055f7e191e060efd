"""The precision in which networks look at images."""

import contextlib
from collections.abc import Iterator

from torch.backends import cudnn


@contextlib.contextmanager
def float32_convolutions() -> Iterator[None]:
    """Convolutions on CUDA multiply in full float32, not in TF32; everything else of cuDNN stays as it is set."""
    kept = {name: getattr(cudnn, name) for name in ("enabled", "benchmark", "benchmark_limit", "deterministic")}
    with cudnn.flags(**kept, allow_tf32=False):
        yield
