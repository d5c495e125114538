"""Pages and descriptions of features on Neuronpedia: links always, descriptions only from who asks for them.

What comes back is another's text: bounded, checked, and without anything that a terminal would obey.
`DSG_NEURONPEDIA` names another server.
"""

from __future__ import annotations

import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

from dsg_cli.integrity import parse_json, write_atomically
from dsg_cli.progress import Report, silent
from dsg_cli.releases import cache_folder, releases

SERVER = "https://www.neuronpedia.org"
PLACE = re.compile(r"[\w.-]+/[\w.-]+")
"""model/source"""
LARGEST = 4 * 2**20
"""Bytes of an answer."""
LONGEST = 300
"""Characters of a description."""
SECONDS = 10.0


@dataclass(frozen=True)
class Descriptions:
    """What was found, and what went wrong."""

    texts: dict[int, str]
    """Feature -> its description, of those that have one."""
    note: str
    """Empty if the server answered."""


def place_of(source: str) -> str | None:
    """MODEL/SOURCE of an SAE `RELEASE/ID`, if sae-lens's list has one, under whatever name."""
    release, _, sae_id = source.partition("/")
    listed = releases().get(release) if sae_id else None  # Of the lab, or a folder: the list of thousands is not read.
    own = next((one for one in listed["saes"] if str(one["id"]) == sae_id), None) if listed else None
    if own is None or listed is None:
        return None
    same = [
        one.get("neuronpedia")
        for several in releases().values()
        if several["repo_id"] == listed["repo_id"]
        for one in several["saes"]
        if one["path"] == own["path"]
    ]
    place = own.get("neuronpedia") or next((one for one in same if one), None)
    return place if place and PLACE.fullmatch(place) else None


def page_of(place: str, index: int) -> str:
    """The page of a feature, for people."""
    return f"{SERVER}/{place}/{index}"


def described(place: str, indices: Sequence[int], report: Report = silent) -> Descriptions:
    """Descriptions of features, from the cache or from the server; a server that fails is not asked again.

    Args:
        place: model/source.
        indices: The features.
        report: Progress.
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
    return Descriptions(texts, note)


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
                if len(content) > LARGEST:
                    raise ValueError(f"its answer has more than {LARGEST} bytes")
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
    text = " ".join(text[: 8 * LONGEST].split())
    text = "".join(character for character in text if character.isprintable())
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def _kept(path: Path) -> str | None:
    try:
        found = parse_json(path.read_bytes())["description"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return _clean(found) if isinstance(found, str) else None


def _keep(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps({"description": text}).encode())


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError) or isinstance(getattr(error, "reason", None), TimeoutError):
        return f"no answer in {SECONDS:g} seconds"
    return " ".join(str(error).split())[:200] or type(error).__name__
