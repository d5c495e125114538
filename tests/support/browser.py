"""Headless Chromium for tests marked `browser`; they are skipped where it or its driver is missing."""

from __future__ import annotations

import json
import shutil
from contextlib import contextmanager

import pytest

ARGUMENTS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars --window-size=1000,900"
)


@contextmanager
def open_browser(folder):
    """A browser with an empty profile in a folder of the test's own."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("there is no Chromium with its driver here (Debian: chromium, chromium-driver)")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in (*ARGUMENTS.split(), f"--user-data-dir={folder / 'profile'}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(driver))
    browser.get("data:,")  # Away from the page that it opens with, which asks for much.
    browser.get_log("performance")
    try:
        yield browser
    finally:
        browser.quit()


def console_errors(browser):
    """What the page complained about."""
    return [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]


def requested(browser):
    """Addresses that pages asked for, but for data within them."""
    events = (json.loads(entry["message"])["message"] for entry in browser.get_log("performance"))
    sent = (one["params"]["request"]["url"] for one in events if one["method"] == "Network.requestWillBeSent")
    return {url.partition("#")[0] for url in sent if not url.startswith("data:")}
