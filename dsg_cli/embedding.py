"""Descriptions ranked by an embedding model: the cosine between mean-pooled last hidden states.

Any encoder or decoder that transformers loads by itself, from a folder or from the hub; no code of others is run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dsg_cli.errors import DsgError
from dsg_cli.model import model_folder
from dsg_cli.progress import Report, silent
from dsg_cli.ranking import Match, ranked

BATCH = 32
LONGEST = 512
"""Tokens of a text, at most."""


@torch.inference_mode()
def rank_by_embedding(
    query: str, descriptions: Mapping[int, str], name: str, *, device: str = "cpu", report: Report = silent
) -> list[Match]:
    """Every feature, by the cosine of its description to the query.

    Args:
        query: What is looked for.
        descriptions: Of features, by index.
        name: Of the embedding model: a folder, org/name or org/name@revision.
        device: Where it runs.
        report: Progress.

    Raises:
        DsgError: It cannot be loaded, or gives what is not finite.
    """
    indices = sorted(descriptions)
    vectors_ND = embedded([query, *(descriptions[j] for j in indices)], name, device=device, report=report)
    vectors_ND = torch.nn.functional.normalize(vectors_ND, dim=-1)
    cosines = (vectors_ND[1:] @ vectors_ND[0]).tolist()
    return ranked(dict(zip(indices, cosines, strict=True)))


def embedded(texts: Sequence[str], name: str, *, device: str = "cpu", report: Report = silent) -> Tensor:
    """The mean of the last hidden states over a text's tokens, [N, D].

    Raises:
        DsgError: As `rank_by_embedding`.
    """
    tokenizer, model = _loaded(name, device)
    tokenizer.padding_side = "right"
    found = torch.zeros(len(texts), model.config.get_text_config().hidden_size)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    longest = min(LONGEST, getattr(model.config.get_text_config(), "max_position_embeddings", LONGEST))
    for start in range(0, len(order), BATCH):
        some = order[start : start + BATCH]
        batch = tokenizer(
            [texts[i] for i in some], padding=True, truncation=True, max_length=longest, return_tensors="pt"
        )
        inputs = {key: batch[key].to(device) for key in ("input_ids", "attention_mask")}
        states_BLD = model(**inputs).last_hidden_state.float()
        mask_BL1 = inputs["attention_mask"][..., None]
        found[some] = ((states_BLD * mask_BL1).sum(1) / mask_BL1.sum(1).clamp(min=1)).cpu()
        report("embedding descriptions", start + len(some), len(order))
    if not found.isfinite().all():
        raise DsgError(f"The embedding model {name} gives values that are not finite.", "Take another.")
    return found


def _loaded(name: str, device: str) -> tuple[Any, Any]:
    from transformers import AutoModel, AutoTokenizer

    folder = model_folder(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        model = AutoModel.from_pretrained(
            folder, use_safetensors=True, dtype=torch.float32, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # Files of others: libraries raise anything on a bad one.
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DsgError(
            f"The embedding model {name} cannot be loaded: {reason}", "Name another with --embedding."
        ) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer, model.to(device).eval().requires_grad_(False)
