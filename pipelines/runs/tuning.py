"""The stage that recovers quality: a quantized backbone learns from the full-precision one, and is saved."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

import dmquant
from dmquant.calib.blocks.trace import trace
from dmquant.calib.tuning.loop import Tuned, Tuning, rehearse, tune_
from dmquant.calib.tuning.optimizers import Lean
from dmquant.calib.tuning.runs import Runs, last_calls, rehearsed_calls
from dmquant.calib.tuning.student import KINDS, Student, bytes_to_hold
from dmquant.calib.whole.teacher import checkpointing
from dmquant.diffusers.arguments import Calls
from dmquant.diffusers.quantizer import QuantMethod
from dmquant.errors import UsageError, UserError, check_choice
from dmquant.host.console import Console
from dmquant.host.files import fingerprint
from dmquant.host.memory import default_budget
from dmquant.host.text import yaml_text
from dmquant.host.units import size_text, time_text
from dmquant.pipelines.models import folders
from dmquant.pipelines.models.hashes import pipeline_hashes
from dmquant.pipelines.models.placing import place_backbone_alone
from dmquant.pipelines.models.saving import model_card, narrow_exactly, save_whole
from dmquant.pipelines.runs import runfolder
from dmquant.pipelines.runs.calibration import FIRST_SEED
from dmquant.pipelines.runs.footprint import footprint
from dmquant.pipelines.runs.model_stage import load_quantized, load_source, quantize_in_place
from dmquant.pipelines.runs.settings import Settings
from dmquant.settings import format_name

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

RUNS = "runs"  # folder of those in full precision
OPTIMIZERS = {"adamw": None, "qgalore": Lean()}
MOST = {"steps": 10_000_000, "batch_size": 10_000, "prompts": 1_000_000, "rate": 1_000, "last": 10_000}
HELD_OUT = 16  # one prompt in so many


@dataclass(frozen=True)
class Recovery:
    """What was typed of a recovery, checked."""

    train: tuple[str, ...]
    optimizer: str
    steps: int
    batch_size: int
    rate: float
    prompts: int
    last: int | None = None
    """How many calls of the backbone at the end of a run the student answers; None for those that move the image."""
    begin: Path | None = None
    """The folder of a quantized pipeline to begin with; by default the model is quantized first."""

    @classmethod
    def of(cls, train: str, **others: Any) -> "Recovery":
        """`train` is a comma-separated list of KINDS. UsageError for names and numbers that make no sense."""
        kinds = tuple(dict.fromkeys(name.strip() for name in train.split(",") if name.strip()))
        if not kinds:
            raise UsageError(f"--train is empty: name at least one of {', '.join(KINDS)}")
        for kind in kinds:
            check_choice("kind of what is trained", kind, KINDS)
        if "weights" in kinds and "lora" in kinds:
            raise UsageError("--train weights changes all that lora would: name one of the two")
        self = cls(kinds, **others)
        check_choice("optimizer", self.optimizer, OPTIMIZERS)
        for name, most in MOST.items():
            given = getattr(self, name)
            if given is not None and not (0 < given <= most and math.isfinite(given)):
                raise UsageError(f"{given} is no number of {name.replace('_', ' ')}: it is above 0, and {most} at most")
        if self.optimizer == "qgalore" and "weights" not in kinds:
            raise UsageError("--optimizer qgalore is for --train weights; what else there is to train is small")
        return self

    @property
    def tuning(self) -> Tuning:
        """What the loop takes of it."""
        return Tuning(self.train, OPTIMIZERS[self.optimizer], self.steps, self.rate)


def tune(
    settings: Settings, recovery: Recovery, out: Path, console: Console, workspace: Path, weights: str
) -> dict[str, Any]:
    """Quantize a model, or take one that was, let it learn from full precision, and save it whole to `out`.

    `weights` is the key of the full-precision pipeline, `workspace` the folder of what is finished. Returns what
    run.yaml says of the recovery. Raises UsageError where the memory is too little, with what would fit.
    """
    component, workspace = settings.family.component, workspace / runfolder.CALIBRATION
    pipeline = load_source(settings, console)
    if len(backbones := settings.family.backbones_of(pipeline)) > 1:
        raise UserError(
            f"{settings.model.name} has {len(backbones)} backbones ({', '.join(backbones)}), and tuning is of one: "
            "quantize it with a recipe that calibrates, such as adaround"
        )
    full = getattr(pipeline, component).requires_grad_(False)
    device = next(full.parameters()).device
    total = settings.memory_budget or default_budget(device)
    if settings.offload:
        place_backbone_alone(pipeline, component, settings.device)
    prompted = settings.prompted(pipeline)
    learning, held_out = _runs(prompted, settings, recovery, workspace, console, weights)
    if recovery.begin is None:
        quantize_in_place(pipeline, settings, workspace, console, weights)
        began = settings.saved_model_key(weights)
    else:
        backbone, began = _begun(recovery.begin, settings, full)
        for each in (pipeline, prompted):
            setattr(each, component, backbone)
    backbone, options = getattr(pipeline, component), recovery.tuning
    _check_memory(backbone, options, total)
    student = Student(backbone, options.train, options.lean)
    with _checkpointed(prompted, settings, learning, options):
        seconds = rehearse(student, learning)
        _forecast(student, backbone, recovery, learning, seconds, console)
        key = fingerprint(began=began, data=learning.key, **asdict(recovery) | {"begin": None}, of=dmquant.__version__)
        with console.bar("tuning") as bar:
            ended = tune_(student, learning, held_out, options, folder=workspace, key=key, bar=bar, say=console.say)
    changed = student.commit_()
    facts = _facts(recovery, ended, changed, learning)
    console.say(_in_words(facts))
    narrow_exactly(backbone)
    _save(pipeline, settings, out, facts, console)
    return facts


def _runs(
    prompted: Any,
    settings: Settings,
    recovery: Recovery,
    workspace: Path,
    console: Console,
    weights: str,
) -> tuple[Runs, Runs]:
    """Runs to learn from and to judge by, with other prompts. Where the list of prompts does not reach it is taken from
    the beginning again: with other noise they are other runs."""
    component = settings.family.component
    listed = Calls(settings.calibration_prompts, FIRST_SEED, settings.calibration_call)
    listed = listed.only(range(min(recovery.prompts, len(listed))))
    if len(listed) < 2:
        raise UsageError("tuning takes two prompts at least: one to learn from and one to judge by")
    apart = max(1, len(listed) // HELD_OUT)
    judging, others = listed.only(range(apart)), range(apart, len(listed))
    wanted = max(recovery.prompts - apart, len(others))
    calls = replace(listed.only(list(islice(cycle(others), wanted))), seed=FIRST_SEED + apart)
    key = fingerprint(weights=weights, dtype=settings.dtype_name, **settings.called_in)
    with console.bar("full precision") as bar:
        common = {"batch_size": recovery.batch_size, "folder": workspace / RUNS, "key": key, "bar": bar}
        last = recovery.last or last_calls(prompted, component, calls, **common)
        held_out = Runs(prompted, component, judging, last=None, **common)
        learning = Runs(prompted, component, calls, last=last, **common)
    console.say(
        f"full precision: {len(calls)} runs to learn from and {len(judging)} to judge by, "
        f"{size_text(learning.nbytes + held_out.nbytes)} on disk; the last {last} calls of each are learned"
    )
    return learning, held_out


def _begun(folder: Path, settings: Settings, full: nn.Module) -> tuple[nn.Module, str]:
    """The backbone of a pipeline that dmquant quantized, and the fingerprint of its files."""
    component = settings.family.component
    if not folder.is_dir():
        raise UsageError(f"--from {folder}: there is no such folder")
    if folders.quantization(folder, component) != QuantMethod.DMQUANT.value:
        raise UserError(
            f"{folder} holds no pipeline that dmquant quantized: leave out --from to quantize the model first"
        )
    backbone = getattr(load_quantized(folder, settings), component)
    theirs, ours = ({key: value for key, value in one.config.items() if key[0] != "_"} for one in (backbone, full))
    theirs.pop("quantization_config", None)
    if type(backbone) is not type(full) or any(ours.get(key) != value for key, value in theirs.items() if key in ours):
        raise UserError(f"{folder} was not made of {settings.model.name}: its backbone has another configuration")
    return backbone, fingerprint(files=pipeline_hashes(folder))


@contextlib.contextmanager
def _checkpointed(prompted: Any, settings: Settings, learning: Runs, options: Tuning) -> Iterator[None]:
    """With Q-GaLore, blocks compute again in the backward pass what they would keep: else that would be the most."""
    if options.lean is None:
        yield
        return
    component = settings.family.component
    backbone = getattr(prompted, component)
    example = rehearsed_calls(prompted, component, learning.calls)[0]
    traced = trace(backbone, example, settings.family.blocks(backbone))
    with checkpointing(backbone, [one.name for one in traced if not one.overwrites and not one.is_overwritten]):
        yield


def _check_memory(backbone: nn.Module, options: Tuning, available: int) -> None:
    needed = bytes_to_hold(backbone, options.train, options.lean)
    if needed <= available:
        return
    said = (
        f"--train {','.join(options.train)} takes {size_text(needed)}, more than the {size_text(available)} there are"
    )
    ways = {
        "--optimizer qgalore": (options.train, OPTIMIZERS["qgalore"] if "weights" in options.train else options.lean),
        "--train scales,biases,norms": (("scales", "biases", "norms"), None),
    }
    fitting = [
        f"{way} ({size_text(size)})" for way, of in ways.items() if (size := bytes_to_hold(backbone, *of)) <= available
    ]
    remedy = f"take {' or '.join(fitting)}" if fitting else "give a larger --memory-budget"
    raise UsageError(f"{said}: {remedy}")


def _forecast(
    student: Student, backbone: nn.Module, recovery: Recovery, learning: Runs, seconds: float, console: Console
) -> None:
    options, runs = recovery.tuning, min(recovery.batch_size, len(learning.batches[0]))
    numbers = sum(math.prod(held.shape) for held in student.held.values())
    held = size_text(bytes_to_hold(backbone, options.train, options.lean))
    optimizer = "AdamW" if options.lean is None else "Q-GaLore"
    console.say(
        f"tuning: {numbers:,} numbers learn ({', '.join(options.train)}) by {optimizer}, in {held} beside the model; "
        f"{options.steps} steps of the last {learning.last} calls of {runs} runs, {seconds:.2f} s each: "
        f"{time_text(options.steps * seconds)} and its checks"
    )


def _facts(recovery: Recovery, ended: Tuned, changed: float, learning: Runs) -> dict[str, Any]:
    own = {key: value for key, value in asdict(recovery).items() if key not in ("train", "begin")}
    return {
        "train": list(recovery.train),
        "begin": None if recovery.begin is None else recovery.begin.name,
        **own | {"last": learning.last},
        "runs": sum(map(len, learning.batches)),
        "error_before": ended.error_before,
        "error": ended.error,
        "best_step": ended.best_step,
        "codes_changed": changed,
        "diverged": ended.diverged,
    }


def _in_words(facts: dict[str, Any]) -> str:
    gained = facts["error_before"] - facts["error"]
    line = f"tuned: final latents are {gained:.2f} dB nearer on held-out prompts after step {facts['best_step']}"
    line += f"; {facts['codes_changed']:.1%} of the codes changed"
    if not facts["best_step"]:
        line = "tuned: nothing was nearer on held-out prompts than the model that it began with, which is what is saved"
    if facts["diverged"]:
        line += f". It diverged: {facts['diverged']}; the best before that is kept: take a lower --rate"
    return line


def _save(
    pipeline: "DiffusionPipeline", settings: Settings, out: Path, facts: dict[str, Any], console: Console
) -> None:
    backbone = getattr(pipeline, settings.family.component)
    recipe = backbone.hf_quantizer.quantization_config.recipe
    formats = format_name(recipe.weights), format_name(recipe.activations)
    card = model_card(settings.model.name, recipe.name, *formats, type(pipeline).__name__, settings.dtype)
    record = settings.to_dict({}, {"recipe": recipe.to_dict(), "tuning": facts})
    kept = ("model", "recipe", "tuning", "calibration", "inputs", "device", "dtype", "command", "versions")
    run = yaml_text({key: record[key] for key in kept if key in record}, width=120)
    if replaced := save_whole(
        pipeline, out, card + _section(facts), [settings.family.component], records={runfolder.SETTINGS: run}
    ):
        console.say(f"note: the model that was in {out} has no checksums, so that it was not removed: it is {replaced}")
    console.say(f"{footprint(backbone).bits_per_weight:.2f} bits a quantized weight")


def _section(facts: dict[str, Any]) -> str:
    """The part of a model card on the recovery."""
    gained = facts["error_before"] - facts["error"]
    return f"""
## Tuned

After quantizing, {_listed(facts["train"])} learned from the full-precision model: {facts["steps"]} steps of the last
{facts["last"]} calls of {facts["batch_size"]} of its {facts["runs"]} runs, by {facts["optimizer"]}. On prompts that it
did not learn from, its final latents are {gained:.2f} dB nearer than before. All settings are in
`{runfolder.SETTINGS}`.
"""


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
