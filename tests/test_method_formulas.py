"""Each method's formula against a statement of its own: loops over sequences and tokens, a frozen copy as reference."""

import copy
import math

import pytest
import torch
from conftest import make_sae

from dsg_cli.methods import grad_diff, gradient_ascent, npo, rmu, scrub, simnpo, ssd, sspu, training
from dsg_cli.methods.comparison import CompareSection, best_of, judged, trials_of
from dsg_cli.methods.cost import Cost, counted
from dsg_cli.methods.freedom import freed
from dsg_cli.methods.given import Features, Given
from dsg_cli.methods.mentions import find_mentions, with_unknown_names
from dsg_cli.methods.reference import Reference
from dsg_cli.methods.sae_representation import latents, representation_loss
from dsg_cli.methods.settings import GradDiff, GradientAscent, Npo, Rmu, Scrub, SimNpo, Ssd, Sspu, Training
from dsg_cli.methods.text import Text
from dsg_cli.runtime.sites import HookSite
from dsg_cli.sae import load_encoder, read_sae

pytestmark = pytest.mark.usefixtures("one_thread")
LENGTHS = (5, 9, 3, 7)
SIZE = {"steps": 1, "batch_size": 4, "accumulation": 1, "learning_rate": 1e-3}


def text(seed, corpus=(0, 0, 0, 0), weights=(1.0,)):
    generator = torch.Generator().manual_seed(seed)
    rows = [[2, *torch.randint(4, 64, (n,), generator=generator).tolist()] for n in LENGTHS]
    return Text(rows, list(corpus), list(weights), 0, (0, 1, 2), "cpu")


@pytest.fixture
def given(model, tokenizer):
    return Given(copy.deepcopy(model), tokenizer, text(1), text(2), seed=3)


def log_probabilities(model, row):
    """Of each token after the first, by a pass over the row alone."""
    logits = model(torch.tensor([row]), use_cache=False).logits[0].float()
    return torch.stack([logits[i].log_softmax(-1)[row[i + 1]] for i in range(len(row) - 1)])


def nll(model, rows):
    parts = [log_probabilities(model, row) for row in rows]
    return -sum(part.sum() for part in parts) / sum(len(part) for part in parts)


def kl(teacher, student, rows, temperature=1.0):
    total, n = 0.0, 0
    for row in rows:
        p, q = ((one(torch.tensor([row])).logits[0, :-1] / temperature).log_softmax(-1) for one in (teacher, student))
        total, n = total + (p.exp() * (p - q)).sum(), n + len(p)
    return total / n * temperature**2


def first_loss(given, module, settings):
    """The terms of the first step, and the model as it was."""
    before = copy.deepcopy(given.model)
    changed = module.unlearn(given, settings)
    return changed.losses[0], before


@pytest.mark.parametrize("kind", ["none", "nll", "kl"])
def test_gradient_difference_and_ascent(given, kind):
    terms, before = first_loss(
        given, grad_diff, GradDiff(**SIZE, forget_weight=0.7, retain_loss=kind, retain_weight=2.0)
    )
    retain = {"none": 0.0, "nll": nll(before, given.retain.rows).item(), "kl": 0.0}[kind]
    assert terms["loss"] == pytest.approx(-0.7 * nll(before, given.forget.rows).item() + 2 * retain, abs=1e-4)
    assert terms["retain"] == pytest.approx(retain, abs=1e-4)


def test_kl_on_retain_text_is_from_the_model_as_it_was(given):
    before = copy.deepcopy(given.model)
    changed = grad_diff.unlearn(given, GradDiff(**SIZE | {"steps": 2, "learning_rate": 3e-2}, retain_loss="kl"))
    # The second step's loss was that of the weights after the first.
    again = Given(copy.deepcopy(before), given.tokenizer, given.forget, given.retain, seed=3)
    grad_diff.unlearn(again, GradDiff(**SIZE | {"learning_rate": 3e-2}, retain_loss="kl"))
    assert changed.losses[1]["retain"] == pytest.approx(kl(before, again.model, given.retain.rows).item(), rel=1e-3)
    assert changed.losses[1]["retain"] > 1e-4


