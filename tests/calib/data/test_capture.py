"""Capture: what is stored is what the pipeline passed, once, whole, and only for what it was made for."""

import copy
import inspect
import json
import signal
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
from safetensors import safe_open

from dmquant.calib.data.capture import capture
from dmquant.calib.data.index import INDEX, Index
from dmquant.calib.data.sampling import Sampling
from dmquant.calib.data.store import CalibrationStore
from dmquant.calib.data.tree import flatten
from dmquant.diffusers.arguments import Calls
from dmquant.diffusers.families import Family, families
from dmquant.errors import UsageError, UserError
from tests.calib.runs import call_of, without_padding
from tests.calib.toy import Toy
from tests.forked import Forked
from tests.tiny import FLUX2_TOKENS, TINY, TOKENS, marked
from tests.tiny.hunyuan import BERT_TOKENS, T5_TOKENS

STEPS = 8
MODELS = {name: (name, 3.0) for name in TINY} | {"sd15 without guidance": ("sd15", 1.0)}


class Model(NamedTuple):
    """A pipeline as it is called with prompts, and what it is called with."""

    pipeline: Any
    family: Family
    call: dict[str, Any]
    prompts: Sequence[str]

    @property
    def backbone(self):
        return getattr(self.pipeline, self.family.component)

    def place(self, prompt, batch_size=3):
        """Number of the call with a prompt in a capture in batches, its row there, and the rows, one a prompt."""
        size = 1 if self.family.encoded else batch_size  # embeddings go one by one
        batch, within = divmod(prompt, size)
        return batch, within, min(size, len(self.prompts) - batch * size)

    @property
    def calls(self):
        """Calls of the backbone at each step."""
        return 2 if self.family.guidance == "calls" and self.call.get(self.family.guidance_argument, 2.0) > 1 else 1

    @property
    def steps(self):
        """Steps that the backbone computes: of several experts the first has those above a boundary."""
        if self.backbone is self.family.backbones_of(self.pipeline).get("transformer_2", self.backbone):
            return STEPS
        self.pipeline.scheduler.set_timesteps(STEPS)
        boundary = 1000 * self.pipeline.config.boundary_ratio
        return sum(timestep >= boundary for timestep in self.pipeline.scheduler.timesteps.tolist())


def built(name, guidance=3.0):
    tiny, family = TINY[name], families()[TINY[name].family]
    call = call_of(name, STEPS) | ({family.guidance_argument: guidance} if tiny.takes_guidance else {})
    return Model(family.prompted(tiny.build()), family, call, tiny.prompts)


@pytest.fixture(scope="module", params=marked(MODELS))
def model(request):
    return built(*MODELS[request.param])


def captured(model, folder, **changes):
    given = {"prompts": model.prompts, "seed": 7, "call": model.call}
    prompts, seed, call = (changes.pop(name, value) for name, value in given.items())
    settings = {"sampling": Sampling("stratified", 3, 0.2), "batch_size": 2, "made_for": {"weights": "w"}}
    settings |= {**model.family.batching, "folder": folder}
    return capture(model.pipeline, model.family.component, Calls(prompts, seed, call), **(settings | changes))


def toy_capture(toy, folder, **changes):
    prompts = changes.pop("prompts", ["a", "bb", "ccc", "dddd"])
    calls = Calls(prompts, changes.pop("seed", 0), {"num_inference_steps": len(toy.sizes)})
    settings = {"sampling": Sampling("uniform", 2, 0.2), "batch_size": 1, "made_for": {"weights": "w"}}
    return capture(toy, "unet", calls, folder=folder, **(settings | changes))


def spied(model, work):
    """Every call of the backbone after the rehearsal in `work`, as its arguments by name and its output; its result."""
    backbone = model.backbone
    calls, signature = [], inspect.signature(backbone.forward)

    def spy(module, args, kwargs, output):
        calls.append((copy.deepcopy(signature.bind(*args, **kwargs).arguments), output[0].clone()))

    handle = backbone.register_forward_hook(spy, with_kwargs=True)
    try:
        result = work()
        return calls[model.steps * model.calls :], result
    finally:
        handle.remove()


