"""The Hugging Face hub: addresses, files from it, folders to it, and its errors as sentences.

Tokens are those of huggingface_hub (HF_TOKEN, or `hf auth login`); HF_ENDPOINT names another hub.
"""

from __future__ import annotations

import errno
import importlib
import importlib.util
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsg_cli.data.catalogue import HubText
from dsg_cli.data.readers import Documents, of_dataset
from dsg_cli.errors import DsgError, reason_of

SCHEME = "hf://"
REPOSITORY = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w./-]+))?")  # org/name, or org/name@revision.


@dataclass(frozen=True)
class HubAddress:
    """A model repository, at a revision, and perhaps a file in it."""

    repo: str
    revision: str | None = None
    file: str | None = None

    def __str__(self) -> str:
        at = f"@{self.revision}" if self.revision else ""
        return f"{SCHEME}{self.repo}{at}" + (f"/{self.file}" if self.file else "")


def parse_address(text: str) -> HubAddress:
    """`hf://org/name`, `hf://org/name@revision`, `hf://org/name/file`."""
    match = re.fullmatch(r"hf://([\w.-]+/[\w.-]+)(?:@([\w./-]+?))?(?:/([\w.-]+\.safetensors))?/?", text)
    if match is None:
        raise DsgError(f"{text} is no address on the hub.", "Write hf://org/name or hf://org/name@revision.")
    return HubAddress(match[1], match[2], match[3])


def fetch_file(address: HubAddress, name: str) -> Path:
    """A file of a repository, from the local cache if it is there."""
    from huggingface_hub import hf_hub_download

    with hub_errors(address.repo):
        return Path(hf_hub_download(address.repo, name, revision=address.revision))


def fetch_snapshot(text: str, patterns: Sequence[str], *, kind: str = "model") -> Path:
    """The folder of org/name or org/name@revision in the local cache, named after the commit; downloaded as needed.

    Only files that match one of the shell patterns are fetched; `kind` is `model` or `dataset`.
    """
    from huggingface_hub import snapshot_download

    repo, revision = _split(text)
    with hub_errors(repo):
        return Path(snapshot_download(repo, repo_type=kind, revision=revision, allow_patterns=list(patterns)))


def _split(text: str) -> tuple[str, str | None]:
    match = REPOSITORY.fullmatch(text)
    assert match is not None
    return match[1], match[2]


def list_files(text: str, *, kind: str = "model") -> list[str]:
    """Paths of all files of org/name or org/name@revision."""
    from huggingface_hub import HfApi

    repo, revision = _split(text)
    with hub_errors(repo):
        return sorted(HfApi().list_repo_files(repo, repo_type=kind, revision=revision))


def download_size(text: str, patterns: Sequence[str], *, kind: str = "model") -> int:
    """Bytes of the files of org/name or org/name@revision that a run would read, as the hub lists them."""
    from fnmatch import fnmatch

    from huggingface_hub import HfApi

    repo, revision = _split(text)
    with hub_errors(repo):
        info = HfApi().repo_info(repo, repo_type=kind, revision=revision, files_metadata=True)
    files = getattr(info, "siblings", None) or []
    return sum(file.size or 0 for file in files if any(fnmatch(file.rfilename, pattern) for pattern in patterns))


def cached_commit(repo: str, *, kind: str = "model") -> str:
    """The commit of a repository's main branch that the local cache last saw; empty if it never did."""
    from huggingface_hub import constants

    reference = Path(constants.HF_HUB_CACHE) / f"{kind}s--{repo.replace('/', '--')}" / "refs" / "main"
    return reference.read_text().strip() if reference.is_file() else ""


def cached_file(text: str, name: str) -> Path | None:
    """A file of org/name or org/name@revision as the local cache has it; None if it does not."""
    from huggingface_hub import try_to_load_from_cache

    repo, revision = _split(text)
    path = try_to_load_from_cache(repo, name, revision=revision)
    return Path(path) if isinstance(path, str) else None


