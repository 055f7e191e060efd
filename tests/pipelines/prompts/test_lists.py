import json
import math
import os
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmquant.errors import UsageError, UserError
from dmquant.pipelines.models.registry import registered_models
from dmquant.pipelines.prompts.lists import PromptSet, load_prompts, prompt_sets, read_prompts
from dmquant.pipelines.prompts.readers import STYLES

PAIR = ["a red cat", "ünïcode, & more"]


def written(path: Path, content: object) -> str:
    """Write a file, JSON unless it is text already, and return its name as one would type it."""
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return str(path)


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
@pytest.mark.parametrize("seed", [None, 0])
def test_a_number_that_the_set_does_not_have(number, seed):
    with pytest.raises(UsageError, match=f"{number} prompts asked for, but 'default' has 64"):
        load_prompts("default", number, seed)


# Subsets


@given(total=st.integers(1, 60), seed=st.integers(0, 2**32), data=st.data())
def test_a_seed_draws_distinct_prompts_in_order_and_a_greater_number_keeps_them(total, seed, data):
    whole = PromptSet("mine", tuple(map(str, range(total))), ("",) * total, total)
    few = data.draw(st.integers(1, total))
    many = data.draw(st.integers(few, total))
    drawn = [int(prompt) for prompt in whole.take(few, seed).prompts]
    assert len(drawn) == few
    assert drawn == sorted(set(drawn))
    assert drawn == [int(prompt) for prompt in whole.take(few, seed).prompts]
    assert set(drawn) <= {int(prompt) for prompt in whole.take(many, seed).prompts}


def test_a_draw_is_the_same_on_every_machine():
    # The first ten values of Python's generator with seed 0 are 0.844, 0.758, 0.421, 0.259, 0.511, 0.405, 0.784, 0.303,
    # 0.477 and 0.583: the prompts with the three smallest are drawn.
    whole = PromptSet("mine", tuple("abcdefghij"), ("",) * 10, 10)
    assert whole.take(3, seed=0).prompts == ("d", "f", "h")


def test_every_prompt_is_drawn_equally_often():
    whole = PromptSet("mine", tuple("abcdefgh"), ("",) * 8, 8)
    times = Counter(prompt for seed in range(2000) for prompt in whole.take(2, seed).prompts)
    assert len(times) == 8
    assert all(abs(count - 500) < 5 * math.sqrt(2000 * 0.25 * 0.75) for count in times.values())


def test_without_a_number_a_seed_changes_nothing():
    assert load_prompts("emoji", seed=3) == load_prompts("emoji")


def test_what_a_report_says_of_a_set(tmp_path):
    source = written(tmp_path / "mine.csv", "id,caption\n" + "".join(f"{i},cat {i}\n" for i in range(50)))
    whole = read_prompts(source)
    assert whole.describe() == "mine.csv, all 50"
    assert whole.take(5).describe() == "mine.csv, first 5 of 50"
    assert whole.take(5, seed=7).describe() == "mine.csv, 5 of 50, seed 7"
    assert read_prompts(f"{source}:caption").describe() == "mine.csv:caption, all 50"
    assert read_prompts("emoji").take(3).describe() == f"emoji, first 3 of {prompt_sets()['emoji']}"


# Files

TABLES = {
    "mine.csv": 'id,caption,seed\n1,a red cat,5\n2,"ünïcode, & more",6\n',
    "crlf.csv": '\ufeffid,Prompt\r\n\r\n1,  a red cat \r\n2,"ünïcode, & more"\r\n3,\r\n4,nan\r\n5\r\n',
    "mine.tsv": "id\tTEXT\n1\ta red cat\n2\tünïcode, & more\n",
    "strings.json": [" a red cat", "ünïcode, & more", "", "  ", None],
    "objects.json": [{"prompt": "a red cat"}, {"id": 3}, {"prompt": "ünïcode, & more", "id": 4}],
    "columns.json": {"id": [1, 2, 3], "prompt": ["a red cat", "ünïcode, & more", math.nan]},
    "pandas.json": {"id": {"0": 1, "1": 2}, "prompt": {"0": "a red cat", "1": "ünïcode, & more"}},
    "rows.json": {"x7": {"category": "a", "prompt": "a red cat"}, "b2": {"prompt": "ünïcode, & more"}},
    "strings.jsonl": '"a red cat"\n\n"ünïcode, & more"\n',
    "objects.JSONL": '{"caption": "a red cat", "n": 1}\r\n{"caption": "ünïcode, & more"}\r\n',
    "list.prompts": "a red cat\nünïcode, & more",
    "by-id.json": {"00001.png": "a red cat", "00000.png": "ünïcode, & more"},
    "by-id.yaml": "1: a red cat\n2: 'ünïcode, & more'\n",
    "list.yml": "- a red cat\n-\n- 'ünïcode, & more'\n",
    "objects.yaml": "- {caption: a red cat, 1: x}\n- {caption: 'ünïcode, & more'}\n",
    "excel.csv": "id;Prompt\n1;a red cat\n2;ünïcode, & more\n",
    "mac.txt": "a red cat\rünïcode, & more\r",
}


