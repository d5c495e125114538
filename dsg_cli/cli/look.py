"""`dsg ls`."""

from __future__ import annotations

import dataclasses
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer

from dsg_cli.cli import options as opt
from dsg_cli.cli.options import NAMES, complete, complete_artifact, complete_kind, ids_of
from dsg_cli.cli.output import (
    Screen,
    check_new_file,
    hint,
    import_libraries,
    print_json,
    print_line,
    print_names,
    progress,
    running,
    show_stored,
)
from dsg_cli.data.readers import read_prompts
from dsg_cli.errors import DsgError, nearest
from dsg_cli.settings import Recipe
from dsg_cli.workspace.files import is_taken, write_atomically


def ls_command(
    what: Annotated[
        str | None,
        typer.Argument(
            help=f"{', '.join(NAMES)}, saes/RELEASE; by default the artifacts.", autocompletion=complete_kind
        ),
    ] = None,
    workspace: opt.WorkspaceOption = opt.DEFAULT_WORKSPACE,
    as_json: opt.JsonOption = False,
) -> None:
    """List artifacts, or the names that options take."""
    if what is not None:
        if what not in NAMES and what.partition("/")[0] != "saes":
            raise DsgError(f"dsg ls knows no {what}.", nearest(what, NAMES))
        if what == "corpora" and not as_json and sys.stdout.isatty():
            from dsg_cli.report.rendering import console
            from dsg_cli.report.tables import corpora_table

            console().print(corpora_table())
            return
        print_names(NAMES[what]() if what in NAMES else ids_of(what.removeprefix("saes/")), as_json=as_json)
        return
    from dsg_cli.workspace.store import Workspace

    found = Workspace(workspace)
    if as_json:
        print_json([found.read(artifact_id).json for artifact_id in found.ids()])
    elif sys.stdout.isatty() and found.ids():
        from dsg_cli.report.rendering import console
        from dsg_cli.report.tables import list_table

        console().print(list_table(found))
    else:
        print_names(found.ids(), as_json=False)
    if not found.ids():
        what = "is empty" if workspace.is_dir() else "does not exist yet"
        hint(f"{workspace} {what}. Fill it with: dsg demo -w {shlex.quote(str(workspace))}")


def show_command(
    artifact: Annotated[
        str,
        typer.Argument(help="Id, such as eval-001, or path of its JSON file.", autocompletion=complete_artifact()),
    ],
    workspace: opt.WorkspaceOption = opt.DEFAULT_WORKSPACE,
    as_json: opt.JsonOption = False,
) -> None:
    """Show one artifact: what it found and where it came from."""
    from dsg_cli.report.rendering import console
    from dsg_cli.report.tables import artifact_table, provenance_tree
    from dsg_cli.workspace.store import Workspace

    stored = Workspace(workspace).read(artifact)
    if as_json:
        print_json(stored.json)
    else:
        console().print(artifact_table(stored))
        console().print(provenance_tree(stored))


def verify_command(
    workspace: opt.WorkspaceOption = opt.DEFAULT_WORKSPACE,
    as_json: opt.JsonOption = False,
) -> None:
    """Verify every file of a workspace.

    Each is held against its digest, and every artifact against what it was computed from.

    Exits with 1 if anything is broken.
    """
    from dsg_cli.report.rendering import console
    from dsg_cli.report.tables import verify_table
    from dsg_cli.workspace import store as verify
    from dsg_cli.workspace.store import Workspace

    findings = verify.verify_all(Workspace(workspace))
    if as_json:
        print_json([dataclasses.asdict(finding) for finding in findings])
    else:
        console().print(verify_table(findings))
    if any(finding.state == "broken" for finding in findings):
        raise typer.Exit(1)


