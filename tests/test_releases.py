"""SAEs by their names: releases of sae-lens, converted once, and folders on the hub."""

import errno
import json

import pytest
from conftest import WIDTH, make_sae
from dsg_cli.hub import hub_errors
from dsg_cli.releases import find_sae, locate_release
from dsg_cli.sae import read_sae
from loopback import LoopbackHub
from test_hub import SELECT, files_of, run

from dsg_cli import releases
from dsg_cli.errors import DsgError
from dsg_cli.lab import data as lab

NAME = "gemma-scope-2b-pt-res/layer_3/width_16k/average_l0_142"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DSG_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def pretend(monkeypatch, sae):
    """sae-lens gives this SAE for every name; what was asked for is returned."""
    import sae_lens

    asked = []
    monkeypatch.setattr(sae_lens.SAE, "from_pretrained", lambda *names, **_: asked.append(names) or sae)
    return asked


def test_a_release_is_converted_once(tmp_path, cache, monkeypatch):
    asked = pretend(monkeypatch, make_sae(tmp_path / "sae"))
    first, second = read_sae(NAME), read_sae(NAME)
    assert asked == [("gemma-scope-2b-pt-res", "layer_3/width_16k/average_l0_142")]
    assert first.identity == second.identity and first.identity.source == NAME and first.identity.width == WIDTH
    origin = json.loads((first.folder / "origin.json").read_text())
    assert origin["repository"] == "google/gemma-scope-2b-pt-res"
    assert first.folder.is_relative_to(cache)


def test_a_full_disk_leaves_nothing_half_written(tmp_path, cache, monkeypatch):
    sae = make_sae(tmp_path / "sae")
    pretend(monkeypatch, sae)

    def full(folder):
        (folder / "cfg.json").write_text("{}")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(sae, "save_model", full)
        with pytest.raises(DsgError, match=r"cannot be kept.*No space left.*\n.*DSG_CACHE"):
            read_sae(NAME)
    assert not [path for path in cache.rglob("*") if path.is_file()]
    assert read_sae(NAME).identity.width == WIDTH
    with pytest.raises(DsgError, match="no room on the disk for org/name"), hub_errors("org/name"):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OSError, match="another"), hub_errors("org/name"):
        raise OSError(errno.EIO, "another")


def test_another_process_that_was_faster_is_no_error(tmp_path, cache, monkeypatch):
    """Of two conversions at once, the second finds the folder of the first; a folder without origin is replaced."""
    sae = make_sae(tmp_path / "sae")
    pretend(monkeypatch, sae)
    folder = read_sae(NAME).folder
    save, first = sae.save_model, (folder / "origin.json").read_text()

    def slowly(partial):
        save(partial)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "origin.json").write_text(first)

    (folder / "origin.json").unlink()
    monkeypatch.setattr(sae, "save_model", slowly)
    assert read_sae(NAME).folder == folder
    (folder / "origin.json").unlink()
    monkeypatch.setattr(sae, "save_model", save)
    assert read_sae(NAME).folder == folder and (folder / "sae_weights.safetensors").is_file()


def test_what_sae_lens_cannot_read_is_said(cache, monkeypatch):
    import sae_lens

    def broken(*_names, **_options):
        raise KeyError("W_enc")

    monkeypatch.setattr(sae_lens.SAE, "from_pretrained", broken)
    with pytest.raises(DsgError, match=f"sae-lens cannot read {NAME}: 'W_enc'"):
        find_sae(NAME)


@pytest.mark.parametrize(
    ("source", "place"),
    [
        (NAME, ("google/gemma-scope-2b-pt-res", "layer_3/width_16k/average_l0_142")),
        ("llama_scope_lxr_8x/l8r_8x", ("fnlp/Llama3_1-8B-Base-LXR-8x", "Llama3_1-8B-Base-L8R-8x")),
        ("acme/saes", ("acme/saes", "")),
        ("acme/saes@v1/layer 3/a", ("acme/saes@v1", "layer 3/a")),
    ],
)
def test_where_a_name_leads(source, place):
    assert locate_release(source) == place
    assert len(releases.releases()) > 100


def test_an_sae_in_a_repository_is_pinned(tmp_path):
    with LoopbackHub(tmp_path / "hub") as hub:
        files = files_of(lab.SAE_DIRS["lab"])
        root = hub.add("models", "acme/sae", files)
        deep = hub.add("models", "acme/many", {f"a/one/{name}": content for name, content in files.items()})
        names = ("acme/sae", "acme/many/a/one", "acme/many/a/two", "acme/many", "acme/sae@nope")
        commands = [(*SELECT, "--model", "lab", "--json", "--sae", name) for name in names]
        found = run(hub.environment(tmp_path / "cache"), tmp_path, *commands)
    sources = [json.loads(out)["sae"]["source"] for code, out, _ in found[:2] if code == 0]
    assert sources == [f"acme/sae@{root}", f"acme/many@{deep}/a/one"], found
    refused = ("Did you mean a/one", "no SAE in its root", "no such revision")
    for (code, _, err), words in zip(found[2:], refused, strict=True):
        assert code == 1 and words in err, err
