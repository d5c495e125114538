"""The light file: a guardrail as one `.safetensors`, with the artifact's JSON in its metadata.

It is all that `load_guardrail` needs. Paths of the machine that it was made on are cut to their last part.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dsg_cli.artifacts import Guardrail, Header, Json, to_json
from dsg_cli.errors import DsgError
from dsg_cli.guardrail import GuardrailModule, module_from_artifact
from dsg_cli.integrity import digest_of, is_file, parse_document, read_document
from dsg_cli.migrations import migrate
from dsg_cli.runtime.spec import tensors_digest

LIGHT_FILE = "guardrail.safetensors"
"""Its name in a repository or a model folder."""
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
    """The content of a light file.

    Raises:
        DsgError: A tensor is missing or not finite.
    """
    module = module_from_artifact(body, header.model, tensors, where=header.id)
    data = without_paths(to_json(header, body)) | {"files": {}, TENSORS_DIGEST: tensors_digest(module.tensors())}
    data["sha256"] = digest_of(data)
    return save(module.tensors(), metadata={METADATA: json.dumps(data, allow_nan=False)})


def read_light(path: Path) -> LightGuardrail:
    """Read and verify a light file.

    Raises:
        DsgError: Missing, no guardrail, truncated, altered, of a newer schema, or with values that are not finite.
    """
    if not is_file(path):
        raise DsgError(f"There is no file {str(path)[:200]}.")
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(METADATA)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
    except (SafetensorError, OSError) as error:
        raise DsgError(
            f"{path} is truncated or no .safetensors file: {error}.", "Export or download it again."
        ) from error
    if text is None:
        raise DsgError(
            f"{path} is no light file: its metadata hold no `{METADATA}`.",
            "Make one with dsg export NAME.safetensors, or give the guardrail's JSON file in a workspace.",
        )
    data = read_document(text, where=str(path))
    if data["kind"] != "guardrail":
        raise DsgError(f"{path} holds no guardrail but {data['kind']}.")
    data = migrate(data)
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
