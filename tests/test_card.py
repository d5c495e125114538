"""Model cards of exports: what the hub reads in them, what people do, and that names in them stay names."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from dsg_cli.artifacts import SCHEMAS, Guardrail
from dsg_cli.export.base_card import BaseCard, read_base_card
from dsg_cli.export.card_metadata import front_matter
from dsg_cli.report.markdown import code, escaped
from dsg_cli.stages.card import card_facts
from dsg_cli.stages.subject import find_subject, guard_modules
from handmade import HEADER, attack, report
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from safetensors.torch import load_file

from dsg_cli.export.card import model_card
from dsg_cli.lab import data as lab
from dsg_cli.recipe import load_recipe
from dsg_cli.stages import export
from dsg_cli.workspace import Workspace

pytestmark = pytest.mark.usefixtures("one_thread")
DATA = Path(__file__).parent / "data"
EVAL, ATTACK = "eval", "attack"


def judge(workspace, guardrail, kind=EVAL, body=None, **changed):
    """An evaluation or an attack made by hand, of a guardrail in a workspace."""
    header = replace(HEADER, kind=kind, schema=SCHEMAS[kind], inputs=[guardrail.as_input()], **changed)
    return workspace.write(header, body or (report() if kind == EVAL else attack()))


@pytest.fixture
def workspace(tmp_path):
    """A guardrail that can write, its threshold, an evaluation and an attack."""
    for path in (DATA / "schema-2").glob("[gt]*-001.*"):
        (tmp_path / "w").mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / "w")
    made = Workspace(tmp_path / "w")
    judge(made, made.read("guardrail-001"))
    judge(made, made.read("guardrail-001"), ATTACK)
    return made


def facts_of(workspace, **changed):
    subject = find_subject(workspace, ["guardrail-001"])
    said = {"name": "mine", "address": "mine", "is_on_hub": False, "is_whole_model": True, "instead": None}
    return card_facts(
        workspace, subject, guard_modules(workspace, subject), **{**said, "is_mismatched": False, **changed}
    )


def loaded(text, tmp_path):
    """A card as the hub's own client reads it from a file."""
    path = tmp_path / "README.md"
    path.write_text(text, encoding="utf-8")
    return ModelCard.load(path)


def code_of(text):
    [block] = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    return block


