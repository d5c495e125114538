"""RMU (Li et al., 2403.03218): representations of forget text are misdirected.

L = MSE(h_l(forget), c u) + a MSE(h_l(retain), h_l,frozen(retain)), with u a random unit vector of entries drawn evenly
from [0, 1), c its coefficient, and h_l the residual stream after layer l. Layers l - 2 to l are trained.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsg_cli.methods.freedom import freed
from dsg_cli.methods.given import Changed, Given
from dsg_cli.methods.settings import Rmu
from dsg_cli.methods.steered import below, steering_loss, unit
from dsg_cli.methods.training import train
from dsg_cli.runtime.sites import HookSite, decoder_layers

DEFAULT_DEPTH = 7 / 32
"""Of the paper's layer in Zephyr 7B."""


def unlearn(given: Given, settings: Rmu) -> Changed:
    """Train."""
    n_layers = len(decoder_layers(given.model))
    layer = round(DEFAULT_DEPTH * n_layers) if settings.layer is None else settings.layer
    free = freed(given.model, settings, layers=below(layer), seed=given.seed)
    control_D = settings.coefficient * random_direction(given.model.config.hidden_size, given.seed).to(given.device)
    site = HookSite(layer, "resid_post")
    return train(
        given, free, steering_loss(given, free, site=site, control_D=control_D, retain_weight=settings.retain_weight)
    )


def random_direction(width: int, seed: int) -> Tensor:
    """u, [D]."""
    return unit(torch.rand(width, generator=torch.Generator().manual_seed(seed)))