def replay(model, store, indices):
    args, kwargs = store.batch(indices)
    with torch.inference_mode():
        return model.backbone(*args, **kwargs)[0]


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def rows_of(prompt, batch, leaf, shared):
    """What belongs to one prompt of a pipeline call of `batch` prompts; a number is repeated for its rows."""
    if leaf.tensor.dim() == 0:
        return leaf.tensor
    return leaf.tensor if leaf.argument in shared else leaf.tensor[prompt::batch]


def test_what_is_stored_is_what_the_pipeline_passed(model, tmp_path):
    calls, store = spied(model, lambda: captured(model, tmp_path, batch_size=3))
    for index, sample in enumerate(store.samples):
        batch, prompt, prompts = model.place(sample.prompt)
        whole = dict(calls[batch * store.steps + sample.step][0])
        given = without_padding(model.family, whole, slice(prompt, None, prompts))
        passed_skeleton, passed = flatten(given)
        skeleton, leaves = flatten(without_padding(model.family, store.batch([index])[1]))
        assert skeleton == passed_skeleton
        for (name, leaf), one in zip(leaves, passed, strict=True):
            wanted = one.tensor
            if one.argument not in model.family.padded:
                wanted = rows_of(prompt, prompts, one, model.family.shared)
            assert leaf.dtype == wanted.dtype, name
            assert torch.equal(leaf, wanted.expand(store.rows) if wanted.dim() == 0 else wanted), name


def test_replaying_what_is_stored_gives_what_the_pipeline_computed_bit_for_bit(model, tmp_path):
    calls, store = spied(model, lambda: captured(model, tmp_path, prompts=model.prompts[:3], batch_size=1))
    assert len(calls) == 3 * model.steps * model.calls
    assert store.rows == (2 if model.family.guidance == "rows" and model.call["guidance_scale"] > 1 else 1)
    for index, sample in enumerate(store.samples):
        made, wanted = replay(model, store, [index]), calls[sample.prompt * store.steps + sample.step][1]
        # Masked padding, which a call for one prompt has none of, moves sums by their last bits.
        assert torch.allclose(made, wanted, atol=1e-6) if model.family.padded else torch.equal(made, wanted)


def test_samples_are_cut_out_of_batches_and_mixed_over_timesteps(model, tmp_path):
    calls, store = spied(model, lambda: captured(model, tmp_path, batch_size=3))
    wanted = []
    for sample in store.samples:
        batch, within, prompts = model.place(sample.prompt)
        wanted.append(calls[batch * store.steps + sample.step][1][within::prompts])
    order = list(range(len(wanted)))[::-1]
    assert len({store.samples[index].step for index in order}) > 3
    mixed = replay(model, store, order)
    assert torch.allclose(mixed, torch.cat([wanted[index] for index in order]), atol=1e-5)
    single = torch.cat([replay(model, store, [index]) for index in order])
    assert torch.allclose(mixed, single, atol=1e-5)


SHARES = (
    "flux",
    "flux2",
    "chroma",
    "qwenimage",
    "auraflow",
)  # families that are told the share of the schedule that is left


def test_the_schedule_is_recorded_as_the_backbone_saw_it(model, tmp_path):
    store = captured(model, tmp_path)
    assert store.steps == model.steps * model.calls
    whole = 1000 if model.family.name in SHARES else 1
    schedule = [
        float(timestep) / whole
        for timestep in model.pipeline.scheduler.timesteps[: model.steps]
        for _ in range(model.calls)
    ]
    assert store.timesteps == pytest.approx(schedule)
    for index, sample in enumerate(store.samples):
        timestep = store.batch([index])[1]["timestep"]
        assert len(timestep) == store.rows  # of one number each, or one for every token
        assert timestep.unique().tolist() == [store.timesteps[sample.step]]


def same(values):
    return lambda tensor: tensor.tolist() == values


def shaped(*shape):
    return lambda tensor: tuple(tensor.shape) == shape


