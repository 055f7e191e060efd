"""A metric is described once: help, tables, defaults and sets read the description."""

import os
import subprocess
import sys
import textwrap
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from dmquant.errors import UserError
from dmquant.evaluation.metrics.registry import (
    BUILT_IN,
    METRICS,
    all_names,
    default_names,
    defaults_for_help,
    get_kind,
    known_kinds,
    list_for_help,
)
from tests.evaluation.conftest import smooth_images, with_noise, write_images

TOY = '''
from dmquant.evaluation.metrics.kind import Kind

def brightness(scored):
    """Mean difference of the pairs in brightness, in 8-bit steps."""
    from dmquant.evaluation.metrics.pairs import mean_of_pairs

    return mean_of_pairs(scored, TOY, lambda a, b: (a.float() - b.float()).mean((1, 2, 3)).abs())

TOY = Kind(name="toy", function=brightness, title="Brightness", unit=" steps", digits=".3f", better="lower",
           needs=frozenset({"reference"}), per_image=True, default=True)
'''


@pytest.fixture
def toy_package(tmp_path):
    """Environment of a process in which a stranger's package with a metric is installed."""
    site = tmp_path / "site"
    (site / "toy-1.0.dist-info").mkdir(parents=True)
    (site / "toy_metric.py").write_text(TOY)
    (site / "toy-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n")
    (site / "toy-1.0.dist-info" / "entry_points.txt").write_text("[dmquant.metrics]\ntoy = toy_metric:TOY\n")
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (str(site), os.environ.get("PYTHONPATH"))))}


def python(code, env, *arguments):
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    result = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_a_metric_of_another_package_is_in_help_scores_tables_all_and_defaults(toy_package, tmp_path):
    a = smooth_images(3)
    fp, quantized = write_images(tmp_path / "fp", a), write_images(tmp_path / "quantized", with_noise(a, 9.0))
    python(
        """
        import sys
        from pathlib import Path
        from typer.testing import CliRunner
        from dmquant.pipelines.commands.app import app

        def dmquant(*arguments):
            return CliRunner().invoke(app, arguments, env={"COLUMNS": "300"}, catch_exceptions=False).output

        shown = dmquant("score", "--help")
        assert " toy" in shown and "Default: psnr, ssim, latent_mse, fid_fp, toy;" in shown, shown
        assert "torch" not in sys.modules

        fp, quantized, csv = map(Path, sys.argv[1:])
        shown = dmquant("score", str(fp), str(quantized), "--metrics", "psnr,toy", "--csv", str(csv))
        assert "Brightness ↓" in shown and " steps " in shown, shown
        assert csv.read_text().splitlines()[0] == "image,prompt,psnr,toy"

        from dmquant.evaluation.metrics.compute import score_pairs
        from dmquant.evaluation.report.markdown import render_markdown
        from dmquant.evaluation.result import RecipeResult, Reference, Report
        from dmquant.pipelines.runs.settings import resolve_metrics

        assert "toy" in resolve_metrics(None, None) and "toy" in resolve_metrics("all", None)
        metrics = score_pairs(fp, quantized, ["toy"])
        recipe = RecipeResult(weights="fp4", activations="fp6", bits_per_weight=4.0, size_bytes=1, metrics=metrics)
        report = Report(model="m", reference=Reference(dtype="fp32", size_bytes=4), recipes={"r": recipe}, prompts=[])
        assert f"| Brightness ↓ | {metrics['toy'].value:.3f} steps |" in render_markdown(fp, report)
        """,
        toy_package,
        fp,
        quantized,
        tmp_path / "scores.csv",
    )


def test_help_reads_the_descriptions_without_torch():
    python("import sys, dmquant.pipelines.commands.options; assert 'torch' not in sys.modules", dict(os.environ))


@pytest.mark.parametrize("value", ["absent:TOY", "os:sep", "dmquant.evaluation.metrics.psnr:PSNR"])
def test_a_strangers_metric_that_cannot_be_used_is_left_out_with_a_warning(value):
    entry = EntryPoint("toy", value, "dmquant.metrics")
    with pytest.warns(UserWarning, match="the metric 'toy' is left out"):
        assert known_kinds(BUILT_IN, [entry]) == {kind.name: kind for kind in BUILT_IN}


@pytest.mark.parametrize("given", [{"better": "up"}, {"needs": frozenset({"a network"})}, {"digits": "d"}])
def test_a_description_that_means_nothing_is_refused(given):
    with pytest.raises(ValueError, match="means nothing"):
        replace(METRICS["psnr"], **given)


def test_a_report_with_a_metric_that_is_not_installed_says_so():
    with pytest.raises(UserError, match="'toy' is not known here: install"):
        get_kind("toy")


def test_defaults_need_nothing_that_may_have_to_be_downloaded():
    always = ("psnr", "ssim", "latent_mse", "fid_fp")
    assert default_names(real=False, own_clip=False) == always
    assert set(default_names(real=True, own_clip=True)) == {*always, "fid_real", "clip_score"}
    assert defaults_for_help() == (
        "psnr, ssim, latent_mse, fid_fp; fid_real with --real; clip_score where the model comes with a CLIP model"
    )


def test_all_is_all_but_what_needs_real_images():
    assert set(METRICS) - set(all_names(real=False)) == {"fid_real", "kid_real", "cmmd_real"}
    assert all_names(real=True) == tuple(METRICS)
    assert list_for_help().endswith("hpsv2, hpsv21, and with --real fid_real, kid_real, cmmd_real")


def test_only_metrics_with_a_value_an_image_say_so_and_each_has_its_page_entry():
    page = (Path(__file__).parents[3] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    assert {kind.name for kind in METRICS.values() if not kind.per_image} == {
        *("fid_fp", "fid_real", "kid_fp", "kid_real", "cmmd_fp", "cmmd_real")
    }
    assert all(f"`{name}`" in page for name in METRICS)
