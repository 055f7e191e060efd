"""Tiny pipelines in full precision, and runs of them to tune by."""

from pathlib import Path
from typing import Any

import torch

from dmquant.calib.tuning.runs import Runs
from dmquant.diffusers.arguments import Calls
from dmquant.diffusers.families import families
from tests.calib.runs import call_of
from tests.tiny import TINY

STEPS = 4
SEEDS = {None: 0}  # of held-out runs, of which the student answers all calls; others begin with another noise


def tiny(model: str) -> Any:
    """A tiny pipeline, without the zeros that diffusers starts some parameters with, such as the gates of blocks."""
    pipeline = TINY[model].build()
    with torch.no_grad():
        for parameter in getattr(pipeline, families()[TINY[model].family].component).parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    return pipeline


def calls_of(model: str, prompts: int = 4, seed: int = 0) -> Calls:
    """Calls of a tiny pipeline, of STEPS steps each."""
    return Calls(TINY[model].prompts[:prompts], seed, call_of(model, STEPS))


def runs_of(model: str, pipeline: Any, folder: Path, last: int | None = None, **options: Any) -> Runs:
    """Runs of a tiny pipeline, two a batch."""
    family = families()[TINY[model].family]
    calls = calls_of(model, seed=SEEDS.get(last, 100))
    given = {"last": last, "batch_size": 2, "folder": folder, "key": model} | options
    return Runs(family.prompted(pipeline), family.component, calls, **given)
