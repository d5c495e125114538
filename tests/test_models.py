"""Cut models, fingerprints and the hook site."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from conftest import LAYER, refuses
from safetensors.torch import load_file, save_file

from dsg_cli.errors import DsgError
from dsg_cli.guardrail.runtime.sites import HookSite, decoder_layers, fingerprint, parse_hook_site
from dsg_cli.models.language_model import load_model, read_config
from dsg_cli.models.residuals import read_residual


def test_a_cut_model_gives_the_same_residuals_bit_for_bit(folders, model):
    cut = load_model(str(folders["model"]), last_layer=LAYER)
    assert len(decoder_layers(cut.model)) == LAYER + 1 and cut.n_layers == 3
    ids = torch.tensor([[2, 5, 6, 7], [2, 9, 0, 0]])
    mask = ids != 0
    site = HookSite(LAYER, "resid_post")
    whole = read_residual(model, site, ids, mask)
    assert torch.equal(read_residual(cut.model, site, ids, mask), whole)


def test_fingerprint_of_cut_whole_and_half_precision_agree(folders, model):
    source = str(folders["model"])
    whole = fingerprint(model, LAYER)
    assert fingerprint(load_model(source, last_layer=LAYER).model, LAYER) == whole
    assert fingerprint(load_model(source, dtype="bfloat16").model, LAYER) == whole
    assert fingerprint(model, LAYER + 1) != whole


def rewritten(folders, to, change):
    """A copy of the model whose tensors were changed by hand."""
    shutil.copytree(folders["model"], to)
    weights = load_file(to / "model.safetensors")
    change(weights)
    save_file(weights, to / "model.safetensors", metadata={"format": "pt"})
    return str(to)


@pytest.mark.parametrize(("name", "is_same"), [("model.layers.1.mlp.up_proj.weight", False), ("lm_head.weight", True)])
def test_fingerprint_covers_the_layers_up_to_the_hook(folders, model, tmp_path, name, is_same):
    doubled = rewritten(folders, tmp_path / "model", lambda weights: weights.update({name: weights[name] * 2}))
    assert (fingerprint(load_model(doubled).model, LAYER) == fingerprint(model, LAYER)) is is_same


def test_hook_names():
    assert parse_hook_site("blocks.3.hook_resid_pre", where="x") == HookSite(3, "resid_pre")
    assert HookSite(3, "resid_pre").name == "blocks.3.hook_resid_pre"
    for name in (None, "", "blocks.3.ln2.hook_normalized", "blocks.x.hook_resid_post"):
        with pytest.raises(DsgError):
            parse_hook_site(name, where="x")


def test_wrong_folders_are_refused(tmp_path, folders):
    refuses("No model folder", read_config, str(tmp_path / "none"))
    refuses("has no config.json", read_config, str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such-thing"}))
    refuses("cannot be read", read_config, str(tmp_path))
    shutil.copytree(folders["model"], tmp_path / "short")
    (tmp_path / "short/model.safetensors").write_bytes(b"")
    refuses("cannot be loaded", load_model, str(tmp_path / "short"))


def test_weights_that_lack_a_tensor_are_refused(tmp_path, folders):
    short = rewritten(folders, tmp_path / "model", lambda weights: weights.pop("model.layers.0.mlp.up_proj.weight"))
    refuses(r"lack 1 tensors, among them model\.layers\.0", load_model, short)
