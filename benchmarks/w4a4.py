"""Four bits on both sides: recipes beside the NVFP4 of other libraries, one markdown table a model.

    python benchmarks/w4a4.py --peers DIR[,DIR...] [--models emoji-pixart,emoji-sd] [--layers all|linear] [--images 32]

Peers are found in DIR (`pip install --target DIR --no-deps torchao comfy-kitchen nvidia-modelopt omegaconf pulp
nvidia-ml-py`): their own functions round the weights and, online, the inputs of the very layers that the recipes
quantize, convolutions by their matrix form; `linear` leaves convolutions alone, for all rows, as torchao does. Recipes
are RECIPE[:WEIGHTS[:ACTIVATIONS]]; floors have weights in full precision and the inputs of a recipe without transforms.
PSNR is that of images before they are
rounded to 8 bits, on prompts that calibration does not have, with a bootstrap interval of 95 %. Every row is kept in
OUT: what is there is not done again.
"""

import argparse
import importlib.metadata
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import matplotlib
import torch

matplotlib.use("Agg")

from calibration import PROMPTS, Bench
from matplotlib import pyplot
from torch import Tensor, nn

import dmquant
from dmquant.convert import LayerPlan, plan
from dmquant.evaluation.metrics.summary import bootstrap_interval
from dmquant.host.files import fingerprint, write_text
from dmquant.layers import QUANTIZED
from dmquant.pipelines.runs.footprint import footprint
from dmquant.pipelines.runs.settings import Settings, resolve_all
from dmquant.scaling import from_matrix, to_matrix

BITS = 4.5  # of NVFP4: 4 and a scale of 8 for every 16
BASIS = "default:fp4:nvfp4"
OURS, OTHERS = "#1f6f8b", "#d9a441"
Quantizer = Callable[[Tensor], Tensor]


def torchao() -> Quantizer:
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale

    def rounded(x: Tensor) -> Tensor:
        scale = per_tensor_amax_to_scale(x.abs().max())
        return NVFP4Tensor.to_nvfp4(x, per_tensor_scale=scale).dequantize(torch.float32)

    return rounded


def comfy_kitchen() -> Quantizer:
    import comfy_kitchen as kitchen

    def rounded(x: Tensor) -> Tensor:
        scale = x.abs().max() / (448 * 6)
        codes, blocks = kitchen.quantize_nvfp4(x, scale)
        return kitchen.dequantize_nvfp4(codes, scale, blocks, output_type=torch.float32)[: len(x), : x.shape[1]]

    return rounded


def modelopt() -> Quantizer:
    from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor

    def rounded(x: Tensor) -> Tensor:
        codes, blocks, scale = NVFP4QTensor.quantize(x, 16)
        sizes = {-1: 16}
        return codes.dequantize(dtype=torch.float32, scale=blocks, double_scale=scale, block_sizes=sizes)

    return rounded


PEERS = {"torchao": torchao, "comfy-kitchen": comfy_kitchen, "nvidia-modelopt": modelopt}


class Rows(Bench):
    """The rows of one model's table."""

    def __init__(self, out: Path, images: int, model: str, prompts: str, layers: str):
        super().__init__(out, images, model, prompts)
        modules = self.full.named_modules() if layers == "linear" else ()
        self.left = [name for name, layer in modules if isinstance(layer, nn.Conv2d)]
        self.of = {"layers": layers, "prompts": self.settings.prompts, "dmquant": dmquant.__version__}

    def row(self, name: str, settings: Settings, kind: str) -> dict[str, Any]:
        """The row of a recipe, a peer, a recipe's inputs alone (`floor`), or a kind of layer's (`share`); kept."""
        settings = replace(settings, recipe=settings.recipe.keeping(self.left))
        about = {
            "recipe": settings.recipe.to_dict(),
            "version": importlib.metadata.version(name) if kind == "peer" else None,
        }
        path = self.out / "w4a4" / f"{kind}-{name}-{fingerprint(**about, **self.of)[:8]}.json"
        if not path.exists():
            if kind == "recipe":
                backbone, _ = self.quantized(settings)
                bits = footprint(backbone).bits_per_weight
            else:
                backbone, bits = self.copy(), BITS if kind == "peer" else None
                quantizer = PEERS[name]() if kind == "peer" else None
                for step in self.steps(settings):
                    if kind != "share" or kind_of(step.name) == name:
                        round_by_hooks(backbone.get_submodule(step.name), step, quantizer)
            own, (latents, images) = self.final_latents(backbone), self.full_precision
            psnr = -10 * (self.decode(own) - images).square().mean((1, 2, 3)).log10()
            found = {"bits": bits, "psnr": psnr.tolist(), "latents": float((own - latents).square().mean())}
            write_text(path, json.dumps(found))
        return json.loads(path.read_text())

    def steps(self, settings: Settings) -> list[LayerPlan]:
        """The plans of the layers whose inputs a recipe quantizes."""
        return [step for step in plan(self.full, settings.recipe_for(self.full)) if step.activations]

    @cached_property
    def full_precision(self) -> tuple[Tensor, Tensor]:
        """Final latents and images."""
        latents = self.final_latents(self.full)
        return latents, self.decode(latents)


