"""Every command that the README shows parses, and every file that it names exists."""

from __future__ import annotations

import itertools
import re
import shlex
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


README = (ROOT / "README.md").read_text()


BLOCKS = re.findall(r"```bash\n(.*?)```", README, flags=re.S)


COMMANDS = sorted(
    {match for block in BLOCKS for match in re.findall(r"(?:^|\(|&& \S*/)(dsg [^)\n]*)", block, flags=re.M)}
)


def test_there_are_commands_to_test():
    assert len(COMMANDS) >= 12 and any(command.startswith("dsg select") for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_and_its_settings_are_understood(dsg, command):
    """Flags are known (--help comes after them); settings and choices are those of the recipe."""
    from dsg_cli.recipe import load_recipe

    words = shlex.split(command.split(" > ")[0])[1:]
    code, _, err = dsg(*words, "--help")
    assert code == 0, err
    load_recipe(sets=[value for flag, value in itertools.pairwise(words) if flag == "--set"])


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
    frozen = [name for name, one in held["model"].named_parameters() if not one.requires_grad]
    assert any("layers.0." in name for name in frozen) and not any("layers.3." in name for name in frozen)


def test_set_up_commands_are_there_word_for_word():
    assert "\npython3 -m venv .venv && .venv/bin/pip install -c constraints.txt . && .venv/bin/dsg demo\n" in README
    install = '.venv/bin/pip install -c constraints.txt -e ".[test]"'
    assert f"\npython3 -m venv .venv && {install} && .venv/bin/pytest\n" in README


def test_the_file_tree_is_true():
    tree = README.split("## Files")[1].split("```")[1]
    for name in re.findall(r"^  ([a-z_]+(?:\.py|/))", tree, flags=re.M):
        assert (ROOT / "dsg_cli" / name).exists(), name
    for link in re.findall(r"\]\(((?!http)[^)]+)\)", README):
        assert (ROOT / link).exists(), link


def test_the_changelog_names_the_version():
    from dsg_cli import __version__

    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_constraints_pin_every_dependency():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = dict(
        line.lower().replace("_", "-").split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    )
    assert pins["torch"] == "2.13.0"
    extras = project["optional-dependencies"]
    for requirement in [*project["dependencies"], *extras["test"], *extras["lora"]]:
        if not requirement.startswith("dsg-cli["):
            assert re.split(r"[<>=\[]", requirement)[0].lower() in pins, requirement
