"""SAEs by their names: sae-lens's releases, and repositories that hold SAEs in its format, as local folders.

A release is read through sae-lens, whose loaders know every published format, and kept in sae-lens's own format in
a cache folder: one conversion, then every stage opens a safetensors file and never imports sae-lens for it.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError

from dsg_cli.data.hub import REPOSITORY, cached_commit, fetch_snapshot, hub_errors, list_files
from dsg_cli.errors import DsgError, close_to, nearest, reason_of

CONFIG_FILE, WEIGHTS_FILE = "cfg.json", "sae_weights.safetensors"
ORIGIN_FILE = "origin.json"


@dataclass(frozen=True)
class SaeFolder:
    """Where an SAE's files lie, and which they are."""

    folder: Path
    source: str  # A name that means the same later and elsewhere.
    revision: str = ""  # Commit of the repository that a release was converted from.


@functools.cache
def releases() -> dict[str, dict[str, Any]]:
    """sae-lens's own list of releases: name -> repo_id, model, saes [{id, path}].

    Read from its file: to import sae-lens takes seconds.
    """
    spec = importlib.util.find_spec("sae_lens")
    assert spec is not None and spec.origin is not None
    path = Path(spec.origin).parent / "pretrained_saes.yaml"
    if not path.is_file():
        hint = "Install a version that constraints.txt pins."
        raise DsgError("The installed sae-lens has no list of releases.", hint)
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    listed: dict[str, dict[str, Any]] = loader(path.read_text(encoding="utf-8")).get_single_data()
    return listed


def find_sae(source: str) -> SaeFolder:
    """The folder of `RELEASE/ID`, or of `org/name[@revision][/folder]`; downloaded and converted as needed."""
    repo, subfolder = locate_release(source)
    release, _, sae_id = source.partition("/")
    if release not in releases():
        return _of_repository(repo, subfolder)
    folder = cache_folder() / "saes" / release / sae_id.replace("/", "--")
    if not (folder / ORIGIN_FILE).is_file():
        _convert(release, sae_id, folder)
    origin = json.loads((folder / ORIGIN_FILE).read_text(encoding="utf-8"))
    return SaeFolder(folder, source, origin["revision"])


def locate_release(source: str) -> tuple[str, str]:
    """The repository, with a revision if one is named, and the folder in it that hold an SAE; nothing is read there."""
    release, _, sae_id = source.partition("/")
    if release in releases():
        paths = {str(sae["id"]): str(sae["path"]) for sae in releases()[release]["saes"]}
        if sae_id not in paths:
            begins = [known for known in paths if sae_id and known.startswith(sae_id)] or close_to(sae_id, paths)
            alike = f"Did you mean {' or '.join(begins[:3])}? " if begins else ""
            raise DsgError(
                f"The release {release} has no SAE {sae_id or '(no id was given)'}.",
                f"{alike}`dsg ls saes/{release}` lists its {len(paths)}.",
            )
        return releases()[release]["repo_id"], paths[sae_id]
    close = close_to(release, releases())
    name, _, subfolder = sae_id.partition("/")  # Of `org/name@revision/a/b`.
    repo, subfolder = f"{release}/{name}", subfolder.strip("/")
    if close or not REPOSITORY.fullmatch(repo):
        hint = f"Did you mean {' or '.join(close)}? " if close else ""
        raise DsgError(
            f"There is no SAE {source}: no folder, no release of sae-lens, no repository on the hub.",
            f"{hint}`dsg ls saes` lists the releases; a folder needs {CONFIG_FILE} and {WEIGHTS_FILE}.",
        )
    return repo, subfolder


def cache_folder() -> Path:
    """Where converted SAEs are kept: DSG_CACHE, else dsg-cli in the user's cache."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("DSG_CACHE") or Path(home) / "dsg-cli")


def _of_repository(repo: str, subfolder: str) -> SaeFolder:
    prefix = f"{subfolder}/" if subfolder else ""
    folder = fetch_snapshot(repo, [f"{prefix}{CONFIG_FILE}", f"{prefix}{WEIGHTS_FILE}"])
    if not (folder / subfolder / CONFIG_FILE).is_file():
        held = [path.removesuffix(CONFIG_FILE).strip("/") for path in list_files(repo) if path.endswith(CONFIG_FILE)]
        needs = f"It needs {CONFIG_FILE} and {WEIGHTS_FILE}, as sae-lens saves them."
        hint = nearest(subfolder, held) if held else needs
        raise DsgError(f"The repository {repo} has no SAE in {subfolder or 'its root'}.", hint)
    pinned = f"{repo.partition('@')[0]}@{folder.name}"
    return SaeFolder(folder / subfolder, f"{pinned}/{subfolder}" if subfolder else pinned)


def _convert(release: str, sae_id: str, folder: Path) -> None:
    """Read an SAE through sae-lens and keep it in sae-lens's format; the folder appears whole or not at all."""
    from sae_lens import SAE

    repo = releases()[release]["repo_id"]
    try:
        with hub_errors(repo):
            sae = SAE.from_pretrained(release, sae_id, device="cpu")
    except DsgError:
        raise
    except Exception as error:  # Loaders of many formats, on files of others: they raise anything.
        raise DsgError(f"sae-lens cannot read {release}/{sae_id}: {reason_of(error)}") from error
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=folder.parent, suffix=".partial"))
    try:
        sae.save_model(partial)
        origin = {"release": release, "id": sae_id, "repository": repo, "revision": cached_commit(repo)}
        (partial / ORIGIN_FILE).write_text(json.dumps(origin, indent=1) + "\n", encoding="utf-8")
        mask = os.umask(0)
        os.umask(mask)
        partial.chmod(0o777 & ~mask)  # Others may share the cache.
        if folder.exists() and not (folder / ORIGIN_FILE).is_file():
            shutil.rmtree(folder)  # It was never whole.
        try:
            partial.rename(folder)
        except OSError:
            if not (folder / ORIGIN_FILE).is_file():  # Else another process was faster, with the same.
                raise
    except (OSError, SafetensorError) as error:
        raise DsgError(
            f"The SAE {release}/{sae_id} cannot be kept in {folder.parent}: {reason_of(error, 200)}.",
            "Make room, or name another folder with DSG_CACHE.",
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
