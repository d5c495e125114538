"""Train the lab from a seed: texts, tokenizer, language model and SAEs, written in plain formats.

Or a language model alone that some domains are kept from, or SAEs alone, at other layers of the shipped model.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from transformers import Gemma2ForCausalLM, PreTrainedTokenizerFast

from dsg_cli.lab import world as lab_world
from dsg_cli.lab.autoencoder import train_sae
from dsg_cli.lab.data import BENCHES, CORPORA, PHRASINGS, SHIPPED
from dsg_cli.lab.language_model import bench_accuracies, build_tokenizer, train_language_model
from dsg_cli.lab.settings import LabSettings
from dsg_cli.lab.words import DOMAINS_OF
from dsg_cli.lab.world import World
from dsg_cli.progress import Report, silent


def train_lab(
    folder: Path, *, seed: int = 0, settings: LabSettings | None = None, report: Report = silent
) -> dict[str, Any]:
    """Build the whole lab in `folder` (which must not exist) and return what was measured on the way.

    Returns:
        Seconds, final loss, accuracy of each bench on its test questions, and for each SAE its variance explained,
        L0, share of dead features, and the cross-entropy with the SAE's reconstruction in place of the residual.
    """
    settings = settings or LabSettings()
    start = time.monotonic()
    world = lab_world.build_world()
    tokenizer = build_tokenizer(world)
    write_texts(world, folder, settings)
    model, measured = _train_and_save(world, tokenizer, settings, folder / "model", seed=seed, report=report)
    measured["saes"] = []
    for i in range(settings.n_saes):
        sae_folder = folder / (f"sae-{i}" if i else "sae")
        measured["saes"].append(
            _train_one_sae(model, tokenizer, world, settings, sae_folder, seed=1000 * seed + i, report=report)
        )
    return _noted(measured, folder, start)


def train_saes(
    folder: Path, *, layers: Sequence[int], seed: int = 0, settings: LabSettings | None = None, report: Report = silent
) -> dict[str, Any]:
    """Train an SAE at each of `layers` of the shipped model, as those that are shipped were at theirs.

    They are written to `layer-<L>` in `folder`, which must not exist, in sae-lens's format.

    Returns:
        Seconds, and for each SAE what `train_lab` says of it.
    """
    settings = settings or LabSettings()
    start = time.monotonic()
    world = lab_world.build_world()
    model = Gemma2ForCausalLM.from_pretrained(SHIPPED / "model", dtype=torch.float32).eval()
    tokenizer = build_tokenizer(world)
    folder.mkdir()
    measured: dict[str, Any] = {"seed": seed, "settings": asdict(settings), "saes": []}
    for layer in layers:
        of_layer = replace(settings, sae_layer=layer)
        sae_folder = folder / f"layer-{layer}"
        measured["saes"].append(
            _train_one_sae(model, tokenizer, world, of_layer, sae_folder, seed=1000 * seed, report=report)
        )
    return _noted(measured, folder, start)


def _train_one_sae(
    model: Gemma2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    world: World,
    settings: LabSettings,
    folder: Path,
    *,
    seed: int,
    report: Report,
) -> dict[str, Any]:
    start = time.monotonic()
    sae = train_sae(model, tokenizer, world, settings, seed=seed, report=report, folder=folder)
    return {"name": folder.name, **sae, "seconds": round(time.monotonic() - start, 1)}


def train_reference(
    folder: Path,
    *,
    without: Sequence[str],
    seed: int = 0,
    settings: LabSettings | None = None,
    report: Report = silent,
) -> dict[str, Any]:
    """Train a language model that never sees the domains in `without`: what an unlearned one is compared with.

    Tokenizer, vocabulary and settings are those of the lab's model; there are no SAEs. `folder` (which must not
    exist) becomes a model folder.

    Returns:
        Seconds, final loss, and accuracy of each bench on its test questions, those of `without` too.
    """
    start = time.monotonic()
    world = lab_world.build_world()
    _, measured = _train_and_save(
        world,
        build_tokenizer(world),
        settings or LabSettings(),
        folder,
        seed=seed,
        without=without,
        report=report,
    )
    return _noted(measured, folder, start)


def _train_and_save(
    world: World,
    tokenizer: PreTrainedTokenizerFast,
    settings: LabSettings,
    folder: Path,
    *,
    seed: int,
    report: Report,
    without: Sequence[str] = (),
) -> tuple[Gemma2ForCausalLM, dict[str, Any]]:
    """Train the language model, write it to `folder`, and measure what was written."""
    start = time.monotonic()
    model, loss = train_language_model(world, tokenizer, settings, seed=seed, report=report, without=without)
    lm_seconds = time.monotonic() - start
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model = model.to(torch.float32)  # The weights as shipped: what bfloat16 cannot hold is gone.
    measured = {
        "seed": seed,
        **({"without": sorted(without)} if without else {}),
        "settings": asdict(settings),
        "loss": loss,
        "accuracy": {name: round(value, 4) for name, value in bench_accuracies(model, tokenizer, world).items()},
        "lm_seconds": round(lm_seconds, 1),
    }
    return model, measured


def _noted(measured: dict[str, Any], folder: Path, start: float) -> dict[str, Any]:
    """Add the seconds since `start`, and write what was measured to `training.json`."""
    measured["seconds"] = round(time.monotonic() - start, 1)
    (folder / "training.json").write_text(json.dumps(measured, indent=1) + "\n")
    return measured


def write_texts(world: World, folder: Path, settings: LabSettings) -> None:
    """Write `corpora/<name>.jsonl` and `questions/<bench>.jsonl`."""
    for kind in ("corpora", "questions"):
        (folder / kind).mkdir(parents=True)
    for i, name in enumerate(CORPORA):
        domains = DOMAINS_OF[name]
        texts = lab_world.corpus(world, domains, seed=i, n_documents=settings.documents_per_domain * len(domains))
        _write_jsonl(folder / "corpora" / f"{name}.jsonl", ({"text": text} for text in texts))
    for bench in BENCHES:
        for phrasing in PHRASINGS:
            name = bench if phrasing == "seen" else f"{bench}-{phrasing}"
            asked = lab_world.questions(world, DOMAINS_OF[bench], phrasing)
            rows = (
                {
                    "id": q.id,
                    "split": q.split,
                    "context": q.context,
                    "choices": list(q.choices),
                    "answer": q.answer,
                }
                for q in asked
            )
            _write_jsonl(folder / "questions" / f"{name}.jsonl", rows)


def _write_jsonl(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
