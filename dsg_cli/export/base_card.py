"""What the base model's own card says of its licence and its languages.

Only what stands there is repeated. A card is text of others: all but plain codes and names in it is passed over.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dsg_cli.errors import DsgError
from dsg_cli.hub import REPOSITORY, cached_file
from dsg_cli.integrity import is_file, read_bounded
from dsg_cli.lab import data as lab

CARD_FILE = "README.md"
FRONT_MATTER = re.compile(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)", re.DOTALL)
LARGEST = 2**20
LICENCE = re.compile(r"[A-Za-z0-9][\w.+-]{0,63}")
LANGUAGE = re.compile(r"[A-Za-z]{2,3}(?:-[A-Za-z0-9]{2,8})*|code|multilingual")
LONGEST = 300


@dataclass(frozen=True)
class BaseCard:
    """What is known of a base model; empty where its card does not say."""

    licence: tuple[str, ...] = ()
    """Identifiers, as the hub spells them."""
    licence_name: str = ""
    licence_link: str = ""
    languages: tuple[str, ...] = ()


def read_base_card(source: str) -> BaseCard:
    """The base model's card, from its folder or from the local cache; nothing is downloaded.

    Args:
        source: A model of the lab, a folder by its absolute path, or a repository at a commit.
    """
    if source in lab.MODEL_DIRS:
        return BaseCard(licence=("apache-2.0",), languages=("en",))
    path = cached_file(source, CARD_FILE) if REPOSITORY.fullmatch(source) else Path(source) / CARD_FILE
    try:
        text = read_bounded(path, LARGEST).decode("utf-8-sig") if path and is_file(path) else ""
        match = FRONT_MATTER.match(text)
        said = yaml.safe_load(match[1]) if match else None
    except (DsgError, yaml.YAMLError, ValueError, RecursionError):  # A card that cannot be read says nothing.
        return BaseCard()
    if not isinstance(said, dict):
        return BaseCard()
    return BaseCard(
        licence=_codes(said.get("license"), LICENCE),
        licence_name=_short(said.get("license_name")),
        licence_link=_short(said.get("license_link")),
        languages=_codes(said.get("language"), LANGUAGE),
    )


def _codes(said: Any, pattern: re.Pattern[str]) -> tuple[str, ...]:
    several = said if isinstance(said, list) else [said]
    return tuple(one for one in several if isinstance(one, str) and pattern.fullmatch(one))


def _short(said: Any) -> str:
    is_name = isinstance(said, str) and len(said) <= LONGEST and said.isprintable()
    return said.strip() if is_name else ""
