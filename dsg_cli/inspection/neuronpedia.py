"""Pages and descriptions of features on Neuronpedia: links always, descriptions only from who asks for them.

What comes back is another's text: bounded, checked, and without anything that a terminal would obey.
`DSG_NEURONPEDIA` names another server.
"""

from __future__ import annotations

import html
import json
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
from typing import Any

from dsg_cli.errors import DsgError, reason_of
from dsg_cli.inspection.descriptions import LARGEST, LONGEST, cleaned, read_descriptions
from dsg_cli.job import Report, silent
from dsg_cli.models.releases import cache_folder, releases
from dsg_cli.workspace.files import parse_json, write_atomically

SERVER = "https://www.neuronpedia.org"

PLACE = re.compile(r"[\w.-]+/[\w.-]+")
"""model/source"""

LARGEST_ANSWER = 4 * 2**20
"""Bytes of an answer."""

LONGEST_ANSWER = 300
"""Characters of a description."""

SECONDS = 10.0


@dataclass(frozen=True)
class PageDescriptions:
    """What the pages of features say, and what went wrong."""

    texts: dict[int, str]
    """Feature -> its description, of those that have one."""
    note: str
    """Empty if the server answered."""


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
    texts: dict[int, str] = {}
    note = ""
    for n, index in enumerate(indices, start=1):
        kept = cache_folder() / "neuronpedia" / place / f"{index}.json"
        text = _kept(kept)
        if text is None and not note:
            try:
                text = _asked(f"{_server()}/api/feature/{place}/{index}")
                _keep(kept, text)
            except (OSError, ValueError, HTTPException) as error:  # No network, no answer, or no sense in it.
                note = f"Neuronpedia gave no description of feature {index}: {_reason(error)}."
        if text:
            texts[index] = text
        report("Neuronpedia", n, len(indices))
    return PageDescriptions(texts, note)


def _server() -> str:
    return os.environ.get("DSG_NEURONPEDIA", SERVER).rstrip("/")


def _asked(url: str) -> str:
    """The first description in an answer; nothing if there is none."""
    if not url.startswith(("https://", "http://")):
        raise ValueError("DSG_NEURONPEDIA is no address of a web server")
    request = urllib.request.Request(url, headers={"Accept": "application/json", "User-Agent": "dsg-cli"})
    until = time.monotonic() + SECONDS
    content = b""
    try:
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:
            while part := answer.read1(2**16):
                content += part
                if len(content) > LARGEST_ANSWER:
                    raise ValueError(f"its answer has more than {LARGEST_ANSWER} bytes")
                if time.monotonic() > until:  # The timeout above is that of each part.
                    raise TimeoutError
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 404:
            return ""
        raise
    return _first(parse_json(content))


def _first(answer: Any) -> str:
    explanations = answer.get("explanations") if isinstance(answer, dict) else None
    if not isinstance(explanations, list):
        raise ValueError("its answer is of another form than is known here")
    texts = [one.get("description") for one in explanations if isinstance(one, dict)]
    return next((clean for text in texts if isinstance(text, str) and (clean := _clean(text))), "")


def _clean(text: str) -> str:
    """One line of what can be printed, of a bounded length."""
    text = " ".join(text[: 8 * LONGEST_ANSWER].split())
    text = "".join(character for character in text if character.isprintable())
    return text if len(text) <= LONGEST_ANSWER else f"{text[: LONGEST_ANSWER - 3]}..."


def _kept(path: Path) -> str | None:
    try:
        text = parse_json(path.read_bytes())["description"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return _clean(text) if isinstance(text, str) else None


def _keep(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps({"description": text}).encode())


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError) or isinstance(getattr(error, "reason", None), TimeoutError):
        return f"no answer in {SECONDS:g} seconds"
    return reason_of(error, 200)


EXPORT = "https://neuronpedia-datasets.s3.us-east-1.amazonaws.com"

INSTEAD = "Give --descriptions FILE, or make them from text of yours: dsg describe FILE --corpus NAME."

SECONDS_EXPORT = 60

PAGES = 100
"""Of a listing, at most; each names up to a thousand files."""

LARGEST_LISTING = 8 * 2**20


def fetch_descriptions(name: str, n_features: int, *, report: Report = silent) -> Path:
    """The file of the descriptions of an SAE, MODEL/SOURCE, downloaded if it is not in the cache."""
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
        with urllib.request.urlopen(f"{base.rstrip('/')}/{key}", timeout=SECONDS_EXPORT) as answer:
            content: bytes = answer.read(largest + 1)
    except (OSError, ValueError, HTTPException) as error:  # URLError, HTTPError, time-outs.
        reason = getattr(error, "reason", None) or error
        raise DsgError(
            f"Neuronpedia's export cannot be reached: {' '.join(str(reason).split())[:200]}.", INSTEAD
        ) from error
    if len(content) > largest:
        raise DsgError(f"Neuronpedia's export has a file of more than {largest:,} bytes: {key[:200]}.", INSTEAD)
    return content