# The rows without and with the first prompt, "red apple" ("fish"); each has an end besides, and for some a start.
MASK = [[1] * tokens + [0] * (TOKENS - tokens) for tokens in (1, 3)]
CONDITIONS = {
    "pixart-alpha-512": {"encoder_attention_mask": same(MASK)},
    "pixart-alpha-1024": {
        "encoder_attention_mask": same(MASK),
        "added_cond_kwargs.resolution": same([[32.0, 32.0]] * 2),
        "added_cond_kwargs.aspect_ratio": same([[1.0]] * 2),
    },
    "sdxl": {
        "encoder_hidden_states": shaped(2, TOKENS, 64),
        "added_cond_kwargs.text_embeds": shaped(2, 32),
        "added_cond_kwargs.time_ids": same([[32.0, 32.0, 0.0, 0.0, 32.0, 32.0]] * 2),
    },
    "hunyuan-1.1": {
        "encoder_hidden_states": shaped(2, BERT_TOKENS, 32),
        "encoder_hidden_states_t5": shaped(2, T5_TOKENS, 32),
        "text_embedding_mask": lambda mask: mask.sum(1).tolist() == [2, 4],
        "text_embedding_mask_t5": lambda mask: mask.sum(1).tolist() == [1, 3],
        "image_meta_size": same([[1024.0, 1024.0, 64.0, 64.0, 0.0, 0.0]] * 2),
        "style": same([0, 0]),
        "image_rotary_emb[0]": shaped(16, 16),
        "image_rotary_emb[1]": shaped(16, 16),
    },
    "sd3": {"encoder_hidden_states": shaped(2, 2 * TOKENS, 64), "pooled_projections": shaped(2, 64)},
    "flux": {
        "pooled_projections": shaped(1, 32),
        "guidance": same([3.0]),
        "img_ids": shaped(64, 3),
        "txt_ids": shaped(TOKENS, 3),
    },
    "flux2": {
        "encoder_hidden_states": shaped(1, FLUX2_TOKENS, 48),
        "guidance": same([3.0]),
        "img_ids": shaped(1, 64, 4),
        "txt_ids": shaped(1, FLUX2_TOKENS, 4),
    },
    "flux2-klein": {"encoder_hidden_states": shaped(1, TOKENS, 48), "txt_ids": shaped(1, TOKENS, 4)},
    "chroma": {
        "img_ids": shaped(64, 3),
        "txt_ids": shaped(TOKENS, 3),
        "attention_mask": lambda mask: mask.sum(1).tolist() in ([64 + 2], [64 + 4]),  # a token of padding is seen too
    },
    "qwenimage": {"encoder_hidden_states": shaped(1, 12, 32)},  # as long as with a prompt also without one
    "cogview4": {
        "encoder_hidden_states": shaped(1, 16, 32),
        "original_size": same([[32.0, 32.0]]),
        "target_size": same([[32.0, 32.0]]),
        "crop_coords": same([[0.0, 0.0]]),
    },
    "auraflow": {"encoder_hidden_states": shaped(2, TOKENS, 32)},
    "sana": {"encoder_attention_mask": lambda mask: mask.sum(1).tolist() == [2, 4]},
    "dit": {"class_labels": same([0, 1000])},
}


@pytest.mark.parametrize("name", marked(CONDITIONS))
def test_every_condition_is_there_for_both_branches_of_guidance(name, tmp_path):
    model = built(name)
    store = captured(model, tmp_path, prompts=model.prompts[:2])
    leaves = dict(flatten(store.batch([0])[1])[1])
    assert {condition for condition, holds in CONDITIONS[name].items() if not holds(leaves[condition])} == set()


@pytest.mark.slow
def test_texts_of_different_lengths_without_a_mask_are_all_as_long_as_the_longest(tmp_path):
    """Each is what the text encoder makes of it beside the longest, prompts and negative prompts alike."""
    model = built("cogview4")
    model.call["negative_prompt"] = "blue boat"
    lengths = {model.pipeline.encode_prompt([prompt])[0].shape[1] for prompt in model.prompts}
    assert lengths == {16, 32}
    store = captured(model, tmp_path)
    longest = model.prompts[-1]
    for index, sample in enumerate(store.samples):
        text = "blue boat" if sample.step % 2 else model.prompts[sample.prompt]  # the prompt's call is the first
        wanted = model.pipeline.encode_prompt([text, longest])[0][:1]
        assert torch.allclose(store.batch([index])[1]["encoder_hidden_states"], wanted, atol=1e-6)
    assert torch.isfinite(replay(model, store, range(len(store)))).all()


