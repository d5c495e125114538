"""Residuals of layer 3 of a 26-layer model: only layers 0..3 loaded and run, against the whole model."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time

from dsg_cli.cli.output import quiet_libraries

N_LAYERS, LAYER, VOCABULARY, SHAPE = 26, 3, 1000, (8, 256)


def rows() -> list[tuple[str, str, str]]:
    """What was compared, what it gave, and the target."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, __file__, "make", folder], check=True)
        runs = [[sys.executable, __file__, how, folder] for how in ("cut", "whole")]
        cut, whole = (json.loads(subprocess.run(run, check=True, stdout=subprocess.PIPE).stdout) for run in runs)
    assert cut["sum"] == whole["sum"], "the residuals differ"
    what = f"select, layers 0..{LAYER} of {N_LAYERS}: {whole['seconds']:.2f} s whole, {cut['seconds']:.2f} s cut"
    memory = f"the same: memory {whole['mb']:.0f} MB and {cut['mb']:.0f} MB, libraries apart"
    return [
        (what, f"{whole['seconds'] / cut['seconds']:.1f}x", ">= 5x"),
        (memory, f"{cut['mb'] / whole['mb']:.2f}", "<= 0.33"),
    ]


def make(folder: str) -> None:
    """A random model with a word-level tokenizer."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedTokenizerFast

    config = Gemma2Config(
        vocab_size=VOCABULARY, hidden_size=768, intermediate_size=3072, num_hidden_layers=N_LAYERS,
        num_attention_heads=4, num_key_value_heads=2, head_dim=192, pad_token_id=0, eos_token_id=1, bos_token_id=2,
    )  # fmt: skip
    Gemma2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({str(i): i for i in range(VOCABULARY)}, unk_token="3"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="3").save_pretrained(folder)


def measure(how: str, folder: str) -> dict[str, float]:
    """Load, run one batch twice; memory, seconds and a checksum."""
    import torch

    from dsg_cli.guardrail.runtime.sites import HookSite
    from dsg_cli.models.language_model import load_model
    from dsg_cli.models.residuals import read_residual, replace_residual
    from dsg_cli.workspace.provenance import peak_memory_mb

    torch.set_num_threads(2)
    libraries = peak_memory_mb()
    loaded = load_model(folder, last_layer=LAYER if how == "cut" else None)
    ids_BL = torch.randint(3, VOCABULARY, SHAPE, generator=torch.Generator().manual_seed(0))
    mask_BL, site = torch.ones_like(ids_BL), HookSite(LAYER, "resid_post")
    seconds = float("inf")
    with torch.inference_mode():
        for _ in range(3):
            start = time.perf_counter()
            if how == "cut":
                resid_BLD = read_residual(loaded.model, site, ids_BL, mask_BL)
            else:
                found: list[torch.Tensor] = []
                with replace_residual(loaded.model, site, lambda resid, found=found: found.append(resid) or resid):
                    loaded.model(input_ids=ids_BL, attention_mask=mask_BL, use_cache=False)
                resid_BLD = found[0]
            seconds = min(seconds, time.perf_counter() - start)
    peak = peak_memory_mb()
    return {"mb": peak - libraries, "seconds": seconds, "sum": float(resid_BLD.double().sum())}


if __name__ == "__main__":
    quiet_libraries()
    if sys.argv[1] == "make":
        make(sys.argv[2])
    else:
        sys.stdout.write(json.dumps(measure(*sys.argv[1:])))
