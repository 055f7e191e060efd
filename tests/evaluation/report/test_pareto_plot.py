"""sweep.png: what is drawn."""

import pytest
from matplotlib.collections import PathCollection
from PIL import Image

from dmquant.evaluation.report import pareto_plot
from dmquant.evaluation.report.pareto_plot import CROWD, Point, draw_pareto
from dmquant.evaluation.result import Metric

COSTS = {"bits": "bits a weight", "area": "area"}


def points(count, values=None, **costs):
    """Of two groups and both kinds; every third has no area."""
    made = []
    for index in range(count):
        own = costs or {"bits": 3.0 + index % 6, **({} if index % 3 == 2 else {"area": 10.0 * (index + 1)})}
        value = 20.0 + index if values is None else values[index]
        quality = Metric(value, value - 1, value + 1, images=8)
        made.append(Point(("rtn", "gptq")[index % 2], ("fp", "int", "mixed")[index % 3], "e2m1", own, quality))
    return made


def width(path):
    with Image.open(path) as picture:
        picture.load()
        return picture.width


@pytest.mark.parametrize("count", [1, 12, CROWD + 5])
@pytest.mark.parametrize("metric", ["psnr", "latent_mse"])
def test_a_panel_a_cost(tmp_path, count, metric):
    assert draw_pareto("m", points(count), COSTS, metric, tmp_path / "sweep.png")
    assert draw_pareto("m", points(count, bits=4.0), COSTS, metric, tmp_path / "one.png")  # nobody's area is known
    assert width(tmp_path / "sweep.png") > 1.4 * width(tmp_path / "one.png")


def test_without_a_value_there_is_no_picture_and_a_file_of_others_stays(tmp_path):
    path = tmp_path / "sweep.png"
    path.write_bytes(b"mine")
    lost = [Point("rtn", "fp", "e2m1", {"bits": 4.0}, Metric.not_computed("no weights"))]
    assert not draw_pareto("m", lost, COSTS, "psnr", path)
    assert path.read_bytes() == b"mine"


def test_every_point_of_a_panel_is_drawn_and_the_front_joins_the_best(tmp_path, monkeypatch):
    drawn = {}
    real = pareto_plot._panel

    def watching(axis, known, cost, *args, **kwargs):
        real(axis, known, cost, *args, **kwargs)
        (front,) = [line for line in axis.lines if line.get_drawstyle() == "steps-post"]
        marks = [mark.get_offsets()[0].tolist() for mark in axis.collections if isinstance(mark, PathCollection)]
        drawn[cost] = marks, list(zip(*front.get_data(), strict=True))

    monkeypatch.setattr(pareto_plot, "_panel", watching)
    given = points(6, values=[5.0, 0.5, 4.0, 3.0, 1.0, 2.0])
    assert draw_pareto("m", given, COSTS, "latent_mse", tmp_path / "sweep.png")
    marks, front = drawn["bits"]
    assert marks == [[3.0 + index, point.quality.value] for index, point in enumerate(given)]
    assert front == [(3.0, 5.0), (4.0, 0.5)]
    marks, _ = drawn["area"]
    assert {x for x, _ in marks} == {10.0, 20.0, 40.0, 50.0}