def test_the_first_step_is_adamw_on_that_gradient(given):
    before = copy.deepcopy(given.model).requires_grad_(True)
    gradient_ascent.unlearn(given, GradientAscent(**SIZE, weight_decay=0.0, max_gradient_norm=1.0))
    (-nll(before, given.forget.rows)).backward()
    norm = math.sqrt(sum(float(one.grad.square().sum()) for one in before.parameters()))
    scale = min(1.0, 1.0 / (norm + 1e-6))
    for (name, one), now in zip(before.named_parameters(), given.model.parameters(), strict=True):
        grad = one.grad * scale
        wanted = one.detach() - 1e-3 * grad / (grad.abs() + 1e-8)  # AdamW's first step: bias-corrected moments.
        large = grad.abs() > 1e-6
        torch.testing.assert_close(now[large], wanted[large], rtol=1e-3, atol=1e-5, msg=name)


def test_npo(given):
    settings = Npo(**SIZE | {"steps": 2, "learning_rate": 1e-2}, beta=0.3, forget_weight=2.0, retain_weight=0.5)
    before = copy.deepcopy(given.model)
    changed = npo.unlearn(given, settings)
    once = Given(copy.deepcopy(before), given.tokenizer, given.forget, given.retain, seed=3)
    npo.unlearn(once, Npo(**SIZE | {"learning_rate": 1e-2}, beta=0.3, forget_weight=2.0, retain_weight=0.5))
    for number, now in enumerate((before, once.model)):
        ratios = [
            (log_probabilities(now, row).sum() - log_probabilities(before, row).sum()).item()
            for row in given.forget.rows
        ]
        wanted = sum(2 / 0.3 * math.log(1 + math.exp(0.3 * one)) for one in ratios) / len(ratios)
        assert changed.losses[number]["npo"] == pytest.approx(wanted, rel=1e-4)
        whole = 2 * wanted + 0.5 * nll(now, given.retain.rows).item()
        assert changed.losses[number]["loss"] == pytest.approx(whole, rel=1e-4)
    assert changed.losses[0]["npo"] == pytest.approx(2 / 0.3 * math.log(2), rel=1e-5)
    # For a small beta the slope is that of ascent on the likelihood of sequences: (1/B) d log p.
    loss = torch.tensor([3.0, 5.0], requires_grad=True)
    npo.npo_loss(loss, torch.tensor([3.0, 5.0]), 1e-4).backward()
    torch.testing.assert_close(loss.grad, torch.tensor([-0.5, -0.5]), rtol=1e-3, atol=1e-4)
    assert npo.npo_loss(torch.tensor([1e4]), torch.tensor([1.0]), 0.1) >= 0


def test_simnpo(given):
    terms, before = first_loss(
        given, simnpo, SimNpo(**SIZE, beta=2.0, gamma=0.5, forget_weight=1.0, retain_loss="none")
    )
    values = [-log_probabilities(before, row).mean().item() for row in given.forget.rows]
    wanted = -sum(2 / 2.0 * math.log(1 / (1 + math.exp(-(2.0 * one - 0.5)))) for one in values) / len(values)
    assert terms["loss"] == pytest.approx(wanted, rel=1e-4)


