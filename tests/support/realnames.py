"""Tiny repositories under the hub's real names, with its file layouts and columns, for a LoopbackHub to serve.

All words are invented. Each has an embedding orthogonal to all others and a feature of its own in the SAE. The letter
that answers a question is the class of its content words (their place in the group modulo four); the last attention
layer adds up those classes, so that the model answers every question right until its words are clamped.
"""

from __future__ import annotations

import importlib.util
import json
import random
import re
import shutil
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM, GenerationConfig, PreTrainedTokenizerFast

Tables = dict[str, list[dict[str, Any]]]
"""Path in the repository to rows."""

WIDTH, N_FEATURES, SAE_ID = 2304, 16384, "layer_3/width_16k/average_l0_142"
TOKEN = r"[A-Za-z]+|\d|\n|[^\w\s]|_"
SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")

CHAT_TEMPLATE = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'assistant' %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}"
    "{% endif %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)

SUFFIXES = {"hazard-bio": "ovex", "hazard-cyber": "ytek", "hazard-chem": "ufrim", "benign-biology": "iflor"}
SUFFIXES |= {"benign-computing": "ubyte", "general": "indo", "news": "ograf", "books": "isaga", "authors": "enko"}
STEMS = [a + b + c for a in "blmrvz" for b in "aeio" for c in "lmnrv"]
FILLERS = ["the", "of", "and", "a", "to", "in", "with", "is", "near", "from", "by", "under"]

WORDS = {
    group: [stem + suffix for stem in random.Random(group).sample(STEMS, 33)] for group, suffix in SUFFIXES.items()
}
"""Group to its words, which its suffix tells from all others."""

CONTENT = [word for words in WORDS.values() for word in words]
COPIES = {word: 16 if word in WORDS["general"] else 1 for word in CONTENT}
_DRAWN = iter(random.Random(0).sample(range(N_FEATURES), sum(COPIES.values())))
FEATURES = {word: sorted(next(_DRAWN) for _ in range(n)) for word, n in COPIES.items()}
"""Word to the features that fire on it and on no other: so many on general words that the best 5 % are few of all."""


def populate(root: Path) -> None:
    """Write all repositories as `models/ORG/NAME` and `datasets/ORG/NAME`; the same bytes each time."""
    rng = random.Random(0)
    tables = {
        "cais/wmdp": wmdp(rng),
        "cais/wmdp-corpora": wmdp_corpora(rng),
        "cais/wmdp-bio-forget-corpus": wmdp_bio_forget_corpus(rng),
        "cais/mmlu": mmlu(rng),
        "Salesforce/wikitext": wikitext(rng),
        "muse-bench/MUSE-News": muse(rng, "news"),
        "muse-bench/MUSE-Books": muse(rng, "books"),
        "locuslab/TOFU": tofu(rng),
    }
    for name, files in tables.items():
        write_dataset(root / "datasets" / name, files)
    vocab = vocabulary(json.dumps(tables, ensure_ascii=False).replace("\\n", "\n"))
    generator = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(WIDTH, len(vocab), generator=generator)).Q.T.contiguous()
    write_models(root / "models" / "google", vocab, language_model(vocab, directions, generator))
    write_sae(root / "models" / "google" / "gemma-scope-2b-pt-res" / SAE_ID, directions[[vocab[w] for w in FEATURES]])


def text(rng: random.Random, n_words: int, *groups: str) -> str:
    """Sentences in which every second word is of one of the groups."""
    pool, sentences = [word for group in groups for word in WORDS[group]], []
    while n_words > 0:
        pairs = " ".join(f"{rng.choice(pool)} {rng.choice(FILLERS)}" for _ in range(rng.randint(2, 6)))
        sentences.append(f"The {pairs} {rng.choice(pool)}.")
        n_words -= len(sentences[-1].split())
    return " ".join(sentences)


