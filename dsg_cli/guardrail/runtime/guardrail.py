"""The method at run time: which tokens are active, when the gate opens and latches, and what is added to the residual.

For a token whose residual is h and whose clamped features have the activations f_j (arXiv 2504.08192):

1. The token is *active* if a clamped feature is (`Clamp.is_active`, with the rules of other clamps).
2. The *gate* is open if its statistic of the sequence so far exceeds the threshold (`GuardrailModule.decide`). It
   latches: the statistic is a running maximum (`gates.latched`), so that from the token at which it opened
   (`gates.latched_at`) to the end of the sequence every token is gated. The state between calls lies in the cache.
3. On tokens that are both, every clamped feature is set to -c and the SAE's error is left as it is; in closed form

       h + sum_j (-c - f_j) W_dec[j]

   with -c - f_j from `Clamp.change` and the sum from `GuardrailModule.edit`. To every other token exactly 0 is added.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .errors import DsgError
from .gates import Gate
from .sites import parse_hook_site
from .slice import SaeSlice, SliceSpec, tensor_names
from .spec import NEVER, GuardrailSpec, guardrail_digest


class Clamp(nn.Module):
    """Which tokens are active, and what is added to their features. No branch depends on a tensor's values."""

    triggers: Tensor  # 1 for features that can make a token active, 0 for others, [K].
    above: Tensor  # [K]; only where the spec has it or clamps each feature by itself.
    target: Tensor  # [C]; only where the spec has coefficients.

    def __init__(
        self, spec: GuardrailSpec, n_clamped: int, n_watched: int, device: torch.device, *, is_signed: bool
    ) -> None:
        super().__init__()
        self.is_signed, self.is_each = is_signed, spec.clamp == "each"
        self.n_clamped, self.target_of_all = n_clamped, -spec.strength
        self.has_above, self.has_target = bool(spec.above) or self.is_each, bool(spec.coefficients)
        above = spec.above or [0.0] * n_clamped + [NEVER] * (n_watched - n_clamped)
        self.register_buffer("triggers", torch.tensor([float(bound < NEVER) for bound in above], device=device), False)
        if self.has_above:
            self.register_buffer("above", torch.tensor(above, dtype=torch.float32, device=device), False)
        if self.has_target:
            self.register_buffer("target", torch.tensor(spec.coefficients, dtype=torch.float32, device=device), False)

    def size(self, acts: Tensor) -> Tensor:
        """How strongly features are active, which for an `abstopk` SAE has no sign."""
        return acts.abs() if self.is_signed else acts

    def is_active(self, size_BLK: Tensor) -> Tensor:
        """Whether a token is active, [B, L]."""
        if self.has_above:
            return (size_BLK > self.above).any(-1)
        return size_BLK @ self.triggers > 0

    def change(self, acts_BLC: Tensor) -> Tensor:
        """What is added to the clamped features of an active token: -c - f_j, or the coefficient of j instead of -c."""
        change_BLC = (self.target if self.has_target else self.target_of_all) - acts_BLC
        if self.is_each:
            is_over_BLC = self.size(acts_BLC) > self.above[: self.n_clamped]
            change_BLC = torch.where(is_over_BLC, change_BLC, 0.0)
        return change_BLC


class Watched(NamedTuple):
    """What the gate sees of the tokens of one call."""

    acts_BLK: Tensor
    scale_BL1: Tensor | None
    finite_BL: Tensor
    active_BL: Tensor
    signal_BL: Tensor  # The gate's token score; infinite where the residual is not finite.
    statistic_BL: Tensor
    states_BLC: Tensor


