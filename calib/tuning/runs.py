"""Runs of a full-precision pipeline, and how far from their final latents those of its student end."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from dmquant.calib.blocks.replay import Arguments, replaced, replaced_forward
from dmquant.calib.data.importance import PROMPTS, measure_importance
from dmquant.calib.data.tree import Leaf, flatten, in_own_containers, unflatten
from dmquant.diffusers.arguments import Calls
from dmquant.diffusers.watching import rehearsing
from dmquant.errors import UserError
from dmquant.host.files import fingerprint
from dmquant.host.sealed import save_sealed, sealed_about

SHARE = 0.99  # of what moves the final latents that the student answers for
MOST_CALLS = 8  # that it answers by default: each costs a forward and a backward pass, and their activations
_ENCODE = "encode_prompt"
_TINY = 1e-20  # of a mean square, -200 dB: that of a student which is full precision itself
Bar = Callable[[int, int, str], None]


class Runs:
    """Runs of a full-precision pipeline, in batches, and how far the student's runs end from their final latents.

    In a run of the student its backbone answers the last calls, and those before give what full precision predicted, as
    it was kept. All else is the pipeline's own: sampler, guidance, what the backbone is given next. So errors of
    predictions count by what becomes of them in an image: they add up over steps, or cancel, as the steps of a
    multistep solver make those cancel that agree from step to step.

    The error of a run is the mean square of the difference of final latents; that of a batch, the mean of its runs' in
    dB, as PSNR is of images, so that every run counts by what part of its error is gone. Gradients flow back through
    the sampler. What prompts are encoded as is kept as well, so that encoders run once.
    """

    def __init__(
        self,
        pipeline: Any,
        component: str,
        calls: Calls,
        *,
        last: int | None,
        batch_size: int,
        folder: Path,
        key: str,
        bar: Bar = lambda done, total, what: None,
    ):
        """Let the pipeline, still in full precision, make the runs that `folder` does not have of the same `key`.

        Args:
            component: attribute of the pipeline that is the backbone.
            last: how many calls of a run the student answers; None for all of them.
            batch_size: prompts a pipeline call; 1 where the calls are for one prompt each.
            key: stands for the weights and all else that the runs depend on beside the calls.

        Raises UserError for a run that ends in NaN or infinity.
        """
        size = 1 if calls.one_by_one else batch_size
        self.batches = [range(start, min(start + size, len(calls))) for start in range(0, len(calls), size)]
        self.calls, self.last, self._pipeline, self._component = calls, last, pipeline, component
        self.key = fingerprint(key=key, calls=calls.dependencies(), last=last, batch_size=size)
        self._folder = folder / self.key[:8]
        self._folder.mkdir(parents=True, exist_ok=True)
        self._skeletons: list[Any] = []
        for number, batch in enumerate(self.batches):
            bar(batch.start, len(calls), "full precision")
            if (about := sealed_about(self._path(number))) is None:
                about = self._make(number)
            self._skeletons.append(about["encoded"])
        bar(len(calls), len(calls), "full precision")

    def __len__(self) -> int:
        return len(self.batches)

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return sum(self._path(number).stat().st_size for number in range(len(self)))

    def error(self, number: int) -> Tensor:
        """The error of the student's runs of one batch, in dB, a scalar; with gradients where they are enabled.

        Raises UserError for a pipeline that lets no gradients through.
        """
        kept, encoded = self._read(number)
        with self._answered(kept), self._encoded(encoded):
            latents = self.calls.latents(self._pipeline, self.batches[number], torch.is_grad_enabled())
        if torch.is_grad_enabled() and not latents.requires_grad:
            raise UserError(
                f"{type(self._pipeline).__name__} with {type(self._pipeline.scheduler).__name__} lets no gradients "
                "through, so that it cannot be tuned: try another scheduler"
            )
        difference = latents.float() - kept["final"].to(latents.device).float()
        return 10 * difference.square().flatten(1).mean(1).clamp(min=_TINY).log10().mean()

    @property
    def _backbone(self) -> nn.Module:
        return getattr(self._pipeline, self._component)

    def _path(self, number: int) -> Path:
        return self._folder / f"runs-{number:05d}.safetensors"

    def _read(self, number: int) -> tuple[dict[str, Tensor], list[Any]]:
        """What is kept of a batch, on the backbone's device, and what its prompts are encoded as."""
        content, device = self._path(number).read_bytes(), next(self._backbone.parameters()).device
        kept = {name: tensor.to(device) for name, tensor in safetensors.torch.load(content).items()}
        leaves = [kept[f"encoded.{place}"] for place in range(sum(name.startswith("encoded") for name in kept))]
        return kept, unflatten(self._skeletons[number], leaves)

    def _make(self, number: int) -> dict[str, Any]:
        """A batch of runs in full precision, kept."""
        predictions: list[Tensor] = []
        handle = self._backbone.register_forward_hook(lambda module, args, output: predictions.append(_first(output)))
        try:
            with self._encoding() as encoded:
                final = self.calls.latents(self._pipeline, self.batches[number])
        finally:
            handle.remove()
        if not final.isfinite().all():
            raise UserError("the full-precision pipeline ends in NaN or infinity; try another --dtype")
        before = 0 if self.last is None else max(0, len(predictions) - self.last)
        skeleton, leaves = _flat(encoded)
        tensors = {f"encoded.{place}": leaf.tensor for place, leaf in enumerate(leaves)} | {"final": final}
        tensors |= {f"call.{call}": prediction for call, prediction in enumerate(predictions[:before])}
        kept = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
        about = {"encoded": skeleton}
        save_sealed(self._path(number), kept, about)
        return about

    @contextlib.contextmanager
    def _answered(self, kept: dict[str, Tensor]) -> Iterator[None]:
        """Let the calls of the backbone that are kept give what they gave; the student computes the others."""
        backbone, called = self._backbone, 0
        compute = backbone.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            nonlocal called
            called += 1
            prediction = kept.get(f"call.{called - 1}")
            if prediction is None:
                return compute(*args, **kwargs)
            return (prediction,) if kwargs.get("return_dict") is False else Transformer2DModelOutput(prediction)

        with replaced_forward(backbone, forward):
            yield

    @contextlib.contextmanager
    def _encoding(self) -> Iterator[list[Any]]:
        """What the pipeline encodes prompts as while the block runs, call by call."""
        encoded: list[Any] = []

        def keep(*args: Any, **kwargs: Any) -> Any:
            encoded.append(encode(*args, **kwargs))
            return encoded[-1]

        encode = getattr(self._pipeline, _ENCODE, None)
        with replaced(self._pipeline, _ENCODE, keep):
            yield encoded

    @contextlib.contextmanager
    def _encoded(self, encoded: Sequence[Any]) -> Iterator[None]:
        """Let the pipeline encode prompts as was kept."""
        left = iter(encoded)

        def give(*args: Any, **kwargs: Any) -> Any:
            kept = next(left, None)
            if kept is not None:
                return kept
            with torch.no_grad():
                return encode(*args, **kwargs)

        encode = getattr(self._pipeline, _ENCODE, None)
        with replaced(self._pipeline, _ENCODE, give):
            yield


