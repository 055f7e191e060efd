"""How near full precision calibrated models come, on prompts and timesteps kept out of calibration: markdown tables.

    python benchmarks/calibration.py [--recipes default,rtn:int4:int6] [--out runs/calibration]

Every recipe is measured as W4A16 and as W4A6 unless its entry names formats (RECIPE:WEIGHTS:ACTIVATIONS), beside
round-to-nearest with absmax and with MSE scales. Block outputs are those of the quantized backbone run end to end on
the inputs that a full-precision run of 23 steps gives it, of 32 prompts that calibration does not have, at timesteps
that the 20-step schedule of calibration does not have. Final latents and images are those of the 20-step pipeline;
PSNR is that of images before they are rounded to 8 bits. Codes and measurements are kept in OUT: what is there is not
done again.
"""

import argparse
import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor, nn

import dmquant  # before diffusers, for which it makes torchvision importable
from dmquant.calib.data.capture import capture
from dmquant.calib.data.sampling import Sampling
from dmquant.calib.data.store import CalibrationStore
from dmquant.convert import quantize_
from dmquant.diffusers.arguments import Calls
from dmquant.diffusers.calling import final_latents
from dmquant.host.console import Console, quiet_libraries
from dmquant.host.files import fingerprint, write_text
from dmquant.pipelines.models.loading import load_full_precision
from dmquant.pipelines.runs.calibration import calibrate, weights_key
from dmquant.pipelines.runs.settings import Options, Settings, resolve, resolve_all

MODEL = "emoji-pixart"
PROMPTS = "emoji-held-out"
FORMATS = {"W4A16": ("fp4", "none"), "W4A6": ("fp4", "fp6")}
BASELINES = {scale: f"RTN {scale}" for scale in ("absmax", "mse")}
MEASURED_STEPS = 23  # of the schedule that inputs for block outputs come from; calibration has 20
MEASURED_PROMPTS = 32
MEASURED_STEPS_PER_PROMPT = 6
MEASURED_SEED = 2_000_000  # of noise: neither that of calibration nor that of images
BATCH = 16


@dataclass(frozen=True)
class Measured:
    """Distances of a quantized backbone from full precision."""

    blocks: list[float]
    """Mean squared error of the output of every block."""
    latents: float
    """Mean squared error of final latents."""
    psnr: float
    """Of images, in dB, the mean over images."""
    seconds: float = 0.0
    """That its blocks took to calibrate; 0 without calibration."""

    @property
    def block_error(self) -> float:
        """The mean over blocks."""
        return fmean(self.blocks)


