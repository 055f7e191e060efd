"""Images that are typed: which go with which prompt, which pipeline takes them, and what is refused in one line."""

import re
from dataclasses import replace

import pytest
import torch
from PIL import Image

from dmquant.errors import UsageError, UserError
from dmquant.pipelines.runs.settings import Options, resolve
from tests.tiny import tiny_sd
from tests.tiny.imaged import controlnet, masks, pictures

COUNT = 3


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of images, masks and a ControlNet."""
    root = tmp_path_factory.mktemp("inputs")
    for name, drawn in (("images", pictures(COUNT, 64)), ("masks", masks(COUNT, 64))):
        (root / name).mkdir()
        for index, image in enumerate(drawn):
            image.save(root / name / f"{index}.png")
    (root / "empty").mkdir()
    (root / "notes.png").write_text("no image")
    Image.new("RGB", (100, 40), "red").save(root / "wide.png")
    controlnet(tiny_sd().unet).save_pretrained(root / "net")
    return root


def options(model="emoji-sd", **given):
    return Options(model, **{"recipe": "rtn", "num_prompts": 5, "steps": 10, "device": "cpu"} | given)


def names(files):
    return [picture.path.name for picture in files]


def test_without_images_there_are_none():
    assert resolve(options()).inputs is None


def test_images_of_a_folder_go_with_the_prompts_in_order_and_over_again(folders):
    settings = resolve(options(image=folders / "images", strength=0.5))
    assert settings.inputs.pipeline == "StableDiffusionImg2ImgPipeline"
    assert names(settings.inputs.of_prompts["image"]) == ["0.png", "1.png", "2.png", "0.png", "1.png"]
    assert len(settings.inputs.of_calibration["image"]) == len(settings.calibration_prompts)
    assert settings.call == {"num_inference_steps": 10, "guidance_scale": settings.guidance, "strength": 0.5}
    assert settings.inputs.resized is None


@pytest.mark.parametrize(
    ("given", "pipeline"),
    [
        (("image",), "StableDiffusionImg2ImgPipeline"),
        (("image", "mask"), "StableDiffusionInpaintPipeline"),
        (("control",), "StableDiffusionControlNetPipeline"),
        (("image", "control"), "StableDiffusionControlNetImg2ImgPipeline"),
        (("image", "mask", "control"), "StableDiffusionControlNetInpaintPipeline"),
    ],
)
def test_what_is_given_says_which_pipeline_takes_it(folders, given, pipeline):
    files = {kind: folders / ("masks" if kind == "mask" else "images") for kind in given}
    net = {"controlnet": str(folders / "net")} if "control" in given else {}
    inputs = resolve(options(**files, **net)).inputs
    assert inputs.pipeline == pipeline
    assert set(inputs.kinds.values()) == set(given)
    assert (inputs.controlnet is not None) == bool(net)


def test_a_table_of_prompts_names_the_images_of_each_and_calibration_has_its_own(folders, tmp_path):
    rows = [f"prompt {index},{folders / 'images' / f'{index}.png'}" for index in (2, 0)]
    table, others = tmp_path / "list.csv", tmp_path / "calibration.csv"
    table.write_text("\n".join(["prompt,image", *rows]))
    others.write_text("\n".join(["prompt,image", *reversed(rows)]))
    settings = resolve(options(prompts=str(table), num_prompts=None, calibration_prompts=str(others)))
    assert settings.prompts == ("prompt 2", "prompt 0")
    assert names(settings.inputs.of_prompts["image"]) == ["2.png", "0.png"]
    assert names(settings.inputs.of_calibration["image"]) == ["0.png", "2.png"]


def test_other_sizes_are_cut_about_the_centre_and_said(folders):
    inputs = resolve(options(image=folders / "wide.png")).inputs
    opened = inputs.of_prompts["image"][0].opened()
    assert opened.size == (64, 64)
    assert inputs.resized == (
        "input images: 1 of 1 are cut about their centre and resized to 64x64 (wide.png of 100x40)"
    )


def test_results_depend_on_the_pixels_the_strength_and_the_controlnet(folders, tmp_path):
    def keys(**given):
        settings = resolve(options(recipe="adaround", **given))
        return settings.requests("w")[0].key, settings.model_key("w")

    image = {"image": folders / "images"}
    first = keys(**image)
    assert first == keys(**image)
    others = [keys(), keys(**image, strength=0.5), keys(image=folders / "images" / "1.png")]
    net = {"control": folders / "images"}
    others += [keys(**net, controlnet=str(folders / "net"))]
    other = controlnet(tiny_sd().unet, seed=1)
    torch.nn.init.normal_(next(other.parameters()))
    other.save_pretrained(tmp_path / "net")
    others += [keys(**net, controlnet=str(tmp_path / "net"))]
    for requests, models in (zip(*[first, *others], strict=True),):
        assert len(set(requests)) == len(set(models)) == 6


def test_the_names_of_files_alone_are_written_down(folders):
    about = resolve(options(image=folders / "images")).to_dict({}, {})["inputs"]
    assert about["image"] == ["0.png", "1.png", "2.png", "0.png", "1.png"]
    assert str(folders) not in str(about)


REFUSED = {
    "a mask without an image": ({"mask": "masks"}, "a mask without an image"),
    "a folder without images": ({"image": "empty"}, "--image: no image in"),
    "a file that is no image": ({"image": "notes.png"}, "notes.png is not a readable image"),
    "a file that is not there": ({"image": "nothing.png"}, "nothing.png does not exist"),
    "a mask of another size": ({"image": "images", "mask": "wide.png"}, "a mask has the size of its image"),
    "a strength alone": ({"strength": 0.5}, "--strength is for images: give --image"),
    "a strength that leaves no step": ({"image": "images", "strength": 0.05}, "of 10 steps leaves none to run"),
    "a strength above 1": ({"image": "images", "strength": 1.5}, "--strength 1.5 is no share"),
    "control images alone": ({"control": "images"}, "a control image without a ControlNet"),
    "a ControlNet alone": ({"controlnet": "net"}, "--controlnet is for images: give --control"),
    "a ControlNet without control": ({"image": "images", "controlnet": "net"}, "--controlnet without a control image"),
    "a strength of a ControlNet": ({"control": "images", "controlnet": "net", "strength": 0.5}, "takes none"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_go_together_is_refused_in_a_line(folders, name):
    given, message = REFUSED[name]
    paths = {kind: value if kind == "strength" else folders / value for kind, value in given.items()}
    if "controlnet" in paths:
        paths["controlnet"] = str(paths["controlnet"])
    with pytest.raises(UsageError, match=re.escape(message)) as refused:
        resolve(options(**paths))
    assert "\n" not in str(refused.value)
    assert refused.value.exit_code == 2


def test_a_model_that_takes_no_images_names_those_that_do(folders):
    with pytest.raises(UsageError, match=r"emoji-pixart does not take an image, as .* PixArt.*Pipeline; .*sd15.* do"):
        resolve(options("emoji-pixart", image=folders / "images"))


def test_a_folder_that_is_no_controlnet_and_one_of_another_model_are_refused(folders, tmp_path):
    given = options(control=folders / "images", controlnet=str(folders / "images"))
    with pytest.raises(UserError, match=r"is no ControlNet: it has no config.json"):
        resolve(given)
    tiny_sd().unet.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="is a UNet2DConditionModel, which a StableDiffusionControlNetPipeline"):
        resolve(replace(given, controlnet=str(tmp_path)))