def _first(output: Any) -> Tensor:
    """The prediction: of a tuple or dataclass, what it begins with."""
    return output if isinstance(output, Tensor) else output[0]


def _flat(encoded: list[Any]) -> tuple[Any, list[Leaf]]:
    """Skeleton and tensors of what prompts were encoded as; of nothing, where that is more than tensors."""
    try:
        return flatten(encoded)
    except UserError:
        return flatten([])


def last_calls(
    pipeline: Any,
    component: str,
    calls: Calls,
    *,
    batch_size: int,
    folder: Path,
    key: str,
    bar: Bar = lambda done, total, what: None,
) -> int:
    """How many of the last calls of a run have SHARE of what moves the final latents; MOST_CALLS at most.

    A call counts by its measured importance (`dmquant.calib.data.importance`), with the first PROMPTS of the calls;
    `folder` has what was measured for the same `key`.
    """
    some = calls.only(range(min(PROMPTS, len(calls))))
    path = folder / f"importance-{fingerprint(key=key, calls=some.dependencies())[:8]}.safetensors"
    if (weights := sealed_about(path)) is None:
        weights = measure_importance(
            pipeline,
            component,
            some,
            steps=len(rehearsed_calls(pipeline, component, some)),
            batch_size=1 if calls.one_by_one else batch_size,
            progress=lambda done, total: bar(done, total, "which calls move the image"),
        )
        folder.mkdir(parents=True, exist_ok=True)
        save_sealed(path, {}, weights)
    sums = accumulate(reversed(weights))
    return min(MOST_CALLS, next(count for count, part in enumerate(sums, 1) if part >= SHARE * sum(weights)))


def rehearsed_calls(pipeline: Any, component: str, calls: Calls) -> list[Arguments]:
    """What the backbone is given in a run with the first prompt, call by call; those after the first at no price."""
    backbone, given = getattr(pipeline, component), []
    handle = backbone.register_forward_pre_hook(
        lambda module, args, kwargs: given.append(in_own_containers((args, kwargs))), with_kwargs=True
    )
    try:
        with rehearsing(backbone):
            calls.latents(pipeline, range(1))
    finally:
        handle.remove()
    return given
