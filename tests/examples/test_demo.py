"""examples/demo.py: the two sides, what is said where it cannot start, and the page, driven in headless Chromium.

`DMQUANT_DEMO_PICTURE=docs/images/demo.png python -m pytest tests/examples -m slow` draws the picture of docs/demo.md.
"""

import os
import re
import socket
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy
import pytest
from PIL import Image

from dmquant import load_pipeline, quantize_
from dmquant.errors import UserError
from dmquant.layers import QuantLinear
from examples import demo
from tests.chromium import headless
from tests.tiny import TINY

SCRIPT = Path(demo.__file__)
LOADED = "return [...document.querySelectorAll('#pair img')].every(one => one.complete && one.naturalWidth)"


@pytest.fixture(scope="module")
def sides():
    return demo.Sides("emoji-pixart", None, "rtn", "cpu")


def test_sides_draw_the_same_picture_and_other_pixels(sides):
    full, quantized = (sides.draw(pipeline, "red apple", 0, 4) for pipeline in sides.pipelines)
    assert quantized.weights < full.weights / 3
    assert full.seconds > 0
    difference = numpy.asarray(full.image, float) - numpy.asarray(quantized.image, float)
    assert 0 < (difference**2).mean() < 255**2 / 10**1.5  # 15 dB


def test_sides_share_what_is_not_quantized(sides):
    full, quantized = sides.pipelines
    assert quantized.text_encoder is full.text_encoder
    assert quantized.transformer is not full.transformer


def test_a_call_that_fails_is_one_line(sides, monkeypatch):
    monkeypatch.setitem(sides.call, "height", 7)
    with pytest.raises(UserError, match="cannot be called"):
        sides.draw(sides.pipelines[0], "red apple", 0, 1)


def test_a_folder_is_the_quantized_side(tmp_path):
    TINY["dit"].build(tmp_path / "model")
    pipe = load_pipeline(tmp_path / "model")
    quantize_(pipe.transformer, "w8a16")
    pipe.save_pretrained(tmp_path / "quantized")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(demo, "FIRST", "7")  # this tiny DiT knows its classes by number
        sides = demo.Sides(str(tmp_path / "model"), tmp_path / "quantized", "rtn", "cpu", "fp32")
    found = [any(isinstance(layer, QuantLinear) for layer in side.transformer.modules()) for side in sides.pipelines]
    assert found == [False, True]


def test_enlarged_pixels_are_blocks():
    small = Image.fromarray(numpy.arange(48, dtype=numpy.uint8).reshape(4, 4, 3))
    large = demo.enlarged(small)
    assert large.size == (512, 512)
    assert (numpy.asarray(large)[::128, ::128] == numpy.asarray(small)).all()
    assert demo.enlarged(large.resize((700, 900))).size == (700, 900)


def test_without_gradio_one_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.setattr(sys, "argv", ["demo.py"])
    with pytest.raises(SystemExit, match=r"^error: the demo needs gradio: pip install 'dmquant\[demo\]'$"):
        demo.main()


# ---- in the browser


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """Where the app listens, started as people start it."""
    if find_spec("gradio") is None:
        pytest.skip("the demo needs the package gradio")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("demo") / "log"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GRADIO_")}
    with log.open("w") as file:
        app = subprocess.Popen(
            [sys.executable, str(SCRIPT), "--port", str(port)], stdout=file, stderr=subprocess.STDOUT, env=environment
        )
    try:
        eventually(lambda: app.poll() is not None or accepts(port), 120)
        assert app.poll() is None, log.read_text()
        yield f"http://127.0.0.1:{port}/"
    finally:
        app.terminate()
        app.wait()


def accepts(port):
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0


def eventually(condition, seconds=60):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.2)
    return found


@pytest.fixture(scope="module")
def page(address, tmp_path_factory):
    with headless(tmp_path_factory.mktemp("chromium"), "--window-size=1200,860") as running:
        running.get(address)
        eventually(lambda: running.find_elements("css selector", "#draw"))
        yield running


def images(page):
    return [image.get_attribute("src") for image in page.find_elements("css selector", "#pair img")]


def draw(page, prompt):
    """Types a prompt, draws, and waits for two images that were not there before."""
    before = images(page)
    field = page.find_element("css selector", "#prompt textarea, #prompt input")
    field.clear()
    field.send_keys(prompt)
    page.find_element("css selector", "#draw").click()
    return eventually(lambda: len(now := images(page)) == 2 and not set(now) & set(before) and now)


def pixels(page, source):
    script = """
        const [source, done] = arguments;
        fetch(source).then(answer => answer.arrayBuffer()).then(bytes => done(Array.from(new Uint8Array(bytes))));
    """
    return bytes(page.execute_async_script(script, source))


@pytest.mark.slow
def test_a_prompt_is_drawn_twice_and_measured(page):
    full, quantized = draw(page, "blue cat")
    assert pixels(page, full) != pixels(page, quantized)
    said = eventually(lambda: page.find_element("css selector", "#measured").text)
    weights = [float(number) for number in re.findall(r"(?:precision|quantized) ([\d.,]+) MB", said)]
    assert len(weights) == 2
    assert weights[1] < weights[0] / 3
    assert draw(page, "red apple, food & drink, food fruit") != [full, quantized]
    if picture := os.environ.get("DMQUANT_DEMO_PICTURE"):
        eventually(lambda: page.execute_script(LOADED))
        page.save_screenshot(picture)


@pytest.mark.slow
def test_the_slider_uncovers_the_other_side(page):
    from selenium.webdriver import ActionChains

    draw(page, "red boat")
    over = page.find_elements("css selector", "#pair img")[1]
    half = eventually(lambda: "50%" in over.get_attribute("style") and over.get_attribute("style"))
    handle = page.find_element("css selector", "#pair [data-testid=slider] .inner, #pair [data-testid=slider]")
    ActionChains(page).click_and_hold(handle).move_by_offset(120, 0).release().perform()
    moved = eventually(lambda: (style := over.get_attribute("style")) != half and style)
    assert float(re.search(r"([\d.]+)%\)", moved)[1]) > 60


@pytest.mark.slow
def test_an_empty_prompt_is_told_so(page):
    field = page.find_element("css selector", "#prompt textarea, #prompt input")
    field.clear()
    field.send_keys(" ")
    page.find_element("css selector", "#draw").click()
    eventually(lambda: "Type a prompt first." in page.find_element("css selector", "body").text)


@pytest.mark.slow
def test_nothing_is_asked_of_other_machines(page, address):
    asked = re.findall(r'"url":"(https?://[^"]+)"', " ".join(entry["message"] for entry in page.get_log("performance")))
    assert asked
    assert all(url.startswith(address) for url in asked), {url for url in asked if not url.startswith(address)}
