"""`dsg describe`: what is each feature of an SAE about, in words from text of one's own?

Reads corpora, all parts of them, through the model's layers up to the SAE's hook and the whole SAE, once; keeps of
every feature the contexts in which it is strongest; writes the words that are characteristic of them as JSON
lines, the form in which Neuronpedia exports descriptions. They are text of the corpora: a file of the user's, no
artifact.

Memory: 8 bytes a feature, context and token of it (19), beside the model: 3 kB a feature.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from dsg_cli.data.corpora import check_named, load_corpora
from dsg_cli.data.tokens import bos_to_prepend, check_chat, chunks, encode, prompts
from dsg_cli.errors import DsgError
from dsg_cli.inspection.contexts import Description, describe_features, read_contexts
from dsg_cli.job import Job
from dsg_cli.models.language_model import context_length, load_model, load_tokenizer, read_config, text_config
from dsg_cli.models.sae import check_fits, check_name, load_encoder, read_sae
from dsg_cli.settings import Recipe
from dsg_cli.stages.inputs import check_world, named_model
from dsg_cli.stages.stage import QUIET, RunOptions, settle
from dsg_cli.workspace.files import is_taken, write_atomically
from dsg_cli.workspace.store import Workspace

N_CONTEXTS = 20

ROW_TOKENS = 256
"""Longer documents are read in pieces of so many: activations of all features on one piece are in memory at once."""


def run(
    recipe: Recipe,
    workspace: Workspace,
    path: Path,
    corpora: Sequence[str],
    *,
    is_forced: bool = False,
    options: RunOptions = QUIET,
) -> list[Description]:
    """Describe every feature that fires on the corpora, and write the file: in place of another only if `is_forced`.

    What is to be forgotten need not be told from the rest.
    """
    _check_path(path, is_forced)
    check_named(corpora, role="described")
    check_world(recipe, corpora)
    check_name(recipe.sae.source)
    recipe = settle(recipe)
    source = named_model(workspace, recipe.model.source)
    config = text_config(read_config(source, recipe.model))
    tokenizer = load_tokenizer(source, recipe.model)
    documents = load_corpora(corpora, role="described", limit=recipe.corpora.limit, seed=recipe.seed)
    check_chat(tokenizer, documents)
    sae = read_sae(recipe.sae.source)
    for note in check_fits(sae, config, source, has_bos=tokenizer.bos_token_id is not None):
        options.say(f"note: {note}")
    bos = bos_to_prepend(tokenizer, sae.identity.prepend_bos)
    texts = [text for corpus in documents for text in prompts(tokenizer, corpus, None)]
    longest = min(ROW_TOKENS, context_length(config) - 1) + (bos is not None)
    rows = [row for ids in encode(tokenizer, texts, bos=bos) for row in chunks(ids, longest, bos=bos)]
    loaded = load_model(source, recipe.model, last_layer=sae.site.layer)
    encoder = load_encoder(sae, device=str(loaded.model.device))
    contexts = read_contexts(
        loaded.model,
        sae.site,
        encoder,
        rows,
        loaded.tokenizer,
        n_contexts=N_CONTEXTS,
        job=Job(progress=options.report, name="described text"),
    )
    descriptions = describe_features(contexts, loaded.tokenizer, report=options.report)
    if not descriptions:
        raise DsgError("No feature of the SAE fires on a word of this text.", "Check that the SAE is the model's.")
    content = "".join(json.dumps(dataclasses.asdict(description)) + "\n" for description in descriptions)
    _check_path(path, is_forced)  # Again: the pass may have taken hours.
    try:
        write_atomically(path, content.encode())
    except OSError as error:
        raise DsgError(f"{path} cannot be written: {error.strerror}.", "Name another file.") from error
    return descriptions


def _check_path(path: Path, is_forced: bool) -> None:
    """Refuse what cannot be written, and what would be lost."""
    if is_taken(path) and (not is_forced or path.is_dir()):
        raise DsgError(f"{path} exists.", "Name another file" + ("." if path.is_dir() else ", or pass --force."))
    if not path.parent.is_dir():
        raise DsgError(f"There is no folder {path.parent}.", "Make it, or name another file.")
