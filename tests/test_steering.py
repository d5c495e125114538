"""Steering files: what they ask of which method, and one error with its line for whatever is wrong."""

from pathlib import Path

import pytest
from dsg_cli.methods.steering import LARGEST_FILE, check_same_sae, read_steering, steered_clamping
from dsg_cli.runtime.spec import NEVER
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from dsg_cli.errors import DsgError

HEAD = "latent_idx,hook_action,refuse_id,clamp_value,steering_coefficient,sae_id,sae_release,description\n"
CANONICAL = "layer_7/width_16k/canonical,gemma-scope-2b-pt-res-canonical"


@pytest.fixture
def read(tmp_path):
    def run(content):
        path = tmp_path / "steering.csv"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return read_steering(path)

    return run


def clamping(steering, **options):
    return steered_clamping(steering, steering.method, n_features=20000, **options)


def test_clamp_prime_with_a_coefficient_of_its_own_for_each_feature(read):
    found = read(
        HEAD
        + f'11766,clamp_prime,,,-300,{CANONICAL},"biology, and\nmore"\n'
        + f"9723.0,,,0.5,-150.5,{CANONICAL},\n\n"
        + f"4788,CLAMP,,,-3e1,{CANONICAL}\n"
    )
    assert found.method == "static-clamp" and [row.line for row in found.rows] == [3, 4, 6]
    made = clamping(found)
    assert (made.indices, made.coefficients) == ([11766, 9723, 4788], [-300.0, -150.5, -30.0])
    assert (made.above, made.clamp, made.detectors) == ([0.0] * 3, "each", [])


def test_conditional_in_another_order_of_columns_with_a_byte_order_mark(read):
    found = read(
        b"\xef\xbb\xbfmine, steering_coefficient ,clamp_value,latent_idx,hook_action\r\n1,-300,0.5,7,conditional\r\n"
        b"2,-200,1.5,8, conditional\r\n"
    )
    made = clamping(found)
    assert found.method == "conditional-clamp" and made.clamp == "each"
    assert (made.indices, made.coefficients, made.above) == ([7, 8], [-300.0, -200.0], [0.5, 1.5])
    assert check_same_sae(found, "any/thing") == []  # The file names none.


def test_refusal(read):
    found = read(HEAD + "7,refusal,15864,0.05,300,,,\n8,refusal,15864,0.1,300,,,\n")
    made = clamping(found)
    assert (made.indices, made.detectors, made.coefficients) == ([15864], [7, 8], [300.0])
    assert (made.above, made.clamp) == ([NEVER, 0.05, 0.1], "all")
    also = clamping(found, clamps_features=True)
    assert (also.indices, also.detectors, also.coefficients) == ([15864, 7, 8], [], [300.0, -300.0, -300.0])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "has no rows"),
        (HEAD, "has no rows"),
        ("latent_idx,steering_coefficient\n7,1\n", "line 1: there is no column hook_action"),
        ("latent_idx,latent_idx,hook_action,steering_coefficient\n", "line 1: the column latent_idx is there twice"),
        (HEAD + "7,clamp,,,-1,,,\n7,clamp,,,-2,,,\n", "line 3: the feature 7 is there twice"),
        (HEAD + "7,clamp,,,-1,,,\n8,conditional,,1,-2,,,\n", "line 3: .*actions of one kind"),
        (HEAD + "7,clmp,,,-1,,,\n", "line 2: there is no action 'clmp'.\nDid you mean clamp"),
        (HEAD + "7,clamp,,,nan,,,\n", "line 2: steering_coefficient must be a number"),
        (HEAD + "7,clamp,,,1e9,,,\n", "line 2: steering_coefficient must be a number"),
        (HEAD + "7,clamp\n", "line 2: steering_coefficient must be a number of sensible size, not ''"),
        (HEAD + "-7,clamp,,,1,,,\n", "line 2: latent_idx must be a feature's number"),
        (HEAD + "7.5,clamp,,,1,,,\n", "line 2: latent_idx must be a feature's number"),
        (HEAD + "7,conditional,,,1,,,\n", "line 2: clamp_value must be a number"),
        (HEAD + "7,conditional,,-1,1,,,\n", "line 2: clamp_value must be a number"),
        (HEAD + "7,refusal,,1,1,,,\n", "line 2: refuse_id must be a feature's number"),
        (HEAD + "7,refusal,9,1,1,,,\n8,refusal,10,1,1,,,\n", "line 3: another refuse_id"),
        (HEAD + "7,refusal,9,1,1,,,\n8,refusal,9,1,2,,,\n", "line 3: another refuse_id or steering_coefficient"),
        (HEAD + "7,clamp,,,1,a,b,\n8,clamp,,,1,c,b,\n", "line 3: .*a file is for one SAE"),
        (HEAD + "7,clamp,,,1,a,b,what,is,this\n", "line 2: there are more values than columns"),
        (HEAD + '7,clamp,,,1,a,b,"never\nended\n', "this is no CSV"),
        (HEAD.encode() + b"7,clamp,,,1,,,\n8,clamp,,,1,,,\xff\n", "line 3: this is not UTF-8"),
        (b"x" * (LARGEST_FILE + 1), "is larger than"),
    ],
)
def test_what_is_wrong_is_one_error_with_its_line(read, content, words):
    with pytest.raises(DsgError, match=words):
        read(content)