class TestWhatIsWritten:
    def test_a_model_folder(self, dsg, workspace, tmp_path, capsys):
        code_, _, err = dsg("export", "my guarded `model`", "-w", workspace.folder)
        assert code_ == 0, err
        card = ModelCard.load("my guarded `model`/README.md")
        said = card.data
        assert (said.license, said.language, said.library_name) == ("apache-2.0", ["en"], "transformers")
        assert said.pipeline_tag == "text-generation" and {"unlearning", "guardrail"} <= set(said.tags)
        assert "base_model" not in yaml.safe_load(card.content.split("---")[1])  # The lab is no repository of the hub.
        found = {(one.dataset_name, one.metric_type): one for one in said.eval_results}
        assert found["lab-hexes", "accuracy"].metric_value == 0.7 and found["gsm", "exact_match"].metric_value == 0.5
        assert set(found) == {("lab-hexes", "accuracy"), ("a|b", "accuracy"), ("gsm", "exact_match")}
        assert "eval-001" in found["a|b", "accuracy"].metric_name and found["a|b", "accuracy"].dataset_split == "test"
        threshold = workspace.read("threshold-001")
        lengths = threshold.header.settings["lengths"]
        for words in (
            "| `lab-hexes` | `test` | 0.800 | 0.700 [0.560, 0.810] | 0.980 | 50 | `eval-001` |",
            r"| `a\|b` | `test` | 1.000 | 0.500 | 0.250 | 1000 | `eval-001` |",
            r"| `dilution` | `a\|b` | `test` | 0.000 | 0.480 | `48 benign tokens` | 0.900 | - | `attack-001` |",
            "To forget: `lab-hexes`.",
            "The knowledge is still in the weights, which lie in this folder.",
            "Not tried: `split`, ",
            f"{threshold.body.alpha:g} of further texts of {lengths[0]} to {lengths[1]} tokens like those of",
            f"| all retain text | to keep | {threshold.body.false_positive_rate:.3f} [",
        ):
            assert words in card.text, words
        for artifact_id in ("threshold-001", "guardrail-001", "eval-001", "attack-001"):
            assert workspace.read(artifact_id).json["sha256"] in card.text
        exec(code_of(card.text), {})  # Where it was written, as it stands.
        assert "'n_sequences': 1" in capsys.readouterr().out

    @pytest.mark.parametrize("schema", ["schema-1", "schema-2"])
    def test_light_files(self, dsg, tmp_path, capsys, schema):
        """Of a gate that can write, and of one that needs whole sequences."""
        shutil.copytree(DATA / schema, tmp_path / "w", ignore=shutil.ignore_patterns("features-*", "eval-*"))
        assert dsg("export", "light", "--form", "light", "-w", tmp_path / "w")[0] == 0
        assert sorted(path.name for path in Path("light").iterdir()) == ["README.md", "guardrail.safetensors"]
        card = ModelCard.load("light/README.md")
        assert card.data.library_name == "dsg-cli" and card.data.eval_results is None
        assert ("a mean over the sequence" in card.text) == (schema == "schema-1")
        assert dsg("lab", "export", "lab")[0] == 0
        capsys.readouterr()
        exec(code_of(card.text), {})
        assert "'n_sequences': 1" in capsys.readouterr().out

    def test_without_evaluations_it_says_how_to_make_them(self, dsg, tmp_path):
        shutil.copytree(DATA / "schema-4", tmp_path / "w", ignore=shutil.ignore_patterns("eval-*"))
        assert dsg("export", "light", "--form", "light", "-w", tmp_path / "w")[0] == 0
        card = ModelCard.load("light/README.md")
        assert "model-index" not in card.content
        commands = re.findall(r"```bash\n(.*?)\n```", card.text)
        assert commands == [
            "dsg eval --from guardrail-001 --bench BENCH",
            "dsg attack --from guardrail-001 --kind all",
        ]
        for command in commands:
            assert dsg(*command.split()[1:], "--help")[0] == 0
        assert "the threshold that it was made from was not at hand" in card.text

    def test_what_apply_exports_has_one(self, dsg, tmp_path):
        for path in (DATA / "schema-2").glob("threshold-001.*"):
            (tmp_path / "w").mkdir(exist_ok=True)
            shutil.copy(path, tmp_path / "w")
        code_, out, err = dsg("apply", "--strength", "4r", "--export", "model", "-w", tmp_path / "w")
        assert code_ == 0, err
        card = ModelCard.load("model/README.md")
        assert f"`{out.strip()}`" in card.text and "No evaluation of it was at hand" in card.text


