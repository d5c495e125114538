"""`dsg calibrate`."""

from __future__ import annotations

from typing import Annotated

import typer

from dsg_cli.cli import options as opt
from dsg_cli.cli.names import complete
from dsg_cli.cli.output import show_stored
from dsg_cli.cli.running import running
from dsg_cli.errors import DsgError


def command(
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
            "--gate", help="window (default), causal-mean, or the paper's mean.", autocompletion=complete("gates")
        ),
    ] = None,
    alpha: Annotated[float | None, typer.Option("--alpha", help="Promised rate of false positives.")] = None,
    lengths: Annotated[
        str | None, typer.Option("--lengths", help="Shortest and longest piece of retain text, such as 8:128.")
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
    """Set the threshold of the gate on retain text that selection has not seen.

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
        calibrate__lengths=None if lengths is None else parse_lengths(lengths),
    )
    with running(quiet, reuse=reuse, resume=resume) as session:
        from dsg_cli.stages import calibrate
        from dsg_cli.workspace import Workspace

        stored = calibrate.run(resolved, Workspace(workspace), source=source, session=session)
    show_stored(stored, as_json=as_json, quiet=quiet)


def parse_lengths(text: str) -> list[int]:
    """`8:128` as [8, 128].

    Raises:
        DsgError: Not two whole numbers.
    """
    try:
        return [int(part) for part in text.split(":")]
    except ValueError as error:
        raise DsgError(f"--lengths {text} is not of the form 8:128.") from error
