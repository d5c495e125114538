"""The training loop of methods that change weights: divergence, resuming, order of text, cost; and how they compare."""

import copy
import itertools
import math
from collections import Counter

import pytest
import torch
from dsg_cli.checkpoints import Checkpoint
from dsg_cli.methods.comparison import CompareSection, best_of, judged, trials_of
from dsg_cli.methods.cost import Cost, counted
from dsg_cli.methods.freedom import freed
from dsg_cli.methods.given import Given
from dsg_cli.methods.reference import Reference
from dsg_cli.methods.settings import (
    Finetune,
    GradDiff,
    GradientAscent,
    Npo,
    Rmu,
    SaeRepresentation,
    Scrub,
    Ssd,
    Sspu,
    Training,
)
from papers import (
    BOS,
    FEATURES,
    SPECIAL,
    UNKNOWN,
    Watched,
    forget_text,
    nll,
    retain_text,
    run,
    text,
    weights,
)

from dsg_cli.errors import DsgError
from dsg_cli.methods import finetune, grad_diff, gradient_ascent, npo, rmu, sae_representation, scrub, ssd, sspu
from dsg_cli.methods.training import train

pytestmark = pytest.mark.usefixtures("one_thread")
ROW = [BOS, 5, 9, 4, 7]
UNUSED = 63


def short_text():
    """Without the last token of the vocabulary."""
    return Watched([[BOS, 4, 5, 6], [BOS, 7, 8], [BOS, 9, 10, 11, 12]], [0] * 3, [1.0], 0, SPECIAL, "cpu")


def same(one, other):
    return all(torch.equal(value, other[name]) for name, value in one.items()) and one.keys() == other.keys()


@pytest.mark.parametrize("lora", [False, True])
def test_a_reference_is_the_model_as_it_was(model, lora):
    own = copy.deepcopy(model)
    free = freed(own, Training(lora=lora))
    reference = Reference(free.parameters)
    with torch.no_grad():
        for one in free.parameters:
            one.add_(torch.randn_like(one))
    now = [one.detach().clone() for one in free.parameters]
    ids = torch.tensor([ROW])
    changed = own(ids).logits
    with reference():
        inside = own(ids).logits
    assert not inside.requires_grad and own(ids).logits.requires_grad
    torch.testing.assert_close(inside, model(ids).logits, rtol=0, atol=1e-6)
    assert not torch.allclose(changed, inside, atol=0.1)
    with pytest.raises(ZeroDivisionError), reference():
        1 / 0  # noqa: B018
    assert torch.is_grad_enabled() and torch.equal(own(ids).logits, changed)
    assert all(torch.equal(one, then) for one, then in zip(free.parameters, now, strict=True))
    (own(ids).logits ** 2).sum().backward()
    with reference():  # Gradients that were there stay.
        assert all(one.grad is not None for one in free.parameters)


def trained(model, breaks, steps, checkpoint=None, stop_after=None):
    """Ascent with a loss that `breaks(loss, own, step)`; what it says, the model, and the weights after each step."""
    own = copy.deepcopy(model)
    kept = [weights(own)]
    settings = Training(steps=steps, batch_size=2, accumulation=1, learning_rate=1e-3)

    def report(_what, done, _total):
        kept.append(weights(own))
        if done == stop_after:
            raise StopIteration

    def loss(batches):
        rows = [ids[mask].tolist() for ids, mask in zip(batches.forget.ids_BL, batches.forget.mask_BL, strict=True)]
        return {"loss": breaks(-nll(own, rows), own, batches.step)}

    given = Given(own, None, short_text(), short_text(), report=report, checkpoint=checkpoint or Checkpoint())
    try:
        return train(given, freed(own, settings), loss), own, kept
    except DsgError as error:
        return error, own, kept


def broken(kind, at):
    """What goes wrong at a step, from 1."""

    def breaks(loss, own, step):
        embeddings = own.get_input_embeddings().weight
        if kind == "hidden-inf" and step + 1 == at:
            embeddings.data[UNUSED, 0] = torch.inf  # No loss tells it.
        if step + 1 < at or kind == "hidden-inf":
            return loss
        if kind == "gradient":
            return loss + ((embeddings[5, 0] - embeddings[5, 0].detach()) ** 2).sqrt()  # 0, of infinite slope.
        return {"nan": loss * torch.nan, "inf": loss + torch.inf}[kind]

    return breaks


@pytest.mark.parametrize(
    ("kind", "at", "kept_at"),
    [("nan", 12, 10), ("nan", 3, 1), ("inf", 12, 10), ("gradient", 22, 20)],
)
def test_where_training_diverges_the_last_good_weights_are_kept(model, kind, at, kept_at):
    changed, own, kept = trained(model, broken(kind, at), 25)
    assert (changed.diverged_at, changed.kept_at) == (at, kept_at)
    assert [one["step"] for one in changed.losses] == list(range(1, kept_at + 1)) and len(kept) == at
    assert same(weights(own), kept[kept_at]) and not same(kept[kept_at], kept[at - 1])
    assert not any(one.requires_grad for one in own.parameters())