def documents(rng: random.Random, *groups: str, n: int = 120, shortest: int = 30, longest: int = 107) -> list[str]:
    return [text(rng, rng.randint(shortest, longest), *groups) for _ in range(n)]


def question(rng: random.Random, group: str, answer: int) -> dict[str, Any]:
    """Four words of the answer's class in the question, two of its own class in each choice."""
    first, second, third, fourth = rng.sample(WORDS[group][answer::4], 4)
    return {
        "answer": answer,
        "question": f"Which of the following is near the {first} {second} with a {third} and a {fourth}?",
        "choices": [f"the {' of the '.join(rng.sample(WORDS[group][letter::4], 2))}" for letter in range(4)],
    }


def pair(rng: random.Random, group: str) -> dict[str, Any]:
    """A question and its answer in words of a group."""
    subject, thing = rng.sample(WORDS[group], 2)
    asked, told = rng.sample(WORDS["general"], 2)
    return {"question": f"What is the {asked} of the {subject}?", "answer": f"The {asked} is the {told} {thing}."}


def shard(config: str, split: str) -> str:
    return f"{config}/{split}-00000-of-00001.parquet"


def wmdp(rng: random.Random) -> Tables:
    domains = ("bio", "chem", "cyber")
    return {shard(f"wmdp-{d}", "test"): [question(rng, f"hazard-{d}", i % 4) for i in range(24)] for d in domains}


def wmdp_corpora(rng: random.Random) -> Tables:
    groups = {"bio-retain": "benign-biology", "cyber-forget": "hazard-cyber", "cyber-retain": "benign-computing"}
    texts = {name: documents(rng, group, "general") for name, group in groups.items()}
    return {shard(f"{name}-corpus", "train"): [{"text": t} for t in some] for name, some in texts.items()}


def wmdp_bio_forget_corpus(rng: random.Random) -> Tables:
    def row(i: int, document: str) -> dict[str, Any]:
        title, abstract = text(rng, 5, "hazard-bio"), text(rng, 20, "hazard-bio", "general")
        return {"title": title, "abstract": abstract, "text": document, "doi": f"10.0000/invented.{i:04d}"}

    texts = documents(rng, "hazard-bio", "general")
    return {shard("data", "train"): [row(i, document) for i, document in enumerate(texts)]}


def mmlu_subjects() -> dict[str, str]:
    """Each subject and the sentence with which the installed lm-eval introduces it."""
    spec = importlib.util.find_spec("lm_eval")
    assert spec is not None and spec.submodule_search_locations
    folder = Path(spec.submodule_search_locations[0]) / "tasks" / "mmlu" / "default"
    tasks = [yaml.safe_load(path.read_text()) for path in sorted(folder.glob("mmlu_*.yaml"))]
    return {task["dataset_name"]: task["description"] for task in tasks}


def mmlu(rng: random.Random) -> Tables:
    """On the hub too, `auxiliary_train` nests its columns in one, and `all` has its rows with an empty subject."""

    def rows(subject: str, n: int) -> list[dict[str, Any]]:
        asked = [{"subject": subject, **question(rng, "general", i % 4)} for i in range(n)]
        return [{column: row[column] for column in ("question", "subject", "choices", "answer")} for row in asked]

    sizes, auxiliary = {"test": 4, "validation": 3, "dev": 5}, rows("", 20)
    files = {(subject, split): rows(subject, n) for subject in mmlu_subjects() for split, n in sizes.items()}
    whole = {("all", split): [row for (_, of), some in files.items() if of == split for row in some] for split in sizes}
    whole["all", "auxiliary_train"] = auxiliary
    whole["auxiliary_train", "train"] = [{"train": row} for row in auxiliary]
    return {shard(*names): some for names, some in (files | whole).items()}


