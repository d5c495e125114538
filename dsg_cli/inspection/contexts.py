"""Where features fire: how often, how much, and in which contexts most, from one streaming pass over some text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from dsg_cli.data.batches import TokenBatch, batches
from dsg_cli.data.tokens import words_of
from dsg_cli.errors import DsgError
from dsg_cli.guardrail.runtime.sites import HookSite
from dsg_cli.inspection.descriptions import STOP_WORDS
from dsg_cli.job import PLAIN_JOB, Job, Report, silent
from dsg_cli.models.residuals import OomSplitter, read_residual

BEFORE, AFTER = 12, 6
"""Tokens of a context on either side of its peak. W = 12 + 1 + 6."""
NOTHING = -1
"""In the place of a token where a context reaches beyond its row, and of a row where there is no context."""


@dataclass(frozen=True)
class Contexts:
    """Of each of C features: its rate, its mean, and the N rows in which it is strongest, one context a row."""

    n_tokens: int
    """Counted ones."""
    rate_C: Tensor
    """Share of counted tokens on which it is active."""
    mean_C: Tensor
    """Mean activation over counted tokens."""
    peak_CN: Tensor
    """Largest activation in each of those rows, from the largest magnitude on; 0 where there is no further row."""
    row_CN: Tensor
    position_CN: Tensor
    """Where in the row the peak is."""
    ids_CNW: Tensor
    """Tokens around the peak, which is the one at `BEFORE`."""
    acts_CNW: Tensor
    """Activations on them; 0 on tokens that do not count."""


@dataclass(frozen=True)
class Context:
    """One place where a feature is strong."""

    row: int
    position: int
    """Of the peak in the row."""
    peak: float
    ids: list[int]
    """Tokens around the peak, those that there are."""
    acts: list[float]
    at: int
    """Which of them has the peak."""


def distinct_contexts(contexts: Contexts, feature: int) -> list[Context]:
    """The contexts of one of the C features, the strongest first; of those with the same text up to the peak, one."""
    distinct: dict[tuple[int, ...], Context] = {}
    for n, row in enumerate(contexts.row_CN[feature].tolist()):
        if row == NOTHING:
            break
        there_W = contexts.ids_CNW[feature, n] != NOTHING
        ids = contexts.ids_CNW[feature, n][there_W].tolist()
        acts = contexts.acts_CNW[feature, n][there_W].tolist()
        position, peak = int(contexts.position_CN[feature, n]), float(contexts.peak_CN[feature, n])
        at = int(there_W[:BEFORE].sum())
        distinct.setdefault(tuple(ids[: at + 1]), Context(row, position, peak, ids, acts, at))
    return list(distinct.values())


@torch.inference_mode()
def read_contexts(
    model: nn.Module,
    site: HookSite,
    encode: Callable[[Tensor], Tensor],
    rows: Sequence[list[int]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    n_contexts: int,
    job: Job = PLAIN_JOB,
) -> Contexts:
    """One pass up to the hook, over rows of token ids. What it keeps is C x N x W, however long the text is.

    The model may be cut after the layer of `site`, where the SAE reads. `encode` maps residuals [T, D] to activations
    [T, C] of all features or some; those of a row must fit in memory. N is `n_contexts`.
    """
    split_on_oom, strongest = OomSplitter(), _Strongest(n_contexts)
    n_read, total = 0, sum(map(len, rows))
    device = str(next(model.parameters()).device)

    def resid(batch: TokenBatch) -> Tensor:
        return read_residual(model, site, batch.ids_BL, batch.mask_BL)

    for whole in batches(rows, tokenizer, device=device):
        for batch, resid_BLD in split_on_oom(whole, resid):
            for b, row in enumerate(batch.index):
                length = len(rows[row])
                counted_L = batch.counted_BL[b, :length]
                acts_LC = encode(resid_BLD[b, :length].float()) * counted_L[:, None]
                strongest.add(row, batch.ids_BL[b, :length], acts_LC, counted_L)
                n_read += length
        job.progress(f"{job.name}, tokens", n_read, total)
    if not strongest.n_tokens:
        raise DsgError(f"The {job.name} has no token that counts: all are padding, BOS or EOS.")
    return strongest.contexts(job.name)


class _Strongest:
    """Sums, and the rows with the largest peaks so far."""

    def __init__(self, n_contexts: int) -> None:
        self.n_contexts = n_contexts
        self.n_tokens = 0
        self.sums: list[Tensor] = []
        self.best: dict[str, Tensor] = {}

    def add(self, row: int, ids_L: Tensor, acts_LC: Tensor, counted_L: Tensor) -> None:
        self.n_tokens += int(counted_L.sum())
        parts = [(acts_LC != 0).sum(0).double(), acts_LC.sum(0, dtype=torch.float64)]
        self.sums = [total + part for total, part in zip(self.sums, parts, strict=True)] if self.sums else parts
        size_C, position_C = acts_LC.abs().max(0)
        if not self.best:
            full = partial(torch.full, device=acts_LC.device)
            shape = (acts_LC.shape[1], self.n_contexts)
            window = (*shape, BEFORE + 1 + AFTER)
            # In the order of the fields of `Contexts`.
            self.best = {"peak": full(shape, 0.0), "row": full(shape, NOTHING), "position": full(shape, NOTHING)}
            self.best |= {"ids": full(window, NOTHING, dtype=torch.int32), "acts": full(window, 0.0)}
        better = (size_C > self.best["peak"][:, -1].abs()).nonzero()[:, 0]
        place_XW = position_C[better, None] + torch.arange(BEFORE + 1 + AFTER, device=ids_L.device)
        padded_ids = torch.nn.functional.pad(ids_L, (BEFORE, AFTER), value=NOTHING)
        padded_acts = torch.nn.functional.pad(acts_LC, (0, 0, BEFORE, AFTER))
        new = {
            "peak": acts_LC[position_C[better], better],
            "row": torch.full_like(better, row),
            "position": position_C[better],
            "ids": padded_ids[place_XW],
            "acts": padded_acts[place_XW, better[:, None]],
        }
        for name, values in new.items():  # The weakest makes room; then they are put in order again.
            self.best[name][better, -1] = values.to(self.best[name].dtype)
        order_XN = self.best["peak"][better].abs().argsort(dim=-1, descending=True, stable=True)
        for tensor in self.best.values():
            tensor[better] = tensor[better[:, None], order_XN]

    def contexts(self, what: str) -> Contexts:
        active_C, total_C = self.sums
        if not total_C.isfinite().all():
            hint = "Check the weights of model and SAE, or try --dtype float32."
            raise DsgError(f"On the {what} an activation of the SAE is not finite.", hint)
        rate_C, mean_C = ((sum_C / self.n_tokens).cpu() for sum_C in (active_C, total_C))
        return Contexts(self.n_tokens, rate_C, mean_C, *(tensor.cpu() for tensor in self.best.values()))


BEFORE_PEAK = 0.25
"""Weight of a word before the peak on which the feature is not active."""
SHARE_OF_BEST = 0.25
N_WORDS = 10


@dataclass(frozen=True)
class Description:
    """What a feature is about, on how many tokens it is active, and their share of all counted ones."""

    index: int
    description: str
    n: int
    rate: float


def describe_features(
    contexts: Contexts, tokenizer: PreTrainedTokenizerBase, *, report: Report = silent
) -> list[Description]:
    """A description of every feature that fired on a word: the words with the largest tf * idf, the best first.

    tf is a word's share of the feature's peaks, idf its rarity among features. `contexts` are of all, feature 0 first.
    """
    n_features = len(contexts.rate_C)
    frequency: dict[int, dict[str, float]] = {}
    for j in range(n_features):
        if contexts.row_CN[j, 0] != NOTHING and (words := _frequencies(contexts, j, tokenizer)):
            frequency[j] = words
        report("describing features", j + 1, n_features)
    total: dict[str, float] = {}
    for words in frequency.values():
        for word, tf in words.items():
            total[word] = total.get(word, 0.0) + tf
    rarity = {word: math.log((1 + len(frequency)) / (1 + tf)) for word, tf in total.items()}
    return [
        Description(
            index=j,
            description=", ".join(_best({word: tf * rarity[word] for word, tf in words.items()})),
            n=round(float(contexts.rate_C[j]) * contexts.n_tokens),
            rate=float(contexts.rate_C[j]),
        )
        for j, words in frequency.items()
    ]


def _frequencies(contexts: Contexts, j: int, tokenizer: PreTrainedTokenizerBase) -> dict[str, float]:
    """Word -> tf."""
    frequencies: dict[str, float] = {}
    peaks = contexts.peak_CN[j].abs().tolist()
    for n, peak in enumerate(peaks):
        if not peak:
            break
        ids, acts = contexts.ids_CNW[j, n].tolist(), contexts.acts_CNW[j, n].abs().tolist()
        weights: dict[str, float] = {}
        for word, act, is_before in _words(ids, acts, tokenizer):
            least = BEFORE_PEAK if is_before else 0.0
            weights[word] = max(weights.get(word, 0.0), least + (1 - least) * act / peak)
        for word, weight in weights.items():
            if weight:
                frequencies[word] = frequencies.get(word, 0.0) + weight * peak / sum(peaks)
    return frequencies


def _words(ids: list[int], acts: list[float], tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, float, bool]]:
    """The words of a context, each with the largest activation of its tokens and whether it begins before the peak.

    A tokenizer's pieces are put together to what stands between white space.
    """
    places = [place for place, token in enumerate(ids) if token != NOTHING]
    runs: list[tuple[str, float, bool]] = []
    before, held = "", 0.0
    for number, place in enumerate(places, start=1):
        text = tokenizer.decode([ids[at] for at in places[:number]], skip_special_tokens=True)
        held = max(held, acts[place])
        if text.endswith("\ufffd") and number < len(places):
            continue  # Part of a character, whose other parts follow.
        piece, joins = text[len(before) :], bool(before) and not before[-1].isspace()
        if runs and joins and not piece[:1].isspace():
            run, act, is_before = runs[-1]
            runs[-1] = (run + piece, max(act, held), is_before)
        else:
            runs.append((piece, held, place <= BEFORE))
        before, held = text, 0.0
    for run, act, is_before in runs:
        for word in words_of(run):
            if word not in STOP_WORDS and any(map(str.isalpha, word)):
                yield word, act, is_before


def _best(scores: dict[str, float]) -> list[str]:
    order = sorted(scores, key=lambda word: (-scores[word], word))
    return [word for word in order[:N_WORDS] if scores[word] >= SHARE_OF_BEST * scores[order[0]]]
