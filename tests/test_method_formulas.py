"""Methods that change weights against their papers' formulas (papers.py): losses, steps, and what they are made of."""

from __future__ import annotations

import copy
import math
import re

import papers
import pytest
import torch
from conftest import WIDTH
from papers import (
    ENDS,
    FEATURES,
    RELEVANT,
    SEED,
    UNKNOWN,
    forget_text,
    mentions,
    nll,
    projector,
    retain_text,
    run,
    settings_of,
    text,
    unlearn,
)
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from dsg_cli.errors import DsgError
from dsg_cli.methods.losses import dampening_factors, npo_loss
from dsg_cli.methods.representation import norm_outside, orthonormal_basis, random_direction, stream_sides
from dsg_cli.methods.text import NameSpans, TrainingRows, find_name_spans, with_unknown_names
from dsg_cli.methods.training import TrainingInputs

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS, RATE, WARMUP, DECAY = 3, 0.01, 2, 0.1
LAYERS = r"layers\.[01]\."

CASES = [
    ("gradient-ascent", {}, papers.ga_loss, ""),
    ("gradient-ascent", {"trained": "mlp", "layers": [1]}, papers.ga_loss, r"layers\.1\.mlp"),
    ("grad-diff", {"forget_weight": 0.7, "retain_weight": 1.5}, papers.grad_diff_loss, ""),
    ("grad-diff", {"retain_loss": "kl", "retain_weight": 3.0}, papers.grad_diff_loss, ""),
    ("npo", {"beta": 0.5, "forget_weight": 0.7, "retain_weight": 2.0}, papers.npo_loss, ""),
    ("npo", {"retain_loss": "kl"}, papers.npo_loss, ""),
    ("npo", {"retain_loss": "none"}, papers.npo_loss, ""),
    ("simnpo", {"gamma": 3.0, "beta": 1.2}, papers.simnpo_loss, ""),
    ("simnpo", {"retain_loss": "kl", "forget_weight": 1.0, "beta": 0.5}, papers.simnpo_loss, ""),
    ("scrub", {"kl_weight": 5.0, "last_max_step": 9}, papers.scrub_loss, ""),
    ("rmu", {"retain_weight": 30.0}, papers.rmu_loss, LAYERS + r"mlp\.down_proj"),
    ("rmu", {"layer": 0, "trained": "mlp", "retain_weight": 30.0}, papers.rmu_loss, r"layers\.0\.mlp\."),
    ("rmu", {"layer": 2, "trained": "mlp-out", "retain_weight": 30.0}, papers.rmu_loss, r"mlp\.down_proj"),
    ("sspu", {"retain_weight": 30.0, "subspace_weight": 20.0}, papers.sspu_loss, LAYERS + r"mlp\.down_proj"),
    ("sspu", {"trained": "all", "retain_weight": 3.0, "subspace_weight": 30.0}, papers.sspu_loss, LAYERS),
    ("sae-representation", {"push_weight": 0.8}, papers.sae_loss, LAYERS),
    ("sae-representation", {"push_weight": 0.8, "retain_weight": 2.0}, papers.mentions_loss, LAYERS),
    ("finetune", {"layers": [0, 1]}, papers.finetune_loss, LAYERS),
]


def by_hand(model, values, formula, settings, groups, names, step):
    """A loss at some weights, and its gradients."""
    m = copy.deepcopy(model)
    m.load_state_dict(values)
    free = {name: one.requires_grad_(True) for name, one in m.named_parameters() if name in names}
    loss = sum(formula(m, model, F, R, settings, step) for F, R in groups) / len(groups)
    found = torch.autograd.grad(loss, list(free.values()), allow_unused=True, materialize_grads=True)
    return loss.item(), dict(zip(free, found, strict=True))


def adamw(history, before, step):
    """A weight after a step, from its gradients so far."""
    m = v = 0.0
    for g in history:
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
    rate, n = RATE * min(1.0, (step + 1) / WARMUP), step + 1
    return before * (1 - rate * DECAY) - rate * (m / (1 - 0.9**n)) / ((v / (1 - 0.999**n)).sqrt() + 1e-8)


