"""The five stages: select, calibrate, apply, eval, attack."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from dsg_cli.cli import options as opt
from dsg_cli.cli.options import Sets, command, complete, complete_artifact, setting
from dsg_cli.cli.output import Output
from dsg_cli.errors import DsgError
from dsg_cli.workspace.files import is_file

if TYPE_CHECKING:
    from dsg_cli.inspection.descriptions import Candidates
    from dsg_cli.settings import Recipe

BY_MEANING: dict[str, Any] = {"rich_help_panel": "Without forget text"}


def select_settings(
    features: Annotated[
        str | None, Option(metavar="I,J,...", help="Take these features, such as a paper's.", **BY_MEANING)
    ] = None,
) -> Mapping[str, Any]:
    """Indices as they stand in a paper: with commas or spaces between them."""
    words = (features or "").replace(",", " ").split()
    if features is not None and not (words and all(word.isascii() and word.isdigit() for word in words)):
        raise DsgError(f"--features {features[:100]} is no list of indices.", "Write --features 12382,9722.")
    return {"select.features": [int(word) for word in words]}


@command(
    *opt.CORPORA,
    *opt.SOURCES,
    setting("select.n_features", int, "Features to select.", "-n", "--n-features"),
    setting("select.ratio_percentile", float, "Percentile of the importance ratio that a feature must reach."),
    setting("select.score", str, "mean-square or squared-mean."),
    setting("select.describe", str, "Take the features whose descriptions match these words.", **BY_MEANING),
    setting(
        "select.descriptions",
        str,
        "Descriptions; by default Neuronpedia's, if it has any.",
        metavar="FILE",
        **BY_MEANING,
    ),
    setting("select.embedding", str, "Match by this embedding model instead of by words.", **BY_MEANING),
    setting("select.samples", bool, "Keep the descriptions' text.", **BY_MEANING),
    opt.LIMIT,
    *opt.COMPUTING,
    *opt.RUNNING,
    settings=select_settings,
)
def select_command(recipe: "Recipe", out: Output, /) -> None:
    """Find the SAE features that carry the knowledge to be forgotten.

    Example: dsg select --forget wmdp-bio --retain wikitext, or dsg select --describe "pathogen virus" --retain wikitext
    """
    ranked: list[Candidates] = []
    with out.session() as session:
        from dsg_cli.stages import select

        stored = select.run(recipe, out.store, options=session, ranked=ranked.append)
    if ranked and ranked[0].texts and not out.quiet:
        from dsg_cli.report.tables import candidates_table

        out.table(candidates_table(ranked[0]))
    out.show(stored)


def calibrate_settings(
    lengths: Annotated[
        str | None, Option(help="Of pieces of retain text: 8:128, or a file of prompts to take them from.")
    ] = None,
) -> Mapping[str, Any]:
    """`8:128` as the lengths 8 to 128; a file as where they are taken from."""
    if lengths is None:
        return {}
    try:
        return {"calibrate.lengths": [int(part) for part in lengths.split(":")]}
    except ValueError as error:
        if is_file(Path(lengths)):
            return {"calibrate.lengths_from": lengths}
        raise DsgError(f"--lengths {lengths} is neither of the form 8:128 nor a file.") from error


@command(
    setting("calibrate.retain", list[str], "Other retain corpora than those of select; repeatable.", names="corpora"),
    setting("calibrate.gate", str, "probe (default), window, cusum, causal-mean, or the paper's mean.", names="gates"),
    setting("calibrate.alpha", float, "Promised rate of false positives."),
    *opt.COMPUTING,
    *opt.RUNNING,
    settings=calibrate_settings,
)
def calibrate_command(recipe: "Recipe", out: Output, /, source: opt.FromFeatures = None) -> None:
    """Set the gate's threshold on text that selection has not seen.

    Example: dsg calibrate --alpha 0.05
    """
    with out.session() as session:
        from dsg_cli.stages import calibrate

        stored = calibrate.run(recipe, out.store, source=source, options=session)
    out.show(stored)


STRENGTHS = {
    "static-clamp": "methods.static_clamp.strength",
    "conditional-clamp": "methods.conditional_clamp.strength",
    "refusal-clamp": "methods.refusal_clamp.coefficient",
}
"""Methods of which `--strength` is another setting than that of `dsg`."""


def apply_settings(
    method: str | None,
    forget: list[str] | None,
    retain: list[str] | None,
    limit: int | None,
    train: Annotated[
        list[str] | None,
        Option(help="For finetune: corpus to train on.", autocompletion=complete("corpora")),
        Sets("methods.finetune.corpora"),
    ] = None,
    strength: Annotated[
        str | None,
        Option(help="c, to whose negative features are set: 500, 16r (default, in median residual norms), or auto."),
    ] = None,
    lora: Annotated[
        bool | None, Option("--lora", help="Train low-rank adapters (PEFT) instead of the weights.")
    ] = None,
) -> Mapping[str, Any]:
    """What belongs to the settings of the method."""
    from dsg_cli.methods import check_corpora, check_lora, finetunes, section_of

    check_corpora(method or "dsg", train=train or [], others=[*(forget or []), *(retain or [])])
    settings: dict[str, Any] = {STRENGTHS.get(method or "", "guardrail.strength"): strength}
    if finetunes(method or ""):
        settings["methods.finetune.limit"] = limit
    if lora:
        check_lora(method or "dsg")
        settings[f"methods.{section_of(method or '')}.lora"] = True
    return settings


@command(*opt.CORPORA, *opt.SOURCES, opt.LIMIT, opt.INEFFECTIVE, *opt.COMPUTING, *opt.RUNNING, settings=apply_settings)
def apply_command(
    recipe: "Recipe",
    out: Output,
    /,
    method: Annotated[
        str | None, Option(help="`dsg` (default), or another: `dsg ls methods`.", autocompletion=complete("methods"))
    ] = None,
    source: Annotated[
        str | None,
        Option("--from", help=opt.FROM_HELP, autocompletion=complete_artifact("threshold", "features", "model")),
    ] = None,
    export_to: Annotated[
        str | None, Option("--export", help="Also write the guarded model here, as dsg export does.")
    ] = None,
) -> None:
    """Build the guardrail, or apply any other method.

    A guardrail is tried on forget text first: one that does nothing there is refused.

    Example: dsg apply --strength 16r, or dsg apply --method npo --model lab --forget lab-hexes --retain lab-retain
    """
    with out.session() as session:
        from dsg_cli.stages import apply

        if export_to is not None:
            from dsg_cli.stages import export

            export.check_target(export_to)
            export.check_exportable(out.store, method or "dsg", source)
        if method is None:
            stored = apply.run(recipe, out.store, source=source, options=session)
        else:
            stored = apply.run_method(recipe, out.store, method, source=source, options=session)
        if export_to is not None:
            export.run(recipe, out.store, export_to, sources=[stored.id], report=session.report)
    out.show(stored)


@command(
    setting("eval.benches", list[str], "`dsg ls benches`, or of lm-eval.", "--bench", names="benches"),
    setting("eval.split", str, "dev or test questions of a lab bench."),
    setting("eval.include_path", str, "Folder of lm-eval tasks."),
    setting("eval.batch_size", int, "Sequences in a batch."),
    setting("eval.limit", int, "Questions of each bench, at most."),
    setting("eval.num_fewshot", int, "Examples before each question."),
    setting("eval.apply_chat_template", bool, "Ask in the chat template."),
    setting("eval.question_ids", str, "Questions that count: an eval-NNN.json, or a file of ids."),
    setting("eval.reference", str, "Model that never saw what is forgotten, or its stored scores."),
    setting("eval.holdout", list[str], "Corpus that the model never saw, for memory:CORPUS."),
    setting("eval.expect", list[str], "'lab-hexes<=0.30', 'mmlu>=0.99*base'; exit 3 if not met."),
    setting("eval.samples", bool, "Keep the questions' texts."),
    opt.INEFFECTIVE,
    *opt.GUARDED,
    opt.SUMMARY,
    *opt.RUNNING,
)
def evaluate_command(recipe: "Recipe", out: Output, /, sources: opt.FromMany = None) -> None:
    """Ask the base model and the guarded model the same questions.

    Example: dsg eval --bench lab-hexes --bench lab-near --expect 'lab-hexes<=0.30'
    """
    with out.session() as session:
        from dsg_cli.stages import evaluate

        stored = evaluate.run(recipe, out.store, sources=sources or [], options=session)
    out.summarise([stored])
    out.show(stored)
    out.exit_unless_met([stored])


@command(
    setting("attack.kinds", list[str], "What to try, or `all`; repeatable.", "--kind", names="attacks"),
    setting("attack.bench", str, "Forget questions; by default the bench named like the corpus.", names="benches"),
    setting("attack.expect", list[str], "Condition such as 'dilution<=0.35' on what came back; exit 3 if not met."),
    setting("eval.limit", int, "Questions, at most."),
    *opt.GUARDED,
    opt.SUMMARY,
    *opt.RUNNING,
)
def attack_command(recipe: "Recipe", out: Output, /, sources: opt.FromMany = None) -> None:
    """Try to get the knowledge back.

    Example: dsg attack --kind dilution --kind relearn --expect 'dilution<=0.35'
    """
    from dsg_cli.attacks import expand_attacks
    from dsg_cli.evals.expect import parse_expected

    kinds = expand_attacks(recipe.attack.kinds)
    for text in recipe.attack.expect:
        parse_expected(text, kinds)
    with out.session() as session:
        from dsg_cli.stages import attack

        # Kinds as they were named: `all` may leave out what it has no material for.
        reports = attack.run(recipe, out.store, recipe.attack.kinds, sources=sources or [], options=session)
    out.summarise(reports)
    out.show(*reports)
    out.exit_unless_met(reports)