def test_what_all_rows_share_is_kept_whole_even_where_it_has_as_many_entries_as_there_are_rows(tmp_path):
    """32 pixels are four image tokens of Hunyuan, and two prompts with guidance four rows."""
    model = built("hunyuan-1.2")
    model.call.update(height=32, width=32)
    calls, store = spied(model, lambda: captured(model, tmp_path, prompts=model.prompts[:2]))
    [rotary] = {tuple(arguments["image_rotary_emb"][0].shape) for arguments, _ in calls}
    assert rotary == (4, 16) == (len(calls[0][0]["hidden_states"]), 16)
    for index, sample in enumerate(store.samples):
        arguments, output = calls[sample.step]
        stored = store.batch([index])[1]["image_rotary_emb"]
        assert all(map(torch.equal, stored, arguments["image_rotary_emb"]))
        assert torch.allclose(replay(model, store, [index]), output[sample.prompt :: 2], atol=1e-5)


def test_embeddings_are_stored_once_and_latents_once_for_both_branches(tmp_path):
    model = built("pixart-sigma")
    store = captured(model, tmp_path, batch_size=5)
    [shard] = tmp_path.glob("*.safetensors")
    with safe_open(shard, framework="pt") as file:
        shapes = [tuple(file.get_slice(name).get_shape()) for name in file.keys()]  # noqa: SIM118
    assert shapes.count((TOKENS, 32)) == len(model.prompts) + 1  # one a prompt and the unconditional one
    assert shapes.count((4, 16, 16)) == len(store.samples)
    assert shapes.count(()) == len({sample.step for sample in store.samples})
    kwargs = store.batch(range(len(store)))[1]
    assert shard.stat().st_size < sum(value.nbytes for value in kwargs.values() if torch.is_tensor(value)) / 2


def test_arguments_passed_by_position_and_by_keyword_are_the_same(tmp_path):
    by_name = toy_capture(Toy([1.0, 1.0]), tmp_path / "name")
    toy = Toy([1.0, 1.0])
    forward = toy.unet.__class__.__call__
    toy.unet.__class__ = type(
        "Positional",
        (type(toy.unet),),
        {"__call__": lambda self, x, t, encoder_hidden_states, extra: forward(self, x, t, encoder_hidden_states)},
    )
    by_position = toy_capture(toy, tmp_path / "position")
    for index in range(len(by_name)):
        one, other = by_name.batch([index])[1], by_position.batch([index])[1]
        assert "extra" not in one  # None, as it is by default
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_second_capture_runs_nothing(tmp_path):
    toy = Toy([1.0, 1.0, 1.0])
    first = toy_capture(toy, tmp_path)
    calls, before, told = toy.unet.calls, files(tmp_path), []
    second = toy_capture(toy, tmp_path, progress=lambda *counts: told.append(counts))
    assert toy.unet.calls == calls == 1 + 12
    assert not told
    assert files(tmp_path) == before
    assert (second.key, second.samples) == (first.key, first.samples)
    assert CalibrationStore.open(tmp_path).samples == first.samples


def test_progress_counts_prompts_and_the_passes_that_measure_importance(tmp_path):
    told = []
    toy_capture(Toy([1.0, 1.0]), tmp_path / "u", batch_size=3, progress=lambda *counts: told.append(counts))
    assert told == [(0, 4), (3, 4), (4, 4)]
    told.clear()
    weighted = Sampling("importance", 1, 0.2)
    toy = Toy([0.0, 1.0])
    store = toy_capture(toy, tmp_path / "i", sampling=weighted, progress=lambda *counts: told.append(counts))
    assert told == [(3, 13), (6, 13), (9, 13), (9, 13), (10, 13), (11, 13), (12, 13), (13, 13)]
    assert store.weights == pytest.approx([0.0, 1.0], abs=0.1)
    assert {sample.step for sample in store.samples} == {1}
    assert CalibrationStore.open(tmp_path / "i").weights == store.weights


def test_importance_that_is_asked_for_later_is_measured_for_the_data_that_is_there(tmp_path):
    toy = Toy([0.0, 1.0])
    plain = toy_capture(toy, tmp_path)
    shards, calls, told = {name: at for name, at in files(tmp_path).items() if "prompts" in name}, toy.unet.calls, []
    store = toy_capture(toy, tmp_path, weighted=True, progress=lambda *counts: told.append(counts))
    assert plain.weights is None
    assert store.weights == pytest.approx([0.0, 1.0], abs=0.1)
    assert (store.key, store.samples) == (plain.key, plain.samples)
    assert shards.items() <= files(tmp_path).items()
    assert told[-1] == (13, 13)
    measured = toy.unet.calls
    assert measured > calls
    assert toy_capture(toy, tmp_path, weighted=True).weights == CalibrationStore.open(tmp_path).weights == store.weights
    assert toy_capture(toy, tmp_path).key == store.key
    assert toy.unet.calls == measured