def kind_of(layer: str) -> str:
    """Layers of one kind have names that differ in numbers, and in the block that they lie in, alone."""
    parts = [part for part in layer.split(".") if not part.isdigit()]
    return ".".join(part for part in parts if not part.endswith(("blocks", "block")))


def round_by_hooks(layer: nn.Module, step: LayerPlan, quantizer: Quantizer | None) -> None:
    """Let a peer round a layer's weight and its inputs; without one, the inputs alone as the recipe does."""
    own, dim = (
        QUANTIZED[type(layer)].like(layer, step.weights, step.activations, "meta"),
        QUANTIZED[type(layer)].channel_dim,
    )
    if quantizer is not None:
        rounded = quantizer(to_matrix(layer.weight.detach()).contiguous())
        layer.weight.data = from_matrix(rounded, tuple(layer.weight.shape)).contiguous()

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if quantizer is None:
            return own.quantize_input(args[0]), *args[1:]
        tokens = args[0].movedim(dim, -1)
        flat = quantizer(tokens.reshape(-1, tokens.shape[-1]).contiguous())
        return flat.view(tokens.shape).movedim(-1, dim), *args[1:]

    layer.register_forward_pre_hook(hook)


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Markdown; the first row is what the others are compared with."""
    lines = ["| | bits a quantized weight | final latents | PSNR, dB | over the first row |", "| --- " * 5 + "|"]
    first = torch.tensor(next(iter(rows.values()))["psnr"])
    for name, row in rows.items():
        psnr = torch.tensor(row["psnr"])
        (low, high), over = bootstrap_interval(psnr), f"{(psnr - first).mean():+.2f}"
        bits = "" if row["bits"] is None else f"{row['bits']:.2f}"
        lines.append(
            f"| {name} | {bits} | {row['latents']:.4f} | {psnr.mean():.2f} ({low:.2f} to {high:.2f}) | {over} |"
        )
    return "\n".join(lines)


def draw(tables: dict[str, dict[str, dict[str, Any]]], picture: Path) -> None:
    """PSNR of every row with its interval, a panel a model."""
    figure, panels = pyplot.subplots(
        1, len(tables), figsize=(5.6 * len(tables), 3.0), sharex=True, sharey=True, squeeze=False
    )
    for panel, (title, rows) in zip(panels[0], tables.items(), strict=True):
        for at, (name, row) in enumerate(rows.items()):
            psnr, is_peer = torch.tensor(row["psnr"]), name.split(" ")[0] in PEERS
            low, high = bootstrap_interval(psnr)
            panel.plot([low, high], [at, at], color="black", linewidth=1.2)
            panel.plot(psnr.mean(), at, "o", color=OTHERS if is_peer else OURS, markersize=9)
            panel.text(high + 0.15, at, f"{psnr.mean():.1f}", va="center", fontsize=8)
        panel.set(title=title, xlabel="PSNR to full precision, dB")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_yticks(range(len(rows)), list(rows), fontsize=8)
    panels[0][0].invert_yaxis()
    figure.tight_layout()
    figure.savefig(picture, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="emoji-pixart,emoji-sd", help="with commas")
    parser.add_argument("--recipes", default=f"{BASIS},w4a4,w4a4-lowrank", help="default %(default)s")
    parser.add_argument("--floors", default=f"{BASIS},w4a4", help="recipes whose inputs alone are measured too")
    parser.add_argument("--peers", default="", help="folders of other libraries, with commas")
    parser.add_argument("--layers", choices=("all", "linear"), default="all")
    parser.add_argument("--shares", action="store_true", help="also each kind of layer with its inputs alone in NVFP4")
    parser.add_argument("--picture", type=Path, help="where to draw the tables")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--prompts", default=PROMPTS, help="what images are made of; default %(default)s")
    parser.add_argument("--out", type=Path, default=Path("runs/w4a4"))
    options = parser.parse_args()
    sys.path += [folder for folder in options.peers.split(",") if folder]  # after diffusers, which looks for torchao
    tables: dict[str, dict[str, dict[str, Any]]] = {}
    for model in options.models.split(","):
        made = Rows(options.out.resolve() / model, options.images, model, options.prompts, options.layers)
        [basis] = resolve_all(made.options, BASIS).values()
        rows = tables[model] = {}
        for name in PEERS if options.peers else ():
            rows[f"{name} {importlib.metadata.version(name)}"] = made.row(name, basis, "peer")
        for kind, recipes in (("floor", options.floors), ("recipe", options.recipes)):
            for name, settings in resolve_all(made.options, recipes).items() if recipes else ():
                rows[f"inputs of {name} alone" if kind == "floor" else name] = made.row(name, settings, kind)
        head = f"{model}, {options.layers} layers, {options.images} images of {options.prompts}"
        print(f"\n{head}\n\n{table(rows)}", flush=True)
        if options.shares:
            kinds = dict.fromkeys(kind_of(step.name) for step in made.steps(basis))
            shares = {kind: made.row(kind, basis, "share") for kind in kinds}
            print(f"\ninputs of one kind of layer alone\n\n{table(shares)}", flush=True)
    if options.picture:
        draw(tables, options.picture)


if __name__ == "__main__":
    main()
