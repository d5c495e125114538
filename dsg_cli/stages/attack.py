"""`dsg attack`: how easily does the knowledge come back?

Runs attacks on the unlearned model, each with the same attack on the base model beside it; writes an attack-NNN for
each.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from dsg_cli.attacks import ALL, ATTACKS, expand_attacks, load_attack
from dsg_cli.attacks.prompts import read_contexts, read_templates
from dsg_cli.attacks.target import AttackerKnowledge, Target, summarise
from dsg_cli.data.corpora import Corpus, load_corpora
from dsg_cli.data.tokens import encode
from dsg_cli.errors import DsgError
from dsg_cli.evals.expect import Expected, check_expected, check_metrics, parse_expected
from dsg_cli.evals.questions import Question, default_bench, load_questions
from dsg_cli.guardrail.runtime.sites import fingerprint
from dsg_cli.lab import data as lab
from dsg_cli.settings import AttackSection, Recipe
from dsg_cli.stages.composition import Composition, find_composition, load_composition, newest
from dsg_cli.stages.inputs import identify
from dsg_cli.stages.stage import QUIET, RunOptions, settle, stage
from dsg_cli.workspace.body import Json
from dsg_cli.workspace.files import file_digest
from dsg_cli.workspace.provenance import Clock
from dsg_cli.workspace.results import AttackReport
from dsg_cli.workspace.store import Stored, Workspace


def run(
    recipe: Recipe,
    workspace: Workspace,
    kinds: Sequence[str],
    *,
    sources: Sequence[str] = (),
    options: RunOptions = QUIET,
    base_curves: dict[str, dict[str, list[Json]]] | None = None,
) -> list[Stored]:
    """Attack the newest guardrail, model or wrapper, or those named together, in every way that is named.

    `kinds` are attacks or groups of them; `base_curves` what earlier calls with the same recipe measured of base
    models, by their weights.
    """
    clock, settings = Clock(), recipe.attack
    expand_attacks(kinds)
    is_newest, sources = not sources, sources or [options.agreed(lambda: newest(workspace))]
    with options.workers.in_turn():
        composition = find_composition(workspace, sources)
        if is_newest:
            options.say(composition.acting)
        workspace.check_writable()
        bench = settings.bench or default_bench(composition.forget())
        kinds = suited(kinds, possible(kinds, settings, bench, options.say), composition, options.say)
        expected = [parse_expected(text, kinds) for text in settings.expect]
        check_metrics(expected, {kind: {"acc"} for kind in kinds})
        if "few-shot" in kinds and max(settings.few_shot_counts) > settings.known_questions:
            raise DsgError(
                f"attack.few_shot_counts goes up to {max(settings.few_shot_counts)}, and the attacker knows "
                f"{settings.known_questions} questions.",
                "Lower attack.few_shot_counts, or raise attack.known_questions.",
            )
        split = recipe.eval.split
        benches = [bench, *([settings.utility_bench] if settings.utility_bench else [])]
        questions = {name: load_questions(name, recipe.eval) for name in benches}
        load = partial(load_questions, settings=recipe.eval)
        rephrasings = read_rephrasings(settings, bench, questions[bench], kinds, load)
        needs = {need for kind in kinds for need in ATTACKS[kind].needs}
        known, others = _attacker_knows(recipe, bench, questions[bench]) if "known" in needs else ([], [])
        retain: list[Corpus] = []
        if "benign" in needs:
            # Of all that acts, without what another part of it forgets.
            names = composition.retain()
            retain = load_corpora(names, role="retain", limit=recipe.corpora.limit, seed=recipe.seed)
        recipe = settle(recipe, composition.header)
        loaded = load_composition(workspace, composition, recipe)
        # Text that neither selection nor calibration has seen.
        texts = [text for corpus in retain for text in corpus.part("fresh")]
        knowledge = AttackerKnowledge(
            forget=questions[bench],
            utility=questions.get(settings.utility_bench or "", []),
            benign=encode(loaded.base.tokenizer, texts, bos=None),
            templates=rephrasings.templates,
        )
    all_settings = dataclasses.asdict(settings)
    artifacts = []
    for kind in kinds:
        own = {key: value for key, value in all_settings.items() if key.startswith(f"{kind.replace('-', '_')}_")}
        header_settings: Json = {
            "kind": kind,
            "bench": bench,
            **{key: all_settings[key] for key in ("utility_bench", "known_questions")},
            **own,
            "files": {name: digest for name, digest in rephrasings.files.items() if name in own},
            "split": split,
            "limit": recipe.eval.limit,
            "expect": [text for text in settings.expect if parse_expected(text, list(ATTACKS)).bench == kind],
            "retain": {corpus.name: corpus.sha256 for corpus in retain} if "benign" in ATTACKS[kind].needs else {},
            "allow_mismatch": recipe.model.allow_mismatch,
        }
        # Nothing vouches for the data of other benches, so they are asked again.
        with stage(
            "attack",
            recipe,
            workspace,
            options,
            clock,
            header_settings,
            inputs=composition.named,
            model=identify(loaded.base, composition.header.model.last_layer),
            sae=composition.header.sae,
            is_reusable=all(name in lab.bench_names() for name in (*questions, *rephrasings.benches)),
        ) as this:
            if this.existing:
                artifacts.append(this.existing)
                clock = Clock()
                continue
            batch_size = recipe.eval.batch_size
            unlearned, base = loaded.unlearned_model(batch_size), loaded.base_model(batch_size)
            target = Target(unlearned, base, this.job, seed=recipe.seed)
            if base_curves is not None:
                weights = fingerprint(loaded.base.model, loaded.base.n_layers - 1)
                target = dataclasses.replace(target, base_curves=base_curves.setdefault(weights, {}))
            own_knowledge = dataclasses.replace(knowledge, rephrasings=rephrasings.questions.get(kind, {}))
            if "known" in ATTACKS[kind].needs:
                own_knowledge = dataclasses.replace(own_knowledge, known=known, forget=others)
            before = {
                side: target.measure(model, own_knowledge.forget, f"before/{side}")
                for side, model in target.models.items()
            }
            curve = load_attack(kind)(target, own_knowledge, settings)
            summary = summarise(before, curve, on_prompts=ATTACKS[kind].on_prompts)
            own_expected = [condition for condition in expected if condition.bench == kind]
            body = AttackReport(
                attack=kind,
                threat_model=ATTACKS[kind].threat_model,
                bench=bench,
                before=before,
                curve=curve,
                summary=summary,
                expected=_checked(own_expected, kind, before, summary),
                composition=composition.described(),
            )
            artifacts.append(this.write(body))
        clock = Clock()
    return artifacts


def _checked(expected: Sequence[Expected], kind: str, before: Json, summary: Json) -> list[Json]:
    """Conditions on an attack: `acc` is what came back where most did. What was not measurable is not met."""
    if summary["forget_acc_worst"] is None:
        return [{"expect": condition.text, "value": None, "bound": None, "met": False} for condition in expected]
    sides = {"unlearned": {"acc": summary["forget_acc_worst"]}, "base": {"acc": before["base"]["forget_acc"]}}
    rate = summary["gate_rate_at_worst"]
    return check_expected(expected, {kind: sides}, {kind: {"rate": rate}} if rate is not None else {})


@dataclass(frozen=True)
class Rephrasings:
    """The questions in other words, and texts to put around them: read before weights are loaded."""

    questions: dict[str, dict[str, list[Question]]] = field(default_factory=dict)
    """Attack -> where the words are from -> questions."""
    templates: dict[str, str] = field(default_factory=dict)
    benches: list[str] = field(default_factory=list)
    """Whose questions are among them."""
    files: dict[str, str] = field(default_factory=dict)
    """Setting -> sha256 of the file that it names."""


def read_rephrasings(
    settings: AttackSection,
    bench: str,
    questions: Sequence[Question],
    kinds: Sequence[str],
    load: Callable[[str], list[Question]],
) -> Rephrasings:
    """What those attacks on a bench need, from the benches and files that the settings name; `load` reads a bench."""
    benches: list[str] = []
    rephrasings: dict[str, dict[str, list[Question]]] = {}
    if "paraphrase" in kinds:
        if not can_rephrase(settings, bench):
            raise DsgError(
                f"Nothing says how {bench} asks in other words.",
                "Give --set attack.paraphrase_file=FILE (its questions, one a line), or attack.paraphrase_benches.",
            )
        benches = list(dict.fromkeys(settings.paraphrase_benches)) or other_phrasings(bench)
        rephrasings["paraphrase"] = {name: load(name) for name in benches}
    paths = {kind: getattr(settings, f"{kind}_file") for kind in ("paraphrase", "prefix", "encode") if kind in kinds}
    paths = {kind: path for kind, path in paths.items() if path}
    templates: dict[str, str] = {}
    for kind, path in paths.items():
        if kind == "prefix":
            templates = read_templates(path, "attack.prefix_file")
        else:
            contexts = read_contexts(path, questions, f"attack.{kind}_file")
            rephrasings.setdefault(kind, {})[Path(path).name] = contexts
    files = {f"{kind}_file": file_digest(Path(path)) for kind, path in paths.items()}
    return Rephrasings(rephrasings, templates, benches, files)


def possible(named: Sequence[str], settings: AttackSection, bench: str, say: Callable[[str], None]) -> list[str]:
    """The attacks that are meant; `all` leaves out, and says so, what lacks what it needs."""
    kinds = expand_attacks(named)
    if ALL in named and "paraphrase" not in named and not can_rephrase(settings, bench):
        say(f"paraphrase is left out: nothing says how {bench} asks in other words. Give attack.paraphrase_file.")
        kinds.remove("paraphrase")
    return kinds


def suited(
    named: Sequence[str], kinds: Sequence[str], composition: Composition, say: Callable[[str], None]
) -> list[str]:
    """The attacks that mean something on what is attacked; `all` leaves out, and says so, what does not."""
    reasons: dict[str, str] = {}
    if not composition.guardrails and not composition.wrappers:
        reasons["unhook"] = "there is nothing to take off, for the weights themselves were changed"
    if composition.wrappers:
        within = ("soft-prompt", "probe", "suffix")
        reasons |= dict.fromkeys(within, "it searches within the model, not around wrappers")
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


def _attacker_knows(recipe: Recipe, bench: str, questions: list[Question]) -> tuple[list[Question], list[Question]]:
    """What the attacker trains on and what is then asked: of a lab bench the two splits, else disjoint samples."""
    n_known = recipe.attack.known_questions
    is_lab = bench in lab.bench_names()
    pool = load_questions(bench, recipe.eval, "dev" if recipe.eval.split == "test" else "test") if is_lab else questions
    if len(pool) < n_known + (not is_lab):
        raise DsgError(
            f"{bench} has {len(pool)} questions for an attacker who knows {n_known} and is asked others.",
            "Lower attack.known_questions.",
        )
    known = random.Random(recipe.seed).sample(range(len(pool)), n_known)
    others = questions if is_lab else [question for i, question in enumerate(questions) if i not in known]
    return [pool[i] for i in known], others
