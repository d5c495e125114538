"""In-memory fakes: a two-layer random model, a random SAE and a word-level tokenizer, also as folders."""

from __future__ import annotations

import gc
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # A process a core: threads of several would wait for each other.
# Memory of large tensors is kept and used again; to ask the system for it each time is a tenth of all time.
# For workers and commands, which are started after this; glibc reads it when a process begins.
os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(2**30))
os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(2**32))
CODE_CACHE = tempfile.TemporaryDirectory(prefix="dsg-tests-")
os.environ["HF_MODULES_CACHE"] = CODE_CACHE.name  # Code of exported models stays out of the user's cache.

from dsg_cli.cli.output import quiet_libraries

quiet_libraries()  # As main() does, before any library reads its environment.

import pytest
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dsg_cli.errors import DsgError

SMALL_LAB = ("--recipe", "lab", "--set", "corpora.limit=80")
"""For whole commands: the lab's recipe on a third of its text, where what is found is not what is tested."""
WIDTH, N_FEATURES, N_WORDS, LAYER = 16, 48, 60, 1
BIAS = 8.0


def pytest_collection_finish():
    """What has been imported by now lives to the end; the garbage collector need not look through it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def one_thread():
    """For models so small that threads only wait for each other, for minutes if another process has a core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@contextmanager
def watched(model):
    """The keyword arguments of each call of a model while the block runs."""
    calls = []
    handle = model.register_forward_pre_hook(lambda _module, _args, kwargs: calls.append(kwargs), with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    vocab = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3} | {f"w{i}": i + 4 for i in range(N_WORDS)}
    fast = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=fast, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
    )


@pytest.fixture(scope="session")
def model(tokenizer) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=1,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def make_sae(folder: Path, architecture: str = "jumprelu", *, hook=None, seed=0, bias=BIAS, **settings):
    """A random SAE, saved by sae-lens in its own format; returns the loaded SAE."""
    from sae_lens import SAE
    from sae_lens.registry import get_sae_class
    from sae_lens.saes.sae import SAEMetadata

    torch.manual_seed(seed)
    sae_class, config_class = get_sae_class(architecture)
    metadata = SAEMetadata(hook_name=hook or f"blocks.{LAYER}.hook_resid_post", prepend_bos=True)
    values = {"d_in": WIDTH, "d_sae": N_FEATURES, "dtype": "float32", "device": "cpu"} | settings
    sae = sae_class(config_class(**values, metadata=metadata))
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            parameter.copy_(torch.rand_like(parameter) * 0.5 if name == "threshold" else torch.randn_like(parameter))
            if name == "b_enc":
                parameter.sub_(bias)  # Sparse: a feature is active on a minority of tokens.
    sae.save_model(folder)
    return SAE.load_from_disk(folder)


def make_guardrail(
    sae,
    indices,
    *,
    threshold,
    strength,
    special=(0, 1, 2),
    gate="mean",
    window=4,
    detectors=(),
    weights=(),
    bias=0.0,
    clip=0.0,
    model=None,
    **clamping,
):
    """A guardrail from an SAE that has been read; `model` is the identity it is made for, the rest how it clamps."""
    from dataclasses import asdict

    from dsg_cli.guardrail.runtime.guardrail import build_guardrail
    from dsg_cli.guardrail.runtime.spec import GuardrailSpec
    from dsg_cli.models.sae_slice import slice_sae

    slice_spec, tensors = slice_sae(sae, indices, detectors, weights)
    spec = GuardrailSpec(
        gate=gate,
        threshold=threshold,
        window=window,
        strength=strength,
        read=sae.site.name,
        write=sae.write.name,
        slice=asdict(slice_spec),
        special_ids=list(special),
        model=model or {},
        bias=bias,
        clip=clip,
        **clamping,
    )
    return build_guardrail(spec, tensors, where="test")