def test_weights_that_no_loss_shows_to_be_infinite_are_not_kept(model):
    changed, own, kept = trained(model, broken("hidden-inf", 12), 25)
    assert (changed.diverged_at, changed.kept_at) == (12, 10)
    assert same(weights(own), kept[10]) and len(changed.losses) == 10


@pytest.mark.parametrize(("kind", "at"), [("nan", 1), ("gradient", 1), ("inf", 2), ("hidden-inf", 2)])
def test_diverging_before_anything_is_kept_is_an_error_and_changes_nothing(model, kind, at):
    error, own, _ = trained(model, broken(kind, at), 11)
    assert isinstance(error, DsgError) and f"step {at}," in str(error)
    assert same(weights(own), weights(model))


def test_a_training_that_ends_well_says_so(model):
    changed, own, kept = trained(model, lambda loss, *_: loss, 12)
    assert (changed.diverged_at, changed.kept_at, len(changed.losses)) == (None, None, 12)
    assert same(weights(own), kept[12]) and changed.n_changed == sum(one.numel() for one in own.parameters())


def test_what_was_kept_survives_a_resume(model, tmp_path):
    checkpoint = Checkpoint(tmp_path / "c")
    checkpoint.interval = 0
    with pytest.raises(StopIteration):
        trained(model, broken("nan", 16), 25, checkpoint, stop_after=14)
    changed, own, kept = trained(model, broken("nan", 16), 25, Checkpoint(tmp_path / "c", resume=True))
    whole, other, _ = trained(model, broken("nan", 16), 25)
    assert len(kept) == 3 and (changed.diverged_at, changed.kept_at) == (16, 14)
    assert same(weights(own), weights(other)) and changed.losses == whole.losses


RESUMED = [
    (npo, Npo, {"retain_loss": "kl", "warmup_steps": 6}),
    (npo, Npo, {"lora": True}),
    (scrub, Scrub, {"last_max_step": 9}),
    (sspu, Sspu, {"trained": "all"}),
    (sae_representation, SaeRepresentation, {}),
    (grad_diff, GradDiff, {"mixed_precision": "bfloat16", "retain_loss": "kl"}),
    (finetune, Finetune, {"warmup_steps": 4}),
    (finetune, Finetune, {"lora": True, "mixed_precision": "bfloat16"}),
]


@pytest.mark.parametrize(
    ("method", "kind", "options", "after"),
    [(*case, 6) for case in RESUMED] + [(*RESUMED[0], after) for after in (1, 10)],
)
def test_a_training_goes_on_bit_for_bit(model, tmp_path, method, kind, options, after):
    settings = kind(steps=11, batch_size=2, accumulation=1, learning_rate=0.01, **options)

    def go(checkpoint, stop_after=None):
        own = copy.deepcopy(model)

        def report(_what, done, _total):
            if done == stop_after:
                raise StopIteration

        given = Given(own, None, text(9, 4, 26, 3, 17, seed=1), retain_text(), FEATURES, UNKNOWN, 3, checkpoint, report)
        return method.unlearn(given, settings), weights(own)

    checkpoint = Checkpoint(tmp_path / "c")
    checkpoint.interval = 0
    with pytest.raises(StopIteration):
        go(checkpoint, stop_after=after + 1)
    resumed = Checkpoint(tmp_path / "c", resume=True)
    assert resumed.entry("training")["step"] == after
    (changed, found), (whole, wanted) = go(resumed), go(Checkpoint())
    assert same(found, wanted) and changed.losses == whole.losses and len(whole.losses) == 11


@pytest.mark.parametrize(
    ("method", "kind", "options", "term"),
    [
        (grad_diff, GradDiff, {"retain_loss": "kl"}, "retain"),
        (rmu, Rmu, {}, "retain"),
        (npo, Npo, {"retain_loss": "kl"}, "retain"),
        (scrub, Scrub, {"last_max_step": 0}, "retain_kl"),
    ],
)
def test_mixed_precision_changes_no_more_than_digits(model, method, kind, options, term):
    """The model as it was is not computed from weights in bfloat16 that autocast keeps of the model as it is."""
    found = {}
    for precision in ("none", "bfloat16"):
        settings = kind(steps=3, accumulation=1, learning_rate=0.01, mixed_precision=precision, **options)
        changed, *_ = run(model, method, settings, forget_text(), retain_text())
        found[precision] = [one[term] for one in changed.losses[1:]]
    assert found["bfloat16"] == pytest.approx(found["none"], rel=0.2) and min(found["none"]) > 1e-3


