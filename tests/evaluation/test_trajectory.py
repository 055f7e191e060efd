"""The latents along the way: what the sampler gave at every step, and how far quantization leads away from it."""

import pytest
import torch

from dmquant.convert import quantize_
from dmquant.diffusers.families import families
from dmquant.evaluation.final_latents import read_latent
from dmquant.evaluation.generate import generate, image_requests, missing, prune
from dmquant.evaluation.png import read_key
from dmquant.evaluation.step_errors import step_errors
from dmquant.evaluation.trajectory import (
    TRAJECTORIES,
    Trajectory,
    read_trajectory,
    recording_trajectories,
    save_trajectory,
    trajectory_path,
)
from dmquant.host import owned
from dmquant.recipe import Recipe
from tests.calib.runs import call_of
from tests.tiny import TINY

STEPS = 3
MODELS = ("sd15", "pixart-sigma", "dit", "flux")


def made(model, folder, quantized=None, count=2, **options):
    """The folder of a tiny model's images; `quantized` is the format of its weights."""
    tiny, family = TINY[model], families()[TINY[model].family]
    pipeline = tiny.build()
    if quantized:
        quantize_(getattr(pipeline, family.component), Recipe.load("rtn", quantized, "none"))
    requests = image_requests(tiny.prompts[:count], 0, "s")
    settings = {"batch_size": 2, "call": call_of(model, STEPS)} | options
    generate(family.prompted(pipeline), requests, folder, **settings)
    return folder


def trajectories(folder):
    return [read_trajectory(path, read_key(path)) for path in sorted(folder.glob("*.png"))]


@pytest.fixture(scope="module", params=MODELS)
def sides(request, tmp_path_factory):
    """Full precision twice, and weights of 8 and of 3 bits."""
    folder = tmp_path_factory.mktemp(request.param)
    formats = {"fp": None, "again": None, "fine": "fp8", "coarse": "int3"}
    return {name: made(request.param, folder / name, fmt) for name, fmt in formats.items()}


def test_a_trajectory_ends_in_the_final_latents(sides):
    for path, trajectory in zip(sorted(sides["fp"].glob("*.png")), trajectories(sides["fp"]), strict=True):
        final = read_latent(path, read_key(path))
        assert trajectory.latents.dtype == torch.float32
        assert len(trajectory.latents) == len(trajectory.timesteps) == STEPS
        assert trajectory.timesteps.tolist() == sorted(trajectory.timesteps.tolist(), reverse=True)
        # Flux packs four neighbours into a token and adds a shift before decoding.
        if trajectory.latents[-1].shape == final.shape:
            torch.testing.assert_close(trajectory.latents[-1], final, rtol=1e-4, atol=1e-5)
        else:
            assert trajectory.latents[-1].numel() == final.numel()


def test_equal_runs_have_equal_trajectories_and_no_error(sides):
    for one, other in zip(trajectories(sides["fp"]), trajectories(sides["again"]), strict=True):
        assert torch.equal(one.latents, other.latents)
        assert torch.equal(one.timesteps, other.timesteps)
    assert [error.latent_mse for error in step_errors(sides["fp"], sides["again"])] == [0.0] * STEPS


def test_the_error_is_larger_for_the_coarser_format_at_every_step_and_ends_in_that_of_the_final_latents(sides):
    fine, coarse = (step_errors(sides["fp"], sides[name]) for name in ("fine", "coarse"))
    assert [error.step for error in fine] == [1, 2, 3]
    for one, other in zip(fine, coarse, strict=True):
        assert 0 < one.latent_mse < other.latent_mse
        assert one.latent_power == other.latent_power > 0
        assert one.timestep == other.timestep
    paths = sorted(sides["fp"].glob("*.png"))
    differences = [
        read_latent(path, read_key(path)) - read_latent(sides["coarse"] / path.name, read_key(path)) for path in paths
    ]
    assert coarse[-1].latent_mse == pytest.approx(float(torch.stack(differences).square().mean()), rel=1e-3)


def test_a_resumed_run_has_the_trajectories_of_one_that_was_never_stopped(tmp_path):
    whole = made("pixart-sigma", tmp_path / "whole", count=4)

    def stop(generated):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made("pixart-sigma", tmp_path / "stopped", count=4, on_batch=stop)
    stopped = made("pixart-sigma", tmp_path / "stopped", count=4)
    assert len(trajectories(whole)) == 4
    for path in sorted(whole.glob("*.png")):
        assert trajectory_path(path).read_bytes() == trajectory_path(stopped / path.name).read_bytes()


