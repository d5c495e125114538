"""Names of benches: the lab's, the field's own, those of the paper's protocol, and lm-eval's."""

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
        for name, other in (
            ("mmlu-paper", "college_computer_science"),
            ("mmlu-paper-cyber", "college_biology"),
        )
    },
}
"""Benches of the paper's protocol: data set, configuration and the subject that its prompt names."""


def known_benches() -> list[str]:
    """Every bench with a name of ours; lm-eval's tasks and groups come on top."""
    return [*lab.bench_names(), *ALIASES, "mmlu", *PAPER]


def task_name(bench: str) -> str:
    """What lm-eval calls a bench."""
    return ALIASES.get(bench, bench)


def bench_name(task: str) -> str:
    """What we call a task of lm-eval."""
    return next((ours for ours, theirs in ALIASES.items() if theirs == task), task)
