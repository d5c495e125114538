"""`dsg calibrate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dsg_cli.cli import options as opt
from dsg_cli.cli.names import complete
from dsg_cli.cli.output import show_stored
from dsg_cli.cli.running import running
from dsg_cli.errors import DsgError
from dsg_cli.integrity import is_file


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
    with running(quiet, reuse=reuse, resume=resume) as session:
        from dsg_cli.stages import calibrate
        from dsg_cli.workspace import Workspace

        stored = calibrate.run(resolved, Workspace(workspace), source=source, session=session)
    show_stored(stored, as_json=as_json, quiet=quiet)


def lengths_setting(text: str | None) -> dict[str, object]:
    """`8:128` as the lengths 8 to 128; a file as where they are taken from.

    Raises:
        DsgError: Neither two whole numbers nor a file.
    """
    if text is None:
        return {}
    try:
        return {"calibrate__lengths": [int(part) for part in text.split(":")]}
    except ValueError as error:
        if is_file(Path(text)):
            return {"calibrate__lengths_from": text}
        raise DsgError(f"--lengths {text} is neither of the form 8:128 nor a file.") from error