def wikitext(rng: random.Random) -> Tables:
    sizes = {"test": 40, "train": 80, "validation": 20}
    lines = {split: [line for _ in range(n) for line in article(rng)] for split, n in sizes.items()}
    return {shard("wikitext-2-raw-v1", split): [{"text": line} for line in some] for split, some in lines.items()}


def article(rng: random.Random) -> Iterator[str]:
    """A title and two sections of two paragraphs, with spaces about punctuation and empty lines between."""
    for level in ("=", "= ="):
        yield from ("", f" {level} {' '.join(rng.sample(WORDS['general'], 3))} {level} \n", "")
        for _ in range(2):
            yield f" {text(rng, rng.randint(20, 80), 'general').replace('.', ' .')} \n"


def muse(rng: random.Random, group: str) -> Tables:
    """The forget and holdout splits have the group's words too, the retain splits general words alone."""
    own: dict[str, list[str]] = {"forget": [group], "holdout": [group], "retain1": [], "retain2": []}
    raw = {split: documents(rng, *of, "general", n=40, shortest=300, longest=600) for split, of in own.items()}
    asked = {"forget_qa": group, "forget_qa_icl": group, "retain_qa": "general", "retain_qa_icl": "general"}
    return {
        **{shard("raw", split): [{"text": document} for document in texts] for split, texts in raw.items()},
        **{shard("knowmem", split): [pair(rng, of) for _ in range(20)] for split, of in asked.items()},
        shard("verbmem", "forget"): [{"prompt": t[:800], "gt": t[800:1600]} for t in raw["forget"]],
    }


def tofu(rng: random.Random) -> Tables:
    """A tenth of the hub's size; what is forgotten is at the end of the whole, what is retained before it."""
    full = [pair(rng, "authors") for _ in range(400)]
    cuts = {"01": 4, "05": 20, "10": 40}
    forget = {f"forget{share}.json": full[-n:] for share, n in cuts.items()}
    retain = {f"retain{100 - int(share)}.json": full[:-n] for share, n in cuts.items()}
    return {"full.json": full} | forget | retain


def write_dataset(folder: Path, files: Tables) -> None:
    """Parquet or JSON lines, and a card that tells which file is which split of which configuration."""
    for path, rows in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        if path.endswith(".json"):
            (folder / path).write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            pq.write_table(pa.Table.from_pylist(rows), folder / path)
    card: dict[str, Any] = {"license": "mit", "configs": configs(files)}
    if "mmlu" in folder.name:
        card["dataset_info"] = mmlu_info(card["configs"])
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(card, sort_keys=False)}---\n\nInvented words.\n")


def configs(files: Tables) -> list[dict[str, Any]]:
    """A folder is a configuration and a file one of its splits; a JSON file is a configuration with one split."""
    found: dict[str, Any] = {}
    for path in files:
        config, _, file = path.rpartition("/")
        if config:
            split = file.split("-")[0]
            found.setdefault(config, []).append({"split": split, "path": f"{config}/{split}-*"})
        else:
            found[path.removesuffix(".json")] = path
    return [{"config_name": "default" if c == "data" else c, "data_files": data} for c, data in found.items()]


def mmlu_info(listed: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The card's features: only they tell that an answer is a class label."""
    label = {"class_label": {"names": {str(i): letter for i, letter in enumerate("ABCD")}}}
    strings = [{"name": name, "dtype": "string"} for name in ("question", "subject")]
    columns = [*strings, {"name": "choices", "sequence": "string"}, {"name": "answer", "dtype": label}]
    nested = [{"name": "train", "struct": [*columns[:3], {"name": "answer", "dtype": "int64"}]}]
    names = [config["config_name"] for config in listed]
    return [{"config_name": name, "features": nested if name == "auxiliary_train" else columns} for name in names]


def vocabulary(texts: str) -> dict[str, int]:
    """Special tokens, then every word and mark in the texts and in what lm-eval and the chat template add."""
    added = "\n".join([*mmlu_subjects().values(), "biology chemistry cybersecurity Question Answer user model"])
    tokens = {*re.findall(TOKEN, texts), *re.findall(TOKEN, added), *CONTENT, *FILLERS}
    single = {*string.ascii_letters, *string.digits, *string.punctuation, "\n"}
    return {token: i for i, token in enumerate([*SPECIAL, *sorted(tokens | single)])}


def build_tokenizer(vocab: dict[str, int]) -> PreTrainedTokenizerFast:
    """A token for each word, digit, mark and new line; `<bos>` in front and padding on the left, as Gemma has them."""
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(TOKEN), behavior="removed", invert=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", vocab["<bos>"])]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    named = {f"{name}_token": f"<{name}>" for name in ("pad", "eos", "bos", "unk")}
    options = {"model_max_length": 8192, "padding_side": "left", "extra_special_tokens": list(SPECIAL[4:])}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **named, **options)