class Bench:
    """The full-precision model, what quantized ones are measured on, and the folder where all of it is kept."""

    def __init__(self, out: Path, images: int, model: str = MODEL, prompts: str = PROMPTS):
        quiet_libraries()
        self.out, self.console = out, Console()
        self.options = Options(model=model, recipe="rtn64", prompts=prompts, num_prompts=images, device="cpu")
        self.settings = resolve(self.options)
        self.pipeline = load_full_precision(self.settings.model, self.settings.dtype, self.settings.device)
        self.full = getattr(self.pipeline, self.settings.family.component).requires_grad_(False)
        self.blocks = self.settings.family.blocks(self.full)
        self.made_for = {"weights": weights_key(self.pipeline), "dtype": self.settings.dtype_name}

    def capture(
        self, prompts: Sequence[str], sampling: Sampling, seed: int, steps: int | None = None
    ) -> CalibrationStore:
        """What the full-precision pipeline gives its backbone, kept in OUT/data."""
        call = self.settings.call | ({"num_inference_steps": steps} if steps else {})
        key = fingerprint(
            prompts=list(prompts), sampling=asdict(sampling), call=call, seed=seed, made_for=self.made_for
        )
        return capture(
            self.pipeline,
            self.settings.family.component,
            Calls(prompts, seed, call),
            sampling=sampling,
            batch_size=BATCH,
            folder=self.out / "data" / key[:8],
            made_for=self.made_for,
            **self.settings.family.batching,
        )

    @cached_property
    def held_out(self) -> tuple[CalibrationStore, list[int]]:
        """Backbone calls of prompts and timesteps that no calibration has: the data, and which of its samples."""
        sampling = Sampling("stratified", MEASURED_STEPS_PER_PROMPT, 1 / MEASURED_PROMPTS)
        store = self.capture(self.settings.prompts[:MEASURED_PROMPTS], sampling, MEASURED_SEED, MEASURED_STEPS)
        self.pipeline.scheduler.set_timesteps(self.settings.steps)
        known = set(self.pipeline.scheduler.timesteps.tolist())
        unknown = [i for i, sample in enumerate(store.samples) if store.timesteps[sample.step] not in known]
        return store, unknown

    def batches(self) -> list[list[int]]:
        """The held-out samples in batches."""
        _, samples = self.held_out
        return [samples[start : start + BATCH] for start in range(0, len(samples), BATCH)]

    @cached_property
    def reference(self) -> tuple[list[list[Tensor]], Tensor, Tensor]:
        """Block outputs of every batch, final latents and images of full precision."""
        latents = self.final_latents(self.full)
        return [self._block_outputs(self.full, batch) for batch in self.batches()], latents, self.decode(latents)

    def measure(
        self, backbone: nn.Module, seconds: float = 0.0, on_images: Callable[[Tensor], None] = lambda images: None
    ) -> Measured:
        """How far `backbone` is from full precision; `on_images` is given its images, as they are in `reference`."""
        outputs, latents, images = self.reference
        batches = self.batches()
        errors = [
            [
                float((one - other).square().mean())
                for one, other in zip(self._block_outputs(backbone, batch), full, strict=True)
            ]
            for batch, full in zip(batches, outputs, strict=True)
        ]
        sizes = torch.tensor([len(batch) for batch in batches], dtype=torch.float64)
        blocks = (torch.tensor(errors, dtype=torch.float64) * sizes[:, None]).sum(0) / sizes.sum()
        its_latents = self.final_latents(backbone)
        its_images = self.decode(its_latents)
        on_images(its_images)
        psnr = psnr_of(its_images, images)
        return Measured(blocks.tolist(), float((its_latents - latents).square().mean()), float(psnr.mean()), seconds)

    def psnr(self, backbone: nn.Module) -> list[float]:
        """PSNR of every image of `backbone` against full precision's, in dB."""
        return psnr_of(self.decode(self.final_latents(backbone)), self.images).tolist()

    @cached_property
    def images(self) -> Tensor:
        """Those of full precision, in [0, 1]."""
        return self.decode(self.final_latents(self.full))

    def measured(self, settings: Settings) -> Measured:
        """The measurement of the model that a recipe makes, from OUT where it is there."""
        recipe = settings.recipe
        key = fingerprint(recipe=recipe.to_dict(), dmquant=dmquant.__version__, prompts=settings.prompts)
        return self.kept(f"{recipe.name}-{key[:8]}", lambda: self.measure(*self.quantized(settings)))

    def kept(self, name: str, work: Callable[[], Measured]) -> Measured:
        """What OUT/rows holds under `name`, or what `work()` returns, which is then kept there."""
        path = self.out / "rows" / f"{name}.json"
        if not path.exists():
            write_text(path, json.dumps(asdict(work())))
        return Measured(**json.loads(path.read_text()))

    def copy(self) -> nn.Module:
        """The backbone in full precision, to be quantized in place."""
        return copy.deepcopy(self.full)

    def quantized(self, settings: Settings) -> tuple[nn.Module, float]:
        """The backbone that a recipe makes, and the seconds that its blocks took to calibrate."""
        backbone = self.copy()
        self._install(backbone)
        recipe = settings.recipe_for(backbone)
        if not recipe.calibrated:
            quantize_(backbone, recipe)
            return backbone, 0.0
        settings, workspace = replace(settings, recipe=recipe), self.out / "calibration"
        calibrated = calibrate(self.pipeline, settings, workspace, self.console, self.made_for["weights"])
        return backbone, sum(block["seconds"] for block in calibrated.blocks)

    def _install(self, backbone: nn.Module) -> None:
        """Put `backbone` into the pipeline."""
        setattr(self.pipeline, self.settings.family.component, backbone)

    def _block_outputs(self, backbone: nn.Module, batch: Sequence[int]) -> list[Tensor]:
        store, _ = self.held_out
        outputs: list[Tensor] = []
        handles = [
            backbone.get_submodule(name).register_forward_hook(
                lambda block, args, output: outputs.append(output if isinstance(output, Tensor) else output[0])
            )
            for name in self.blocks
        ]
        args, kwargs = store.batch(batch)
        with torch.inference_mode():
            backbone(*args, **kwargs)
        for handle in handles:
            handle.remove()
        return outputs

    def final_latents(self, backbone: nn.Module) -> Tensor:
        """Final latents for the prompts of the images, seeds 0, 1, ..."""
        self._install(backbone)
        prompts = self.settings.prompts
        batches = [
            final_latents(self.pipeline, prompts[start : start + BATCH], start, self.settings.call)
            for start in range(0, len(prompts), BATCH)
        ]
        return torch.cat(batches)

    def decode(self, latents: Tensor) -> Tensor:
        """Images in [0, 1]."""
        vae = self.pipeline.vae
        with torch.inference_mode():
            batches = [vae.decode(batch / vae.config.scaling_factor).sample for batch in latents.split(BATCH)]
        return (torch.cat(batches) / 2 + 0.5).clamp(0, 1)


