"""report.html: what is in the file, and what people can do with it, driven in headless Chromium."""

import dataclasses
import html.parser
import json

import numpy as np
import pytest
import torch
from PIL import Image

from dmquant.errors import UserError
from dmquant.evaluation.report import page
from dmquant.evaluation.report.page import pictures, render_html
from dmquant.evaluation.report.page.charts import Point, Series, log_chart
from dmquant.evaluation.report.page.pictures import WebP, embed
from dmquant.evaluation.result import LayerError, Metric, RecipeResult, Reference, Report, StepError
from tests.chromium import headless
from tests.evaluation.conftest import smooth_images, write_images

HOSTILE = "</script><script>alert('x')</script> & \"quotes\" <img src=x>"
PROMPTS = [HOSTILE, "${title} $count", "תפוח אדום", "blue bird", "red bird"]
DIFFERENCES = (2, 30, 0, 12, 7)  # of the first recipe; the second one's are these from behind
PSNR = (42.1, 18.6, 100.0, 26.5, 31.2)


def off_by(images, distances):
    return torch.stack([(image.int() - by).clamp(0, 255).byte() for image, by in zip(images, distances, strict=True)])


@pytest.fixture
def folder(tmp_path):
    images = (smooth_images(5, size=64) // 2) + 64
    write_images(tmp_path / "images" / "fp", images)
    write_images(tmp_path / "images" / "quantized", off_by(images, DIFFERENCES))
    write_images(tmp_path / "recipes" / "rtn w8a8" / "images", off_by(images, DIFFERENCES[::-1]))
    return tmp_path


@pytest.fixture
def report():
    metrics = {
        "psnr": Metric(27.5, 26.9, 28.1, images=5, median=27.75, worst=20.125, values=PSNR),
        "hpsv2": Metric.not_computed("no weights: pip install <something>"),
    }
    recipe = RecipeResult(
        weights="fp4_e2m1",
        activations="fp6_e2m3",
        bits_per_weight=4.31,
        size_bytes=4_000_000,
        metrics=metrics,
        recipe={"name": "w4a6", "rounding": {"method": "nearest"}},
        layers=[LayerError(f"blocks.{i}.<attn>", "Linear", "fp4_e2m1", 4.25, 1e-3, 10.0 ** (i - 9)) for i in range(8)],
        steps=[StepError(i, 900.0 - 100 * i, 0.001 * 2**i, 1.0) for i in range(6)],
    )
    return Report(
        model="emoji-pixart",
        reference=Reference(dtype="bf16", size_bytes=16_000_000),
        recipes={"w4a6": recipe},
        prompts=PROMPTS,
        command="dmquant run emoji-pixart --w fp4 --a fp6",
    )


@pytest.fixture
def two_recipes(report):
    second = dataclasses.replace(report.recipes["w4a6"], images="recipes/rtn w8a8/images", weights="int8")
    return dataclasses.replace(report, recipes={**report.recipes, "rtn w8a8": second})


class Tags(html.parser.HTMLParser):
    """The tags and the text of a page."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.text = [], []
        self.feed(source)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def test_every_image_is_in_the_page_as_the_file_is_and_links_to_it(folder, two_recipes):
    tags = Tags(render_html(folder, two_recipes))
    sources = [image["src"] for image in tags.all("img")]
    links = [link["href"] for link in tags.all("a") if link.get("class") == "layer"]
    assert len(sources) == len(links) == 5 * 3
    assert links[:3] == ["images/fp/00000.png", "images/quantized/00000.png", "recipes/rtn%20w8a8/images/00000.png"]
    assert sources[1] == pictures.data_uri((folder / links[1]).read_bytes(), "png")


def test_what_comes_from_outside_is_escaped_and_shown(folder, report):
    tags = Tags(render_html(folder, report))
    assert len(tags.all("script")) == 3
    assert set(PROMPTS) <= set(tags.text)
    assert "not computed: no weights: pip install <something>" in tags.text


def test_the_page_loads_nothing(folder, two_recipes):
    tags = Tags(render_html(folder, two_recipes))
    assert all(source.startswith("data:") for _, attributes in tags.tags if (source := attributes.get("src")))
    assert [link["href"] for link in tags.all("link")] == ["data:,"]
    (policy,) = (meta["content"] for meta in tags.all("meta") if "http-equiv" in meta)
    assert policy.startswith("default-src 'none'; img-src data:;")


def test_everything_that_repeats_it_is_in_the_page(folder, report):
    text = "".join(Tags(render_html(folder, report)).text)
    assert "dmquant run emoji-pixart --w fp4 --a fp6" in text
    assert "name: w4a6\nrounding:\n  method: nearest" in text


def test_what_is_said_of_a_metric_stands_once_if_all_recipes_share_it_and_else_with_its_number(folder, two_recipes):
    notes = {"w4a6": "2 black images", "rtn w8a8": None}
    recipes = {
        name: dataclasses.replace(recipe, metrics={"ssim": Metric(0.9, images=5, note=notes[name])})
        for name, recipe in two_recipes.recipes.items()
    }
    source = render_html(folder, dataclasses.replace(two_recipes, recipes=recipes))
    assert "<th scope=row>SSIM (torchmetrics) ↑<small>5 images</small></th>" in source
    first = '<td data-of="w4a6">0.9000<small>2 black images</small></td>'
    assert f'{first}<td data-of="rtn w8a8">0.9000</td>' in source


def test_a_page_without_measured_errors_has_no_charts(folder, report):
    bare = dataclasses.replace(report.recipes["w4a6"], layers=[], steps=[])
    tags = Tags(render_html(folder, dataclasses.replace(report, recipes={"w4a6": bare})))
    assert not tags.all("svg")
    assert [link["href"] for link in tags.all("a") if link["href"][0] == "#"] == [
        *("#metrics", "#pairs", "#size", "#repeat")
    ]


def test_the_pairs_of_a_very_long_run_are_those_that_differ_most(folder, report, monkeypatch):
    monkeypatch.setattr(page.gallery, "MOST_PAIRS", 2)
    tags = Tags(render_html(folder, report))
    assert [figure["data-number"] for figure in tags.all("figure") if "data-number" in figure] == ["1", "3"]
    assert any("The 2 of 5 pairs with the largest difference" in text for text in tags.text)


@pytest.fixture
def large(tmp_path):
    """Twelve files of 128x128 noise, which no PNG makes small."""
    rng = np.random.default_rng(0)
    paths = [tmp_path / f"{index}.png" for index in range(12)]
    for path in paths:
        Image.fromarray(rng.integers(0, 255, (128, 128, 3), dtype=np.uint8)).save(path)
    return paths


@pytest.mark.parametrize("share", [0.9, 0.4, 0.15])
def test_images_that_are_too_large_together_are_all_re_encoded_alike_within_the_budget(large, share):
    budget = int(share * sum(path.stat().st_size for path in large))
    uris, encoding = embed(large, budget)
    assert encoding in [WebP(side, quality) for side in pictures.SIDES for quality in pictures.QUALITIES]
    assert 0.3 * budget < sum(map(len, uris)) <= budget
    assert all(uri.startswith("data:image/webp;base64,") for uri in uris)


def test_more_images_than_any_page_holds_are_an_error(large):
    with pytest.raises(UserError, match="2 images are too many"):
        embed(large[:2], 1_000)


def test_a_chart_leaves_out_what_a_logarithm_cannot_show():
    points = [Point(1, 0.0, "none"), Point(2, 1e-3, "some"), Point(3, float("inf"), "overflow"), Point(4, 1e-1, "much")]
    circles = Tags(log_chart("about", "x", [Series("s", points)])).all("circle")
    assert [circle["cx"] for circle in circles] == ["0.00%", "100.00%"]
    assert float(circles[0]["cy"][:-1]) > 90 > 10 > float(circles[1]["cy"][:-1])
    assert log_chart("about", "x", [Series("s", points[:1])]) == ""


def test_a_value_too_large_for_an_axis_is_left_out_of_it():
    points = [Point(x, y, "p") for x, y in enumerate((1.0, 2.0, 1e308, 1e-320))]
    assert len(Tags(log_chart("about", "x", [Series("s", points)])).all("circle")) == 2


# ---- in the browser


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    """A headless Chromium that may not fetch anything by itself; its log tells what a page asked for."""
    with headless(tmp_path_factory.mktemp("chromium"), logs=("browser", "performance")) as running:
        yield running


class Browser:
    """A page in Chromium, and what a person would do with it."""

    def __init__(self, driver, path, width=1200, height=900):
        self.driver = driver
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        driver.get_log("browser")
        driver.get_log("performance")
        driver.get(path.as_uri())

    def script(self, code, *arguments):
        return self.driver.execute_script(code, *arguments)

    def eventually(self, code, value):
        """Whether the page comes to this value: some events are told after the script that caused them."""
        from selenium.webdriver.support.wait import WebDriverWait

        return WebDriverWait(self.driver, 5).until(lambda driver: driver.execute_script(code) == value)

    def press(self, *keys):
        from selenium.webdriver import ActionChains
        from selenium.webdriver.common.keys import Keys

        for key in keys:
            ActionChains(self.driver).send_keys(getattr(Keys, key, key)).perform()

    def drag(self, selector, start, end):
        """Drag from one to another share of the width, in the middle of the height."""
        self.move("pointerdown", selector, start, end)

    def move(self, kind, selector, start, end):
        from selenium.webdriver import ActionChains

        element = self.driver.find_element("css selector", selector)
        half = element.size["width"] / 2
        chain = ActionChains(self.driver).move_to_element_with_offset(element, round((2 * start - 1) * half), 0)
        chain = chain.click_and_hold().move_by_offset(round((end - start) * 2 * half), 0) if start != end else chain
        (chain.release() if start != end else chain.click()).perform()

    def click(self, selector):
        self.move("click", selector, 0.25, 0.25)

    def choose(self, selector, value):
        from selenium.webdriver.support.select import Select

        Select(self.driver.find_element("css selector", selector)).select_by_visible_text(value)

    @property
    def order(self):
        """The numbers of the pairs that are shown, as they stand."""
        return self.script(
            "return [...document.querySelectorAll('.pair:not([hidden])')].map(pair => Number(pair.dataset.number))"
        )

    def split(self, selector):
        """The share of full precision shown, as the clipping of the quantized image has it."""
        clip = self.script(
            "return getComputedStyle(document.querySelector(arguments[0])).clipPath", f"{selector} .over"
        )
        return float(clip.removeprefix("inset(").removesuffix(")").split()[-1].removesuffix("%"))

    @property
    def requests(self):
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        return {
            message["params"]["request"]["url"].split(":")[0]
            for message in messages
            if message["method"] == "Network.requestWillBeSent"
        }


@pytest.fixture
def opened(chromium, folder, two_recipes):
    """A function that opens the page of two recipes in a window of a width."""

    def open_page(width=1200):
        path = folder / "report.html"
        path.write_text(render_html(folder, two_recipes), encoding="utf-8")
        return Browser(chromium, path, width)

    return open_page


FIRST = ".pair:not([hidden]) .frame"


def test_dragging_and_arrow_keys_move_the_split(opened):
    browser = opened()
    assert browser.split(FIRST) == 50
    browser.drag(FIRST, 0.5, 0.8)
    assert browser.split(FIRST) == pytest.approx(80, abs=2)
    before = browser.split(FIRST)
    browser.press("ARROW_LEFT", "ARROW_LEFT")
    assert browser.split(FIRST) == pytest.approx(before - 4, abs=2)
    assert not browser.script("return document.getElementById('zoom').open")


def test_a_finger_moves_the_split_too_and_its_touch_enlarges(opened, chromium):
    browser = opened(390)
    browser.script("document.querySelector('.pair').scrollIntoView({block: 'center'})")
    where = (
        "const box = document.querySelector('.pair .frame').getBoundingClientRect(); return [box.x, box.y, box.width]"
    )
    left, top, side = browser.script(where)

    def touch(*shares):
        kinds = ["touchStart", *["touchMove"] * (len(shares) - 1)]
        for kind, share in zip(kinds, shares, strict=True):
            points = [{"x": left + share * side, "y": top + side / 2}]
            chromium.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
        chromium.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})

    touch(0.5, 0.4, 0.3, 0.25)
    assert browser.split(FIRST) == pytest.approx(25, abs=2)
    assert not browser.script("return document.getElementById('zoom').open")
    touch(0.7)
    assert browser.eventually("return document.getElementById('zoom').open", True)


def test_the_worst_come_first_and_other_orders_can_be_chosen(opened):
    browser = opened()
    assert browser.order == [1, 3, 4, 0, 2]
    browser.choose("#sort", "Number")
    assert browser.order == [0, 1, 2, 3, 4]
    browser.choose("#sort", "PSNR, worst first")
    assert browser.order == [1, 3, 4, 0, 2]
    assert "PSNR 18.60 dB" in browser.script("return document.querySelector('.pair .value').textContent")


def test_choosing_a_recipe_shows_its_images_order_and_layers(opened):
    browser = opened()
    browser.choose("#pairs select.recipe", "rtn w8a8")
    assert browser.order == [3, 1, 0, 4, 2]
    shown = "return document.querySelector('.pair .over').dataset.name"
    assert browser.script(shown) == "rtn w8a8"
    parts = (
        "return [...document.querySelectorAll('.of-recipe')].filter(part => part.offsetParent).map(p => p.dataset.name)"
    )
    assert browser.script(parts) == ["rtn w8a8"]


def test_prompts_are_found_as_they_are_typed(opened):
    browser = opened()
    browser.click("#find")
    browser.press("BIRD")
    assert browser.order == [3, 4]
    assert browser.script("return document.getElementById('count').textContent") == "2 of 5 pairs"


def test_only_the_first_pairs_are_shown_until_all_are_asked_for(chromium, folder, report):
    many = smooth_images(30)
    for kind in ("fp", "quantized"):
        write_images(folder / "images" / kind, many)
    recipe = dataclasses.replace(report.recipes["w4a6"], metrics={})
    report = dataclasses.replace(report, recipes={"w4a6": recipe}, prompts=[str(i) for i in range(30)])
    path = folder / "report.html"
    path.write_text(render_html(folder, report), encoding="utf-8")
    browser = Browser(chromium, path)
    assert len(browser.order) == 20
    browser.script("document.getElementById('more').scrollIntoView({block: 'center'})")
    browser.click("#more")
    assert len(browser.order) == 30


def test_enter_enlarges_arrows_move_on_and_escape_closes(opened):
    browser = opened()
    prompt = "return document.querySelector('#zoom .prompt').textContent"
    is_open = "return document.getElementById('zoom').open"
    browser.script("document.querySelector('.pair input').focus()")
    browser.press("ENTER")
    assert browser.script(is_open)
    assert browser.script(prompt) == PROMPTS[1]
    browser.press("ARROW_RIGHT")
    assert browser.script(prompt) == PROMPTS[3]
    browser.press("ARROW_LEFT", "ARROW_LEFT")
    assert browser.script(prompt) == PROMPTS[1]
    browser.press("ARROW_RIGHT", "ARROW_RIGHT", "ESCAPE")
    assert not browser.script(is_open)
    focused = "return document.activeElement.closest('.pair').dataset.number"
    assert browser.eventually(focused, "4")


def test_the_large_view_zooms_and_slides(opened):
    browser = opened()
    browser.click(FIRST)
    assert browser.script("return document.getElementById('zoom').open")
    shown = "return document.querySelector('#zoom img').getBoundingClientRect().width"
    fitted = browser.script(shown)
    assert 400 < fitted < 1200
    browser.press("+")
    assert browser.script(shown) == pytest.approx(1.5 * fitted, rel=0.01)
    pixels = "return getComputedStyle(document.querySelector('#zoom img')).imageRendering"
    assert browser.script(pixels) == "pixelated"
    browser.press("-", "-")
    assert browser.script(shown) == pytest.approx(fitted, rel=0.01)
    before = browser.split("#zoom .frame")
    browser.press("ARROW_UP")
    assert browser.split("#zoom .frame") > before
    browser.drag("#zoom .frame", 0.5, 0.2)
    assert browser.split("#zoom .frame") == pytest.approx(20, abs=2)
    browser.press(" ")
    assert browser.split("#zoom .frame") == 100
    browser.press("ESCAPE")


def test_a_chart_tells_its_points_by_keyboard(opened):
    browser = opened()
    browser.script("document.querySelector('#steps svg').focus()")
    browser.press("ARROW_RIGHT", "ARROW_RIGHT")
    told = browser.script("return document.querySelector('#steps .readout').textContent")
    assert told == "w4a6, step 1 (timestep 800): latent MSE 0.002, 0.20% of the latents' power"


@pytest.mark.parametrize("width", [390, 1440])
def test_the_page_fits_its_window_asks_for_nothing_and_reports_no_error(opened, width):
    browser = opened(width)
    assert browser.script("return document.documentElement.scrollWidth") <= width
    browser.click(FIRST)
    browser.press("ARROW_RIGHT", "+", "ESCAPE")
    assert browser.requests <= {"file", "data"}
    assert not browser.driver.get_log("browser")


def test_without_script_images_and_tables_are_there(chromium, opened):
    chromium.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        opened()
        images = chromium.find_elements("css selector", ".pair img")
        assert len(images) == 15
        assert all(image.size["width"] > 50 for image in images)
        assert not chromium.find_element("css selector", ".toolbar").is_displayed()
        assert chromium.find_element("css selector", "#metrics table").is_displayed()
    finally:
        chromium.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
