"""SCRUB (Kurmanji et al., 2302.09880): a student leaves its teacher on forget text and follows it on retain text.

The teacher is the model as it was. Max steps raise KL(teacher || student) on forget text; min steps lower
a KL(teacher || student) + g NLL on retain text. They take turns; the last steps are all min steps, which repair.
"""

from __future__ import annotations

from torch import Tensor

from dsg_cli.methods.freedom import freed
from dsg_cli.methods.given import Changed, Given
from dsg_cli.methods.losses import divergence, logits_of, mean_loss
from dsg_cli.methods.reference import Reference
from dsg_cli.methods.settings import Scrub
from dsg_cli.methods.training import Batches, train
from dsg_cli.tokens import TokenBatch


def unlearn(given: Given, settings: Scrub) -> Changed:
    """Train."""
    free = freed(given.model, settings, seed=given.seed)
    teacher = Reference(free.parameters)

    def apart(batch: TokenBatch, logits_BLV: Tensor) -> Tensor:
        with teacher():
            teacher_BLV = logits_of(given.model, batch)
        return divergence(teacher_BLV, logits_BLV, batch, temperature=settings.temperature)

    def loss(batches: Batches) -> dict[str, Tensor]:
        if is_max_step(batches.step, settings):
            left = apart(batches.forget, logits_of(given.model, batches.forget))
            return {"loss": -left, "forget_kl": left.detach()}
        logits_BLV = logits_of(given.model, batches.retain)
        kept, nll = apart(batches.retain, logits_BLV), mean_loss(logits_BLV, batches.retain)
        total = settings.kl_weight * kept + settings.nll_weight * nll
        return {"loss": total, "retain_kl": kept.detach(), "retain_nll": nll.detach()}

    return train(given, free, loss)


def is_max_step(step: int, settings: Scrub) -> bool:
    """Whether a step, counted from 0, is one on forget text."""
    last = 2 * settings.steps // 3 if settings.last_max_step is None else settings.last_max_step
    return step < last and step % (settings.max_steps + settings.min_steps) < settings.max_steps
