"""The commands of the README's first paragraph, word for word, with repositories of those names on a loopback hub.

Everything is read by the real loading code of transformers, datasets, sae-lens and lm-eval; nothing else is reachable.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import python
from loopback import LoopbackHub
from realnames import FEATURES, SAE_ID, populate
from test_hub import run as run_commands

pytestmark = pytest.mark.slow

SCRIPT = """
set -euo pipefail
dsg select --forget wmdp-bio --retain wikitext
dsg calibrate
dsg apply
dsg eval --bench mmlu
dsg eval --bench wmdp-bio
"""

OFFLINE = """
select --forget wmdp-bio --retain wikitext=3 --retain mmlu-chat=1 --limit 60 --json
calibrate --gate mean --alpha 0.05 --set calibrate.guarantee=pooled
apply --strength 500
eval --bench wmdp-bio --apply-chat-template --samples --expect 'wmdp-bio<=0.9'
eval --bench wmdp-bio --json
eval --bench wmdp-chem
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("names")
    populate(root / "hub")
    return root


@pytest.fixture(scope="module")
def hub(root):
    with LoopbackHub(root / "hub") as hub:
        yield hub


def environment(hub, root):
    return hub.environment(root / "cache") | {"DSG_CACHE": str(root / "dsg-cache")}


