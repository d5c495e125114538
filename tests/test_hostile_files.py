"""Whatever a file that others made holds: what it is read as, or one DsgError; never another exception."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from anything import TEXT, VALUES, changed, mutated, places, refused, tries
from conftest import WIDTH, make_guardrail, make_sae
from hypothesis import example, given
from hypothesis import strategies as st

from dsg_cli.errors import DsgError

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("properties")


ROWS = [{"text": f"document number {i}, é", "other": i, "none": None} for i in range(12)]


def parquet(rows):
    import pyarrow
    from pyarrow import parquet as format

    out = io.BytesIO()
    format.write_table(pyarrow.Table.from_pylist(rows), out, row_group_size=5)
    return out.getvalue()


VALID = {
    ".jsonl": "".join(json.dumps(row) + "\n" for row in ROWS).encode(),
    ".json": json.dumps(ROWS).encode(),
    ".csv": ("text,other\n" + "".join(f'"{row["text"]}",{row["other"]}\n' for row in ROWS)).encode(),
    ".tsv": ("text\tother\n" + "".join(f"{row['text']}\t{row['other']}\n" for row in ROWS)).encode(),
    ".parquet": parquet(ROWS),
    ".txt": "\n\n".join(row["text"] for row in ROWS).encode(),
}

DEEP = b"[" * 100_000

MANY_DIGITS = b'{"text": "x", "n": ' + b"9" * 5000 + b"}\n"


def load(path, content, column=""):
    from dsg_cli.data.corpora import load_corpus

    path.write_bytes(content)
    return refused(load_corpus, f"{path}{column}")


@pytest.mark.parametrize("kind", VALID)
def test_any_bytes_as_a_corpus(root, kind):
    path = root / f"corpus{kind}"
    assert len(load(path, VALID[kind]).texts) == 12

    @tries(20)
    @given(st.binary(max_size=60) | st.builds(json.dumps, VALUES).map(str.encode), st.sampled_from(["", "@text", "@b"]))
    @example(DEEP, "")
    @example(MANY_DIGITS * 9, "")
    @example(MANY_DIGITS, "@text")
    @example(b'{"text": ' + DEEP, "")
    @example(b"a,a\rb\rc\n\r,d\n" * 9, "@a")
    @example(b'text\n"\xc2\x85\n' * 9, "@text")
    @example(b'[{"text": "x"}, "y"]', "")
    def check(content, column):
        load(path, content, column)

    check()


@pytest.mark.parametrize("kind", VALID)
def test_mutations_of_a_corpus(root, kind):
    path = root / f"corpus{kind}"

    @tries(120 if kind == ".parquet" else 40)
    @given(mutated(VALID[kind]), st.sampled_from(["", "@text", "@b"]))
    def check(content, column):
        load(path, content, column)

    check()


def test_columns_of_parquet_that_are_hard_to_read(root):
    import pyarrow
    from pyarrow import parquet as format

    path = root / "hard.parquet"
    texts = [f"text {i}" for i in range(12)]
    bad = pyarrow.StringArray.from_buffers(
        3, pyarrow.py_buffer(struct.pack("4i", 0, 1, 2, 3)), pyarrow.py_buffer(b"\xff\xfe\xfd")
    )
    for table in (
        pyarrow.table([texts, texts], names=["text", "text"]),
        pyarrow.table({"a.b": texts}),
        pyarrow.table({"": texts}),
        pyarrow.table({"text": bad}),
        pyarrow.table({"text": pyarrow.array(texts).dictionary_encode()}),
        pyarrow.table({"text": pyarrow.array([None] * 12, pyarrow.string())}),
        pyarrow.table({"text": [{"a": "x"}] * 12}),
        pyarrow.table({}),
    ):
        format.write_table(table, path)
        load(path, path.read_bytes())


@tries(60)
@given(TEXT | st.builds("{}{}{}".format, st.sampled_from(["lab-hexes", "hf:a/b", "."]), st.sampled_from("=#@:"), TEXT))
def test_any_name_of_a_corpus(name):
    from dsg_cli.data.corpora import check_disjoint, parse_name

    refused(parse_name, name)
    refused(check_disjoint, [name], [name + "x"])


@tries(60)
@given(st.binary(max_size=60) | st.builds(json.dumps, VALUES).map(str.encode))
@example(DEEP)
@example(b'{"prompt": ' + DEEP)
@example(b'{"prompt": "\\ud800"}')
@example(b'{"prompt": "x", "n": ' + b"9" * 5000 + b"}")
@example(b'{"question_ids": {"wmdp-bio-paper": [' + b"[" * 100_000)
@example(b'{"question_ids": {"wmdp-bio-paper": 1}}')
@example(b'{"wmdp-bio-paper": [1, null, {}]}')
def test_any_bytes_as_prompts_and_as_question_ids(root, content):
    from dsg_cli.data.readers import read_prompts
    from dsg_cli.evals.paper_protocol import read_question_ids

    for path in (root / "file.jsonl", root / "file.txt", root / "file.json"):
        path.write_bytes(content)
        for prompt in refused(read_prompts, [], path) or ():
            prompt.encode()
        refused(read_question_ids, path, ["wmdp-bio-paper"])


def test_paths_that_cannot_be(root):
    from dsg_cli.data.readers import read_prompts
    from dsg_cli.evals.paper_protocol import read_question_ids
    from dsg_cli.guardrail.loading import read_light

    for name in ("a" * 5000, "x\x00y", "\ud800", str(root)):
        assert refused(read_prompts, [], Path(name)) is None
        assert refused(read_question_ids, Path(name), ["wmdp-bio-paper"]) is None
        assert refused(read_light, Path(name)) is None


@pytest.fixture(scope="module")
def light(root):
    """A light file's content, and what it is made of."""
    from safetensors.torch import load

    from dsg_cli.guardrail.loading import light_file
    from dsg_cli.workspace.store import Workspace

    workspace = Workspace(DATA / "schema-2")
    stored = workspace.read("guardrail-001")
    content = light_file(stored.header, stored.body, workspace.tensors(stored))
    n = int.from_bytes(content[:8], "little")
    return content, json.loads(json.loads(content[8 : 8 + n])["__metadata__"]["dsg"]), load(content)