class TestWhatCounts:
    def test_the_newest_of_each_bench_and_split(self, workspace):
        guardrail = workspace.read("guardrail-001")
        results = {"lab-hexes": {"base": {"acc": 0.8, "n": 9}, "unlearned": {"acc": 0.2, "n": 9}}}
        judge(workspace, guardrail, body=replace(report(), results=results), settings={"benches": ["lab-hexes"]})
        judge(workspace, guardrail, body=replace(report(), results=results, split="dev"))
        text = model_card(facts_of(workspace))
        rows = [line for line in text.splitlines() if line.startswith("| `lab-hexes` | `")]
        assert [row.split(" | ")[-1] for row in rows] == ["`eval-002` |", "`eval-003` |"]
        assert "dev questions, on which settings may have been chosen" in text
        index = yaml.safe_load(text.split("---\n")[1])["model-index"][0]["results"]
        assert sorted(one["dataset"]["split"] for one in index) == ["dev", "test", "test", "test"]

    def test_of_this_guardrail_on_its_own_weights_and_whole(self, workspace):
        other = workspace.write(
            replace(workspace.read("guardrail-001").header, seed=9, inputs=[]),
            workspace.read("guardrail-001").body,
            tensors=load_file(workspace.folder / "guardrail-001.safetensors"),
        )
        judge(workspace, other)
        judge(workspace, workspace.read("guardrail-001"), settings={"benches": [], "allow_mismatch": True})
        damaged = judge(workspace, workspace.read("guardrail-001"))
        damaged.path.write_text(damaged.path.read_text().replace("0.7", "0.1"))
        assert [stored.id for stored in facts_of(workspace).evaluations] == ["eval-001"]

    def test_on_other_weights_nothing_was_measured(self, workspace, tmp_path):
        text = model_card(facts_of(workspace, instead="lab-retrain", is_mismatched=True))
        assert "Nothing was measured on these" in text and "model-index" not in text and "| base |" not in text
        assert "`lab-retrain`" in text

    def test_a_base_of_the_hub(self, workspace, tmp_path):
        facts = replace(facts_of(workspace), model="org/mo-del@abc", base="org/mo-del@abc", is_whole_model=False)
        facts = replace(facts, base_card=BaseCard(("gemma",), "", "https://example.org/terms", ("no", "en")))
        said = loaded(front_matter(facts), tmp_path).data
        assert (said.base_model, said.base_model_relation) == ("org/mo-del", "adapter")
        assert said.license == "gemma" and said.license_link.endswith("/terms") and said.language == ["no", "en"]
        text = model_card(facts)
        assert 'from_pretrained("org/mo-del", revision="abc")' in text and "`https://example.org/terms`" in text

    def test_features_that_were_picked_by_description(self, workspace):
        facts = facts_of(workspace)
        features = Workspace(DATA / "schema-3").read("features-001")
        features = replace(features, body=replace(features.body, described={"query": "hex <b> | curse"}))
        stored = replace(facts.guards[0].stored, body=replace(facts.guards[0].body, forget=[]))
        facts = replace(facts, guards=[replace(facts.guards[0], stored=stored, features=features)])
        text = model_card(facts)
        assert "from answering about `hex <b> | curse`." in text and "To forget: no corpus." in text
        assert "picked by their descriptions, for the words `hex <b> | curse`" in text and features.id in text
        assert "what its features stand for" in model_card(
            replace(facts, guards=[replace(facts.guards[0], features=None)])
        )

    def test_a_licence_that_is_not_known_is_not_invented(self, workspace, tmp_path):
        text = model_card(replace(facts_of(workspace), base_card=BaseCard(), base="/home/someone/secret/base"))
        assert loaded(text, tmp_path).data.license is None and "which is not known here" in text
        assert "someone" not in text and "`base`" in text


HOSTILE = [
    "<script>alert(1)</script>",
    "a|b",
    "two\n---\nlines",
    "`tick` *b*",
    "[x](javascript:1)",
    "rtl\u202etxt",
    "a\\",
]


