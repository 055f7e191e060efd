"""The final latents beside the images: what the sampler gave, for every family, and only where they belong."""

import os

import pytest
import torch

from dmquant.diffusers.watching import recording_latents
from dmquant.evaluation import final_latents
from dmquant.evaluation.final_latents import has_latent, latent_path, read_latent, save_latent
from dmquant.evaluation.generate import generate, image_requests, missing
from dmquant.evaluation.png import read_key
from tests.tiny import IMAGE_SIZE, PIXART_CALL, tiny_pixart, tiny_sd, tiny_sdxl

PROMPTS = ["red apple", "blue cat", "a green house"]
CALL = {"height": IMAGE_SIZE, "width": IMAGE_SIZE, "num_inference_steps": 2, "guidance_scale": 3.0}
FAMILIES = {"pixart": (tiny_pixart, PIXART_CALL), "sd": (tiny_sd, {}), "sdxl": (tiny_sdxl, {})}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_kept_is_what_the_sampler_ended_with(tmp_path, family):
    build, more = FAMILIES[family]
    pipeline, call = build(), CALL | more
    requests = image_requests(PROMPTS, 0, "s")
    generate(pipeline, requests, tmp_path, batch_size=3, call=call)
    with torch.inference_mode():
        expected = pipeline(
            prompt=PROMPTS,
            generator=[torch.Generator().manual_seed(seed) for seed in range(3)],
            output_type="latent",
            **call,
        ).images
    kept = torch.stack([read_latent(tmp_path / request.name, request.key) for request in requests])
    assert kept.dtype == torch.float32
    torch.testing.assert_close(kept, expected.float(), rtol=1e-5, atol=1e-5)


def test_recording_leaves_the_vae_as_it_was_even_after_an_error():
    pipeline = tiny_pixart()
    before = dict(vars(pipeline.vae))
    with recording_latents(pipeline), pytest.raises(RuntimeError):
        pipeline.vae.decode(torch.zeros(1, 3, 4, 4))
    assert vars(pipeline.vae) == before
    pipeline.vae.decode = own = pipeline.vae.decode
    with recording_latents(pipeline):
        assert pipeline.vae.decode is not own
    assert pipeline.vae.decode is own


def test_a_pipeline_without_a_vae_gives_none():
    with recording_latents(object()) as latents:
        pass
    assert latents == []


def test_latents_are_read_only_with_their_images_key_and_whole(tmp_path):
    image = tmp_path / "00000.png"
    latent = torch.randn(4, 3, 2).transpose(0, 1)
    save_latent(latent, image, "key")
    assert torch.equal(read_latent(image, "key"), latent)
    assert read_latent(image, "another") is None
    assert read_latent(image, None) is None
    assert read_latent(tmp_path / "00001.png", "key") is None
    assert [has_latent(image, "key"), has_latent(image, "another")] == [True, False]
    assert not has_latent(tmp_path / "00001.png", "key")
    latent_path(image).write_bytes(latent_path(image).read_bytes()[:-4])
    assert read_latent(image, "key") is None
    assert not has_latent(image, "key")


def test_latents_that_have_not_changed_are_looked_at_once(tmp_path, monkeypatch):
    image = tmp_path / "00000.png"
    save_latent(torch.ones(2), image, "key")
    os.utime(latent_path(image), (1, 1))
    assert has_latent(image, "key")
    monkeypatch.setattr(final_latents, "sealed_about", lambda *given, **options: pytest.fail("read again"))
    assert has_latent(image, "key")


def test_an_image_without_its_latents_is_missing_only_where_they_are_wanted(tmp_path):
    pipeline, call = tiny_pixart(), CALL | PIXART_CALL
    plain, wanted = (image_requests(PROMPTS, 0, "s", latents) for latents in (False, True))
    assert [request.key for request in plain] == [request.key for request in wanted]
    generate(pipeline, plain, tmp_path, batch_size=3, call=call)
    assert missing(tmp_path, wanted) == []
    latent_path(tmp_path / "00001.png").unlink()
    assert missing(tmp_path, plain) == []
    assert [request.index for request in missing(tmp_path, wanted)] == [1]
    generate(pipeline, wanted, tmp_path, batch_size=3, call=call)
    assert read_latent(tmp_path / "00001.png", read_key(tmp_path / "00001.png")) is not None