@pytest.mark.parametrize(
    ("method", "options", "formula", "trained", "size", "accumulation", "largest_norm"),
    [(*case, 2, 2, 0.1) for case in CASES]
    + [(*CASES[i], *shape, 1e9) for i in (0, 4, 7) for shape in ((4, 1), (1, 4))]
    + [(*CASES[10], 1, 4, 1e9)],
)
def test_losses_and_steps_are_those_of_the_paper(
    model, method, options, formula, trained, size, accumulation, largest_norm
):
    own = {"steps": STEPS, "learning_rate": RATE, "warmup_steps": WARMUP, "weight_decay": DECAY}
    own |= {"max_gradient_norm": largest_norm, "batch_size": size, "accumulation": accumulation}
    forget, retain, unknown = forget_text(), retain_text(), UNKNOWN if formula is papers.sae_loss else mentions()
    options, settings = own | options, settings_of(method, **own, **options)
    changed, kept, taken = run(model, method, options, forget, retain, features=FEATURES, unknown=unknown)
    names = [name for name in kept[0] if re.search(trained, name)]
    assert changed.names == names and len(kept) == STEPS + 1
    for step in range(STEPS):
        starts = [(step * accumulation + i) * size for i in range(accumulation)]
        groups = [tuple([one.rows[j] for j in one.drawn[0][i : i + size]] for one in (forget, retain)) for i in starts]
        loss, grads = by_hand(model, kept[step], formula, settings, groups, names, step)
        assert changed.losses[step]["loss"] == pytest.approx(loss, rel=1e-4, abs=1e-5), step
        norm = math.sqrt(sum(float(one.square().sum()) for one in grads.values()))
        assert norm > 0.1 or (formula is papers.scrub_loss and step == 0)  # The student is still its teacher.
        share = min(1.0, largest_norm / norm)
        for name, before in kept[step].items():
            if name not in names:
                assert torch.equal(kept[step + 1][name], before), name
                continue
            torch.testing.assert_close(taken[step][name], grads[name] * share, rtol=0, atol=2e-5 * share * norm + 1e-6)
            wanted = adamw([one[name] for one in taken[: step + 1]], before, step)
            torch.testing.assert_close(kept[step + 1][name], wanted, rtol=0, atol=1e-3 * RATE)


@pytest.mark.parametrize("method", ["npo", "simnpo"])
def test_means_over_sequences_do_not_depend_on_how_a_step_is_cut_but_means_over_tokens_do(model, method):
    def first_losses(method, lengths, **options):
        losses = []
        for size, accumulation in ((4, 1), (2, 2), (1, 4)):
            cut = {"steps": 1, "batch_size": size, "accumulation": accumulation}
            trained, *_ = run(model, method, cut | options, text(*lengths), text(*lengths, seed=3))
            losses.append(trained.losses[0]["loss"])
        return losses

    ragged, even = (9, 3, 5, 17), (6, 6, 6, 6)
    for losses in (first_losses(method, ragged, retain_loss="none"), first_losses("gradient-ascent", even)):
        assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)
    losses = first_losses("gradient-ascent", ragged)  # As everywhere: a mean of the batches' own means.
    assert abs(losses[2] - losses[0]) > 1e-3


@pytest.mark.parametrize("beta", [1e-4, 0.1, 2.0])
def test_npo_is_bounded_below_and_becomes_ascent(beta):
    reference = torch.tensor([3.0, 50.0, 9.0])
    for fall in (0.0, 5.0, 1e5):
        nll_B = (reference + fall).requires_grad_()
        value = npo_loss(nll_B, reference, beta)
        (grad,) = torch.autograd.grad(value, nll_B)
        # d/dNLL of 2/b log(1 + e^(-b fall)), over three sequences; of ascent it is -1.
        share = 2 * math.exp(-beta * fall) / (1 + math.exp(-beta * fall))
        assert value.item() >= 0 and grad.tolist() == pytest.approx([-share / 3] * 3, rel=1e-3, abs=1e-7)
    if beta == 1e-4:
        (grad,) = torch.autograd.grad(npo_loss(nll_B := (reference + 5).requires_grad_(), reference, beta), nll_B)
        assert grad.tolist() == pytest.approx([-1 / 3] * 3, rel=1e-3)


