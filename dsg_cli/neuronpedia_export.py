"""Descriptions that Neuronpedia publishes, once downloaded kept in the cache folder.

Its bulk export has a folder for each SAE, `v1/MODEL/SOURCE/explanations/`, with files `batch-N.jsonl.gz`;
neuronpedia.py says which MODEL/SOURCE an SAE has there. DSG_NEURONPEDIA_EXPORT names another server of the same form.
"""

from __future__ import annotations

import html
import json
import os
import re
import urllib.error
import urllib.parse
import urllib.request
from http.client import HTTPException
from pathlib import Path

from dsg_cli.descriptions import LARGEST, LONGEST, cleaned, read_descriptions
from dsg_cli.errors import DsgError
from dsg_cli.integrity import write_atomically
from dsg_cli.progress import Report, silent
from dsg_cli.releases import cache_folder

EXPORT = "https://neuronpedia-datasets.s3.us-east-1.amazonaws.com"
INSTEAD = "Give --descriptions FILE, or make them from text of yours: dsg describe FILE --corpus NAME."
SECONDS = 60
PAGES = 100
"""Of a listing, at most; each names up to a thousand files."""
LARGEST_LISTING = 8 * 2**20


def fetch_descriptions(name: str, n_features: int, *, report: Report = silent) -> Path:
    """The file of an SAE's descriptions, downloaded if it is not in the cache.

    Args:
        name: MODEL/SOURCE.
        n_features: How many the SAE has.
        report: Progress.

    Raises:
        DsgError: It is not there and cannot be downloaded, or what comes is no export.
    """
    path = cache_folder() / "neuronpedia" / f"{name}.jsonl"
    if path.is_file():
        return path
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        raise DsgError(
            f"Neuronpedia's descriptions of {name} are not in the cache, and HF_HUB_OFFLINE is set.", INSTEAD
        )
    prefix = f"v1/{name}/explanations/"
    keys = _listed(prefix)
    if not keys:
        raise DsgError(f"Neuronpedia's export has no descriptions of {name}.", INSTEAD)
    texts: dict[int, str] = {}
    batch = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            for number, key in enumerate(keys, start=1):
                batch.write_bytes(_fetched(key, LARGEST))
                for j, text in read_descriptions(batch, n_features, source=key, may_be_empty=True).texts.items():
                    texts[j] = f"{texts[j]}; {text}"[:LONGEST] if j in texts and text != texts[j] else text
                report("descriptions, files", number, len(keys))
        finally:
            batch.unlink(missing_ok=True)
        if not texts:
            raise DsgError(f"Neuronpedia's export has no descriptions of {name}.", INSTEAD)
        lines = (json.dumps({"index": j, "description": cleaned(text)}) + "\n" for j, text in sorted(texts.items()))
        write_atomically(path, "".join(lines).encode())
    except OSError as error:
        raise DsgError(
            f"Descriptions cannot be kept in {path.parent}: {error.strerror or error}.",
            "Make room, or name another folder with DSG_CACHE.",
        ) from error
    return path


def _listed(prefix: str) -> list[str]:
    """The batches below a prefix, in their order."""
    keys: list[str] = []
    token = ""
    for _ in range(PAGES):
        query = {"list-type": "2", "prefix": prefix} | ({"continuation-token": token} if token else {})
        page = _fetched(f"?{urllib.parse.urlencode(query)}", LARGEST_LISTING).decode("utf-8", "replace")
        keys += [html.unescape(key) for key in re.findall(r"<Key>([^<]*)</Key>", page)]
        more = re.search(r"<NextContinuationToken>([^<]+)</NextContinuationToken>", page)
        if more is None:
            break
        token = html.unescape(more[1])
    numbers = {key: re.fullmatch(rf"{re.escape(prefix)}batch-(\d{{1,9}})\.jsonl\.gz", key) for key in keys}
    return sorted((key for key, match in numbers.items() if match), key=lambda key: int(numbers[key][1]))  # type: ignore[index]


def _fetched(key: str, largest: int) -> bytes:
    base = os.environ.get("DSG_NEURONPEDIA_EXPORT") or EXPORT
    if not base.startswith(("https://", "http://")):
        raise DsgError(f"DSG_NEURONPEDIA_EXPORT is {base[:200]}, which is no address.", "Begin it with https://.")
    try:
        with urllib.request.urlopen(f"{base.rstrip('/')}/{key}", timeout=SECONDS) as answer:
            content: bytes = answer.read(largest + 1)
    except (OSError, ValueError, HTTPException) as error:  # URLError, HTTPError, time-outs.
        reason = getattr(error, "reason", None) or error
        raise DsgError(
            f"Neuronpedia's export cannot be reached: {' '.join(str(reason).split())[:200]}.", INSTEAD
        ) from error
    if len(content) > largest:
        raise DsgError(f"Neuronpedia's export has a file of more than {largest:,} bytes: {key[:200]}.", INSTEAD)
    return content
