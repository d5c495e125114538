"""Read a guardrail from a workspace, a light file or the hub; write a light file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dsg_cli.data.hub import SCHEME, fetch_file, parse_address
from dsg_cli.errors import DsgError
from dsg_cli.guardrail.guarded import module_from_artifact
from dsg_cli.guardrail.runtime.guardrail import GuardrailModule
from dsg_cli.guardrail.runtime.spec import tensors_digest
from dsg_cli.workspace.artifacts import Guardrail, Header, artifact_digest, parse_document, read_document, to_json
from dsg_cli.workspace.body import Json
from dsg_cli.workspace.files import is_file, is_folder
from dsg_cli.workspace.store import Workspace

LIGHT_FILE = "guardrail.safetensors"  # Its name in a repository or a model folder.
METADATA = "dsg"
TENSORS_DIGEST = "tensors_sha256"


@dataclass(frozen=True)
class LightGuardrail:
    """What a light file holds."""

    header: Header
    body: Guardrail
    json: Json
    module: GuardrailModule


def light_file(header: Header, body: Guardrail, tensors: dict[str, Tensor]) -> bytes:
    """The content of a light file."""
    module = module_from_artifact(body, header.model, tensors, where=header.id)
    data = without_paths(to_json(header, body)) | {"files": {}, TENSORS_DIGEST: tensors_digest(module.tensors())}
    data["sha256"] = artifact_digest(data)
    return save(module.tensors(), metadata={METADATA: json.dumps(data, allow_nan=False)})


def read_light(path: Path) -> LightGuardrail:
    """Read and verify a light file."""
    if not is_file(path):
        raise DsgError(f"There is no file {str(path)[:200]}.")
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(METADATA)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
    except (SafetensorError, OSError) as error:
        hint = "Export or download it again."
        raise DsgError(f"{path} is truncated or no .safetensors file: {error}.", hint) from error
    if text is None:
        raise DsgError(
            f"{path} is no light file: its metadata hold no `{METADATA}`.",
            "Make one with dsg export NAME.safetensors, or give the guardrail's JSON file in a workspace.",
        )
    data = read_document(text, where=str(path))
    if data["kind"] != "guardrail":
        raise DsgError(f"{path} holds no guardrail but {data['kind']}.")
    header, body = parse_document(data, where=str(path))
    assert isinstance(body, Guardrail)
    if tensors_digest(tensors) != data.get(TENSORS_DIGEST):
        raise DsgError(f"{path} was altered after it was written: its tensors do not match their digest.")
    module = module_from_artifact(body, header.model, tensors, where=str(path))
    return LightGuardrail(header, body, data, module)


def without_paths(data: Json) -> Json:
    """A guardrail's JSON object without the paths of a machine: of each, the last part remains."""
    cut: Json = {key: [without_path(name) for name in data[key]] for key in ("forget", "retain")}
    cut["model"] = {**data["model"], "source": without_path(data["model"]["source"])}
    if data["sae"]:
        cut["sae"] = {**data["sae"], "source": without_path(data["sae"]["source"])}
    return {**data, **cut}


def without_path(source: str) -> str:
    """The last part of a path; names of the hub and of the lab as they are. Artifacts hold no path but whole ones."""
    return (Path(source).name or source) if Path(source).is_absolute() else source


def load_guardrail(source: str | Path) -> GuardrailModule:
    """Read and verify a guardrail.

    `source` is the JSON file of a workspace (`dsg-workspace/guardrail-001.json`); a light file (`.safetensors`) or an
    exported folder that holds one; or a repository on the hub (`hf://org/name`, `hf://org/name@revision`).
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
    """Where a light file lies: itself, the one in an exported folder, or one from the hub in the local cache."""
    if str(source).startswith(SCHEME):
        address = parse_address(str(source))
        return fetch_file(address, address.file or LIGHT_FILE)
    return Path(source) / LIGHT_FILE if is_folder(Path(source)) else Path(source)
