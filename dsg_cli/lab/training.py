"""Train the lab from a seed: texts, tokenizer, language model and SAEs, written in plain formats.

Or a language model alone that some domains are kept from, or SAEs alone, at other layers of the shipped model.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedTokenizerFast

from dsg_cli.guardrail.runtime.sites import HookSite
from dsg_cli.job import Report, silent
from dsg_cli.lab import world as lab_world
from dsg_cli.lab.data import BENCHES, CORPORA, PHRASINGS, SHIPPED, LabSettings, bench_name
from dsg_cli.lab.world import DOMAINS_OF, World
from dsg_cli.models.residuals import read_residual, replace_residual

SPECIAL_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>")


@dataclass(frozen=True)
class _Lab:
    """What all training shares."""

    world: World
    tokenizer: PreTrainedTokenizerFast
    settings: LabSettings
    report: Report


def _lab(settings: LabSettings | None, report: Report) -> _Lab:
    world = lab_world.build_world()
    return _Lab(world, build_tokenizer(world), settings or LabSettings(), report)


def build_tokenizer(world: World) -> PreTrainedTokenizerFast:
    """One token a word or punctuation mark; `<bos>` in front, as Gemma has it; decoding is exact."""
    tokens = [*SPECIAL_TOKENS, ".", ",", ":", "?", *(f"▁{word}" for word in lab_world.vocabulary(world))]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Punctuation("isolated"), pre_tokenizers.Metaspace(prepend_scheme="first")]
    )
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    template = {"single": "<bos> $A", "special_tokens": [("<bos>", vocab["<bos>"])]}
    tokenizer.post_processor = processors.TemplateProcessing(**template)
    special = {f"{token.strip('<>')}_token": token for token in SPECIAL_TOKENS}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=1024, clean_up_tokenization_spaces=False, **special
    )


def training_rows(
    world: World,
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    n_rows: int,
    seq_len: int,
    without: Collection[str] = (),
) -> Iterator[Tensor]:
    """Endless batches ids [n_rows, seq_len]: `<bos> document <eos>` one after another, each row starting a new one.

    The documents tell nothing of the domains in `without`.
    """
    rng = random.Random(seed)
    eos = tokenizer.eos_token_id
    while True:
        rows = []
        for _ in range(n_rows):
            row: list[int] = []
            while len(row) < seq_len:
                text = lab_world.training_document(world, rng, max_words=int(0.85 * seq_len), without=without)
                row += [*tokenizer(text)["input_ids"], eos]
            rows.append(row[:seq_len])
        yield torch.tensor(rows)


def _train_language_model(lab: _Lab, *, seed: int, without: Collection[str]) -> tuple[Gemma2ForCausalLM, float]:
    """Train from scratch on fresh rows at every step; returns the model and the mean loss of the last 50 steps.

    The model never sees the domains in `without`, but has the tokens of their words.
    """
    tokenizer, settings = lab.tokenizer, lab.settings
    torch.manual_seed(seed)
    model = Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=len(tokenizer),
            hidden_size=settings.hidden_size,
            intermediate_size=3 * settings.hidden_size,
            num_hidden_layers=settings.n_layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=settings.hidden_size // 4,
            query_pre_attn_scalar=settings.hidden_size // 4,
            max_position_embeddings=1024,
            sliding_window=1024,
            attn_logit_softcapping=None,  # Costs half of the time of long rows and changes nothing at this size.
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=tokenizer.bos_token_id,
            attn_implementation="eager",
        )
    )
    model.train()
    rows = partial(training_rows, lab.world, tokenizer, without=without)
    short = rows(2 * seed + 1, n_rows=settings.rows, seq_len=settings.seq_len)
    long = rows(2 * seed + 2, n_rows=settings.long_rows, seq_len=settings.long_seq_len)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(  # 30 steps up, then down along a cosine.
        optimizer, lambda step: min((step + 1) / 30, 0.5 * (1 + math.cos(math.pi * step / settings.n_steps)))
    )
    losses: list[float] = []
    for step in range(settings.n_steps):
        ids_BL = next(long if step % settings.long_every == 0 else short)
        logits_BLV = model(input_ids=ids_BL, use_cache=False).logits[:, :-1]
        loss = F.cross_entropy(logits_BLV.flatten(0, 1), ids_BL[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        lab.report(f"language model, loss {losses[-1]:.3f}, steps", step + 1, settings.n_steps)
    return model.eval(), sum(losses[-50:]) / len(losses[-50:])


@torch.inference_mode()
def bench_accuracies(model: Gemma2ForCausalLM, tokenizer: PreTrainedTokenizerFast, world: World) -> dict[str, float]:
    """Accuracy on the test questions of each bench; the choices are single tokens, so one forward pass each."""
    accuracies = {}
    for bench in BENCHES:
        for phrasing in PHRASINGS:
            questions = [q for q in lab_world.questions(world, DOMAINS_OF[bench], phrasing) if q.split == "test"]
            batch = tokenizer([q.context for q in questions], return_tensors="pt", padding=True, padding_side="right")
            logits_BLV = model(**batch).logits
            last_BV = logits_BLV[torch.arange(len(questions)), batch["attention_mask"].sum(-1) - 1]
            words = [tokenizer(list(q.choices), add_special_tokens=False)["input_ids"] for q in questions]
            choices_BC = torch.tensor(words)[..., 0]
            is_correct = last_BV.gather(1, choices_BC).argmax(-1) == torch.tensor([q.answer for q in questions])
            accuracies[bench_name(bench, phrasing)] = is_correct.float().mean().item()
    return accuracies


def _train_sae(lab: _Lab, model: Gemma2ForCausalLM, folder: Path, *, seed: int) -> dict[str, Any]:
    """Train one SAE with sae-lens's trainer, save it for inference in `folder`, and measure it on fresh text."""
    from sae_lens import SAE, BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.saes.sae import SAEMetadata
    from sae_lens.training.sae_trainer import SAETrainer

    start, settings = time.monotonic(), lab.settings
    site = HookSite(settings.sae_layer, "resid_post")
    torch.manual_seed(seed)
    shape: dict[str, Any] = {"n_rows": 2 * settings.rows, "seq_len": settings.seq_len}
    rows = training_rows(lab.world, lab.tokenizer, 10_000 + seed, **shape)
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
        data_provider=_residual_batches(lab, model, site, rows),
    )
    trainer.fit()
    sae.save_inference_model(folder)
    quality = measure_sae(SAE.load_from_disk(folder), model, lab.tokenizer, site, next(rows))
    return {"name": folder.name, **quality, "seconds": round(time.monotonic() - start, 1)}


