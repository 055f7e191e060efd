import ast
import dataclasses
import json
import re
import subprocess
import sys

import pytest
from markdown_it import MarkdownIt

from dmquant.errors import UserError
from dmquant.evaluation.report.files import read_report, write_report
from dmquant.evaluation.report.markdown import code, fenced
from dmquant.evaluation.report.wording import metric_title, metric_value
from dmquant.evaluation.result import Backbone, Metric, RecipeResult, Reference, Report
from dmquant.host.text import CONTROLS, visible
from tests.evaluation.conftest import smooth_images, write_images

HOSTILE = "<script>alert('x')</script> & \"quotes\" | pipe"


@pytest.fixture
def report():
    metrics = {
        "psnr": Metric(27.5, 26.9, 28.1, images=3, median=27.75, worst=20.125),
        "fid_fp": Metric(12.25, images=3, backbone=Backbone("Inception-v3", "ab" * 32), note="3 against 3 images"),
        "clip_score": Metric.not_computed("no CLIP weights: pip install <something>"),
    }
    return Report(
        model="emoji-pixart",
        reference=Reference(dtype="bf16", size_bytes=16_000_000, seconds={"generate": 61.0}),
        recipes={
            "w4a6": RecipeResult(
                weights="fp4_e2m1",
                activations="fp6_e2m3",
                bits_per_weight=4.31,
                size_bytes=4_000_000,
                seconds={"quantize": 1.5},
                peak_memory_bytes=1_500_000_000,
                metrics=metrics,
                settings={"rounding": "nearest", "quantized": "9 layers"},
            )
        },
        prompts=["red apple", HOSTILE, "${title} $count"],
        settings={"seed": 7, "steps": 20},
        versions={"torch": "2.13.0"},
        command="dmquant run emoji-pixart --w fp4",
    )


@pytest.fixture
def run_folder(tmp_path):
    for name in ("fp", "quantized"):
        write_images(tmp_path / "images" / name, smooth_images(3))
    return tmp_path


def test_report_json_comes_back_equal(run_folder, report):
    write_report(run_folder, report)
    assert read_report(run_folder) == report


def test_report_json_has_the_documented_shape(run_folder, report):
    write_report(run_folder, report)
    data = json.loads((run_folder / "report.json").read_text())
    assert data["version"] == 1
    assert {"version", "model", "reference", "recipes"} <= data.keys()
    recipe = data["recipes"]["w4a6"]
    assert recipe.keys() >= {
        *("weights", "activations", "bits_per_weight", "size_bytes", "seconds", "peak_memory_bytes", "metrics")
    }
    assert recipe["metrics"]["psnr"] == {
        "value": 27.5,
        "low": 26.9,
        "high": 28.1,
        "median": 27.75,
        "worst": 20.125,
        "images": 3,
        "backbone": None,
    }
    assert recipe["metrics"]["fid_fp"]["backbone"] == {"name": "Inception-v3", "sha256": "ab" * 32}
    assert recipe["metrics"]["clip_score"] == {"value": None, "reason": "no CLIP weights: pip install <something>"}


def test_a_reader_ignores_keys_that_a_later_release_added(run_folder, report):
    write_report(run_folder, report)
    path = run_folder / "report.json"
    data = json.loads(path.read_text())
    for level in (data, data["reference"], data["recipes"]["w4a6"], data["recipes"]["w4a6"]["metrics"]["psnr"]):
        level["new"] = 1
    path.write_text(json.dumps(data))
    assert read_report(run_folder) == report


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ('{"version": 1, "model"', "is damaged"),
        ('{"version": 1, "model": "x"}', "is damaged"),
        ("[]", "is damaged"),
        ('{"version": 2}', "is version 2"),
        (None, r"no report\.json"),
    ],
)
def test_a_report_that_cannot_be_read_is_a_user_error(tmp_path, contents, message):
    if contents is not None:
        (tmp_path / "report.json").write_text(contents)
    with pytest.raises(UserError, match=message):
        read_report(tmp_path)


def test_the_pages_state_value_interval_backbone_and_hash(run_folder, report):
    write_report(run_folder, report)
    for name in ("report.md", "report.html"):
        text = (run_folder / name).read_text(encoding="utf-8")
        for expected in (
            *("27.50 dB", "26.90 to 28.10", "median 27.75, worst 5 % 20.12", "12.25", "3 against 3 images"),
            *("Inception-v3, sha256 abababababab", "4.00×", "4.31", "dmquant run emoji-pixart --w fp4"),
        ):
            assert expected in text, f"{expected} in {name}"


def test_markdown_table_rows_keep_their_columns_whatever_a_cell_holds(run_folder, report):
    report = dataclasses.replace(report, settings={"prompts": HOSTILE, "lines": "a\nb"})
    write_report(run_folder, report)
    lines = (run_folder / "report.md").read_text(encoding="utf-8").splitlines()
    assert r"| prompts | &lt;script>alert('x')&lt;/script> & " + '"quotes"' + r" \| pipe |" in lines
    assert "| lines | a b |" in lines


