"""The guardrail against the whole SAE in a hook, and against the layer it sits on.

The shapes are Gemma-2-2b's with a 16k SAE (2304 x 16384, 20 features, 256 tokens), weights are random, 2 threads.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from transformers import Gemma2Config
from transformers.models.gemma2.modeling_gemma2 import Gemma2DecoderLayer, Gemma2RotaryEmbedding

from dsg_cli.guardrail.runtime.guardrail import build_guardrail
from dsg_cli.guardrail.runtime.slice import SliceSpec
from dsg_cli.guardrail.runtime.spec import GuardrailSpec

WIDTH, N_FEATURES, N_CHOSEN, N_TOKENS, STRENGTH = 2304, 16384, 20, 256, 500.0


DETECTORS = {"mean": 0, "window": 5, "cusum": 5, "probe": 8}
"""Gate -> features that it watches beyond those that are clamped, by default."""


def best_of(run: Callable[[], Any], n: int) -> float:
    """Seconds of the fastest of n runs after one to warm up."""
    run()
    times = []
    for _ in range(n):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


@torch.inference_mode()
def rows() -> list[tuple[str, str, str]]:
    """What was compared, what it gave, and the target."""
    torch.manual_seed(0)
    torch.set_num_threads(2)
    W_enc = torch.randn(WIDTH, N_FEATURES) / WIDTH**0.5
    W_dec = torch.nn.functional.normalize(torch.randn(N_FEATURES, WIDTH), dim=-1)
    b_enc, b_dec, above = torch.zeros(N_FEATURES), torch.randn(WIDTH) * 0.1, torch.full((N_FEATURES,), 1.0)
    resid = torch.randn(1, N_TOKENS, WIDTH)
    counted = torch.ones(1, N_TOKENS, dtype=torch.bool)
    index = torch.arange(N_CHOSEN) * 700

    def full() -> torch.Tensor:
        """encode, decode, decode again with the chosen features clamped, as published code does it."""
        pre = (resid - b_dec) @ W_enc + b_enc
        acts = torch.where(pre > above, pre, 0.0)
        error = resid - (acts @ W_dec + b_dec)
        hot = (acts[..., index] > 0).any(-1)
        clamped = acts.clone()
        clamped[..., index] = -STRENGTH
        edited = clamped @ W_dec + b_dec + error
        is_gated = hot.float().mean(-1) > 0.2
        return torch.where((hot & is_gated[:, None])[..., None], edited, resid)

    times = {"the whole SAE in the hook": best_of(full, 3)}
    for form, n_detectors in DETECTORS.items():
        columns = torch.cat([index, torch.arange(n_detectors) * 900 + 1])
        tensors = {
            "W_enc": W_enc[:, columns],
            "b_enc": b_enc[columns] - b_dec @ W_enc[:, columns],
            "active_above": above[columns],
            "W_dec": W_dec[index],
            "detect": torch.cat([torch.zeros(N_CHOSEN), torch.ones(n_detectors)]),
        }
        site = "blocks.3.hook_resid_post"
        spec = GuardrailSpec(
            form, 0.2, 4, STRENGTH, site, site, asdict(SliceSpec("threshold")), [0, 1, 2], {}, -0.6, 8.0
        )
        guard = build_guardrail(spec, tensors, where="benchmark")
        if form == "mean":
            wanted, found = full(), guard(resid, counted)
            error = float((found - wanted).norm() / (wanted - resid).norm())
        times[f"the guardrail, gate {form}"] = best_of(lambda guard=guard: guard(resid, counted), 50)

    config = Gemma2Config(
        hidden_size=WIDTH, intermediate_size=9216, num_attention_heads=8, num_key_value_heads=4, head_dim=256,
        num_hidden_layers=1, vocab_size=8, attn_implementation="eager",
    )  # fmt: skip
    layer = Gemma2DecoderLayer(config, 0).eval()
    positions = torch.arange(N_TOKENS)[None]
    rotary = Gemma2RotaryEmbedding(config)(resid, positions)
    mask = torch.full((1, 1, N_TOKENS, N_TOKENS), torch.finfo(torch.float32).min).triu(1)
    options = {"attention_mask": mask, "position_embeddings": rotary, "position_ids": positions}
    times["the decoder layer it sits on"] = best_of(lambda: layer(resid, **options), 5)

    whole, block = times["the whole SAE in the hook"], times["the decoder layer it sits on"]
    ratios = []
    for form in DETECTORS:
        own = times[f"the guardrail, gate {form}"]
        what = f"hook, gate {form}: whole SAE {1000 * whole:.0f} ms, guardrail {1000 * own:.2f} ms"
        share = f"hook, gate {form}: share of its layer's {1000 * block:.0f} ms"
        ratios += [(what, f"{whole / own:.0f}x", ">= 500x"), (share, f"{100 * own / block:.2f} %", "<= 0.5 %")]
    return [*ratios, ("hook: its change against the whole SAE's", f"{error:.0e} of its norm", "<= 1e-3")]