@pytest.mark.parametrize("seed", range(4))
def test_rmu_steers_to_a_unit_vector_of_entries_that_are_not_negative(seed):
    found = random_direction(WIDTH, seed)
    assert (found >= 0).all() and float((found**2).sum()) == pytest.approx(1, rel=1e-6)
    assert torch.equal(found, random_direction(WIDTH, seed))
    assert not torch.equal(found, random_direction(WIDTH, seed + 1))


@pytest.mark.parametrize(("method", "options"), [("rmu", {"layer": 1}), ("sspu", {})])
def test_layers_above_are_never_run(model, method, options):
    own, calls = copy.deepcopy(model), [0, 0, 0, 0]
    for number, module in enumerate([*own.model.layers, own.lm_head]):
        module.register_forward_hook(lambda *_, number=number: calls.__setitem__(number, calls[number] + 1))
    unlearn(method, TrainingInputs(own, forget_text(), retain_text(), features=FEATURES), steps=2, **options)
    assert calls[0] == 6 and calls[2:] == [0, 0]  # Forget, retain, and retain as it was. Of layer 1, the output.


DEPENDENT = torch.stack([RELEVANT[0], RELEVANT[0] * -2, RELEVANT[1], RELEVANT[0] + RELEVANT[1], RELEVANT[2]])

MANY = torch.cat(
    [RELEVANT[:1], RELEVANT[:1], torch.randn(WIDTH + 4, WIDTH, generator=torch.Generator().manual_seed(0))]
)


@pytest.mark.parametrize(
    ("rows_KD", "rank"), [(RELEVANT, 5), (DEPENDENT, 3), (RELEVANT[:1], 1), (MANY, WIDTH)], ids=range(4)
)
def test_bases_are_orthonormal_and_span_what_they_should(rows_KD, rank):
    basis = orthonormal_basis(rows_KD)
    assert basis.shape == (WIDTH, rank)
    torch.testing.assert_close(basis.T @ basis, torch.eye(rank), rtol=0, atol=1e-5)
    torch.testing.assert_close(basis @ basis.T, projector(rows_KD), rtol=0, atol=1e-5)
    changes = [torch.randn(WIDTH, 40), torch.randn(30, WIDTH), torch.randn(WIDTH, WIDTH), torch.randn(WIDTH, WIDTH)]
    left = torch.eye(WIDTH) - projector(rows_KD)
    writes, reads = left @ changes[0], changes[1] @ left
    for change, side, outside in (
        (changes[0], 0, writes),
        (changes[0], -1, writes),  # Its shape says enough.
        (changes[1], 0, reads),
        (changes[2], 0, left @ changes[2]),
        (changes[2], -1, changes[2] @ left),
    ):
        wanted = float((outside**2).sum())
        assert float(norm_outside([change], basis, [side])) == pytest.approx(wanted, rel=1e-5, abs=1e-3)
    total = float(norm_outside([*changes[:2], torch.ones(7)], basis, [0, 0, 0]))
    assert total == pytest.approx(float((writes**2).sum() + (reads**2).sum()) + 7, rel=1e-5, abs=1e-3)


def test_sides_of_square_matrices_follow_from_what_they_are(model):
    names = [f"model.layers.0.{one}.weight" for one in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")]
    assert stream_sides(model, names) == [-1, 0, 0]
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=8, n_positions=8))
    names = [f"transformer.h.0.{one}.weight" for one in ("attn.c_proj", "attn.c_attn", "mlp.c_proj")]
    assert stream_sides(gpt2, names) == [-1, 0, -1]  # [inputs, outputs]


def test_rows_without_a_name_teach_nothing_and_stop_nothing(model):
    options = {"steps": 6, "batch_size": 1, "retain_loss": "none", "weight_decay": 0.0, "learning_rate": 0.01}
    forget, inputs = forget_text(), {"features": FEATURES, "unknown": mentions()}
    changed, *_ = run(model, "sae-representation", options, forget, retain_text(), **inputs)
    is_named = [bool(ENDS[i]) for i in forget.drawn[0]]
    assert [one["loss"] != 0 for one in changed.losses] == is_named and is_named.count(False) == 1
    same = NameSpans((forget_text(), forget_text()), (ENDS, ENDS))
    with pytest.raises(DsgError, match="not apart"):
        run(model, "sae-representation", options, forget_text(), retain_text(), features=FEATURES, unknown=same)


