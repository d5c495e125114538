"""Names of corpora: the field's own, and any data set on the Hugging Face hub."""

from __future__ import annotations

import re
from dataclasses import dataclass

from dsg_cli.errors import DsgError

SCHEME = "hf:"

_SPELLING = re.compile(
    r"hf:(?P<repo>[\w.-]+/[\w.-]+)(?::(?P<config>[^#@:]+))?(?:#(?P<split>[^#@]+))?(?:@(?P<column>[^#@]+))?"
)


@dataclass(frozen=True)
class HubText:
    """Texts in a data set on the hub."""

    repo: str
    config: str | None = None
    split: str = "train"
    column: str | None = None
    """None finds the one that holds text."""
    template: str | None = None
    """Instead of a column: how a row becomes a text, with {column} and {column[index]}."""
    is_chat: bool = False
    """Each text is what a user says: it is put in the model's chat template."""
    min_chars: int = 0
    """Shorter texts are left out."""
    passage_chars: int = 0
    """Longer texts are read as passages of about so many characters: MUSE-Books has four books to forget."""

    def __str__(self) -> str:
        return f"{SCHEME}{self.repo}" + (f":{self.config}" if self.config else "") + f"#{self.split}"


_QUESTION = "Question: {question}\nAnswer: {answer}"
_CHOICES = "{question}\nA. {choices[0]}\nB. {choices[1]}\nC. {choices[2]}\nD. {choices[3]}"

CATALOGUE = {
    "wmdp-bio": HubText("cais/wmdp-bio-forget-corpus", column="text"),
    "wmdp-cyber": HubText("cais/wmdp-corpora", "cyber-forget-corpus", column="text"),
    "wmdp-bio-retain": HubText("cais/wmdp-corpora", "bio-retain-corpus", column="text"),
    "wmdp-cyber-retain": HubText("cais/wmdp-corpora", "cyber-retain-corpus", column="text"),
    # The paper's: the test split, texts of more than 50 characters.
    "wikitext": HubText("Salesforce/wikitext", "wikitext-2-raw-v1", "test", column="text", min_chars=51),
    # Validation questions: those of the test split are what utility is measured on.
    "mmlu-chat": HubText("cais/mmlu", "all", "validation", template=_CHOICES, is_chat=True),
    **{
        f"muse-{name}{suffix}": HubText(f"muse-bench/MUSE-{name.title()}", "raw", split, "text", passage_chars=4000)
        for name in ("news", "books")
        for suffix, split in (("", "forget"), *((f"-{split}", split) for split in ("retain1", "retain2", "holdout")))
    },
    # Folds that MUSE-News alone has: `sust` are disjoint, each of `scal` holds the one before; the first is muse-news.
    **{
        f"muse-news-{config}-{n}": HubText("muse-bench/MUSE-News", config, f"forget_{n}", "text", passage_chars=4000)
        for config in ("sust", "scal")
        for n in (1, 2, 3, 4)
    },
    **{
        name: HubText("locuslab/TOFU", config, template=_QUESTION)
        for name, config in (
            ("tofu", "forget10"),
            ("tofu-full", "full"),
            ("tofu-forget01", "forget01"),
            ("tofu-forget05", "forget05"),
            ("tofu-forget10", "forget10"),
            ("tofu-retain", "retain90"),
            ("tofu-retain90", "retain90"),
            ("tofu-retain95", "retain95"),
            ("tofu-retain99", "retain99"),
            ("tofu-real-authors", "real_authors"),
            ("tofu-world-facts", "world_facts"),
        )
    },
}


def hub_text(name: str) -> HubText | None:
    """What a name of the catalogue or `hf:org/name[:config][#split][@column]` stands for; None for other names."""
    if not name.startswith(SCHEME):
        return CATALOGUE.get(name)
    match = _SPELLING.fullmatch(name)
    if match is None:
        raise DsgError(
            f"{name} is no data set on the hub.",
            "Write hf:org/name[:config][#split][@column], such as hf:Salesforce/wikitext:wikitext-2-raw-v1#test.",
        )
    return HubText(match["repo"], match["config"], match["split"] or "train", match["column"])