class TokenDecisions(NamedTuple):
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
        self.n_clamped_features = len(self.slice.W_dec)
        detect = tensors.get("detect")
        n_features = self.slice.index.numel() if "index" in tensors else self.slice.W_enc.shape[1]
        self.register_buffer("detect", torch.ones(n_features) if detect is None else detect.float().contiguous())
        device = self.slice.W_dec.device
        self.clamp = Clamp(
            spec, self.n_clamped_features, n_features, device, is_signed=self.slice.spec.activation == "abstopk"
        )
        self.register_buffer("basis", torch.linalg.qr(self.slice.W_dec.T).R.T, persistent=False)
        special = torch.tensor(spec.special_ids, dtype=torch.long, device=device)
        self.register_buffer("special", special, persistent=False)
        for name in ("n_sequences", "n_gated", "n_clamped", "n_broken"):
            self.register_buffer(name, torch.zeros((), dtype=torch.long, device=device), persistent=False)
        self.register_buffer("largest_edit", torch.zeros((), device=device), persistent=False)
        self.key = ""  # Digest of spec and tensors: whose state is whose in a cache.
        self.trace: list[TokenDecisions] | None = None  # If a list, every decision is appended to it.
        self.last: TokenDecisions | None = None
        # Largest change of a token in each row of the last call, relative to the norm of its residual.
        self.last_edit_B: Tensor | None = None

    @property
    def last_statistic_B(self) -> Tensor:
        assert self.last is not None
        return self.last.statistic_BL.amax(-1)

    @property
    def last_gated_B(self) -> Tensor:
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
        size_BLK = clamp.size(acts_BLK)
        active_BL = clamp.is_active(size_BLK) & counted_BL
        signal_BL = self.gate.score(active_BL, size_BLK @ self.detect)
        # Fails closed: what cannot be computed counts as the strongest signal there is.
        signal_BL = torch.where(finite_BL, signal_BL, torch.inf)
        if state_BC is None:
            state_BC = self.gate.initial_state(len(acts_BLK), acts_BLK.device)
        statistic_BL, states_BLC = self.gate.scan(signal_BL, counted_BL, state_BC, segment_BL)
        return Watched(acts_BLK, scale_BL1, finite_BL, active_BL, signal_BL, statistic_BL, states_BLC)

    def decide(
        self, resid_BLD: Tensor, counted_BL: Tensor, state_BC: Tensor | None = None, segment_BL: Tensor | None = None
    ) -> TokenDecisions:
        """Gate and clamp the tokens of one call.

        `state_BC` is the gate's state before these tokens, None at the beginning of sequences; `segment_BL` is given
        where rows hold several sequences.
        """
        seen = self.watch(resid_BLD, counted_BL, state_BC, segment_BL)
        gated_BL = ~(seen.statistic_BL <= self.gate.threshold)  # A NaN is gated.
        clamped_BL = seen.active_BL & gated_BL
        change_BLC = self.clamp.change(seen.acts_BLK[..., : self.n_clamped_features])
        if seen.scale_BL1 is not None:
            change_BLC = change_BLC * seen.scale_BL1
        change_BLC = torch.where(clamped_BL[..., None], change_BLC, 0.0)
        decision = TokenDecisions(seen.statistic_BL, gated_BL, change_BLC, seen.states_BLC)
        self._count(decision, resid_BLD, clamped_BL, counted_BL & ~seen.finite_BL, state_BC, segment_BL)
        self.last = decision
        if self.trace is not None:
            self.trace.append(decision)
        return decision

    def forward(self, resid_BLD: Tensor, counted_BL: Tensor) -> Tensor:
        """Whole sequences at once: the residual with its caught tokens clamped, in the dtype it came in."""
        return self.edit(resid_BLD, self.decide(resid_BLD, counted_BL))

    def edit(self, resid_BLP: Tensor, decision: TokenDecisions) -> Tensor:
        """h + sum_j change_j W_dec[j]: the residual with what a decision adds, in its own dtype."""
        flat, change = resid_BLP.float().flatten(0, 1), decision.change_BLC.flatten(0, 1)
        return torch.addmm(flat, change, self.slice.W_dec).view(resid_BLP.shape).to(resid_BLP.dtype)

    def edit_size(self, resid_BLD: Tensor, decision: TokenDecisions) -> Tensor:
        """How long a token's change is, relative to the norm of the residual that was read, [B, L]."""
        # In C dimensions, not in P. A broken residual, or one of length 0, has no ratio.
        length_BL = (decision.change_BLC @ self.basis).norm(dim=-1)
        return (length_BL / resid_BLD.float().norm(dim=-1)).nan_to_num(0.0, 0.0)

    @torch.no_grad()
    def _count(
        self,
        decision: TokenDecisions,
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
        before = [(module, name, old) for module in self.modules() for name, old in module._buffers.items()]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for module, name, old in before:
            new = module._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                module._buffers[name] = old if old.device == new.device else old.to(new.device)
        return self


def build_guardrail(spec: GuardrailSpec, tensors: Mapping[str, Tensor], *, where: str) -> GuardrailModule:
    """A guardrail from parts that somebody may have altered; `where` they were found."""
    if problem := _problem(spec, SliceSpec(**spec.slice), tensors):
        raise DsgError(f"{where}{problem}", "Make the guardrail again with dsg apply.")
    module = GuardrailModule(spec, tensors)
    module.key = guardrail_digest(spec, module.tensors())
    return module


def _problem(spec: GuardrailSpec, slice_spec: SliceSpec, tensors: Mapping[str, Tensor]) -> str:
    """Why no SAE gives such tensors, or why they do not go with the spec; empty if they do."""
    if missing := [name for name in tensor_names(slice_spec.activation) if name not in tensors]:
        return f" has no tensor {missing[0]}."
    W_enc, W_dec, index = tensors["W_enc"], tensors["W_dec"], tensors.get("index")
    is_matrix = W_enc.ndim == W_dec.ndim == 2 and len(W_enc) > 0 and W_dec.shape[1] > 0
    n_columns = W_enc.shape[-1] if is_matrix else 0
    n_features = n_columns if index is None else index.numel()
    length_of = dict.fromkeys(tensors, n_columns) | {"index": n_features, "detect": n_features}
    has_shapes = all(t.shape == (length_of[name],) for name, t in tensors.items() if name not in ("W_enc", "W_dec"))
    if not is_matrix or not has_shapes or len(W_dec) > n_features:
        return ": the shapes of its tensors do not agree."
    is_index = index is None or (index.dtype == torch.int64 and bool(((index >= 0) & (index < n_columns)).all()))
    if not is_index or not 0 <= slice_spec.k <= n_columns:
        return " names features that it does not hold."
    numbers = [spec.strength, *spec.coefficients, *spec.above]
    are_numbers = all(math.isfinite(number) and abs(number) <= NEVER for number in numbers)  # Float32 holds them.
    fits = len(spec.coefficients) in (0, len(W_dec)) and len(spec.above) in (0, n_features)
    if spec.clamp not in ("all", "each") or not fits or not are_numbers or any(bound < 0 for bound in spec.above):
        return ": how it clamps does not fit its features."
    is_finite = all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values())
    return "" if is_finite else " holds values that are not finite."