SCRIPT = """
import os, signal, sys
from pathlib import Path
from tests.calib.data.test_capture import Toy, toy_capture
toy = Toy([1.0, 1.0, 1.0])
toy.unet.register_forward_hook(lambda *_: os.kill(os.getpid(), signal.SIGKILL) if toy.unet.calls == 9 else None)
toy_capture(toy, Path(sys.argv[1]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_a_killed_capture_continues_after_its_last_whole_shard(tmp_path):
    killed = tmp_path / "killed"
    assert Forked(["-c", SCRIPT, killed]).wait(300) == -signal.SIGKILL
    assert Index.load(killed).missing() == [2, 3]
    toy = Toy([1.0, 1.0, 1.0])
    toy_capture(toy, killed)
    assert toy.unet.calls == 2 * 3
    toy_capture(Toy([1.0, 1.0, 1.0]), tmp_path / "whole")
    assert files(killed) == files(tmp_path / "whole")


def test_a_batch_that_fails_leaves_what_is_whole_and_goes_on_with_another_batch_size(tmp_path):
    def stop(done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        toy_capture(Toy([1.0, 1.0]), tmp_path, batch_size=2, progress=stop)
    toy = Toy([1.0, 1.0])
    store = toy_capture(toy, tmp_path)
    assert toy.unet.calls == 2 * 2
    whole = toy_capture(Toy([1.0, 1.0]), tmp_path / "whole")
    assert store.samples == whole.samples
    order = range(len(store))
    assert torch.equal(store.batch(order)[1]["sample"], whole.batch(order)[1]["sample"])


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_shard_is_captured_again_alone(tmp_path, damage):
    toy = Toy([1.0, 1.0, 1.0])
    toy_capture(toy, tmp_path)
    before, calls = files(tmp_path), toy.unet.calls
    shard = sorted(tmp_path.glob("*.safetensors"))[2]
    content = bytearray(shard.read_bytes())
    if damage == "remove":
        shard.unlink()
    else:
        content[len(content) // 2] ^= 16
        shard.write_bytes(content if damage == "flip" else content[:100])
    toy_capture(toy, tmp_path)
    assert toy.unet.calls == calls + 3
    assert files(tmp_path) == before


def test_data_made_for_something_else_is_refused_with_what_differs(tmp_path):
    model = built("pixart-sigma")
    call, prompts = model.call, model.prompts
    store = captured(model, tmp_path, made_for={"weights": "a" * 64, "dtype": "fp32"})
    before = files(tmp_path)

    def again(message, **changes):
        with pytest.raises(UserError, match=message) as caught:
            captured(model, tmp_path, **{"made_for": {"weights": "a" * 64, "dtype": "fp32"}} | changes)
        assert "\n" not in str(caught.value)

    again(r"made for height 32, this run has 48; choose", call=call | {"height": 48})
    again(
        r"made for guidance_scale 3\.0, this run has 4\.5; seed 7, this run has 8; choose",
        call=call | {"guidance_scale": 4.5},
        seed=8,
    )
    again(r"made for other weights; dtype fp32, this run has bf16;", made_for={"weights": "b" * 64, "dtype": "bf16"})
    again(r"made for other prompts;", prompts=prompts[::-1])
    again(r"other prompts; number of prompts 5, this run has 4;", prompts=prompts[:4])
    again(r"sampler stratified, this run has uniform;", sampling=Sampling("uniform", 3, 0.2))
    again(r"sampling seed 0, this run has 1;", sampling=Sampling("stratified", 3, 0.2, 1))
    assert files(tmp_path) == before
    assert captured(model, tmp_path, made_for={"dtype": "fp32", "weights": "a" * 64}).key == store.key


def test_our_own_folder_is_replaced_when_asked(tmp_path):
    toy_capture(Toy([1.0, 1.0]), tmp_path, batch_size=3)
    (tmp_path / ".prompts-00000-00003.99.safetensors").write_bytes(b"half written")
    store = toy_capture(Toy([1.0, 1.0]), tmp_path, seed=5, replace=True)
    fresh = toy_capture(Toy([1.0, 1.0]), tmp_path / "fresh", seed=5)
    assert store.key == fresh.key
    (tmp_path / INDEX).write_text("{")
    for shard in tmp_path.glob("*.safetensors"):
        shard.write_bytes(b"")
    toy_capture(Toy([1.0, 1.0]), tmp_path, seed=5, replace=True)
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} == set(files(tmp_path / "fresh"))


def cut(text):
    return text[: len(text) // 2]


def with_a_digit_more(text):
    return text.replace('"steps": 3', '"steps": 4')


def with_samples_swapped(text):
    content = json.loads(text)
    first, second = content["shards"][0]["samples"][:2]
    first["leaves"], second["leaves"] = second["leaves"], first["leaves"]
    return json.dumps(content)


def with_held_out_inverted(text):
    return text.replace("true", "TRUE").replace("false", "true").replace("TRUE", "false")


def older_and_with_held_out_inverted(text):
    content = json.loads(with_held_out_inverted(text)) | {"version": 1}
    del content["sha256"]
    return json.dumps(content)


DAMAGES = [None, cut, with_a_digit_more, with_samples_swapped, with_held_out_inverted, lambda text: ""]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_index_is_made_again_of_the_shards(tmp_path, damage):
    toy = Toy([1.0, 1.0, 1.0])
    toy_capture(toy, tmp_path, sampling=Sampling("importance", 2, 0.2))
    before, calls = files(tmp_path), toy.unet.calls
    text = (tmp_path / INDEX).read_text()
    (tmp_path / INDEX).unlink()
    if damage is not None:
        assert damage(text) != text
        (tmp_path / INDEX).write_text(damage(text))
    toy_capture(toy, tmp_path, sampling=Sampling("importance", 2, 0.2))
    assert toy.unet.calls == calls
    assert files(tmp_path) == before


def test_shards_with_other_samples_than_those_chosen_are_captured_again(tmp_path):
    """Indexes of the version before carry no hash."""
    toy = Toy([1.0, 1.0, 1.0])
    samples = toy_capture(toy, tmp_path).samples
    text = (tmp_path / INDEX).read_text()
    (tmp_path / INDEX).write_text(older_and_with_held_out_inverted(text))
    assert toy_capture(toy, tmp_path).samples == samples
    assert (tmp_path / INDEX).read_text() == text


def test_an_index_and_shards_that_are_damaged_are_captured_again(tmp_path):
    toy = Toy([1.0, 1.0, 1.0])
    toy_capture(toy, tmp_path)
    before = files(tmp_path)
    (tmp_path / INDEX).write_text(cut(before[INDEX].decode()))
    for number, shard in enumerate(sorted(tmp_path.glob("*.safetensors"))):
        content = bytearray(shard.read_bytes())
        content[-1 - number] ^= 1
        shard.write_bytes(content)
    toy_capture(toy, tmp_path)
    assert files(tmp_path) == before


def test_shards_made_for_something_else_are_refused_without_their_index_too(tmp_path):
    toy_capture(Toy([1.0, 1.0]), tmp_path)
    (tmp_path / INDEX).unlink()
    before = files(tmp_path)
    with pytest.raises(UserError, match="made for seed 0, this run has 3; choose"):
        toy_capture(Toy([1.0, 1.0]), tmp_path, seed=3)
    assert files(tmp_path) == before


@pytest.mark.parametrize("name", ["thesis.txt", INDEX, "my-prompts-1-2.safetensors"])
def test_a_folder_with_something_else_is_left_alone(tmp_path, name):
    (tmp_path / name).write_text("words")
    with pytest.raises(UserError, match=f"holds something else than calibration data \\({name}\\)"):
        toy_capture(Toy([1.0, 1.0]), tmp_path)
    assert files(tmp_path) == {name: b"words"}


def test_files_of_others_beside_the_data_stay(tmp_path):
    toy_capture(Toy([1.0, 1.0]), tmp_path)
    others = {"prompts-of-mine.safetensors": b"1", "prompts-00007-00009.safetensors": b"2", "notes.txt": b"3"}
    for name, content in others.items():
        (tmp_path / name).write_bytes(content)
    toy_capture(Toy([1.0, 1.0]), tmp_path, seed=5, replace=True)
    assert others.items() <= files(tmp_path).items()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_stop_with_argument_prompt_and_step(tmp_path, bad):
    toy = Toy([1.0, 1.0, 1.0], [1.0, bad, 1.0])
    with pytest.raises(UserError, match="NaN or infinity in sample at prompt 0, step 2"):
        toy_capture(toy, tmp_path, sampling=Sampling("uniform", 3, 0.2))
    toy = Toy([1.0, 1.0], extra={"ids": [torch.tensor([1.0, bad])]})
    with pytest.raises(UserError, match=r"NaN or infinity in extra\.ids\[0\] at prompt 0, step"):
        toy_capture(toy, tmp_path / "extra", shared=("extra",))
    assert not toy.unet._forward_pre_hooks


def test_what_all_rows_share_is_stored_and_passed_once(tmp_path):
    table = torch.randn(5, 3)
    toy = Toy([1.0, 1.0], extra=(table, [None, 2.5]))
    store = toy_capture(toy, tmp_path, batch_size=2, shared=("extra",))
    rotary, plain = store.batch([3, 0, 2])[1]["extra"]
    assert torch.equal(rotary, table)
    assert plain == [None, 2.5]


def test_what_depends_on_the_number_of_prompts_cannot_be_shared(tmp_path):
    toy = Toy([1.0, 1.0])
    toy.unet.register_forward_pre_hook(
        lambda module, args, kwargs: (args, kwargs | {"extra": {"ids": args[0].new_ones(3 * len(args[0]))}}),
        with_kwargs=True,
    )
    with pytest.raises(UserError, match=r"passed extra\.ids with 3 entries in a call of 1 rows.*shared=\('extra',\)"):
        toy_capture(toy, tmp_path / "unlisted")
    toy_capture(toy, tmp_path / "alike", batch_size=2, shared=("extra",))
    with pytest.raises(UserError, match=r"does not pass the same extra\.ids in every call"):
        toy_capture(toy, tmp_path / "listed", batch_size=3, shared=("extra",))


def test_pipelines_that_cannot_be_captured(tmp_path):
    toy = Toy([1.0, 1.0, 1.0], ends_early="bb")
    with pytest.raises(UserError, match=r"Backbone 2 times for prompts 1 to 1, and 3 times before.*such as a callback"):
        toy_capture(toy, tmp_path / "calls")
    with pytest.raises(UserError, match=r"never called its Backbone"):
        toy_capture(Toy([]), tmp_path / "none")
    with pytest.raises(UserError, match="the argument extra is of type dtype"):
        toy_capture(Toy([1.0, 1.0], extra=torch.float16), tmp_path / "type")
    toy = Toy([1.0, 1.0])
    toy.unet.register_forward_pre_hook(
        lambda module, args: (args[0].repeat(2, 1, 1, 1), *args[1:]) if int(args[1]) else None
    )
    with pytest.raises(UserError, match="given 2 rows for 1 prompts at step 1, and 1 rows each before"):
        toy_capture(toy, tmp_path / "rows")
    with pytest.raises(UsageError, match="at least 2 prompts"):
        toy_capture(Toy([1.0, 1.0]), tmp_path / "few", prompts=["a"])


def test_a_scheduler_that_calls_the_backbone_more_often_than_it_has_steps(tmp_path):
    from diffusers import PNDMScheduler

    model = built("sd15")
    model.pipeline.scheduler = PNDMScheduler.from_config(model.pipeline.scheduler.config, skip_prk_steps=True)
    store = captured(model, tmp_path, prompts=model.prompts[:2])
    assert store.steps == len(store.timesteps) == STEPS + 1


def test_a_timestep_that_two_calls_have_is_held_out_of_both(tmp_path):
    from diffusers import HeunDiscreteScheduler

    model = built("sd15")
    model.pipeline.scheduler = HeunDiscreteScheduler.from_config(model.pipeline.scheduler.config)
    store = captured(model, tmp_path, sampling=Sampling("uniform", 99, 0.2))
    assert len(set(store.timesteps)) == STEPS < store.steps == 2 * STEPS - 1
    timesteps = {held_out: set() for held_out in (True, False)}
    for sample in store.samples:
        timesteps[sample.held_out].add(store.timesteps[sample.step])
    assert timesteps[True]
    assert timesteps[True].isdisjoint(timesteps[False])
    assert len(timesteps[True] | timesteps[False]) == STEPS
