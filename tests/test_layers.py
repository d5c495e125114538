"""The house: imports run one way from room to room, and what must stay light or apart does."""

import ast
import sys
from pathlib import Path

from conftest import python

PACKAGE = Path(__file__).parent.parent / "dsg_cli"
ROWS = (
    ("guardrail.runtime", "intervals"),
    ("errors", "lab.data", "lab.world", "lab.benchmarks"),
    ("methods.__init__", "attacks.__init__", "studies.__init__", "evals.__init__"),
    ("settings",),
    ("workspace",),
    ("recipe", "job"),
    ("data",),
    ("models",),
    ("guardrail",),
    ("inference",),
    ("evals",),
    ("attacks", "inspection"),
    ("methods",),
    ("studies", "lab"),
    ("report",),
    ("export",),
    ("stages",),
    ("cli",),
    ("__main__",),
)
"""From the bottom up: a room imports only from rows above its own in this list, or from itself."""
MAY_KNOW_THE_STORE = ("stages", "report", "export", "cli", "guardrail.loading", "workspace")
HEAVY = ("torch", "transformers", "sae_lens")
LIGHT = ("cli.app", "methods", "attacks", "studies", "evals", "models.releases", "workspace.store", "report.page")
"""Modules that import no torch: help, completion, `ls`, `show` and the report need only these."""


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


MODULES = {module_of(path): path for path in PACKAGE.rglob("*.py")}


def row_of(module: str) -> int:
    """The row of a module: of its own name, or of the nearest room that it lies in."""
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        for number, row in enumerate(ROWS):
            if ".".join(parts[:length]) in row:
                return number
    raise AssertionError(f"{module} has no row")


def imports_of(path: Path) -> set[str]:
    """Modules of the package that a file imports, anywhere in it."""
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dsg_cli."):
            base = node.module.removeprefix("dsg_cli.")
            for alias in node.names:
                inner = next((m for m in (f"{base}.{alias.name}", base) if m in MODULES), f"{base}.__init__")
                imported.add(inner)
    return imported


def room_of(module: str) -> str:
    return "guardrail.runtime" if module.startswith("guardrail.runtime") else module.split(".")[0]


def test_imports_run_one_way():
    for module, path in MODULES.items():
        if module == "__init__" or room_of(module) == "guardrail.runtime":
            continue
        for imported in imports_of(path):
            if room_of(imported) != room_of(module):
                assert row_of(imported) < row_of(module), f"{module} imports {imported}"


def test_no_module_imports_itself_by_a_detour():
    graph = {module: imports_of(path) for module, path in MODULES.items()}
    finished: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail, module))
        if module not in finished:
            for imported in graph[module]:
                visit(imported, (*trail, module))
            finished.add(module)

    for module in graph:
        visit(module, ())


def test_the_core_knows_no_recipe_store_or_terminal():
    for module, path in MODULES.items():
        if not module.startswith((*MAY_KNOW_THE_STORE, "__main__")):
            assert not imports_of(path) & {"recipe", "workspace.store"}, module
        if module != "__init__" and row_of(module) < row_of("report"):
            assert not {room_of(imported) for imported in imports_of(path)} & {"cli", "report"}, module


def test_light_modules_import_no_torch():
    for module in LIGHT:
        code = f"import sys, dsg_cli.{module} as _; print([m for m in {HEAVY} if m in sys.modules])"
        assert python("-c", code).stdout.strip() == "[]", module


def test_help_and_completion_read_no_settings():
    code = "import sys, dsg_cli.cli.app; print('pydantic' in sys.modules)"
    assert python("-c", code).stdout.strip() == "False"


def test_the_runtime_can_be_copied_out_of_the_package():
    """torch, transformers, the standard library, and files of its own folder by relative imports."""
    for path in (PACKAGE / "guardrail" / "runtime").glob("*.py"):
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
