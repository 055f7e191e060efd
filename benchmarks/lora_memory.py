"""Memory and time of a LoRA step on a transformer of PixArt's width: W4A6 against full precision, in processes alone.

    python benchmarks/lora_memory.py [--blocks 28] [--dtype bfloat16] [--tokens 1024] [--batch 1] [--plain]

The model (random weights) is loaded from what was saved, packed or not, and trains a LoRA of rank 16 on all projections
of its attention: forward, backward and a step of AdamW, blocks computed again in the backward pass unless
`--plain`. Memory is the highest of the second step, when all that libraries load late is there, over what the process
held before it loaded the model (Linux: anonymous pages): weights, adapters, optimizer, activations, gradients. Time is
the processor's of that step. `W4A6, kept` is what W4A6 would take if each weight were held decoded between the forward
and the backward pass, as autograd does for a layer that decodes its weight. Freed tensors are given back to the system
(MALLOC_MMAP_THRESHOLD_), unless `--glibc`.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any

from loading_memory import PIXART_SIGMA, anonymous_bytes, write_checkpoint

import dmquant  # before diffusers, for which it makes torchvision importable

KINDS = ("full precision", "W4A6", "W4A6, kept")
TEXT_TOKENS = 300
GIVEN_BACK = {"MALLOC_MMAP_THRESHOLD_": str(1 << 18)}
"""Lets glibc give tensors of 256 KB and more back when they are freed; as it comes, it keeps some 400 MB here."""


def step_of(kind: str, folder: str, options: argparse.Namespace) -> dict[str, float]:
    """What two steps take of one kind of model."""
    import torch
    from diffusers import PixArtTransformer2DModel
    from peft import LoraConfig, inject_adapter_in_model

    torch.set_num_threads(1)
    before, dtype = anonymous_bytes(), getattr(torch, options.dtype)
    if kind == KINDS[2]:
        from dmquant.layers import QuantLinear

        QuantLinear.forward = decoded_before
    model = PixArtTransformer2DModel.from_pretrained(folder, torch_dtype=dtype)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()  # not pages of the file
    model = inject_adapter_in_model(
        LoraConfig(r=16, target_modules=["to_q", "to_k", "to_v", "to_out.0"]), model.requires_grad_(False)
    ).train()
    if not options.plain:
        model.enable_gradient_checkpointing()
    learnt = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, side = torch.optim.AdamW(learnt, lr=1e-4), 2 * int(options.tokens**0.5)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(options.batch, 4, side, side, generator=generator).to(dtype)
    text = torch.randn(options.batch, TEXT_TOKENS, PIXART_SIGMA["caption_channels"], generator=generator).to(dtype)
    timesteps, conditions = torch.full((options.batch,), 500), {"resolution": None, "aspect_ratio": None}
    held, peaks, seconds = anonymous_bytes(), [], []
    for _ in range(2):
        with SampledPeak() as peak:
            began = time.process_time()
            predicted = model(noise, text, timestep=timesteps, added_cond_kwargs=conditions).sample.chunk(2, dim=1)[0]
            (predicted - noise).float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            seconds.append(time.process_time() - began)
        peaks.append(peak.bytes)
    return {"peak": peaks[1] - before, "held": held - before, "seconds": seconds[1]}


def pack(folder: str) -> None:
    """Quantize the model in a folder while it is loaded, and save it in a folder beside its files."""
    import torch
    from diffusers import PixArtTransformer2DModel

    config = dmquant.QuantConfig(dmquant.Recipe.load("w4a6").with_settings(scale="absmax"))
    model = PixArtTransformer2DModel.from_pretrained(folder, torch_dtype=torch.bfloat16, quantization_config=config)
    model.save_pretrained(f"{folder}/packed")


def decoded_before(layer: Any, x: Any) -> Any:
    """A quantized layer's forward by operations that autograd knows, whose backward passes keep the decoded weight."""
    import torch

    *given, x = layer.inputs(x)
    straight = x + (layer.quantize_input(x) - x).detach()
    y = torch.nn.functional.linear(straight, layer.dequantize(x.dtype), layer.bias)
    return layer.complete_output(y, given)


class SampledPeak:
    """The most anonymous memory of the process within a block, in `bytes`."""

    def __enter__(self) -> "SampledPeak":
        self.bytes, self._done = 0, threading.Event()
        self._watcher = threading.Thread(target=self._watch)
        self._watcher.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.002):
            self.bytes = max(self.bytes, anonymous_bytes())

    def __exit__(self, *error: Any) -> None:
        self._done.set()
        self._watcher.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=28)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--tokens", type=int, default=1024, help="a square: 1024 are an image of 512x512")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--plain", action="store_true", help="activations are kept instead of computed again")
    parser.add_argument("--glibc", action="store_true", help="with what glibc keeps of freed tensors, as it comes")
    parser.add_argument("--kinds", default=";".join(KINDS[:2]), help=f"of: {'; '.join(KINDS)}")
    parser.add_argument("--step", nargs=2, metavar=("KIND", "FOLDER"), help=argparse.SUPPRESS)
    parser.add_argument("--pack", metavar="FOLDER", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.pack:
        pack(options.pack)
        return
    if options.step:
        print(json.dumps(step_of(*options.step, options)))
        return
    print("| | memory of a step, MB | of it before the step | over full precision | processor seconds |")
    print("| --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(folder, options.blocks)
        subprocess.run([sys.executable, __file__, "--pack", folder], check=True, capture_output=True)
        first, env = None, os.environ | ({} if options.glibc else GIVEN_BACK)
        for kind in options.kinds.split(";"):
            place = folder if kind == KINDS[0] else f"{folder}/packed"
            command = [sys.executable, *sys.argv, "--step", kind, place]
            answer = subprocess.run(command, check=True, capture_output=True, text=True, env=env).stdout.splitlines()[
                -1
            ]
            facts = json.loads(answer)
            first = first or facts["peak"]
            cells = (f"{facts[name] / 1e6:.0f}" for name in ("peak", "held"))
            print(
                f"| {kind} | {' | '.join(cells)} | {facts['peak'] / first:.2f} | {facts['seconds']:.1f} |", flush=True
            )


if __name__ == "__main__":
    main()
