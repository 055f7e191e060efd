"""Capture calibration data: run the full-precision pipeline as it is deployed and keep what its backbone is given.

Several processes capture a batch of prompts each at a time; all know the same index, and the main one writes it.

A capture that was stopped continues after its last whole shard, one that is done is reused, and a damaged shard is
captured again, alone.
"""

import dataclasses
import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmquant.calib.data.importance import PROMPTS, measure_importance
from dmquant.calib.data.sampling import Sample, Sampling, choose, held_out_prompts
from dmquant.calib.data.store import INDEX, CalibrationStore, Index, Shard, ShardWriter, StoredSample, remove_shards
from dmquant.calib.data.tree import Leaf, flatten
from dmquant.diffusers.calling import backbone_calls, final_latents
from dmquant.errors import UserError
from dmquant.host import processes
from dmquant.host.files import json_sha256

Kept = tuple[Sample, Any, list[list[int] | int]]  # as in StoredSample, with the skeleton itself

SHORT = 24  # characters of a setting that an error message quotes


def capture(
    pipeline: Any,
    component: str,
    prompts: Sequence[str],
    *,
    sampling: Sampling,
    call: dict[str, Any],
    seed: int,
    batch_size: int,
    folder: Path,
    made_for: dict[str, Any],
    shared: Sequence[str] = (),
    progress: Callable[[int, int], None] = lambda done, total: None,
    replace: bool = False,
) -> CalibrationStore:
    """The calibration data of a pipeline, from `folder` as far as it is there.

    Args:
        pipeline: a full-precision diffusers text-to-image pipeline, on its device.
        component: attribute of the pipeline that is the backbone.
        prompts: prompt i starts from the noise of seed `seed` + i.
        call: arguments of the pipeline's call other than prompt, generator and output type.
        batch_size: prompts a pipeline call, and a shard.
        made_for: what else the data depends on (hash of the weights, dtype), as JSON can hold it. Prompts, call, seed,
            component and sampling are added to it.
        shared: arguments of the backbone's forward that all rows of a call share, with everything in them; all other
            tensors have one entry a row in their first dimension, or no dimensions.
        progress: told how many prompts are done of how many; passes that measure importance count as prompts.
        replace: start anew where the folder holds data made for something else, which is otherwise a UserError.

    Raises UserError also for NaN or infinity in an argument, for one that is neither by row nor the same in every call,
    and UsageError for fewer than 2 prompts.
    """
    held_out = held_out_prompts(sampling, len(prompts))
    made_for = _as_json({**made_for, **_dependencies(component, prompts, sampling, call, seed)})
    everyone = processes.current()

    def index_there() -> Index:
        index = _index_in(folder, made_for, replace)
        if index is None:
            remove_shards(folder)
            index = Index(made_for, len(prompts), backbone_calls(pipeline, call["num_inference_steps"]))
        index.shards = [shard for shard in index.shards if shard.is_whole(folder)]
        return index

    index = everyone.on_main(index_there)
    if not index.missing():
        return CalibrationStore(folder, index)

    total = len(prompts)
    if sampling.sampler == "importance" and index.weights is None:
        measured = [prompt for i, prompt in enumerate(prompts) if i not in held_out][:PROMPTS]
        total += len(measured) * (index.steps + 1)
        index.weights = everyone.on_main(
            lambda: measure_importance(
                pipeline,
                component,
                measured,
                call=call,
                seed=seed,
                batch_size=batch_size,
                progress=lambda passes, _: progress(len(measured) * passes, total),
            )
        )
    if everyone.is_main:
        index.save(folder)
    progress(total - len(index.missing()), total)
    samples = choose(sampling, len(prompts), index.steps, index.weights)
    same = _Shared(shared)

    def captured(batch: range) -> _Captured:
        chosen = [sample for sample in samples if sample.prompt in batch]
        recorder = _Recorder(getattr(pipeline, component), batch, chosen, same)
        with recorder:
            final_latents(pipeline, prompts[batch.start : batch.stop], seed + batch.start, call)
        return recorder.save(folder, index.steps)

    batches = _batches(index.missing(), batch_size)
    for start in range(0, len(batches), everyone.count):
        mine = everyone.share(batches[start : start + everyone.count])
        for one in chain(*everyone.together(lambda mine=mine: [captured(batch) for batch in mine])):
            for shared_by_all in one.shared.items():
                same.check(*shared_by_all)
            _add_shard(one, index)
        if everyone.is_main:
            index.save(folder)
        progress(total - len(index.missing()), total)
    everyone.on_main(lambda: remove_shards(folder, keep=index.shards))
    return CalibrationStore(folder, index)


@dataclass(frozen=True)
class _Captured:
    """An entry for the index on the shard of one batch of prompts, written by the process that captured it."""

    shard: Shard
    """Without samples: which skeletons the index has is known only when the shards before are in it."""
    timesteps: list[float]
    rows: int
    kept: list[Kept]
    shared: dict[str, str]
    """SHA-256 of every tensor that all rows share, by name."""


