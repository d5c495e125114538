"""The report: what it gathers, that its numbers are the artifacts', and that nothing in it can break it."""

from __future__ import annotations

import base64
import dataclasses
import itertools
import json
import re
import shutil
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from browser import console_errors, open_browser, requested
from conftest import python

from dsg_cli.errors import DsgError
from dsg_cli.report.comparison import quality_compared
from dsg_cli.report.figures.draw import clusters, draw_all, draw_attack, place_labels
from dsg_cli.report.figures.style import drawing
from dsg_cli.report.findings import findings
from dsg_cli.report.gather import Gathered, gather
from dsg_cli.report.page import report_of
from dsg_cli.report.rendering import Styled, Table, page_templates
from dsg_cli.workspace.results import Inspection
from dsg_cli.workspace.store import Workspace

DATA = Path(__file__).parent / "data"
NASTY = "<script>alert(1)</script> \"'&\x1b[31m\u202eabc\ud800\ufffe " + "long" * 500


class Page(HTMLParser):
    """What a page holds."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.ids, self.links, self.open, self.texts = [], [], [], [], []
        self.by_id, self.last = {}, None
        self.feed(text)

    def handle_starttag(self, name, attributes):
        values = dict(attributes)
        self.tags.append((name, values))
        self.ids += [values["id"]] if "id" in values else []
        self.last = values.get("id")
        self.links += [values[key] for key in ("href", "src", "xlink:href") if key in values]
        if name not in ("meta", "link", "br", "path", "use", "rect", "image"):
            self.open.append(name)

    def handle_endtag(self, name):
        if self.open and name in self.open:
            assert self.open.pop() == name

    def handle_data(self, data):
        self.texts.append(data)
        self.by_id[self.last] = self.by_id.get(self.last, "") + data

    def of(self, name):
        return [attributes for tag, attributes in self.tags if tag == name]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """Every kind that the data of schema 1 has."""
    return Workspace(shutil.copytree(DATA / "schema-1", tmp_path_factory.mktemp("report") / "ws"))


@pytest.fixture(scope="module")
def made(workspace):
    gathered = gather(workspace, workspace.ids())
    return gathered, report_of(gathered, "A title & more", has_text=True)


@pytest.fixture(scope="module")
def page(made):
    return Page(made[1].text)


def ids_of(gathered):
    return {stored.id for stored in gathered.artifacts}


def sentences(gathered, heading):
    return [sentence.text for sentence in findings(gathered)[heading]]


def with_results(workspace, results, **changed):
    """What a report of the evaluation gathers, with other results."""
    stored = workspace.read("eval-001")
    others = [one for one in gather(workspace, ["eval-001", "guardrail-001"]).artifacts if one.id != "eval-001"]
    changed = dataclasses.replace(stored, body=stored.body.replace(results=results, **changed))
    return Gathered([*others, changed], {"eval-001": workspace.rows(stored)})


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
    for one in drawn:
        assert page.by_id[one["aria-labelledby"]]
        assert re.search(r"\d\.\d|\d%", page.by_id[one["aria-describedby"]])
    assert len(page.of("figcaption")) == len(figures)


def test_tables_have_captions_and_heads(page):
    tables = len(page.of("table"))
    assert tables > 8 and len(page.of("caption")) == tables
    assert all(one.get("scope") in ("col", "row") for one in page.of("th"))


def test_numbers_are_the_artifacts_and_name_them(made, workspace):
    text = re.sub(r"<[^>]+>", "", made[1].text)
    for bench, sides in workspace.read("eval-001").json["results"].items():
        assert f"{bench} {sides['base']['acc']:.2f} before, {sides['unlearned']['acc']:.2f} after" in text
    rate = workspace.read("threshold-001").json["false_positive_rate"]
    assert f"{rate:.1%} of" in text
    worst = workspace.read("attack-001").json["summary"]["forget_acc_worst"]
    assert f"dilution gets past it: accuracy on lab-hexes 0.50 before, {worst:.2f} after (" in text
    assert "The knowledge stays in the weights" in text


def test_without_names_it_takes_the_newest_and_what_they_are_made_from(tmp_path, workspace):
    assert {"compare-001", "study-001"} <= ids_of(gather(workspace, []))
    alone = Workspace(tmp_path / "ws")
    shutil.copytree(workspace.folder, alone.folder, ignore=shutil.ignore_patterns("compare-*", "model-*", "wrapper-*"))
    newest = {"guardrail-001", "threshold-001", "features-001", "eval-001", "attack-001"}
    assert newest <= ids_of(gather(alone, []))
    assert [one.id for one in gather(alone, ["eval-001"]).artifacts][-1] == "eval-001"


def hostile_inspection(workspace, held):
    """An inspection, in another workspace, of which all that is text is anybody's."""
    row = {"feature": 3, "group": NASTY, "document": 0, "position": 2, "peak": 2.0, "activations": [0.0, 2.0], "at": 1}
    feature = {
        "index": 3, "roles": ["clamped"], "weight": None, "forget_score": None, "retain_score": None, "ratio": None,
        "rates": {NASTY: 0.5}, "means": {NASTY: 0.1}, "promoted": [{"token": NASTY, "value": 1.0}], "suppressed": [],
        "nearest": [], "words": [NASTY], "description": NASTY, "warnings": [NASTY],
    }  # fmt: skip
    group = {"name": NASTY, "role": "forget", "n_documents": 1, "n_tokens": 2}
    body = Inspection(inspected="features-001", groups=[group], features=[feature], overlap=[])
    header = workspace.read("features-001").header
    header = header.replace(kind="inspect", settings={}, inputs=[], notes=[NASTY], files={})
    return held.write(header, body, rows=[row | {"tokens": [NASTY, "\u05d0\u05d1"]}])


