"""The stand-in hub answers the real clients as the hub does; each client is a process that knows only its URL."""

import json
import subprocess
import sys
from textwrap import dedent

from loopback import LoopbackHub

PUSH = """
    import pytest
    from pathlib import Path
    from huggingface_hub import HfApi, HfFileSystem, errors, hf_hub_download, snapshot_download

    def refused(error, status, call, *args, **kwargs):
        with pytest.raises(error) as raised:
            call(*args, **kwargs)
        assert (raised.type, raised.value.response.status_code) == (error, status)

    api, name = HfApi(), "sub/weights é.bin"
    whole = Path("upload", name).read_bytes()
    assert api.create_repo("org/pushed", private=True).repo_id == "org/pushed"
    assert api.create_repo("org/pushed", exist_ok=True).repo_id == "org/pushed"
    first = api.upload_folder(repo_id="org/pushed", folder_path="upload")
    assert api.upload_folder(repo_id="org/pushed", folder_path="upload").oid == first.oid
    info = api.model_info("org/pushed", revision=first.oid, files_metadata=True)
    assert info.private and {file.rfilename: file.size for file in info.siblings} == {"README.md": 21, name: 307200}
    assert Path(hf_hub_download("org/pushed", name)).read_bytes() == whole
    for revision in ("main", first.oid):
        saved = Path(snapshot_download("org/pushed", revision=revision, local_dir=revision))
        assert (saved / name).read_bytes() == whole and (saved / "README.md").exists()
    assert [entry.path for entry in api.list_repo_tree("org/pushed", expand=True)] == ["sub", "README.md"]
    assert [entry.path for entry in api.get_paths_info("org/pushed", [name, "none"])] == [name]
    assert HfFileSystem().cat_file(f"org/pushed/{name}", start=1000, end=2000) == whole[1000:2000]
    refused(errors.HfHubHTTPError, 401, api.create_repo, "org/other", token=False)
    refused(errors.HfHubHTTPError, 401, api.delete_file, "README.md", "org/pushed", token=False)
    assert api.delete_file("README.md", "org/pushed").oid != first.oid
    assert api.list_repo_files("org/pushed") == [name]
    refused(errors.RemoteEntryNotFoundError, 404, hf_hub_download, "org/pushed", "README.md")
    for call in (lambda repo, **kw: hf_hub_download(repo, "a.json", **kw), snapshot_download, api.model_info):
        refused(errors.RevisionNotFoundError, 404, call, "org/pushed", revision="v2")
        refused(errors.RepositoryNotFoundError, 404, call, "org/missing")
        refused(errors.GatedRepoError, 403, call, "org/locked")
"""
LOAD = """
    import torch
    from datasets import load_dataset
    from huggingface_hub import HfApi
    from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

    lines, shard = load_dataset("org/lines", split="train"), "data/train-00000-of-00001.parquet"
    assert len(lines) == 50 and lines[3] == {"text": "line 3", "label": 1}
    lines.to_parquet(f"table/{shard}")
    HfApi().create_repo("org/table", repo_type="dataset")
    HfApi().upload_folder(repo_id="org/table", folder_path="table", repo_type="dataset")
    assert load_dataset("org/table", split="train").to_list() == lines.to_list()
    assert next(iter(load_dataset("org/table", split="train", streaming=True))) == lines[0]
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=64, **size))
    model.save_pretrained("tiny", push_to_hub=True, repo_id="org/tiny")
    assert AutoConfig.from_pretrained("org/tiny").hidden_size == 16
    loaded = AutoModelForCausalLM.from_pretrained("org/tiny").state_dict()
    assert all(torch.equal(weights, loaded[name]) for name, weights in model.state_dict().items())
"""


def run(hub, folder, code):
    """The endpoint is read at import, so a client needs a process of its own."""
    command, child = [sys.executable, "-c", dedent(code)], hub.environment(folder / "cache")
    done = subprocess.run(command, env=child, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_is_pushed_comes_back_and_each_refusal_has_its_own_error(tmp_path):
    (tmp_path / "upload" / "sub").mkdir(parents=True)
    (tmp_path / "upload" / "README.md").write_text("---\nlicense: mit\n---\n")
    (tmp_path / "upload" / "sub" / "weights é.bin").write_bytes(bytes(range(256)) * 1200)
    with LoopbackHub(tmp_path / "hub") as hub:
        hub.add("models", "org/locked", {"a.json": b"{}"})
        hub.gated.add("org/locked")
        run(hub, tmp_path, PUSH)
    assert hub.requests.count("POST /api/models/org/pushed/commit/main") == 3  # Upload, unsigned and signed deletion.


def test_datasets_and_transformers_load_what_was_pushed(tmp_path):
    rows = [json.dumps({"text": f"line {i}", "label": i % 2}) for i in range(50)]
    with LoopbackHub(tmp_path / "hub") as hub:
        hub.add("datasets", "org/lines", {"train.jsonl": "\n".join(rows).encode()})
        run(hub, tmp_path, LOAD)
    assert "POST /api/models/org/tiny/commit/main" in hub.requests
