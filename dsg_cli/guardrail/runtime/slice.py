"""K features of a sparse autoencoder, computed without the others.

For `standard`, `jumprelu`, `gated` and the transcoders a feature depends on its own column of the encoder alone.
Under `topk` and `abstopk` it also depends on which features are among the k largest: there the whole encoder is kept
and membership decided first. All arithmetic is float32, whatever the model's dtype.

Shape suffixes: D width of the SAE's input, F features of the SAE, K chosen features, P width of its output (D, unless
it is a transcoder).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

LAYER_NORM_EPSILON = 1e-5
TOPK_CHUNK = 1024  # Tokens whose F pre-activations are held at a time.


@dataclass(frozen=True)
class SliceSpec:
    """How activations follow from the tensors of a slice."""

    activation: str
    """`threshold` (ReLU and JumpReLU), `gated`, `topk` or `abstopk`."""
    normalization: str = "none"
    """Of the input, at run time: `none`, `layer_norm` or `constant_norm_rescale`."""
    is_rescaled_back: bool = True
    """Whether the decoder's output is brought back to the input's scale; a transcoder's is not."""
    k: int = 0
    """Active features of a `topk` or `abstopk` SAE."""


class Encoded(NamedTuple):
    """What a slice makes of residuals [..., D]."""

    acts: Tensor
    """Activations [..., K]."""
    scale: Tensor | None
    """What a change of the decoder's output is multiplied with to become a change of the residual, [..., 1]."""
    is_finite: Tensor
    """False where the residual holds a NaN or an infinity, [...]."""


class SaeSlice(nn.Module):
    """The tensors of K features as float32 buffers; see `tensor_names` for which there are.

    `b_enc` (and `b_gate`, `b_mag`) hold the decoder bias that the encoder subtracts from its input folded in.
    """

    W_enc: Tensor
    """[D, K]; [D, F] under topk and abstopk."""
    W_dec: Tensor
    """[C, P]: decoder rows of the first C of the K features, those that a guardrail clamps."""
    b_enc: Tensor
    """[K] or [F]; absent if gated."""
    active_above: Tensor
    """[K], `threshold` only: the pre-activation that a feature must exceed to be active (0 for a ReLU)."""
    b_gate: Tensor
    b_mag: Tensor
    mag_scale: Tensor
    """[K], gated only: exp(r_mag)."""
    act_scale: Tensor
    """[F], topk only: decoder norms by which pre-activations are ranked and scaled; ones if they are not."""
    index: Tensor
    """[K] int64, topk only: the chosen features among the F."""

    def __init__(self, spec: SliceSpec, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.spec = spec
        for name in tensor_names(spec.activation):
            tensor = tensors[name]
            self.register_buffer(name, (tensor if name == "index" else tensor.float()).contiguous())

    def forward(self, resid: Tensor) -> Encoded:
        """Activations of the K features on residuals [..., D]."""
        resid = resid.float()
        scale: Tensor | None = None
        if self.spec.normalization == "layer_norm":
            resid = resid - resid.mean(-1, keepdim=True)
            scale = resid.std(-1, keepdim=True)
            resid = resid / (scale + LAYER_NORM_EPSILON)
        elif self.spec.normalization == "constant_norm_rescale":
            scale = resid.norm(dim=-1, keepdim=True) / resid.shape[-1] ** 0.5
            resid = resid / scale
        if self.spec.activation in ("topk", "abstopk"):
            acts, is_finite = self._topk(resid)
        else:
            acts, is_finite = self._columns(resid)
        return Encoded(acts, scale if self.spec.is_rescaled_back else None, is_finite)

    def _columns(self, resid: Tensor) -> tuple[Tensor, Tensor]:
        pre = resid @ self.W_enc
        is_finite = _is_finite(pre)
        if self.spec.activation == "gated":
            magnitude = (pre * self.mag_scale + self.b_mag).relu()
            return torch.where(pre + self.b_gate > 0, magnitude, 0.0), is_finite
        pre = pre + self.b_enc
        return torch.where(pre > self.active_above, pre, 0.0), is_finite

    def _topk(self, resid: Tensor) -> tuple[Tensor, Tensor]:
        parts = [self._topk_chunk(chunk) for chunk in torch.split(resid.reshape(-1, resid.shape[-1]), TOPK_CHUNK)]
        acts, is_finite = (torch.cat(list(part)) for part in zip(*parts, strict=True))
        return acts.reshape(*resid.shape[:-1], -1), is_finite.reshape(resid.shape[:-1])

    def _topk_chunk(self, resid: Tensor) -> tuple[Tensor, Tensor]:
        pre = (resid @ self.W_enc + self.b_enc) * self.act_scale
        is_signed = self.spec.activation == "abstopk"
        members = torch.topk(pre.abs() if is_signed else pre, self.spec.k, dim=-1, sorted=False).indices
        chosen = pre[..., self.index]
        is_member = (members[..., :, None] == self.index).any(-2)
        return torch.where(is_member, chosen if is_signed else chosen.relu(), 0.0), _is_finite(pre)


def _is_finite(pre: Tensor) -> Tensor:
    """A NaN or an infinity in a residual reaches every column, and their sum; times 0 it is a NaN."""
    return pre.sum(-1) * 0 == 0


def tensor_names(activation: str) -> tuple[str, ...]:
    """Names of the tensors that a slice with this activation has."""
    return {
        "threshold": ("W_enc", "b_enc", "active_above", "W_dec"),
        "gated": ("W_enc", "b_gate", "b_mag", "mag_scale", "W_dec"),
        "topk": ("W_enc", "b_enc", "act_scale", "index", "W_dec"),
        "abstopk": ("W_enc", "b_enc", "act_scale", "index", "W_dec"),
    }[activation]
