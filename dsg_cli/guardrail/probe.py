"""A sparse probe: is a token from forget text? A logistic score over a few SAE features.

The knowledge is spread over many features, and on all of them a probe would need the whole encoder at run time. So
candidates are taken by how far apart forget and retain text lie on them, a ridge logistic regression is fitted on
sampled tokens, and the features of least weight are dropped, half at a time, until few remain. Those few can be
sliced. Few are also better: features that text of the training format hardly shows (question words, say) get weights
by accident, and one of many such features is always on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsg_cli.data.batches import TokenBatch
from dsg_cli.errors import DsgError
from dsg_cli.guardrail.runtime.sites import HookSite
from dsg_cli.guardrail.statistics import FeatureStatistics
from dsg_cli.job import PLAIN_JOB, Job
from dsg_cli.models.residuals import OomSplitter, read_residual
from dsg_cli.workspace.body import Json
from dsg_cli.workspace.files import at_safe_points, safe_point

CLIP = 8.0  # Bound of a token's logit at run time.
NEWTON_STEPS, CONVERGED = 50, 1e-10  # Steps of a fit, at most; and the largest gradient at which it ends.
DIGITS = 4  # Digits of a weight that are kept: the others follow how a batch was cut, not the text.


@dataclass(frozen=True)
class Probe:
    """logit = bias + sum_j weights_j f_j."""

    indices: list[int]
    weights: list[float]
    bias: float
    n_tokens: int
    path: list[Json]  # [{n_features, loss, balanced_accuracy}], of the tokens that it was fitted on.

    def as_json(self) -> Json:
        features = [{"index": j, "weight": w} for j, w in zip(self.indices, self.weights, strict=True)]
        return {"features": features, "bias": self.bias, "clip": CLIP, "n_tokens": self.n_tokens, "path": self.path}


def candidates(forget: FeatureStatistics, retain: FeatureStatistics, n: int) -> list[int]:
    """The n features on which the two lie farthest apart: |difference of means| over the deviation of their mixture.

    Features that are active nowhere are none; there may be fewer than n.
    """
    mean_F = (forget.mean_F + retain.mean_F) / 2
    variance_F = (forget.mean_square_F + retain.mean_square_F) / 2 - mean_F.square()
    distance_F = (forget.mean_F - retain.mean_F).abs() / variance_F.clamp(min=1e-24).sqrt()
    distance_F = torch.where((forget.rate_F > 0) | (retain.rate_F > 0), distance_F, -1.0)
    ranked = distance_F.argsort(descending=True, stable=True)[:n]
    return sorted(j for j in ranked.tolist() if distance_F[j] > 0)


@torch.inference_mode()
def sampled_activations(
    model: nn.Module,
    site: HookSite,
    encode: Callable[[Tensor], Tensor],
    width: int,
    batches: Iterable[TokenBatch],
    *,
    total_tokens: int,
    n_tokens: int,
    job: Job = PLAIN_JOB,
) -> Tensor:
    """Activations [T, C] on about `n_tokens` tokens, evenly spread over a corpus.

    `encode` makes residuals [T, D] to activations of that width C; one that leaves them as they are samples residuals.
    Rows are in the order of batches, which all workers form alike, so that the number of workers does not matter.
    """
    stride = max(1, total_tokens // n_tokens)
    own: dict[int, Tensor] = {}  # Activations of the batches that this worker read.
    split_on_oom = OomSplitter()

    def read(batch: TokenBatch) -> Tensor:
        counted_BL = batch.counted_BL
        # Every stride-th token of a row, from where the row's own tokens say: however rows are batched.
        place_BL = counted_BL.cumsum(-1) + (batch.ids_BL * batch.mask_BL).sum(-1, keepdim=True)
        taken_BL = counted_BL & (place_BL % stride == 0)
        return encode(read_residual(model, site, batch.ids_BL, batch.mask_BL)[taken_BL])

    n_seen = 0
    with at_safe_points():
        for number, batch in enumerate(batches):
            n_seen += int(batch.counted_BL.sum())
            if job.workers.owns(number):
                own[number] = torch.cat([acts_TC.cpu() for _, acts_TC in split_on_oom(batch, read)])
            job.progress(f"{job.name}, tokens", n_seen, max(n_seen, total_tokens))
            safe_point()
    own_lengths = [[number, len(acts_TC)] for number, acts_TC in own.items()]
    lengths = sorted(pair for of_worker in job.workers.gathered(own_lengths) for pair in of_worker)
    acts_TC = torch.zeros(sum(length for _, length in lengths), width)
    start = 0
    for number, length in lengths:
        if number in own:
            acts_TC[start : start + length] = own.pop(number)
        start += length
    # Each row is 0 in all workers but one, so that the sum is exact.
    return job.workers.total([acts_TC])[0] if job.workers.n > 1 else acts_TC


def fit_probe(
    forget_TC: Tensor,
    retain: Sequence[Tensor],
    shares: Sequence[float],
    indices: Sequence[int],
    *,
    n_features: int,
    ridge: float,
    job: Job = PLAIN_JOB,
) -> Probe:
    """Fit on all candidates, then on half as many of the largest weights, and so on.

    Minimises the mean logistic loss, both classes counted alike, plus ridge/2 times the sum of squared weights, of
    features in units of their standard deviation.

    Activations of the candidates, whose indices in the SAE are [C], are given on forget tokens and on tokens of each
    retain corpus; `shares` are those of the corpora among retain tokens, in proportion. `n_features` remain.
    """
    if not len(forget_TC) or not any(map(len, retain)):
        raise DsgError("The probe has no tokens to learn from.", "Give more text, or set select.probe_features=0.")
    acts_TC = torch.cat([forget_TC, *retain]).double()
    is_forget_T = torch.arange(len(acts_TC)) < len(forget_TC)
    weights = [torch.full((len(forget_TC),), 0.5 / len(forget_TC))]
    total = sum(share for share, part in zip(shares, retain, strict=True) if len(part))
    weights += [torch.full((len(p),), 0.5 * s / total / max(len(p), 1)) for s, p in zip(shares, retain, strict=True)]
    weight_T = torch.cat(weights).double()
    deviation_C = acts_TC.std(0)
    kept = (deviation_C > 0).nonzero()[:, 0]
    if not len(kept):
        raise DsgError("No feature of the SAE tells forget text from retain text.", "Check both corpora.")
    scaled_TC = acts_TC.div_(deviation_C.clamp(min=1e-12))  # In place: hundreds of megabytes.
    w, bias = _logistic(scaled_TC[:, kept], is_forget_T, weight_T, ridge, torch.zeros(len(kept) + 1).double())
    path = [_scored(scaled_TC[:, kept] @ w + bias, is_forget_T, weight_T, len(kept))]
    while len(kept) > n_features:
        largest = w.abs().argsort(descending=True, stable=True)[: max(n_features, len(kept) // 2)].sort().values
        kept, start = kept[largest], torch.cat([w[largest], torch.tensor([bias]).double()])
        w, bias = _logistic(scaled_TC[:, kept], is_forget_T, weight_T, ridge, start)
        path.append(_scored(scaled_TC[:, kept] @ w + bias, is_forget_T, weight_T, len(kept)))
        job.progress("probe", len(path), len(path) + 1)
    return Probe(
        indices=[indices[i] for i in kept.tolist()],
        weights=[_rounded(value) for value in (w / deviation_C[kept]).tolist()],
        bias=_rounded(bias),
        n_tokens=len(acts_TC),
        path=path,
    )


def _logistic(
    acts_TC: Tensor, is_forget_T: Tensor, weight_T: Tensor, ridge: float, start: Tensor
) -> tuple[Tensor, float]:
    """Weights [C] and bias of a ridge logistic regression by Newton's method, float64; the bias is not penalised.

    Not scikit-learn's: artifacts keep the losses whole, and it moves them in the tenth digit.
    """
    acts_TP = torch.cat([acts_TC, torch.ones(len(acts_TC), 1).double()], -1)
    penalty_P = torch.full((acts_TP.shape[1],), ridge).double()
    penalty_P[-1] = 0
    sign_T = torch.where(is_forget_T, -1.0, 1.0).double()

    def loss(at_P: Tensor) -> float:
        return float((weight_T * F.softplus(sign_T * (acts_TP @ at_P))).sum() + (penalty_P * at_P.square()).sum() / 2)

    w_P, value = start.clone(), loss(start)
    for _ in range(NEWTON_STEPS):
        chance_T = (acts_TP @ w_P).sigmoid()
        gradient_P = acts_TP.T @ (weight_T * (chance_T - is_forget_T.double())) + penalty_P * w_P
        if gradient_P.abs().max() < CONVERGED:
            break
        curvature_T = weight_T * chance_T * (1 - chance_T)
        hessian_PP = (acts_TP * curvature_T[:, None]).T @ acts_TP + torch.diag(penalty_P + 1e-12)
        step_P = torch.linalg.solve(hessian_PP, gradient_P)
        scale = 1.0
        while (tried := loss(w_P - scale * step_P)) > value and scale > 1e-6:
            scale /= 2
        w_P, value = w_P - scale * step_P, min(tried, value)
    return w_P[:-1], float(w_P[-1])


def _scored(logit_T: Tensor, is_forget_T: Tensor, weight_T: Tensor, n_features: int) -> Json:
    sign_T = torch.where(is_forget_T, -1.0, 1.0).double()
    is_right_T = (logit_T > 0) == is_forget_T
    loss, accuracy = (weight_T * F.softplus(sign_T * logit_T)).sum(), (weight_T * is_right_T).sum()
    return {"n_features": n_features, "loss": float(loss), "balanced_accuracy": float(accuracy)}


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
