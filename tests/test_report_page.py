"""The report in a browser: it asks for nothing, complains of nothing, and reads well in any theme and place."""

import base64
import itertools
import shutil
from pathlib import Path

import pytest
from browser import console_errors, open_browser, requested
from dsg_cli.stages.gathering import gather
from test_report import NASTY, hostile_inspection

from dsg_cli.report.page import report_of
from dsg_cli.workspace import Workspace

pytestmark = pytest.mark.browser
DATA = Path(__file__).parent / "data"
CONTRAST = """
const colour = (text) => text.match(/[0-9.]+/g).map(Number);
const linear = (v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
const light = (c) => c.slice(0, 3).map((v) => linear(v / 255))
  .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const ground = light(colour(getComputedStyle(document.body).backgroundColor));
return [...document.querySelectorAll(arguments[0])].map((one) => {
  const own = light(colour(getComputedStyle(one)[arguments[1]]));
  return (Math.max(own, ground) + 0.05) / (Math.min(own, ground) + 0.05);
});
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A page of every kind, as a file, and how many figures it has."""
    folder = tmp_path_factory.mktemp("page")
    shutil.copytree(DATA / "schema-1", folder / "ws")
    workspace = Workspace(folder / "ws")
    made = report_of(gather(workspace, workspace.ids()), "A report", has_text=True)
    (folder / "report.html").write_text(made.text, encoding="utf-8")
    return folder / "report.html", len(made.figures)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with open_browser(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


def seen(browser, file, *, width=1000, scheme="light", media="screen"):
    """The page as that device shows it, and no request of an earlier one."""
    requested(browser)
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": features})
    browser.get(file.as_uri())


@pytest.mark.parametrize(("width", "scheme"), itertools.product((360, 1000), ("light", "dark")))
def test_it_can_be_read_anywhere(browser, report, width, scheme):
    file, n_figures = report
    seen(browser, file, width=width, scheme=scheme)
    wide, room = browser.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
    assert wide <= room
    sizes = browser.execute_script(
        "return [...document.querySelectorAll('figure svg')].map((one) => one.getBoundingClientRect())"
        ".map((box) => [box.width, box.height])"
    )
    assert len(sizes) == n_figures and all(wide >= 300 and high > 60 for wide, high in sizes)
    letters = browser.execute_script(
        "return [...document.querySelectorAll('figure svg text')].map((one) => one.getBoundingClientRect().height)"
    )
    assert min(letters) >= 7, "what is written in figures can be read"
    assert min(browser.execute_script(CONTRAST, "p, li, td, th, figcaption, a, dd", "color")) >= 4.5
    assert min(browser.execute_script(CONTRAST, "figure svg text:not([style*='fill: #'])", "fill")) >= 4.5
    assert console_errors(browser) == []
    assert requested(browser) <= {file.as_uri()}


def test_themes_differ_and_figures_follow(browser, report):
    found = []
    for scheme in ("light", "dark"):
        seen(browser, report[0], scheme=scheme)
        script = "return [getComputedStyle(document.body)[arguments[0]], getComputedStyle(document.querySelector(" \
            "'figure svg text')).fill]"  # fmt: skip
        ground, _ = browser.execute_script(script, "backgroundColor")
        ink, letters = browser.execute_script(script, "color")
        assert ink == letters
        found.append((ground, ink))
    assert found[0][0] != found[1][0] and found[0][1] != found[1][1]


def test_on_paper_all_of_it_is_there(browser, report):
    """Folded tables are open, what is for screens is gone, and dark readers get black on white."""
    seen(browser, report[0], scheme="dark", media="print")
    shown = "return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]"
    assert browser.execute_script(shown, "nav", "display") == "none"
    assert browser.execute_script(shown, "body", "backgroundColor") == "rgb(255, 255, 255)"
    heights = browser.execute_script(
        "return [...document.querySelectorAll('details table')].map((one) => one.getBoundingClientRect().height)"
    )
    assert heights and min(heights) > 20
    printed = base64.b64decode(browser.execute_cdp_cmd("Page.printToPDF", {})["data"])
    assert printed.startswith(b"%PDF") and len(printed) > 20_000


def test_keys_reach_the_skip_link_first_and_every_link_and_table(browser, report):
    from selenium.webdriver.common.keys import Keys

    seen(browser, report[0])
    active = browser.switch_to.active_element
    active.send_keys(Keys.TAB)
    first = browser.switch_to.active_element
    assert first.get_attribute("class") == "skip" and first.location["x"] >= 0
    unreached = browser.execute_script(
        "return [...document.querySelectorAll('.scrolls, a')].filter((one) => one.tabIndex < 0).length"
    )
    assert unreached == 0
    names = browser.execute_script("return [...document.querySelectorAll('.scrolls')].map((one) => one.ariaLabel)")
    assert all(names) and len(set(names)) == len(names), "what scrolls has a name of its own"


def test_what_is_hostile_neither_runs_nor_widens_it(browser, report, tmp_path):
    """A name of two thousand letters, markup, and text that is written from right to left."""
    held = Workspace(tmp_path / "ws")
    inspected = hostile_inspection(Workspace(report[0].parent / "ws"), held)
    file = tmp_path / "hostile.html"
    file.write_text(report_of(gather(held, [inspected.id]), NASTY, has_text=True).text, encoding="utf-8")
    seen(browser, file, width=360)
    wide, room = browser.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
    assert wide <= room
    assert browser.execute_script("return document.scripts.length") == 0
    assert browser.execute_script("return document.querySelector('h1').textContent").startswith("<script>alert(1)")
    direction = "return getComputedStyle(document.querySelector('.tokens > bdi'), null).unicodeBidi"
    assert browser.execute_script(direction) == "isolate"
    assert console_errors(browser) == [] and requested(browser) <= {file.as_uri()}
