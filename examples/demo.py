"""A page in the browser: a prompt drawn in full precision and quantized, under a slider, with memory and time of each.

    pip install 'dmquant[demo]'
    python examples/demo.py                                        # emoji-pixart, rounded to nearest
    python examples/demo.py --model pixart-sigma --quantized runs/demo/model --device cuda

The file needs nothing but dmquant and gradio: copied as `app.py` it is a Space. It listens on this machine alone, makes
no public link and sends no statistics; a Space says by GRADIO_SERVER_NAME where it listens.
"""

import argparse
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # asked when gradio is imported

import torch
from PIL import Image

import dmquant
from dmquant.diffusers.calling import call_pipeline
from dmquant.errors import UserError
from dmquant.host import memory
from dmquant.pipelines.models.loading import DTYPES, load_full_precision, load_pipeline, resolve_device
from dmquant.pipelines.models.registry import call_parameters, family_for, resolve_model

SMALLEST = 512  # pixels: smaller images are shown as blocks of that size, not blurred
FIRST = "goldfish"  # a class of ImageNet, too, which is all that DiT knows
TITLES = ("full precision", "quantized")
HEAD = "| | weights | on top | time |\n| --- | --- | --- | --- |"
FOOT = "Bytes of the backbone's weights; memory taken beyond what was in use, while it draws; the whole call."
CSS = "#measured td, #measured th { white-space: nowrap; word-break: keep-all; }"


@dataclass
class Drawn:
    """An image, what it took, and the bytes of the backbone that drew it."""

    image: Image.Image
    weights: int
    on_top: int
    seconds: float

    def row(self, title: str) -> str:
        """A row of the table under HEAD."""
        return f"| {title} | {self.weights / 1e6:,.1f} MB | {self.on_top / 1e6:,.1f} MB | {self.seconds:.2f} s |"


class Sides:
    """Two pipelines that are called alike: a model in full precision, and quantized.

    `quantized` is a folder that dmquant saved; without one the backbone is quantized by a `recipe` without data, and
    the two share all other parts. Raises UserError for a model or folder that cannot be loaded.
    """

    def __init__(self, model: str, quantized: Path | None, recipe: str, device: str, dtype: str | None = None):
        self.spec = resolve_model(model)
        self.device = resolve_device(device)
        precision = DTYPES[dtype or self.spec.dtype]
        full = load_full_precision(self.spec, precision, self.device)
        family = family_for(self.spec)
        self.component = family.component
        sampling = {"height": self.spec.height, "width": self.spec.width, "guidance_scale": self.spec.guidance}
        taken = call_parameters(self.spec.pipeline)
        self.call = {name: value for name, value in sampling.items() if name in taken} | self.spec.call
        if quantized is not None:
            other = load_pipeline(quantized, dtype=precision).to(self.device)
        else:
            shared = {
                name: part for name, part in full.components.items() if name != self.component and part is not None
            }
            other = load_full_precision(self.spec, precision, self.device, parts=shared)
            dmquant.quantize_(getattr(other, self.component), recipe)
        self.pipelines = (family.prompted(full), family.prompted(other))
        for pipeline in self.pipelines:
            self.draw(pipeline, FIRST, 0, 1)  # what the first call compiles is no part of any time shown

    def draw(self, pipeline: Any, prompt: str, seed: int, steps: int) -> Drawn:
        """The image of a prompt, measured; UserError for a call that fails."""
        before = self._in_use()
        began = time.perf_counter()
        with memory.peak_memory(self.device) as peak:
            image = call_pipeline(pipeline, [prompt], [seed], "pil", {**self.call, "num_inference_steps": steps})[0]
        seconds = time.perf_counter() - began
        backbone = getattr(pipeline, self.component)
        return Drawn(image, backbone.get_memory_footprint(), max(peak.bytes - before, 0), seconds)

    def _in_use(self) -> int:
        """Bytes in use now, of what `peak_memory` counts."""
        return torch.cuda.memory_allocated(self.device) if "cuda" in self.device else memory.resident_memory()


def enlarged(image: Image.Image) -> Image.Image:
    """A small image by whole multiples, so that its pixels can be compared."""
    times = -(-SMALLEST // max(image.size))
    return image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)


def page(sides: Sides) -> Any:
    """The gradio app."""
    import gradio

    def compare(prompt: str, seed: float, steps: float) -> tuple[tuple[Image.Image, Image.Image], str]:
        if not prompt.strip():
            raise gradio.Error("Type a prompt first.")
        try:
            drawn = [sides.draw(pipeline, prompt, int(seed), int(steps)) for pipeline in sides.pipelines]
        except UserError as error:
            raise gradio.Error(str(error)) from error
        rows = [one.row(title) for one, title in zip(drawn, TITLES, strict=True)]
        return (enlarged(drawn[0].image), enlarged(drawn[1].image)), "\n".join([HEAD, *rows, "", FOOT])

    with gradio.Blocks(title="dmquant", analytics_enabled=False) as app:
        gradio.Markdown(f"# {sides.spec.name}, quantized\nLeft of the slider full precision, right of it quantized.")
        with gradio.Row():
            with gradio.Column():
                prompt = gradio.Textbox(label="Prompt", value=FIRST, elem_id="prompt", max_length=1000)
                seed = gradio.Number(label="Seed", value=0, precision=0, minimum=0, maximum=2**63 - 1, elem_id="seed")
                steps = gradio.Slider(1, 100, value=sides.spec.steps, step=1, label="Steps", elem_id="steps")
                draw = gradio.Button("Draw", variant="primary", elem_id="draw")
                table = gradio.Markdown(elem_id="measured")
            pair = gradio.ImageSlider(label=" | ".join(TITLES), type="pil", format="png", elem_id="pair")
        for start in (draw.click, prompt.submit):
            # One at a time: the two pipelines hold the state of their schedulers, and memory is measured.
            start(compare, [prompt, seed, steps], [pair, table], concurrency_limit=1, concurrency_id="draw")
    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="emoji-pixart", help="a registered model, a Hub id or a folder; %(default)s")
    parser.add_argument("--quantized", type=Path, help="a folder that dmquant saved, such as runs/demo/model")
    parser.add_argument("--recipe", default="rtn", help="without --quantized: a recipe without data; %(default)s")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--dtype", choices=DTYPES, help="default: the model's")
    parser.add_argument("--port", type=int, help="default: the first free one from 7860")
    options = parser.parse_args()
    try:
        import gradio
    except ModuleNotFoundError as error:
        sys.exit(f"error: the demo needs {error.name}: pip install 'dmquant[demo]'")
    try:
        sides = Sides(options.model, options.quantized, options.recipe, options.device, options.dtype)
    except UserError as error:
        sys.exit(f"error: {error}")
    theme = gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # none from elsewhere
    page(sides).launch(server_port=options.port, share=False, inbrowser=False, theme=theme, css=CSS)


if __name__ == "__main__":
    main()