def push_folder(address: HubAddress, folder: Path, *, marker: str, is_public: bool) -> str:
    """Commit a folder's files to the main branch of a repository, which is made if need be; the commit's address.

    A repository that holds other files is refused unless `marker`, by which it is known as one of ours, is among them.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    with hub_errors(address.repo):
        api.create_repo(address.repo, private=not is_public, exist_ok=True)
        held = set(api.list_repo_files(address.repo)) - {".gitattributes", "README.md"}
        if held and marker not in held:
            reason = f"The repository {address.repo} holds other files, among them {min(held)}."
            raise DsgError(reason, "Name a new repository.")
        done = api.upload_folder(repo_id=address.repo, folder_path=folder, commit_message="Add a guardrail (dsg-cli)")
    return f"{SCHEME}{address.repo}@{done.oid}"


def _network_errors() -> tuple[type[Exception], ...]:
    """What is raised where there is no network: huggingface_hub has changed its client between minor versions."""
    named = (("httpx", "HTTPError"), ("httpx2", "HTTPError"), ("requests", "RequestException"))
    return tuple(getattr(importlib.import_module(m), name) for m, name in named if importlib.util.find_spec(m))


@contextmanager
def hub_errors(repo: str) -> Iterator[None]:
    """Turn what the hub's client raises inside the block into one sentence that says what to do."""
    from huggingface_hub import errors

    unreachable: tuple[type[Exception], ...] = (*_network_errors(), errors.OfflineModeIsEnabled)
    try:
        yield
    except errors.RepositoryNotFoundError as error:  # A gated one is a kind of it.
        raise _no_access(repo, is_gated=isinstance(error, errors.GatedRepoError)) from error
    except errors.RevisionNotFoundError as error:
        raise DsgError(f"The repository {repo} has no such revision.", "Give a branch, a tag or a commit.") from error
    except errors.LocalEntryNotFoundError as error:
        raise DsgError(
            f"The hub cannot be reached, and {repo} is not in the local cache.",
            "Check the network and HF_ENDPOINT; unset HF_HUB_OFFLINE to download.",
        ) from error
    except errors.EntryNotFoundError as error:
        raise DsgError(f"The repository {repo} lacks the file: {reason_of(error, 200)}") from error
    except (errors.LocalTokenNotFoundError, errors.HFValidationError) as error:
        raise DsgError(f"The hub refused {repo}: {reason_of(error, 200)}") from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        hint = "Set HF_TOKEN, or run `hf auth login`, with a token that may write." if status in (401, 403) else ""
        raise DsgError(f"The hub refused {repo}: {reason_of(error, 200)}", hint) from error
    except unreachable as error:
        hint = "Check the network and HF_ENDPOINT."
        raise DsgError(f"The hub cannot be reached: {reason_of(error, 200)}", hint) from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        hint = "Make room, or name another cache folder with HF_HOME."
        raise DsgError(f"There is no room on the disk for {repo}.", hint) from error


def _no_access(repo: str, *, is_gated: bool, is_data: bool = False) -> DsgError:
    what, page = ("data set", f"datasets/{repo}") if is_data else ("repository", repo)
    if not is_gated:
        return DsgError(
            f"There is no {what} {repo} on the hub, or it is private and this account has no access.",
            "Check the name; for a private one, set HF_TOKEN or run `hf auth login`.",
        )
    or_local = "; or give a local copy by its path (.jsonl, .csv, .parquet, ...)" if is_data else ""
    return DsgError(
        f"The {what} {repo} is gated, and this account has no access.",
        f"Ask for access at https://huggingface.co/{page}, then set HF_TOKEN or run `hf auth login`{or_local}.",
    )


def read_hub(hub_text: HubText, *, revision: str | None = None) -> Documents:
    """The texts of a data set on the hub, at the commit that an earlier stage read or else the newest."""
    dataset = load_rows(hub_text.repo, hub_text.config, hub_text.split, revision=revision)
    return of_dataset(dataset, hub_text, where=str(hub_text), revision=commit_read(dataset))


def load_rows(repo: str, config: str | None, split: str, *, revision: str | None = None) -> Any:
    """A split of a data set on the hub, as a `datasets.Dataset`."""
    from datasets import load_dataset

    try:
        with data_errors(repo):
            dataset = load_dataset(repo, config, split=split, revision=revision)
    except (RuntimeError, ValueError) as error:  # Such as a loading script, which is never run.
        raise DsgError(f"The data set {repo} cannot be read: {_line(error)}") from error
    if revision and (read := commit_read(dataset)) != revision:
        raise DsgError(
            f"The data set {repo} is in the local cache at commit {read[:12]}, not at {revision[:12]}, which an "
            "earlier stage read.",
            "Go online once, or start again with dsg select.",
        )
    return dataset


@contextmanager
def data_errors(repo: str) -> Iterator[None]:
    """Turn what `datasets` and the hub's client raise inside the block into one sentence that says what to do."""
    from datasets import exceptions

    try:
        with hub_errors(repo):
            yield
    except exceptions.DatasetNotFoundError as error:
        raise _no_access(repo, is_gated="gated" in str(error), is_data=True) from error
    except exceptions.DatasetsError as error:
        is_generated = isinstance(error, exceptions.DatasetGenerationError)
        cause = (error.__cause__ if is_generated else None) or error
        raise DsgError(f"The data set {repo} cannot be read: {_line(cause)}") from error
    except ConnectionError as error:
        raise DsgError(
            f"The hub cannot be reached, and the data set {repo} is not in the local cache.",
            "Check the network and HF_ENDPOINT; unset HF_HUB_OFFLINE to download; or name a local file instead.",
        ) from error
    except ValueError as error:
        if "find cache" in str(error):
            raise DsgError(
                f"The hub cannot be reached, and the data set {repo} is not whole in the local cache: {_line(error)}",
                "Check the network; unset HF_HUB_OFFLINE to download.",
            ) from error
        if not re.search("BuilderConfig|split|[Cc]onfig name", str(error)):
            raise
        # An unknown configuration or split: the message lists what there is.
        raise DsgError(f"In the data set {repo}: {_line(error)}", "Write hf:org/name:config#split.") from error


def commit_read(dataset: Any) -> str:
    """The commit that a split was read from, which its cache files are named after."""
    for file in getattr(dataset, "cache_files", []):
        if match := re.fullmatch(r"[0-9a-f]{40}", Path(file["filename"]).parent.name):
            return match[0]
    return ""


def _line(error: BaseException) -> str:
    return " ".join(str(error).split("Example of usage")[0].split())[:400]
