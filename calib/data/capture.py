"""Capture calibration data: run the full-precision pipeline as it is deployed and keep what its backbone is given.

Several processes capture a batch of prompts each at a time; all know the same index, and the main one writes it.

A capture that was stopped continues after its last whole shard, one that is done is reused, a damaged shard is captured
again, alone, and a damaged index is made again of the shards.
"""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any

from dmquant.calib.data.importance import PROMPTS, measure_importance
from dmquant.calib.data.index import INDEX, Index, is_damaged_index
from dmquant.calib.data.recorder import Recorder, Shared
from dmquant.calib.data.sampling import Sample, Sampling, choose, held_out_prompts
from dmquant.calib.data.shard import Captured, is_ours, remove_shards
from dmquant.calib.data.store import CalibrationStore
from dmquant.diffusers.arguments import Calls
from dmquant.diffusers.watching import rehearsing
from dmquant.errors import UserError
from dmquant.host import processes

Encoded = Callable[[Any, Sequence[str], Mapping[str, Any]], dict[str, Any]]
"""Gives embeddings of prompts for a pipeline, as arguments of its call, the others of which are given."""

SHORT = 24  # characters of a setting that an error message quotes
SHOWN = 3  # files that an error message names


def capture(
    pipeline: Any,
    component: str,
    calls: Calls,
    *,
    sampling: Sampling,
    batch_size: int,
    folder: Path,
    made_for: dict[str, Any],
    shared: Sequence[str] = (),
    padded: Mapping[str, str] = MappingProxyType({}),
    listed: Collection[str] = (),
    encoded: Encoded | None = None,
    weighted: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
    replace: bool = False,
) -> CalibrationStore:
    """The calibration data of a pipeline, from `folder` as far as it is there.

    Args:
        pipeline: a full-precision diffusers text-to-image pipeline, on its device.
        component: attribute of the pipeline that is the backbone.
        batch_size: prompts a pipeline call, and a shard; 1 where the calls are for one prompt each.
        made_for: what else the data depends on (hash of the weights, dtype), as JSON can hold it. Calls, component and
            sampling are added to it.
        shared: arguments of the backbone's forward that all rows of a call share, with everything in them; all other
            tensors have one entry a row in their first dimension, or no dimensions.
        padded: arguments of the backbone's forward, (rows, tokens, ...), that end in padding to the longest prompt of a
            call, and the argument that is the mask of each, (rows, tokens), or None.
        listed: arguments of the backbone's forward that are lists of plain values, an entry for each prompt of a call.
        encoded: embeds the prompts, so that all texts are of one length, where the pipeline's own calls do not.
        weighted: whether the importance of steps is measured also for a sampler that does not need it.
        progress: told how many prompts are done of how many; passes that measure importance count as prompts.
        replace: start anew where the folder holds something else, which is otherwise a UserError.

    Raises UserError also for NaN or infinity in an argument, for one that is neither by row nor the same in every call,
    and for a pipeline that cannot be called so; UsageError for fewer than 2 prompts.
    """
    held_out = held_out_prompts(sampling, len(calls))
    made_for = _as_json({**made_for, **_dependencies(component, calls, sampling)})
    batch_size = 1 if calls.one_by_one else batch_size
    everyone = processes.current()

    def index_there() -> Index:
        index = _index_in(folder, made_for, replace)
        if index is None:
            remove_shards(folder)
            timesteps = _rehearsed(pipeline, component, calls, padded, listed)
            index = Index(made_for, len(calls), len(timesteps), timesteps=timesteps)
        index.shards = [shard for shard in index.shards if shard.is_whole(folder)]
        return index

    index = everyone.on_main(index_there)
    if index.shards:
        _drop_others(index, choose(sampling, len(calls), index.steps, index.weights, index.timesteps))
    unmeasured = index.weights is None and (weighted or sampling.sampler == "importance")
    if not index.missing() and not unmeasured:
        everyone.on_main(lambda: _complete(folder, index))
        return CalibrationStore(folder, index)

    total = len(calls)
    if unmeasured:
        measured = [prompt for prompt in range(len(calls)) if prompt not in held_out][:PROMPTS]
        total += len(measured) * (index.steps + 1)
        index.weights = everyone.on_main(
            lambda: measure_importance(
                pipeline,
                component,
                calls.only(measured),
                steps=index.steps,
                batch_size=batch_size,
                progress=lambda passes, _: progress(len(measured) * passes, total),
            )
        )
    if everyone.is_main:
        index.save(folder)
    progress(total - len(index.missing()), total)
    samples = choose(sampling, len(calls), index.steps, index.weights, index.timesteps)
    same = Shared(shared)
    if encoded is not None and calls.prompts is not None:
        calls, batch_size = calls.encoded(encoded(pipeline, calls.prompts, calls.arguments)), 1

    def captured(batch: range) -> tuple[Captured, str, dict[str, str]]:
        chosen = [sample for sample in samples if sample.prompt in batch]
        recorder = Recorder(getattr(pipeline, component), batch, chosen, same, padded, listed)
        with recorder:
            calls.latents(pipeline, batch)
        return *recorder.save(folder, index.setup), same.found

    batches = _batches(index.missing(), batch_size)
    for start in range(0, len(batches), everyone.count):
        mine = everyone.share(batches[start : start + everyone.count])
        for shard, sha256, found in chain(*everyone.together(lambda mine=mine: [captured(batch) for batch in mine])):
            for shared_by_all in found.items():
                same.check(*shared_by_all)
            index.add(shard, sha256)
        if everyone.is_main:
            index.save(folder)
        progress(total - len(index.missing()), total)
    everyone.on_main(lambda: remove_shards(folder, keep={shard.name for shard in index.shards}))
    return CalibrationStore(folder, index)


