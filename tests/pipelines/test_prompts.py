from collections import Counter

import pytest

from dmquant.errors import UsageError, UserError
from dmquant.pipelines.prompts import load_prompts, prompt_sets
from dmquant.pipelines.registry import registered_models


@pytest.mark.parametrize("name", prompt_sets())
def test_a_packaged_set_has_64_prompts_or_more_and_none_twice(name):
    prompts = load_prompts(name)
    assert len(prompts) == prompt_sets()[name] >= 64
    assert len({prompt.lower() for prompt in prompts}) == len(prompts)
    assert all(prompt and prompt == prompt.strip() and not prompt.startswith("#") for prompt in prompts)


@pytest.mark.parametrize("name", ["emoji", "emoji-calibration"])
def test_emoji_prompts_have_the_form_of_the_captions_the_model_was_trained_on(name):
    for prompt in load_prompts(name):
        assert prompt == prompt.lower()
        assert prompt.count(",") >= 2


@pytest.mark.parametrize("number", [16, 64])
def test_the_emoji_prompts_of_a_default_run_are_captions_and_unseen_compositions(number):
    unseen = {"red cat", "blue apple", "penguin with sunglasses", "blue rose", "green car", "smiling lemon"}
    everything = [prompt.partition(",")[0] for prompt in load_prompts("emoji")]
    assert unseen <= set(everything)
    compositions = {everything[i] for i in range(len(everything)) if i % 9 in (3, 7)}
    assert unseen <= compositions
    drawn = {prompt.partition(",")[0] for prompt in load_prompts("emoji", number)}
    assert drawn & compositions
    assert drawn - compositions


@pytest.mark.parametrize("spec", registered_models().values(), ids=lambda spec: spec.name)
def test_a_model_is_calibrated_with_prompts_that_it_is_not_scored_on(spec):
    scored, calibration = load_prompts(spec.prompts), load_prompts(spec.calibration_prompts)
    assert len(calibration) >= 128
    assert not {prompt.lower() for prompt in scored} & {prompt.lower() for prompt in calibration}


@pytest.mark.parametrize("number", [32, 64, 128, 256])
def test_any_first_emoji_prompts_for_calibration_are_spread_over_the_categories(number):
    categories = Counter(prompt.rsplit(", ", 2)[1] for prompt in load_prompts("emoji-calibration", number))
    assert len(categories) == 7
    assert max(categories.values()) < number / 3


def test_a_number_takes_the_first_prompts():
    assert load_prompts("default", 5) == load_prompts("default")[:5]


def test_a_file_is_read_in_order_without_comments_and_blank_lines(tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text("\ufeff# my prompts\n\n  a red cat \r\nünïcode & more\n", encoding="utf-8")
    assert load_prompts(str(file)) == ["a red cat", "ünïcode & more"]


@pytest.mark.parametrize("content", ["", "\n\n", "# nothing\n"])
def test_a_file_without_prompts(tmp_path, content):
    file = tmp_path / "empty.txt"
    file.write_text(content)
    with pytest.raises(UserError, match=r"empty\.txt holds no prompts") as caught:
        load_prompts(str(file))
    assert caught.value.exit_code == 1


def test_a_file_that_is_not_text(tmp_path):
    file = tmp_path / "image.png"
    file.write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(UserError, match="UTF-8"):
        load_prompts(str(file))


def test_an_unknown_set_gets_the_nearest_name():
    with pytest.raises(UsageError, match=r"unknown prompt set 'emojis'.*did you mean 'emoji'"):
        load_prompts("emojis")


@pytest.mark.parametrize("number", [0, -1, 1000])
def test_a_number_that_the_set_does_not_have(number):
    with pytest.raises(UsageError, match=f"{number} prompts asked for, but 'default' has 64"):
        load_prompts("default", number)
