"""Wrappers from artifacts, and the statistic by which a filter tells texts apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from dsg_cli.artifacts import Wrapper
from dsg_cli.errors import DsgError
from dsg_cli.keywords import Phrase, n_found, phrases_of
from dsg_cli.pooling import mean_residuals
from dsg_cli.progress import Report, silent
from dsg_cli.tokens import special_ids
from dsg_cli.workers import ALONE, Workers

LARGEST = torch.finfo(torch.float32).max
"""Statistic of a text on which an activation is not finite: it is refused. Of one without words, the opposite."""


@dataclass(frozen=True, eq=False)
class WrapperModule:
    """A wrapper that can act."""

    body: Wrapper
    weight_D: Tensor | None = None
    """Of a classifier, float32."""
    bias: float = 0.0
    phrases: frozenset[Phrase] = frozenset()
    """The words of each keyword."""

    @property
    def is_filter(self) -> bool:
        return self.body.rule != "prefix"


def wrapper_from_artifact(body: Wrapper, tensors: Mapping[str, Tensor], *, where: str) -> WrapperModule:
    """The wrapper of an artifact.

    Raises:
        DsgError: A classifier's tensor is missing, of a wrong shape or not finite, or it has no layer; no keyword.
    """
    if body.rule != "classifier":
        phrases = phrases_of(body.keywords)
        if body.rule == "keywords" and not phrases:
            raise DsgError(f"{where} looks for keywords and has none.", "Make it again.")
        return WrapperModule(body, phrases=phrases)
    if body.layer is None:
        raise DsgError(f"{where} is a classifier without a layer.", "Make it again.")
    for name, n_dims in (("weight", 1), ("bias", 0)):
        if name not in tensors:
            raise DsgError(f"{where} lacks the tensor {name}.", "Make it again.")
        if tensors[name].dim() != n_dims or not tensors[name].numel():
            raise DsgError(f"{where}: the tensor {name} has the shape {list(tensors[name].shape)}.", "Make it again.")
        if not bool(tensors[name].isfinite().all()):
            raise DsgError(f"{where}: the tensor {name} is not finite.", "Make it again.")
    return WrapperModule(body, tensors["weight"].float().cpu(), float(tensors["bias"]))


def has_filter(wrappers: Sequence[WrapperModule]) -> bool:
    """Whether any of them decides anything: a prefix alone does not."""
    return any(wrapper.is_filter for wrapper in wrappers)


def on_side(wrappers: Sequence[WrapperModule], side: str) -> list[WrapperModule]:
    """The filters of prompts, or those of answers."""
    return [wrapper for wrapper in wrappers if wrapper.is_filter and wrapper.body.side == side]


def statistics_of(
    wrapper: WrapperModule,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Sequence[int]],
    *,
    batch_size: int,
    workers: Workers = ALONE,
    report: Report = silent,
    what: str = "filter",
) -> list[float]:
    """The statistic of each text: different keywords in it, or weight . mean residual + bias.

    Raises:
        DsgError: The classifier was made for another width.
    """
    if wrapper.weight_D is None:
        return [float(n_found(_decoded(tokenizer, row), wrapper.phrases)) for row in rows]
    assert wrapper.body.layer is not None
    mean_ND = mean_residuals(
        model,
        tokenizer,
        rows,
        layer=wrapper.body.layer,
        batch_size=batch_size,
        workers=workers,
        report=report,
        what=what,
    )
    if mean_ND.shape[1] != len(wrapper.weight_D):
        raise DsgError(
            f"The filter reads {len(wrapper.weight_D)} values a token; this model has {mean_ND.shape[1]}.",
            "Take the model that it was made for.",
        )
    value_N = (mean_ND.double() @ wrapper.weight_D.double() + wrapper.bias).tolist()
    special = set(special_ids(tokenizer))
    return [value if set(row) - special else -LARGEST for value, row in zip(value_N, rows, strict=True)]


def _decoded(tokenizer: PreTrainedTokenizerBase, row: Sequence[int]) -> str:
    return str(tokenizer.decode(list(row), skip_special_tokens=True))