class TestNamesStayNames:
    @pytest.fixture
    def hostile(self, tmp_path):
        stored = Workspace(DATA / "schema-2").read("guardrail-001")
        workspace = Workspace(tmp_path / "w")
        forget = [*HOSTILE, "/home/someone/secret/hazard.jsonl"]
        note = "Read <b>/home/someone/secret/notes.txt</b> | and www.example.org, https://example.org"
        guardrail = workspace.write(
            replace(stored.header, notes=[note], inputs=[]),
            replace(stored.body_as(Guardrail), forget=forget),
            tensors=load_file(stored.path.with_suffix(".safetensors")),
        )
        sides = {"base": {"acc": 1.0, "n": 8}, "unlearned": {"acc": 0.25, "n": 8}}
        body = replace(report(), results=dict.fromkeys(HOSTILE, sides), gate={})
        judge(workspace, guardrail, body=body, settings={"benches": HOSTILE})
        for name in HOSTILE:
            judge(workspace, guardrail, ATTACK, replace(attack(), bench=name, threat_model=name))
        return workspace

    def test_front_matter(self, hostile, tmp_path):
        facts = facts_of(hostile, name=HOSTILE[2] + HOSTILE[0])
        card = loaded(model_card(facts), tmp_path)
        assert len(card.data.eval_results) == len(HOSTILE) and card.data.model_name == "two --- lines" + HOSTILE[0]
        assert {one.metric_value for one in card.data.eval_results} == {0.25}
        assert {"a|b", "two --- lines", HOSTILE[0]} <= {one.dataset_name for one in card.data.eval_results}

    def test_text(self, hostile):
        text = model_card(facts_of(hostile, name=HOSTILE[0], address='x"\n```\n<script>'))
        assert "someone" not in text and "\u202e" not in text
        body = text.split("---\n", 2)[2]
        tokens = MarkdownIt("commonmark", {"linkify": False}).enable("table").parse(body)
        inline = [child for token in tokens if token.children for child in token.children]
        assert not [one for one in [*tokens, *inline] if one.type.startswith("html")]
        assert {one.attrs["href"] for one in inline if one.type == "link_open"} == {"https://arxiv.org/abs/2504.08192"}
        assert [token.tag for token in tokens if token.type == "heading_open"].count("h1") == 1
        assert len([token for token in tokens if token.type == "fence"]) == 1
        tables = body.split("\n\n")
        for table in (MarkdownIt().enable("table").render(part) for part in tables if part.startswith("|")):
            cells = {row.count("<td>") for row in table.split("<tr>")[2:]}
            assert len(cells) == 1, table
        for name in (HOSTILE[0], "two --- lines", "[x](javascript:1)"):
            assert code(name) in body

    def test_running_text_and_code(self):
        assert escaped("a <b> & *c* www.x.org") == r"a &lt;b&gt; &amp; \*c\* www\.x.org"
        assert code("a`b\n|c", in_table=True) == r"`a'b \|c`" and code("x\u202ey") == "`x?y`"


@pytest.mark.parametrize(
    ("text", "known"),
    [
        (
            "---\nlicense: gemma\nlanguage: [en, no]\n---\n# x",
            BaseCard(("gemma",), languages=("en",)),
        ),  # `no` is False.
        (
            "---\nlicense: other\nlicense_name: mine\nlicense_link: LICENSE\n---\n",
            BaseCard(("other",), "mine", "LICENSE"),
        ),
        ("---\nlicense: [mit, apache-2.0]\n---", BaseCard(("mit", "apache-2.0"))),
        ("---\r\nlicense: mit\r\n---\r\n", BaseCard(("mit",))),
        ("---\nlicense: '<script>'\nlicense_name: [x]\nlanguage: {a: b}\n---\n", BaseCard()),
        ("---\nlicense: !!python/object:os.system x\n---\n", BaseCard()),
        ("---\nlicense: [[[\n---\n", BaseCard()),
        ("---\nlicense: 2020-99-99\n---\n", BaseCard()),
        ("---\n- license\n---\n", BaseCard()),
        ("---\n" + "[" * 5000 + "\n---\n", BaseCard()),
        ("# license: mit", BaseCard()),
        ("", BaseCard()),
        (None, BaseCard()),
    ],
)
def test_what_the_base_s_card_says(tmp_path, text, known):
    if text is not None:
        (tmp_path / "README.md").write_bytes(text.encode())
    assert read_base_card(str(tmp_path)) == known


def test_a_card_that_is_no_text(tmp_path):
    (tmp_path / "README.md").write_bytes(b"---\nlicense: \xff\n---\n")
    assert read_base_card(str(tmp_path)) == BaseCard()


def test_a_folder_of_the_users_own(tmp_path, workspace, monkeypatch):
    """Its own card says the licence; its path is told to nobody."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "secret" / "base"
    shutil.copytree(lab.MODEL_DIR, folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    stored = workspace.read("guardrail-001")
    other = Workspace(tmp_path / "other")
    other.write(
        replace(stored.header, model=replace(stored.header.model, source=str(folder)), inputs=[]),
        stored.body,
        tensors=load_file(stored.path.with_suffix(".safetensors")),
    )
    export.run(load_recipe(None, sets=[], flags={}), other, "out")
    card = ModelCard.load("out/README.md")
    assert card.data.license == "mit" and "secret" not in card.content and "`base`" in card.text
    assert json.loads(Path("out/config.json").read_text())["model_type"].startswith("dsg_")