def generate_command(
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="[PROMPT]...", help="Text to continue; without any, stdin.")
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option("--file", help="One prompt a line, or a .jsonl of {prompt}; - reads stdin."),
    ] = None,
    sources: opt.FromManyOption = None,
    side: Annotated[str | None, typer.Option("--side", help="both (default), base or guarded.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option("--max-new-tokens", help="Tokens to write, at most.")] = None,
    temperature: Annotated[float | None, typer.Option("--temperature", help="0 (default): likeliest token.")] = None,
    chat: Annotated[bool | None, typer.Option("--chat", help="Ask in the tokenizer's chat template.")] = None,
    on_trigger: Annotated[
        str | None, typer.Option("--on-trigger", help="clamp (default), or refuse: end with a sentence.")
    ] = None,
    refusal: Annotated[str | None, typer.Option("--refusal", help="That sentence.")] = None,
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
    as_json: opt.JsonOption = False,
    quiet: opt.QuietOption = False,
) -> None:
    """Try prompts on the base model and on the guarded one.

    Example: dsg generate "Question: What is the counter of the grim hex" --on-trigger refuse
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
        generate__side=side,
        generate__max_new_tokens=max_new_tokens,
        generate__temperature=temperature,
        generate__chat=chat,
        generate__on_trigger=on_trigger,
        generate__refusal=refusal,
    )
    asked = read_prompts(prompts or [], file)
    screen = Screen(resolved.generate.side, is_silent=as_json)  # Takes hold of stdout, which libraries do not get.
    with progress(quiet or (sys.stdout.isatty() and not as_json)) as report:
        import_libraries()
        from dsg_cli.stages import prompts as generate
        from dsg_cli.workspace.store import Workspace

        written = []
        for done in generate.run_prompts(
            resolved, Workspace(workspace), asked, sources=sources or [], write=screen.write
        ):
            written.append(done.as_json())
            screen.close(done)
            report("answers, prompts", len(written), len(asked))
    if as_json:
        print_json(written)


def check_modes(modes: Mapping[str, object], others: Mapping[str, object]) -> None:
    """Refuse flags of one way to look at features beside those of another.

    Args:
        modes: Flags that choose what is done instead of an inspection, and their values.
        others: Flags that say how features are inspected.
    """
    chosen = [flag for flag, value in modes.items() if value]
    given = [*chosen[1:], *([flag for flag, value in others.items() if value] if chosen else [])]
    if given:
        raise DsgError(f"{chosen[0]} does not go with {given[0]}.", "Leave one of the two out.")


def show_prompts(
    recipe: Recipe,
    workspace: Path,
    prompts: Sequence[str],
    artifact: str | None,
    features: Sequence[int],
    *,
    chat: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Prompts one after another, each with what features and gate see of it."""
    with progress(quiet):
        import_libraries()
        from dsg_cli.stages import prompts as trace
        from dsg_cli.workspace.store import Workspace

        seen = list(
            trace.trace_prompts(recipe, Workspace(workspace), prompts, source=artifact, features=features, chat=chat)
        )
    if as_json:
        print_json([one.as_json() for one in seen])
        return
    from dsg_cli.report.inspections import trace_view
    from dsg_cli.report.rendering import console

    for one in seen:
        console().print(trace_view(one))


def serve(recipe: Recipe, workspace: Path, source: str | None, *, port: int, quiet: bool) -> None:
    """Load both models, say where the page is, and answer it until a signal comes."""
    from dsg_cli.inspection.live.server import Server

    with Server(port) as server:
        with progress(quiet):
            import_libraries()
            from dsg_cli.stages import prompts as live
            from dsg_cli.workspace.store import Workspace

            looked = live.load(recipe, Workspace(workspace), [source] if source else [])
            server.about, server.ask = looked.about(), looked.ask
        print_line(server.url)
        sys.stdout.flush()  # A script waits for it.
        if not quiet:
            hint("Open it in a browser; Ctrl-C ends it.")
        server.serve_forever()


def inspect_command(
    artifact: Annotated[
        str | None,
        typer.Argument(
            metavar="[ARTIFACT]",
            help="Guardrail or features; by default the newest guardrail, else the newest features.",
            autocompletion=complete_artifact(("guardrail", "features")),
        ),
    ] = None,
    prompts: Annotated[
        list[str] | None, typer.Option("--prompt", help="Only show what they see of a prompt; repeatable.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Prompts in the tokenizer's chat template.")] = False,
    features: Annotated[
        list[int] | None, typer.Option("--feature", help="These features, any of the SAE; repeatable.")
    ] = None,
    is_live: Annotated[
        bool, typer.Option("--serve", help="Show prompts live, on a page that only this machine can open.")
    ] = False,
    port: Annotated[int, typer.Option("--port", help="Of that page; 0 takes any.", min=0, max=65535)] = 8731,
    near: Annotated[
        list[str] | None,
        typer.Option(
            "--near", help="Corpus near to what is forgotten; repeatable.", autocompletion=complete("corpora")
        ),
    ] = None,
    n_contexts: Annotated[int, typer.Option("--contexts", help="Contexts of each feature in each corpus.")] = 3,
    samples: Annotated[bool, typer.Option("--samples", help="Keep the text of contexts.")] = False,
    neuronpedia: Annotated[
        bool, typer.Option("--neuronpedia", help="Ask neuronpedia.org what features are said to be.")
    ] = False,
    page: Annotated[Path | None, typer.Option("--html", help="Write the same to an HTML file, with text.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace that file.")] = False,
    limit: opt.DocumentsOption = None,
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
    reuse: opt.ReuseOption = False,
    as_json: opt.JsonOption = False,
    quiet: opt.QuietOption = False,
) -> None:
    """What are the chosen features about? With --prompt: what do they and the gate see of it, token by token?

    Example: dsg inspect guardrail-001 --near lab-near, or dsg inspect --prompt "What is the counter of the grim hex"
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
    )
    of_inspection = {"--near": near, "--samples": samples, "--neuronpedia": neuronpedia, "--html": page}
    check_modes({"--serve": is_live, "--prompt": prompts}, {**of_inspection, "--limit": limit, "--reuse": reuse})
    if is_live:
        serve(resolved, workspace, artifact, port=port, quiet=quiet)
        return
    if prompts:
        show_prompts(resolved, workspace, prompts, artifact, features or [], chat=chat, as_json=as_json, quiet=quiet)
        return
    if page is not None:
        check_new_file(page, "--html", force=force)
    if chat:
        raise DsgError("--chat says how to put --prompt.", "Give a prompt, or leave it out.")
    with running(quiet, reuse=reuse) as options:
        from dsg_cli.stages import inspect
        from dsg_cli.workspace.store import Workspace

        settings = inspect.InspectSettings(near or [], features or [], n_contexts, samples, neuronpedia, limit)
        shown = inspect.run(resolved, Workspace(workspace), source=artifact, settings=settings, options=options)
        from dsg_cli.report.inspections import inspection_view

        view = inspection_view(shown.stored, shown.rows)
        if page is not None:
            from dsg_cli.report.inspections import inspection_page

            write_atomically(page, inspection_page(shown.stored, shown.rows).encode())
    show_stored(shown.stored, as_json=as_json, quiet=quiet, view=view)


def report_command(
    artifacts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[ARTIFACT]...",
            help="What it is about. By default the newest comparison, inspection and study of each name, and the "
            "newest guardrail, model or wrapper with all its evaluations and attacks; with what these were made from.",
            autocompletion=complete_artifact(),
        ),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="HTML file to write.")] = Path("dsg-report.html"),
    figures: Annotated[Path | None, typer.Option("--figures", help="Folder for the figures as files, too.")] = None,
    formats: Annotated[list[str] | None, typer.Option("--format", help="svg (default), png, pdf; repeatable.")] = None,
    title: Annotated[str, typer.Option("--title", help="Of the page.")] = "Unlearning report",
    with_text: Annotated[
        bool,
        typer.Option("--with-text", help="Show texts in which features fire, where dsg inspect --samples kept them."),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace files that are there.")] = False,
    workspace: opt.WorkspaceOption = opt.DEFAULT_WORKSPACE,
    recipe: opt.RecipeOption = None,
    as_json: opt.JsonOption = False,
    quiet: opt.QuietOption = False,
) -> None:
    """Put what was found into one HTML file that needs nothing else, with figures.

    Example: dsg report -o report.html --figures figures --format pdf
    """
    start = time.monotonic()
    kinds = list(dict.fromkeys(formats or ["svg"]))
    _check(output, figures, kinds, force=force)
    resolved = opt.settings(recipe, None, device=None, dtype=None, seed=None)
    with progress(quiet) as report:
        from dsg_cli.report.evaluations import beside
        from dsg_cli.report.gather import gather
        from dsg_cli.report.page import report_of, write_report
        from dsg_cli.workspace.store import Workspace

        report("reading", 0, 0)
        gathered = gather(Workspace(workspace), artifacts or [])
        results = {bench: sides for one in gathered.of("eval") for bench, sides in one.json["results"].items()}
        report("drawing", 0, 0)
        made = report_of(gathered, title, beside(resolved.published, results) if recipe else (), has_text=with_text)
        files = write_report(made, output, figures, kinds, force=force)
    if as_json:
        found = {"path": str(output), "bytes": output.stat().st_size, "seconds": round(time.monotonic() - start, 2)}
        ids = [stored.id for stored in gathered.artifacts]
        print_json({**found, "artifacts": ids, "figures": [str(path) for path in files]})
    else:
        print_line(str(output))


def _check(output: Path, figures: Path | None, kinds: list[str], *, force: bool) -> None:
    """Refuse bad options before anything is read."""
    unknown = [kind for kind in kinds if kind not in ("svg", "png", "pdf")]
    if unknown:
        raise DsgError(f"Figures are written as svg, png or pdf, not as {unknown[0][:40]}.")
    check_new_file(output, "--output", force=force)
    if figures is not None and is_taken(figures) and not figures.is_dir():
        raise DsgError(f"{figures} is no folder.", "Name another with --figures.")
