"""The report: what it gathers, that its numbers are the artifacts', and that nothing in it can break it."""

import dataclasses
import json
import re
import shutil
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

from dsg_cli.artifacts import Inspection
from dsg_cli.errors import DsgError
from dsg_cli.report.html import data_table, tag
from dsg_cli.report.page import report_of
from dsg_cli.stages.gathering import gather
from dsg_cli.workspace import Workspace

DATA = Path(__file__).parent / "data"
NASTY = "<script>alert(1)</script> \"'&\x1b[31m\u202eabc\ud800 " + "long" * 500


class Page(HTMLParser):
    """What a page holds."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.ids, self.links, self.open, self.texts = [], [], [], [], []
        self.feed(text)

    def handle_starttag(self, name, attributes):
        given = dict(attributes)
        self.tags.append((name, given))
        self.ids += [given["id"]] if "id" in given else []
        self.links += [given[key] for key in ("href", "src", "xlink:href") if key in given]
        if name not in ("meta", "link", "br", "path", "use", "rect", "image"):
            self.open.append(name)

    def handle_endtag(self, name):
        if self.open and name in self.open:
            assert self.open.pop() == name

    def handle_data(self, data):
        self.texts.append(data)

    def of(self, name):
        return [given for one, given in self.tags if one == name]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """Every kind that the data of schema 1 has."""
    folder = tmp_path_factory.mktemp("report") / "ws"
    shutil.copytree(DATA / "schema-1", folder)
    return Workspace(folder)


@pytest.fixture(scope="module")
def made(workspace):
    ids = workspace.ids()
    gathered = gather(workspace, ids)
    return gathered, report_of(gathered, "A title & more")


@pytest.fixture(scope="module")
def page(made):
    return Page(made[1].text)


def test_it_needs_nothing_but_itself(page):
    assert page.links and all(link.startswith(("#", "data:")) for link in page.links)
    assert not {"script", "iframe", "object", "base", "form", "img"} & {name for name, _ in page.tags}
    policy = next(one["content"] for one in page.of("meta") if one.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy and "script" not in policy
    assert not [one for _, one in page.tags if any(key.startswith("on") for key in one)]


def test_links_lead_somewhere_and_ids_are_unique(page):
    assert len(page.ids) == len(set(page.ids))
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)


def test_headings_are_in_order_and_landmarks_are_there(page):
    levels = [int(name[1]) for name, _ in page.tags if re.fullmatch("h[1-6]", name)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(later <= earlier + 1 for earlier, later in pairwise(levels))
    assert all(len(page.of(name)) == 1 for name in ("main", "nav", "header", "footer"))
    assert page.of("html")[0]["lang"] == "en"


def test_every_figure_says_what_it_shows(page, made):
    figures = made[1].figures
    assert {one.name for one in figures} == {
        "eval-001-accuracy", "attack-001-curve", "compare-001-trade-off", "compare-001-sequence", "study-001-lines",
        "threshold-001-statistic",
    }  # fmt: skip
    drawn = [one for one in page.of("svg") if one.get("role") == "img"]
    assert len(drawn) == len(figures)
    assert all(re.search(r"\d\.\d", one["aria-label"]) for one in drawn)
    assert len(page.of("figcaption")) == len(figures)


def test_tables_have_captions_and_heads(page):
    tables = len(page.of("table"))
    assert tables > 8 and len(page.of("caption")) == tables
    assert all(one.get("scope") in ("col", "row") for one in page.of("th"))


def test_numbers_are_the_artifacts_and_name_them(made, workspace):
    text = re.sub(r"<[^>]+>", "", made[1].text)
    evaluation = workspace.read("eval-001").json
    for bench, sides in evaluation["results"].items():
        line = next(one for one in re.findall(rf"{bench} \([^\n]*?eval-001", text))
        assert f"{sides['base']['acc']:.2f}" in line and f"{sides['unlearned']['acc']:.2f}"[:3] in line
    rate = workspace.read("threshold-001").json["false_positive_rate"]
    assert f"{rate:.1%} of" in text
    worst = workspace.read("attack-001").json["summary"]["forget_acc_worst"]
    assert f"to at most {worst:.2f}" in text
    assert "The knowledge stays in the weights" in text


def test_without_names_it_takes_the_newest_and_what_they_are_made_from(tmp_path, workspace):
    found = {one.id for one in gather(workspace, []).artifacts}
    assert {"compare-001", "study-001"} <= found
    alone = Workspace(tmp_path / "ws")
    shutil.copytree(workspace.folder, alone.folder, ignore=shutil.ignore_patterns("compare-*", "model-*", "wrapper-*"))
    found = {one.id for one in gather(alone, []).artifacts}
    assert {"guardrail-001", "threshold-001", "features-001", "eval-001", "attack-001"} <= found
    assert [one.id for one in gather(alone, ["eval-001"]).artifacts][-1] == "eval-001"


def test_what_is_in_it_cannot_break_it(tmp_path, workspace):
    """Names, notes and samples are anybody's text."""
    stored = workspace.read("features-001")
    row = {"feature": 3, "group": NASTY, "document": 0, "position": 2, "peak": 2.0, "activations": [0.0, 2.0], "at": 1}
    feature = {
        "index": 3, "roles": ["clamped"], "weight": None, "forget_score": None, "retain_score": None, "ratio": None,
        "rates": {NASTY: 0.5}, "means": {NASTY: 0.1}, "promoted": [{"token": NASTY, "value": 1.0}], "suppressed": [],
        "nearest": [], "words": [NASTY], "description": NASTY, "warnings": [NASTY],
    }  # fmt: skip
    group = {"name": NASTY, "role": "forget", "n_documents": 1, "n_tokens": 2}
    body = Inspection(inspected="features-001", groups=[group], features=[feature], overlap=[])
    held = Workspace(tmp_path / "ws")
    header = dataclasses.replace(stored.header, kind="inspect", settings={}, inputs=[], notes=[NASTY], files={})
    text = json.dumps([row | {"tokens": [NASTY, "\u05d0\u05d1"]}])
    inspected = held.write(header, dataclasses.replace(body), rows=json.loads(text))
    gathered = gather(held, [inspected.id])
    report = report_of(gathered, NASTY)
    page = Page(report.text)
    report.text.encode()  # No half of a surrogate pair is left.
    assert not page.of("script") and "\x1b" not in report.text and "\u202e" not in report.text
    assert "<script>" not in report.text and "&lt;script&gt;" in report.text
    assert not page.open, "every element is closed"
    assert "\u05d0\u05d1" in report.text
    shaded = [one for one in page.of("span") if one.get("style")]
    assert [one["title"] for one in shaded] == ["2"]


