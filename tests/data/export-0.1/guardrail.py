"""The guardrail: gate and clamp as one torch module, and how it is put on a model.

On every hot token (one on which a clamped feature is active) that the gate has caught, all clamped features are set
to -c and the SAE's error is left as it is; in closed form `h + sum_j (-c - f_j(h)) W_dec[j]`. To every other token
exactly 0 is added. Other rules of what is hot and what is set to what are in clamps.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .clamps import Clamp, check_clamp
from .errors import DsgError
from .gates import Gate
from .sites import parse_hook_site
from .slices import SaeSlice, SliceSpec, tensor_names
from .spec import GuardrailSpec, digest_of


class Watched(NamedTuple):
    """What the gate sees of the tokens of one call."""

    acts_BLK: Tensor
    scale_BL1: Tensor | None
    finite_BL: Tensor
    hot_BL: Tensor
    signal_BL: Tensor
    """The gate's token score; infinite where the residual is not finite."""
    statistic_BL: Tensor
    states_BLC: Tensor


class Decision(NamedTuple):
    """What a guardrail makes of the tokens of one call."""

    statistic_BL: Tensor
    gated_BL: Tensor
    change_BLC: Tensor
    """What is added along the decoder rows of the clamped features, float32; 0 where a token is not clamped."""
    states_BLC: Tensor
    """The gate's state after each token."""


