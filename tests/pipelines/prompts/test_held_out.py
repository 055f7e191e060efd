"""The prompts that figures of the embedded models are measured on: nothing has seen them."""

from collections import Counter

import pytest

from dmquant.pipelines.prompts.lists import load_prompts, prompt_sets
from tests.tools.conftest import CAPTIONS

NAME = "emoji-held-out"


@pytest.fixture(scope="module")
def captions():
    """What the embedded models learnt from."""
    return CAPTIONS.read_text("utf-8").splitlines()


def picture(caption):
    """The words of a caption that say what is in the picture, in any order and writing, without its category."""
    return frozenset(caption.lower().rsplit(", ", 2)[0].replace("-", " ").split())


def test_no_picture_of_the_held_out_prompts_is_in_training_calibration_or_another_set(captions):
    held_out = Counter(map(picture, load_prompts(NAME)))
    assert max(held_out.values()) == 1
    others = {name: load_prompts(name) for name in prompt_sets() if name != NAME}
    assert {"emoji", "emoji-calibration"} <= set(others)
    for name, prompts in {"training": captions, **others}.items():
        assert not held_out.keys() & set(map(picture, prompts)), name


def test_the_lists_that_the_held_out_prompts_are_checked_against_hold_what_they_should(captions):
    """Most prompts of the other two sets are training captions: so both are written as the check expects them."""
    trained = set(captions)
    for name in ("emoji", "emoji-calibration"):
        prompts = load_prompts(name)
        assert sum(prompt in trained for prompt in prompts) > 0.7 * len(prompts)


def test_the_held_out_prompts_have_words_and_categories_of_the_training_captions_alone(captions):
    words = {word for caption in captions for word in caption.rsplit(", ", 2)[0].split()}
    categories = {tuple(caption.rsplit(", ", 2)[1:]) for caption in captions}
    for prompt in load_prompts(NAME):
        name, *category = prompt.rsplit(", ", 2)
        assert set(name.split()) <= words, prompt
        assert tuple(category) in categories, prompt


@pytest.mark.parametrize("number", [16, 32, 64])
def test_any_first_held_out_prompts_are_spread_over_the_categories(number):
    categories = Counter(prompt.rsplit(", ", 2)[1] for prompt in load_prompts(NAME, number))
    assert len(categories) == 7
    assert max(categories.values()) < number / 3
