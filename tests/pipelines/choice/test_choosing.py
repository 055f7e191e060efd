"""What is chosen for a target, by costs that are made up."""

import pytest

from dmquant.calib.choice.options import options_of
from dmquant.errors import UsageError, UserError
from dmquant.host.console import Console
from dmquant.pipelines.choice.choosing import Chooser
from dmquant.pipelines.choice.keeping import keep_lists, proposed
from dmquant.pipelines.choice.pages import render
from dmquant.pipelines.choice.record import LayerCosts, Study, as_rows, decibels
from dmquant.pipelines.choice.targets import Target
from dmquant.recipe import Recipe

RECIPE = Recipe.load("default")
BITS = {
    "fp4_e2m1 group:16": 4.5,
    "nl3 group:32": 3.25,
    "nl3 group:16": 3.5,
    "fp4_e2m1 channel": 4.03,
    "nl4 group:64": 4.125,
    "nl4 group:16": 4.5,
    "fp5_e2m2 channel": 5.03,
    "fp5_e2m2 group:32": 5.25,
    "fp6_e2m3 group:32": 6.25,
    "fp8_e4m3 group:64": 8.125,
}
WEIGHTS = 1 << 16


def layer(cost, kept=None):
    names = ["fp4_e2m1 group:16"] if kept else list(BITS)
    return LayerCosts(
        kind="Linear",
        weights=WEIGHTS,
        kept=kept,
        bytes={name: int(BITS[name] * WEIGHTS / 8) for name in names},
        errors={name: 4.0 ** -BITS[name] for name in names},
        measured=cost,
        estimated=1.5 * cost,
        by_step=[cost / 2, cost],
    )


@pytest.fixture
def study():
    layers = {f"blocks.{number}.to_q": layer(10.0 ** (-number / 4)) for number in range(16)}
    layers |= {"proj_in": layer(2.0, kept="sees the latents"), "proj_out": layer(1e-9, kept="makes the noise")}
    return Study(
        model="made-up",
        recipe="default",
        key="0",
        base="fp4_e2m1 group:16",
        prompts=5,
        steps=2,
        power=1.0,
        layers=layers,
        formats={name: 4.0**-bits for name, bits in BITS.items()},
        inputs={"fp8": 0.5},
        correlation=0.97,
        seconds={"solving": 3.0},
    )


class Measured:
    """A quality that rises by 6 dB a bit, as if images were weights."""

    def __init__(self, study):
        self.study = study

    def of(self, options, target):
        layers = self.study.quantized
        if not options:
            return 60.0 if target.psnr is not None else 0.001
        bits = 8 * sum(layers[name].bytes[option] for name, option in options.items()) / (WEIGHTS * len(layers))
        return 6 * bits if target.psnr is not None else 1 / bits**2

    def is_enough(self, value, target):
        return value >= target.psnr if target.psnr is not None else value <= target.lpips


def choose(study, **target):
    given = dict.fromkeys(("bits", "size", "psnr", "lpips")) | target
    chooser = Chooser(RECIPE, study, Console(), other_bytes=1_000_000, quality=Measured(study))
    return chooser.choose(Target.of(**given))


@pytest.mark.parametrize("bits", [3.25, 4.0, 4.5, 5.0, 6.0])
def test_the_choice_fits_and_gains_on_one_format_for_all(study, bits):
    found = choose(study, bits=bits)
    assert bits - 0.3 < found.bits <= bits
    settings = found.recipe.settings_by_layer([*study.layers])
    assert all(settings[name] is not None for name in study.quantized)
    dear, cheap = found.choice.options["blocks.0.to_q"], found.choice.options["blocks.15.to_q"]
    assert BITS[dear] >= BITS[cheap]
    for name, option in found.choice.options.items():
        weights, granularity = option.split()
        assert (settings[name].weights, settings[name].granularity) == (weights, granularity)
        assert settings[name].store == ("e3m4" if weights.startswith("nl") else "e4m3")
    if bits == 4.5:
        assert found.uniform.name == "uniform-fp4_e2m1-group16"
        assert found.uniform.weights == RECIPE.weights
        beside = study.predicted("fp4_e2m1 group:16")
        assert decibels(found.choice.cost, 1.0) > decibels(beside, 1.0) + 1
    if bits == 4.0:  # one format for all may have up to one per cent more
        assert found.uniform.granularity == "channel"