def language_model(vocab: dict[str, int], directions: Tensor, generator: torch.Generator) -> Gemma2ForCausalLM:
    """Gemma 2 of the real width; the norms that follow attention and MLP keep what they add at two per cent.

    Small weights would not do: those norms bring any output to the same size.
    """
    shape = {"num_hidden_layers": 5, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    shape |= {"hidden_size": WIDTH, "intermediate_size": 16, "query_pre_attn_scalar": 8, "vocab_size": len(vocab)}
    model = Gemma2ForCausalLM(Gemma2Config(**shape)).requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "post_" in name:
            parameter.fill_(-0.98)
        elif "norm" not in name:
            parameter.normal_(0, 0.02, generator=generator)
    model.model.embed_tokens.weight.copy_(directions)
    teach(model, vocab, directions)
    return model.to(torch.bfloat16)


def teach(model: Gemma2ForCausalLM, vocab: dict[str, int], directions: Tensor) -> None:
    """The last attention layer counts the words of each class in the sequence and writes the letters so often."""
    layer = model.model.layers[-1]
    for parameter in (*layer.self_attn.parameters(), layer.post_attention_layernorm.weight):
        parameter.zero_()
    for i, letter in enumerate("ABCD"):
        ids = [vocab[word] for words in WORDS.values() for word in words[i::4]]
        layer.self_attn.v_proj.weight[i] = directions[ids].sum(0)
        layer.self_attn.o_proj.weight[:, i] = directions[vocab[letter]]


def write_models(folder: Path, vocab: dict[str, int], model: Gemma2ForCausalLM) -> None:
    """The instruction-tuned model in two shards, and the base: the same weights without the template."""
    tokenizer, chat, base = build_tokenizer(vocab), folder / "gemma-2-2b-it", folder / "gemma-2-2b"
    ids = {"bos_token_id": 2, "pad_token_id": 0}
    model.generation_config = GenerationConfig(eos_token_id=1, **ids)
    model.save_pretrained(base, max_shard_size="3MB")
    tokenizer.save_pretrained(base)
    shutil.copytree(base, chat)
    GenerationConfig(eos_token_id=[1, vocab["<end_of_turn>"]], **ids).save_pretrained(chat)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(chat, save_jinja_files=False)


def write_sae(folder: Path, directions: Tensor) -> None:
    """Live features read and write the directions of words' embeddings; they are 48 on their word and 0 elsewhere."""
    live = [index for word in CONTENT for index in FEATURES[word]]
    row = [number for number, word in enumerate(CONTENT) for _ in FEATURES[word]]
    shapes = {"W_enc": (WIDTH, N_FEATURES), "W_dec": (N_FEATURES, WIDTH), "b_enc": N_FEATURES, "b_dec": WIDTH}
    arrays = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    arrays["threshold"] = np.ones(N_FEATURES, np.float32)
    arrays["W_enc"][:, live], arrays["W_dec"][live], arrays["threshold"][live] = directions[row].T, directions[row], 24
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(folder / "params.npz", **arrays)