def _rehearsed(
    pipeline: Any, component: str, calls: Calls, padded: Mapping[str, str], listed: Collection[str]
) -> list[float]:
    """The timestep of every backbone call of one pipeline call; UserError for a pipeline that cannot be called so."""
    backbone = getattr(pipeline, component)
    recorder = Recorder(backbone, range(1), [], Shared(()), padded, listed)
    with recorder, rehearsing(backbone):
        calls.latents(pipeline, range(1))
    if not recorder.timesteps:
        kind = type(backbone).__name__
        raise UserError(f"the pipeline never called its {kind} ({component}): there is nothing to calibrate on")
    return recorder.timesteps


def _batches(prompts: Sequence[int], size: int) -> list[range]:
    """Runs of consecutive prompts, of at most `size`."""
    batches: list[range] = []
    for prompt in prompts:
        if batches and batches[-1].stop == prompt and len(batches[-1]) < size:
            batches[-1] = range(batches[-1].start, prompt + 1)
        else:
            batches.append(range(prompt, prompt + 1))
    return batches


def _dependencies(component: str, calls: Calls, sampling: Sampling) -> dict[str, Any]:
    """Everything that `capture` was given and its data depends on; batches change it by rounding at most."""
    drawn = asdict(sampling)
    return {"component": component, **calls.dependencies(), "sampling seed": drawn.pop("seed"), **drawn}


def _as_json(value: dict[str, Any]) -> dict[str, Any]:
    """`value` as it comes back from a JSON file, so that the two compare."""
    return json.loads(json.dumps(value))


def _index_in(folder: Path, made_for: dict[str, Any], replace: bool) -> Index | None:
    """The index in `folder` if it was made for the same, or None to start anew; UserError says what differs."""
    index = Index.load(folder) or Index.of_shards(folder)
    if index is None and not replace:
        _refuse_strangers(folder)
    if index is None or index.made_for == made_for:
        return index
    if replace:
        return None
    raise UserError(
        f"the calibration data in {folder} was made for {_difference(index.made_for, made_for)}; choose another folder"
    )


def _refuse_strangers(folder: Path) -> None:
    """UserError for a folder that holds something else than what is left of calibration data."""
    entries = sorted(entry.name for entry in folder.iterdir()) if folder.exists() else []
    left = {INDEX} if is_damaged_index(folder) else set()
    strangers = [name for name in entries if name not in left and not is_ours(name)]
    if strangers:
        shown = ", ".join(strangers[:SHOWN]) + (", ..." if len(strangers) > SHOWN else "")
        raise UserError(f"{folder} holds something else than calibration data ({shown}); choose another folder")


def _drop_others(index: Index, samples: Sequence[Sample]) -> None:
    """Take shards with other samples than those chosen out of an index."""
    wanted: dict[int, list[Sample]] = {}
    for sample in samples:
        wanted.setdefault(sample.prompt, []).append(sample)
    index.shards = [
        shard
        for shard in index.shards
        if [stored.sample for stored in shard.samples]
        == [sample for prompt in range(shard.start, shard.stop) for sample in wanted.get(prompt, [])]
    ]


def _complete(folder: Path, index: Index) -> None:
    """Write an index that was made again of its shards."""
    if Index.load(folder) != index:
        index.save(folder)


def _difference(there: dict[str, Any], here: dict[str, Any]) -> str:
    """The settings that differ, in words, such as "height 512, this run has 1024; other weights"."""
    differing = [name for name in {**there, **here} if there.get(name) != here.get(name)]
    return "; ".join(_one_difference(name, there.get(name), here.get(name)) for name in differing)


def _one_difference(name: str, there: Any, here: Any) -> str:
    quotable = all(len(json.dumps(value)) <= SHORT and not isinstance(value, dict | list) for value in (there, here))
    return f"{name} {there}, this run has {here}" if quotable else f"other {name}"
