"""Commands that look at what is there: ls, show, verify, generate, inspect, report."""

import dataclasses
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from dsg_cli.cli import options as opt
from dsg_cli.cli.options import command, complete, complete_artifact, names_of, setting
from dsg_cli.cli.output import Output, Screen, check_new_file
from dsg_cli.errors import DsgError, nearest
from dsg_cli.workspace.files import is_taken, write_atomically

if TYPE_CHECKING:
    from dsg_cli.settings import Recipe


@command(without=[opt.QUIET])
def ls_command(
    out: Output,
    /,
    what: Annotated[
        str | None,
        Argument(
            help=f"{', '.join(opt.NAMES)}, saes/RELEASE; by default the artifacts.",
            autocompletion=lambda incomplete: [kind for kind in opt.NAMES if kind.startswith(incomplete)],
        ),
    ] = None,
) -> None:
    """List artifacts, or the names that options take."""
    if what is not None:
        if what not in opt.NAMES and what.partition("/")[0] != "saes":
            raise DsgError(f"dsg ls knows no {what}.", nearest(what, opt.NAMES))
        if what == "corpora" and not out.as_json and out.is_terminal:
            from dsg_cli.report.tables import corpora_table

            out.print(corpora_table())
        else:
            out.lines(names_of(what) if what in opt.NAMES else opt.ids_of(what.removeprefix("saes/")))
        return
    ids = out.store.ids()
    if out.as_json:
        out.json([out.store.read(artifact_id).json for artifact_id in ids])
    elif out.is_terminal and ids:
        from dsg_cli.report.tables import list_table

        out.print(list_table(out.store))
    else:
        out.lines(ids)
    if not ids:
        state = "is empty" if out.workspace.is_dir() else "does not exist yet"
        out.hint(f"{out.workspace} {state}. Fill it with: dsg demo -w {shlex.quote(str(out.workspace))}")


@command(without=[opt.QUIET])
def show_command(
    out: Output,
    /,
    artifact: Annotated[
        str, Argument(help="Id, such as eval-001, or path of its JSON file.", autocompletion=complete_artifact())
    ],
) -> None:
    """Show one artifact: what it found and where it came from."""
    from dsg_cli.report.tables import artifact_table, provenance_tree

    stored = out.store.read(artifact)
    if out.as_json:
        out.json(stored.json)
    else:
        out.print(artifact_table(stored))
        out.print(provenance_tree(stored))


@command(without=[opt.QUIET])
def verify_command(out: Output, /) -> None:
    """Verify every file of a workspace.

    Each is held against its digest, and every artifact against what it was computed from.

    Exits with 1 if anything is broken.
    """
    from dsg_cli.report.tables import verify_table
    from dsg_cli.workspace.store import verify_all

    verdicts = verify_all(out.store)
    if out.as_json:
        out.json([dataclasses.asdict(verdict) for verdict in verdicts])
    else:
        out.print(verify_table(verdicts))
    if any(verdict.state == "broken" for verdict in verdicts):
        raise typer.Exit(1)


@command(
    setting("generate.side", str, "both (default), base or guarded."),
    setting("generate.max_new_tokens", int, "Tokens to write, at most."),
    setting("generate.temperature", float, "0 (default): likeliest token."),
    setting("generate.chat", bool, "Ask in the tokenizer's chat template."),
    setting("generate.on_trigger", str, "clamp (default), or refuse: end with a sentence."),
    setting("generate.refusal", str, "That sentence."),
    *opt.GUARDED,
)
def generate_command(
    recipe: "Recipe",
    out: Output,
    /,
    prompts: Annotated[
        list[str] | None, Argument(metavar="[PROMPT]...", help="Text to continue; without any, stdin.")
    ] = None,
    file: Annotated[Path | None, Option(help="One prompt a line, or a .jsonl of {prompt}; - reads stdin.")] = None,
    sources: opt.FromMany = None,
) -> None:
    """Try prompts on the base model and on the guarded one.

    Example: dsg generate "Question: What is the counter of the grim hex" --on-trigger refuse
    """
    from dsg_cli.data.readers import read_prompts

    texts = read_prompts(prompts or [], file)
    screen = Screen(out, recipe.generate.side)
    with out.computing(has_bars=not screen.is_live) as report:
        from dsg_cli.stages.prompts import run_prompts

        written = []
        for answers in run_prompts(recipe, out.store, texts, sources=sources or [], write=screen.write, say=out.talk):
            written.append(answers.as_json())
            screen.close(answers)
            report("answers, prompts", len(written), len(texts))
    if out.as_json:
        out.json(written)


