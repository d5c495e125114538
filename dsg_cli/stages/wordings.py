"""What an attacker brings along for attacks on prompts: the questions in other words, and texts to put around them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dsg_cli.attacks.files import read_contexts, read_frames
from dsg_cli.attacks.names import ALL, expanded
from dsg_cli.benches.tasks import Question
from dsg_cli.errors import DsgError
from dsg_cli.integrity import file_digest
from dsg_cli.lab import data as lab
from dsg_cli.settings import AttackSection
from dsg_cli.stages.subject import Subject

FILES = ("paraphrase_file", "encode_file")
"""Settings that name files of questions."""


@dataclass(frozen=True)
class Wordings:
    """All of it, read before weights are loaded."""

    rephrased: dict[str, dict[str, list[Question]]] = field(default_factory=dict)
    """Attack -> where the words are from -> questions."""
    frames: dict[str, str] = field(default_factory=dict)
    benches: list[str] = field(default_factory=list)
    """Whose questions are among them."""
    files: dict[str, str] = field(default_factory=dict)
    """Setting -> sha256 of the file that it names."""


def read_wordings(
    settings: AttackSection,
    bench: str,
    questions: Sequence[Question],
    kinds: Sequence[str],
    load: Callable[[str], list[Question]],
) -> Wordings:
    """What those attacks need.

    Args:
        settings: They name benches and files.
        bench: That is attacked.
        questions: Of it.
        kinds: The attacks.
        load: From the name of a bench to its questions.

    Raises:
        DsgError: Nothing says how to paraphrase; a bench or a file is missing, bad, or does not fit the questions.
    """
    benches: list[str] = []
    rephrased: dict[str, dict[str, list[Question]]] = {}
    if "paraphrase" in kinds:
        benches = _rephrasings(settings, bench)
        rephrased["paraphrase"] = {name: load(name) for name in benches}
    paths = {f"{kind}_file": getattr(settings, f"{kind}_file") for kind in ("paraphrase", "prefix", "encode")}
    given = {name: path for name, path in paths.items() if path and name.removesuffix("_file") in kinds}
    for name, path in given.items():
        if name in FILES:
            several = rephrased.setdefault(name.removesuffix("_file"), {})
            several[Path(path).name] = read_contexts(path, questions, f"attack.{name}")
    return Wordings(
        rephrased,
        read_frames(given["prefix_file"], "attack.prefix_file") if "prefix_file" in given else {},
        benches,
        {name: file_digest(Path(path)) for name, path in given.items()},
    )


def possible(named: Sequence[str], settings: AttackSection, bench: str, say: Callable[[str], None]) -> list[str]:
    """The attacks that are meant; `all` leaves out, and says so, what lacks its material.

    Raises:
        DsgError: One is unknown, or none is named.
    """
    kinds = expanded(named)
    if ALL in named and "paraphrase" not in named and not can_rephrase(settings, bench):
        say(f"paraphrase is left out: nothing says how {bench} asks in other words. Give attack.paraphrase_file.")
        kinds.remove("paraphrase")
    return kinds


def suited(named: Sequence[str], kinds: Sequence[str], subject: Subject, say: Callable[[str], None]) -> list[str]:
    """The attacks that mean something on what is attacked; `all` leaves out, and says so, what does not.

    Raises:
        DsgError: One was named that does not.
    """
    reasons: dict[str, str] = {}
    if not subject.guardrails and not subject.wrappers:
        reasons["unhook"] = "there is nothing to take off, for the weights themselves were changed"
    if subject.wrappers:
        reasons |= dict.fromkeys(
            ("soft-prompt", "probe", "suffix"), "it searches within the model, not around wrappers"
        )
    for kind in [kind for kind in kinds if kind in reasons]:
        if kind in named:
            raise DsgError(f"The attack {kind} makes no sense here: {reasons[kind]}.", "Choose another with --kind.")
        say(f"{kind} is left out: {reasons[kind]}.")
    return [kind for kind in kinds if kind not in reasons]


def can_rephrase(settings: AttackSection, bench: str) -> bool:
    """Whether anything says how the bench asks in other words."""
    return bool(settings.paraphrase_benches or settings.paraphrase_file or other_phrasings(bench))


def other_phrasings(bench: str) -> list[str]:
    """The benches of the lab that ask the same in other words; none for a bench of others."""
    for stem in lab.BENCHES:
        same = [name for name in lab.bench_names() if name == stem or name.startswith(f"{stem}-")]
        if bench in same:
            return [name for name in same if name != bench]
    return []


def check_counts(settings: AttackSection, kinds: Sequence[str]) -> None:
    """Refuse to show more examples than are known.

    Raises:
        DsgError: They are more.
    """
    if "few-shot" in kinds and max(settings.few_shot_counts) > settings.known_questions:
        raise DsgError(
            f"attack.few_shot_counts goes up to {max(settings.few_shot_counts)}, and the attacker knows "
            f"{settings.known_questions} questions.",
            "Lower attack.few_shot_counts, or raise attack.known_questions.",
        )


def _rephrasings(settings: AttackSection, bench: str) -> list[str]:
    if not can_rephrase(settings, bench):
        raise DsgError(
            f"Nothing says how {bench} asks in other words.",
            "Give --set attack.paraphrase_file=FILE (its questions, one a line), or attack.paraphrase_benches.",
        )
    return list(dict.fromkeys(settings.paraphrase_benches)) or other_phrasings(bench)
