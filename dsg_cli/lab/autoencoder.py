"""The lab's SAEs: BatchTopK, trained by sae-lens on the residual stream, saved as the JumpReLU SAEs they then are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Gemma2ForCausalLM, PreTrainedTokenizerFast

from dsg_cli.lab.language_model import training_rows
from dsg_cli.lab.settings import LabSettings
from dsg_cli.lab.world import World
from dsg_cli.progress import Report
from dsg_cli.residuals import read_residual, replace_residual
from dsg_cli.runtime.sites import HookSite


def train_sae(
    model: Gemma2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    world: World,
    settings: LabSettings,
    *,
    seed: int,
    report: Report,
    folder: Path,
) -> dict[str, float]:
    """Train one SAE with sae-lens's trainer, save it for inference in `folder`, and measure it on fresh text."""
    from sae_lens import SAE, BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.saes.sae import SAEMetadata
    from sae_lens.training.sae_trainer import SAETrainer

    site = HookSite(settings.sae_layer, "resid_post")
    torch.manual_seed(seed)
    rows = _language_model_rows(world, tokenizer, settings, seed=10_000 + seed)
    sae = BatchTopKTrainingSAE(
        BatchTopKTrainingSAEConfig(
            d_in=settings.hidden_size,
            d_sae=settings.sae_features,
            k=settings.sae_k,
            dtype="float32",
            device="cpu",
            apply_b_dec_to_input=True,
            metadata=SAEMetadata(
                model_name="dsg-lab",
                hook_name=site.name,
                hf_hook_name=f"model.layers.{site.layer}.output",
                prepend_bos=True,
                context_size=settings.seq_len,
            ),
        )
    )
    trainer = SAETrainer(
        cfg=SAETrainerConfig(
            total_training_samples=settings.sae_tokens,
            train_batch_size_samples=settings.sae_batch,
            lr=settings.sae_learning_rate,
            lr_end=settings.sae_learning_rate / 10,
            lr_decay_steps=settings.sae_tokens // settings.sae_batch // 4,
            dead_feature_window=50,
            feature_sampling_window=100,
            n_batches_for_norm_estimate=10,
            logger=LoggingConfig(log_to_wandb=False),
        ),
        sae=sae,
        data_provider=_residual_batches(model, tokenizer, site, rows, settings, report),
    )
    trainer.fit()
    sae.save_inference_model(folder)
    return measure_sae(SAE.load_from_disk(folder), model, tokenizer, site, next(rows))


def _language_model_rows(
    world: World, tokenizer: PreTrainedTokenizerFast, settings: LabSettings, seed: int
) -> Iterator[Tensor]:
    return training_rows(world, tokenizer, seed, n_rows=2 * settings.rows, seq_len=settings.seq_len)


def _residual_batches(
    model: Gemma2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    site: HookSite,
    rows: Iterator[Tensor],
    settings: LabSettings,
    report: Report,
) -> Iterator[Tensor]:
    """Shuffled batches [sae_batch, D] of the residuals of counted tokens."""
    generator = torch.Generator().manual_seed(0)
    buffer, n_seen = torch.empty(0, settings.hidden_size), 0
    while True:
        while len(buffer) < 16 * settings.sae_batch:
            with torch.inference_mode():
                buffer = torch.cat([buffer, counted_residuals(model, tokenizer, site, next(rows))])
        buffer = buffer[torch.randperm(len(buffer), generator=generator)]
        while len(buffer) > 8 * settings.sae_batch:
            batch, buffer = buffer[: settings.sae_batch].clone(), buffer[settings.sae_batch :]
            n_seen += len(batch)
            report("sparse autoencoder, tokens", min(n_seen, settings.sae_tokens), settings.sae_tokens)
            yield batch


def counted_residuals(
    model: Gemma2ForCausalLM, tokenizer: PreTrainedTokenizerFast, site: HookSite, ids_BL: Tensor
) -> Tensor:
    """Residuals [tokens, D] without BOS and EOS, whose norms would drown the rest."""
    resid_BLD = read_residual(model, site, ids_BL, torch.ones_like(ids_BL))
    special = torch.tensor([tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id])
    return resid_BLD[~torch.isin(ids_BL, special)]


@torch.inference_mode()
def measure_sae(
    sae: Any, model: Gemma2ForCausalLM, tokenizer: PreTrainedTokenizerFast, site: HookSite, ids_BL: Tensor
) -> dict[str, float]:
    """Variance explained, L0, dead features, and cross-entropy with and without the reconstruction."""
    resid_TD = counted_residuals(model, tokenizer, site, ids_BL)
    acts_TF = sae.encode(resid_TD)
    error = (resid_TD - sae.decode(acts_TF)).pow(2).sum()
    variance = (resid_TD - resid_TD.mean(0)).pow(2).sum()
    special = torch.tensor([tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id])

    def reconstruct(resid_BLD: Tensor) -> Tensor:
        return torch.where(torch.isin(ids_BL, special)[..., None], resid_BLD, sae.decode(sae.encode(resid_BLD)))

    with replace_residual(model, site, reconstruct):
        patched = _cross_entropy(model, ids_BL)
    return {
        "variance_explained": round(1 - (error / variance).item(), 4),
        "l0": round((acts_TF > 0).sum(-1).float().mean().item(), 2),
        "dead": round((acts_TF > 0).any(0).logical_not().float().mean().item(), 4),
        "cross_entropy": round(_cross_entropy(model, ids_BL), 4),
        "cross_entropy_with_sae": round(patched, 4),
    }


def _cross_entropy(model: Gemma2ForCausalLM, ids_BL: Tensor) -> float:
    logits_BLV = model(input_ids=ids_BL, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits_BLV.flatten(0, 1), ids_BL[:, 1:].flatten()).item()
