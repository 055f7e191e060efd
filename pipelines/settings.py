"""From what the user typed to what a run needs: every name looked up and every value checked before work begins."""

import platform
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from dmquant.errors import UsageError
from dmquant.evaluation.generate import batch_size_for
from dmquant.pipelines.loading import resolve_device, resolve_dtype
from dmquant.pipelines.prompts import load_prompts
from dmquant.pipelines.registry import ModelSpec, resolve_model
from dmquant.recipe import Recipe


@dataclass(frozen=True)
class Options:
    """What was typed; None stands for the model's or the recipe's own default."""

    model: str
    recipe: str = "rtn"
    w: str | None = None
    a: str | None = None
    prompts: str | None = None
    num_prompts: int = 64
    steps: int | None = None
    guidance: float | None = None
    height: int | None = None
    width: int | None = None
    seed: int = 0
    batch_size: int | None = None
    metrics: str | None = None
    real: Path | None = None
    device: str = "auto"
    dtype: str | None = None


@dataclass(frozen=True)
class Settings:
    """Everything a run depends on, resolved and checked."""

    model: ModelSpec
    recipe: Recipe
    prompts: tuple[str, ...]
    steps: int
    guidance: float
    height: int
    width: int
    seed: int
    batch_size: int
    metrics: tuple[str, ...]
    real: Path | None
    device: torch.device
    dtype: torch.dtype