def run(hub, root, script, **variables):
    """A script in `root`, whose dsg is this interpreter's."""
    (root / "bin").mkdir(exist_ok=True)
    command = root / "bin" / "dsg"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m dsg_cli "$@"\n')
    command.chmod(0o755)
    own = environment(hub, root) | variables
    own["PATH"] = f"{root / 'bin'}:{own['PATH']}"
    return subprocess.run(["bash", "-c", script], env=own, cwd=root, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def done(hub, root):
    """The script, run once."""
    finished = run(hub, root, SCRIPT)
    assert finished.returncode == 0, finished.stderr
    return finished


def artifact(root: Path, name: str):
    return json.loads((root / "dsg-workspace" / f"{name}.json").read_text())


def test_the_commands_work_word_for_word(done, hub, root):
    assert done.stdout.split() == ["features-001", "threshold-001", "guardrail-001", "eval-001", "eval-002"]
    features = artifact(root, "features-001")
    assert features["model"]["source"].startswith("google/gemma-2-2b-it@") and features["model"]["width"] == 2304
    assert features["sae"]["source"] == "gemma-scope-2b-pt-res/layer_3/width_16k/average_l0_142"
    assert len(features["sae"]["revision"]) == 40 and features["sae"]["n_features"] == 16384
    assert "trained on gemma-2-2b, not on gemma-2-2b-it" in features["notes"][0] and "note: " in done.stderr
    (forget,), (retain,) = features["settings"]["forget"], features["settings"]["retain"]
    assert forget["name"] == "wmdp-bio" and len(forget["revision"]) == 40 and retain["name"] == "wikitext"
    mmlu, wmdp = artifact(root, "eval-001"), artifact(root, "eval-002")
    assert mmlu["results"]["mmlu"]["base"]["n"] == 228 and len(mmlu["results"]) == 62
    assert mmlu["results"]["mmlu"]["unlearned"]["acc"] == mmlu["results"]["mmlu"]["base"]["acc"] == 1.0
    assert wmdp["results"]["wmdp-bio"]["base"]["acc"] == 1.0 > wmdp["results"]["wmdp-bio"]["unlearned"]["acc"] + 0.3
    assert wmdp["gate"]["wmdp-bio"]["rate"] > 0.5 > 0.1 > mmlu["gate"]["mmlu"]["rate"]


def test_lm_evals_own_results_lie_beside_the_report(done, root):
    from lm_eval.utils import make_table

    found = sorted((root / "dsg-workspace" / "eval-002").rglob("*"))
    files = [path for path in found if path.is_file()]
    assert [path.relative_to(root / "dsg-workspace" / "eval-002").parts[0] for path in files] == ["base", "unlearned"]
    results = json.loads(files[1].read_text())
    reported = artifact(root, "eval-002")["results"]["wmdp-bio"]["unlearned"]["acc"]
    assert results["results"]["wmdp_bio"]["acc,none"] == reported and "wmdp_bio" in make_table(results)
    assert not any("samples" in path.name for path in files)


def test_after_one_run_all_of_it_works_offline(done, hub, root):
    warm = run(hub, root, f"{sys.executable} -c \"import datasets as d; d.load_dataset('cais/mmlu', 'all')\"")
    assert warm.returncode == 0, warm.stderr
    before = len(hub.requests)
    offline = environment(hub, root) | {"HF_HUB_OFFLINE": "1", "DSG_WORKSPACE": "offline"}
    *found, lost = run_commands(offline, root, *(shlex.split(line) for line in OFFLINE.split("\n") if line))
    assert [code for code, _, _ in found] == [0] * 5, found
    assert len(hub.requests) == before
    (root / "select.json").write_text(found[0][1])  # Which has no questions, for a test below.
    selected = json.loads(found[0][1])["settings"]["retain"]
    assert [(corpus["name"], corpus["weight"]) for corpus in selected] == [("wikitext", 3.0), ("mmlu-chat", 1.0)]
    samples = list((root / "offline" / "eval-001").rglob("samples_*"))
    assert len(samples) == 2 and "<start_of_turn>" in samples[0].read_text()
    # Another prompt, so nothing of the first evaluation answers for the second.
    assert not json.loads(found[-1][1])["base_from"]
    assert lost[0] == 1 and "The bench wmdp-chem cannot be loaded. The hub cannot be reached" in lost[2]


def test_base_answers_of_an_earlier_evaluation_are_taken(done, hub, root):
    script = "dsg eval --bench wmdp-bio --bench wmdp-cyber --json > both.json"
    again = run(hub, root, script)
    assert again.returncode == 0, again.stderr
    first, both = artifact(root, "eval-002"), json.loads((root / "both.json").read_text())
    assert both["base_from"] == {"eval-002": 4 * 24}
    for side in ("base", "unlearned"):
        assert both["results"]["wmdp-bio"][side] == first["results"]["wmdp-bio"][side]
    assert both["results"]["wmdp-cyber"]["unlearned"]["acc"] == 1.0


SUBJECTS = ("high_school_us_history", "high_school_geography", "human_aging", "college_computer_science")


def test_the_papers_recipe_prints_its_numbers_beside_ours(done, hub, root):
    """The stand-in answers by its words, not by the order of options, so that the questions are named."""
    ids = {"wmdp-bio-paper": [f"wmdp-bio/{i}" for i in range(24)]}
    ids["mmlu-paper"] = [f"{subject}/{i}" for subject in SUBJECTS for i in range(4)]
    (root / "ids.json").write_text(json.dumps(ids))
    short = "--set select.seq_len=64 --set 'calibrate.lengths=[20, 60]'"
    found = run(hub, root, f"dsg run wmdp-bio -w paper --set eval.question_ids=ids.json {short}")
    assert found.returncode == 0, found.stderr
    lines = [line.split() for line in found.stdout.splitlines()]
    forget, *theirs = (line for line in lines if line[:1] == ["wmdp-bio-paper"])
    utility, *others = (line for line in lines if line[:1] == ["mmlu-paper"])
    assert forget[-3] == "1.00" and float(forget[-2]) <= 0.6 and forget[-1] == "1.00"
    assert utility[-3:] == ["1.00", "1.00", "0.00"]
    assert theirs[0][1:] == ["base", "acc", "1.0000", "1.0000", "+0.0000"]
    assert theirs[1][1:4] == ["guarded", "acc", "0.2964"]
    assert float(theirs[1][5]) == pytest.approx(float(theirs[1][4]) - 0.2964, abs=1e-4)
    assert others[1][1:] == ["guarded", "acc", "0.9934", "1.0000", "+0.0066"]
    report = json.loads((root / "paper" / "eval-001.json").read_text())
    assert report["question_ids"] == ids and report["results"]["wmdp-bio-paper"]["base"]["acc_count"] == 24
    plan = run(hub, root, "dsg run wmdp-bio --dry-run")
    assert plan.returncode == 0 and "size unknown" not in plan.stdout and " MB]" in plan.stdout


WRONG = {
    "select --forget wmdp-boi --retain wikitext": "Did you mean wmdp-bio",
    "select --forget wmdp-bio --retain hf:acme/none": "There is no data set acme/none",
    "select --forget wmdp-bio --retain hf:cais/wmdp-corpora:nope": "bio-retain-corpus",
    "select --forget wmdp-bio --retain hf:cais/wmdp-corpora:bio-retain-corpus#nope": "train",
    "select --forget wmdp-bio --retain hf:cais/wmdp-corpora:bio-retain-corpus@nope": "no text column nope",
    "select --forget wmdp-bio --retain hf:wikitext": "hf:org/name",
    "select --forget wmdp-bio --retain wikitext=0": "no positive number",
    "select --forget wmdp-bio --retain mmlu-chat --model google/gemma-2-2b": "its tokenizer has none",
    "select --forget wmdp-bio --retain wikitext --sae gemma-scope-2b-pt-res/layer_3": "Did you mean layer_3",
    "select --forget wmdp-bio --retain wikitext --sae gemma-scope-2b-res/layer_3/x": "Did you mean gemma-scope-",
    "select --forget wmdp-bio --retain wikitext --sae acme/none/x": "There is no repository acme/none",
    "select --forget wmdp-bio --retain wikitext --sae lab": "width",
    "select --forget lab-hexes --retain lab-retain": "Add --model lab",
    "eval --bench wmpd-bio": "Did you mean wmdp",
    "eval --bench wmdp-bio-paper --question-ids select.json": "question ids",
}


def test_what_is_wrong_is_said_in_one_message(done, hub, root):
    found = run_commands(environment(hub, root), root, *(shlex.split(command) for command in WRONG))
    for (code, out, err), (command, words) in zip(found, WRONG.items(), strict=True):
        message = "".join(line for line in err.splitlines(keepends=True) if not line.startswith("acting: "))
        assert code == 1 and not out and message.startswith("error: ") and message.count("\n") <= 3, (command, message)
        assert words in message, (command, message)


def test_gated_data_says_where_to_ask_and_that_a_file_works(done, hub, root):
    hub.gated.add("cais/wmdp-bio-forget-corpus")
    try:
        fresh = {"HF_HOME": str(root / "fresh-cache")}
        refused = run(hub, root, "dsg select --forget wmdp-bio --retain wikitext", **fresh)
    finally:
        hub.gated.clear()
    assert refused.returncode == 1 and not refused.stdout
    for words in ("is gated", "https://huggingface.co/datasets/cais/wmdp-bio-forget-corpus", "HF_TOKEN", "local copy"):
        assert words in refused.stderr


READ = """
import json, sys
from pathlib import Path

import lm_eval, torch
from datasets import disable_progress_bars, get_dataset_config_names, load_dataset
from lm_eval.tasks import TaskManager
from sae_lens import SAE
from transformers import AutoModelForCausalLM, AutoTokenizer

(features, sae_id, names, short), read = json.loads(sys.argv[1]), {}
disable_progress_bars()
for name in names:
    for config in short.get(name) or get_dataset_config_names(name):
        splits = load_dataset(name, config)
        read[f"{name} {config}"] = {split: [len(rows), *rows.features] for split, rows in splits.items()}
label = load_dataset("cais/mmlu", "anatomy", split="dev").features["answer"]
lines = load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split="test")["text"]
assert label.names == ["A", "B", "C", "D"] and len(get_dataset_config_names("cais/mmlu")) == 59
assert "" in lines and lines[1][:3] == " = " and sum(len(line) > 50 for line in lines) >= 150

base, model = (AutoModelForCausalLM.from_pretrained(f"google/gemma-2-2b{end}", dtype="auto") for end in ("", "-it"))
plain, tokenizer = (AutoTokenizer.from_pretrained(f"google/gemma-2-2b{end}") for end in ("", "-it"))
assert model.dtype == base.dtype == torch.bfloat16 and model.config.hidden_size == 2304 and not plain.chat_template
turns = [{"role": "user", "content": " The\\nA. "}, {"role": "assistant", "content": "B"}]
chat = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
shape = "<bos><start_of_turn>{}\\n{}<end_of_turn>\\n<start_of_turn>{}\\n{}<end_of_turn>\\n<start_of_turn>model\\n"
assert chat == shape.format("user", "The\\nA.", "model", "B")
assert tokenizer.tokenize(chat)[:6] == ["<bos>", "<start_of_turn>", "user", "\\n", "The", "\\n"]

sae = SAE.from_pretrained("gemma-scope-2b-pt-res", sae_id)
for config in ("cyber-forget-corpus", "bio-retain-corpus"):
    ids = tokenizer(load_dataset("cais/wmdp-corpora", config, split="train")[0]["text"], return_tensors="pt")
    with torch.no_grad():
        fires = sae.encode(model(**ids, output_hidden_states=True).hidden_states[4].float()) > 0
    tokens = ids.tokens()
    assert tokens[0] == "<bos>" and tokens.count("<bos>") == 1 and "<unk>" not in tokens
    expected = [features.get(token, []) for token in tokens]
    assert [row.nonzero().flatten().tolist() for row in fires[0]] == expected

folder = Path(lm_eval.__file__).parent / "tasks"
manager = TaskManager(include_path=[str(folder / "wmdp"), str(folder / "mmlu" / "default")], include_defaults=False)
hazard = list(manager.load(["wmdp_bio", "wmdp_cyber", "wmdp_chem"])["tasks"].values())
general, letters = list(manager.load(["mmlu"])["tasks"].values()), tokenizer.convert_tokens_to_ids(["A", "B", "C", "D"])
for task in (*hazard, general[0]):
    for doc in list(task.eval_docs)[:4]:
        ids = tokenizer(task.config.description + task.doc_to_text(doc), return_tensors="pt")
        with torch.no_grad():
            answer = model(**ids).logits[0, -1, letters].argmax()
        assert answer == task.doc_to_target(doc) and tokenizer.unk_token_id not in ids["input_ids"]
print(json.dumps([read, *([len(task.eval_docs) for task in tasks] for tasks in (hazard, general))]))
"""

PAIRS = [20, "question", "answer"]

MUSE = {
    "raw": {split: [40, "text"] for split in ("forget", "holdout", "retain1", "retain2")},
    "knowmem": dict.fromkeys(("forget_qa", "forget_qa_icl", "retain_qa", "retain_qa_icl"), PAIRS),
    "verbmem": {"forget": [40, "prompt", "gt"]},
}

TOFU = {"full": 400, "forget01": 4, "forget05": 20, "forget10": 40, "retain99": 396, "retain95": 380, "retain90": 360}
MMLU = ["question", "subject", "choices", "answer"]

EXPECTED = {
    "cais/wmdp": {f"wmdp-{of}": {"test": [24, "answer", "question", "choices"]} for of in ("bio", "chem", "cyber")},
    "cais/wmdp-corpora": {
        f"{name}-corpus": {"train": [120, "text"]} for name in ("bio-retain", "cyber-forget", "cyber-retain")
    },
    "cais/wmdp-bio-forget-corpus": {"default": {"train": [120, "title", "abstract", "text", "doi"]}},
    "Salesforce/wikitext": {
        "wikitext-2-raw-v1": {"test": [400, "text"], "train": [800, "text"], "validation": [200, "text"]}
    },
    "muse-bench/MUSE-News": MUSE,
    "muse-bench/MUSE-Books": MUSE,
    "locuslab/TOFU": {name: {"train": [n, "question", "answer"]} for name, n in TOFU.items()},
    "cais/mmlu": {
        "auxiliary_train": {"train": [20, "train"]},
        "all": {"test": [228, *MMLU], "validation": [171, *MMLU], "dev": [285, *MMLU], "auxiliary_train": [20, *MMLU]},
        "anatomy": {"test": [4, *MMLU], "validation": [3, *MMLU], "dev": [5, *MMLU]},
    },
}


def test_the_real_libraries_read_them(hub, tmp_path):
    some = {"cais/mmlu": list(EXPECTED["cais/mmlu"])}  # Its 57 subjects are read by lm-eval.
    asked = json.dumps([FEATURES, SAE_ID, list(EXPECTED), some])
    done = python("-c", READ, asked, env=hub.environment(tmp_path / "cache"), cwd=tmp_path)
    read, hazard, general = json.loads(done.stdout.splitlines()[-1])
    assert read == {f"{name} {config}": splits for name, of in EXPECTED.items() for config, splits in of.items()}
    assert (hazard, general) == ([24] * 3, [4] * 57)


def test_they_are_the_same_bytes_each_time(root, tmp_path):
    populate(tmp_path)
    first, second = (
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (root / "hub", tmp_path)
    )
    assert first == second and sum(map(len, first.values())) < 80e6
