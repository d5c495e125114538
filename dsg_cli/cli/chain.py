"""`dsg select`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dsg_cli.cli import options as opt
from dsg_cli.cli.options import complete
from dsg_cli.cli.output import exit_unless_met, print_table, running, show_stored, summary_to
from dsg_cli.errors import DsgError
from dsg_cli.workspace.files import is_file

if TYPE_CHECKING:
    from dsg_cli.inspection.descriptions import Candidates


BY_MEANING = "Without forget text"


def select_command(
    forget: opt.ForgetOption = None,
    retain: opt.RetainOption = None,
    model: opt.ModelOption = None,
    sae: opt.SaeOption = None,
    n_features: Annotated[int | None, typer.Option("-n", "--n-features", help="Features to select.")] = None,
    ratio_percentile: Annotated[
        float | None, typer.Option("--ratio-percentile", help="Importance ratio a feature must reach.")
    ] = None,
    score: Annotated[str | None, typer.Option("--score", help="mean-square or squared-mean.")] = None,
    describe: Annotated[
        str | None,
        typer.Option(help="Take the features whose descriptions match these words.", rich_help_panel=BY_MEANING),
    ] = None,
    descriptions: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Descriptions; by default Neuronpedia's, if it has any.", rich_help_panel=BY_MEANING
        ),
    ] = None,
    embedding: Annotated[
        str | None,
        typer.Option(help="Match by this embedding model instead of by words.", rich_help_panel=BY_MEANING),
    ] = None,
    features: Annotated[
        str | None,
        typer.Option(metavar="I,J,...", help="Take these features, such as a paper's.", rich_help_panel=BY_MEANING),
    ] = None,
    samples: Annotated[
        bool | None, typer.Option("--samples", help="Keep the descriptions' text.", rich_help_panel=BY_MEANING)
    ] = None,
    limit: opt.DocumentsOption = None,
    workspace: opt.WorkspaceOption = opt.DEFAULT_WORKSPACE,
    recipe: opt.RecipeOption = None,
    sets: opt.SetOption = None,
    device: opt.DeviceOption = None,
    dtype: opt.DtypeOption = None,
    device_map: opt.DeviceMapOption = None,
    trust_remote_code: opt.TrustOption = None,
    seed: opt.SeedOption = None,
    reuse: opt.ReuseOption = False,
    resume: opt.ResumeOption = False,
    as_json: opt.JsonOption = False,
    quiet: opt.QuietOption = False,
) -> None:
    """Find the SAE features that carry the knowledge to be forgotten.

    Example: dsg select --forget wmdp-bio --retain wikitext, or dsg select --describe "pathogen virus" --retain wikitext
    """
    resolved = opt.settings(
        recipe,
        sets,
        device=device,
        dtype=dtype,
        seed=seed,
        model__device_map=device_map,
        model__trust_remote_code=trust_remote_code,
        corpora__forget=forget,
        corpora__retain=retain,
        corpora__limit=limit,
        model__source=model,
        sae__source=sae,
        select__n_features=n_features,
        select__ratio_percentile=ratio_percentile,
        select__score=score,
        select__describe=describe,
        select__descriptions=descriptions,
        select__embedding=embedding,
        select__features=_indices(features),
        select__samples=samples,
    )
    ranked: list[Candidates] = []
    with running(quiet, reuse=reuse, resume=resume) as options:
        from dsg_cli.stages import select
        from dsg_cli.workspace.store import Workspace

        stored = select.run(resolved, Workspace(workspace), options=options, ranked=ranked.append)
    if ranked and ranked[0].texts and not quiet:
        from dsg_cli.report.tables import candidates_table

        print_table(candidates_table(ranked[0]))
    show_stored(stored, as_json=as_json, quiet=quiet)


def _indices(text: str | None) -> list[int] | None:
    """Indices as they stand in a paper: with commas or spaces between them."""
    words = (text or "").replace(",", " ").split()
    if text is not None and not (words and all(word.isascii() and word.isdigit() for word in words)):
        raise DsgError(f"--features {text[:100]} is no list of indices.", "Write --features 12382,9722.")
    return [int(word) for word in words] or None


def calibrate_command(
    source: opt.FromFeaturesOption = None,
    retain: Annotated[
        list[str] | None,
        typer.Option(
            "--retain",
            help="Other retain corpora than those of select; repeatable.",
            autocompletion=complete("corpora"),
        ),
    ] = None,
    gate: Annotated[
        str | None,
        typer.Option(
            "--gate",
            help="probe (default), window, cusum, causal-mean, or the paper's mean.",
            autocompletion=complete("gates"),
        ),
    ] = None,
    alpha: Annotated[float | None, typer.Option("--alpha", help="Promised rate of false positives.")] = None,
    lengths: Annotated[
        str | None,
        typer.Option("--lengths", help="Of pieces of retain text: 8:128, or a file of prompts to take them from."),
    ] = None,
    workspace: opt.WorkspaceOption = opt.DEFAULT_WORKSPACE,
    recipe: opt.RecipeOption = None,
    sets: opt.SetOption = None,
    device: opt.DeviceOption = None,
    dtype: opt.DtypeOption = None,
    device_map: opt.DeviceMapOption = None,
    trust_remote_code: opt.TrustOption = None,
    seed: opt.SeedOption = None,
    reuse: opt.ReuseOption = False,
    resume: opt.ResumeOption = False,
    as_json: opt.JsonOption = False,
    quiet: opt.QuietOption = False,
) -> None:
    """Set the gate's threshold on text that selection has not seen.

    Example: dsg calibrate --alpha 0.05
    """
    resolved = opt.settings(
        recipe,
        sets,
        device=device,
        dtype=dtype,
        seed=seed,
        model__device_map=device_map,
        model__trust_remote_code=trust_remote_code,
        calibrate__retain=retain,
        calibrate__gate=gate,
        calibrate__alpha=alpha,
        **lengths_setting(lengths),
    )
    with running(quiet, reuse=reuse, resume=resume) as options:
        from dsg_cli.stages import calibrate
        from dsg_cli.workspace.store import Workspace

        stored = calibrate.run(resolved, Workspace(workspace), source=source, options=options)
    show_stored(stored, as_json=as_json, quiet=quiet)


def lengths_setting(text: str | None) -> dict[str, object]:
    """`8:128` as the lengths 8 to 128; a file as where they are taken from."""
    if text is None:
        return {}
    try:
        return {"calibrate__lengths": [int(part) for part in text.split(":")]}
    except ValueError as error:
        if is_file(Path(text)):
            return {"calibrate__lengths_from": text}
        raise DsgError(f"--lengths {text} is neither of the form 8:128 nor a file.") from error


STRENGTHS = {
    "static-clamp": "methods__static_clamp__strength",
    "conditional-clamp": "methods__conditional_clamp__strength",
    "refusal-clamp": "methods__refusal_clamp__coefficient",
}
"""Methods of which `--strength` is another setting than that of `dsg`."""


def apply_command(
    method: Annotated[
        str | None,
        typer.Option(
            "--method", help="`dsg` (default), or another: `dsg ls methods`.", autocompletion=complete("methods")
        ),
    ] = None,
    source: opt.FromThresholdOption = None,
    forget: opt.ForgetOption = None,
    retain: opt.RetainOption = None,
    train: opt.TrainOption = None,
    model: opt.ModelOption = None,
    sae: opt.SaeOption = None,
    limit: opt.DocumentsOption = None,
    strength: Annotated[
        str | None,
        typer.Option(
            "--strength",
            help="c, to whose negative features are set: 500, 16r (default, in median residual norms), or auto.",
        ),
    ] = None,
    lora: Annotated[
        bool | None, typer.Option("--lora", help="Train low-rank adapters (PEFT) instead of the weights.")
    ] = None,
    export_to: Annotated[
        str | None, typer.Option("--export", help="Also write the guarded model here, as dsg export does.")
    ] = None,
    allow_ineffective: opt.IneffectiveOption = None,
    workspace: opt.WorkspaceOption = opt.DEFAULT_WORKSPACE,
    recipe: opt.RecipeOption = None,
    sets: opt.SetOption = None,
    device: opt.DeviceOption = None,
    dtype: opt.DtypeOption = None,
    device_map: opt.DeviceMapOption = None,
    trust_remote_code: opt.TrustOption = None,
    seed: opt.SeedOption = None,
    reuse: opt.ReuseOption = False,
    resume: opt.ResumeOption = False,
    as_json: opt.JsonOption = False,
    quiet: opt.QuietOption = False,
) -> None:
    """Build the guardrail, or apply any other method.

    A guardrail is tried on forget text first: one that does nothing there is refused.

    Example: dsg apply --strength 16r, or dsg apply --method npo --model lab --forget lab-hexes --retain lab-retain
    """
    from dsg_cli.methods import check_corpora, check_lora, finetunes, section_of

    check_corpora(method or "dsg", train=train or [], others=[*(forget or []), *(retain or [])])
    own: dict[str, Any] = {STRENGTHS.get(method or "", "guardrail__strength"): strength}
    own |= {"methods__finetune__corpora": train, "methods__finetune__limit": limit if finetunes(method or "") else None}
    if lora:
        check_lora(method or "dsg")
        own[f"methods__{section_of(method or '')}__lora"] = True
    resolved = opt.settings(
        recipe,
        sets,
        device=device,
        dtype=dtype,
        seed=seed,
        model__device_map=device_map,
        model__trust_remote_code=trust_remote_code,
        model__source=model,
        sae__source=sae,
        corpora__forget=forget,
        corpora__retain=retain,
        corpora__limit=limit,
        guardrail__allow_ineffective=allow_ineffective,
        **own,
    )
    with running(quiet, reuse=reuse, resume=resume) as options:
        from dsg_cli.stages import apply, export
        from dsg_cli.stages import apply as methods
        from dsg_cli.workspace.store import Workspace

        made_in = Workspace(workspace)
        if export_to is not None:
            export.check_target(export_to)
            export.check_exportable(made_in, method or "dsg", source)
        if method is None:
            stored = apply.run(resolved, made_in, source=source, options=options)
        else:
            stored = methods.run_method(resolved, made_in, method, source=source, options=options)
        if export_to is not None:
            export.run(resolved, made_in, export_to, sources=[stored.id], report=options.report)
    show_stored(stored, as_json=as_json, quiet=quiet)


def evaluate_command(
    bench: Annotated[
        list[str] | None,
        typer.Option("--bench", help="`dsg ls benches`, or of lm-eval.", autocompletion=complete("benches")),
    ] = None,
    sources: opt.FromManyOption = None,
    split: Annotated[str | None, typer.Option("--split", help="dev or test questions of a lab bench.")] = None,
    include_path: Annotated[str | None, typer.Option("--include-path", help="Folder of lm-eval tasks.")] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", help="Sequences in a batch.")] = None,
    limit: Annotated[int | None, typer.Option("--limit", help="Questions of each bench, at most.")] = None,
    num_fewshot: Annotated[int | None, typer.Option("--num-fewshot", help="Examples before each question.")] = None,
    chat: Annotated[bool | None, typer.Option("--apply-chat-template", help="Ask in the chat template.")] = None,
    question_ids: Annotated[
        str | None, typer.Option("--question-ids", help="Questions that count: an eval-NNN.json, or a file of ids.")
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option("--reference", help="Model that never saw what is forgotten, or its stored scores."),
    ] = None,
    holdout: Annotated[
        list[str] | None, typer.Option("--holdout", help="Corpus that the model never saw, for memory:CORPUS.")
    ] = None,
    expect: Annotated[
        list[str] | None, typer.Option("--expect", help="'lab-hexes<=0.30', 'mmlu>=0.99*base'; exit 3 if not met.")
    ] = None,
    samples: Annotated[bool | None, typer.Option("--samples", help="Keep the questions' texts.")] = None,
    workspace: opt.WorkspaceOption = opt.DEFAULT_WORKSPACE,
    recipe: opt.RecipeOption = None,
    sets: opt.SetOption = None,
    device: opt.DeviceOption = None,
    dtype: opt.DtypeOption = None,
    device_map: opt.DeviceMapOption = None,
    trust_remote_code: opt.TrustOption = None,
    seed: opt.SeedOption = None,
    instead: opt.InsteadOption = None,
    allow_mismatch: opt.MismatchOption = None,
    allow_ineffective: opt.IneffectiveOption = None,
    summary: opt.SummaryOption = None,
    reuse: opt.ReuseOption = False,
    resume: opt.ResumeOption = False,
    as_json: opt.JsonOption = False,
    quiet: opt.QuietOption = False,
) -> None:
    """Ask the base model and the guarded model the same questions.

    Example: dsg eval --bench lab-hexes --bench lab-near --expect 'lab-hexes<=0.30'
    """
    resolved = opt.settings(
        recipe,
        sets,
        device=device,
        dtype=dtype,
        seed=seed,
        model__device_map=device_map,
        model__trust_remote_code=trust_remote_code,
        model__instead=instead,
        model__allow_mismatch=allow_mismatch,
        guardrail__allow_ineffective=allow_ineffective,
        eval__benches=bench,
        eval__split=split,
        eval__include_path=include_path,
        eval__batch_size=batch_size,
        eval__limit=limit,
        eval__num_fewshot=num_fewshot,
        eval__apply_chat_template=chat,
        eval__question_ids=question_ids,
        eval__reference=reference,
        eval__holdout=holdout,
        eval__expect=expect,
        eval__samples=samples,
    )
    write_summary = summary_to(summary)
    with running(quiet, reuse=reuse, resume=resume) as options:
        from dsg_cli.stages import evaluate
        from dsg_cli.workspace.store import Workspace

        stored = evaluate.run(resolved, Workspace(workspace), sources=sources or [], options=options)
    write_summary([stored])
    show_stored(stored, as_json=as_json, quiet=quiet)
    exit_unless_met([stored])


def attack_command(
    kind: Annotated[
        list[str] | None,
        typer.Option("--kind", help="What to try, or `all`; repeatable.", autocompletion=complete("attacks")),
    ] = None,
    bench: Annotated[
        str | None,
        typer.Option(
            "--bench",
            help="Forget questions; by default the bench named like the corpus.",
            autocompletion=complete("benches"),
        ),
    ] = None,
    sources: opt.FromManyOption = None,
    expect: Annotated[
        list[str] | None,
        typer.Option("--expect", help="Condition such as 'dilution<=0.35' on what came back; exit 3 if not met."),
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", help="Questions, at most.")] = None,
    workspace: opt.WorkspaceOption = opt.DEFAULT_WORKSPACE,
    recipe: opt.RecipeOption = None,
    sets: opt.SetOption = None,
    device: opt.DeviceOption = None,
    dtype: opt.DtypeOption = None,
    device_map: opt.DeviceMapOption = None,
    trust_remote_code: opt.TrustOption = None,
    seed: opt.SeedOption = None,
    instead: opt.InsteadOption = None,
    allow_mismatch: opt.MismatchOption = None,
    summary: opt.SummaryOption = None,
    reuse: opt.ReuseOption = False,
    resume: opt.ResumeOption = False,
    as_json: opt.JsonOption = False,
    quiet: opt.QuietOption = False,
) -> None:
    """Try to get the knowledge back.

    Example: dsg attack --kind dilution --kind relearn --expect 'dilution<=0.35'
    """
    resolved = opt.settings(
        recipe,
        sets,
        device=device,
        dtype=dtype,
        seed=seed,
        model__device_map=device_map,
        model__trust_remote_code=trust_remote_code,
        model__instead=instead,
        model__allow_mismatch=allow_mismatch,
        attack__kinds=kind,
        attack__bench=bench,
        attack__expect=expect,
        eval__limit=limit,
    )
    from dsg_cli.attacks import expand_attacks
    from dsg_cli.evals.expect import parse_expected

    kinds = expand_attacks(resolved.attack.kinds)
    for text in resolved.attack.expect:
        parse_expected(text, kinds)
    write_summary = summary_to(summary)
    with running(quiet, reuse=reuse, resume=resume) as options:
        from dsg_cli.stages import attack
        from dsg_cli.workspace.store import Workspace

        # As they were named: `all` may leave out what it has no material for.
        named = resolved.attack.kinds
        stored = attack.run(resolved, Workspace(workspace), named, sources=sources or [], options=options)
    write_summary(stored)
    show_stored(stored, as_json=as_json, quiet=quiet)
    exit_unless_met(stored)