def _residual_batches(lab: _Lab, model: Gemma2ForCausalLM, site: HookSite, rows: Iterator[Tensor]) -> Iterator[Tensor]:
    """Shuffled batches [sae_batch, D] of the residuals of counted tokens."""
    settings, generator = lab.settings, torch.Generator().manual_seed(0)
    buffer, n_seen = torch.empty(0, settings.hidden_size), 0
    while True:
        while len(buffer) < 16 * settings.sae_batch:
            with torch.inference_mode():
                buffer = torch.cat([buffer, _counted_residuals(model, lab.tokenizer, site, next(rows))])
        buffer = buffer[torch.randperm(len(buffer), generator=generator)]
        while len(buffer) > 8 * settings.sae_batch:
            batch, buffer = buffer[: settings.sae_batch].clone(), buffer[settings.sae_batch :]
            n_seen += len(batch)
            lab.report("sparse autoencoder, tokens", min(n_seen, settings.sae_tokens), settings.sae_tokens)
            yield batch


def _counted_residuals(
    model: Gemma2ForCausalLM, tokenizer: PreTrainedTokenizerFast, site: HookSite, ids_BL: Tensor
) -> Tensor:
    """Residuals [tokens, D] without BOS and EOS, whose norms would drown the rest."""
    return read_residual(model, site, ids_BL, torch.ones_like(ids_BL))[~_is_special(tokenizer, ids_BL)]


def _is_special(tokenizer: PreTrainedTokenizerFast, ids_BL: Tensor) -> Tensor:
    return torch.isin(ids_BL, torch.tensor([tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]))


@torch.inference_mode()
def measure_sae(
    sae: Any, model: Gemma2ForCausalLM, tokenizer: PreTrainedTokenizerFast, site: HookSite, ids_BL: Tensor
) -> dict[str, float]:
    """Variance explained, L0, dead features, and cross-entropy with and without the reconstruction."""
    resid_TD = _counted_residuals(model, tokenizer, site, ids_BL)
    acts_TF = sae.encode(resid_TD)
    error = (resid_TD - sae.decode(acts_TF)).pow(2).sum()
    variance = (resid_TD - resid_TD.mean(0)).pow(2).sum()
    special_BL1 = _is_special(tokenizer, ids_BL)[..., None]

    def reconstruct(resid_BLD: Tensor) -> Tensor:
        return torch.where(special_BL1, resid_BLD, sae.decode(sae.encode(resid_BLD)))

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