def test_what_is_in_it_cannot_break_it(tmp_path, workspace):
    """Names, notes and samples are anybody's text."""
    held = Workspace(tmp_path / "ws")
    gathered = gather(held, [hostile_inspection(workspace, held).id])
    without = report_of(gathered, NASTY).text
    assert "\u05d0\u05d1" not in without and "--with-text shows them" in without
    report = report_of(gathered, NASTY, has_text=True)
    page = Page(report.text)
    report.text.encode()  # No half of a surrogate pair is left.
    assert not page.of("script") and "\x1b" not in report.text and "\u202e" not in report.text
    assert "<script>" not in report.text and "&lt;script&gt;" in report.text
    assert not page.open, "every element is closed"
    assert "\u05d0\u05d1" in report.text
    shaded = [one for one in page.of("span") if one.get("style")]
    assert [one["title"] for one in shaded] == ["2"]


def test_tables_escape_what_they_are_given():
    parts = page_templates().get_template("parts.html.j2").module
    table = Table(["<", "n"], [["a<\u202e", "1"], ["", "2"]], notes=["<i>", Styled("<b>", "red")], fold="<f>")
    html = parts.table(table, 'c" onclick="x')
    page = Page(html)
    assert not page.open and not {"i", "b", "f"} & {name for name, _ in page.tags} and "\u202e" not in html
    assert page.of("div")[0]["aria-label"] == 'c" onclick="x' and not any("onclick" in one for _, one in page.tags)
    assert [one.get("class") for one in page.of("th")] == [None, "number", None]
    assert page.of("th")[-1]["scope"] == "row" and [one["class"] for one in page.of("p")] == ["note", "failed"]
    assert [one.get("class") for one in page.of("td")] == ["number", None, "number"]


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
    ("options", "words"),
    [
        (["eval-999"], "no artifact eval-999"),
        (["-o", "nowhere/r.html"], "no folder nowhere"),
        (["-o", "."], "there already"),
        (["--format", "exe"], "not as exe"),
        (["-w", "empty"], "nothing to report"),
        (["--recipe", "no-such-recipe"], "no-such-recipe"),
    ],
)
def test_what_is_refused(dsg, workspace, tmp_path, options, words):
    where = [] if "-w" in options else ["-w", workspace.folder]
    code, out, err = dsg("report", *options, *where)
    assert code == 1 and words in err and not out
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