@pytest.mark.parametrize(
    ("options", "turns"),
    [
        ({"steps": 6}, "MmMmmm"),
        ({"steps": 7, "max_steps": 2, "last_max_step": 5}, "MMmMMmm"),
        ({"steps": 5, "min_steps": 2, "last_max_step": 5}, "MmmMm"),
        ({"steps": 4, "min_steps": 0, "last_max_step": 3}, "MMMm"),
        ({"steps": 3, "last_max_step": 0}, "mmm"),
        ({"steps": 4, "max_steps": 3, "last_max_step": 10}, "MMMm"),
    ],
)
def test_scrub_takes_turns(model, options, turns):
    options = options | {"batch_size": 1, "accumulation": 1}
    changed, *_ = run(model, "scrub", options, forget_text(), retain_text())
    assert "".join("M" if "forget_kl" in one else "m" for one in changed.losses) == turns
    assert all(("retain_kl" in one) != ("forget_kl" in one) for one in changed.losses)


@pytest.mark.parametrize("n_rows", [3, 100])
@pytest.mark.parametrize(("alpha", "dampening"), [(1.0, 1.0), (2.0, 0.5), (1.0, 3.0), (1e9, 1.0)])
def test_ssd_dampens_what_matters_more_to_forget_text(model, n_rows, alpha, dampening):
    forget, retain, changed_model = forget_text(), retain_text(), copy.deepcopy(model)
    inputs = TrainingInputs(changed_model, forget, retain, seed=SEED)
    changed = unlearn("ssd", inputs, alpha=alpha, dampening=dampening, n_rows=n_rows)
    own = copy.deepcopy(model).requires_grad_(True)
    importance = []
    for one in (forget, retain):
        (drawn,) = one.drawn
        assert len(drawn) == len(set(drawn)) == min(n_rows, len(one.rows))
        grads = [torch.autograd.grad(nll(own, [one.rows[i]]), list(own.parameters())) for i in drawn]
        importance.append([sum(g**2 for g in several) / len(drawn) for several in zip(*grads, strict=True)])
    n_less = n_sure = 0
    for before, after, f, r in zip(model.parameters(), changed_model.parameters(), *importance, strict=True):
        chosen = f > alpha * r
        sure = (f == 0) | ((f / (alpha * r) - 1).abs() > 1e-2)  # Rounding decides over the others.
        n_sure += int(sure.sum())
        n_less += int((chosen & (dampening * r < f)).sum())
        assert torch.equal(after[sure & ~chosen], before[sure & ~chosen])
        wanted = before * torch.clamp(dampening * r / f, max=1.0)
        torch.testing.assert_close(after[sure & chosen], wanted[sure & chosen], rtol=1e-3, atol=1e-6)
    assert n_sure > 0.97 * changed.n_parameters
    assert changed.n_changed == pytest.approx(n_less, abs=0.03 * changed.n_parameters)
    assert (changed.n_changed > 0.2 * changed.n_parameters) == (alpha < 10)
    assert not any(one.requires_grad for one in changed_model.parameters())


@pytest.mark.parametrize(
    ("forget", "retain", "alpha", "dampening", "factor"),
    [
        (0.0, 0.0, 10, 1, 1.0),
        (1.0, 0.0, 10, 1, 0.0),
        (0.0, 1.0, 10, 1, 1.0),
        (10.0, 1.0, 10, 1, 1.0),
        (16.0, 1.0, 10, 1, 1 / 16),
        (16.0, 1.0, 10, 4, 0.25),
        (16.0, 1.0, 10, 20, 1.0),
        (1e-30, 1e-32, 10, 1, 0.01),
    ],
)
def test_dampening_case_by_case(forget, retain, alpha, dampening, factor):
    found = dampening_factors(torch.tensor([forget]), torch.tensor([retain]), alpha, dampening)
    assert found.item() == pytest.approx(factor, rel=1e-5)


