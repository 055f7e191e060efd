import csv
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmquant.evaluation.scores_csv import columns, read_scores, write_scores
from dmquant.host.text import CONTROLS

NAMES, PROMPTS = ["00000.png", "00001.png"], ["a cat", "a dog"]
values = st.floats(allow_nan=False)
prompts = st.text() | st.text("'=+-@;\t\n\\u0019\x1b ", max_size=10)


@given(st.lists(st.tuples(prompts, values, values), min_size=1, max_size=5))
def test_what_is_written_reads_back_equal_whatever_the_prompts(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("scores") / "scores.csv"
    texts, psnr, ssim = map(list, zip(*rows, strict=True))
    names = [f"{index:05d}.png" for index in range(len(rows))]
    write_scores(path, names, texts, {"psnr": psnr, "ssim": ssim})
    scores = read_scores(path)
    assert (scores.names, scores.prompts) == (names, texts)
    assert scores.columns == {"psnr": psnr, "ssim": ssim}


def test_a_spreadsheet_finds_one_row_an_image(tmp_path):
    path = tmp_path / "new" / "scores.csv"
    write_scores(path, NAMES, ['a "cat", sitting\nor not', "ein Hünd"], {"psnr": [0.1, 1e-17]})
    with path.open(encoding="utf-8", newline="") as file:
        assert list(csv.DictReader(file)) == [
            {"image": "00000.png", "prompt": 'a "cat", sitting\nor not', "psnr": "0.1"},
            {"image": "00001.png", "prompt": "ein Hünd", "psnr": "1e-17"},
        ]


@pytest.mark.parametrize(
    "prompt",
    ['=HYPERLINK("x")', "+1", "-1+2", "@SUM(1)", "\t=1", "\r=1", " =1", "'=1", "＝1", "a;=1", "a\n=1", "\x1b[31m"],
)
def test_a_spreadsheet_computes_nothing_and_a_terminal_does_nothing(tmp_path, prompt):
    path = tmp_path / "scores.csv"
    write_scores(path, NAMES, [prompt, "a cat"], {"psnr": [-0.5, 1.0]})
    with path.open(encoding="utf-8", newline="") as file:
        _, first, _ = csv.reader(file)
    cells = [cell for line in first[1].split("\n") for cell in re.split(r"[;\t]", line)]
    assert not any(cell.strip(" ").startswith(tuple("=+-@＝")) for cell in cells)
    assert not re.search(f"[{CONTROLS}]", path.read_text(encoding="utf-8").replace("\r\n", ""))
    assert read_scores(path).prompts == [prompt, "a cat"]
    assert read_scores(path).columns["psnr"] == [-0.5, 1.0]


def test_scoring_again_replaces_columns_of_the_same_name_and_keeps_the_others(tmp_path):
    path = tmp_path / "scores.csv"
    write_scores(path, NAMES, PROMPTS, {"psnr": [1.0, 2.0], "ssim": [0.5, 0.25]})
    write_scores(path, NAMES, PROMPTS, {"psnr": [3.0, 4.0], "lpips": [0.125, 0.0]})
    assert columns(path, NAMES) == {"psnr": [3.0, 4.0], "ssim": [0.5, 0.25], "lpips": [0.125, 0.0]}


@pytest.mark.parametrize(
    ("names", "texts"), [(["00000.png", "00002.png"], PROMPTS), (NAMES, ["a cat", "a dodo"]), (NAMES[:1], PROMPTS[:1])]
)
def test_scores_of_other_images_are_dropped(tmp_path, names, texts):
    path = tmp_path / "scores.csv"
    write_scores(path, NAMES, PROMPTS, {"ssim": [0.5, 0.25]})
    write_scores(path, names, texts, {"psnr": [1.0] * len(names)})
    assert columns(path, names) == {"psnr": [1.0] * len(names)}


def test_scores_are_of_exactly_the_images_asked_for_or_none(tmp_path):
    path = tmp_path / "scores.csv"
    assert columns(path, NAMES) is None
    write_scores(path, NAMES, PROMPTS, {"psnr": [1.0, 2.0]})
    assert columns(path, NAMES[:1]) is None
    assert columns(path, NAMES[::-1]) is None


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"image,prompt,psnr\n00000.png,a cat,much\n",
        b"image,prompt,psnr\n00000.png,a cat\n",
        b"image,prompt,psnr\n00000.png,a cat,1.0,2.0\n",
        b'image,prompt,psnr\n00000.png,"a cat,1.0\n',
        b"name,prompt,psnr\n00000.png,a cat,1.0\n",
        b"image,prompt,psnr\n00000.png,\xff,1.0\n",
    ],
)
def test_a_damaged_file_counts_as_none_and_is_replaced(tmp_path, content):
    path = tmp_path / "scores.csv"
    path.write_bytes(content)
    assert read_scores(path) is None
    write_scores(path, NAMES, PROMPTS, {"psnr": [1.0, 2.0]})
    assert columns(path, NAMES) == {"psnr": [1.0, 2.0]}


def test_a_column_of_another_length_is_refused_and_leaves_the_file(tmp_path):
    path = tmp_path / "scores.csv"
    write_scores(path, NAMES, PROMPTS, {"psnr": [1.0, 2.0]})
    with pytest.raises(ValueError, match="zip"):
        write_scores(path, NAMES, PROMPTS, {"ssim": [1.0]})
    assert columns(path, NAMES) == {"psnr": [1.0, 2.0]}
    assert list(tmp_path.iterdir()) == [path]