HOSTILE_NAMES = (
    "![x](https://evil.example/x.png)",
    "<img src=x onerror=alert(1)>",
    "`code` **bold** _em_ ~~gone~~ $x$",
    "https://evil.example www.evil.example a@evil.example",
    "# heading",
    "- item",
    "1. item",
    "a\n\n# heading",
    "\x1b[31mred\x07",
    "\u202egnp.exe",
    "&lt;b&#62;",
    "=HYPERLINK(1)",
)


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_names_are_text_in_every_page(run_folder, report, name):
    report = dataclasses.replace(
        report, model=name, recipes={name: report.recipes["w4a6"]}, prompts=[name] * 3, settings={name: name}
    )
    write_report(run_folder, report)
    page = (run_folder / "report.md").read_text(encoding="utf-8")
    tokens = MarkdownIt().enable(["table", "strikethrough"]).parse(page)
    assert not re.search(r"https?://|www\.|\w@\w", page), "GitHub makes links of these"
    inside = [inline.type for token in tokens for inline in token.children or ()]
    assert not {"link_open", "image", "html_inline", "strong_open", "em_open", "s_open", "code_inline"} & set(inside)
    assert not {"html_block", "list_item_open", "blockquote_open"} & {token.type for token in tokens}
    shown = " ".join("".join(each.content for each in token.children) for token in tokens if token.children)
    assert visible(" ".join(name.split())) in shown
    for file in ("report.md", "report.html", "report.json"):
        assert not re.search(f"[{CONTROLS}]", (run_folder / file).read_text(encoding="utf-8"))
    assert read_report(run_folder) == report


@pytest.mark.parametrize("text", ["a ``` b", "```\n# heading\n```", "````"])
def test_nothing_in_a_block_of_code_ends_it(text):
    first, *lines, last = fenced(text).splitlines()
    assert first == last
    assert "\n".join(lines) == text
    assert first not in text


@pytest.mark.parametrize("text", ["a `b` c", "`", "``x", "plain"])
def test_inline_code_is_the_text(text):
    (token,) = (token for token in MarkdownIt().parse(code(text)) if token.children)
    assert [(inline.type, inline.content) for inline in token.children] == [("code_inline", text)]


def test_a_report_of_several_recipes_shows_each_beside_full_precision(run_folder, report):
    write_images(run_folder / "images" / "rtn w8a8", smooth_images(3))
    second = dataclasses.replace(report.recipes["w4a6"], images="images/rtn w8a8", metrics={})
    second = dataclasses.replace(second, settings={"rounding": "adaround"})
    write_report(run_folder, dataclasses.replace(report, recipes={**report.recipes, "w8a8": second}))
    lines = (run_folder / "report.md").read_text(encoding="utf-8").splitlines()
    assert "| w4a6 | 27.50 dB | 12.25 | not computed |" in lines
    assert {"| rounding | nearest | adaround |", "| quantized | 9 layers |  |"} <= set(lines)


def test_a_report_whose_images_are_incomplete_writes_nothing(run_folder, report):
    (run_folder / "images" / "quantized" / "00002.png").unlink()
    with pytest.raises(UserError, match="2 images for 3 prompts"):
        write_report(run_folder, report)
    assert not list(run_folder.glob("report.*"))


def test_a_clip_score_is_called_by_the_network_it_looks_through():
    metric = Metric(31.0, images=3, backbone=Backbone("emoji-clip", "ab" * 32))
    assert metric_title("clip_score", metric) == "CLIP score (emoji-clip) ↑"
    assert metric_title("clip_score") == "CLIP score ↑"


def test_a_metric_has_a_value_or_a_reason():
    with pytest.raises(ValueError, match="either"):
        Metric(None)
    with pytest.raises(ValueError, match="either"):
        Metric(1.0, reason="but why")


@pytest.mark.parametrize(("value", "text"), [(0.1, "0.100"), (0.00123456, "0.00123"), (2.5e-6, "2.50e-06")])
def test_a_latent_mse_shows_three_digits_however_small(value, text):
    assert metric_value("latent_mse", Metric(value)) == text


def test_evaluation_needs_no_quantization_code():
    code = (
        "import sys, dmquant; before = set(sys.modules)\n"
        "import dmquant.evaluation.metrics.compute, dmquant.evaluation.report.files\n"
        "import dmquant.evaluation.report.comparison_plot\n"
        "own = {name for name in set(sys.modules) - before if name.startswith('dmquant.')}\n"
        "print(sorted(name for name in own if not name.startswith('dmquant.evaluation')))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert all(
        name == "dmquant.errors" or name.startswith(("dmquant.host", "dmquant.diffusers"))
        for name in ast.literal_eval(result.stdout)
    )