@command(*opt.GUARDED, opt.REUSE)
def inspect_command(
    recipe: "Recipe",
    out: Output,
    /,
    artifact: Annotated[
        str | None,
        Argument(
            metavar="[ARTIFACT]",
            help="Guardrail or features; by default the newest guardrail, else the newest features.",
            autocompletion=complete_artifact("guardrail", "features"),
        ),
    ] = None,
    prompts: Annotated[
        list[str] | None, Option("--prompt", help="Only show what they see of a prompt; repeatable.")
    ] = None,
    chat: Annotated[bool, Option("--chat", help="Prompts in the tokenizer's chat template.")] = False,
    features: Annotated[
        list[int] | None, Option("--feature", help="These features, any of the SAE; repeatable.")
    ] = None,
    is_live: Annotated[
        bool, Option("--serve", help="Show prompts live, on a page that only this machine can open.")
    ] = False,
    port: Annotated[int, Option("--port", help="Of that page; 0 takes any.", min=0, max=65535)] = 8731,
    near: Annotated[
        list[str] | None,
        Option(help="Corpus near to what is forgotten; repeatable.", autocompletion=complete("corpora")),
    ] = None,
    n_contexts: Annotated[int, Option("--contexts", help="Contexts of each feature in each corpus.")] = 3,
    samples: Annotated[bool, Option("--samples", help="Keep the text of contexts.")] = False,
    neuronpedia: Annotated[
        bool, Option("--neuronpedia", help="Ask neuronpedia.org what features are said to be.")
    ] = False,
    page: Annotated[Path | None, Option("--html", help="Write the same to an HTML file, with text.")] = None,
    force: Annotated[bool, Option("--force", help="Replace that file.")] = False,
    limit: Annotated[int | None, Option(help=opt.DOCUMENTS)] = None,
) -> None:
    """What are the chosen features about? With --prompt: what do they and the gate see of it, token by token?

    Example: dsg inspect guardrail-001 --near lab-near, or dsg inspect --prompt "What is the counter of the grim hex"
    """
    modes = [flag for flag, value in {"--serve": is_live, "--prompt": prompts}.items() if value]
    options = {"--near": near, "--samples": samples, "--neuronpedia": neuronpedia, "--html": page, "--limit": limit}
    for_inspection = [flag for flag, value in {**options, "--reuse": out.reuse}.items() if value]
    if modes and (clashing := [*modes[1:], *for_inspection]):
        raise DsgError(f"{modes[0]} does not go with {clashing[0]}.", "Leave one of the two out.")
    if is_live:
        _serve(recipe, out, artifact, port)
    elif prompts:
        _show_prompts(recipe, out, prompts, artifact, features or [], chat=chat)
    elif chat:
        raise DsgError("--chat says how to put --prompt.", "Give a prompt, or leave it out.")
    else:
        if page is not None:
            check_new_file(page, "--html", force=force)
        with out.session() as session:
            from dsg_cli.stages import inspect

            settings = inspect.InspectSettings(near or [], features or [], n_contexts, samples, neuronpedia, limit)
            shown = inspect.run(recipe, out.store, source=artifact, settings=settings, options=session)
            from dsg_cli.report.inspections import inspection_page, inspection_view

            view = inspection_view(shown.stored, shown.rows)
            if page is not None:
                write_atomically(page, inspection_page(shown.stored, shown.rows).encode())
        out.show(shown.stored, view=view)


