"""A text as one vector: the mean of the residual stream over its counted tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from dsg_cli.fitting import Fitting
from dsg_cli.model import text_config
from dsg_cli.progress import Report, silent
from dsg_cli.residuals import read_residual
from dsg_cli.runtime.sites import HookSite
from dsg_cli.tokens import TokenBatch, pad_rows, special_ids
from dsg_cli.workers import ALONE, Workers


@torch.inference_mode()
def mean_residuals(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Sequence[int]],
    *,
    layer: int,
    batch_size: int,
    workers: Workers = ALONE,
    report: Report = silent,
    what: str = "",
) -> Tensor:
    """The mean residual of each row after a decoder layer, [N, D] in float32 on the CPU; 0 where no token counts.

    Layers above it are not run. Batches are of similar lengths, longest first, and shared among workers; a row whose
    residual is not finite stays so.
    """
    site = HookSite(layer, "resid_post")
    special, device = special_ids(tokenizer), str(next(model.parameters()).device)
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    config = text_config(model.config)
    found_ND = torch.zeros(len(rows), int(config.hidden_size))
    fit = Fitting()
    n_tokens, total = 0, sum(map(len, rows))

    def pooled(batch: TokenBatch) -> Tensor:
        resid_BLD = read_residual(model, site, batch.ids_BL, batch.mask_BL).float()
        counted_BL = batch.counted_BL
        sum_BD = torch.where(counted_BL[..., None], resid_BLD, 0.0).sum(1)
        return (sum_BD / counted_BL.sum(1, keepdim=True).clamp(min=1)).cpu()

    for number, start in enumerate(range(0, len(order), batch_size)):
        index = order[start : start + batch_size]
        n_tokens += sum(len(rows[i]) for i in index)
        if workers.owns(number):
            whole = pad_rows([list(rows[i]) for i in index], tokenizer.pad_token_id or 0, special, device, index=index)
            for batch, mean_BD in fit(whole, pooled):
                found_ND[list(batch.index)] = mean_BD
        report(f"{what}, tokens", n_tokens, total)
    return workers.total([found_ND])[0] if workers.n > 1 else found_ND
