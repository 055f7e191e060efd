"""sweep.md: tables that keep their columns."""

from dmquant.evaluation.result import Metric
from dmquant.pipelines.sweep.tables import HEADER, page


def row(name, metric, **given):
    return {
        "name": name,
        "technique": "rtn",
        "weights": "fp4_e2m1",
        "activations": "fp6_e2m3",
        "bits_per_quantized_weight": 4.0,
        "bit_operations": 1e9,
        "area": None,
        "pareto": ["bits"],
        "error": None,
        "metrics": {"psnr": metric.to_json()},
        "seconds": {"trial": 3.0},
        **given,
    }


def data(*rows, **images):
    return {
        "model": "m",
        "metrics": ["psnr"],
        "trials": list(rows),
        "left_out": {},
        "settings": {
            "images": {"count": 2, "height": 8, "width": 8, "seed": 0, **images},
            "device": "cpu",
            "dtype": "fp32",
        },
    }


def test_a_line_of_the_table_has_a_cell_a_column_whatever_a_technique_or_an_error_is_called():
    failed = row("b", Metric(20.0), error="no a | b here", metrics={}, seconds={})
    text = page(data(row("a", Metric(20.0), technique="my|own"), failed, num_inference_steps=4), "dmquant sweep")
    assert "images of 4 steps at 8x8" in text
    lines = [line.replace("\\|", "/") for line in text.splitlines() if line.startswith("|")]
    assert any("my/own" in line for line in lines)
    assert any("no a / b here" in line for line in lines)
    best, every = (len(HEADER) + extra for extra in (3, 2))  # a metric, what it took, and the fronts it is on
    assert {line.count("|") - 1 for line in lines} == {best, every}


def test_a_sweep_of_a_pipeline_without_an_argument_for_steps_has_a_page():
    assert "2 images at 8x8" in page(data(row("a", Metric(20.0))), "dmquant sweep")
