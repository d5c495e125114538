"""What scoring questions costs: logits where a choice is scored, against logits everywhere."""

from __future__ import annotations

import random
import statistics
import time
import types

import torch
from torch import Tensor, nn
from transformers import Gemma2Config, Gemma2ForCausalLM

from dsg_cli.data.batches import TokenBatch
from dsg_cli.data.tokens import Request
from dsg_cli.inference import scoring
from dsg_cli.inference.scoring import GuardedModel

N_ROUNDS = 5
VOCABULARY = 256_000
"""Of Gemma 2."""


def rows() -> list[tuple[str, str, str]]:
    """Rows of the table."""
    torch.set_num_threads(2)
    what = "scoring 32 questions of 80 to 120 tokens, 256k vocabulary, 4 layers of width 256"
    return [(f"{what}: logits where a choice is scored, time against all logits", f"{positions_ratio():.2f}", "")]


def positions_ratio() -> float:
    """Median time with `logits_to_keep` over median time without, alternating, same model and questions."""
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64,
    )  # fmt: skip
    model = Gemma2ForCausalLM(config).eval().requires_grad_(False)
    tokenizer = types.SimpleNamespace(bos_token_id=None, eos_token_id=None, pad_token_id=0)
    asked = GuardedModel(model, tokenizer, max_length=1024)
    rng = random.Random(0)
    requests = [
        Request(tuple(rng.randrange(10, VOCABULARY) for _ in range(rng.randint(80, 120))), (letter,))
        for _ in range(32)
        for letter in (11, 12, 13, 14)
    ]
    sparse = scoring._logits
    times: dict[bool, list[float]] = {True: [], False: []}
    found = {}
    for _ in range(N_ROUNDS):
        for is_sparse in times:
            scoring._logits = sparse if is_sparse else all_logits
            start = time.perf_counter()
            found[is_sparse] = asked.loglikelihoods(requests)
            times[is_sparse].append(time.perf_counter() - start)
    scoring._logits = sparse
    differences = [abs(a.loglikelihood - b.loglikelihood) for a, b in zip(found[True], found[False], strict=True)]
    assert max(differences) < 1e-3
    return statistics.median(times[True]) / statistics.median(times[False])


def all_logits(model: nn.Module, batch: TokenBatch, positions_P: Tensor) -> Tensor:
    """Computed everywhere, and picked afterwards."""
    out = model(input_ids=batch.ids_BL, attention_mask=batch.mask_BL.long(), use_cache=False)
    return out.logits[:, positions_P]


if __name__ == "__main__":
    for row in rows():
        print("|", " | ".join(row), "|")  # noqa: T201