@pytest.mark.parametrize("name", TABLES)
def test_the_usual_column_of_a_file(tmp_path, name):
    assert load_prompts(written(tmp_path / name, TABLES[name])) == PAIR


@pytest.mark.parametrize(
    ("name", "content"),
    {
        "two.csv": 'caption,text,id\nx,a red cat,1\ny,"ünïcode, & more",2\n',
        "other.jsonl": '{"wording": "a red cat"}\n{"wording": "ünïcode, & more"}\n',
        "other.json": {"wording": ["a red cat", "ünïcode, & more"], "prompt": ["x", "y"]},
        "rows.json": {"prompt": {"wording": "a red cat"}, "b2": {"wording": "ünïcode, & more"}},
    }.items(),
)
def test_a_named_column(tmp_path, name, content):
    column = "text" if name == "two.csv" else "wording"
    assert load_prompts(f"{written(tmp_path / name, content)}:{column}") == PAIR


def test_a_file_name_with_a_colon_and_a_column_name_with_one(tmp_path):
    file = written(tmp_path / "a:b.csv", "c:d,e\na red cat,x\n")
    assert load_prompts(f"{file}:c:d") == ["a red cat"]
    assert load_prompts(f"{file}:e") == ["x"]


def test_prompts_may_repeat(tmp_path):
    file = written(tmp_path / "mine.csv", "prompt\na cat\na dog\na cat\n")
    assert load_prompts(file) == ["a cat", "a dog", "a cat"]


def test_line_separators_inside_a_prompt_do_not_cut_it(tmp_path):
    prompts = ["a cat\u2028on a mat", "a dog\x0bin a box"]
    assert load_prompts(written(tmp_path / "mine.txt", "\n".join(prompts))) == prompts
    lines = "\n".join(json.dumps(prompt, ensure_ascii=False) for prompt in prompts[:1])
    assert load_prompts(written(tmp_path / "mine.jsonl", lines)) == prompts[:1]


def test_quotation_marks_in_tsv_files_of_either_kind(tmp_path):
    quoted = written(tmp_path / "quoted.tsv", 'Prompt\tCategory\n"a ""red""\tcat"\tx\n')
    assert load_prompts(quoted) == ['a "red"\tcat']
    bare = written(tmp_path / "bare.tsv", 'Prompt\tCategory\n"Stop" on a sign\tx\na 6" pipe\ty\n')
    assert load_prompts(bare) == ['"Stop" on a sign', 'a 6" pipe']


