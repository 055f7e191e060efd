"""Record what a backbone is given in a pipeline's call: the chosen calls, cut into the rows of each prompt."""

import inspect
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmquant.calib.data.sampling import Sample
from dmquant.calib.data.shard import Captured, Kept, Setup, ShardWriter
from dmquant.calib.data.tree import Leaf, flatten, of_rows
from dmquant.errors import UserError


class Shared:
    """The arguments that all rows of every call share."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self._arguments = frozenset(arguments)
        self.found: dict[str, str] = {}
        """SHA-256 of each that was found, by the name of its leaf."""

    def __contains__(self, leaf: Leaf) -> bool:
        return leaf.argument in self._arguments

    def check(self, name: str, sha256: str) -> None:
        """UserError for a tensor that is not what it was in the calls before."""
        if self.found.setdefault(name, sha256) != sha256:
            raise UserError(
                f"the pipeline does not pass the same {name} in every call (it may depend on the number of "
                "prompts), so that it cannot be kept once for all rows as the model's family says"
            )


class Recorder:
    """While entered, keeps the arguments of those backbone calls that were chosen for a prompt of the batch.

    `padded` and `listed` are as in `capture`.
    """

    def __init__(
        self,
        backbone: torch.nn.Module,
        batch: range,
        samples: Sequence[Sample],
        shared: Shared,
        padded: Mapping[str, str],
        listed: Collection[str],
    ) -> None:
        self.backbone, self.batch, self.shared = backbone, batch, shared
        self.padded, self.listed = padded, listed
        self.writer = ShardWriter()
        self.timesteps: list[float] = []
        self.rows = 0
        self.kept: list[Kept] = []
        self._samples = samples
        self._signature = inspect.signature(backbone.forward)

    def __enter__(self) -> None:
        self._handle = self.backbone.register_forward_pre_hook(self._record, with_kwargs=True)

    def __exit__(self, *exception: object) -> None:
        self._handle.remove()

    def save(self, folder: Path, setup: Setup) -> tuple[Captured, str]:
        """Write the shard of what was recorded; returns what is in it, and its SHA-256.

        Raises UserError where the backbone was not called as often as for other prompts.
        """
        if len(self.timesteps) != setup.steps:
            raise UserError(
                f"the pipeline called its {type(self.backbone).__name__} {len(self.timesteps)} times for prompts "
                f"{self.batch.start} to {self.batch.stop - 1}, and {setup.steps} times before: calibration needs the "
                "same number for every prompt; leave out what ends a call early, such as a callback"
            )
        captured = Captured(setup, self.batch.start, self.batch.stop, self.timesteps, self.rows, self.kept)
        return captured, self.writer.save(folder, captured)

    def _record(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        arguments = _by_name(self._signature, args, kwargs)
        step = len(self.timesteps)
        self.timesteps.append(float(torch.as_tensor(arguments["timestep"], dtype=torch.float64).flatten()[0]))
        for name, mask in self.padded.items():
            tokens, given = arguments[name], arguments.get(mask)
            every = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
            arguments[mask] = every if given is None else given.bool()
        # In one order, whether a mask was passed or not: tensors are told apart by their numbers.
        arguments = {name: arguments[name] for name in self._signature.parameters if name in arguments} | arguments
        skeleton, leaves = flatten(arguments)
        call_rows = leaves[0].tensor.shape[0]
        rows_each, left = divmod(call_rows, len(self.batch))
        if left or self.rows not in (0, rows_each):
            before = f", and {self.rows} rows each before" if self.rows else ""
            raise UserError(
                f"the backbone was given {call_rows} rows for {len(self.batch)} prompts at step {step}{before}: "
                "calibration needs the same number for every prompt and step; leave out what changes it on the way, "
                "such as a callback that ends guidance"
            )
        self.rows = rows_each
        for sample in self._samples:
            if sample.step == step:
                # diffusers concatenates whole guidance branches: [unconditional of all prompts, conditional of all]
                rows = range(sample.prompt - self.batch.start, call_rows, len(self.batch))
                of_sample = of_rows(skeleton, rows, self.padded, self.listed)
                kept = [self._keep(leaf, call_rows, rows, sample) for leaf in leaves]
                self.kept.append(Kept(sample, of_sample, kept))

    def _keep(self, leaf: Leaf, call_rows: int, rows: range, sample: Sample) -> list[int] | int:
        """A leaf that is not shared is cut into rows along its first dimension; a scalar belongs to every row."""
        if leaf in self.shared:
            number = self._add(leaf.name, leaf.tensor, sample)
            self.shared.check(leaf.name, self.writer.digest(number))
            return number
        if leaf.tensor.dim() == 0:
            return [self._add(leaf.name, leaf.tensor, sample)] * len(rows)
        if len(leaf.tensor) == call_rows:
            return [self._add(leaf.name, leaf.tensor[row], sample) for row in rows]
        raise UserError(
            f"the pipeline passed {leaf.name} with {len(leaf.tensor)} entries in a call of {call_rows} rows: what all "
            f"rows share must be listed by the model's family, as shared=('{leaf.argument}',)"
        )

    def _add(self, name: str, tensor: Tensor, sample: Sample) -> int:
        number, is_new = self.writer.add(tensor)
        if is_new and not tensor.isfinite().all():
            raise UserError(
                f"NaN or infinity in {name} at prompt {sample.prompt}, step {sample.step} of the full-precision "
                "pipeline: nothing can be learned from it; try another --dtype"
            )
        return number


def _by_name(signature: inspect.Signature, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by parameter name, whether they were passed by position or by keyword.

    Without those that are None and are so by default: some pipelines pass these in one branch of guidance alone.
    """
    given = signature.bind(*args, **kwargs).arguments
    parameters = signature.parameters
    arguments = {
        name: value for name, value in given.items() if value is not None or parameters[name].default is not None
    }
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            arguments |= arguments.pop(name, {})
    return arguments
