"""Streaming per-feature statistics over the counted tokens of a corpus; both scores of a feature come from one pass.

The score of feature j is mean f_j^2 over tokens (arXiv 2504.08192, section 3: for a linear readout the diagonal of the
Fisher information), or (mean f_j)^2 as the authors' code has it.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from dsg_cli.data.batches import TokenBatch
from dsg_cli.errors import DsgError
from dsg_cli.guardrail.runtime.sites import HookSite
from dsg_cli.job import PLAIN_JOB, Job
from dsg_cli.models.residuals import OomSplitter, read_residual, split_rows_on_oom
from dsg_cli.workspace.checkpoints import State
from dsg_cli.workspace.files import at_safe_points

CHUNK_TOKENS = 1024  # Tokens encoded at a time: what bounds the memory of a pass is this times F, never the corpus.
NORM_SAMPLE = 65_536  # Residual norms kept for their median, about; evenly spread over each batch.
SUMS = ("squares", "activations", "active")  # What is summed over tokens.


@dataclass(frozen=True)
class FeatureStatistics:
    """Means over counted tokens, float64, shape [F]."""

    n_tokens: int
    mean_square_F: Tensor  # mean f^2
    mean_F: Tensor  # mean f
    rate_F: Tensor  # Share of tokens on which the feature is active.
    norms: Tensor  # Residual norms of counted tokens, evenly sampled.

    @property
    def median_residual_norm(self) -> float:
        return float(self.norms.median())

    def score(self, name: str) -> Tensor:
        """`mean-square` or `squared-mean`, shape [F]."""
        return self.mean_square_F if name == "mean-square" else self.mean_F.square()

    def tensors(self, prefix: str) -> dict[str, Tensor]:
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
    job: Job = PLAIN_JOB,
) -> FeatureStatistics:
    """One pass over a corpus, shared among the workers of a job; each gets the statistics of all.

    The model may be cut after the site's layer; `encode` makes residuals [T, D] to activations [T, F]. About
    `total_tokens` are expected: for progress, and to spread the sample of norms. The job is named like the corpus.
    """
    stride = max(1, total_tokens // NORM_SAMPLE)
    kept = job.kept() or {}
    n_batches, n_tokens = int(kept.get("n_batches", 0)), int(kept.get("n_tokens", 0))
    sums: list[Tensor] = [kept[name] for name in SUMS] if n_tokens else []
    # Small tensors kept between large ones would break up the heap, which then grows.
    norms = array("f", kept["norms"].tolist() if n_tokens else ())
    split_on_oom = OomSplitter()

    def counted(batch: TokenBatch) -> Tensor:
        return read_residual(model, site, batch.ids_BL, batch.mask_BL)[batch.counted_BL].float()

    def state() -> State:
        values = {"n_batches": n_batches, "n_tokens": n_tokens, "norms": torch.tensor(norms)}
        return values | dict(zip(SUMS, sums, strict=True)) if sums else {"n_batches": n_batches}

    with at_safe_points():
        for number, batch in enumerate(batches):
            if not job.workers.owns(number) or number < n_batches:
                continue
            for _, resid_TD in split_on_oom(batch, counted):
                norm_T = resid_TD.norm(dim=-1)
                if not norm_T.isfinite().all():
                    raise _not_finite(job.name)
                norms.extend(norm_T[::stride].tolist())
                for chunk_TD in torch.split(resid_TD, CHUNK_TOKENS):
                    for parts in split_rows_on_oom(chunk_TD, partial(_sums, encode)):
                        pairs = zip(sums, parts, strict=True) if sums else ()
                        sums = [total.to(part.device).add_(part) for total, part in pairs] or list(parts)
                n_tokens += len(resid_TD)
            n_batches = number + 1
            n_about = n_tokens * job.workers.n
            job.progress(f"{job.name}, tokens", n_about, max(n_about, total_tokens))
            job.reached(state)
    job.keep(state())
    workers = job.workers
    (n_all,) = (int(n) for n in workers.total([torch.tensor(n_tokens)]))
    if not n_all:
        raise DsgError(f"The {job.name} has no token that counts: all are padding, BOS or EOS.")
    n_features = max(workers.gathered(len(sums[0]) if sums else 0))
    own = sums or [torch.zeros(n_features, dtype=torch.float64) for _ in SUMS]
    mean_square_F, mean_F, rate_F = (total / n_all for total in workers.total(own))
    all_norms = torch.tensor([norm for of_worker in workers.gathered(norms.tolist()) for norm in of_worker])
    if not torch.isfinite(mean_square_F).all():
        raise _not_finite(job.name)
    return FeatureStatistics(n_all, mean_square_F, mean_F, rate_F, all_norms)


def _not_finite(corpus: str) -> DsgError:
    return DsgError(
        f"On the {corpus} the residual or an activation of the SAE is not finite.",
        "Check the weights of model and SAE, or try --dtype float32.",
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

    Weights are shares, in proportion; where no corpus has one, every token counts alike, else None counts as 1.
    """
    if any(weight is not None for weight in weights):
        raw = [1.0 if weight is None else weight for weight in weights]
    else:
        raw = [float(part.n_tokens) for part in parts]
    share = [value / sum(raw) for value in raw]

    def mean(name: str) -> Tensor:
        return torch.stack([w * getattr(part, name) for w, part in zip(share, parts, strict=True)]).sum(0)

    # Of samples of norms as many as each corpus's share allows: evenly spaced ones of the sorted values.
    largest = min(len(part.norms) / w for w, part in zip(share, parts, strict=True))
    norms = []
    for w, part in zip(share, parts, strict=True):
        last = len(part.norms) - 1
        n = max(1, min(len(part.norms), round(largest * w)))
        norms.append(part.norms.sort().values[torch.linspace(0, last, n).round().long()])
    n_tokens = sum(part.n_tokens for part in parts)
    return FeatureStatistics(n_tokens, mean("mean_square_F"), mean("mean_F"), mean("rate_F"), torch.cat(norms))