@given(st.lists(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1), min_size=1, max_size=5))
def test_what_csv_and_json_writers_write_is_read_back(tmp_path_factory, prompts):
    import csv

    folder = tmp_path_factory.mktemp("prompts")
    expected = [prompt.strip() for prompt in prompts if prompt.strip() not in ("", "nan", "NaN")]
    if not expected or all(map(_is_number, expected)):
        return
    with (folder / "p.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["prompt", "id"], *([prompt, 1] for prompt in prompts)])
    assert load_prompts(str(folder / "p.csv")) == expected
    assert load_prompts(written(folder / "p.json", [{"prompt": prompt} for prompt in prompts])) == expected


def _is_number(text: str) -> bool:
    try:
        return bool(float(text)) or True
    except ValueError:
        return False


BAD = {
    "no usual column": ("m.csv", "id,wording\n1,x\n", "", r"m\.csv has no column called.* id, wording.*m\.csv:id"),
    "two usual columns": ("m.csv", "text,caption\n1,x\n", "", r"m\.csv has more than one.* text, caption.*m\.csv:text"),
    "unknown column": ("m.csv", "id,wording\n1,x\n", ":wordin", r"unknown column of .*m\.csv 'wordin'.*'wording'"),
    "unknown JSON column": ("m.json", {"prompt": ["x"]}, ":text", r"unknown column of .*m\.json 'text'.*it has prompt"),
    "a column of text": ("m.txt", "x\n", ":prompt", r"m\.txt has no columns.*leave ':prompt' away"),
    "a column of strings": ("m.json", ["x"], ":prompt", r"m\.json has no columns"),
    "a comma too many": ("m.csv", "prompt\na cat, sitting\n", "", r"m\.csv, line 2: 2 values for 1 columns.*quotes"),
    "an open quote": ("m.csv", 'prompt\n"a cat\nb\n', "", r"m\.csv, line 3: unexpected end"),
    "numbers in CSV": ("m.csv", "prompt\n1\n2.5\n", "", r"column 'prompt' of .*m\.csv holds numbers"),
    "numbers in JSON": ("m.json", [{"prompt": 1}], "", r"column 'prompt' of .*m\.json holds numbers"),
    "lists in JSON": ("m.json", [{"captions": ["a", "b"]}], "", r"column 'captions' of .*m\.json holds lists"),
    "half objects": ("m.json", ["x", {"prompt": "y"}], "", r"m\.json holds objects, not text"),
    "one prompt for a list": ("m.json", {"prompt": "x"}, "", r"'prompt' in .*m\.json holds text, not a list"),
    "no list": ("m.json", "3", "", r"m\.json holds neither a list nor an object"),
    "broken JSON": ("m.json", "[", "", r"m\.json cannot be read as JSON"),
    "a broken line": ("m.jsonl", '"x"\n{\n', "", r"m\.jsonl, line 2 cannot be read as JSON"),
    "instances of COCO": ("m.json", {"annotations": [{"image_id": 1, "id": 1}]}, "", r"m\.json.*captions_val2014"),
    "a style without a list": ("m.json", {"anime": {"a": "b"}}, "", r"m\.json holds objects where a list"),
    "empty CSV": ("m.csv", "", "", r"m\.csv holds no prompts"),
    "CSV with a header": ("m.csv", "prompt\n", "", r"m\.csv holds no prompts"),
    "CSV of empty cells": ("m.csv", "prompt,id\n,1\n ,2\nNaN,3\n", "", r"m\.csv holds no prompts"),
    "empty list": ("m.json", [], "", r"m\.json holds no prompts"),
    "empty object": ("m.json", {}, "", r"m\.json holds no prompts"),
    "empty JSON lines": ("m.jsonl", "\n", "", r"m\.jsonl holds no prompts"),
    "a key given twice": ("m.json", '{"1": "a", "1": "b"}', "", r"m\.json cannot be read as JSON: the key .1. is"),
    "a YAML key given twice": ("m.yaml", "1: a\n1: b\n", "", r"m\.yaml cannot be read as YAML: a key is given twice"),
    "YAML aliases": ("m.yaml", "- &a x\n- *a\n", "", r"m\.yaml cannot be read as YAML: line 2: aliases have no place"),
    "no YAML": ("m.yaml", "- [x\n", "", r"m\.yaml cannot be read as YAML: line 2"),
    "answers in YAML": ("m.yaml", "- yes\n", "", r"m\.yaml holds numbers, not text"),
    "deep JSON": ("m.json", "[" * 100_000, "", r"m\.json cannot be read as JSON"),
    "deep YAML": ("m.yaml", "[" * 5_000, "", r"m\.yaml cannot be read as YAML"),
    "endless digits": ("m.json", "[" + "9" * 10_000 + "]", "", r"m\.json cannot be read as JSON"),
    "half a character": ("m.json", '["\\ud800"]', "", r"m\.json, prompt 1: it holds half a character"),
    "a NUL": ("m.txt", "a\0b\n", "", r"m\.txt, prompt 1: it holds a NUL"),
    "a prompt of 10 MB": ("m.txt", "ok\n" + "x" * 10_000_000, "", r"m\.txt, line 2: more than 20,000 characters"),
    "a prompt of 10 MB in JSON": ("m.json", ["x" * 10_000_000], "", r"prompt 1: more than 20,000 characters"),
    "ten million prompts": ("m.txt", "a\n" * 10_000_000, "", r"m\.txt has more than 1,000,000 lines"),
    "ten million rows": ("m.csv", "prompt\n" + "a\n" * 10_000_000, "", r"m\.csv has more than 1,000,000 lines"),
    "no captions": ("m.json", {"annotations": []}, "", r"m\.json holds no prompts"),
}


WRONG_USE = {case for case in BAD if case.endswith((" column", " columns")) or case.startswith("a column")}


@pytest.mark.parametrize("case", BAD)
def test_a_file_that_is_no_prompt_set(tmp_path, case):
    name, content, column, message = BAD[case]
    with pytest.raises(UserError, match=message) as caught:
        load_prompts(written(tmp_path / name, content) + column)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == (2 if case in WRONG_USE else 1)


def test_a_line_with_a_hash_is_a_comment_which_is_counted_and_a_backslash_makes_it_a_prompt(tmp_path):
    found = read_prompts(written(tmp_path / "m.txt", "# cats\na cat; a hat\n\n# 1 fan\n\\# 1 fan\nnan\n"))
    assert found.prompts == ("a cat; a hat", "# 1 fan", "nan")
    assert found.describe() == "m.txt, all 3; 2 lines with # left out"
    assert load_prompts(written(tmp_path / "m.csv", "prompt\n# 1 fan\n\\# 2\n")) == ["# 1 fan", "\\# 2"]


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "zero.csv").symlink_to("/dev/zero")
    for source in ("/dev/zero", str(tmp_path / "pipe.txt"), str(tmp_path / "zero.csv")):
        with pytest.raises(UserError, match="is a device or a pipe, no file"):
            load_prompts(source)


