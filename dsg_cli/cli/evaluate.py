"""`dsg eval`."""

from __future__ import annotations

from typing import Annotated

import typer

from dsg_cli.cli import options as opt
from dsg_cli.cli.names import complete
from dsg_cli.cli.output import show_stored
from dsg_cli.cli.running import running
from dsg_cli.cli.verdict import exit_unless_met, summary_to


def command(
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
    with running(quiet, reuse=reuse, resume=resume) as session:
        from dsg_cli.stages import evaluate
        from dsg_cli.workspace import Workspace

        stored = evaluate.run(resolved, Workspace(workspace), sources=sources or [], session=session)
    write_summary([stored])
    show_stored(stored, as_json=as_json, quiet=quiet)
    exit_unless_met([stored])
