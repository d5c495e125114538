"""The pass of select shared by two processes against one, each with one thread; start-up apart."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

from dsg_cli.cli.output import quiet_libraries

WIDTH, N_FEATURES, LAYERS, TEXTS = 512, 8192, 4, 512


def rows() -> list[tuple[str, str, str]]:
    """What was compared, what it gave, and the target."""
    one, two = (_measured(n) for n in (1, 2))
    speed = one["seconds"] / two["seconds"]
    return [
        (
            f"select, {one['n_tokens']:,} tokens: {one['seconds']:.1f} s in one process, {two['seconds']:.1f} s in two",
            f"{speed:.2f}x",
            "2x",
        ),
        ("the same: bytes that a process sends for a corpus", f"{one['bytes']:,}", ""),
    ]


def _measured(n: int) -> dict[str, float]:
    run = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n)] if n > 1 else []
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *run, __file__, "measure"], check=True, stdout=subprocess.PIPE, env=environment
    )
    return json.loads(done.stdout)


def measure() -> dict[str, float]:
    """One pass over random documents by this process and its peers."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedTokenizerFast

    from dsg_cli.data.batches import stream_batches
    from dsg_cli.guardrail.runtime.sites import HookSite
    from dsg_cli.guardrail.statistics import feature_statistics
    from dsg_cli.job import Job, joined

    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = Gemma2Config(
        vocab_size=1000, hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=2, head_dim=128, pad_token_id=0, eos_token_id=1, bos_token_id=2,
    )  # fmt: skip
    model = Gemma2ForCausalLM(config).eval()
    words = Tokenizer(models.WordLevel({str(i): i for i in range(1000)}, unk_token="3"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="3", pad_token="0")
    weights_DF = torch.randn(WIDTH, N_FEATURES) / WIDTH**0.5
    generator = torch.Generator().manual_seed(1)
    texts = [" ".join(map(str, torch.randint(4, 1000, (128,), generator=generator).tolist())) for _ in range(TEXTS)]
    with joined() as workers:
        workers.gathered(None)
        start = time.perf_counter()
        found = feature_statistics(
            model,
            HookSite(LAYERS - 1, "resid_post"),
            lambda resid_TD: torch.relu(resid_TD @ weights_DF - 1),
            stream_batches(tokenizer, texts, bos=None, seq_len=1024),
            total_tokens=128 * TEXTS,
            job=Job(workers),
        )
        seconds = time.perf_counter() - start
        measured = {"seconds": seconds, "n_tokens": found.n_tokens, "bytes": 3 * 8 * N_FEATURES + 20 * len(found.norms)}
        return measured if workers.is_first else {}


if __name__ == "__main__":
    quiet_libraries()
    if found := measure():
        sys.stdout.write(json.dumps(found))
