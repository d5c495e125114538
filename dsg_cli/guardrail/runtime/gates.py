"""Gate statistics: when does a sequence count as being about the forgotten knowledge, and from which token on?

A gate is a *token score*, one number a token that is not negative, an *aggregate* of the scores of a sequence, and a
threshold. Calibration, the guardrail at run time and the tests all compute them here.

Token scores, over activations f_j of a token:

- `active`: 1 if any clamped feature is active (or whatever else the clamp says, see guardrail.py), else 0; the paper's.
- `energy`: sum over the detectors of f_j.
- `drifts`: energy in units of its drift, what a token of no particular meaning has; at most `clip`.
- `probe`: logit b + sum_j w_j f_j of a probe over the detectors, clipped to +-clip and raised by clip: evidence above
  the least there can be. Clipped, because no single token, however unusual, should decide alone.

Aggregates over counted tokens:

- `mean`: over the whole sequence. For scoring: it needs the end of the sequence to decide about its beginning.
- `running-mean`: the largest mean over any prefix so far; a prefix of fewer than w tokens counts as w.
- `window`: the largest mean over w consecutive tokens so far; what is missing before the first counts as 0.
- `cusum`: the largest value so far of S_t = max(0, S_{t-1} + score_t - 1), Page's test for a change. In steps of
  1/256, so that sums are exact; from `CUSUM_CAP` on it counts as infinite.
- `any`: the largest score so far. Of `active` it is 1 from the first active token on, so that every active token is
  clamped: the gate `token` is none at all.

All but `mean` are latched (`latched`): they never fall, so a gate that opened stays open for the rest of the sequence.
They are scans: all that a gate must know of the tokens it has seen is a state of C numbers, and a sequence in one call,
in chunks or token by token gives the same numbers, bit for bit.

Shape suffixes: B batch, L position, C state, W tokens of a window. `segment_BL` is given where a row holds several
sequences one after another: a number that rises by one where the next begins.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

FORMS = {
    "mean": ("active", "mean"),
    "causal-mean": ("active", "running-mean"),
    "window": ("energy", "window"),
    "cusum": ("drifts", "cusum"),
    "probe": ("probe", "window"),
    "token": ("active", "any"),
}
"""Gate -> its token score and its aggregate."""

CAUSAL_FORMS = tuple(form for form, (_, aggregate) in FORMS.items() if aggregate != "mean")
DETECTING_FORMS = tuple(form for form, (score, _) in FORMS.items() if score != "active")
"""Gates that watch detectors, not the clamped features."""

CUSUM_STEP = 1 / 256
CUSUM_CAP = 2.0**15  # Times 256 it is an integer that float32 holds exactly.


@dataclass(frozen=True)
class Gate:
    """A gate form and its threshold."""

    form: str
    threshold: float
    window: int = 4  # w: counted tokens in a window, or in the shortest prefix.
    bias: float = 0.0  # b of a probe.
    clip: float = 0.0  # Bound of a probe's logit, or of a score in drifts.

    @property
    def score_name(self) -> str:
        return FORMS[self.form][0]

    @property
    def aggregate(self) -> str:
        return FORMS[self.form][1]

    def score(self, active_BL: Tensor, weighted_BL: Tensor) -> Tensor:
        """The token score, [B, L].

        `active_BL`: whether any clamped feature is active; `weighted_BL`: weighted sum of the detectors' activations,
        float32.
        """
        if self.score_name == "active":
            return active_BL.float()
        if self.score_name == "probe":
            return (weighted_BL + (self.bias + self.clip)).clamp(0.0, 2 * self.clip)
        return weighted_BL.clamp(max=self.clip) if self.score_name == "drifts" else weighted_BL

    @property
    def is_causal(self) -> bool:
        return self.aggregate != "mean"

    @property
    def state_size(self) -> int:
        """C: numbers that a sequence's state holds."""
        return {"mean": 0, "running-mean": 3, "window": self.window + 1, "cusum": 2, "any": 1}[self.aggregate]

    def initial_state(self, n_rows: int, device: torch.device) -> Tensor:
        """The state before the first token, [B, C]."""
        return torch.zeros(n_rows, self.state_size, device=device, dtype=torch.float32)

    def peak(self, state_BC: Tensor) -> Tensor:
        """The statistic so far that a causal gate's state holds, [B]."""
        return state_BC[:, -1]

    def scan(
        self, signal_BL: Tensor, counted_BL: Tensor, state_BC: Tensor, segment_BL: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The statistic at each token, [B, L], and the state after each, [B, L, C].

        Signals are token scores, float32, not negative. `state_BC` is the state before the first of these tokens; where
        sequences are packed (`segment_BL`) they begin here, whatever the state.
        """
        signal_BL = torch.where(counted_BL, signal_BL, 0.0)
        if self.aggregate == "mean":
            return _mean(signal_BL, counted_BL, segment_BL), signal_BL.new_zeros(*signal_BL.shape, 0)
        if self.aggregate == "cusum":
            return _cusum(signal_BL, counted_BL, state_BC, segment_BL)
        if self.aggregate == "any":
            peak_BL = latched(signal_BL, state_BC, segment_BL)
            return peak_BL, peak_BL[..., None]
        if self.aggregate == "running-mean":
            return _causal_mean(signal_BL, counted_BL, state_BC, segment_BL, self.window)
        return _window(signal_BL, counted_BL, state_BC, segment_BL, self.window)


def latched(value_BL: Tensor, before_B1: Tensor, segment_BL: Tensor | None) -> Tensor:
    """The latch: the largest so far of values that are not negative; what exceeded the threshold once always does."""
    if segment_BL is None:
        return torch.maximum(value_BL.cummax(-1).values, before_B1)
    return _segment_max(value_BL, segment_BL)


def latched_at(gated_L: Tensor) -> int | None:
    """The token at which a latched gate opened, from whether each was gated; None if it stayed closed."""
    return int(gated_L.int().argmax()) if bool(gated_L.any()) else None


def _mean(signal_BL: Tensor, counted_BL: Tensor, segment_BL: Tensor | None) -> Tensor:
    counts_BL = counted_BL.float()
    if segment_BL is None:
        mean_B = signal_BL.sum(-1) / counts_BL.sum(-1).clamp(min=1)
        return mean_B[:, None].expand_as(signal_BL)
    total_BS = torch.zeros_like(signal_BL).scatter_add(1, segment_BL, signal_BL)
    count_BS = torch.zeros_like(signal_BL).scatter_add(1, segment_BL, counts_BL)
    return (total_BS / count_BS.clamp(min=1)).gather(1, segment_BL)


def _causal_mean(
    signal_BL: Tensor, counted_BL: Tensor, state_BC: Tensor, segment_BL: Tensor | None, shortest: int
) -> tuple[Tensor, Tensor]:
    # Sums of zeros and ones: exact in float32 up to 2^24 tokens, in whatever order.
    total_BL = signal_BL.cumsum(-1) + state_BC[:, 0:1]
    count_BL = counted_BL.float().cumsum(-1) + state_BC[:, 1:2]
    if segment_BL is not None:
        total_BL, count_BL = (sums - _before_segment(sums, segment_BL) for sums in (total_BL, count_BL))
    peak_BL = latched(total_BL / count_BL.clamp(min=max(shortest, 1)), state_BC[:, 2:3], segment_BL)
    return peak_BL, torch.stack([total_BL, count_BL, peak_BL], -1)


def _window(
    signal_BL: Tensor, counted_BL: Tensor, state_BC: Tensor, segment_BL: Tensor | None, window: int
) -> tuple[Tensor, Tensor]:
    """State: signals of the last w counted tokens, the oldest first, then the statistic so far."""
    rank_BL = counted_BL.cumsum(-1)  # Counted tokens so far, this one included.
    # Signals of counted tokens side by side behind those of the state; a token that is not counted adds its 0.
    slot_BL = rank_BL + (window - 1)
    row = nn.functional.pad(state_BC[:, :window], (0, signal_BL.shape[1])).scatter_add(1, slot_BL, signal_BL)
    place = (rank_BL[..., None] + torch.arange(window, device=rank_BL.device)).flatten(1)
    recent_BLW = row.gather(1, place).view(*signal_BL.shape, window)
    if segment_BL is not None:
        unowned = torch.full_like(row, -1, dtype=torch.long)
        owner = unowned.scatter_reduce(1, slot_BL, torch.where(counted_BL, segment_BL, -1), "amax")
        owner_BLW = owner.gather(1, place).view(*signal_BL.shape, window)
        recent_BLW = torch.where(owner_BLW == segment_BL[..., None], recent_BLW, 0.0)
    total_BL = recent_BLW[..., 0]
    for place_in_window in range(1, window):
        total_BL = total_BL + recent_BLW[..., place_in_window]  # The same sum whatever the length of a call.
    peak_BL = latched(total_BL / window, state_BC[:, -1:], segment_BL)
    return peak_BL, torch.cat([recent_BLW, peak_BL[..., None]], -1)


def _cusum(signal_BL: Tensor, counted_BL: Tensor, state_BC: Tensor, segment_BL: Tensor | None) -> tuple[Tensor, Tensor]:
    """State: S, then the statistic so far. With C the running sum of steps, S_t = C_t - min(-S_0, min_{s<=t} C_s)."""
    steps_BL = ((signal_BL - 1).clamp(max=CUSUM_CAP) / CUSUM_STEP).round().long()
    sums_BL = torch.where(counted_BL, steps_BL, 0).cumsum(-1)
    before_B1 = (state_BC[:, :1] / CUSUM_STEP).long()
    if segment_BL is None:
        lowest_BL = torch.minimum(sums_BL.cummin(-1).values, -before_B1)
    else:
        # Each sequence begins with S = 0 where the sum stood before its first token.
        lowest_BL = -_segment_max(torch.maximum(-sums_BL, -_before_segment(sums_BL, segment_BL)), segment_BL)
    value_BL = ((sums_BL - lowest_BL).float() * CUSUM_STEP).clamp(max=CUSUM_CAP)
    reached_BL = torch.where(value_BL < CUSUM_CAP, value_BL, torch.inf)
    peak_BL = latched(reached_BL, state_BC[:, -1:], segment_BL)
    return peak_BL, torch.stack([value_BL, peak_BL], -1)


def _before_segment(sums_BL: Tensor, segment_BL: Tensor) -> Tensor:
    """The running sum as it was before the first token of each token's segment."""
    before_BL = torch.cat([torch.zeros_like(sums_BL[:, :1]), sums_BL[:, :-1]], -1)
    is_first_BL = torch.cat([torch.ones_like(segment_BL[:, :1]), segment_BL.diff(dim=-1)], -1) > 0
    place_BL = torch.arange(segment_BL.shape[1], device=segment_BL.device).expand_as(segment_BL)
    return before_BL.gather(1, torch.where(is_first_BL, place_BL, 0).cummax(-1).values)


def _segment_max(value_BL: Tensor, segment_BL: Tensor) -> Tensor:
    """The largest so far within each segment."""
    shift = 1
    while shift < value_BL.shape[1]:
        # Each token takes the larger of its own and of the one `shift` before it, if of the same segment.
        is_same_BL = segment_BL[:, shift:] == segment_BL[:, :-shift]
        earlier_BL = torch.where(is_same_BL, value_BL[:, :-shift], value_BL[:, shift:])
        value_BL = torch.cat([value_BL[:, :shift], torch.maximum(value_BL[:, shift:], earlier_BL)], -1)
        shift *= 2
    return value_BL
