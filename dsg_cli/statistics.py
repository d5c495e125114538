"""Streaming per-feature statistics over the counted tokens of a corpus (METHOD: both scores from one pass)."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from dsg_cli.errors import DsgError
from dsg_cli.fitting import Fitting, in_halves
from dsg_cli.progress import Report, silent
from dsg_cli.residuals import read_residual
from dsg_cli.runtime.sites import HookSite
from dsg_cli.tokens import TokenBatch

CHUNK_TOKENS = 1024
"""Tokens encoded at a time: what bounds the memory of a pass is this times F, never the corpus."""
NORM_SAMPLE = 65_536
"""Residual norms kept for their median, about; evenly spread over the corpus."""


@dataclass(frozen=True)
class FeatureStatistics:
    """Means over counted tokens, float64, shape [F]."""

    n_tokens: int
    mean_square_F: Tensor
    """mean f^2: for a linear readout the diagonal of the Fisher information; the paper's score."""
    mean_F: Tensor
    """mean f; its square is the score of the authors' code."""
    rate_F: Tensor
    """Share of tokens on which the feature is active."""
    norms: Tensor
    """Residual norms of counted tokens, evenly sampled."""

    @property
    def median_residual_norm(self) -> float:
        return float(self.norms.median())

    def score(self, name: str) -> Tensor:
        """`mean-square` or `squared-mean`, shape [F]."""
        return self.mean_square_F if name == "mean-square" else self.mean_F.square()

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """The statistics by name, as an artifact stores them."""
        return {
            f"{prefix}_mean_square": self.mean_square_F,
            f"{prefix}_mean": self.mean_F,
            f"{prefix}_rate": self.rate_F,
        }


@torch.inference_mode()
def feature_statistics(
    model: nn.Module,
    site: HookSite,
    encode: Callable[[Tensor], Tensor],
    batches: Iterable[TokenBatch],
    *,
    total_tokens: int,
    what: str = "corpus",
    report: Report = silent,
) -> FeatureStatistics:
    """One pass over a corpus.

    Args:
        model: Whole, or cut after the site's layer.
        site: Where the SAE reads.
        encode: Residuals [T, D] -> activations [T, F].
        batches: The corpus.
        total_tokens: Of the corpus, about: for progress, and to spread the sample of norms.
        what: Name of the pass, for progress only.
        report: Progress.

    Raises:
        DsgError: No counted token, or an activation that is not finite.
    """
    n_tokens, stride = 0, max(1, total_tokens // NORM_SAMPLE)
    sums: list[Tensor] = []
    fit = Fitting()
    norms = array("f")  # Small tensors kept between large ones would break up the heap, which then grows.

    def counted(batch: TokenBatch) -> Tensor:
        return read_residual(model, site, batch.ids_BL, batch.mask_BL)[batch.counted_BL].float()

    for resid_TD in (resid_TD for batch in batches for _, resid_TD in fit(batch, counted)):
        norms.extend(resid_TD[-n_tokens % stride :: stride].norm(dim=-1).tolist())
        for chunk_TD in torch.split(resid_TD, CHUNK_TOKENS):
            for parts in in_halves(chunk_TD, partial(_sums, encode)):
                for total, part in zip(sums, parts, strict=True) if sums else ():
                    total.add_(part)
                sums = sums or list(parts)
        n_tokens += len(resid_TD)
        report(f"{what}, tokens", n_tokens, max(n_tokens, total_tokens))
    if not n_tokens:
        raise DsgError(f"The {what} has no token that counts: all are padding, BOS or EOS.")
    mean_square_F, mean_F, rate_F = (total.cpu() / n_tokens for total in sums)
    if not torch.isfinite(mean_square_F).all():
        raise DsgError(
            f"On the {what} an activation of the SAE is not finite.",
            "Check the weights of model and SAE, or try --dtype float32.",
        )
    return FeatureStatistics(
        n_tokens=n_tokens,
        mean_square_F=mean_square_F,
        mean_F=mean_F,
        rate_F=rate_F,
        norms=torch.tensor(norms),
    )


def _sums(encode: Callable[[Tensor], Tensor], resid_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Over tokens: of squares, of activations and of those that are not 0, float64, each [F]."""
    acts_TF = encode(resid_TD)
    return (
        acts_TF.square().sum(0, dtype=torch.float64),
        acts_TF.sum(0, dtype=torch.float64),
        (acts_TF != 0).sum(0).double(),
    )


def mix(parts: Sequence[FeatureStatistics], weights: Sequence[float | None]) -> FeatureStatistics:
    """The statistics of a mixture of corpora.

    Args:
        parts: Of each corpus.
        weights: Its share, in proportion; where none has one, every token counts alike, else None counts as 1.
    """
    has_weights = any(weight is not None for weight in weights)
    given = [1.0 if weight is None else weight for weight in weights]
    raw = given if has_weights else [float(part.n_tokens) for part in parts]
    share = [value / sum(raw) for value in raw]

    def mean(name: str) -> Tensor:
        return torch.stack([w * getattr(part, name) for w, part in zip(share, parts, strict=True)]).sum(0)

    return FeatureStatistics(
        n_tokens=sum(part.n_tokens for part in parts),
        mean_square_F=mean("mean_square_F"),
        mean_F=mean("mean_F"),
        rate_F=mean("rate_F"),
        norms=_resampled([part.norms for part in parts], share),
    )


def _resampled(norms: Sequence[Tensor], share: Sequence[float]) -> Tensor:
    """Samples of several corpora as one in which each has its share: evenly spaced ones of the sorted values."""
    largest = min(len(values) / w for values, w in zip(norms, share, strict=True))
    picked = []
    for values, w in zip(norms, share, strict=True):
        n = max(1, min(len(values), round(largest * w)))
        picked.append(values.sort().values[torch.linspace(0, len(values) - 1, n).round().long()])
    return torch.cat(picked)