@pytest.mark.parametrize("name", ["nothing.csv", "", "x" * 5000, "a\0b"])
def test_a_file_that_is_not_there(name):
    with pytest.raises(DsgError, match="There is no steering file"):
        read_steering(Path(name))


def test_features_and_methods_that_do_not_fit(read):
    found = read(HEAD + "7,clamp,,,1,,,\n99,clamp,,,1,,,\n")
    with pytest.raises(DsgError, match="line 3: the SAE has 48 features; no 99"):
        steered_clamping(found, "static-clamp", n_features=48)
    with pytest.raises(DsgError, match="those of static-clamp, not of refusal-clamp"):
        steered_clamping(found, "refusal-clamp", n_features=200)
    refusal = read(HEAD + "7,refusal,99,1,1,,,\n")
    with pytest.raises(DsgError, match="no 99"):
        steered_clamping(refusal, "refusal-clamp", n_features=48)
    with pytest.raises(DsgError, match="is one of those"):
        clamping(read(HEAD + "7,refusal,7,1,1,,,\n"))


def test_the_sae_that_it_names_is_that_of_the_features(read):
    found = read(HEAD + f"7,clamp,,,1,{CANONICAL},\n")
    assert check_same_sae(found, "gemma-scope-2b-pt-res-canonical/layer_7/width_16k/canonical") == []
    assert check_same_sae(found, "gemma-scope-2b-pt-res/layer_7/width_16k/average_l0_69") == []  # The same weights.
    for other in (
        "gemma-scope-2b-pt-res-canonical/layer_8/width_16k/canonical",
        "gpt2-small-res-jb/blocks.7.hook_resid_pre",
    ):
        with pytest.raises(DsgError, match="the features are of"):
            check_same_sae(found, other)
    for elsewhere in ("lab", "/home/someone/sae"):
        (note,) = check_same_sae(found, elsewhere)
        assert "cannot be told" in note
    named = read(HEAD + "7,clamp,,,1,layer_7/width_16k/canonical,,\n")
    assert check_same_sae(named, "gemma-scope-2b-pt-res-canonical/layer_7/width_16k/canonical") == []
    with pytest.raises(DsgError, match="the features are of"):
        check_same_sae(named, "gemma-scope-2b-pt-res-canonical/layer_8/width_16k/canonical")


CELLS = st.sampled_from(["7", "8", "clamp", "refusal", "conditional", "", "-1", "1e400", "0.5", "x", '"', "\x00", "é"])
LINES = st.lists(st.lists(CELLS, max_size=9).map(",".join), max_size=5).map(
    lambda lines: (HEAD + "\n".join(lines)).encode()
)


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.binary(max_size=200) | st.text(max_size=80).map(lambda text: (HEAD + text).encode(errors="replace")) | LINES)
@example(HEAD.encode() + b"7" * 200_000)
@example(HEAD.encode() + b"\r7,clamp,,,1\r")
@example(HEAD.encode() + b"7,clamp,,,1+1e-,,,")
def test_any_bytes_are_a_clamp_or_one_error(read, content):
    try:
        found = read(content)
    except DsgError as error:
        assert len(str(error).splitlines()) <= 3 and len(str(error)) < 600
    else:
        assert found.rows and len({row.index for row in found.rows}) == len(found.rows)