def test_any_bytes_as_a_light_file(root, light):
    from dsg_cli.guardrail.loading import read_light

    path = root / "light.safetensors"
    path.write_bytes(light[0])
    assert read_light(path).header.kind == "guardrail"
    head = light[0][: 8 + int.from_bytes(light[0][:8], "little")]

    @tries(120)
    @given(st.binary(max_size=60) | mutated(light[0]) | mutated(head).map(lambda new: new + light[0][len(head) :]))
    def check(content):
        path.write_bytes(content)
        refused(read_light, path)

    check()


def test_a_light_file_whose_digests_agree_and_whose_parts_do_not(root, light):
    """Other tensors, or another JSON object, with the digests that they should have."""
    from safetensors.torch import save

    from dsg_cli.guardrail.loading import TENSORS_DIGEST, read_light
    from dsg_cli.guardrail.runtime.spec import tensors_digest
    from dsg_cli.workspace.artifacts import artifact_digest

    _, data, tensors = light
    path = root / "light.safetensors"

    def check(data, tensors):
        with contextlib.suppress(TypeError):
            data = data | {TENSORS_DIGEST: tensors_digest(tensors)}
        path.write_bytes(save(tensors, metadata={"dsg": json.dumps(data | {"sha256": artifact_digest(data)})}))
        refused(read_light, path)

    others = (
        torch.zeros(()),
        torch.zeros(3),
        torch.zeros(2, 2, 2),
        torch.zeros(0, 4),
        torch.ones(3, dtype=torch.int64) * 10**6,
        torch.zeros(4, dtype=torch.bool),
    )
    for name, tensor in tensors.items():
        check(data, {key: value for key, value in tensors.items() if key != name})
        for other in (
            *others,
            *([tensor.T.contiguous()] if tensor.ndim == 2 else []),
            tensor[:1].contiguous(),
            tensor.bfloat16(),
            tensor.double(),
        ):
            check(data, tensors | {name: other})
    check(data, tensors | {"more": torch.zeros(1)})
    for path_of in places({key: value for key, value in data.items() if key not in ("sha256", TENSORS_DIGEST)}):
        for replacement in ((), (None,), (-1,), ("x",), ({},), ([],), (10**30,)):
            check(changed(data, path_of, *replacement), tensors)