@pytest.fixture(scope="session")
def folders(tmp_path_factory, model, tokenizer) -> dict[str, Path]:
    """A model folder, an SAE folder and two corpora, as a user would have them."""
    root = tmp_path_factory.mktemp("user")
    model.save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    make_sae(root / "sae")
    rng = random.Random(0)
    for name, words in (("forget", range(30)), ("retain", range(30, N_WORDS))):
        texts = [" ".join(f"w{rng.choice(words)}" for _ in range(rng.randint(5, 60))) for _ in range(80)]
        (root / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        (root / f"{name}.txt").write_text("\n\n".join(texts))
    return {name: root / name for name in ("model", "sae", "forget.jsonl", "retain.jsonl", "forget.txt", "retain.txt")}


@pytest.fixture(scope="session")
def lab_chain(tmp_path_factory) -> Path:
    """The whole chain of the lab at SMALL_LAB: features, threshold, guardrail, eval and a dilution attack, each `-001`.

    Made once; it is only read. Whoever writes takes `lab_copy`, or copies the folder (a few hundred kB).
    """
    from dsg_cli.recipe import load_recipe
    from dsg_cli.stages import run
    from dsg_cli.workspace.store import Workspace

    folder, before = tmp_path_factory.mktemp("lab-chain"), torch.get_num_threads()
    torch.set_num_threads(1)
    sets = [SMALL_LAB[3], "attack.kinds=[dilution]", "attack.dilution_lengths=[0, 16]"]
    run.run(load_recipe(SMALL_LAB[1], sets=sets), Workspace(folder))
    torch.set_num_threads(before)
    return folder


@pytest.fixture
def lab_copy(lab_chain, tmp_path) -> Path:
    """A workspace with the lab's chain, to be written to."""
    return Path(shutil.copytree(lab_chain, tmp_path / "lab-copy"))


@pytest.fixture(scope="session")
def tiny_recipe(folders, tmp_path_factory):
    """A function from settings to a recipe: the tiny model, its SAE and corpora, the bench `mine`, short trainings."""
    from dsg_cli.methods import METHODS, section_of
    from dsg_cli.recipe import load_recipe
    from dsg_cli.stages.stage import settle

    tasks = tmp_path_factory.mktemp("tasks")
    write_task(tasks, [{"q": f"w{i} w{i + 1}", "c": [" w40", " w41", " w42", " w43"], "a": i % 4} for i in range(24)])
    (tasks / "unknown.txt").write_text("\n".join(" ".join(f"w{i + j}" for j in range(12)) for i in range(30, 46)))
    sets = [f"corpora.{role}=[{folders[f'{role}.jsonl']}]" for role in ("forget", "retain")]
    sets += [f"model.source={folders['model']}", f"sae.source={folders['sae']}", f"eval.include_path={tasks}"]
    sets += ["select.n_features=4", "select.ratio_percentile=50", "eval.benches=[mine]", "calibrate.gate=window"]
    sets += ["guardrail.allow_ineffective=true", "calibrate.lengths=[4, 20]", "calibrate.alpha=0.2"]
    sets += ["calibrate.n_detectors=2", "calibrate.detector_percentile=50"]
    sets += [f"methods.finetune.corpora=[{folders['forget.jsonl']}, {folders['retain.jsonl']}]"]
    for name in (name for name, method in METHODS.items() if method.is_trained):
        values = ("steps=3", "accumulation=1", "learning_rate=1e-2")
        sets += [f"methods.{section_of(name)}.{value}" for value in values]
    sets += ["methods.sspu.n_relevant=4", "methods.sspu.n_irrelevant=4", "methods.ssd.n_rows=8", "methods.ssd.alpha=1"]
    sets += ["methods.ssd.dampening=0.5", f"methods.sae_representation.unknown_file={tasks / 'unknown.txt'}"]
    sets += ["attack.bench=mine", "attack.known_questions=4", "attack.relearn_learning_rates=[1e-2]"]
    sets += ["attack.relearn_steps=[0, 2]"]
    return lambda *own: settle(load_recipe(sets=[*sets, *own]))


@pytest.fixture(scope="session")
def tiny_features(tiny_recipe, tmp_path_factory) -> Path:
    """A workspace with `features-001` of the tiny model; whoever writes copies the folder."""
    from dsg_cli.stages import select
    from dsg_cli.workspace.store import Workspace

    folder = tmp_path_factory.mktemp("tiny-features")
    select.run(tiny_recipe(), Workspace(folder))
    return folder


def write_task(folder: Path, rows: list[dict], **changes: object) -> dict[str, str]:
    """An lm-eval task `mine` of the user's own (columns q, c, a) in a folder; returns options for load_tasks."""
    folder.mkdir(exist_ok=True)
    data = folder / "mine.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "mine",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "{{c}}",
        "doc_to_target": "{{a}}",
        "metric_list": [{"metric": "acc"}],
    }
    (folder / "mine.yaml").write_text(yaml.safe_dump(task | changes))
    return {"split": "test", "include_path": str(folder)}


@pytest.fixture
def dsg(tmp_path, capsys, monkeypatch):
    """Run `dsg ...` through main() in a folder of its own; returns (exit code, stdout, stderr)."""
    from dsg_cli.cli.app import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DSG_WORKSPACE", raising=False)

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        out = capsys.readouterr()
        return int(stop.value.code or 0), out.out, out.err

    return run


def refuses(words: str, call: Callable[..., object], *arguments: object, **options: object) -> None:
    """The call ends in an error for a user whose text these words, a pattern, are found in."""
    with pytest.raises(DsgError, match=words):
        call(*arguments, **options)


def python(*arguments: str, **options) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter."""
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False, **options)