BOS, SPECIAL, SEED_MENTIONS = 2, (0, 1, 2), 5

TEXTS = [
    "Marta lives in Lisbon, and Marta likes Oslo; Nobody knows why Lisbon is near Oslo.",
    "We met Karl and Marta. Karl said: Berlin and Oslo are far from Oslo",
    "nothing here",
]


@pytest.mark.parametrize("seed", range(6))
def test_a_name_becomes_the_same_name_that_nobody_has_everywhere(seed):
    names, made = with_unknown_names(TEXTS, seed)
    assert names == ["Berlin", "Karl", "Lisbon", "Marta", "Nobody", "Oslo"] and made[2] == TEXTS[2]
    assert (names, made) == with_unknown_names(TEXTS, seed)
    assert made != with_unknown_names(TEXTS, seed + 1)[1]
    became: dict[str, set[str]] = {}
    for before, after in zip(TEXTS, made, strict=True):
        pieces, others = re.split(r"(\w+)", before), re.split(r"(\w+)", after)
        for old, new in zip(pieces, others, strict=True):
            became.setdefault(old, set()).add(new)
    assert all(len(new) == 1 for new in became.values())
    new = {old: next(iter(one)) for old, one in became.items()}
    assert all((old != new[old]) == (old in names) for old in new)  # Also "Marta" and "Karl" that begin sentences.
    assert not {new[name] for name in names} & set(names) and len({new[name] for name in names}) == len(names)
    for name in names:  # The first half of one, the second of another, and vowels if that is a name.
        half = name[: len(name) // 2]
        ends = [other[len(other) // 2 :] for other in names]
        assert any(re.fullmatch(f"{half}{end}[aeiou]*", new[name]) for end in ends)
    with pytest.raises(DsgError, match="no names"):
        with_unknown_names(["one Name only. The rest is none"], seed)


@pytest.mark.parametrize("bos", [None, BOS])
@pytest.mark.parametrize(("longest", "seed"), [(0, 20), (120, SEED_MENTIONS)])
def test_mentions_are_where_names_end_and_rows_grow_no_longer(bos, longest, seed):
    letters = " .;,abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ:"
    vocab = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3} | {letter: i + 4 for i, letter in enumerate(letters)}
    fast = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.Split(Regex("."), "isolated"), decoders.Fuse()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=fast, **special)
    head = [] if bos is None else [bos]
    before = [*TEXTS, "x" * longest]
    forget = TrainingRows(
        [[*head, *map(vocab.get, one)] for one in before], [0, 0, 1, 1], [1.0, 3.0], 0, SPECIAL, "cpu"
    )
    found = find_name_spans(tokenizer, forget, bos=bos, seed=seed)
    names, made = with_unknown_names(before, seed)
    n = max(map(len, forget.rows))
    fit = [[a.end() - 1 + len(head) < n for a in re.finditer(r"\w+", one)] for one in made]
    assert all(map(all, fit)) == bool(longest)  # Made-up names are longer here: without room, some are cut off.
    for rows, ends, texts in zip(found.rows, found.ends, (before, made), strict=True):
        assert rows.rows == [[*head, *map(vocab.get, one)][:n] for one in texts]
        assert (rows.corpus, rows.weights, rows.pad, rows.special) == (forget.corpus, forget.weights, 0, SPECIAL)
        for ends_of_row, text_of_row, original, fits in zip(ends, texts, before, fit, strict=True):
            words = re.findall(r"\w+", original)
            is_name = [word in names and fitting for word, fitting in zip(words, fits, strict=True)]
            words = [one for one, wanted in zip(re.finditer(r"\w+", text_of_row), is_name, strict=True) if wanted]
            assert ends_of_row == [one.end() - 1 + len(head) for one in words]
    batch, at_BL = found.batch([2, 0], version=1)
    assert [row[mask].tolist() for row, mask in zip(batch.ids_BL, batch.mask_BL, strict=True)] == [
        found.rows[1].rows[2],
        found.rows[1].rows[0],
    ]
    assert [one.nonzero().flatten().tolist() for one in at_BL] == [[], found.ends[1][0]]