@pytest.mark.parametrize("architecture", ["jumprelu", "topk"])
def test_a_guardrail_of_no_features_is_one(root, architecture):
    from dsg_cli.models.sae import read_sae

    make_sae(root / architecture, architecture, **({"k": 5} if architecture == "topk" else {}))
    sae = read_sae(str(root / architecture))
    module = make_guardrail(sae, [], threshold=0.0, strength=9.0)
    resid = torch.randn(2, 3, WIDTH)
    assert torch.equal(module(resid, torch.ones(2, 3, dtype=torch.bool)), resid)


def test_any_bytes_as_a_checkpoint(root):
    import hashlib

    from dsg_cli.workspace.checkpoints import MAGIC, Checkpoint, read_entries

    path = root / "x.checkpoint"
    made = Checkpoint(path)
    made.keep("pass", {"n": 1, "squares": torch.arange(4.0)})
    made.write()
    read_entries(path)
    whole = path.read_bytes()
    content = whole.partition(b"\n")[2]

    def sealed(inner):
        return MAGIC + hashlib.sha256(inner).hexdigest().encode() + b"\n" + inner

    def shaped(metadata):
        header = json.dumps({"__metadata__": metadata}).encode()
        return sealed(len(header).to_bytes(8, "little") + header)

    entries = st.builds(lambda value: shaped({"entries": json.dumps(value)}), VALUES)

    @tries(150)
    @given(st.binary(max_size=60) | mutated(whole) | mutated(content).map(sealed) | entries | VALUES.map(shaped))
    @example(shaped({"entries": "[" * 100_000}))
    @example(sealed((200_000).to_bytes(8, "little") + b"[" * 200_000))
    def check(written):
        path.write_bytes(written)
        refused(read_entries, path)

    check()


def test_any_configuration_of_an_sae(root, model):
    from dsg_cli.models.sae import check_fits, read_sae

    make_sae(root / "sae")
    config = root / "sae" / "cfg.json"
    valid = config.read_bytes()
    data = json.loads(valid)
    keys = ("hf_hook_name", "model_from_pretrained_kwargs", "activation_fn", "k", "reshape_activations", "d_out")
    data["metadata"] |= {"model_from_pretrained_kwargs": {}, "model_name": "gpt2"}
    assert read_sae(str(root / "sae"))

    def check(content):
        config.write_bytes(content)
        sae = refused(read_sae, str(root / "sae"))
        if sae is not None:
            refused(check_fits, sae, model.config, "x")

    for architecture in ("topk", "jumprelu_transcoder", "standard"):
        for key, value in itertools.product(("d_in", "d_sae", "k"), ("x", None, -1, 10**30, 2.0, [])):
            check(json.dumps(data | {"architecture": architecture, "k": 4, key: value}).encode())
    check(DEEP)
    check(json.dumps(changed(data, ("metadata", "hook_name"), f"blocks.{'9' * 5000}.hook_resid_post")).encode())

    @tries(150)
    @given(st.data())
    def several(draw):
        spots = [*places(data), *((key,) for key in keys), *(("metadata", key) for key in keys)]
        value = draw.draw(VALUES)
        check(json.dumps(changed(data, draw.draw(st.sampled_from(spots)), value)).encode())
        check(draw.draw(mutated(valid) | st.binary(max_size=40)))

    several()


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_any_configuration_of_a_model(root, folders, dsg, monkeypatch, name):
    """`dsg select`, up to where the weights would be loaded."""
    from dsg_cli.stages import select as stage

    def stop(*_, **__):
        raise DsgError("It would be loaded now.")

    monkeypatch.setattr(stage, "load_model", stop)
    copy = root / name.partition(".")[0]
    shutil.copytree(folders["model"], copy)
    whole = (copy / name).read_bytes()
    data = json.loads(whole)
    spots = [path for path in places(data) if path[:2] != ("model", "vocab")]
    corpora = ("--forget", folders["forget.jsonl"], "--retain", folders["retain.jsonl"])

    def check(content):
        (copy / name).write_bytes(content)
        code, _, err = dsg("select", "--model", copy, "--sae", folders["sae"], *corpora, "-n", 4)
        assert code == 1 and "Traceback" not in err
        return err

    assert "It would be loaded now" in check(whole)
    check(DEEP)

    @tries(15)
    @given(st.data())
    def several(draw):
        if draw.draw(st.booleans()):
            check(draw.draw(mutated(whole) | st.binary(max_size=30)))
        else:
            check(json.dumps(changed(data, draw.draw(st.sampled_from(spots)), draw.draw(VALUES))).encode())

    several()