def test_the_recipe_can_be_read_and_edited(study, tmp_path):
    found = choose(study, bits=4.5)
    found.recipe.save(tmp_path / "mine.yaml")
    again = Recipe.load(str(tmp_path / "mine.yaml"))
    assert again == found.recipe
    assert again.name == "default-4.5bits"
    reasons = [rule.reason for rule in again.rules]
    assert all("of the weights, which make" in reason for reason in reasons)


def test_a_size_counts_what_stays_in_high_precision(study):
    found = choose(study, size="1.5MB")
    assert found.choice.bytes <= 500_000
    with pytest.raises(UserError, match=r"--target-size 1\.10 MB cannot be reached: .* of 1\.43 MB, of which 1\.00 MB"):
        choose(study, size="1.1MB")


def test_targets_that_cannot_be_met_name_the_nearest_that_can(study):
    with pytest.raises(UserError, match=r"the smallest choice takes 3\.250 bits a weight"):
        choose(study, bits=2.0)
    with pytest.raises(UserError, match=r"reaches 48\.7\d? dB .* weights in full precision 60 dB: ask for less"):
        choose(study, psnr=55.0)


def test_the_smallest_choice_of_a_quality_is_found(study):
    found = choose(study, psnr=27.0)
    assert found.bits == pytest.approx(4.5, abs=0.06)
    assert 6 * found.bits >= 27.0
    found = choose(study, lpips=0.04)
    assert found.bits == pytest.approx(5.0, abs=0.06)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"bits": 0.5}, "is no number of bits"),
        ({"bits": 4.0, "psnr": 30.0}, "--target-bits and --min-psnr are targets of their own"),
        ({"psnr": -1.0}, "is no PSNR"),
        ({"lpips": 1.5}, "is no distance"),
        ({"size": "large"}, "--target-size 'large' is not a size"),
    ],
)
def test_targets_that_make_no_sense(given, said):
    with pytest.raises(UsageError, match=said):
        Target.of(**(dict.fromkeys(("bits", "size", "psnr", "lpips")) | given))
    assert Target.of(None, None, None, None) is None


def test_what_costs_most_for_its_size_is_proposed_and_set_beside_other_lists(study):
    study.layers |= {"small": layer(1.0).model_copy(update={"weights": 1000}), "cheap": layer(1e-12)}
    assert proposed(study) == ["small"]
    lists = {one.who: one for one in keep_lists(study, "qwenimage")}
    assert set(lists) == {"proposed here", "this recipe", "ComfyUI", "mflux", "LENS"}
    assert lists["this recipe"].layers == ("proj_in", "proj_out")
    assert lists["ComfyUI"].layers == ("proj_out",)
    assert 0 < lists["proposed here"].weights < 0.02
    assert lists["this recipe"].error > 0.2


def test_the_page_says_what_was_found_and_nothing_in_it_is_markup(study):
    study.model = "<b>made up</b>"
    html = render(study, keep_lists(study, "pixart"), b"\x89PNG")
    assert "<b>" not in html
    assert "0.970 (Spearman)" in html
    assert "proj_in" in html
    rows = as_rows(study)
    assert rows[0]["layer"] == "proj_in"
    assert sum(row["share"] for row in rows) == pytest.approx(1)


def test_costs_that_were_changed_or_are_of_another_version_are_refused(study, tmp_path):
    file = tmp_path / "costs.json"
    study.save(file)
    assert Study.load(file) == study
    text = file.read_text()
    file.write_text(text.replace('"measured": 2.0', '"measured": 1.0'))
    with pytest.raises(UserError, match="no costs of this version as they were written"):
        Study.load(file)
    file.write_text("{")
    with pytest.raises(UserError, match="cannot read the costs"):
        Study.load(file)


def test_options_of_the_default_recipe_are_those_here():
    assert {one.name for one in options_of(RECIPE)} == set(BITS)
