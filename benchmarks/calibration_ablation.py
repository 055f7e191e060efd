"""What of learned rounding does the work, on emoji-pixart: markdown tables, one a part.

    python benchmarks/calibration_ablation.py --part rounding [--regularizer 1000] [--out runs/ablation]
    python benchmarks/calibration_ablation.py --part samplers
    python benchmarks/calibration_ablation.py --part sizes

`rounding`: AdaRound, plain and scale-aware, at three learning rates and two lengths, for one block (the second, after
the first in nearest rounding), FP4 E2M1, groups of 64, absmax, weights only, mini-batches of 4. `--regularizer paper`
is FP4DiT's, 0.01 a weight beside an error summed over tokens, in our units; `--rows` names some of the rows.
`samplers` and `sizes`: which calls of the backbone whole models are calibrated on, and how many prompts; short
learning. Errors are on prompts and timesteps kept out of calibration, as in benchmarks/calibration.py. Every row is
kept in OUT: what is there is not done again.
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from calibration import BATCH, PROMPTS, Bench, Measured
from diffusers import DDPMScheduler
from torch import Tensor, nn

from dmquant.calib.blocks.engine import calibrate_
from dmquant.calib.blocks.learn import learn, learning_layers
from dmquant.calib.blocks.outputs import Budget, Outputs
from dmquant.calib.data.sampling import Sampling, choose
from dmquant.calib.data.store import CalibrationStore
from dmquant.calib.data.tree import flatten, unflatten
from dmquant.calib.layers.learner import Learner
from dmquant.calib.layers.moments import fit_grid
from dmquant.calib.objectives import UnitData, mse, squared_error
from dmquant.convert import LayerPlan
from dmquant.diffusers.calling import final_latents
from dmquant.host.files import fingerprint, write_text
from dmquant.layers import quantize_layer
from dmquant.pipelines.runs.calibration import FIRST_SEED
from dmquant.qtensor import WeightSpec
from dmquant.recipe import Learning
from dmquant.rounding import adaround

# Part `rounding`

ITERATIONS, RATES = (2_500, 20_000), (1e-3, 1e-2, 1e-1)
VARIANTS = {"plain": False, "scale-aware": True}
ROUNDING_ROWS = [f"{variant}:{rate:g}:{count}" for count in ITERATIONS for variant in VARIANTS for rate in RATES]
SPEC = WeightSpec.parse("fp4_e2m1", "group:64", "absmax", "bf16")
PAPER_REGULARIZER = 0.01  # a weight, arXiv 2503.15465's code; its error is summed over tokens, a mean over the rest
NUMBER = 1  # of the block
EVERYTHING = 1 << 40  # bytes: nothing is spilled
CHECKS = 5
CPU = torch.device("cpu")


class OneBlock:
    """A block with its inputs after nearest rounding of the blocks before it, and its full-precision outputs."""

    def __init__(self, bench: Bench):
        self.bench = bench
        self.block = bench.full.transformer_blocks[NUMBER]
        self.before = bench.copy()
        for block in self.before.transformer_blocks[:NUMBER]:
            for name, layer in [*block.named_modules()]:
                if isinstance(layer, nn.Linear):
                    block.set_submodule(name, quantize_layer(layer, SPEC, None))

    @cached_property
    def learning(self) -> UnitData:
        """Of 128 calibration prompts, 10 steps each."""
        prompts = self.bench.settings.calibration_prompts[:128]
        store = self.bench.capture(prompts, Sampling("stratified", 10, 0.125), FIRST_SEED)
        by_step = sorted(range(len(store)), key=lambda index: store.samples[index].step)
        return self._data(
            store,
            [index for index in by_step if not store.samples[index].held_out],
            [index for index in by_step if store.samples[index].held_out],
        )

    @cached_property
    def measured(self) -> UnitData:
        """Of prompts and timesteps that learning does not have."""
        store, samples = self.bench.held_out
        return self._data(store, (), samples)

    def learners(self, options: adaround.Options) -> list[Learner]:
        """Its layers with the roundings that they start from."""
        learners = []
        for name, layer in self.block.named_modules():
            if isinstance(layer, nn.Linear):
                grid = fit_grid(layer.weight, LayerPlan(name, SPEC, None), None)
                rounding = adaround.start(grid, options)
                learners.append(Learner(name, layer, grid, rounding, quantize_layer(layer, SPEC, None)))
        return learners

    def error(self, data: UnitData, learners: Sequence[Learner], values: dict[str, Tensor]) -> float:
        """Mean squared error of the block's output on the held-out samples of `data`, its weights being `values`."""
        fixed = [replace(learner, values=values[learner.name]) for learner in learners]
        total = 0.0
        with torch.no_grad(), learning_layers(fixed):
            for start in range(0, len(data.held_out), BATCH):
                batch = data.held_out[start : start + BATCH]
                total += float(squared_error(data.run(batch, None), data.target(batch))) * len(batch)
        return total / len(data.held_out)

    def paper_regularizer(self) -> float:
        """FP4DiT's weight of the penalty, for a loss that is 1 at nearest rounding and a penalty averaged over weights.

        Its loss is tokens * error + 0.01 * sum of penalties; ours is error / nearest error + r * mean of penalties.
        """
        learners = self.learners(adaround.Options())
        nearest = self.error(self.learning, learners, _nearest(learners))
        tokens = self.learning.target([0]).shape[1]
        return PAPER_REGULARIZER * sum(learner.grid.weight.numel() for learner in learners) / (tokens * nearest)

    def _data(self, store: CalibrationStore, learning: Sequence[int], held_out: Sequence[int]) -> UnitData:
        inputs = targets = None
        for start in range(0, len(store), BATCH):
            batch = list(range(start, min(start + BATCH, len(store))))
            given, _ = _at_block(self.before, store.batch(batch))
            _, output = _at_block(self.bench.full, store.batch(batch))
            if inputs is None:
                skeleton, leaves = flatten(given)
                one = unflatten(skeleton, [leaf.tensor[: store.rows] for leaf in leaves])
                inputs = Outputs(len(store), one, Budget(EVERYTHING, self.bench.out))
                targets = Outputs(len(store), output[: store.rows], Budget(EVERYTHING, self.bench.out))
            inputs.write(batch, given)
            targets.write(batch, output)

        def run(indices: Sequence[int], generator: torch.Generator | None) -> Tensor:
            args, kwargs = inputs.read(indices, CPU)
            return self.block(*args, **kwargs)

        return UnitData(run, lambda indices: targets.read(indices, CPU), learning, held_out)


