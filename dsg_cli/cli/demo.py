"""`dsg demo`."""

from __future__ import annotations

from pathlib import Path

from dsg_cli.cli import options as opt
from dsg_cli.cli.run import run_chain

DEMO_WORKSPACE = Path("dsg-demo")
"""Apart from other work: the demo's guardrail has the paper's gate, which cannot guard text while it is written."""


def command(
    workspace: opt.WorkspaceOption = DEMO_WORKSPACE,
    summary: opt.SummaryOption = None,
    as_json: opt.JsonOption = False,
    quiet: opt.QuietOption = False,
) -> None:
    """Make the embedded lab forget a domain, and attack the result.

    Needs no download.

    The same as: dsg run lab
    """
    from dsg_cli.recipe import RECIPES

    resolved = opt.settings(str(RECIPES / "lab.yaml"), None, device=None, dtype=None, seed=None)
    run_chain(resolved, workspace, summary=summary, reuse=False, as_json=as_json, quiet=quiet)
