"""The dtype in which this machine multiplies an input's values soonest, all of them kept; measured once a machine."""

import contextlib
import functools
import hashlib
import json
import os
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from dmquant.cpu.compiling import processor
from dmquant.errors import UserError
from dmquant.host import caches
from dmquant.host.files import write_text

FASTER = 0.95  # of the time in the input's own dtype: float32 for less gain is not worth other results
SHAPE = (128, 1024, 1024)  # tokens, inputs, outputs: milliseconds, and long enough for each dtype's own pace
TURNS = 5
_NARROW = (torch.bfloat16, torch.float16)


@torch.compiler.assume_constant_result
def fast_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for an input of bfloat16 or float16 where products take less time in it here, or else `dtype` itself.

    Every value of the two is one of float32 as well. The other way round digits would be lost: float32 stays float32.
    """
    return torch.float32 if dtype in _NARROW and _ratio(dtype) < FASTER else dtype


@functools.cache
def _ratio(dtype: torch.dtype) -> float:
    """The time of a product in float32 over its time in `dtype`: as remembered, or measured now."""
    name, known = str(dtype).removeprefix("torch."), _remembered()
    ratio = known.get(name)
    if not isinstance(ratio, float):
        ratio = measured(dtype)
        if file := _file():
            with contextlib.suppress(UserError):  # then the next process measures again
                write_text(file, json.dumps(_remembered() | {name: ratio}))
    return ratio


def measured(dtype: torch.dtype) -> float:
    """The time of a product in float32 over its time in `dtype`, by the best of interleaved turns."""
    tokens, inputs, outputs = SHAPE
    draw = torch.Generator().manual_seed(0)
    x, weight = torch.randn(tokens, inputs, generator=draw), torch.randn(outputs, inputs, generator=draw)
    operands = {kind: (x.to(kind), weight.to(kind)) for kind in (torch.float32, dtype)}
    seconds: dict[torch.dtype, list[float]] = {kind: [] for kind in operands}
    with torch.no_grad():
        for _ in range(1 + TURNS):  # the first turn prepares
            for kind, pair in operands.items():
                start = time.perf_counter()
                F.linear(*pair)
                seconds[kind].append(time.perf_counter() - start)
    return min(seconds[torch.float32][1:]) / min(seconds[dtype][1:])


def _file() -> Path | None:
    about = (torch.__version__, os.environ.get("ONEDNN_MAX_CPU_ISA"), os.environ.get("ATEN_CPU_CAPABILITY"))
    key = hashlib.sha256(repr((*about, *processor())).encode()).hexdigest()[:16]
    folder = caches.folder()
    return folder and folder / "dtypes" / f"{key}.json"


def _remembered() -> dict[str, float]:
    file = _file()
    try:
        known = json.loads(file.read_text(encoding="utf-8")) if file else {}
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}
