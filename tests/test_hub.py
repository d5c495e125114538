"""Models by their names on a hub, and everything that can go wrong on the way; a loopback hub serves them."""

import json

import pytest
from conftest import python
from dsg_cli.hub import hub_errors, parse_address
from loopback import LoopbackHub

from dsg_cli.errors import DsgError
from dsg_cli.lab import data as lab

SELECT = ("select", "--forget", "lab-hexes", "--retain", "lab-retain", "--sae", "lab", "-n", "8", "--limit", "80")


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def hub(tmp_path):
    with LoopbackHub(tmp_path / "hub") as hub:
        yield hub


SEVERAL = """
import contextlib, io, json, sys
from dsg_cli.cli.app import main
done = []
for command in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(command)
        except SystemExit as stop:
            done.append((stop.code or 0, out.getvalue(), err.getvalue()))
print(json.dumps(done))
"""


def run(environment, folder, *commands):
    """Several commands in one process, which reads the hub's address when it starts: (code, stdout, stderr) of each."""
    done = python("-c", SEVERAL, json.dumps(commands), env=environment, cwd=folder)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_model_by_its_name_is_pinned_and_then_found_offline(hub, tmp_path):
    unneeded = {"pytorch_model.bin": b"x", "onnx/model.onnx": b"x", "consolidated.safetensors": b"x"}
    commit = hub.add("models", "acme/lab-model", files_of(lab.MODEL_DIR) | unneeded)
    environment = hub.environment(tmp_path / "cache")
    ((code, out, err),) = run(environment, tmp_path, (*SELECT, "--model", "acme/lab-model", "--json"))
    assert code == 0, err
    assert json.loads(out)["model"]["source"] == f"acme/lab-model@{commit}"
    asked = "\n".join(hub.requests)
    assert "model.safetensors" in asked and not any(name in asked for name in ("bin", "onnx", "consolidated"))
    hub.add("models", "acme/lab-model", {"README.md": b"# A later commit"})
    environment["HF_HUB_OFFLINE"] = "1"
    *chain, missing = run(
        environment,
        tmp_path,
        ("calibrate",),
        ("apply", "--export", "exported"),
        ("generate", "The hex", "--max-new-tokens", "3"),
        (*SELECT, "--model", "acme/other"),
    )
    assert [code for code, _, _ in chain] == [0, 0, 0], chain
    assert (tmp_path / "exported" / "config.json").is_file()
    assert missing[0] == 1 and "acme/other is not in the local cache" in missing[2]


WRONG = {
    "acme/nothing": "There is no repository acme/nothing",
    "acme/gated": "is gated, and this account has no access",
    "acme/empty": "has no config.json",
    "acme/empty@v2": "no such revision",
    "nothing": "No model folder at nothing",
}


def test_names_that_lead_nowhere(hub, tmp_path):
    hub.add("models", "acme/empty", {"README.md": b"#"})
    hub.add("models", "acme/gated", {"config.json": b"{}"})
    hub.gated.add("acme/gated")
    found = run(hub.environment(tmp_path / "cache"), tmp_path, *((*SELECT, "--model", name) for name in WRONG))
    for (code, out, err), words in zip(found, WRONG.values(), strict=True):
        assert code == 1 and words in err and not out


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("hf://org/name", ("org/name", None, None)),
        ("hf://org/na.me-1@v1.0", ("org/na.me-1", "v1.0", None)),
        ("hf://org/name@abc/guardrail-2.safetensors", ("org/name", "abc", "guardrail-2.safetensors")),
        ("hf://org/name/x.safetensors", ("org/name", None, "x.safetensors")),
    ],
)
def test_addresses(text, parts):
    address = parse_address(text)
    assert (address.repo, address.revision, address.file) == parts and str(address) == text


@pytest.mark.parametrize("text", ["hf://name", "hf://org/name/../x", "hf://org/name@", "http://org/name"])
def test_what_is_no_address(text):
    with pytest.raises(DsgError, match="no address on the hub"):
        parse_address(text)


@pytest.mark.parametrize("client", ["httpx2", "requests"])
def test_whatever_client_the_hub_has_no_network_is_one_error(client):
    module = pytest.importorskip(client)
    raised = module.ConnectError("no name") if client == "httpx2" else module.ConnectionError("no name")
    with pytest.raises(DsgError, match="The hub cannot be reached: no name"), hub_errors("org/name"):
        raise raised
