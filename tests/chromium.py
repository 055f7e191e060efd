"""A headless Chromium for tests that look at pages; they are skipped where there is none."""

import contextlib
import shutil

import pytest


@contextlib.contextmanager
def headless(profile, *arguments, logs=("performance",)):
    """A driver of Chromium, its files in the folder `profile`, that fetches nothing by itself; its `logs`, by name."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="the page is driven with the package selenium")
    from selenium.webdriver.chrome.service import Service

    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if not (browser and driver):
        pytest.skip("no Chromium with its chromedriver (Debian: apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    quiet = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking")
    for argument in (*quiet, "--disable-dev-shm-usage", f"--user-data-dir={profile}", *arguments):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", dict.fromkeys(logs, "ALL"))
    running = webdriver.Chrome(options=options, service=Service(driver))
    try:
        yield running
    finally:
        running.quit()
