"""The design space of a sweep: which trials there are, counted by hand."""

import pytest

from dmquant.errors import UsageError
from dmquant.formats import get_format
from dmquant.pipelines.runs.settings import Options
from dmquant.pipelines.sweep.space import Choice, Trial, design_space, format_pairs, formats_of, kind_of, parse_bits

OPTIONS = Options(model="emoji-pixart", device="cpu", num_prompts=2)


def test_formats_are_every_split_and_int():
    assert formats_of([3]) == ["fp3_e1m1", "fp3_e2m0", "int3"]
    assert formats_of([4, 16]) == ["fp4_e1m2", "fp4_e2m1", "fp4_e3m0", "int4", "none"]
    every = formats_of(range(3, 9))
    assert len(every) == sum(range(3, 9))  # of N bits N - 1 splits, and INT
    assert all(get_format(name).name == name for name in every)


def test_formats_can_be_named():
    assert formats_of([3, 4], "int") == ["int3", "int4"]
    assert formats_of([4, 6, 16], "fp4, int6,int8") == ["fp4_e2m1", "int6", "none"]
    assert formats_of([4], "fp4,lut4") == ["fp4_e2m1", "lut4"]


def test_by_default_formats_of_one_kind_meet_and_activations_have_no_fewer_bits():
    pairs = format_pairs(Choice(bits="3-4"))
    floats = {"fp3_e1m1", "fp3_e2m0"}, {"fp4_e1m2", "fp4_e2m1", "fp4_e3m0"}
    expected = {(w, a) for w in floats[0] for a in floats[0] | floats[1]} | {
        (w, a) for w in floats[1] for a in floats[1]
    }
    expected |= {("int3", "int3"), ("int3", "int4"), ("int4", "int4")}
    assert set(pairs) == expected
    assert len(pairs) == len(expected)


def test_all_of_3_to_8_bits():
    floats = [bits - 1 for bits in range(3, 9)]
    same_kind = sum(w * sum(floats[index:]) for index, w in enumerate(floats)) + sum(range(1, 7))
    assert len(format_pairs(Choice())) == same_kind == 455
    assert len(format_pairs(Choice(everything=True))) == 33**2


def test_weights_and_activations_can_have_bits_of_their_own():
    pairs = format_pairs(Choice(bits="8", weight_bits="4", activation_bits="6,16", formats="fp4,fp6,int4,int6"))
    assert pairs == [("fp4_e2m1", "fp6_e2m3"), ("fp4_e2m1", "none"), ("int4", "int6"), ("int4", "none")]


@pytest.mark.parametrize(("text", "bits"), [("3-8", (3, 4, 5, 6, 7, 8)), ("4", (4,)), (" 8,3-4,4 ", (3, 4, 8))])
def test_bits_are_ranges_and_numbers(text, bits):
    assert parse_bits(text, "--bits") == bits


@pytest.mark.parametrize("text", ["", "1", "9", "4-9", "8-3", "4;5", "16", "four"])
def test_other_bits_are_refused(text):
    with pytest.raises(UsageError, match="--bits"):
        parse_bits(text, "--bits")


def test_a_trial_is_a_technique_in_two_formats():
    space = design_space(OPTIONS, Choice(bits="4,6", formats="fp4,fp6", techniques="rtn,default"))
    pairs = [("fp4_e2m1", "fp4_e2m1"), ("fp4_e2m1", "fp6_e2m3"), ("fp6_e2m3", "fp6_e2m3")]
    assert [trial.settings.formats for trial in space.trials] == [pair for pair in pairs for _ in range(2)]
    assert [trial.technique for trial in space.trials] == ["rtn", "default"] * 3
    assert [trial.settings.recipe.calibrated for trial in space.trials] == [False, True] * 3
    assert len({trial.name for trial in space.trials}) == 6
    assert len({trial.settings.model_key("weights") for trial in space.trials}) == 6
    assert space.left_out == {}


def test_what_a_recipe_does_not_allow_is_left_out_with_the_reason(monkeypatch):
    from dmquant.pipelines.sweep import space as module

    allowed = module.with_recipe

    def choosy(settings, source, w, a):
        if source == "default" and w == "int4":
            raise UsageError("not with integers")
        return allowed(settings, source, w, a)

    monkeypatch.setattr(module, "with_recipe", choosy)
    space = design_space(OPTIONS, Choice(bits="4", formats="fp4,int4", techniques="rtn,default"))
    assert [trial.name for trial in space.trials] == [
        "rtn-fp4_e2m1-fp4_e2m1",
        "default-fp4_e2m1-fp4_e2m1",
        "rtn-int4-int4",
    ]
    assert space.left_out == {"default-int4-int4": "not with integers"}
    with pytest.raises(UsageError, match="no trial is left: not with integers"):
        design_space(OPTIONS, Choice(bits="4", formats="int4", techniques="default"))


def test_the_kind_of_a_trial():
    def kind(choice):
        (trial,) = design_space(OPTIONS, choice).trials
        assert isinstance(trial, Trial)
        return trial.kind

    assert kind(Choice(bits="4", formats="fp4")) == "fp"
    assert kind(Choice(bits="4", activation_bits="16", formats="int4")) == "int"
    assert kind(Choice(weight_bits="4", activation_bits="8", formats="fp4,int8", everything=True)) == "mixed"
    assert (kind_of("fp4"), kind_of("int3"), kind_of("none"), kind_of("lut4")) == ("fp", "int", "none", "lut4")