def test_the_same_artifacts_give_the_same_page(made):
    gathered, report = made
    again = report_of(gathered, "A title & more", has_text=True)
    assert again.text == report.text
    assert [one.content("svg") for one in again.figures[:2]] == [one.content("svg") for one in report.figures[:2]]


def test_of_a_comparison_the_row_that_did_best_on_dev_questions_is_shown_too(tmp_path, workspace):
    """Unless something was made after it."""
    held = Workspace(shutil.copytree(workspace.folder, tmp_path / "ws"))
    (held.folder / "study-001.json").unlink()
    compared = held.read("compare-001")
    rows = [row | {"artifacts": ["wrapper-001" if row["method"] == "prompt" else "model-001"], "eval": "eval-999"}
            for row in compared.json["rows"]]  # fmt: skip
    trials = [trial | {"score": 0.9 if trial["method"] == "npo" else 0.1} for trial in compared.json["trials"]]
    body = compared.body.replace(rows=rows, trials=trials)
    held.write(compared.header.replace(files={}, created="2026-12-01T00:00:00+00:00"), body)
    gathered = gather(held, [])
    assert "model-001" in ids_of(gathered) and not {"wrapper-001", "compare-001"} & ids_of(gathered)
    assert "Of these, npo is shown in detail." in report_of(gathered, "t").text
    for name in ("compare-001", "compare-002"):
        (held.folder / f"{name}.json").unlink()
    held.write(compared.header.replace(files={}, created="2026-11-25T08:00:00+00:00"), body)
    assert {"wrapper-001", "model-001"} & ids_of(gather(held, [])) == {"wrapper-001"}


def test_a_question_in_other_words_is_about_the_same(workspace):
    results = workspace.read("eval-001").body.results
    asked = {"lab-hexes-terse": results["lab-hexes"], "lab-near-held": results["lab-near"]}
    forgotten, kept, *_ = sentences(with_results(workspace, asked, gate={}, expected=[]), "How well")
    assert forgotten.startswith("To forget: lab-hexes-terse") and kept.startswith("To keep: lab-near-held")


def test_a_method_that_was_not_asked_after_everything_is_not_said_to_keep_it(workspace):
    body = workspace.read("compare-001").body
    forget = body.benches["forget"]
    row = body.rows[0] | {"method": "npo", "results": {forget: {"acc": 0.2, "acc_low": 0.1, "acc_high": 0.3}}}
    both, forgets_alone = quality_compared(body.replace(rows=[row]))
    assert both.endswith("accuracy on every other bench: none.") and "npo (0.20)" in forgets_alone


NO_VERDICT = "not to be told from guessing, which gives 0.25"


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(0.1, 0.4, NO_VERDICT), (0.3, 0.6, "more than guessing"), (0.0, 0.1, "less than guessing")],
)
def test_a_finding_says_whether_it_is_guessing(workspace, low, high, verdict):
    """Chance is that of the questions asked; without intervals nothing is claimed."""
    sides = workspace.read("eval-001").body.results["lab-hexes"]
    after = sides["unlearned"] | {"acc_low": low, "acc_high": high}
    gathered = with_results(workspace, {"lab-hexes": sides | {"unlearned": after}})
    assert gathered.chance(workspace.read("eval-001"), "lab-hexes") == 0.25
    assert verdict in " ".join(sentences(gathered, "How well"))


def test_what_was_not_tried_is_said(workspace):
    heading = "What it does not protect against"
    untried = [text for text in sentences(gather(workspace, ["attack-001"]), heading) if "Not tried: split" in text]
    assert len(untried) == 1 and "paraphrase" in untried[0] and "dilution" not in untried[0]
    assert findings(gather(workspace, ["features-001"]))[heading][0].artifacts == ()