def _at_block(backbone: nn.Module, call: tuple[tuple, dict[str, Any]]) -> tuple[tuple[tuple, dict[str, Any]], Tensor]:
    """What the block is given, and what it gives, in one call of the backbone."""
    seen = []
    block = backbone.transformer_blocks[NUMBER]
    handle = block.register_forward_hook(lambda block, *passed: seen.append(passed), with_kwargs=True)
    with torch.no_grad():
        backbone(*call[0], **call[1])
    handle.remove()
    [(args, kwargs, output)] = seen
    return (args, kwargs), output


def _nearest(learners: Sequence[Learner]) -> dict[str, Tensor]:
    return {learner.name: learner.grid.nearest for learner in learners}


def rounding_row(one: OneBlock, row: str, regularizer: float, out: Path) -> dict[str, Any]:
    """One row, VARIANT:RATE:ITERATIONS, from OUT where it is there."""
    path = out / "rounding" / f"{row.replace(':', '-')}-{regularizer:g}.json"
    if not path.exists():
        variant, rate, iterations = row.split(":")
        learners = one.learners(adaround.Options(scale_aware=VARIANTS[variant], regularizer=regularizer))
        options = Learning(iterations=int(iterations), batch_size=4, learning_rate=float(rate), checks=CHECKS)
        data, began = one.learning, time.perf_counter()
        with learning_layers(learners):
            learned, kept = learn(row, learners, mse.start(data, mse.Options()), options, lambda step, loss: None)
        seconds = time.perf_counter() - began
        nearest = one.error(one.measured, learners, _nearest(learners))
        values = {name: rounded.values for name, rounded in kept.items()}
        flipped = sum(int((values[learner.name] != learner.grid.nearest).sum()) for learner in learners)
        facts = {
            "ratio": one.error(one.measured, learners, values) / nearest,
            "flipped": flipped / sum(learner.grid.weight.numel() for learner in learners),
            "seconds": seconds,
            **asdict(learned),
        }
        write_text(path, json.dumps(facts, indent=1))
        print(row, f"regularizer {regularizer:g}", facts, flush=True)
    return json.loads(path.read_text())