def _add_shard(captured: _Captured, index: Index) -> None:
    """List a shard in the index."""
    index.timesteps, index.rows = captured.timesteps, captured.rows
    samples = []
    for sample, skeleton, leaves in captured.kept:
        if skeleton not in index.skeletons:
            index.skeletons.append(skeleton)
        samples.append(StoredSample(sample, index.skeletons.index(skeleton), leaves))
    samples.sort(key=lambda stored: (stored.sample.prompt, stored.sample.step))
    shard = dataclasses.replace(captured.shard, samples=samples)
    index.shards = sorted([*index.shards, shard], key=lambda shard: shard.start)


class _Shared:
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


class _Recorder:
    """While entered, keeps the arguments of those backbone calls that were chosen for a prompt of the batch."""

    def __init__(self, backbone: torch.nn.Module, batch: range, samples: Sequence[Sample], shared: _Shared) -> None:
        self.backbone, self.batch, self.shared = backbone, batch, shared
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

    def save(self, folder: Path, steps: int) -> _Captured:
        """Write the shard of what was recorded; UserError where the backbone was not called once a step."""
        if len(self.timesteps) != steps:
            raise UserError(
                f"the pipeline called its {type(self.backbone).__name__} {len(self.timesteps)} times, but its "
                f"schedule has {steps} steps: calibration data of such a pipeline cannot be captured"
            )
        shard = self.writer.save(folder, self.batch.start, self.batch.stop, samples=[])
        return _Captured(shard, self.timesteps, self.rows, self.kept, self.shared.found)

    def _record(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        arguments = _by_name(self._signature, args, kwargs)
        step = len(self.timesteps)
        self.timesteps.append(float(torch.as_tensor(arguments["timestep"]).flatten()[0]))
        skeleton, leaves = flatten(arguments)
        call_rows = leaves[0].tensor.shape[0]
        rows_each, left = divmod(call_rows, len(self.batch))
        if left or self.rows not in (0, rows_each):
            raise UserError(
                f"the backbone was given {call_rows} rows for {len(self.batch)} prompts at step {step}: calibration "
                "needs the same number for every prompt and step"
            )
        self.rows = rows_each
        for sample in self._samples:
            if sample.step == step:
                # diffusers concatenates whole guidance branches: [unconditional of all prompts, conditional of all]
                rows = range(sample.prompt - self.batch.start, call_rows, len(self.batch))
                self.kept.append((sample, skeleton, [self._keep(leaf, call_rows, rows, sample) for leaf in leaves]))

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
    """Arguments by parameter name, whether they were passed by position or by keyword."""
    arguments = dict(signature.bind(*args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            arguments |= arguments.pop(name, {})
    return arguments


def _batches(prompts: Sequence[int], size: int) -> list[range]:
    """Runs of consecutive prompts, of at most `size`."""
    batches: list[range] = []
    for prompt in prompts:
        if batches and batches[-1].stop == prompt and len(batches[-1]) < size:
            batches[-1] = range(batches[-1].start, prompt + 1)
        else:
            batches.append(range(prompt, prompt + 1))
    return batches


def _dependencies(
    component: str, prompts: Sequence[str], sampling: Sampling, call: dict[str, Any], seed: int
) -> dict[str, Any]:
    """Everything that `capture` was given and its data depends on; batches change it by rounding at most."""
    drawn = asdict(sampling)
    listed = json_sha256(list(prompts))
    return {
        "component": component,
        "prompts": listed,
        "number of prompts": len(prompts),
        **call,
        "seed": seed,
        "sampling seed": drawn.pop("seed"),
        **drawn,
    }


def _as_json(value: dict[str, Any]) -> dict[str, Any]:
    """`value` as it comes back from a JSON file, so that the two compare."""
    return json.loads(json.dumps(value))


def _index_in(folder: Path, made_for: dict[str, Any], replace: bool) -> Index | None:
    """The index in `folder` if it was made for the same, or None to start anew; UserError says what differs."""
    if not (folder / INDEX).exists():
        if folder.exists() and any(folder.iterdir()) and not replace:
            raise UserError(f"{folder} holds something else than calibration data; choose another folder")
        return None
    try:
        index = Index.load(folder)
    except UserError:
        if replace:
            return None
        raise
    if index.made_for == made_for:
        return index
    if replace:
        return None
    raise UserError(
        f"the calibration data in {folder} was made for {_difference(index.made_for, made_for)}; choose another folder"
    )


def _difference(there: dict[str, Any], here: dict[str, Any]) -> str:
    """The settings that differ, in words, such as "height 512, this run has 1024; other weights"."""
    differing = [name for name in {**there, **here} if there.get(name) != here.get(name)]
    return "; ".join(_one_difference(name, there.get(name), here.get(name)) for name in differing)


def _one_difference(name: str, there: Any, here: Any) -> str:
    quotable = all(len(json.dumps(value)) <= SHORT and not isinstance(value, dict | list) for value in (there, here))
    return f"{name} {there}, this run has {here}" if quotable else f"other {name}"
