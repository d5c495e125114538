"""Imports run one way: a module imports only from rows above its own, or from its own package."""

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "dsg_cli"
ROWS = (
    ("runtime",),
    ("provenance",),
    ("measured",),
    (
        "errors",
        "progress",
        "artifacts",
        "shapes",
        "lab.data",
        "lab.settings",
        "lab.words",
        "lab.world",
        "lab.benchmarks",
    ),
    (
        "interruption",
        "locks",
        "migrations",
        "conversion",
        "secrets",
        "strength",
        "metrics",
        "methods.names",
        "methods.settings",
        "methods.comparison",
    ),
    ("studies.names", "studies.settings"),
    ("integrity", "hub", "catalogue"),
    ("committing", "workers", "checkpoints"),
    ("releases", "documents"),
    ("hub_data", "adapters"),
    ("corpora", "prompt_files", "keywords", "tokens", "model", "expect", "calibration", "selection"),
    ("descriptions", "ranking"),
    ("neuronpedia", "embedding"),
    ("neuronpedia_export",),
    ("sae", "residuals", "fitting", "streaming"),
    ("scoring", "prompting", "pooling"),
    ("slicing", "directions", "lens", "doubts", "fit", "pieces", "wrapper_module"),
    ("statistics", "contexts", "guardrail", "wrapper"),
    ("effect", "probe", "protection", "roles", "describing"),
    ("tracing",),
    ("scorer", "benches"),
    ("sides", "harness"),
    ("evaluation",),
    ("paper_evaluation", "lm_eval_files", "generation", "attacks"),
    ("writing",),
    ("text_answers",),
    ("text_evaluation",),
    ("methods",),
    ("lab.language_model", "lab.autoencoder", "lab.training", "lab.export"),
    ("settings",),
    ("select_checks",),
    ("recipe", "workspace", "detection"),
    (
        "report.markdown",
        "report.metrics",
        "report.console",
        "report.methods",
        "report.guardrails",
        "report.expectations",
        "report.attacks",
        "report.evaluations",
    ),
    ("export", "studies", "live"),
    ("loading",),
    ("stages",),
    ("report",),
    ("cli",),
    ("__main__",),
)
MODULES = sorted(
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
    if path.parent != PACKAGE or path.name != "__init__.py"
)


def row_of(module: str) -> int | None:
    """The row of a module or of the package it lies in; None for the roots, which hold no code."""
    for number, row in enumerate(ROWS):
        if module in row or module.split(".")[0] in row:
            return number
    return None


def imports_of(module: str) -> set[str]:
    path = PACKAGE / Path(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dsg_cli"):
            base = (node.module or "").removeprefix("dsg_cli").removeprefix(".")
            for alias in node.names:
                inner = f"{base}.{alias.name}".lstrip(".")
                found.add(inner if inner in MODULES else base)
    return found - {""}


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_one_way(module):
    own = row_of(module)
    if module == "lab":
        return
    assert own is not None, f"{module} has no row"
    for imported in imports_of(module):
        if imported.split(".")[0] == module.split(".")[0]:
            continue
        other = row_of(imported)
        assert other is not None and other < own, f"{module} (row {own}) imports {imported} (row {other})"


def test_the_core_knows_no_recipe_workspace_or_terminal():
    first = next(number for number, row in enumerate(ROWS) if "settings" in row)
    core = {name for row in ROWS[:first] for name in row}
    for module in MODULES:
        if module in core or module.split(".")[0] in core:
            assert not {name.split(".")[0] for name in imports_of(module)} & {"recipe", "workspace", "cli", "report"}


def test_files_and_commands_stay_short():
    for path in PACKAGE.rglob("*.py"):
        n_lines = len(path.read_text().splitlines())
        assert n_lines <= 300, f"{path.name} has {n_lines} lines"
        if path.parent.name == "cli" and path.name not in {"app.py", "output.py"}:
            assert n_lines <= 110, f"cli/{path.name} has {n_lines} lines"


def test_the_runtime_can_be_copied_out_of_the_package():
    """torch, transformers, the standard library, and files of its own folder by relative imports."""
    for path in (PACKAGE / "runtime").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                assert node.module.split(".")[0] in {*sys.stdlib_module_names, "torch", "transformers"}, path.name
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 1 and (path.parent / f"{node.module}.py").exists(), path.name


def _is_false(value):
    return isinstance(value, ast.Constant) and value.value is False


def test_no_pickle_no_remote_code():
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        for banned in ("import pickle", "torch.load(", "torch.save(", "yaml.load("):
            assert banned not in text, f"{path.name}: {banned}"
        for call in (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)):
            trusted = [keyword.value for keyword in call.keywords if keyword.arg == "trust_remote_code"]
            # Off, or what the user said, handed on.
            assert all(_is_false(value) or ast.unparse(value).endswith("trust_remote_code") for value in trusted)
