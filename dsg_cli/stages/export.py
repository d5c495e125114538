"""`dsg export`: hand a guardrail, or the whole guarded model, to people who do not have this workspace.

To `NAME.safetensors` a light file; to a folder the guarded model, which stock transformers loads, or light files with a
model card; to `hf://org/name` either of them as a commit.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dsg_cli.data.hub import REPOSITORY, SCHEME, parse_address, push_folder
from dsg_cli.errors import DsgError
from dsg_cli.export.card import CARD_FILE, CardFacts, CardGuard, model_card, read_base_card
from dsg_cli.export.folder import export_folder, light_name
from dsg_cli.guardrail.guarded import check_causal
from dsg_cli.guardrail.loading import LIGHT_FILE, light_file
from dsg_cli.guardrail.runtime.guardrail import GuardrailModule
from dsg_cli.guardrail.runtime.hooks import Attached
from dsg_cli.job import Report, silent
from dsg_cli.lab import data as lab
from dsg_cli.methods import check_method
from dsg_cli.models.language_model import model_folder
from dsg_cli.settings import Recipe
from dsg_cli.stages.composition import (
    Composition,
    find_composition,
    guardrail_modules,
    lineage,
    load_composition,
    only_guardrails,
)
from dsg_cli.stages.stage import settle
from dsg_cli.workspace.artifacts import ModelWeights, Threshold
from dsg_cli.workspace.body import Json
from dsg_cli.workspace.files import check_new_folder, is_folder, is_taken, write_atomically, write_folder
from dsg_cli.workspace.results import AttackReport, EvalReport
from dsg_cli.workspace.store import Stored, Workspace


@dataclass(frozen=True)
class Exported:
    """What was written, and where."""

    to: str
    """A path, or the address of a commit."""
    form: str
    """`light` or `model`."""
    guardrails: list[str]
    files: list[Json]
    """Name and size in bytes."""


def run(
    recipe: Recipe,
    workspace: Workspace,
    to: str,
    *,
    sources: Sequence[str] = (),
    form: str | None = None,
    links: bool = True,
    is_public: bool = False,
    report: Report = silent,
    say: Callable[[str], None] = lambda _: None,
) -> Exported:
    """Export the newest guardrail, or those named together, to a folder, a `.safetensors` file, or `hf://org/name`.

    `form` is `light` or `model`; by default what `to` says, and `light` to a hub. `links` hard-links the base's weights
    rather than copying them; `is_public` is for a new repository.
    """
    form = check_target(to, form)
    composition = find_composition(workspace, sources or [workspace.find("guardrail").id])
    only_guardrails(composition, "dsg export")
    if not sources:
        say(composition.acting)
    modules = guardrail_modules(workspace, composition)
    architecture, tokenizer_class = composition.header.model.architecture, ""
    if form == "model":
        check_causal(body.gate for body in composition.bodies)
        if composition.weights and composition.weights[-1].body_as(ModelWeights).form == "adapter":
            raise DsgError(
                f"{composition.weights[-1].id} is an adapter, and an exported model needs whole weights.",
                "Apply its method without --lora, and the guardrail on that.",
            )
        # Only the layers that the guardrails' fingerprints cover are loaded.
        loaded = load_composition(workspace, composition, settle(recipe, composition.header), cut=True)
        modules = loaded.guardrails
        Attached(loaded.model.model, modules).remove()
        architecture, tokenizer_class = type(loaded.model.model).__name__, type(loaded.model.tokenizer).__name__
    lights = [
        light_file(stored.header, body, workspace.tensors(stored))
        for stored, body in zip(composition.guardrails, composition.bodies, strict=True)
    ]
    is_on_hub = to.startswith(SCHEME)
    address = parse_address(to).repo if is_on_hub else Path(to).resolve().name
    facts = card_facts(
        workspace,
        composition,
        modules,
        name=address.rpartition("/")[2],
        address=address,
        is_on_hub=is_on_hub,
        is_whole_model=form == "model",
        instead=recipe.model.instead,
        is_mismatched=recipe.model.allow_mismatch,
    )
    card = model_card(facts)
    report("export", 0, 1)

    def write(place: Path) -> None:
        if form == "light":
            _write_light(place, lights, card)
            return
        export_folder(
            place,
            base=model_folder(recipe.model.instead or composition.model),
            architecture=architecture,
            tokenizer_class=tokenizer_class,
            guardrails=modules,
            light_files=lights,
            card=card,
            links=links,
            allow_mismatch=recipe.model.allow_mismatch,
        )

    if is_on_hub:
        workspace.check_writable()
        # In the workspace, where weights can be linked rather than copied.
        with tempfile.TemporaryDirectory(prefix=".export-", suffix=".tmp", dir=workspace.folder) as scratch:
            folder = Path(scratch) / "export"
            write(folder)
            files = _sizes(folder)
            written = push_folder(parse_address(to), folder, marker=LIGHT_FILE, is_public=is_public)
    else:
        write(Path(to))
        written, files = str(Path(to)), _sizes(Path(to))
    report("export", 1, 1)
    return Exported(written, form, [stored.id for stored in composition.guardrails], files)


def card_facts(
    workspace: Workspace,
    composition: Composition,
    modules: list[GuardrailModule],
    *,
    name: str,
    address: str,
    is_on_hub: bool,
    is_whole_model: bool,
    instead: str | None,
    is_mismatched: bool,
) -> CardFacts:
    """All that is known of what is exported: a composition and its guardrails as modules, loaded by `address`.

    With `instead` they are put on another copy of the model than that of the artifacts; if `is_mismatched`, they may be
    on other weights than those that they were made for.
    """
    # The model's name is that of the artifacts, unless it says nothing elsewhere and another copy was named.
    model = composition.model
    is_known = model in lab.MODEL_DIRS or REPOSITORY.fullmatch(model)
    if instead is not None and (is_mismatched or not is_known):
        model = str(Path(instead).resolve()) if is_folder(Path(instead)) else instead
    trainings = lineage(composition) if model == composition.model else []
    base = trainings[0].header.model.source if trainings else model
    judged = [] if is_mismatched else _judgements(workspace, composition)
    guards = []
    for number, (stored, module) in enumerate(zip(composition.guardrails, modules, strict=True)):
        threshold = _made_from(stored, "threshold")
        features = _made_from(threshold or stored, "features")
        guards.append(CardGuard(stored, module.key, light_name(number), threshold, features))
    return CardFacts(
        name=name,
        address=address,
        is_on_hub=is_on_hub,
        is_whole_model=is_whole_model,
        architecture=composition.header.model.architecture,
        model=model,
        base=base,
        base_card=read_base_card(base),
        guards=guards,
        lineage=trainings,
        evaluations=[stored for stored in judged if isinstance(stored.body, EvalReport)],
        attacks=[stored for stored in judged if isinstance(stored.body, AttackReport)],
        is_mismatched=is_mismatched,
    )


def _judgements(workspace: Workspace, composition: Composition) -> list[Stored]:
    """Evaluations and attacks of exactly these guardrails, on the weights that they were made for.

    One that is damaged says nothing; `dsg verify` names it.
    """
    digests = {stored.json["sha256"] for stored in composition.named}
    return [
        stored
        for stored in workspace.readable([*workspace.ids("eval"), *workspace.ids("attack")])
        if {named.sha256 for named in stored.header.inputs} == digests
        and not stored.header.settings.get("allow_mismatch")
    ]


def _made_from(stored: Stored, kind: str) -> Stored | None:
    """The artifact of a kind that another was made from, if it lies beside it and is whole."""
    for named in stored.header.inputs:
        if named.id.startswith(f"{kind}-") and not named.is_elsewhere:
            try:
                origin = Workspace(stored.path.parent).read(named.id)
            except DsgError:
                return None
            return origin if origin.json["sha256"] == named.sha256 else None
    return None


def check_exportable(workspace: Workspace, method: str, source: str | None) -> None:
    """Refuse what could not be exported as a model, before it is made."""
    if check_method(method).form != "guardrail":
        raise DsgError(f"--export writes guarded models, and {method} makes none.", "Leave it out.")
    if method == "dsg" and (source is None or "threshold" in source):
        check_causal([workspace.find("threshold", source).body_as(Threshold).gate])


def check_target(to: str, form: str | None = None) -> str:
    """The form in which something is exported to `to`."""
    is_hub, is_file = to.startswith(SCHEME), to.endswith(".safetensors")
    form = form or ("light" if is_hub or is_file else "model")
    if form not in ("light", "model"):
        raise DsgError(f"The form {form} is neither light nor model.")
    if is_hub:
        address = parse_address(to)
        if address.revision or address.file:
            raise DsgError(f"{to} names a revision or a file.", f"Push to {SCHEME}{address.repo}.")
    elif form == "model" and is_file:
        raise DsgError(f"{to} is one file, but a model is a folder.", "Name a folder, or leave --form out.")
    elif is_file and is_taken(Path(to)):
        raise DsgError(f"{to} exists.", "Name a new file.")
    elif not is_file:
        check_new_folder(Path(to))
        if Path(to).resolve() == Path.cwd():
            raise DsgError("The export replaces its folder, which is the current one here.", "Name a new folder.")
    return form


def _write_light(to: Path, lights: Sequence[bytes], card: str) -> None:
    def fill(folder: Path) -> None:
        folder.mkdir()
        for number, content in enumerate(lights):
            (folder / light_name(number)).write_bytes(content)
        (folder / CARD_FILE).write_text(card, encoding="utf-8", errors="replace")

    if to.suffix != ".safetensors":
        write_folder(to, fill)
        return
    if len(lights) > 1:
        raise DsgError("A light file holds one guardrail.", "Export each to a file of its own, or name a folder.")
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(to, lights[0])
    except OSError as error:
        failure = f"{str(to)[:200]} cannot be written: {error.strerror}."
        raise DsgError(failure, "Make room, or name another place.") from error


def _sizes(written: Path) -> list[Json]:
    paths = [written] if written.is_file() else sorted(path for path in written.rglob("*") if path.is_file())
    return [{"name": path.name, "bytes": path.stat().st_size} for path in paths]