class GuardrailModule(nn.Module):
    """Gate and clamp. Tensors only: no branch depends on a value, so it compiles and nothing waits for the device.

    The slice's tensors, and `detect` [K], the weight of each feature in the token score of the gate, are buffers
    and make up a file. The counters are buffers too, but belong to no file: `n_sequences`, `n_gated`, `n_clamped`
    (tokens), `n_broken` (counted tokens with a NaN or an infinity in their residual), `largest_edit` (relative to
    the residual's norm).
    """

    special: Tensor
    detect: Tensor
    basis: Tensor
    """The clamped features' decoder rows in an orthonormal basis of their span, [C, C]: for lengths."""
    n_sequences: Tensor
    n_gated: Tensor
    n_clamped: Tensor
    n_broken: Tensor
    largest_edit: Tensor

    def __init__(self, spec: GuardrailSpec, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.spec = spec
        self.slice = SaeSlice(SliceSpec(**spec.slice), dict(tensors))
        self.gate = Gate(spec.gate, spec.threshold, spec.window, spec.bias, spec.clip)
        self.read, self.write = (parse_hook_site(name, where="The guardrail") for name in (spec.read, spec.write))
        self.n_chosen = len(self.slice.W_dec)
        detect = tensors.get("detect")
        n_features = self.slice.index.numel() if "index" in tensors else self.slice.W_enc.shape[1]
        self.register_buffer("detect", torch.ones(n_features) if detect is None else detect.float().contiguous())
        device = self.slice.W_dec.device
        self.clamp = Clamp(spec, self.n_chosen, n_features, device, is_signed=self.slice.spec.activation == "abstopk")
        self.register_buffer("basis", torch.linalg.qr(self.slice.W_dec.T).R.T, persistent=False)
        special = torch.tensor(spec.special_ids, dtype=torch.long, device=device)
        self.register_buffer("special", special, persistent=False)
        for name in ("n_sequences", "n_gated", "n_clamped", "n_broken"):
            self.register_buffer(name, torch.zeros((), dtype=torch.long, device=device), persistent=False)
        self.register_buffer("largest_edit", torch.zeros((), device=device), persistent=False)
        self.key = ""
        """Digest of spec and tensors: whose state is whose in a cache."""
        self.trace: list[Decision] | None = None
        """If a list, every decision is appended to it."""
        self.last: Decision | None = None
        self.last_edit_B: Tensor | None = None
        """Largest change of a token in each row of the last call, relative to the norm of its residual."""

    @property
    def last_statistic_B(self) -> Tensor:
        """Largest statistic of each row of the last call."""
        assert self.last is not None
        return self.last.statistic_BL.amax(-1)

    @property
    def last_gated_B(self) -> Tensor:
        """Whether each row of the last call was gated."""
        assert self.last is not None
        return self.last.gated_BL.any(-1)

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a file holds, by name."""
        names = tensor_names(self.slice.spec.activation)
        return {**{name: getattr(self.slice, name) for name in names}, "detect": self.detect}

    def watch(
        self, resid_BLD: Tensor, counted_BL: Tensor, state_BC: Tensor | None = None, segment_BL: Tensor | None = None
    ) -> Watched:
        """The gate's statistic at every token of one call; arguments as for `decide`."""
        acts_BLK, scale_BL1, finite_BL = self.slice(resid_BLD)
        clamp = self.clamp
        strength_BLK = clamp.strength(acts_BLK)
        hot_BL = clamp.hot(strength_BLK) & counted_BL
        signal_BL = self.gate.score(hot_BL, strength_BLK @ self.detect)
        # Fails closed: what cannot be computed counts as the strongest signal there is.
        signal_BL = torch.where(finite_BL, signal_BL, torch.inf)
        if state_BC is None:
            state_BC = self.gate.initial_state(len(acts_BLK), acts_BLK.device)
        statistic_BL, states_BLC = self.gate.scan(signal_BL, counted_BL, state_BC, segment_BL)
        return Watched(acts_BLK, scale_BL1, finite_BL, hot_BL, signal_BL, statistic_BL, states_BLC)

    def decide(
        self, resid_BLD: Tensor, counted_BL: Tensor, state_BC: Tensor | None = None, segment_BL: Tensor | None = None
    ) -> Decision:
        """Gate and clamp the tokens of one call.

        Args:
            resid_BLD: Residual at the reading site.
            counted_BL: True for tokens that count.
            state_BC: The gate's state before them; None at the beginning of sequences.
            segment_BL: Where rows hold several sequences.
        """
        seen = self.watch(resid_BLD, counted_BL, state_BC, segment_BL)
        gated_BL = ~(seen.statistic_BL <= self.gate.threshold)  # A NaN is gated.
        clamped_BL = seen.hot_BL & gated_BL
        change_BLC = self.clamp.change(seen.acts_BLK[..., : self.n_chosen])
        if seen.scale_BL1 is not None:
            change_BLC = change_BLC * seen.scale_BL1
        change_BLC = torch.where(clamped_BL[..., None], change_BLC, 0.0)
        decision = Decision(seen.statistic_BL, gated_BL, change_BLC, seen.states_BLC)
        self._count(decision, resid_BLD, clamped_BL, counted_BL & ~seen.finite_BL, state_BC, segment_BL)
        self.last = decision
        if self.trace is not None:
            self.trace.append(decision)
        return decision

    def forward(self, resid_BLD: Tensor, counted_BL: Tensor) -> Tensor:
        """Whole sequences at once: the residual with its caught tokens clamped, in the dtype it came in."""
        return self.edit(resid_BLD, self.decide(resid_BLD, counted_BL))

    def edit(self, resid_BLP: Tensor, decision: Decision) -> Tensor:
        """The residual with what a decision adds, in its own dtype."""
        flat, change = resid_BLP.float().flatten(0, 1), decision.change_BLC.flatten(0, 1)
        return torch.addmm(flat, change, self.slice.W_dec).view(resid_BLP.shape).to(resid_BLP.dtype)

    def edit_size(self, resid_BLD: Tensor, decision: Decision) -> Tensor:
        """How long a token's change is, relative to the norm of the residual that was read, [B, L]."""
        # In C dimensions, not in P. A broken residual, or one of length 0, has no ratio.
        length_BL = (decision.change_BLC @ self.basis).norm(dim=-1)
        return (length_BL / resid_BLD.float().norm(dim=-1)).nan_to_num(0.0, 0.0)

    @torch.no_grad()
    def _count(
        self,
        decision: Decision,
        resid_BLD: Tensor,
        clamped_BL: Tensor,
        broken_BL: Tensor,
        before_BC: Tensor | None,
        segment_BL: Tensor | None,
    ) -> None:
        gated_BL = decision.gated_BL
        if segment_BL is not None:
            starts_BL = torch.cat([torch.ones_like(gated_BL[:, :1]), segment_BL.diff(dim=-1) > 0], -1)
            was_gated_BL = torch.cat([torch.zeros_like(gated_BL[:, :1]), gated_BL[:, :-1]], -1) & ~starts_BL
            self.n_sequences.add_(starts_BL.sum())
            self.n_gated.add_((gated_BL & ~was_gated_BL).sum())
        else:
            now_B = gated_BL[:, -1]
            if before_BC is None:
                self.n_sequences.add_(len(gated_BL))
            else:
                now_B = now_B & (self.gate.peak(before_BC) <= self.gate.threshold)
            self.n_gated.add_(now_B.sum())
        self.n_clamped.add_(clamped_BL.sum())
        self.n_broken.add_(broken_BL.sum())
        self.last_edit_B = self.edit_size(resid_BLD, decision).amax(-1)
        self.largest_edit.copy_(torch.maximum(self.largest_edit, self.last_edit_B.amax()))

    def counters(self) -> dict[str, float]:
        """The counters as numbers; waits for the device."""
        names = ("n_sequences", "n_gated", "n_clamped", "n_broken")
        return {**{name: int(getattr(self, name)) for name in names}, "largest_edit": float(self.largest_edit)}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GuardrailModule:
        """Moves to a device, never to a dtype: a guardrail computes in float32, whatever the model does."""
        before = {
            (module, name): buffer
            for module in self.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        }
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for (module, name), old in before.items():
            new = module._buffers[name]
            assert new is not None
            if new.dtype != old.dtype:
                module._buffers[name] = old if old.device == new.device else old.to(new.device)
        return self


def _check_shapes(tensors: Mapping[str, Tensor], spec: GuardrailSpec, where: str) -> None:
    """Refuse tensors that no SAE gives: of the wrong shapes, or with the index of a feature that is not there."""
    W_enc, W_dec, index = tensors["W_enc"], tensors["W_dec"], tensors.get("index")
    is_matrix = W_enc.ndim == W_dec.ndim == 2 and len(W_enc) > 0 and W_dec.shape[1] > 0
    n_columns = W_enc.shape[-1] if is_matrix else 0
    n_features = n_columns if index is None else index.numel()
    wrong = [
        name
        for name, tensor in tensors.items()
        if name not in ("W_enc", "W_dec")
        and tensor.shape != (n_features if name in ("index", "detect") else n_columns,)
    ]
    if not is_matrix or wrong or len(W_dec) > n_features:
        raise DsgError(f"{where}: the shapes of its tensors do not agree.", "Make the guardrail again with dsg apply.")
    is_index = index is None or (index.dtype == torch.int64 and bool(((index >= 0) & (index < n_columns)).all()))
    if not is_index or not 0 <= SliceSpec(**spec.slice).k <= n_columns:
        raise DsgError(f"{where} names features that it does not hold.", "Make the guardrail again with dsg apply.")
    check_clamp(spec, len(W_dec), n_features, where)


def build_guardrail(spec: GuardrailSpec, tensors: Mapping[str, Tensor], *, where: str) -> GuardrailModule:
    """A guardrail from its parts.

    Raises:
        DsgError: A tensor is missing or holds a value that is not finite.
    """
    for name in tensor_names(SliceSpec(**spec.slice).activation):
        if name not in tensors:
            raise DsgError(f"{where} has no tensor {name}.", "Make the guardrail again with dsg apply.")
    _check_shapes(tensors, spec, where)
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
        raise DsgError(f"{where} holds values that are not finite.", "Make the guardrail again with dsg apply.")
    module = GuardrailModule(spec, tensors)
    module.key = digest_of(spec, module.tensors())
    return module
