"""The memory that learning all layers at once takes (`learning.unit: model`), for published backbones at full size.

    python benchmarks/whole_memory.py [--models sd15,sdxl] [--recipe discquant]

Backbones are skeletons without values. Weights are those that the recipe quantizes, times the bytes of
calib/whole/budget.py. Activations are what autograd keeps, in float32, of one sample at the model's own size, which is
two rows for the branches of guidance, except for flux, which has none; with every block's kept, and with those of the
largest block and the inputs of the others. A step takes the weights, and the activations of a mini-batch twice.
"""

import argparse
import contextlib
from collections.abc import Callable
from typing import Any

import torch
from models import skeleton
from torch import Tensor, nn

import dmquant  # noqa: F401 (before diffusers, for which it makes torchvision importable)
from dmquant.calib.blocks.replay import replaced_forward
from dmquant.calib.whole.budget import GRAPH, HELD
from dmquant.convert import plan
from dmquant.diffusers.families import families
from dmquant.recipe import Known, Recipe


def tensors(*shapes: tuple[int, ...]) -> list[Tensor]:
    """Tensors without values; those of one dimension are timesteps."""
    return [torch.empty(shape, device="meta") for shape in shapes]


def sd15() -> dict[str, Any]:
    return dict(
        zip(("sample", "timestep", "encoder_hidden_states"), tensors((2, 4, 64, 64), (2,), (2, 77, 768)), strict=True)
    )


def sdxl() -> dict[str, Any]:
    sample, timestep, text, pooled, ids = tensors((2, 4, 128, 128), (2,), (2, 77, 2048), (2, 1280), (2, 6))
    added = {"text_embeds": pooled, "time_ids": ids}
    return {"sample": sample, "timestep": timestep, "encoder_hidden_states": text, "added_cond_kwargs": added}


def pixart() -> dict[str, Any]:
    latents, timestep, text, mask = tensors((2, 4, 128, 128), (2,), (2, 300, 4096), (2, 300))
    added = {"resolution": None, "aspect_ratio": None}
    text = {"encoder_hidden_states": text, "encoder_attention_mask": mask, "added_cond_kwargs": added}
    return {"hidden_states": latents, "timestep": timestep} | text


def sd3() -> dict[str, Any]:
    latents, timestep, text, pooled = tensors((2, 16, 128, 128), (2,), (2, 333, 4096), (2, 2048))
    return {
        "hidden_states": latents, "timestep": timestep, "encoder_hidden_states": text, "pooled_projections": pooled
    }  # fmt: skip


def flux() -> dict[str, Any]:
    latents, timestep, text, pooled, guidance = tensors((1, 4096, 64), (1,), (1, 512, 4096), (1, 768), (1,))
    places, words = tensors((4096, 3), (512, 3))
    return {
        "hidden_states": latents, "timestep": timestep, "encoder_hidden_states": text, "pooled_projections": pooled,
        "guidance": guidance, "img_ids": places, "txt_ids": words,
    }  # fmt: skip


def transformer(name: str, **config: Any) -> Callable[[], nn.Module]:
    """A class of diffusers with this configuration, beside its own defaults."""

    def build() -> nn.Module:
        import diffusers

        with torch.device("meta"):
            return getattr(diffusers, name)(**config)

    return build


MODELS: dict[str, tuple[str, Callable[[], nn.Module], Callable[[], dict[str, Any]]]] = {
    "sd15": ("unet", lambda: skeleton("sd15"), sd15),
    "sdxl": ("unet", lambda: skeleton("sdxl"), sdxl),
    "pixart-sigma": ("pixart", lambda: skeleton("pixart-sigma"), pixart),
    "sd3": (
        "sd3",
        transformer(
            "SD3Transformer2DModel", sample_size=128, num_layers=24, attention_head_dim=64, num_attention_heads=24,
            joint_attention_dim=4096, caption_projection_dim=1536, pooled_projection_dim=2048, out_channels=16,
            pos_embed_max_size=192,
        ),
        sd3,
    ),
    "flux-dev": ("flux", transformer("FluxTransformer2DModel", guidance_embeds=True), flux),
}  # fmt: skip
"""Family, skeleton and arguments of one sample."""


def kept_bytes(backbone: nn.Module, blocks: list[str], arguments: dict[str, Any]) -> tuple[int, int]:
    """Bytes that autograd keeps of a pass; and of one in which these blocks keep their inputs, and then one its own."""
    own = {parameter.untyped_storage()._cdata for parameter in backbone.parameters()}
    alive: list[Tensor] = []  # so that no storage takes the place of another

    def noting(storages: dict[int, int]) -> Callable[[Tensor], Tensor]:
        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                alive.append(tensor)
                storages[storage._cdata] = storage.nbytes()
            return tensor

        return note

    outside: dict[int, int] = {}
    inside: dict[str, dict[int, int]] = {name: {} for name in blocks}
    inputs: dict[int, int] = {}

    def watched(name: str, compute: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            for value in (*args, *kwargs.values()):
                if isinstance(value, Tensor):
                    noting(inputs)(value)
            with torch.autograd.graph.saved_tensors_hooks(noting(inside[name]), lambda tensor: tensor):
                return compute(*args, **kwargs)

        return forward

    with contextlib.ExitStack() as stack:
        for name in blocks:
            module = backbone.get_submodule(name)
            stack.enter_context(replaced_forward(module, watched(name, module.forward)))
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(noting(outside), lambda tensor: tensor))
        backbone(**arguments)
    every = outside | {storage: size for of_block in inside.values() for storage, size in of_block.items()}
    largest = max(sum(of_block.values()) for of_block in inside.values())
    return sum(every.values()), sum((outside | inputs).values()) + largest


def row(name: str, recipe: Recipe) -> list[str]:
    """What one backbone takes."""
    family, build, arguments = MODELS[name]
    backbone, known = build().eval(), families()[family]
    names = [step.name for step in plan(backbone, recipe.for_model(Known(known.keep)))]
    blocks = known.blocks(backbone)
    sizes = {layer: backbone.get_submodule(layer).weight.numel() for layer in names}
    largest = max(sum(size for layer, size in sizes.items() if layer.startswith(f"{block}.")) for block in blocks)
    every, again = kept_bytes(backbone, blocks, arguments())
    weights = sum(sizes.values())
    bytes_taken = HELD * weights, HELD * weights + GRAPH * largest, every, again
    return [name, f"{weights / 1e6:,.0f}", *(f"{count / 1e9:.1f}" for count in bytes_taken)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS), help="with commas; default %(default)s")
    parser.add_argument("--recipe", default="discquant")
    options = parser.parse_args()
    recipe = Recipe.load(options.recipe)
    head = ["backbone", "weights learned, M", "held for them, GB", "and in the graph of the largest block"]
    head += ["activations of a sample, GB", "computed twice, GB"]
    print(f"| {' | '.join(head)} |\n| {' | '.join(['---'] * len(head))} |")
    for name in options.models.split(","):
        print(f"| {' | '.join(row(name, recipe))} |", flush=True)


if __name__ == "__main__":
    main()