def rounding(bench: Bench, rows: Sequence[str], regularizers: Sequence[str]) -> str:
    """Table of the part `rounding`."""
    one = OneBlock(bench)
    lines = [["AdaRound", "rate", "iterations", "regularizer", "error of nearest", "undecided", "not nearest", "kept"]]
    lines.append(["---"] * len(lines[0]))
    for text in regularizers:
        regularizer = one.paper_regularizer() if text == "paper" else float(text)
        for row in rows:
            facts = rounding_row(one, row, regularizer, bench.out)
            measures = [f"{facts['ratio']:.3f}", *(f"{facts[share]:.1%}" for share in ("undecided", "flipped"))]
            lines.append([*row.split(":"), f"{regularizer:.0f}", *measures, f"step {facts['best_step']}"])
    return markdown(lines)


# Parts `samplers` and `sizes`

BATCH_SIZE, SHORT = 8, 300  # of learning
RECIPE = {
    "weights": "fp4",
    "activations": "none",
    "scale": "hessian",
    "rounding": {"method": "adaround", "regularizer": 1000},
    "learning": {"iterations": SHORT, "batch_size": BATCH_SIZE},
}
SIZES = (8, 32, 128, 256)
FIRST_TIMESTEPS = 20  # raw ones, 0 to 19: FP4DiT's
PAPER_DATA = {"timesteps 0 to 19": False, "timesteps 0 to 19, noise of 999 to 980": True}
SAMPLER_ROWS = ["uniform", "stratified", "importance", *PAPER_DATA]


class FirstTimesteps:
    """Calibration data as FP4DiT draws it: images noised to the timesteps 0 to 19, no sampler in between.

    Its images are photographs; these are the model's own, of the same prompts as `store`, whose other arguments (text,
    masks, both guidance branches) are used as they are. `as_released` noises to 999 - t instead and still passes t,
    which is what add_noise of the released code's scheduler does where set_timesteps was not called.
    """

    def __init__(self, bench: Bench, prompts: Sequence[str], sampling: Sampling, as_released: bool):
        self.store = bench.capture(prompts, replace(sampling, sampler="uniform", steps_per_prompt=1), FIRST_SEED)
        self.rows, self.steps = self.store.rows, FIRST_TIMESTEPS
        self.timesteps = [float(t) for t in range(FIRST_TIMESTEPS)]
        self.samples = choose(sampling, len(prompts), self.steps)
        self.key = f"{self.store.key}, timesteps 0 to 19, {as_released}"
        bench.pipeline.transformer = bench.full
        batches = range(0, len(prompts), BATCH)
        call = bench.settings.call
        latents = [final_latents(bench.pipeline, prompts[at : at + BATCH], FIRST_SEED + at, call) for at in batches]
        self.latents = torch.cat(latents).clone()
        self.noise = torch.randn(self.latents.shape, generator=torch.Generator().manual_seed(FIRST_SEED))
        self.scheduler = DDPMScheduler.from_config(bench.pipeline.scheduler.config)
        self.last = self.scheduler.config.num_train_timesteps - 1 if as_released else None
        self._any = {sample.prompt: index for index, sample in enumerate(self.store.samples)}

    def __len__(self) -> int:
        return len(self.samples)

    def batch(self, indices: Sequence[int], device: str | torch.device = "cpu") -> tuple[tuple, dict[str, Any]]:
        """As `CalibrationStore.batch` gives it."""
        chosen = [self.samples[index] for index in indices]
        args, kwargs = self.store.batch([self._any[sample.prompt] for sample in chosen], device)
        labels = torch.tensor([sample.step for sample in chosen])
        prompts = [sample.prompt for sample in chosen]
        levels = labels if self.last is None else self.last - labels
        noisy = self.scheduler.add_noise(self.latents[prompts], self.noise[prompts], levels)
        kwargs["hidden_states"] = noisy.repeat_interleave(self.rows, 0).to(device)
        kwargs["timestep"] = labels.repeat_interleave(self.rows).to(kwargs["timestep"])
        return args, kwargs


