"""A guardrail by its name: the first of the two lines by which one is put on a model."""

from __future__ import annotations

from pathlib import Path

from dsg_cli.artifacts import Guardrail
from dsg_cli.errors import DsgError
from dsg_cli.export.light import LIGHT_FILE, read_light
from dsg_cli.guardrail import GuardrailModule, module_from_artifact
from dsg_cli.hub import SCHEME, fetch_file, parse_address
from dsg_cli.integrity import is_folder
from dsg_cli.workspace import Workspace


def load_guardrail(source: str | Path) -> GuardrailModule:
    """Read and verify a guardrail.

    Args:
        source: The JSON file of a workspace (`dsg-workspace/guardrail-001.json`); a light file (`.safetensors`) or an
            exported folder that holds one; or a repository on the hub (`hf://org/name`, `hf://org/name@revision`).

    Raises:
        DsgError: Missing, altered, incomplete, of a newer schema, no guardrail, or with values that are not finite.
    """
    path = Path(source)
    if str(source).startswith(SCHEME) or path.suffix == ".safetensors" or is_folder(path):
        return read_light(light_path(source)).module
    workspace = Workspace(path.parent)
    stored = workspace.read(str(path))
    if not isinstance(stored.body, Guardrail):
        raise DsgError(f"{path} is no guardrail.", "Give the JSON file that dsg apply wrote.")
    return module_from_artifact(stored.body, stored.header.model, workspace.tensors(stored), where=str(path))


def light_path(source: str | Path) -> Path:
    """Where a light file lies: itself, the one in an exported folder, or one from the hub in the local cache.

    Raises:
        DsgError: No such repository, revision or file on the hub, or no access.
    """
    if str(source).startswith(SCHEME):
        address = parse_address(str(source))
        return fetch_file(address, address.file or LIGHT_FILE)
    return Path(source) / LIGHT_FILE if is_folder(Path(source)) else Path(source)