def _show_prompts(
    recipe: "Recipe", out: Output, prompts: Sequence[str], artifact: str | None, features: Sequence[int], *, chat: bool
) -> None:
    with out.computing():
        from dsg_cli.stages.prompts import trace_prompts

        options: dict[str, Any] = {"source": artifact, "features": features, "chat": chat, "say": out.talk}
        traces = list(trace_prompts(recipe, out.store, prompts, **options))
    if out.as_json:
        out.json([trace.as_json() for trace in traces])
        return
    from dsg_cli.report.inspections import trace_view

    for trace in traces:
        out.print(trace_view(trace))


def _serve(recipe: "Recipe", out: Output, source: str | None, port: int) -> None:
    """Load both models, say where the page is, and answer it until a signal comes."""
    from dsg_cli.inspection.live.server import Server

    with Server(port) as server:
        with out.computing():
            from dsg_cli.stages import prompts

            live = prompts.load(recipe, out.store, [source] if source else [], out.talk)
            server.about, server.ask = live.about(), live.ask
        out.line(server.url)
        out.stdout.flush()  # A script waits for it.
        out.hint("Open it in a browser; Ctrl-C ends it.")
        server.serve_forever()


@command(opt.RECIPE)
def report_command(
    recipe: "Recipe",
    out: Output,
    /,
    artifacts: Annotated[
        list[str] | None,
        Argument(
            metavar="[ARTIFACT]...",
            help="What it is about. By default the newest comparison, inspection and study of each name, and the "
            "newest guardrail, model or wrapper with all its evaluations and attacks; with what these were made from.",
            autocompletion=complete_artifact(),
        ),
    ] = None,
    output: Annotated[Path, Option("--output", "-o", help="HTML file to write.")] = Path("dsg-report.html"),
    figures: Annotated[Path | None, Option("--figures", help="Folder for the figures as files, too.")] = None,
    formats: Annotated[list[str] | None, Option("--format", help="svg (default), png, pdf; repeatable.")] = None,
    title: Annotated[str, Option(help="Of the page.")] = "Unlearning report",
    with_text: Annotated[
        bool, Option("--with-text", help="Show texts in which features fire, where dsg inspect --samples kept them.")
    ] = False,
    force: Annotated[bool, Option("--force", help="Replace files that are there.")] = False,
) -> None:
    """Put what was found into one HTML file that needs nothing else, with figures.

    Example: dsg report -o report.html --figures figures --format pdf
    """
    start = time.monotonic()
    kinds = list(dict.fromkeys(formats or ["svg"]))
    if unknown := [kind for kind in kinds if kind not in ("svg", "png", "pdf")]:
        raise DsgError(f"Figures are written as svg, png or pdf, not as {unknown[0][:40]}.")
    check_new_file(output, "--output", force=force)
    if figures is not None and is_taken(figures) and not figures.is_dir():
        raise DsgError(f"{figures} is no folder.", "Name another with --figures.")
    with out.progress() as progress:
        from dsg_cli.report.evaluations import beside
        from dsg_cli.report.gather import gather
        from dsg_cli.report.page import report_of, write_report

        progress("reading", 0, 0)
        gathered = gather(out.store, artifacts or [])
        results = {bench: sides for stored in gathered.of("eval") for bench, sides in stored.json["results"].items()}
        progress("drawing", 0, 0)
        page = report_of(gathered, title, beside(recipe.published, results), has_text=with_text)
        files = write_report(page, output, figures, kinds, force=force)
    if out.as_json:
        written = {"path": str(output), "bytes": output.stat().st_size, "seconds": round(time.monotonic() - start, 2)}
        ids = [stored.id for stored in gathered.artifacts]
        out.json({**written, "artifacts": ids, "figures": [str(path) for path in files]})
    else:
        out.line(str(output))