def test_elements_escape_what_they_are_given():
    made = tag("a", "<b>", [tag("i", '"'), None, "&"], href='x" onclick="y', hidden=True, class_=None)
    assert made == '<a href="x&quot; onclick=&quot;y" hidden>&lt;b&gt;<i>&quot;</i>&amp;</a>'
    table = data_table(["<", "n"], [["a<", "1"]], caption="<c>")
    assert "<c>" not in table and "a&lt;" in table and 'scope="row"' in table


def test_the_command(dsg, workspace, tmp_path):
    code, out, err = dsg("report", "-w", workspace.folder, "-o", "r.html", "--figures", "figs", "--format", "png",
                         "--format", "pdf", "--format", "svg", "--json")  # fmt: skip
    assert code == 0, err
    said = json.loads(out)
    assert said["bytes"] == (tmp_path / "r.html").stat().st_size and "compare-001" in said["artifacts"]
    files = [Path(name) for name in said["figures"]]
    assert len(files) % 3 == 0 and all((tmp_path / one).stat().st_size > 1000 for one in files)
    assert (tmp_path / files[0]).read_bytes().startswith(b"\x89PNG")
    before = (tmp_path / "r.html").read_bytes()
    code, _, err = dsg("report", "-w", workspace.folder, "-o", "r.html")
    assert code == 1 and "--force" in err and (tmp_path / "r.html").read_bytes() == before
    code, out, _ = dsg("report", "eval-001", "-w", workspace.folder, "-o", "r.html", "--force", "--title", "Mine")
    assert code == 0 and out == "r.html\n" and "<title>Mine</title>" in (tmp_path / "r.html").read_text()
    assert (tmp_path / "r.html").read_bytes() != before


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["eval-999"], "no artifact eval-999"),
        (["-o", "nowhere/r.html"], "no folder nowhere"),
        (["-o", "."], "there already"),
        (["--format", "exe"], "not as exe"),
        (["-w", "empty"], "nothing to report"),
        (["--recipe", "no-such-recipe"], "no-such-recipe"),
    ],
)
def test_what_is_refused(dsg, workspace, tmp_path, options, said):
    where = [] if "-w" in options else ["-w", workspace.folder]
    code, out, err = dsg("report", *options, *where)
    assert code == 1 and said in err and not out
    assert not list(tmp_path.rglob("*.html"))


def test_two_of_one_name_are_refused(workspace, tmp_path):
    other = tmp_path / "eval-001.json"
    for path in workspace.folder.glob("eval-001*"):
        shutil.copy(path, tmp_path / path.name)
    with pytest.raises(DsgError, match="Two artifacts are called eval-001"):
        gather(workspace, ["eval-001", str(other)])


def test_a_recipes_published_numbers_stand_beside_measured_ones(dsg, workspace, tmp_path):
    (tmp_path / "mine.yaml").write_text("published:\n  results:\n    lab-hexes: {unlearned: 0.3}\n")
    code, _, err = dsg("report", "eval-001", "-w", workspace.folder, "-o", "r.html", "--recipe", "mine.yaml")
    assert code == 0, err
    assert "Published beside measured" in (tmp_path / "r.html").read_text()


@pytest.mark.browser
def test_a_browser_shows_it(made, tmp_path):
    from browser import console_errors, open_browser, requested
    from selenium.webdriver.common.by import By

    file = tmp_path / "report.html"
    file.write_text(made[1].text, encoding="utf-8")
    with open_browser(tmp_path) as browser:
        colours = set()
        for scheme, width in (("light", 1000), ("dark", 1000), ("light", 360)):
            browser.execute_cdp_cmd(
                "Emulation.setDeviceMetricsOverride",
                {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False},
            )
            browser.execute_cdp_cmd(
                "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
            )
            browser.get(file.as_uri())
            figures = browser.find_elements(By.CSS_SELECTOR, "figure svg")
            assert len(figures) == len(made[1].figures)
            assert all(one.size["height"] > 60 and one.size["width"] > 200 for one in figures)
            wide, room = browser.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
            assert wide <= room
            colours.add(browser.execute_script("return getComputedStyle(document.body).backgroundColor"))
            ink = browser.execute_script("return getComputedStyle(document.querySelector('figure svg text')).fill")
            assert ink == browser.execute_script("return getComputedStyle(document.body).color")
        assert len(colours) == 2
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
        assert not browser.find_element(By.TAG_NAME, "nav").is_displayed()
        assert console_errors(browser) == []
        assert requested(browser) <= {file.as_uri()}
