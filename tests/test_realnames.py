"""The repositories under real names, read by the libraries that read the real ones."""

import json

import pytest
from conftest import python
from loopback import LoopbackHub
from realnames import FEATURES, SAE_ID, populate

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


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    populate(root)
    return root


def test_the_real_libraries_read_them(root, tmp_path):
    some = {"cais/mmlu": list(EXPECTED["cais/mmlu"])}  # Its 57 subjects are read by lm-eval.
    asked = json.dumps([FEATURES, SAE_ID, list(EXPECTED), some])
    with LoopbackHub(root) as hub:
        done = python("-c", READ, asked, env=hub.environment(tmp_path / "cache"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    read, hazard, general = json.loads(done.stdout.splitlines()[-1])
    assert read == {f"{name} {config}": splits for name, of in EXPECTED.items() for config, splits in of.items()}
    assert (hazard, general) == ([24] * 3, [4] * 57)


def test_they_are_the_same_bytes_each_time(root, tmp_path):
    populate(tmp_path)
    first, second = (
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (root, tmp_path)
    )
    assert first == second and sum(map(len, first.values())) < 80e6