def test_names_in_figures_are_text_and_nothing_else(workspace):
    """No formulas, no line breaks, no control characters; however long."""
    stored = workspace.read("attack-001")
    name = "$x^{" + NASTY + "\n</svg>"
    curve = [point | {"variant": name, "x": name} for point in stored.body.curve]
    summary = stored.body.summary | {"worst_variant": name, "worst_x": name}
    body = stored.body.replace(attack=name, bench=name, curve=curve, summary=summary)
    for drawn in (draw_attack("attack-001", body), draw_all([("attack-001", body), ("attack-002", body)])):
        page = Page(drawn.svg())
        assert not page.open and not page.of("script") and len(page.of("svg")) == 1
        assert all(drawn.content(kind) for kind in ("svg", "png", "pdf"))


def test_labels_lie_beside_their_points_and_not_on_one_another():
    with drawing(5, 4) as (figure, axes):
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1)
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
        found = clusters(axes, [(0.5, 0.5, 1), (0.501, 0.5, 2), (0.5, 0.5, 1), (0.55, 0.5, 3), (0.99, 0.5, 4)])
        place_labels(axes, found)
        figure.draw_without_rendering()
    assert [one.numbers for one in found] == [[1, 2], [3], [4]]
    boxes = [text.get_window_extent() for text in axes.texts]
    assert [text.get_text() for text in axes.texts] == ["1, 2", "3", "4"]
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    assert boxes[2].x1 <= axes.bbox.x1 + 5


def test_where_it_comes_from_is_said_once_for_each(made, page):
    gathered, _ = made
    entries = [name for name in page.ids if name.startswith("from-")]
    assert entries == [f"from-{one.id}" for one in gathered.artifacts]
    text = "".join(page.texts)
    for stored in gathered.artifacts:
        assert stored.json["sha256"] in text and f"seed {stored.header.seed}" in text
        assert f"{stored.header.seconds:,.1f} s, {stored.header.n_tokens:,} tokens" in text


def test_a_full_disk_leaves_no_half_of_a_file(dsg, workspace, tmp_path, monkeypatch):
    def full(path, content):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("dsg_cli.report.page.write_atomically", full)
    code, out, err = dsg("report", "eval-001", "-w", workspace.folder, "-o", "r.html")
    assert code == 1 and "r.html cannot be written: No space left" in err and not out
    assert not list(tmp_path.glob("r.html*"))


def test_figures_that_are_there_are_not_replaced(dsg, workspace, tmp_path):
    (tmp_path / "figs").mkdir()
    (tmp_path / "figs" / "eval-001-accuracy.svg").write_text("mine")
    arguments = ("report", "eval-001", "-w", workspace.folder, "-o", "r.html", "--figures", "figs")
    code, _, err = dsg(*arguments)
    assert code == 1 and "eval-001-accuracy.svg is there already" in err and not (tmp_path / "r.html").exists()
    assert (tmp_path / "figs" / "eval-001-accuracy.svg").read_text() == "mine"
    code, _, err = dsg(*arguments, "--force")
    assert code == 0 and "<svg" in (tmp_path / "figs" / "eval-001-accuracy.svg").read_text()


@pytest.mark.parametrize(
    "path", sorted(DATA.glob("schema-*/*-001.json")), ids=lambda path: f"{path.parent.name}/{path.stem}"
)
def test_every_artifact_can_be_reported_alone(path, tmp_path):
    """Of every schema; what is missing leaves a gap and no nonsense."""
    alone = Workspace(tmp_path)
    for own in path.parent.glob(f"{path.stem}*"):
        (shutil.copytree if own.is_dir() else shutil.copy)(own, tmp_path / own.name)
    page = Page(report_of(gather(alone, [path.stem]), "Alone").text)
    assert [name for name in page.ids if name.startswith("from-")] == [f"from-{path.stem}"]
    assert "None" not in "".join(page.texts) and "nan" not in re.split(r"\W", "".join(page.texts))
    assert "The knowledge stays in the weights" in "".join(page.texts)


def test_it_needs_no_torch():
    """Which takes longer to load than the page to make."""
    modules = "import dsg_cli.report.page, dsg_cli.report.gather, sys"
    done = python("-c", f"{modules}; assert not {{'torch', 'transformers', 'matplotlib.pyplot'}} & set(sys.modules)")
    assert done.returncode == 0, done.stderr


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
def file(made, tmp_path_factory):
    """The page as a file."""
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(made[1].text, encoding="utf-8")
    return path


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


