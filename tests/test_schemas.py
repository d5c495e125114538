"""Artifacts of every schema that was ever written can still be read."""

import shutil
from pathlib import Path

import pytest
from dsg_cli.artifacts import KINDS, SCHEMAS

from dsg_cli.report.tables import artifact_table, headline
from dsg_cli.workspace import Workspace

DATA = Path(__file__).parent / "data"


def _all_but(kind):
    return lambda folder, names: [n for n in names if Path(folder).parent == DATA and not n.startswith(f"{kind}-")]


@pytest.mark.parametrize("kind", KINDS)
def test_every_schema_of_every_kind_is_kept_and_reads(kind, tmp_path):
    for schema in range(1, SCHEMAS[kind] + 1):
        workspace = Workspace(tmp_path / str(schema))
        # Alone: those of one schema are not all of one chain.
        shutil.copytree(DATA / f"schema-{schema}", workspace.folder, ignore=_all_but(kind))
        stored = workspace.find(kind)
        assert stored.header.kind == kind and isinstance(stored.body, KINDS[kind])
        assert headline(stored) and artifact_table(stored)
        if stored.path.with_suffix(".safetensors").exists():
            assert workspace.tensors(stored)
