"""Image generation: pairs share their noise, and what is on disk is trusted only when it is what was asked for."""

import numpy as np
import pytest
from PIL import Image

import dmquant
from dmquant.evaluation.generate import batch_size_for, generate, image_requests, missing, prune
from dmquant.evaluation.png import read_key, read_prompt
from dmquant.evaluation.trajectory import trajectory_path
from dmquant.host import owned
from tests.tiny import IMAGE_SIZE, PIXART_CALL, tiny_pixart

PROMPTS = ["red apple", "blue cat, animal", "a green house", "a boat on the tree"]
CALL = {"height": IMAGE_SIZE, "width": IMAGE_SIZE, "num_inference_steps": 2, "guidance_scale": 3.0, **PIXART_CALL}


@pytest.fixture(scope="module")
def pipeline():
    return tiny_pixart()


def pixels(folder):
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))]).astype(int)


def names(requests):
    """The files of some images, all among the first eight: each has its latents and its trajectory beside it."""
    suffixes = (".png", ".latent.safetensors", ".trajectory.safetensors")
    return sorted(request.name.replace(".png", suffix) for request in requests for suffix in suffixes)


def test_images_do_not_depend_on_the_batch_they_are_made_in(pipeline, tmp_path):
    requests = image_requests(PROMPTS, seed=7, settings="s")
    for size in (1, 3):
        generate(pipeline, requests, tmp_path / str(size), batch_size=size, call=CALL)
    one, three = pixels(tmp_path / "1"), pixels(tmp_path / "3")
    assert one.shape == (4, IMAGE_SIZE, IMAGE_SIZE, 3)
    assert np.abs(one - three).max() <= 1  # the last bit of a float32 matmul may differ between batch sizes
    assert np.abs(one[0] - one[1]).max() > 8


def test_each_image_has_its_own_seed(pipeline, tmp_path):
    generate(pipeline, image_requests(["red apple"] * 2, 5, "s"), tmp_path / "a", batch_size=2, call=CALL)
    generate(pipeline, image_requests(["red apple"], 6, "s"), tmp_path / "b", batch_size=1, call=CALL)
    (first, second), (again,) = pixels(tmp_path / "a"), pixels(tmp_path / "b")
    assert np.abs(second - again).max() <= 1
    assert np.abs(first - second).max() > 8


def test_a_finished_batch_is_not_made_again_and_one_with_a_damaged_or_foreign_image_is(pipeline, tmp_path):
    requests = image_requests(PROMPTS, seed=0, settings="s")
    first = generate(pipeline, requests, tmp_path, batch_size=2, call=CALL)
    assert set(first.seconds) == {request.key for request in requests}
    assert all(seconds > 0 for seconds in first.seconds.values())
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.glob("*.png")}

    (tmp_path / "00001.png").write_bytes(before["00001.png"][1][:-40])
    again = generate(pipeline, requests, tmp_path, batch_size=2, call=CALL)

    assert set(again.seconds) == {request.key for request in requests[:2]}
    assert (tmp_path / "00003.png").stat().st_mtime_ns == before["00003.png"][0]
    assert sorted(path.name for path in tmp_path.iterdir()) == names(requests)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.png")} == {
        name: content for name, (_, content) in before.items()
    }
    assert not missing(tmp_path, requests)
    Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE)).save(tmp_path / "00003.png")
    again = generate(pipeline, requests, tmp_path, batch_size=2, call=CALL)
    assert set(again.seconds) == {request.key for request in requests[2:]}


def test_images_that_are_made_as_alone_are_made_again_alone_to_the_same_bytes(pipeline, tmp_path):
    requests = image_requests(PROMPTS, seed=0, settings="s")
    options = {"call": CALL, "as_alone": True}
    with dmquant.deterministic(pipeline):
        generate(pipeline, requests, tmp_path / "once", batch_size=4, **options)
        generate(pipeline, requests[:3], tmp_path / "stopped", batch_size=2, **options)
        (tmp_path / "stopped" / "00001.png").unlink()
        again = generate(pipeline, requests, tmp_path / "stopped", batch_size=3, **options)
    assert set(again.seconds) == {requests[1].key, requests[3].key}
    once, stopped = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("once", "stopped")
    )
    assert once == stopped