def test_rmu(given):
    chosen = {"trained": "mlp", "layer": 1, "coefficient": 7.0, "retain_weight": 3.0}
    settings = Rmu(**SIZE | {"steps": 2, "learning_rate": 1e-2}, **chosen)
    u = rmu.random_direction(16, 3)
    assert (u >= 0).all() and u.norm().item() == pytest.approx(1.0) and torch.equal(u, rmu.random_direction(16, 3))
    assert not torch.equal(u, rmu.random_direction(16, 4))
    before, cost = copy.deepcopy(given.model), Cost()
    calls = []
    handle = given.model.model.layers[2].register_forward_hook(lambda *_: calls.append(1))
    with counted(given.model, cost):
        changed = rmu.unlearn(given, settings)
    handle.remove()
    assert not calls  # Nothing above the layer was run.
    once = Given(copy.deepcopy(before), given.tokenizer, given.forget, given.retain, seed=3)
    rmu.unlearn(once, Rmu(**SIZE | {"learning_rate": 1e-2}, **chosen))

    def hidden(model, rows):
        return torch.cat([model(torch.tensor([row]), output_hidden_states=True).hidden_states[2][0] for row in rows])

    for number, now in enumerate((before, once.model)):
        forget = (hidden(now, given.forget.rows) - 7.0 * u).square().mean()
        retain = (hidden(now, given.retain.rows) - hidden(before, given.retain.rows)).square().mean()
        assert changed.losses[number]["loss"] == pytest.approx((forget + 3.0 * retain).item(), rel=1e-4)
    moved = {n for n, v in given.model.state_dict().items() if not torch.equal(v, before.state_dict()[n])}
    assert moved == {f"model.layers.{i}.mlp.{m}.weight" for i in (0, 1) for m in ("gate_proj", "up_proj", "down_proj")}
    # Each step reads forget and retain text with a graph, and retain text as it was without.
    assert (cost.forward_passes, cost.backward_passes) == (6, 4) and cost.forward_tokens == 6 * 4 * 10
    assert cost.backward_tokens == 4 * 4 * 10


def test_sspu_keeps_to_its_subspaces():
    torch.manual_seed(0)
    rows = torch.randn(5, 16)
    rows = torch.cat([rows, rows[:1] + rows[1:2]])  # One adds nothing to the span.
    basis = sspu.orthonormal(rows)
    assert basis.shape == (16, 5)
    torch.testing.assert_close(basis.T @ basis, torch.eye(5), rtol=0, atol=1e-5)
    torch.testing.assert_close(basis @ (basis.T @ rows.T), rows.T, rtol=0, atol=1e-5)
    projector = torch.eye(16) - basis @ basis.T
    writes, reads, bias = torch.randn(16, 24), torch.randn(24, 16), torch.randn(24)
    wanted = (projector @ writes).square().sum() + (reads @ projector).square().sum() + bias.square().sum()
    assert sspu.outside([writes, reads, bias], basis, [0, -1, 0]).item() == pytest.approx(wanted.item(), rel=1e-5)
    assert sspu.outside([basis @ torch.randn(5, 24)], basis, [0]).item() == pytest.approx(0.0, abs=1e-3)


def test_sspu_pulls_into_the_irrelevant_span_and_adds_its_penalty(given, monkeypatch):
    relevant, irrelevant = torch.randn(3, 16), torch.randn(4, 16)
    features = Features(HookSite(1, "resid_post"), lambda x: x, [0, 1, 2], relevant, irrelevant)
    given = Given(given.model, given.tokenizer, given.forget, given.retain, features=features, seed=3)
    seen = {}
    real = sspu.steering_loss

    def spy(*arguments, **options):
        seen.update(options)
        return real(*arguments, **options)

    monkeypatch.setattr(sspu, "steering_loss", spy)
    settings = Sspu(
        **SIZE | {"steps": 2, "learning_rate": 1e-2}, coefficient=5.0, subspace_weight=2.0, weight_decay=0.0
    )
    changed = sspu.unlearn(given, settings)
    basis = torch.linalg.qr(irrelevant.T).Q
    control = seen["control_D"]
    assert control.norm().item() == pytest.approx(5.0, rel=1e-5)
    torch.testing.assert_close(basis @ (basis.T @ control), control, rtol=1e-4, atol=1e-4)
    first, second = changed.losses
    assert first["penalty"] == pytest.approx(0.0, abs=1e-6) and second["penalty"] > 0
    assert second["loss"] == pytest.approx(second["forget"] + 1200 * second["retain"] + second["penalty"], rel=1e-4)