@pytest.mark.parametrize(("warmup", "shares"), [(0, [1] * 6), (1, [1] * 6), (4, [0.25, 0.5, 0.75, 1, 1, 1])])
def test_the_learning_rate_rises_and_stays(model, warmup, shares):
    """Of a gradient that is always the same, AdamW makes steps of the learning rate."""
    own, kept = copy.deepcopy(model), []
    settings = Training(steps=6, learning_rate=0.01, warmup_steps=warmup, weight_decay=0.0, batch_size=1, layers=[0])
    free = freed(own, settings)
    given = Given(own, None, short_text(), short_text(), report=lambda *_: kept.append(free.parameters[0][0, 0].item()))
    before = free.parameters[0][0, 0].item()
    train(given, free, lambda _: {"loss": sum(one.sum() for one in free.parameters)})
    steps = [a - b for a, b in itertools.pairwise([before, *kept])]
    assert steps == pytest.approx([0.01 * share for share in shares], rel=1e-3)


def test_weights_decay_apart_from_gradients(model):
    own = copy.deepcopy(model)
    settings = Training(steps=3, learning_rate=0.1, weight_decay=0.2, batch_size=1, accumulation=1, layers=[1])
    free = freed(own, settings)
    train(Given(own, None, short_text(), short_text()), free, lambda _: {"loss": 0 * free.parameters[0].sum()})
    for name, before in model.named_parameters():
        after = dict(own.named_parameters())[name]
        factor = (1 - 0.1 * 0.2) ** 3 if name == free.names[0] else 1.0
        torch.testing.assert_close(after, before * factor, rtol=1e-6, atol=0)


@pytest.mark.parametrize("seed", range(3))
def test_every_row_is_drawn_once_before_any_is_twice(seed):
    rows = text(3, 4, 5, 6, 7, 8, 9)
    drawn = rows.draws(31, seed)
    blocks = [drawn[i : i + 7] for i in range(0, 28, 7)]
    assert all(sorted(block) == list(range(7)) for block in blocks) and len(set(drawn[28:])) == 3
    assert len({tuple(block) for block in blocks}) == 4
    assert drawn == rows.draws(31, seed) and drawn != rows.draws(31, seed + 1)


def test_corpora_are_drawn_by_their_weights():
    two = Watched([[BOS, 5, 6]] * 7, [0, 0, 0, 1, 1, 1, 1], [1.0, 3.0], 0, SPECIAL, "cpu")
    drawn = two.draws(4000, 0)
    first, second = [i for i in drawn if i < 3], [i for i in drawn if i >= 3]
    assert len(second) / 4000 == pytest.approx(0.75, abs=4 * math.sqrt(0.75 * 0.25 / 4000))
    for several, size in ((first, 3), (second, 4)):
        assert all(len(set(several[i : i + size])) == size for i in range(0, len(several) - size, size))
        assert max(Counter(several).values()) - min(Counter(several).values()) <= 1
    assert set(Watched([[5, 6]] * 4, [0, 0, 1, 1], [1.0, 0.0], 0, SPECIAL, "cpu").draws(50, 0)) == {0, 1}


def test_retain_text_is_drawn_in_an_order_of_its_own(model):
    forget, retain = text(*[5] * 6), text(*[5] * 6)
    run(model, gradient_ascent, GradientAscent(steps=3, batch_size=2, accumulation=2), forget, retain)
    assert len(forget.drawn[0]) == len(retain.drawn[0]) == 12 and forget.drawn != retain.drawn
    assert [batch.index for batch in forget.batches] == [tuple(forget.drawn[0][i : i + 2]) for i in range(0, 12, 2)]


PASSES = [
    # Method, settings; of forget and of retain text per batch: forward, backward.
    (gradient_ascent, GradientAscent, {}, (1, 1), (0, 0)),
    (finetune, Finetune, {}, (1, 1), (0, 0)),
    (grad_diff, GradDiff, {"retain_loss": "none"}, (1, 1), (0, 0)),
    (grad_diff, GradDiff, {"retain_loss": "nll"}, (1, 1), (1, 1)),
    (grad_diff, GradDiff, {"retain_loss": "kl", "lora": True}, (1, 1), (2, 1)),
    (npo, Npo, {}, (1, 1), (1, 1)),
    (rmu, Rmu, {}, (1, 1), (2, 1)),
    (sspu, Sspu, {}, (1, 1), (2, 1)),
    (scrub, Scrub, {"last_max_step": 9, "min_steps": 0}, (2, 1), (0, 0)),
    (scrub, Scrub, {"last_max_step": 0}, (0, 0), (2, 1)),
    (sae_representation, SaeRepresentation, {}, (2, 1), (2, 1)),
]


