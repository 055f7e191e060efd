"""Capture: what is stored is what the pipeline passed, once, whole, and only for what it was made for."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from dmquant.calib.capture import capture
from dmquant.calib.sampling import Sampling
from dmquant.calib.store import INDEX, CalibrationStore, Index
from dmquant.errors import UsageError, UserError
from tests.calib.toy import Toy
from tests.tiny import IMAGE_SIZE, PIXART_CALL, TOKENS, tiny_pixart, tiny_sd, tiny_sdxl

PROMPTS = ["red apple", "blue cat", "a green house", "a boat on the tree", "face"]
STEPS = 8
SIZE = {"height": IMAGE_SIZE, "width": IMAGE_SIZE, "num_inference_steps": STEPS}
FAMILIES = {
    "pixart": (tiny_pixart, "transformer", {**SIZE, "guidance_scale": 3.0, **PIXART_CALL}),
    "sd": (tiny_sd, "unet", {**SIZE, "guidance_scale": 3.0}),
    "sdxl": (tiny_sdxl, "unet", {**SIZE, "guidance_scale": 3.0}),
    "sd without guidance": (tiny_sd, "unet", {**SIZE, "guidance_scale": 1.0}),
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    build, component, call = FAMILIES[request.param]
    return build(), component, call


def captured(pipeline, component, call, folder, prompts=PROMPTS, **changes):
    settings = {"sampling": Sampling("stratified", 3, 0.2), "seed": 7, "batch_size": 2, "made_for": {"weights": "w"}}
    return capture(pipeline, component, prompts, call=call, folder=folder, **(settings | changes))


def toy_capture(toy, folder, **changes):
    prompts = changes.pop("prompts", ["a", "bb", "ccc", "dddd"])
    call = {"num_inference_steps": len(toy.sizes)}
    settings = {"sampling": Sampling("uniform", 2, 0.2), "seed": 0, "batch_size": 1, "made_for": {"weights": "w"}}
    return capture(toy, "unet", prompts, call=call, folder=folder, **(settings | changes))


def spied(pipeline, component, work):
    """Outputs of the backbone during `work`, call by call, and what `work` returned."""
    outputs = []
    handle = getattr(pipeline, component).register_forward_hook(
        lambda module, args, output: outputs.append(output[0].clone())
    )
    try:
        return outputs, work()
    finally:
        handle.remove()


def replay(pipeline, component, store, indices):
    args, kwargs = store.batch(indices)
    with torch.inference_mode():
        return getattr(pipeline, component)(*args, **kwargs)[0]


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_replaying_what_is_stored_gives_what_the_pipeline_computed_bit_for_bit(family, tmp_path):
    pipeline, component, call = family
    outputs, store = spied(
        pipeline, component, lambda: captured(pipeline, component, call, tmp_path, PROMPTS[:3], batch_size=1)
    )
    assert len(outputs) == 3 * STEPS
    assert store.rows == (2 if call["guidance_scale"] > 1 else 1)
    for index, sample in enumerate(store.samples):
        assert torch.equal(replay(pipeline, component, store, [index]), outputs[sample.prompt * STEPS + sample.step])


def test_samples_are_cut_out_of_batches_and_mixed_over_timesteps(family, tmp_path):
    pipeline, component, call = family
    outputs, store = spied(pipeline, component, lambda: captured(pipeline, component, call, tmp_path, batch_size=3))
    wanted = []
    for sample in store.samples:
        batch, within = divmod(sample.prompt, 3)
        prompts = (3, 2)[batch]
        wanted.append(outputs[batch * STEPS + sample.step][within::prompts])
    order = list(range(len(wanted)))[::-1]
    assert len({store.samples[index].step for index in order}) > 3
    mixed = replay(pipeline, component, store, order)
    assert torch.allclose(mixed, torch.cat([wanted[index] for index in order]), atol=1e-5)
    single = torch.cat([replay(pipeline, component, store, [index]) for index in order])
    assert torch.allclose(mixed, single, atol=1e-5)


def test_the_schedule_is_recorded_as_the_backbone_saw_it(family, tmp_path):
    pipeline, component, call = family
    store = captured(pipeline, component, call, tmp_path)
    assert store.steps == STEPS
    assert store.timesteps == [float(timestep) for timestep in pipeline.scheduler.timesteps]
    for index, sample in enumerate(store.samples):
        timestep = store.batch([index])[1]["timestep"]
        assert timestep.tolist() == [store.timesteps[sample.step]] * store.rows


def test_masks_and_added_conditions_are_there(tmp_path):
    build, component, call = FAMILIES["pixart"]
    kwargs = captured(build(), component, call, tmp_path / "pixart").batch([0, 1])[1]
    assert kwargs["encoder_attention_mask"].shape == (4, TOKENS)
    # "red apple" and its end, for the conditional row; the negative prompt is empty
    assert kwargs["encoder_attention_mask"].sum(dim=1).tolist() == [1, 3, 1, 3]
    build, component, call = FAMILIES["sdxl"]
    kwargs = captured(build(), component, call, tmp_path / "sdxl").batch([0, 1])[1]
    assert kwargs["added_cond_kwargs"]["text_embeds"].shape == (4, 32)
    assert kwargs["added_cond_kwargs"]["time_ids"].tolist() == [[32, 32, 0, 0, 32, 32]] * 4
    assert kwargs["return_dict"] is False


def test_embeddings_are_stored_once_and_latents_once_for_both_branches(tmp_path):
    build, component, call = FAMILIES["pixart"]
    store = captured(build(), component, call, tmp_path, batch_size=5)
    [shard] = tmp_path.glob("*.safetensors")
    with safe_open(shard, framework="pt") as file:
        shapes = [tuple(file.get_slice(name).get_shape()) for name in file.keys()]  # noqa: SIM118
    assert shapes.count((TOKENS, 32)) == len(PROMPTS) + 1  # one a prompt and the unconditional one
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
        assert one.pop("extra") is None
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_second_capture_runs_nothing(tmp_path):
    toy = Toy([1.0, 1.0, 1.0])
    first = toy_capture(toy, tmp_path)
    calls, before, told = toy.unet.calls, files(tmp_path), []
    second = toy_capture(toy, tmp_path, progress=lambda *counts: told.append(counts))
    assert toy.unet.calls == calls == 12
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


SCRIPT = """
import os, signal, sys
from pathlib import Path
from tests.calib.test_capture import Toy, toy_capture
toy = Toy([1.0, 1.0, 1.0])
toy.unet.register_forward_hook(lambda *_: os.kill(os.getpid(), signal.SIGKILL) if toy.unet.calls == 8 else None)
toy_capture(toy, Path(sys.argv[1]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_a_killed_capture_continues_after_its_last_whole_shard(tmp_path):
    killed = tmp_path / "killed"
    ended = subprocess.run([sys.executable, "-c", SCRIPT, str(killed)], cwd=Path(__file__).parents[2], check=False)
    assert ended.returncode == -signal.SIGKILL
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
    build, component, call = FAMILIES["pixart"]
    pipeline = build()
    store = captured(pipeline, component, call, tmp_path, made_for={"weights": "a" * 64, "dtype": "fp32"})
    before = files(tmp_path)

    def again(message, prompts=PROMPTS, **changes):
        settings = {"call": call, "made_for": {"weights": "a" * 64, "dtype": "fp32"}} | changes
        with pytest.raises(UserError, match=message) as caught:
            captured(pipeline, component, folder=tmp_path, prompts=prompts, **settings)
        assert "\n" not in str(caught.value)

    again(r"made for height 32, this run has 48; choose", call=call | {"height": 48})
    again(
        r"made for guidance_scale 3\.0, this run has 4\.5; seed 7, this run has 8; choose",
        call=call | {"guidance_scale": 4.5},
        seed=8,
    )
    again(r"made for other weights; dtype fp32, this run has bf16;", made_for={"weights": "b" * 64, "dtype": "bf16"})
    again(r"made for other prompts;", prompts=PROMPTS[::-1])
    again(r"other prompts; number of prompts 5, this run has 4;", prompts=PROMPTS[:4])
    again(r"sampler stratified, this run has uniform;", sampling=Sampling("uniform", 3, 0.2))
    again(r"sampling seed 0, this run has 1;", sampling=Sampling("stratified", 3, 0.2, 1))
    assert files(tmp_path) == before
    assert (
        captured(pipeline, component, call, tmp_path, made_for={"dtype": "fp32", "weights": "a" * 64}).key == store.key
    )


def test_our_own_folder_is_replaced_when_asked(tmp_path):
    toy_capture(Toy([1.0, 1.0]), tmp_path, batch_size=3)
    (tmp_path / ".prompts-00000-00003.99.safetensors").write_bytes(b"half written")
    store = toy_capture(Toy([1.0, 1.0]), tmp_path, seed=5, replace=True)
    fresh = toy_capture(Toy([1.0, 1.0]), tmp_path / "fresh", seed=5)
    assert store.key == fresh.key
    (tmp_path / INDEX).write_text("{")
    with pytest.raises(UserError, match="damaged"):
        toy_capture(Toy([1.0, 1.0]), tmp_path, seed=5)
    toy_capture(Toy([1.0, 1.0]), tmp_path, seed=5, replace=True)
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} == set(files(tmp_path / "fresh"))


def test_a_folder_with_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("words")
    with pytest.raises(UserError, match="holds something else"):
        toy_capture(Toy([1.0, 1.0]), tmp_path)
    assert set(files(tmp_path)) == {"thesis.txt"}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_stop_with_argument_prompt_and_step(tmp_path, bad):
    toy = Toy([1.0, 1.0, 1.0], [1.0, bad, 1.0])
    with pytest.raises(UserError, match="NaN or infinity in sample at prompt 0, step 2"):
        toy_capture(toy, tmp_path, sampling=Sampling("uniform", 3, 0.2))
    toy = Toy([1.0, 1.0], extra={"ids": [torch.tensor([1.0, bad])]})
    with pytest.raises(UserError, match=r"NaN or infinity in extra\.ids\[0\] at prompt 0, step"):
        toy_capture(toy, tmp_path / "extra")
    assert not toy.unet._forward_pre_hooks


def test_what_all_rows_share_is_stored_and_passed_once(tmp_path):
    table = torch.randn(5, 3)
    store = toy_capture(Toy([1.0, 1.0], extra=(table, [None, 2.5])), tmp_path, batch_size=2)
    rotary, plain = store.batch([3, 0, 2])[1]["extra"]
    assert torch.equal(rotary, table)
    assert plain == [None, 2.5]


def test_pipelines_that_cannot_be_captured(tmp_path):
    with pytest.raises(UserError, match=r"Backbone 2 times.*schedule has 3 steps"):
        toy_capture(Toy([1.0, 1.0], scheduled=3), tmp_path / "calls")
    with pytest.raises(UserError, match="the argument extra is of type dtype"):
        toy_capture(Toy([1.0, 1.0], extra=torch.float16), tmp_path / "type")
    toy = Toy([1.0, 1.0])
    toy.unet.register_forward_pre_hook(
        lambda module, args: (args[0].repeat(2, 1, 1, 1), *args[1:]) if int(args[1]) else None
    )
    with pytest.raises(UserError, match="given 2 rows for 1 prompts at step 1"):
        toy_capture(toy, tmp_path / "rows")
    with pytest.raises(UsageError, match="at least 2 prompts"):
        toy_capture(Toy([1.0, 1.0]), tmp_path / "few", prompts=["a"])


def test_a_scheduler_that_calls_the_backbone_more_often_than_it_has_steps(tmp_path):
    from diffusers import PNDMScheduler

    build, component, call = FAMILIES["sd"]
    pipeline = build()
    pipeline.scheduler = PNDMScheduler.from_config(pipeline.scheduler.config, skip_prk_steps=True)
    store = captured(pipeline, component, call, tmp_path, PROMPTS[:2])
    assert store.steps == len(store.timesteps) == STEPS + 1
