"""What it costs that nothing is lost: bytes of state, seconds of accounts and hashes, memory, of a run of many images.

    python benchmarks/safety.py [--images 2000] [--model emoji-pixart] [--steps 1]

A whole run by `rtn` in a temporary folder. `state` counts every byte written to state.json, the journal and the
manifest; `accounts` are the seconds within the manifest (hashing of files included), the records of stages and the
hashes of latents, trajectories and features; `memory` is the resident memory after a tenth of the quantized images and
after all of them.
"""

import argparse
import contextlib
import functools
import tempfile
import time
from pathlib import Path

import dmquant  # noqa: F401, before diffusers, for which it makes torchvision importable
from dmquant.evaluation import final_latents, trajectory
from dmquant.evaluation.networks import features
from dmquant.host import owned
from dmquant.host.memory import resident_memory
from dmquant.pipelines.commands import stages
from dmquant.pipelines.runs import image_stage, runfolder
from dmquant.pipelines.runs.settings import Options, resolve

ACCOUNTS = (
    (owned.Owned, ("temporary", "admit", "record", "remove", "tidy", "clear")),
    (runfolder.RunFolder, ("finish", "forget", "note", "add_notes")),
    (final_latents, ("sealed_about",)),
)
SEALED = (final_latents, trajectory, features)


class Meter:
    """Seconds and bytes within the functions that it wraps; within one another they count once."""

    def __init__(self) -> None:
        self.seconds, self.bytes, self._inside = 0.0, 0, False

    def timing(self, function):
        @functools.wraps(function)
        def timed(*args, **kwargs):
            if self._inside:
                return function(*args, **kwargs)
            self._inside, began = True, time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - began
                self._inside = False

        return timed

    def counting(self, function):
        @functools.wraps(function)
        def counted(path, text):
            if owned.ROOM in Path(path).parts or Path(path).name == runfolder.STATE:
                self.bytes += len(text.encode()) + 1
            return function(path, text)

        return counted


@contextlib.contextmanager
def installed(meter: Meter):
    with contextlib.ExitStack() as stack:

        def put(place, name, wrapped):
            stack.callback(setattr, place, name, getattr(place, name))
            setattr(place, name, wrapped)

        for place, names in ACCOUNTS:
            for name in names:
                put(place, name, meter.timing(getattr(place, name)))
        for module in SEALED:
            put(module, "save_sealed", meter.timing(module.save_sealed))
        for module, name in ((runfolder, "write_text"), (runfolder, "append_line"), (owned, "append_line")):
            put(module, name, meter.counting(getattr(module, name)))
        yield


def main(images: int, model: str, steps: int) -> None:
    meter, memory = Meter(), []

    def tracking(function):
        def tracked(generated, *args):
            memory.append((len(generated.seconds), resident_memory()))
            return function(generated, *args)

        return tracked

    real = image_stage.generate
    image_stage.generate = lambda *args, on_batch, **kwargs: real(*args, on_batch=tracking(on_batch), **kwargs)
    with tempfile.TemporaryDirectory() as folder, installed(meter):
        prompts = Path(folder, "prompts.txt")
        prompts.write_text("\n".join(f"a red apple, number {index}" for index in range(images)))
        options = Options(
            model=model, recipe="rtn", prompts=str(prompts), num_prompts=images, steps=steps, metrics="psnr,latent_mse"
        )
        settings, began = resolve(options), time.perf_counter()
        stages.run(settings, Path(folder, "run"), False)
        seconds = time.perf_counter() - began
        manifest = Path(folder, "run", owned.ROOM, owned.MANIFEST).stat().st_size
    quantized = memory[len(memory) // 2 :]
    early = next(bytes_ for count, bytes_ in quantized if count >= images / 10)
    print(f"{images} images a side in {seconds:.0f} s, {steps} step(s) of {model}")
    print(f"state: {meter.bytes / 1e6:.2f} MB written in all; the manifest has {manifest / 1e6:.2f} MB at the end")
    print(f"accounts: {meter.seconds:.2f} s, {100 * meter.seconds / seconds:.2f} % of the run")
    print(
        f"memory: {early / 1e6:.0f} MB after a tenth of the quantized images, {quantized[-1][1] / 1e6:.0f} MB after all"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--model", default="emoji-pixart")
    parser.add_argument("--steps", type=int, default=1)
    given = parser.parse_args()
    main(given.images, given.model, given.steps)
