"""Data sets by their names on the Hugging Face hub, through `datasets`: pinned to a commit, offline once cached."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dsg_cli.catalogue import HubText
from dsg_cli.documents import Documents, of_dataset
from dsg_cli.errors import DsgError
from dsg_cli.hub import hub_errors


def read_hub(wanted: HubText, *, revision: str | None = None) -> Documents:
    """The texts of a data set on the hub.

    Args:
        wanted: Which.
        revision: The commit that an earlier stage read; the newest otherwise.

    Raises:
        DsgError: Missing, gated, without such a configuration, split or column; no network; no room.
    """
    dataset = load_rows(wanted.repo, wanted.config, wanted.split, revision=revision)
    return of_dataset(dataset, wanted, where=str(wanted), revision=commit_read(dataset))


def load_rows(repo: str, config: str | None, split: str, *, revision: str | None = None) -> Any:
    """A split of a data set on the hub, as a `datasets.Dataset`.

    Raises:
        DsgError: Missing, gated, without such a configuration or split; no network; no room.
    """
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
    """Turn what `datasets` and the hub's client raise inside the block into one sentence that says what to do.

    Raises:
        DsgError: Instead of any of their errors.
    """
    from datasets import exceptions

    try:
        with hub_errors(repo):
            yield
    except exceptions.DatasetNotFoundError as error:
        raise _missing(repo, str(error)) from error
    except exceptions.DatasetGenerationError as error:
        cause = error.__cause__ or error
        raise DsgError(f"The data set {repo} cannot be read: {_line(cause)}") from error
    except exceptions.DatasetsError as error:
        raise DsgError(f"The data set {repo} cannot be read: {_line(error)}") from error
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
        raise DsgError(
            f"In the data set {repo}: {_line(error)}",
            "Write hf:org/name:config#split.",
        ) from error


def commit_read(dataset: Any) -> str:
    """The commit that a split was read from, which its cache files are named after."""
    for file in getattr(dataset, "cache_files", []):
        if match := re.fullmatch(r"[0-9a-f]{40}", Path(file["filename"]).parent.name):
            return match[0]
    return ""


def _missing(repo: str, reason: str) -> DsgError:
    if "gated" in reason:
        return DsgError(
            f"The data set {repo} is gated, and this account has no access.",
            f"Ask for access at https://huggingface.co/datasets/{repo}, then set HF_TOKEN or run `hf auth login`; "
            "or give a local copy by its path (.jsonl, .csv, .parquet, ...).",
        )
    return DsgError(
        f"There is no data set {repo} on the hub, or it is private and this account has no access.",
        "Check the name; for a private one, set HF_TOKEN or run `hf auth login`.",
    )


def _line(error: BaseException) -> str:
    return " ".join(str(error).split("Example of usage")[0].split())[:400]
