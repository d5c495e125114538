"""What READMEs show is true: commands parse, links exist, their Python runs, and the tree is that of the package."""

from __future__ import annotations

import itertools
import re
import shlex
import shutil
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
READMES = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for path in (ROOT / "README.md", *ROOT.glob("recipes/README.md"), *sorted(ROOT.glob("dsg_cli/**/README.md")))
}
COMMANDS = {
    command
    for text in READMES.values()
    for block in re.findall(r"```bash\n(.*?)```", text, flags=re.S)
    for command in re.findall(r"(?:^|\(|&& \S*/)(dsg [^)\n]*)", block, flags=re.M)
}
ROOMS = ("", "guardrail", "workspace", "evals", "attacks", "methods", "inspection", "export", "lab")


def test_every_room_that_a_user_may_change_has_a_readme():
    assert {(Path("dsg_cli") / room / "README.md").as_posix() for room in ROOMS} | {"recipes/README.md"} <= {*READMES}
    assert len(COMMANDS) >= 60


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_and_its_settings_are_understood(dsg, command):
    """Flags are known (--help comes after them); settings and choices are those of the recipe."""
    from dsg_cli.recipe import load_recipe

    words = shlex.split(command.split(" > ")[0])[1:]
    code, _, err = dsg(*words, "--help")
    assert code == 0, err
    load_recipe(sets=[value for flag, value in itertools.pairwise(words) if flag == "--set"])


def test_every_link_leads_to_a_file():
    for name, text in READMES.items():
        for link in re.findall(r"\]\(((?!http)[^)]+)\)", text):
            assert (ROOT / name).parent.joinpath(link).exists(), f"{name}: {link}"


def test_the_python_of_the_readme_runs_as_it_stands(dsg, capsys):
    """In an order in which a person would: export the lab, make a guardrail and a model, then paste."""
    shutil.copytree(ROOT / "tests" / "data" / "schema-2", "dsg-workspace", ignore=shutil.ignore_patterns("features-*"))
    for command in ("lab export lab", "export my-guarded-model"):
        assert dsg(*command.split())[0] == 0
    capsys.readouterr()
    held = {}
    for block in re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL):
        exec(block, held)
    out = capsys.readouterr().out
    assert "grim hex Rahurk? Answer:" in out and held["guardrail"].counters()["n_gated"] == 1
    frozen = [name for name, parameter in held["model"].named_parameters() if not parameter.requires_grad]
    assert any("layers.0." in name for name in frozen) and not any("layers.3." in name for name in frozen)


def test_set_up_commands_are_there_word_for_word():
    assert "\npython3 -m venv .venv && .venv/bin/pip install -c constraints.txt . && .venv/bin/dsg demo\n" in README
    install = '.venv/bin/pip install -c constraints.txt -e ".[test]"'
    assert f"\npython3 -m venv .venv && {install} && .venv/bin/pytest\n" in README


def test_the_file_tree_is_true():
    """Of what it names there is something, and every room is named."""
    tree = set(re.findall(r"^  ([a-z_]+(?:\.py|/))", README.split("## Files")[1].split("```")[1], flags=re.M))
    rooms = {f"{path.parent.name}/" for path in (ROOT / "dsg_cli").glob("*/__init__.py")}
    assert rooms <= tree and all((ROOT / "dsg_cli" / name).exists() for name in tree), rooms ^ tree


def test_the_changelog_names_the_version():
    from dsg_cli import __version__

    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_constraints_pin_every_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "constraints.txt").read_text().lower().replace("_", "-").splitlines()
    pins = dict(line.split("==") for line in lines if "==" in line)
    assert pins["torch"] == "2.13.0"
    extras = project["optional-dependencies"]
    for requirement in [*project["dependencies"], *extras["test"], *extras["lora"]]:
        if not requirement.startswith("dsg-cli["):
            assert re.split(r"[<>=\[]", requirement)[0].lower() in pins, requirement