def whole_model(bench: Bench, name: str, prompts: int, sampler: str) -> Measured:
    """A model calibrated on data of one kind, and measured; one of the samplers, or FP4DiT's timesteps."""
    recipe = bench.settings.recipe.with_settings(name=name, **RECIPE)
    sampling = Sampling("stratified" if sampler in PAPER_DATA else sampler, 10, 0.125)
    texts = bench.settings.calibration_prompts[:prompts]
    if sampler in PAPER_DATA:
        store = FirstTimesteps(bench, texts, sampling, PAPER_DATA[sampler])
    else:
        store = bench.capture(texts, sampling, FIRST_SEED)
    backbone = bench.copy()
    calibrated = calibrate_(
        backbone,
        recipe,
        store,
        blocks=bench.blocks,
        folder=bench.out / "calibration" / name,
        made_for=bench.made_for,
        bar=bench.console.bar,
        say=bench.console.say,
    )
    return bench.measure(backbone, sum(block["seconds"] for block in calibrated.blocks))


def samplers(bench: Bench) -> str:
    """Table of the part `samplers`."""
    return models(bench, {name: (128, name) for name in SAMPLER_ROWS})


def sizes(bench: Bench) -> str:
    """Table of the part `sizes`."""
    return models(bench, {f"{count} prompts": (count, "stratified") for count in SIZES})


def models(bench: Bench, rows: dict[str, tuple[int, str]]) -> str:
    """Markdown: measurements of whole models, by name calibrated on so many prompts, drawn by this sampler."""
    lines = [["calibrated on", "mean block-output MSE", "final-latent MSE", "PSNR, dB"], ["---"] * 4]
    for name, (prompts, sampler) in rows.items():
        key = fingerprint(recipe=RECIPE, prompts=bench.settings.prompts)
        row = bench.kept(f"{name}-{key[:8]}", partial(whole_model, bench, name, prompts, sampler))
        lines.append([name, f"{row.block_error:.4f}", f"{row.latents:.5f}", f"{row.psnr:.2f}"])
    return markdown(lines)


def markdown(lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("rounding", "samplers", "sizes"), required=True)
    parser.add_argument("--regularizer", default="1000", help="one or several, with commas; or paper")
    parser.add_argument("--rows", default=",".join(ROUNDING_ROWS), help="VARIANT:RATE:ITERATIONS, ...")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--prompts", default=PROMPTS, help="what images are made of; default %(default)s")
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"))
    options = parser.parse_args()
    bench = Bench(options.out, options.images, prompts=options.prompts)
    if options.part == "rounding":
        print(rounding(bench, options.rows.split(","), options.regularizer.split(",")))
    else:
        print({"samplers": samplers, "sizes": sizes}[options.part](bench))


if __name__ == "__main__":
    main()