def test_a_file_that_is_not_there():
    for source in ("missing.csv", "missing.csv:caption", "C:\\prompts\\missing.json"):
        with pytest.raises(UserError, match="there is no file"):
            load_prompts(source)


def test_a_prompt_instead_of_a_set():
    with pytest.raises(UsageError, match="unknown prompt set"):
        load_prompts("a very long prompt " * 300)


# Parquet


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    file, cells = tmp_path / "mine.parquet", ["a red cat", None, "ünïcode, & more", " "]
    parquet.write_table(pyarrow.table({"image": [b"\xff"] * 4, "caption": cells, "n": [1.0, 2.0, 3.0, 4.0]}), file)
    assert load_prompts(str(file)) == load_prompts(f"{file}:caption") == PAIR
    with pytest.raises(UserError, match=r"column 'n' of .*mine\.parquet holds numbers"):
        load_prompts(f"{file}:n")
    with pytest.raises(UserError, match=r"column 'image' of .*mine\.parquet holds bytes"):
        load_prompts(f"{file}:image")
    with pytest.raises(UsageError, match="it has image, caption, n"):
        load_prompts(f"{file}:text")
    file.write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"mine\.parquet cannot be read as Parquet"):
        load_prompts(str(file))


def test_parquet_without_its_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"mine\.parquet.*pip install pyarrow"):
        load_prompts(written(tmp_path / "mine.parquet", "PAR1"))


# COCO, HPSv2, VBench


def coco(*annotations: tuple[int, int, str]) -> dict:
    names = ("image_id", "id", "caption")
    return {"images": [{"id": 9}], "annotations": [dict(zip(names, each, strict=True)) for each in annotations]}


def test_coco_gives_one_caption_an_image_whatever_the_order_of_the_file(tmp_path):
    captions = [(9, 30, "c"), (9, 4, " a red cat\n"), (10, 2, "ünïcode, & more"), (10, 3, "d"), (9, 1, " ")]
    for order in (captions, captions[::-1]):
        assert load_prompts(written(tmp_path / "captions_val2014.json", coco(*order))) == PAIR


def test_coco_of_40_thousand_images_is_quick(tmp_path):
    captions = ((image, 5 * image + n, f"a photo of {image} from {n}") for image in range(40_000) for n in range(5))
    file = written(tmp_path / "captions_val2014.json", coco(*captions))
    began = time.perf_counter()
    found = read_prompts(file).take(1024, seed=0)
    assert time.perf_counter() - began < 10
    assert found.describe() == "captions_val2014.json, 1024 of 40000, seed 0"
    assert all(prompt.endswith("from 0") for prompt in found.prompts)