def psnr_of(images: Tensor, reference: Tensor) -> Tensor:
    """Of every image (n, channels, height, width) in [0, 1], in dB; (n,)."""
    return -10 * (images - reference).square().mean((1, 2, 3)).log10()


def settings_of(bench: Bench, entries: Sequence[str], weights: str, activations: str) -> dict[str, Settings]:
    """Settings of the recipes that entries name, by entry; formats that an entry does not name are given."""
    settings = {}
    for entry in entries:
        source, *formats = entry.split(":")
        formatted = entry if formats else f"{source}:{weights}:{activations}"
        [settings[entry]] = resolve_all(bench.options, formatted).values()
    return settings


def baselines(bench: Bench, weights: str, activations: str) -> dict[str, Settings]:
    """Round to nearest, by the name of its row."""
    base = resolve(replace(bench.options, w=weights, a=activations))
    return {
        name: replace(base, recipe=base.recipe.with_settings(name=f"rtn-{scale}-{weights}-{activations}", scale=scale))
        for scale, name in BASELINES.items()
    }


def table(rows: dict[str, Measured]) -> str:
    """Markdown: every row against round to nearest, which must be among them."""
    first = next(iter(rows.values()))
    header = ["model", *(f"block {number}" for number in range(len(first.blocks))), "mean of blocks"]
    header += [f"blocks, of {name}" for name in BASELINES.values()]
    header += ["final latents", f"latents, of {BASELINES['absmax']}", "PSNR, dB", "seconds"]
    lines = [header, ["---"] * len(header)]
    for name, row in rows.items():
        ratios = [f"{row.block_error / rows[baseline].block_error:.2f}" for baseline in BASELINES.values()]
        latents = f"{row.latents / rows[BASELINES['absmax']].latents:.2f}"
        seconds = f"{row.seconds:.0f}" if row.seconds else ""
        errors = [f"{error:.4f}" for error in (*row.blocks, row.block_error)]
        lines.append([name, *errors, *ratios, f"{row.latents:.5f}", latents, f"{row.psnr:.2f}", seconds])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", default="default", help="names or YAML files, RECIPE[:WEIGHTS:ACTIVATIONS], ...")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--prompts", default=PROMPTS, help="what images are made of; default %(default)s")
    parser.add_argument("--out", type=Path, default=Path("runs/calibration"))
    options = parser.parse_args()
    entries = [entry.strip() for entry in options.recipes.split(",")]
    bench = Bench(options.out, options.images, prompts=options.prompts)
    for title, (weights, activations) in FORMATS.items():
        wanted = [entry for entry in entries if ":" not in entry or _is_of(entry, activations)]
        settings = baselines(bench, weights, activations) | settings_of(bench, wanted, weights, activations)
        rows = {name: bench.measured(each) for name, each in settings.items()}
        print(f"\n{title}\n\n{table(rows)}")


def _is_of(entry: str, activations: str) -> bool:
    """Whether an entry that names formats belongs in the table of models with these activations: none, or some."""
    return (entry.split(":")[-1] == "none") == (activations == "none")


if __name__ == "__main__":
    main()
