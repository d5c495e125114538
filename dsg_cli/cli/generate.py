"""`dsg generate`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from dsg_cli.cli import options as opt
from dsg_cli.cli.output import print_json, progress
from dsg_cli.cli.running import import_libraries
from dsg_cli.prompt_files import read_prompts
from dsg_cli.report.answers import Screen


def command(
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
        from dsg_cli.stages import generate
        from dsg_cli.workspace import Workspace

        written = []
        for done in generate.run(resolved, Workspace(workspace), asked, sources=sources or [], write=screen.write):
            written.append(done.as_json())
            screen.close(done)
            report("answers, prompts", len(written), len(asked))
    if as_json:
        print_json(written)