BENCHMARK = {"photo": ["p1", "p2"], "anime": ["a1"], "paintings": ["o1"], "concept-art": ["c1", "c2", "c3"]}


@pytest.mark.parametrize("form", ["folder", "object"])
def test_the_four_styles_of_hpsv2_in_alphabetical_order(tmp_path, form):
    if form == "folder":
        for style, prompts in BENCHMARK.items():
            written(tmp_path / f"{style}.json", prompts)
        written(tmp_path / "drawbench.json", ["x"])
        source = str(tmp_path)
    else:
        source = written(tmp_path / "benchmark.json", BENCHMARK)
    found = read_prompts(source)
    assert found.prompts == ("a1", "c1", "c2", "c3", "o1", "p1", "p2")
    assert found.styles == ("anime", *["concept-art"] * 3, "paintings", "photo", "photo")
    assert found.describe().endswith("all 7 (1 anime, 3 concept-art, 1 paintings, 2 photo)")
    some = found.take(4, seed=1)
    assert [style[0] for style in some.styles] == [prompt[0].replace("o", "p") for prompt in some.prompts]


def test_one_style_of_hpsv2_is_a_list_like_any_other(tmp_path):
    found = read_prompts(written(tmp_path / "anime.json", BENCHMARK["anime"]))
    assert (found.prompts, found.styles) == (("a1",), ("",))


def test_a_folder_that_is_not_hpsv2s(tmp_path):
    for style in STYLES[:2]:
        written(tmp_path / f"{style}.json", ["x"])
    with pytest.raises(UserError, match=r"not the folder of HPSv2.*in paintings\.json, photo\.json"):
        load_prompts(str(tmp_path))


def test_vbench_is_read_and_not_imported(tmp_path, monkeypatch):
    package = tmp_path / "vbench"
    package.mkdir()
    written(package / "__init__.py", "raise RuntimeError('imported')\n")
    written(package / "VBench_full_info.json", [{"prompt_en": prompt, "dimension": ["color"]} for prompt in PAIR])
    monkeypatch.syspath_prepend(tmp_path)
    assert read_prompts("vbench").describe() == "vbench, all 2"
    assert load_prompts("vbench", 1) == PAIR[:1]


def test_vbench_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "meta_path", [])
    with pytest.raises(UserError, match=r"vbench.*pip install --no-deps vbench==0\.1\.5") as caught:
        load_prompts("vbench")
    assert caught.value.exit_code == 1


class TestImagesBesidePrompts:
    TABLE = 'prompt,image,mask\n"a red cat, please",in/a.png,m.png\n\nnan,in/x.png,m.png\nblue boat,/b.png,m.png\n'

    def test_their_files_are_beside_the_list(self, tmp_path):
        found = read_prompts(written(tmp_path / "list.csv", self.TABLE))
        assert found.prompts == ("a red cat, please", "blue boat")
        assert found.pictures == {
            "image": (tmp_path / "in" / "a.png", Path("/b.png")),
            "mask": (tmp_path / "m.png",) * 2,
        }

    def test_a_tsv_has_them_too(self, tmp_path):
        found = read_prompts(written(tmp_path / "list.tsv", "control\tprompt\nedges.png\ta tree\n"))
        assert (found.prompts, found.pictures) == (("a tree",), {"control": (tmp_path / "edges.png",)})

    def test_a_part_of_the_prompts_has_its_own(self, tmp_path):
        rows = "".join(f"prompt {index},{index}.png\n" for index in range(20))
        found = read_prompts(written(tmp_path / "list.csv", "prompt,image\n" + rows)).take(5, seed=3)
        assert [path.stem for path in found.pictures["image"]] == [prompt.split()[1] for prompt in found.prompts]

    def test_a_column_that_is_named_stands_alone_and_other_lists_have_none(self, tmp_path):
        table = written(tmp_path / "list.csv", self.TABLE)
        assert read_prompts(f"{table}:prompt").pictures == {}
        assert read_prompts(written(tmp_path / "captions.csv", "image,caption\na.png,a tree\n")).pictures == {}
        assert read_prompts("emoji").pictures == {}

    def test_a_prompt_without_one_is_refused(self, tmp_path):
        table = written(tmp_path / "list.csv", "prompt,image\na tree,a.png\na boat,\n")
        with pytest.raises(UsageError, match=r"list.csv, line 3: nothing in column 'image': name a file there"):
            read_prompts(table)
