"""The losses of methods that change weights, derived from their papers by loops over sequences and tokens.

Rows are never padded, and nothing of the package computes anything: its `TrainingRows` only says which rows were drawn.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass, field

import torch
from conftest import WIDTH

from dsg_cli.guardrail.runtime.sites import HookSite
from dsg_cli.job import Job
from dsg_cli.methods import load_method, section_of
from dsg_cli.methods.text import NameSpans, TrainingRows
from dsg_cli.methods.training import Features, TrainingInputs
from dsg_cli.settings import MethodsSection

BOS, SPECIAL, SEED = 2, (0, 1, 2), 5


@dataclass(frozen=True)
class Watched(TrainingRows):
    """TrainingRows that remembers which rows were drawn, and which batches made."""

    drawn: list = field(default_factory=list)
    batches: list = field(default_factory=list)

    def draws(self, n, seed):
        self.drawn.append(super().draws(n, seed))
        return self.drawn[-1]

    def batch(self, index):
        self.batches.append(super().batch(index))
        return self.batches[-1]


def text(*lengths, seed=0):
    """Random rows; an EOS stands in the middle of the first."""
    generator = torch.Generator().manual_seed(seed)
    rows = [[BOS, *torch.randint(4, 64, (length - 1,), generator=generator).tolist()] for length in lengths]
    rows[0][len(rows[0]) // 2] = 1
    return Watched(rows, [0] * len(rows), [1.0], 0, SPECIAL, "cpu")


def forget_text():
    return text(9, 4, 6, 3, 7, 5, seed=1)


def retain_text():
    return text(5, 8, 3, 6, 10, seed=2)


def weights(model):
    return {name: one.detach().clone() for name, one in model.named_parameters()}


def settings_of(name, **options):
    return type(getattr(MethodsSection(), section_of(name)))(**options)


def unlearn(name, inputs, **options):
    """What a method says of the weights that it has changed in place."""
    return load_method(name)(inputs, settings_of(name, **options))


def run(model, name, options, forget, retain, **inputs):
    """What the method says, the weights before the first step and after each, and the gradients of each."""
    own, grads = copy.deepcopy(model), []
    kept = [weights(own)]

    def progress(*_):
        kept.append(weights(own))
        grads.append({name: one.grad.clone() for name, one in own.named_parameters() if one.requires_grad})

    job = Job(progress=progress)
    return unlearn(name, TrainingInputs(own, forget, retain, job=job, seed=SEED, **inputs), **options), kept, grads


def token_logs(m, row):
    logits = m(torch.tensor([row])).logits[0]
    return [torch.log_softmax(logits[i - 1], -1)[row[i]] for i in range(1, len(row))]


def nll(m, rows):
    """Per token of all rows together."""
    logs = [one for row in rows for one in token_logs(m, row)]
    return -sum(logs) / len(logs)


def kl(ref, m, rows, temperature=1.0):
    """KL(ref || m) per token."""
    found = []
    for row in rows:
        p, q = (torch.softmax(one(torch.tensor([row])).logits[0] / temperature, -1) for one in (ref, m))
        found += [(p[i] * torch.log(p[i] / q[i])).sum() for i in range(len(row) - 1)]
    return sum(found) / len(found) * temperature**2


def retain_loss(m, ref, R, s):
    return {"none": lambda: 0.0, "nll": lambda: nll(m, R), "kl": lambda: kl(ref, m, R)}[s.retain_loss]()


def finetune_loss(m, ref, F, R, s, step):
    return nll(m, F)


def ga_loss(m, ref, F, R, s, step):
    return -nll(m, F)


def grad_diff_loss(m, ref, F, R, s, step):
    return -s.forget_weight * nll(m, F) + s.retain_weight * retain_loss(m, ref, R, s)


def npo_loss(m, ref, F, R, s, step):
    ratios = [torch.exp(sum(token_logs(m, row))) / torch.exp(sum(token_logs(ref, row))) for row in F]
    forget = sum(2 / s.beta * torch.log(1 + ratio**s.beta) for ratio in ratios) / len(F)
    return s.forget_weight * forget + s.retain_weight * retain_loss(m, ref, R, s)


def simnpo_loss(m, ref, F, R, s, step):
    forget = 0.0
    for row in F:
        logs = token_logs(m, row)
        margin = -s.beta / len(logs) * sum(logs) - s.gamma
        forget = forget - 2 / s.beta * torch.log(1 / (1 + torch.exp(-margin))) / len(F)
    return s.forget_weight * forget + s.retain_weight * retain_loss(m, ref, R, s)


def scrub_loss(m, ref, F, R, s, step):
    if step in (0, 2):  # Of the settings below.
        return -kl(ref, m, F, s.temperature)
    return s.kl_weight * kl(ref, m, R, s.temperature) + s.nll_weight * nll(m, R)


def hidden(m, row, layer):
    found = []
    handle = m.model.layers[layer].register_forward_hook(lambda _module, _args, output: found.append(output))
    m(torch.tensor([row]))
    handle.remove()
    return found[0][0]


def steered(m, ref, F, R, layer, control, retain_weight):
    forget = [(h - control) ** 2 for row in F for h in hidden(m, row, layer)]
    pairs = [pair for row in R for pair in zip(hidden(m, row, layer), hidden(ref, row, layer), strict=True)]
    retain = [(now - then) ** 2 for now, then in pairs]
    return torch.stack(forget).mean() + retain_weight * torch.stack(retain).mean()


def rmu_loss(m, ref, F, R, s, step):
    random = torch.rand(WIDTH, generator=torch.Generator().manual_seed(SEED))
    control = s.coefficient * random / random.square().sum().sqrt()
    return steered(m, ref, F, R, 1 if s.layer is None else s.layer, control, s.retain_weight)


RELEVANT, IRRELEVANT = (torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(seed)) for seed in (3, 4))
ENCODER, ENCODER_BIAS = torch.randn(WIDTH, 24, generator=torch.Generator().manual_seed(6)), -3.0

FEATURES = Features(HookSite(1, "resid_post"), lambda x: torch.relu(x @ ENCODER + ENCODER_BIAS), RELEVANT, IRRELEVANT)


def projector(rows_KD):
    """On the span of some vectors, [D, D], by the normal equations."""
    return (torch.linalg.pinv(rows_KD.double(), rtol=1e-5) @ rows_KD.double()).float()


def sspu_loss(m, ref, F, R, s, step):
    random = torch.randn(WIDTH, generator=torch.Generator().manual_seed(SEED))
    control = projector(IRRELEVANT) @ random
    control = s.coefficient * control / control.square().sum().sqrt()
    outside, before = 0.0, dict(ref.named_parameters())
    for name, one in m.named_parameters():
        if re.search(r"layers\.[01]\.", name) and ("down_proj" in name or s.trained == "all"):
            change = one - before[name]
            if re.search("q_proj|k_proj|v_proj|gate_proj|up_proj", name):  # [outputs, D]
                change = change.T
            outside = outside + ((torch.eye(WIDTH) - projector(RELEVANT)) @ change).square().sum()
    return steered(m, ref, F, R, 1, control, s.retain_weight) + s.subspace_weight * outside


def latent(m, row):
    """Mean over counted tokens."""
    found = [torch.relu(h @ ENCODER + ENCODER_BIAS) for i, h in zip(row, hidden(m, row, 1), strict=True) if i > 2]
    return sum(found) / len(found)


UNKNOWN = text(6, 4, 9, seed=8)


def sae_loss(m, ref, F, R, s, step):
    u = sum(latent(ref, row) for row in UNKNOWN.rows) / len(UNKNOWN.rows)
    return drawn_to([(latent(m, row), latent(ref, row), u) for row in F], m, ref, R, s)


def drawn_to(triples, m, ref, R, s):
    pull = push = 0.0
    for z, k, u in triples:
        scale = ((u - k) ** 2).sum()
        pull = pull + ((z - u) ** 2).sum() / scale / len(triples)
        push = push + torch.clamp(1 - ((z - k) ** 2).sum() / scale, min=0) / len(triples)
    return pull + s.push_weight * push + s.retain_weight * retain_loss(m, ref, R, s)


ENDS = [[2, 4], [3], [], [1], [5, 6], [4]]
OTHER_ENDS = [[3, 5], [2], [], [2], [4, 7], [1]]


def mentions():
    """Rows with names, and others of other lengths with as many; the third row has none."""
    return NameSpans((forget_text(), text(8, 5, 4, 3, 9, 6, seed=11)), (ENDS, OTHER_ENDS))


def mentions_loss(m, ref, F, R, s, step):
    triples, (ours, others) = [], mentions().rows
    for row in F:
        n = ours.rows.index(row)
        for at, other in zip(ENDS[n], OTHER_ENDS[n], strict=True):
            z, k = (torch.relu(hidden(one, row, 1)[at] @ ENCODER + ENCODER_BIAS) for one in (m, ref))
            u = torch.relu(hidden(ref, others.rows[n], 1)[other] @ ENCODER + ENCODER_BIAS)
            triples += [(z, k, u)] if bool((u != k).any()) else []
    return drawn_to(triples, m, ref, R, s)
