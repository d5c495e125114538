"""Pages and descriptions of features on Neuronpedia: links always, descriptions only from who asks for them.

What comes back is another's text: bounded, checked, and without anything that a terminal would obey.
`DSG_NEURONPEDIA` names another server.
"""

from __future__ import annotations

import html
import json
import math
import os
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

from dsg_cli.errors import DsgError, reason_of
from dsg_cli.inspection.descriptions import LARGEST, LONGEST, cleaned, read_descriptions
from dsg_cli.job import Report, silent
from dsg_cli.models.releases import cache_folder, releases
from dsg_cli.workspace.files import parse_json, write_atomically

SERVER = "https://www.neuronpedia.org"
EXPORT = "https://neuronpedia-datasets.s3.us-east-1.amazonaws.com"
INSTEAD = "Give --descriptions FILE, or make them from text of yours: dsg describe FILE --corpus NAME."

PLACE = re.compile(r"[\w.-]+/[\w.-]+")
"""model/source"""

LARGEST_ANSWER, LARGEST_LISTING = 4 * 2**20, 8 * 2**20
"""Bytes of an answer, and of a page of the export's listing."""
LONGEST_ANSWER = 300
"""Characters of a description."""
SECONDS, SECONDS_EXPORT = 10.0, 60.0
"""For a whole answer, and for each part of a file of the export."""
PAGES = 100
"""Of a listing, at most; each names up to a thousand files."""


@dataclass(frozen=True)
class PageDescriptions:
    """What the pages of features say (of those that have a description), and what went wrong, if anything."""

    texts: dict[int, str]
    note: str


def place_of(source: str) -> str | None:
    """MODEL/SOURCE of an SAE `RELEASE/ID`, if sae-lens's list has one, under whatever name."""
    release, _, sae_id = source.partition("/")
    listed = releases().get(release) if sae_id else None  # Of the lab, or a folder: the list of thousands is not read.
    own = next((sae for sae in listed["saes"] if str(sae["id"]) == sae_id), None) if listed else None
    if own is None or listed is None:
        return None
    namesakes = [
        sae.get("neuronpedia")
        for other in releases().values()
        if other["repo_id"] == listed["repo_id"]
        for sae in other["saes"]
        if sae["path"] == own["path"]
    ]
    place = own.get("neuronpedia") or next(filter(None, namesakes), None)
    return place if place and PLACE.fullmatch(place) else None


def page_of(place: str, index: int) -> str:
    """The page of a feature, for people."""
    return f"{SERVER}/{place}/{index}"


def described(place: str, indices: Sequence[int], report: Report = silent) -> PageDescriptions:
    """Descriptions of features of `place`, MODEL/SOURCE, from the cache or from the server.

    A server that fails is not asked again.
    """
    server = os.environ.get("DSG_NEURONPEDIA", SERVER).rstrip("/")
    texts: dict[int, str] = {}
    note = ""
    for n, index in enumerate(indices, start=1):
        cached = cache_folder() / "neuronpedia" / place / f"{index}.json"
        text = _cached_text(cached)
        if text is None and not note:
            try:
                text = _first_description(f"{server}/api/feature/{place}/{index}")
                cached.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(cached, json.dumps({"description": text}).encode())
            except (OSError, ValueError, HTTPException) as error:  # No network, no answer, or no sense in it.
                late = isinstance(error, TimeoutError) or isinstance(getattr(error, "reason", None), TimeoutError)
                reason = f"no answer in {SECONDS:g} seconds" if late else reason_of(error, 200)
                note = f"Neuronpedia gave no description of feature {index}: {reason}."
        if text:
            texts[index] = text
        report("Neuronpedia", n, len(indices))
    return PageDescriptions(texts, note)


def _cached_text(path: Path) -> str | None:
    try:
        text = parse_json(path.read_bytes())["description"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return _clean(text) if isinstance(text, str) else None


def _first_description(url: str) -> str:
    """The first description in an answer; nothing if there is none."""
    if not url.startswith(("https://", "http://")):
        raise ValueError("DSG_NEURONPEDIA is no address of a web server")
    try:
        content = _download(url, LARGEST_ANSWER, SECONDS, until=time.monotonic() + SECONDS)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 404:
            return ""
        raise
    if len(content) > LARGEST_ANSWER:
        raise ValueError(f"its answer has more than {LARGEST_ANSWER} bytes")
    answer = parse_json(content)
    explanations = answer.get("explanations") if isinstance(answer, dict) else None
    if not isinstance(explanations, list):
        raise ValueError("its answer is of another form than is known here")
    texts = [row.get("description") for row in explanations if isinstance(row, dict)]
    return next((clean for text in texts if isinstance(text, str) and (clean := _clean(text))), "")


def _clean(text: str) -> str:
    """One line of what can be printed, of a bounded length."""
    text = "".join(filter(str.isprintable, " ".join(text[: 8 * LONGEST_ANSWER].split())))
    return text if len(text) <= LONGEST_ANSWER else f"{text[: LONGEST_ANSWER - 3]}..."


def _download(url: str, largest: int, seconds: float, *, until: float = math.inf) -> bytes:
    """What a server sends, and little more than `largest` bytes of it; `seconds` are those of each part."""
    content = bytearray()
    request = urllib.request.Request(url, headers={"Accept": "application/json, */*", "User-Agent": "dsg-cli"})
    with urllib.request.urlopen(request, timeout=seconds) as answer:
        while len(content) <= largest and (part := answer.read1(2**16)):
            content += part
            if time.monotonic() > until:
                raise TimeoutError
    return bytes(content)


def fetch_descriptions(name: str, n_features: int, *, report: Report = silent) -> Path:
    """The file of the descriptions of an SAE, MODEL/SOURCE, downloaded if it is not in the cache."""
    path = cache_folder() / "neuronpedia" / f"{name}.jsonl"
    if path.is_file():
        return path
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        offline = f"Neuronpedia's descriptions of {name} are not in the cache, and HF_HUB_OFFLINE is set."
        raise DsgError(offline, INSTEAD)
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
        reason = f"Descriptions cannot be kept in {path.parent}: {error.strerror or error}."
        raise DsgError(reason, "Make room, or name another folder with DSG_CACHE.") from error
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
        content = _download(f"{base.rstrip('/')}/{key}", largest, SECONDS_EXPORT)
    except (OSError, ValueError, HTTPException) as error:  # URLError, HTTPError, time-outs.
        reason = " ".join(str(getattr(error, "reason", None) or error).split())[:200]
        raise DsgError(f"Neuronpedia's export cannot be reached: {reason}.", INSTEAD) from error
    if len(content) > largest:
        raise DsgError(f"Neuronpedia's export has a file of more than {largest:,} bytes: {key[:200]}.", INSTEAD)
    return content
