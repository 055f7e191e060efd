"""compare.png: what is drawn, and labels that never touch."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dmquant.evaluation.pareto_front import pareto_front
from dmquant.evaluation.report.comparison_plot import STEP, _looks, _side_by_side, _spread, draw_comparison
from dmquant.evaluation.result import Metric, RecipeResult, Reference, Report


def report(*metrics, times=()):
    times = itertools.chain(times, itertools.repeat(None))
    recipes = {
        f"recipe {index}": RecipeResult(
            weights="fp4_e2m1",
            activations="none",
            bits_per_weight=4.25,
            size_bytes=4,
            metrics=given,
            relative_time=time,
        )
        for index, (given, time) in enumerate(zip(metrics, times, strict=False))
    }
    return Report(model="m", reference=Reference(dtype="bf16", size_bytes=16), recipes=recipes, prompts=[])


PSNR, LATENT = Metric(30.0, 29.0, 31.0, images=8), Metric(0.01, 0.005, 0.02, images=8)


def width(path):
    with Image.open(path) as picture:
        return picture.width


def test_a_second_panel_where_there_are_latents_to_compare(tmp_path):
    one, two = tmp_path / "one.png", tmp_path / "two.png"
    assert draw_comparison(report({"psnr": PSNR}, {"psnr": Metric(28.0, images=1), "latent_mse": LATENT}), one)
    assert draw_comparison(report(*[{"psnr": PSNR, "latent_mse": LATENT}] * 3), two)
    assert width(two) > 1.5 * width(one)


def test_a_panel_of_time_where_any_recipe_was_timed_beside_full_precision(tmp_path):
    untimed, timed = tmp_path / "untimed.png", tmp_path / "timed.png"
    metrics = [{"psnr": PSNR}, {"psnr": Metric(28.0, images=8)}]
    assert draw_comparison(report(*metrics), untimed)
    assert draw_comparison(report(*metrics, times=[None, 0.7]), timed)
    assert width(timed) > 1.5 * width(untimed)


@pytest.mark.parametrize("metrics", [{}, {"psnr": Metric.not_computed("no images")}])
def test_without_any_metric_there_is_no_picture_and_a_file_of_others_stays(tmp_path, metrics):
    path = tmp_path / "compare.png"
    path.write_bytes(b"mine")
    assert not draw_comparison(report(metrics), path)
    assert path.read_bytes() == b"mine"


def test_without_a_psnr_the_first_metric_that_there_is_is_drawn(tmp_path):
    measured = {"psnr": Metric.not_computed("no images"), "ssim": Metric(0.9, images=8), "latent_mse": LATENT}
    assert draw_comparison(report(measured), tmp_path / "first.png")
    assert draw_comparison(report(measured), tmp_path / "named.png", "ssim")
    assert (tmp_path / "first.png").read_bytes() == (tmp_path / "named.png").read_bytes()


@given(st.lists(st.floats(20, 40), min_size=1, max_size=20))
def test_labels_keep_their_order_stay_inside_and_never_touch(values):
    wanted = sorted(values, reverse=True)
    bottom, top, line = 18.0, 42.0, 1.1
    heights = _spread(wanted, line, bottom, top)
    tolerance = 1e-9
    assert all(above - below >= line - tolerance for above, below in itertools.pairwise(heights))
    assert heights[0] <= top - line / 2 + tolerance
    assert heights[-1] >= bottom + line / 2 - tolerance


def test_a_label_that_has_room_is_at_the_height_of_its_point():
    assert _spread([35.0, 30.0, 25.0], 1.0, 20.0, 40.0) == [35.0, 30.0, 25.0]


def test_no_two_recipes_look_alike():
    looks = list(_looks())
    assert len(set(looks)) == len(looks) == 64


def test_points_that_coincide_stand_side_by_side_around_their_place_and_others_stay():
    moved = _side_by_side([4.0, 8.0, 4.0, 4.0, 6.0])
    step = STEP * 4.0
    assert moved == pytest.approx([4.0 - step, 8.0, 4.0, 4.0 + step, 6.0])
    assert len(set(_side_by_side([4.25, 4.25]))) == 2
    assert _side_by_side([4.25]) == [4.25]


@given(st.lists(st.tuples(st.integers(2, 9), st.integers(20, 40)), min_size=1, max_size=20))
def test_the_front_is_what_nothing_of_fewer_bits_matches(points):
    costs, qualities = [list(column) for column in zip(*points, strict=True)]
    front = {points[index] for index in pareto_front(costs, qualities)}
    beaten = {
        (cost, quality)
        for cost, quality in points
        if any(c <= cost and q >= quality and (c, q) != (cost, quality) for c, q in points)
    }
    assert front == set(points) - beaten


@pytest.mark.parametrize("name", ["fid_fp", "latent_mse", "clip_score"])
def test_any_metric_can_be_drawn_and_less_can_be_better(tmp_path, name):
    values = [{name: Metric(value, images=8)} for value in (0.001, 5.0, 80.0)]
    assert draw_comparison(report(*values), tmp_path / "plot.png", name)
    assert width(tmp_path / "plot.png") > 500