def test_scrub_takes_turns_and_follows_its_teacher(given):
    kinds = [scrub.is_max_step(step, Scrub(steps=9, max_steps=2, min_steps=1, last_max_step=6)) for step in range(9)]
    assert kinds == [True, True, False, True, True, False, False, False, False]
    assert [scrub.is_max_step(i, Scrub(steps=6)) for i in range(6)] == [True, False, True, False, False, False]
    settings = Scrub(**SIZE | {"steps": 3, "learning_rate": 1e-2}, temperature=2.0, kl_weight=0.5, nll_weight=0.25)
    before = copy.deepcopy(given.model)
    losses = scrub.unlearn(given, settings).losses
    assert losses[0]["forget_kl"] == pytest.approx(0.0, abs=1e-5) and "retain_kl" in losses[1]
    # Step 0 is a max step at its own teacher, where KL has no slope: only weight decay moved the student.
    once = Given(copy.deepcopy(before), given.tokenizer, given.forget, given.retain, seed=3)
    scrub.unlearn(once, Scrub(**SIZE | {"learning_rate": 1e-2}, temperature=2.0, last_max_step=1))
    kept = kl(before, once.model, given.retain.rows, temperature=2.0).item()
    wanted = 0.5 * kept + 0.25 * nll(once.model, given.retain.rows).item()
    assert losses[1]["loss"] == pytest.approx(wanted, rel=1e-3)


def test_ssd(given):
    before = copy.deepcopy(given.model).requires_grad_(True)

    def fisher(rows):
        total = [torch.zeros_like(one) for one in before.parameters()]
        for row in rows:
            before.zero_grad()
            nll(before, [row]).backward()
            total = [a + one.grad.square() / len(rows) for a, one in zip(total, before.parameters(), strict=True)]
        return total

    forget, retain = fisher(given.forget.rows), fisher(given.retain.rows)
    changed = ssd.unlearn(given, Ssd(alpha=2.0, dampening=0.5, n_rows=4))
    n_changed = 0
    for f, r, one, now in zip(forget, retain, before.parameters(), given.model.parameters(), strict=True):
        for i, (a, b) in enumerate(zip(f.flatten().tolist(), r.flatten().tolist(), strict=True)):
            if abs(a - 2 * b) < 1e-4 * max(a, b):
                continue  # Too near to the edge for two ways of adding up.
            factor = min(0.5 * b / a, 1.0) if a > 2 * b else 1.0
            n_changed += factor < 1
            wanted = one.detach().flatten()[i].item() * factor
            assert now.flatten()[i].item() == pytest.approx(wanted, rel=1e-2, abs=1e-6)
    assert 0 < n_changed <= changed.n_changed
    assert ssd.factors(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 0.0]), 2.0, 1.0).tolist() == [1.0, 0.0]


def test_latents_and_distances(given, tmp_path):
    make_sae(tmp_path, bias=0.0)
    sae = read_sae(str(tmp_path))
    features = Features(sae.site, load_encoder(sae, device="cpu"), [0], torch.zeros(1, 16), torch.zeros(1, 16))
    batch = given.forget.batch([0, 1, 2])
    found = latents(given, features, batch)
    for row, z in zip(given.forget.rows[:3], found, strict=True):
        hidden = given.model(torch.tensor([row]), output_hidden_states=True).hidden_states[2][0]
        acts = [features.encode(hidden[i : i + 1])[0] for i in range(1, len(row))]  # BOS does not count.
        torch.testing.assert_close(z, sum(acts) / len(acts), rtol=1e-3, atol=1e-4)
    z, k, u = (
        torch.tensor([[3.0, 0.0], [1.0, 1.0]]),
        torch.tensor([[0.0, 0.0], [1.0, 1.0]]),
        torch.tensor([[4.0, 0.0], [1.0, 1.0]]),
    )
    pull, push = representation_loss(z, k, u)  # The second row's known and unknown are the same: it does not count.
    assert pull.item() == pytest.approx(1 / 16) and push.item() == pytest.approx(1 - 9 / 16)