class Stepping:
    """A pipeline that takes two steps of one element, adding the seed; counts what looks at its scheduler."""

    class scheduler:  # noqa: N801
        def step(self, model_output, timestep, sample):
            return (sample + model_output,)

    def __init__(self):
        self.scheduler = self.scheduler()

    def set_progress_bar_config(self, **config): ...

    def __call__(self, prompt, generator, **call):
        latents = torch.zeros(len(prompt), 1)
        seeds = torch.tensor([float(each.initial_seed()) for each in generator])[:, None]
        for timestep in (2, 1):
            (latents,) = self.scheduler.step(seeds, timestep, latents)
        return type("Output", (), {"images": latents[:, :, None, None].expand(-1, 4, 4, 3).numpy() * 0})


def test_only_the_first_images_have_trajectories_however_the_batches_are_cut(tmp_path):
    requests = image_requests(["a"] * (TRAJECTORIES + 3), 0, "s")
    for batch_size in (1, 3, 16):
        folder = tmp_path / str(batch_size)
        generate(Stepping(), requests, folder, batch_size=batch_size, call={})
        read = [read_trajectory(folder / request.name, request.key) for request in requests]
        assert [each.latents.tolist() for each in read[:TRAJECTORIES]] == [
            [[seed], [2 * seed]] for seed in range(TRAJECTORIES)
        ]
        assert read[TRAJECTORIES:] == [None] * 3
        assert read[0].timesteps.tolist() == [2.0, 1.0]


def test_a_missing_trajectory_makes_no_image_missing_and_the_others_make_the_curve(tmp_path):
    requests = image_requests(["a", "b"], 1, "s")
    for side in ("fp", "quantized"):
        generate(Stepping(), requests, tmp_path / side, batch_size=2, call={})
    trajectory_path(tmp_path / "quantized" / "00000.png").unlink()
    assert missing(tmp_path / "quantized", requests) == []
    powers = [error.latent_power for error in step_errors(tmp_path / "fp", tmp_path / "quantized")]
    assert powers == [4.0, 16.0]  # those of the image with seed 2
    trajectory_path(tmp_path / "fp" / "00001.png").unlink()
    assert step_errors(tmp_path / "fp", tmp_path / "quantized") == []


def test_a_pruned_image_takes_its_trajectory_with_it(tmp_path):
    requests = image_requests(["a", "b"], 1, "s")
    with owned.claimed(tmp_path):
        generate(Stepping(), requests, tmp_path, batch_size=2, call={})
        prune(tmp_path, requests[:1])
    assert [path.name for path in tmp_path.glob("*.trajectory.*")] == ["00000.trajectory.safetensors"]


def a_trajectory(*latents, timesteps=(2.0, 1.0)):
    return Trajectory(torch.tensor(timesteps, dtype=torch.float64), torch.tensor(latents)[:, None])


@pytest.mark.parametrize(
    "other",
    [
        a_trajectory(1.0, float("nan")),
        a_trajectory(1.0, 2.0, timesteps=(3.0, 1.0)),
        a_trajectory(1.0, timesteps=(2.0,)),
    ],
)
def test_images_that_cannot_be_compared_are_left_out(tmp_path, other):
    requests = image_requests(["a", "b"], 1, "s")
    for side in ("fp", "quantized"):
        generate(Stepping(), requests, tmp_path / side, batch_size=2, call={})
    save_trajectory(other, tmp_path / "quantized" / "00000.png", requests[0].key)
    assert [error.latent_power for error in step_errors(tmp_path / "fp", tmp_path / "quantized")] == [4.0, 16.0]


def test_a_trajectory_is_read_only_with_its_images_key_and_whole(tmp_path):
    image = tmp_path / "00000.png"
    save_trajectory(a_trajectory(1.0, 2.0), image, "key")
    assert read_trajectory(image, "key").latents.tolist() == [[1.0], [2.0]]
    assert read_trajectory(image, "another") is None
    assert read_trajectory(image, None) is None
    assert read_trajectory(tmp_path / "00001.png", "key") is None
    trajectory_path(image).write_bytes(trajectory_path(image).read_bytes()[:-4])
    assert read_trajectory(image, "key") is None


def test_nothing_is_recorded_where_no_image_is_followed():
    pipeline = Stepping()
    with recording_trajectories(pipeline, 0) as recorder:
        assert "step" not in vars(pipeline.scheduler)
    assert recorder.trajectories == []
