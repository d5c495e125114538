"""Benches by name: which there are, and where their data are. No torch."""

from __future__ import annotations

from dsg_cli.lab import data as lab

ALIASES = {"wmdp-bio": "wmdp_bio", "wmdp-cyber": "wmdp_cyber", "wmdp-chem": "wmdp_chem"}
"""Names that lm-eval spells otherwise."""

QUICK = {"wmdp_bio": "wmdp", "wmdp_cyber": "wmdp", "wmdp_chem": "wmdp", "wmdp": "wmdp", "mmlu": "mmlu/default"}
"""Tasks and groups of lm-eval, and the folder of its tasks that they are in: its whole index takes ten seconds."""

SHARED = ("high_school_us_history", "high_school_geography", "human_aging")

PAPER: dict[str, tuple[tuple[str, str, str], ...]] = {
    "wmdp-bio-paper": (("cais/wmdp", "wmdp-bio", "biology"),),
    "wmdp-cyber-paper": (("cais/wmdp", "wmdp-cyber", "cyber security"),),
    **{
        name: tuple(("cais/mmlu", subject, subject.replace("_", " ")) for subject in sorted((*SHARED, other)))
        for name, other in (("mmlu-paper", "college_computer_science"), ("mmlu-paper-cyber", "college_biology"))
    },
}
"""Benches of the paper's protocol: data set, configuration and the subject that its prompt names."""

MUSE = {"muse-news": "muse-bench/MUSE-News", "muse-books": "muse-bench/MUSE-Books", "lab-muse": ""}
"""Benches of MUSE, and their data sets; the lab's is made."""

TOFU = {
    **{name: ("locuslab/TOFU", name.removeprefix("tofu-")) for name in ("tofu-forget01", "tofu-forget05")},
    **dict.fromkeys(("tofu-forget10", "tofu"), ("locuslab/TOFU", "forget10")),
    "lab-tofu": ("", "forget10"),
}
"""Benches of TOFU: data set, and what is to be forgotten."""

CORPUS_BENCHES = ("memory", "fluency")
"""Benches of any corpus: `memory:CORPUS`, `fluency:CORPUS`."""


def is_free(bench: str) -> bool:
    """Whether a bench is on free text (free_text.py)."""
    kind, colon, _ = bench.partition(":")
    return bench in MUSE or bench in TOFU or (bool(colon) and kind in CORPUS_BENCHES)


def known_benches() -> list[str]:
    """Every bench with a name of ours; lm-eval's tasks and groups come on top."""
    return [*lab.bench_names(), *ALIASES, "mmlu", *PAPER, *MUSE, *TOFU]


def task_name(bench: str) -> str:
    """What lm-eval calls a bench."""
    return ALIASES.get(bench, bench)


def bench_name(task: str) -> str:
    """What we call a task of lm-eval."""
    return next((ours for ours, theirs in ALIASES.items() if theirs == task), task)