@pytest.mark.parametrize(
    ("prompts", "seed", "settings", "made"),
    [
        ([*PROMPTS, "yellow face"], 0, "s", [4]),
        ([PROMPTS[0], "yellow face", *PROMPTS[2:]], 0, "s", [1]),
        (PROMPTS, 1, "s", [0, 1, 2, 3]),
        (PROMPTS, 0, "other steps", [0, 1, 2, 3]),
        (PROMPTS[:2], 0, "s", []),
    ],
)
def test_only_images_with_a_new_prompt_seed_or_setting_are_missing(pipeline, tmp_path, prompts, seed, settings, made):
    Image.new("RGB", (4, 4)).save(tmp_path / "2023.png")
    with owned.claimed(tmp_path):
        generate(pipeline, image_requests(PROMPTS, 0, "s"), tmp_path, batch_size=4, call=CALL)
        changed = image_requests(prompts, seed, settings)
        assert [request.index for request in missing(tmp_path, changed)] == made
        prune(tmp_path, changed)
        generate(pipeline, changed, tmp_path, batch_size=4, call=CALL)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".dmquant", *names(changed), "2023.png"]


def test_a_set_with_one_prompt_more_is_what_a_new_one_would_be(pipeline, tmp_path):
    for count in (3, 4):
        generate(pipeline, image_requests(PROMPTS[:count], 0, "s"), tmp_path / "grown", batch_size=4, call=CALL)
    generate(pipeline, image_requests(PROMPTS, 0, "s"), tmp_path / "new", batch_size=4, call=CALL)
    for path in (tmp_path / "new").iterdir():
        assert path.read_bytes() == (tmp_path / "grown" / path.name).read_bytes()


def test_what_is_to_be_known_of_an_image_is_told_before_it_is_there(pipeline, tmp_path):
    requests, told = image_requests(PROMPTS, 0, "s"), []

    def tell(generated):
        told.append((len(generated.seconds), len(list(tmp_path.glob("*.png")))))

    generate(pipeline, requests, tmp_path, batch_size=2, call=CALL, before_saving=tell)
    assert told == [(2, 0), (4, 2)]


def test_an_image_says_what_made_it(pipeline, tmp_path):
    requests = image_requests(["grüne, häuser 🏠"], seed=3, settings="s")
    generate(pipeline, requests, tmp_path, batch_size=1, call=CALL)
    assert read_prompt(tmp_path / "00000.png") == "grüne, häuser 🏠"
    assert read_key(tmp_path / "00000.png") == requests[0].key
    assert Image.open(tmp_path / "00000.png").info["seed"] == "3"


def test_reading_the_key_of_anything_else_is_none(tmp_path):
    (tmp_path / "text.png").write_text("not an image")
    Image.new("RGB", (4, 4)).save(tmp_path / "foreign.png")
    assert read_key(tmp_path / "absent.png") is None
    assert read_key(tmp_path / "text.png") is None
    assert read_key(tmp_path / "foreign.png") is None


class Broken:
    """A pipeline whose second image is all NaN, as an overflowing half precision model gives."""

    def set_progress_bar_config(self, **config): ...

    def __call__(self, prompt, **call):
        images = np.full((len(prompt), 8, 8, 3), 0.5, dtype=np.float32)
        images[1] = np.nan
        return type("Output", (), {"images": images})


def test_images_that_are_not_numbers_are_counted(tmp_path):
    generated = generate(Broken(), image_requests(PROMPTS, 0, "s"), tmp_path, batch_size=4, call={})
    assert generated.not_finite == {image_requests(PROMPTS, 0, "s")[1].key}
    assert pixels(tmp_path)[:, 0, 0, 0].tolist() == [128, 0, 128, 128]


def test_a_stop_between_batches_keeps_the_finished_ones_and_resuming_gives_the_same_images(pipeline, tmp_path):
    requests = image_requests(PROMPTS, seed=0, settings="s")
    generate(pipeline, requests, tmp_path / "whole", batch_size=2, call=CALL)

    def stop(generated):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(pipeline, requests, tmp_path / "stopped", batch_size=2, call=CALL, on_batch=stop)
    assert len(list((tmp_path / "stopped").glob("*.png"))) == 2
    resumed = generate(pipeline, requests, tmp_path / "stopped", batch_size=2, call=CALL)
    assert len(resumed.seconds) == 2
    for request in requests:
        assert (tmp_path / "whole" / request.name).read_bytes() == (tmp_path / "stopped" / request.name).read_bytes()


@pytest.mark.parametrize(("side", "images"), [(64, 16), (256, 16), (512, 4), (1024, 1), (2048, 1)])
def test_the_batch_shrinks_with_the_image(side, images):
    assert batch_size_for(side, side) == images


def test_an_image_whose_trajectory_is_damaged_is_made_again(pipeline, tmp_path):
    requests = image_requests(PROMPTS[:2], seed=0, settings="s")
    generate(pipeline, requests, tmp_path, batch_size=1, call=CALL)
    path = trajectory_path(tmp_path / requests[1].name)
    before = path.read_bytes()
    assert not missing(tmp_path, requests)
    path.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    assert missing(tmp_path, requests) == requests[1:]
    generate(pipeline, requests, tmp_path, batch_size=1, call=CALL)
    assert path.read_bytes() == before
