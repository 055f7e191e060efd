from collections.abc import Mapping
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from dmquant.diffusers.calling import call_pipeline
from dmquant.diffusers.families import families
from dmquant.pipelines.models.truncation import Cut, cut_line, cut_prompts
from tests.tiny import TINY, TOKENS, WORDS, Tiny, marked

LENGTHS = (1, TOKENS - 3, TOKENS - 2, TOKENS - 1, TOKENS, TOKENS + 4, 70, 75, 76, 90, 254, 255, 256, 300)
PROMPTS = [" ".join(WORDS[index % 14] for index in range(length)) for length in LENGTHS]


def what_the_pipeline_cuts(pipeline: Any, tiny: Tiny, call: Mapping[str, Any], monkeypatch) -> dict[int, set]:
    """What is seen of the tokenizers while images are made: by tokenizer, the prompts that lose tokens and the limit.

    The instructions that Sana puts before every prompt are left out of the limit.
    """
    seen: dict[int, set] = {}
    alone: dict[int, list[str]] = {}
    original = PreTrainedTokenizerFast.__call__

    def watched(self, text, *args, **kwargs):
        encoded = original(self, text, *args, **kwargs)
        if isinstance(text, str) and kwargs.get("truncation"):  # one at a time, the prompts before anything else
            alone.setdefault(id(self), []).append(text)
            text = alone[id(self)]
        if kwargs.get("truncation") and len(text) == len(PROMPTS) and any(text):
            settings = {"add_special_tokens": kwargs.get("add_special_tokens", True)}
            whole = original(self, text, padding="max_length", max_length=1000, **settings).attention_mask
            lost = [sum(mask) > kwargs["max_length"] for mask in whole]
            before = len(text[0].split()) - LENGTHS[0] if call.get("complex_human_instruction") else 0
            seen.setdefault(id(self), set()).add((kwargs["max_length"] - before, tuple(lost)))
        return encoded

    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", watched)
    arguments = {"height": tiny.size, "width": tiny.size, "num_inference_steps": 2, **call}
    call_pipeline(pipeline, PROMPTS, range(len(PROMPTS)), "latent", arguments)
    monkeypatch.undo()
    return seen


INSTRUCTIONS = {"complex_human_instruction": ["a red cat on the tree", "with a green apple "]}
OTHERS = ("dit", "pixart-alpha-1024", "hunyuanimage", "qwenimage")  # with tests of their own, or what others have
CALLS = {name: (tiny, tiny.call) for name, tiny in TINY.items() if name not in OTHERS}
CALLS["cogview4"] = TINY["cogview4"], {"max_sequence_length": TOKENS}
CALLS["sana with instructions"] = TINY["sana"], {**TINY["sana"].call, **INSTRUCTIONS}


@pytest.mark.parametrize("name", marked(CALLS))
def test_what_is_counted_is_what_the_pipeline_cuts(name, monkeypatch):
    tiny, call = CALLS[name]
    pipeline = tiny.build()
    expected = what_the_pipeline_cuts(pipeline, tiny, call, monkeypatch)
    found: dict[int, set] = {}
    for cut in cut_prompts(pipeline, PROMPTS, call):
        lost = tuple(index in cut.indices for index in range(len(PROMPTS)))
        reader = pipeline.components[cut.tokenizer]
        found.setdefault(id(getattr(reader, "tokenizer", reader)), set()).add((cut.limit, lost))
        assert any(lost)
        assert not all(lost)
    assert found == expected


def test_the_call_sets_the_length():
    pipeline = TINY["pixart-sigma"].build()
    assert [cut.limit for cut in cut_prompts(pipeline, PROMPTS, {"max_sequence_length": 5})] == [5]
    assert [cut.limit for cut in cut_prompts(pipeline, PROMPTS, {"clean_caption": False})] == [300]  # its default


def test_a_text_encoder_that_was_left_out_cuts_nothing():
    pipeline = TINY["sd3"].build()
    assert len(cut_prompts(pipeline, PROMPTS, {})) == 3
    pipeline.text_encoder_3 = None
    assert [cut.tokenizer for cut in cut_prompts(pipeline, PROMPTS, {})] == ["tokenizer", "tokenizer_2"]


def test_classes_are_never_too_long():
    pipeline = families()["dit"].prompted(TINY["dit"].build())
    assert cut_prompts(pipeline, ["1", "fish"], {}) == []


@pytest.mark.slow
def test_what_is_quoted_is_counted_by_letters_and_templates_are_not():
    pipeline = TINY["hunyuanimage"].build()
    written = len(pipeline.tokenizer(pipeline.prompt_template_encode.format("")).input_ids)
    room = 1000 + pipeline.prompt_template_encode_start_idx - written
    prompts = ["a " * room, "a " * (room + 1), "red 'cat'", f"'{'cat' * 50}'"]
    assert cut_prompts(pipeline, prompts, {}) == [Cut("tokenizer", 1000, (1,)), Cut("tokenizer_2", 128, (3,))]


@pytest.mark.slow
def test_embeddings_that_the_pipeline_cuts_after_its_template_are_counted():
    pipeline = TINY["qwenimage"].build()
    prompts = ["a " * count for count in (3, 9, 4)]
    before = pipeline.prompt_template_encode_start_idx
    limit = len(pipeline.tokenizer(pipeline.prompt_template_encode.format(prompts[2])).input_ids) - before
    assert cut_prompts(pipeline, prompts, {"max_sequence_length": limit}) == [Cut("tokenizer", limit, (1,))]
    kept = [pipeline.encode_prompt(prompt, max_sequence_length=limit)[0].shape[1] for prompt in prompts]
    assert kept == [limit - 1, limit, limit]


def test_case_does_not_count_where_the_pipeline_ignores_it():
    pipeline = TINY["pixart-sigma"].build()
    pipeline.tokenizer.backend_tokenizer.normalizer = None  # so that words in capitals are unknown, yet still words
    shouted = [PROMPTS[3].upper() + "   "]
    assert cut_prompts(pipeline, shouted, {"max_sequence_length": TOKENS})[0].indices == ()


def test_the_line_of_one_text_encoder():
    cuts = [Cut("tokenizer", 77, (4, 17, 31))]
    assert cut_line(cuts, 64) == "3 of 64 prompts are cut to the text encoder's 77 tokens: 00004, 00017, 00031"


def test_the_line_of_several_text_encoders():
    cuts = [Cut("tokenizer", 77, (4, 17)), Cut("tokenizer_2", 77, (4,)), Cut("tokenizer_3", 256, ())]
    assert cut_line(cuts, 64) == (
        "2 of 64 prompts are cut to the 77 tokens of text_encoder and text_encoder_2: 00004, 00017; "
        "nothing is cut for text_encoder_3"
    )
    both = [Cut("tokenizer", 77, (4, 17)), Cut("tokenizer_2", 256, (4,))]
    assert cut_line(both, 64) == (
        "2 of 64 prompts are cut to the 77 tokens of text_encoder: 00004, 00017; "
        "1 of 64 prompts are cut to the 256 tokens of text_encoder_2: 00004"
    )


def test_a_long_line_names_the_first_and_counts_all():
    line = cut_line([Cut("tokenizer", 77, tuple(range(100)))], 100)
    assert line.startswith("100 of 100")
    assert line.endswith("00007 and 92 more")


def test_no_line_where_nothing_is_cut():
    assert cut_line([], 5) is None
    assert cut_line([Cut("tokenizer", 77, ())], 5) is None