def sizes_of(browser, selector):
    """Width and height of each element."""
    boxes = "[...document.querySelectorAll(arguments[0])].map((one) => one.getBoundingClientRect())"
    return browser.execute_script(f"return {boxes}.map((box) => [box.width, box.height])", selector)


@pytest.mark.browser
@pytest.mark.parametrize(("width", "scheme"), itertools.product((360, 1000), ("light", "dark")))
def test_it_can_be_read_anywhere(browser, file, made, width, scheme):
    seen(browser, file, width=width, scheme=scheme)
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    sizes = sizes_of(browser, "figure svg")
    assert len(sizes) == len(made[1].figures) and all(wide >= 300 and high > 60 for wide, high in sizes)
    letters = sizes_of(browser, "figure svg text")
    assert min(high for _, high in letters) >= 7, "what is written in figures can be read"
    assert min(browser.execute_script(CONTRAST, "p, li, td, th, figcaption, a, dd", "color")) >= 4.5
    assert min(browser.execute_script(CONTRAST, "figure svg text:not([style*='fill: #'])", "fill")) >= 4.5
    assert console_errors(browser) == []
    assert requested(browser) <= {file.as_uri()}


@pytest.mark.browser
def test_themes_differ_and_figures_follow(browser, file):
    script = "const body = getComputedStyle(document.body); return [body.backgroundColor, body.color, " \
        "getComputedStyle(document.querySelector('figure svg text')).fill]"  # fmt: skip
    colours = []
    for scheme in ("light", "dark"):
        seen(browser, file, scheme=scheme)
        colours.append(browser.execute_script(script))
    assert all(ink == letters for _, ink, letters in colours)
    assert all(light != dark for light, dark in zip(*colours, strict=True))


@pytest.mark.browser
def test_on_paper_all_of_it_is_there(browser, file):
    """Folded tables are open, what is for screens is gone, and dark readers get black on white."""
    seen(browser, file, scheme="dark", media="print")
    shown = "return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]"
    assert browser.execute_script(shown, "nav", "display") == "none"
    assert browser.execute_script(shown, "body", "backgroundColor") == "rgb(255, 255, 255)"
    tables = sizes_of(browser, "details table")
    assert tables and min(high for _, high in tables) > 20
    printed = base64.b64decode(browser.execute_cdp_cmd("Page.printToPDF", {})["data"])
    assert printed.startswith(b"%PDF") and len(printed) > 20_000


@pytest.mark.browser
def test_keys_reach_the_skip_link_first_and_every_link_and_table(browser, file):
    from selenium.webdriver.common.keys import Keys

    seen(browser, file)
    active = browser.switch_to.active_element
    active.send_keys(Keys.TAB)
    first = browser.switch_to.active_element
    assert first.get_attribute("class") == "skip" and first.location["x"] >= 0
    unreached = "return [...document.querySelectorAll('.scrolls, a')].filter((one) => one.tabIndex < 0).length"
    assert browser.execute_script(unreached) == 0
    names = browser.execute_script("return [...document.querySelectorAll('.scrolls')].map((one) => one.ariaLabel)")
    assert all(names) and len(set(names)) == len(names), "what scrolls has a name of its own"


@pytest.mark.browser
def test_what_is_hostile_neither_runs_nor_widens_it(browser, workspace, tmp_path):
    """A name of two thousand letters, markup, and text that is written from right to left."""
    held = Workspace(tmp_path / "ws")
    inspected = hostile_inspection(workspace, held)
    file = tmp_path / "hostile.html"
    file.write_text(report_of(gather(held, [inspected.id]), NASTY, has_text=True).text, encoding="utf-8")
    seen(browser, file, width=360)
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    assert browser.execute_script("return document.scripts.length") == 0
    assert browser.execute_script("return document.querySelector('h1').textContent").startswith("<script>alert(1)")
    direction = "return getComputedStyle(document.querySelector('.tokens > bdi'), null).unicodeBidi"
    assert browser.execute_script(direction) == "isolate"
    assert console_errors(browser) == [] and requested(browser) <= {file.as_uri()}
