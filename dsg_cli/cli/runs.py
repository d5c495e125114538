"""Commands that do many stages at once: run, demo, compare, study."""

import dataclasses
from collections.abc import Mapping
from inspect import Parameter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from dsg_cli.cli import options as opt
from dsg_cli.cli.options import command, complete, setting
from dsg_cli.cli.output import Output, in_workspace, next_command
from dsg_cli.errors import DsgError
from dsg_cli.studies import STUDIES, check_study

if TYPE_CHECKING:
    from dsg_cli.settings import Recipe
    from dsg_cli.workspace.store import Stored

DEMO_WORKSPACE = Path("dsg-demo")
"""Apart from other work: the demo's guardrail has the paper's gate, which cannot guard text while it is written."""

Markdown = Annotated[bool, Option("--markdown", help="Print Markdown.")]

RecipeName = Annotated[
    str, Argument(help="YAML file, or the name of a shipped recipe.", autocompletion=complete("recipes"))
]
RECIPE_NAME = Parameter("recipe", Parameter.KEYWORD_ONLY, annotation=RecipeName)


@command(RECIPE_NAME, opt.SETS, *opt.DEVICE, opt.SEED, opt.SUMMARY, *opt.RUNNING)
def run_command(
    recipe: "Recipe",
    out: Output,
    /,
    is_dry: Annotated[bool, Option("--dry-run", help="Say what would be done, and do nothing.")] = False,
) -> None:
    """Run the whole chain from a recipe.

    Example: dsg run lab --set select.n_features=20
    """
    if not is_dry:
        run_chain(recipe, out)
        return
    from dsg_cli.stages.run import plan

    steps = plan(recipe)
    if out.as_json:
        out.json([dataclasses.asdict(step) for step in steps])
    else:
        out.lines(step.line() for step in steps)


@command(opt.SUMMARY, opt.WORKSPACE.replace(default=DEMO_WORKSPACE))
def demo_command(out: Output, /) -> None:
    """Make the embedded lab forget a domain, and attack the result.

    Needs no download.

    The same as: dsg run lab
    """
    from dsg_cli.recipe import RECIPES, load_recipe

    run_chain(load_recipe(str(RECIPES / "lab.yaml")), out)


def run_chain(recipe: "Recipe", out: Output) -> None:
    """Run, then show one table (on a terminal or off it) or one JSON document."""
    with out.session() as session:
        from dsg_cli.stages import run

        chain = run.run(recipe, out.store, options=session, done=lambda stored: out.hint(f"wrote {stored.id}"))
    out.summarise(chain)
    from dsg_cli.report.summary import chain_summary, chain_table

    if out.as_json:
        out.json(chain_summary(chain, recipe.published))
    else:
        out.print(chain_table(chain, recipe.published))
        out.line(f"Artifacts in {out.workspace}: {', '.join(stored.id for stored in chain)}")
    out.hint(f"Next: dsg ls{in_workspace(out.workspace)}")
    out.exit_unless_met(chain)


@command(
    setting("compare.methods", list[str], "`dsg ls methods`; all by default.", "--method", names="methods"),
    setting("compare.budget", int, "Trials of each method on dev questions."),
    setting("compare.forget", str, "Forget questions; by default named like the corpus.", "--bench"),
    setting("compare.near", list[str], "Bench near them, which must be kept."),
    setting("compare.other", list[str], "Further bench, such as mmlu."),
    *opt.TRIALS,
)
def compare_command(
    recipe: "Recipe",
    out: Output,
    /,
    sources: Annotated[
        list[str] | None, Option("--from", help="Collect artifacts instead: guardrail-001, or model-001+guardrail-002.")
    ] = None,
    as_markdown: Markdown = False,
) -> None:
    """Compare methods: the same text, questions and search for each.

    Example: dsg compare --recipe lab-compare --method dsg --method npo --budget 2
    """
    with out.session() as session:
        from dsg_cli.stages import compare

        stored = compare.run(recipe, out.store, sources=sources or [], options=session)
    from dsg_cli.report.comparison import comparison_markdown, comparison_table

    where = f"The comparison is {stored.id} in {out.workspace}."
    show_table(stored, out, comparison_table, comparison_markdown, where, as_markdown=as_markdown)
    out.hint(f"Every trial: dsg show {stored.id} --json{in_workspace(out.workspace)}")
    out.hint(f"Next: {next_command(stored)}")


def show_table(stored: "Stored", out: Output, table: Any, markdown: Any, where: str, *, as_markdown: bool) -> None:
    """One table and a line on where it lies, as Markdown or as JSON; the same appended to the summary."""
    out.append(f"## dsg: {stored.id}\n\n{markdown(stored.body)}\n")
    if out.as_json:
        out.json(stored.json)
    elif as_markdown:
        out.line(markdown(stored.body))
    else:
        out.print(table(stored.body))
        out.line(where)


def study_settings(
    name: str,
    grid: Annotated[list[str] | None, Option(help="SETTING=VALUE,VALUE,...: what is varied; repeatable.")] = None,
) -> Mapping[str, Any]:
    """`n_features=4,8` as the list of that setting."""
    check_study(name)
    from dsg_cli.recipe import parse_yaml

    settings = {}
    for text in grid or []:
        axis, separator, values = text.partition("=")
        if not separator or not axis.isidentifier():
            raise DsgError(f"--grid {text[:200]}: expected SETTING=VALUE,VALUE,...")
        items = values.strip().removeprefix("[").removesuffix("]")
        settings[f"study.grids.{name}.{axis}"] = parse_yaml(f"[{items}]", f"--grid {text[:200]}: the value is")
    return settings


@command(
    setting("study.split", str, "dev to choose by, test to report."),
    setting("study.forget", str, "Forget questions; by default named like the corpus.", "--bench"),
    setting("study.benches", list[str], "Bench that must stay answered; by default those of eval.", "--other"),
    *opt.TRIALS,
    settings=study_settings,
)
def study_command(
    recipe: "Recipe",
    out: Output,
    /,
    name: Annotated[str, Argument(help=", ".join(STUDIES), autocompletion=complete("studies"))],
    source: opt.FromFeatures = None,
    as_markdown: Markdown = False,
) -> None:
    """Vary settings over a grid, and write the table.

    Example: dsg study stability --recipe lab --grid n_features=4,8,16 --grid strength=4r,16r
    """
    with out.session() as session:
        from dsg_cli.stages import study

        stored = study.run(recipe, out.store, name, source=source, options=session)
    from dsg_cli.report.studies import study_markdown, study_table
    from dsg_cli.workspace.results import StudyReport

    n_points = stored.body_as(StudyReport).computed["n_points"]
    where = f"{stored.id} in {out.workspace}: {n_points} points in {stored.header.seconds:.1f} s"
    show_table(stored, out, study_table, study_markdown, where, as_markdown=as_markdown)
    out.hint(f"Every row: {stored.path.with_suffix('.csv')}")
    out.hint(f"Next: {next_command(stored)}")
