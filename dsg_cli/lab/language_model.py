"""The lab's language model: a four-layer Gemma 2 of 0.9 million parameters that memorises the world."""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedTokenizerFast

from dsg_cli.lab import world as lab_world
from dsg_cli.lab.data import BENCHES, PHRASINGS
from dsg_cli.lab.settings import LabSettings
from dsg_cli.lab.words import DOMAINS_OF
from dsg_cli.lab.world import World
from dsg_cli.progress import Report

SPECIAL_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>")


def build_tokenizer(world: World) -> PreTrainedTokenizerFast:
    """One token a word or punctuation mark; `<bos>` in front, as Gemma has it; decoding is exact."""
    tokens = [*SPECIAL_TOKENS, ".", ",", ":", "?", *(f"▁{word}" for word in lab_world.vocabulary(world))]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Punctuation("isolated"), pre_tokenizers.Metaspace(prepend_scheme="first")]
    )
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", vocab["<bos>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def training_rows(
    world: World,
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    *,
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


def train_language_model(
    world: World,
    tokenizer: PreTrainedTokenizerFast,
    settings: LabSettings,
    *,
    seed: int,
    report: Report,
    without: Collection[str] = (),
) -> tuple[Gemma2ForCausalLM, float]:
    """Train from scratch on fresh rows at every step; returns the model and the mean loss of the last 50 steps.

    The model never sees the domains in `without`, but has the tokens of their words.
    """
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
    rows = partial(training_rows, world, tokenizer, without=without)
    short = rows(2 * seed + 1, n_rows=settings.rows, seq_len=settings.seq_len)
    long = rows(2 * seed + 2, n_rows=settings.long_rows, seq_len=settings.long_seq_len)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    warm_up = 30
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warm_up, 0.5 * (1 + math.cos(math.pi * step / settings.n_steps))),
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
        report(f"language model, loss {losses[-1]:.3f}, steps", step + 1, settings.n_steps)
    return model.eval(), sum(losses[-50:]) / len(losses[-50:])


@torch.inference_mode()
def bench_accuracies(model: Gemma2ForCausalLM, tokenizer: PreTrainedTokenizerFast, world: World) -> dict[str, float]:
    """Accuracy on the test questions of each bench; the choices are single tokens, so one forward pass each."""
    accuracies = {}
    for bench in BENCHES:
        for phrasing in PHRASINGS:
            asked = [q for q in lab_world.questions(world, DOMAINS_OF[bench], phrasing) if q.split == "test"]
            batch = tokenizer([q.context for q in asked], return_tensors="pt", padding=True, padding_side="right")
            logits_BLV = model(**batch).logits
            last_BV = logits_BLV[torch.arange(len(asked)), batch["attention_mask"].sum(-1) - 1]
            choices_BC = torch.tensor(
                [[tokenizer(choice, add_special_tokens=False)["input_ids"][0] for choice in q.choices] for q in asked]
            )
            right = last_BV.gather(1, choices_BC).argmax(-1) == torch.tensor([q.answer for q in asked])
            accuracies[bench if phrasing == "seen" else f"{bench}-{phrasing}"] = right.float().mean().item()
    return accuracies