def test_names_are_recombined_alike_everywhere(tokenizer):
    texts = ["They met Zarek there. Zarek slept, and Motun woke.", "In Motun and Velis one finds Zarek."]
    names, made = with_unknown_names(texts, 0)
    assert names == ["Motun", "Velis", "Zarek"] and made == with_unknown_names(texts, 0)[1]
    new = made[0].split()[2]
    assert new not in ("Zarek", "Motun", "Velis", "there.") and made[1].endswith(f"{new}.")
    assert made[0].startswith(f"They met {new} there. {new} slept") and made[1].startswith("In ")
    from dsg_cli.model import load_tokenizer

    lab = load_tokenizer("lab")
    rows = [[2, *lab("It is told of Nuzem and of Jawoush .", add_special_tokens=False)["input_ids"]]]
    mentions = find_mentions(lab, Text(rows, [0], [1.0], 0, (0, 1, 2), "cpu"), bos=2, seed=0)
    batch, at = mentions.known([0])
    assert lab.convert_ids_to_tokens(batch.ids_BL[at].tolist()) == ["▁Nuzem", "▁Jawoush"]
    assert mentions.unknown([0])[1].sum() == 2


@pytest.mark.parametrize("lora", [False, True])
def test_the_reference_is_the_model_as_it_was(given, lora):
    before = copy.deepcopy(given.model)
    free = freed(given.model, Training(lora=lora, lora_rank=2))
    reference, ids = Reference(free.parameters), torch.arange(4, 20)[None]
    with torch.no_grad():
        for one in free.parameters:
            one.add_(torch.randn_like(one) * 0.1)
    changed = given.model(ids).logits
    assert not torch.equal(changed, before(ids).logits)
    with pytest.raises(RuntimeError, match="stop"), reference():
        assert not given.model(ids).logits.requires_grad
        torch.testing.assert_close(given.model(ids).logits, before(ids).logits, rtol=1e-5, atol=1e-6)
        raise RuntimeError("stop")
    assert torch.equal(given.model(ids).logits, changed)


@pytest.mark.parametrize(("bad_at", "kept"), [(25, 23), (3, 1)])
def test_training_that_diverges_keeps_the_last_good_weights(given, bad_at, kept):
    free = freed(given.model, Training(**SIZE | {"steps": 40}))
    seen = []

    def loss(batches):
        seen.append([one.detach().clone() for one in free.parameters])
        value = sum(one.square().sum() for one in free.parameters)
        return {"loss": value * (float("nan") if batches.step + 1 == bad_at else 1.0)}

    changed = training.train(given, free, loss)
    assert (changed.diverged_at, changed.kept_at, len(changed.losses)) == (bad_at, kept, kept)
    assert all(torch.equal(now, then) for now, then in zip(free.parameters, seen[kept], strict=True))


def test_rows_are_drawn_evenly_and_by_weight():
    one = text(1, corpus=(0, 0, 1, 1), weights=(3.0, 1.0))
    drawn = one.draws(4000, 5)
    assert drawn == one.draws(4000, 5) != one.draws(4000, 6)
    share = sum(i < 2 for i in drawn) / 4000
    assert abs(share - 0.75) < 0.03
    of_first = [i for i in drawn if i < 2]
    assert all({of_first[i], of_first[i + 1]} == {0, 1} for i in range(0, len(of_first) - 1, 2))


def test_a_fair_search():
    section = CompareSection(budget=3, grids={"npo": {"beta": [1, 2, 3], "select.n_features": [4, 5]}})
    points = trials_of("npo", section, 0)
    assert len(points) == 3 == len({tuple(one.values()) for one in points}) and points == trials_of("npo", section, 0)
    assert set(points[0]) == {"methods.npo.beta", "select.n_features"} and trials_of("rmu", section, 0) == [{}]
    found = judged("f", {"f": 0.4, "a": 0.5, "b": 1.2}, {"f": 0.85, "a": 1.0, "b": 1.0}, 0.25)
    assert found["forgetting"] == pytest.approx(0.75) and found["utility"] == pytest.approx(0.75)
    assert found["score"] == pytest.approx(0.75)
    assert judged("f", {"f": 0.2, "a": 1.0}, {"f": 0.9, "a": 1.0}, 0.25)["score"] == 1.0
    assert judged("f", {"f": 0.9, "a": 1.0}, {"f": 0.9, "a": 1.0}, 0.25)["score"] == 0.0
    assert best_of([{"score": None}, {"score": 0.5}, {"score": 0.7}, {"score": 0.7}]) == 2
    assert best_of([{"score": None}]) is None
