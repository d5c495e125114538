"""`dsg select`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from dsg_cli.cli import options as opt
from dsg_cli.cli.output import print_table, show_stored
from dsg_cli.cli.running import running
from dsg_cli.errors import DsgError

if TYPE_CHECKING:
    from dsg_cli.stages.candidates import Candidates

BY_MEANING = "Without forget text"


def command(
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
    with running(quiet, reuse=reuse, resume=resume) as session:
        from dsg_cli.stages import select
        from dsg_cli.workspace import Workspace

        stored = select.run(resolved, Workspace(workspace), session=session, ranked=ranked.append)
    if ranked and ranked[0].texts and not quiet:
        from dsg_cli.report.picked import candidates_table

        print_table(candidates_table(ranked[0]))
    show_stored(stored, as_json=as_json, quiet=quiet)


def _indices(text: str | None) -> list[int] | None:
    """Indices as they stand in a paper: with commas or spaces between them."""
    words = (text or "").replace(",", " ").split()
    if text is not None and not (words and all(word.isascii() and word.isdigit() for word in words)):
        raise DsgError(f"--features {text[:100]} is no list of indices.", "Write --features 12382,9722.")
    return [int(word) for word in words] or None