def train_lab(
    folder: Path, *, seed: int = 0, settings: LabSettings | None = None, report: Report = silent
) -> dict[str, Any]:
    """Build the whole lab in `folder` (which must not exist).

    Returns seconds, final loss, accuracy of each bench on its test questions, and what `measure_sae` says of each SAE.
    """
    start, lab = time.monotonic(), _lab(settings, report)
    write_texts(lab.world, folder, lab.settings)
    model, measured = _train_and_save(lab, folder / "model", seed=seed)
    folders = [folder / (f"sae-{i}" if i else "sae") for i in range(lab.settings.n_saes)]
    measured["saes"] = [_train_sae(lab, model, path, seed=1000 * seed + i) for i, path in enumerate(folders)]
    return _noted(measured, folder, start)


def train_saes(
    folder: Path, *, layers: Sequence[int], seed: int = 0, settings: LabSettings | None = None, report: Report = silent
) -> dict[str, Any]:
    """Train an SAE at each of `layers` of the shipped model, as those that are shipped were at theirs.

    They are written to `layer-<L>` in `folder`, which must not exist, in sae-lens's format. Returns seconds, and what
    `measure_sae` says of each.
    """
    start, lab = time.monotonic(), _lab(settings, report)
    model = Gemma2ForCausalLM.from_pretrained(SHIPPED / "model", dtype=torch.float32).eval()
    folder.mkdir()
    saes = []
    for layer in layers:
        of_layer = replace(lab, settings=replace(lab.settings, sae_layer=layer))
        saes.append(_train_sae(of_layer, model, folder / f"layer-{layer}", seed=1000 * seed))
    return _noted({"seed": seed, "settings": asdict(lab.settings), "saes": saes}, folder, start)


def train_reference(
    folder: Path, *, without: Sequence[str], seed: int = 0, settings: LabSettings | None = None, report: Report = silent
) -> dict[str, Any]:
    """Train a language model that never sees the domains in `without`: what an unlearned one is compared with.

    Tokenizer, vocabulary and settings are those of the lab's model; there are no SAEs. `folder` (which must not
    exist) becomes a model folder. Returns seconds, final loss, and accuracy of each bench on its test questions, those
    of `without` too.
    """
    start = time.monotonic()
    _, measured = _train_and_save(_lab(settings, report), folder, seed=seed, without=without)
    return _noted(measured, folder, start)


def _train_and_save(
    lab: _Lab, folder: Path, *, seed: int, without: Sequence[str] = ()
) -> tuple[Gemma2ForCausalLM, dict[str, Any]]:
    """Train the language model, write it to `folder`, and measure what was written."""
    start = time.monotonic()
    model, loss = _train_language_model(lab, seed=seed, without=without)
    seconds = time.monotonic() - start
    model.to(torch.bfloat16).save_pretrained(folder)
    lab.tokenizer.save_pretrained(folder)
    model = model.to(torch.float32)  # The weights as shipped: what bfloat16 cannot hold is gone.
    accuracy = bench_accuracies(model, lab.tokenizer, lab.world)
    return model, {
        "seed": seed,
        **({"without": sorted(without)} if without else {}),
        "settings": asdict(lab.settings),
        "loss": loss,
        "accuracy": {name: round(value, 4) for name, value in accuracy.items()},
        "lm_seconds": round(seconds, 1),
    }


def _noted(measured: dict[str, Any], folder: Path, start: float) -> dict[str, Any]:
    """Add the seconds since `start`, and write what was measured to `training.json`."""
    measured["seconds"] = round(time.monotonic() - start, 1)
    (folder / "training.json").write_text(json.dumps(measured, indent=1) + "\n")
    return measured


def write_texts(world: World, folder: Path, settings: LabSettings) -> None:
    """Write `corpora/<name>.jsonl` and `questions/<bench>.jsonl`."""
    for kind in ("corpora", "questions"):
        (folder / kind).mkdir(parents=True)
    for i, name in enumerate(CORPORA):
        domains = DOMAINS_OF[name]
        texts = lab_world.corpus(world, domains, seed=i, n_documents=settings.documents_per_domain * len(domains))
        _write_jsonl(folder / "corpora" / f"{name}.jsonl", ({"text": text} for text in texts))
    for bench in BENCHES:
        for phrasing in PHRASINGS:
            questions = map(asdict, lab_world.questions(world, DOMAINS_OF[bench], phrasing))
            rows = ({key: row[key] for key in ("id", "split", "context", "choices", "answer")} for row in questions)
            _write_jsonl(folder / "questions" / f"{bench_name(bench, phrasing)}.jsonl", rows)


def _write_jsonl(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
