"""Peak memory of the statistics pass over corpora of two lengths, each in a process of its own."""

from __future__ import annotations

import subprocess
import sys

SHORT, LONG, WIDTH, N_FEATURES, ROW = 50_000, 1_000_000, 64, 4096, 250


def rows() -> list[tuple[str, str, str]]:
    """What was measured, what it gave, and the target."""
    short, long = (
        float(subprocess.run([sys.executable, __file__, str(n)], check=True, stdout=subprocess.PIPE).stdout)
        for n in (SHORT, LONG)
    )
    what = f"statistics pass, memory beyond the model: {SHORT:,} tokens {short:.0f} MB, {LONG:,} tokens {long:.0f} MB"
    return [(what, f"{long / short:.2f}", "independent")]


def measure(n_tokens: int) -> float:
    """Megabytes that the pass adds at its peak."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from dsg_cli.data.batches import TokenBatch
    from dsg_cli.guardrail.runtime.sites import HookSite
    from dsg_cli.guardrail.statistics import feature_statistics
    from dsg_cli.workspace.provenance import peak_memory_mb

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000, hidden_size=WIDTH, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2
    )
    model, W_enc = LlamaForCausalLM(config).eval(), torch.randn(WIDTH, N_FEATURES) / WIDTH**0.5
    before = peak_memory_mb()
    batches = (
        TokenBatch(torch.randint(3, 1000, (8, ROW)), torch.ones(8, ROW, dtype=torch.bool), (0, 1, 2), tuple(range(8)))
        for _ in range(n_tokens // (8 * ROW))
    )
    site = HookSite(0, "resid_post")
    feature_statistics(model, site, lambda resid_TD: (resid_TD @ W_enc).relu(), batches, total_tokens=n_tokens)
    return peak_memory_mb() - before


if __name__ == "__main__":
    sys.stdout.write(str(measure(int(sys.argv[1]))))
