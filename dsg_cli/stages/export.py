"""`dsg export`: hand a guardrail, or the whole guarded model, to people who do not have this workspace.

To `NAME.safetensors` a light file; to a folder the guarded model, which stock transformers loads, or light files with a
model card; to `hf://org/name` either of them as a commit.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from dsg_cli.artifacts import Json, ModelWeights, Threshold
from dsg_cli.errors import DsgError
from dsg_cli.export.base_card import CARD_FILE
from dsg_cli.export.card import model_card
from dsg_cli.export.folder import export_folder, light_name
from dsg_cli.export.light import LIGHT_FILE, light_file
from dsg_cli.guardrail import check_causal
from dsg_cli.hub import SCHEME, parse_address, push_folder
from dsg_cli.integrity import check_new_folder, is_taken, write_atomically, write_folder
from dsg_cli.methods.names import check_method
from dsg_cli.model import model_folder
from dsg_cli.progress import Report, silent
from dsg_cli.recipe import Recipe
from dsg_cli.runtime.attach import Attached
from dsg_cli.stages.card import card_facts
from dsg_cli.stages.chain import settle
from dsg_cli.stages.subject import Subject, find_subject, guard_modules, load_subject, only_guardrails
from dsg_cli.workspace import Workspace


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

    def as_json(self) -> Json:
        return asdict(self)


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
) -> Exported:
    """Export the newest guardrail, or those named together.

    Args:
        recipe: For device and dtype of the check that the model is the right one.
        workspace: Where the guardrails are.
        to: A folder, a `.safetensors` file, or `hf://org/name`.
        sources: Guardrails by id or path.
        form: `light` or `model`; by default what `to` says, and `light` to a hub.
        links: Hard-link the base's weights rather than copy them.
        is_public: Whether a new repository is public.
        report: Progress.

    Raises:
        DsgError: Anything the user can mend; nothing is left half-written.
    """
    form = check_target(to, form)
    subject = find_subject(workspace, sources or [workspace.find("guardrail").id])
    only_guardrails(subject, "dsg export")
    modules = guard_modules(workspace, subject)
    architecture, tokenizer_class = subject.header.model.architecture, ""
    if form == "model":
        check_causal(body.gate for body in subject.bodies)
        _check_whole(subject)
        # Only the layers that the guardrails' fingerprints cover are loaded.
        found = load_subject(workspace, subject, settle(recipe, subject.header), cut=True)
        loaded, modules = found.model, found.guardrails
        Attached(loaded.model, modules).remove()
        architecture, tokenizer_class = type(loaded.model).__name__, type(loaded.tokenizer).__name__
    lights = [
        light_file(stored.header, body, workspace.tensors(stored))
        for stored, body in zip(subject.guardrails, subject.bodies, strict=True)
    ]
    is_on_hub = to.startswith(SCHEME)
    address = parse_address(to).repo if is_on_hub else Path(to).resolve().name
    card = model_card(
        card_facts(
            workspace,
            subject,
            modules,
            name=address.rpartition("/")[2],
            address=address,
            is_on_hub=is_on_hub,
            is_whole_model=form == "model",
            instead=recipe.model.instead,
            is_mismatched=recipe.model.allow_mismatch,
        )
    )
    report("export", 0, 1)

    def write(place: Path) -> None:
        if form == "light":
            _write_light(place, lights, card)
            return
        export_folder(
            place,
            base=model_folder(recipe.model.instead or subject.model),
            architecture=architecture,
            tokenizer_class=tokenizer_class,
            guardrails=modules,
            light_files=lights,
            card=card,
            links=links,
            allow_mismatch=recipe.model.allow_mismatch,
        )

    def push() -> tuple[str, list[Json]]:
        workspace.check_writable()
        # In the workspace, where weights can be linked rather than copied.
        with tempfile.TemporaryDirectory(prefix=".export-", suffix=".tmp", dir=workspace.folder) as scratch:
            folder = Path(scratch) / "export"
            write(folder)
            sizes = _sizes(folder)
            return push_folder(parse_address(to), folder, marker=LIGHT_FILE, is_public=is_public), sizes

    if is_on_hub:
        written, files = push()
    else:
        write(Path(to))
        written, files = str(Path(to)), _sizes(Path(to))
    report("export", 1, 1)
    return Exported(written, form, [stored.id for stored in subject.guardrails], files)


def _check_whole(subject: Subject) -> None:
    """Refuse to export a model whose weights are an adapter.

    Raises:
        DsgError: They are.
    """
    if subject.weights and subject.weights[-1].body_as(ModelWeights).form == "adapter":
        raise DsgError(
            f"{subject.weights[-1].id} is an adapter, and an exported model needs whole weights.",
            "Apply its method without --lora, and the guardrail on that.",
        )


def check_exportable(workspace: Workspace, method: str, source: str | None) -> None:
    """Refuse what could not be exported as a model, before it is made.

    Raises:
        DsgError: It is no guardrail, or its threshold is missing or of a gate that needs whole sequences.
    """
    if check_method(method).form != "guardrail":
        raise DsgError(f"--export writes guarded models, and {method} makes none.", "Leave it out.")
    if method == "dsg" and (source is None or "threshold" in source):
        check_causal([workspace.find("threshold", source).body_as(Threshold).gate])


def check_target(to: str, form: str | None = None) -> str:
    """The form in which something is exported to `to`.

    Raises:
        DsgError: An unknown form, one that does not fit, or a place that is taken.
    """
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
    """One light file, or a folder of them with their model card."""
    if to.suffix != ".safetensors":
        write_folder(to, lambda partial: _fill(partial, lights, card))
        return
    if len(lights) > 1:
        raise DsgError("A light file holds one guardrail.", "Export each to a file of its own, or name a folder.")
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(to, lights[0])
    except OSError as error:
        raise DsgError(
            f"{str(to)[:200]} cannot be written: {error.strerror}.", "Make room, or name another place."
        ) from error


def _fill(folder: Path, lights: Sequence[bytes], card: str) -> None:
    folder.mkdir()
    for number, content in enumerate(lights):
        (folder / light_name(number)).write_bytes(content)
    (folder / CARD_FILE).write_text(card, encoding="utf-8", errors="replace")


def _sizes(written: Path) -> list[Json]:
    paths = [written] if written.is_file() else sorted(path for path in written.rglob("*") if path.is_file())
    return [{"name": path.name, "bytes": path.stat().st_size} for path in paths]