@pytest.mark.parametrize(("method", "kind", "options", "forget_passes", "retain_passes"), PASSES)
def test_passes_and_tokens_are_counted(model, method, kind, options, forget_passes, retain_passes):
    own, cost, forget, retain = copy.deepcopy(model), Cost(), forget_text(), retain_text()
    settings = kind(steps=2, batch_size=2, accumulation=2, **options)
    with counted(own, cost):
        method.unlearn(Given(own, None, forget, retain, FEATURES, UNKNOWN), settings)
    tokens = [
        sum(2 * max(len(one.rows[j]) for j in one.drawn[0][i : i + 2]) for i in range(0, 8, 2))
        for one in (forget, retain)
    ]
    wanted = {"forward_passes": 4 * (forget_passes[0] + retain_passes[0])}
    wanted |= {"backward_passes": 4 * (forget_passes[1] + retain_passes[1])}
    wanted |= {"forward_tokens": forget_passes[0] * tokens[0] + retain_passes[0] * tokens[1]}
    wanted |= {"backward_tokens": forget_passes[1] * tokens[0] + retain_passes[1] * tokens[1]}
    if method is npo:  # Each row as the model was, once.
        wanted["forward_passes"] += len(set(forget.drawn[0]))
        wanted["forward_tokens"] += sum(len(forget.rows[i]) for i in set(forget.drawn[0]))
    if method is sae_representation:  # The mean of unknown text; whether the first rows look different.
        wanted["forward_passes"] += 2
        wanted["forward_tokens"] += sum(len(one.rows) * max(map(len, one.rows)) for one in (UNKNOWN, forget))
    assert cost.as_json() == wanted
    own(torch.tensor([ROW]))
    assert cost.as_json() == wanted  # Nothing counts on.


def test_the_cost_of_dampening_is_a_pass_a_row(model):
    own, cost, forget, retain = copy.deepcopy(model), Cost(), forget_text(), retain_text()
    with counted(own, cost):
        ssd.unlearn(Given(own, None, forget, retain), Ssd())
    n_tokens = sum(map(len, forget.rows + retain.rows))
    assert cost == Cost(11, 11, n_tokens, n_tokens)


GRID = {"beta": [1, 2, 3], "steps": [10, 20], "eval.limit": [5]}
POINTS = [
    {"methods.npo.beta": beta, "methods.npo.steps": steps, "eval.limit": 5} for beta in (1, 2, 3) for steps in (10, 20)
]


@pytest.mark.parametrize("budget", [1, 4, 6, 100])
def test_trials_are_points_of_the_grid_within_budget(budget):
    section = CompareSection(budget=budget, grids={"npo": GRID, "sae-representation": {"steps": [7]}})
    drawn = [trials_of("npo", section, seed) for seed in range(20)]
    for number, trials in enumerate(drawn):
        assert trials == [point for point in POINTS if point in trials] and len(trials) == min(budget, 6)
        assert trials == trials_of("npo", section, number)
    assert (len({str(trials) for trials in drawn}) > 1) == (budget < 6)
    assert trials_of("rmu", section, 0) == [{}]
    assert trials_of("sae-representation", section, 0) == [{"methods.sae_representation.steps": 7}]


@pytest.mark.parametrize(
    ("found", "base", "forgetting", "utility"),
    [
        ({"f": 0.5, "a": 0.8, "b": 0.6}, {"f": 0.9, "a": 0.7, "b": 0.8}, 0.4 / 0.65, (1 + 0.75) / 2),
        ({"f": 0.95, "a": 0.35}, {"f": 0.9, "a": 0.7}, 0.0, 0.5),
        ({"f": 0.1, "a": 0.7}, {"f": 0.9, "a": 0.7}, 1.0, 1.0),
        ({"f": 0.25, "a": 0.0}, {"f": 0.9, "a": 0.7}, 1.0, 0.0),
        ({"f": 0.1, "a": 0.7}, {"f": 0.2, "a": 0.7}, 0.0, 1.0),
        ({"f": 0.9, "a": 0.0}, {"f": 0.9, "a": 0.7}, 0.0, 0.0),
        ({"f": 0.25, "a": 0.3, "b": 0.2}, {"f": 0.75, "a": 0.0, "b": 0.4}, 1.0, 0.5),
        ({"f": 0.25}, {"f": 0.75}, 1.0, 1.0),
    ],
)
def test_trials_are_judged(found, base, forgetting, utility):
    score = 2 / (1 / forgetting + 1 / utility) if forgetting and utility else 0.0
    wanted = {"forgetting": forgetting, "utility": utility, "score": score}
    assert judged("f", found, base, 0.25) == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("scores", "best"), [([None, 0.3, 0.5, 0.5], 2), ([0.0, None], 0), ([None, None], None), ([], None)]
)
def test_the_best_trial_is_the_first_of_those_with_the_highest_score(scores, best):
    assert best_of([{"score": score} for score in scores]) == best
