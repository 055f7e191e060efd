"""What is typed on a command line that takes a model."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Options:
    """The options of a command line; None stands for the model's or the recipe's own default."""

    model: str
    family: str | None = None
    loras: Sequence[str] | None = None
    source_quantized: str = "refuse"
    recipe: str | None = None
    purpose: str | None = None
    w: str | None = None
    a: str | None = None
    components: list[str] | None = None
    calibration_prompts: str | None = None
    calibration_data: Path | None = None
    memory_budget: str | None = None
    prompts: str | None = None
    num_prompts: int | None = None
    prompt_seed: int | None = None
    steps: int | None = None
    guidance: float | None = None
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    image: Path | None = None
    mask: Path | None = None
    control: Path | None = None
    controlnet: str | None = None
    strength: float | None = None
    seed: int = 0
    batch_size: int | None = None
    deterministic: bool = False
    metrics: str | None = None
    real: Path | None = None
    clip: str | None = None
    device: str = "auto"
    offload: str | None = None
    dtype: str | None = None
    command: str = ""
