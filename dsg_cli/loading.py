"""A guardrail file to a module: the first of the two lines by which a guardrail is put on a model."""

from __future__ import annotations

from pathlib import Path

from dsg_cli.artifacts import Guardrail
from dsg_cli.errors import DsgError
from dsg_cli.guardrail import GuardrailModule, module_from_artifact
from dsg_cli.workspace import Workspace


def load_guardrail(path: str | Path) -> GuardrailModule:
    """Read and verify a guardrail of a workspace.

    Args:
        path: Of its JSON file, such as `dsg-workspace/guardrail-001.json`.

    Raises:
        DsgError: Missing, altered, incomplete, of a newer schema, no guardrail, or with values that are not finite.
    """
    path = Path(path)
    workspace = Workspace(path.parent)
    stored = workspace.read(str(path))
    if not isinstance(stored.body, Guardrail):
        raise DsgError(f"{path} is no guardrail.", "Give the JSON file that dsg apply wrote.")
    return module_from_artifact(stored.body, stored.header.model, workspace.tensors(stored), where=str(path))
