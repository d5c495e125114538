"""Gate statistics: when does a sequence count as being about the forgotten knowledge?

Every gate looks at one number a token, its *signal* (is it hot, or how strongly do the detectors fire), and at which
tokens are counted. Calibration, the guardrail at run time and the tests all count here.

- `mean`, the paper's: share of counted tokens that are hot, over the whole sequence. For scoring: it needs the end of
  the sequence to decide about its beginning.
- `causal-mean`: the largest share over any prefix so far; a prefix of fewer than w counted tokens counts as w.
- `window`: the largest mean signal over w consecutive counted tokens so far; what is missing before the first counts
  as 0.

The causal statistics never fall, so a gate that fired stays on for the rest of the sequence. They are scans: all that
a gate must know of the tokens it has seen is a state of C numbers, and a sequence in one call, in chunks or token by
token gives the same numbers, bit for bit.

Shape suffixes: B batch, L position, C state. `segment_BL` is given where a row holds several sequences one after
another: a number that rises by one where the next begins.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

CAUSAL_FORMS = ("causal-mean", "window")
FORMS = ("mean", *CAUSAL_FORMS)


@dataclass(frozen=True)
class Gate:
    """A gate form and its threshold."""

    form: str
    threshold: float
    window: int = 4
    """w: counted tokens in a window, or in the shortest prefix."""

    @property
    def is_causal(self) -> bool:
        return self.form in CAUSAL_FORMS

    @property
    def state_size(self) -> int:
        """C: numbers that a sequence's state holds."""
        return {"mean": 0, "causal-mean": 3, "window": self.window + 1}[self.form]

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

        Args:
            signal_BL: Signal of each token, float32, not negative.
            counted_BL: True for tokens that count.
            state_BC: State before the first of these tokens.
            segment_BL: Where sequences are packed; they begin here, whatever the state.
        """
        signal_BL = torch.where(counted_BL, signal_BL, 0.0)
        if self.form == "mean":
            return _mean(signal_BL, counted_BL, segment_BL), signal_BL.new_zeros(*signal_BL.shape, 0)
        if self.form == "causal-mean":
            return _causal_mean(signal_BL, counted_BL, state_BC, segment_BL, self.window)
        return _window(signal_BL, counted_BL, state_BC, segment_BL, self.window)


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
        total_BL, count_BL = (_since_start(sums, segment_BL) for sums in (total_BL, count_BL))
    peak_BL = _running_max(total_BL / count_BL.clamp(min=max(shortest, 1)), state_BC[:, 2:3], segment_BL)
    return peak_BL, torch.stack([total_BL, count_BL, peak_BL], -1)


def _since_start(sums_BL: Tensor, segment_BL: Tensor) -> Tensor:
    """Running sums that begin anew with each segment."""
    before_BL = torch.cat([torch.zeros_like(sums_BL[:, :1]), sums_BL[:, :-1]], -1)
    # The sum before a segment's first token is the smallest before any of its tokens, since sums never fall.
    start_BS = torch.full_like(sums_BL, torch.inf).scatter_reduce(1, segment_BL, before_BL, "amin")
    return sums_BL - start_BS.gather(1, segment_BL)


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
    peak_BL = _running_max(total_BL / window, state_BC[:, -1:], segment_BL)
    return peak_BL, torch.cat([recent_BLW, peak_BL[..., None]], -1)


def _running_max(value_BL: Tensor, before_B1: Tensor, segment_BL: Tensor | None) -> Tensor:
    if segment_BL is None:
        return torch.maximum(value_BL.cummax(-1).values, before_B1)
    shift = 1
    while shift < value_BL.shape[1]:
        # Each token takes the larger of its own and of the one `shift` before it, if of the same segment.
        earlier_BL = torch.where(segment_BL[:, shift:] == segment_BL[:, :-shift], value_BL[:, :-shift], 0.0)
        value_BL = torch.cat([value_BL[:, :shift], torch.maximum(value_BL[:, shift:], earlier_BL)], -1)
        shift *= 2
    return value_BL
