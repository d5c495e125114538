"""Where in a Hugging Face model an SAE reads and writes.

A site is spelled as SAE configurations spell it: `blocks.3.hook_resid_post` (TransformerLens) or
`model.layers.3.output` (a module of the Hugging Face model and its side).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .errors import DsgError

POINTS = {
    "hook_resid_pre": "resid_pre",
    "hook_resid_post": "resid_post",
    "hook_mlp_in": "mlp_in",
    "hook_mlp_out": "mlp_out",
    "hook_attn_out": "attn_out",
    "attn.hook_z": "attn_z",
}
"""TransformerLens names of places that a Hugging Face module's input or output holds."""

MLP = ("mlp", "feed_forward", "ffn")
ATTENTION = ("self_attn", "attn", "attention", "self_attention")
OUT_PROJECTION = ("o_proj", "out_proj", "c_proj", "dense")
BEFORE_MLP = ("pre_feedforward_layernorm", "post_attention_layernorm", "ln_2")


@dataclass(frozen=True)
class HookSite:
    """One place in the model."""

    layer: int  # Index of the decoder layer, from 0.
    point: str  # A value of `POINTS`, or `input` or `output` of the module `path`.
    path: str = ""  # Of a module below the layer, such as `mlp`; for `input` and `output` only.

    @property
    def name(self) -> str:
        """In the TransformerLens spelling, or for a module of the layer in one like `layers.3.mlp.output`."""
        spelling = next((name for name, point in POINTS.items() if point == self.point), None)
        if spelling is not None:
            return f"blocks.{self.layer}.{spelling}"
        return f"layers.{self.layer}.{self.path}.{self.point}"


def parse_hook_site(name: object, *, where: str) -> HookSite:
    """Read a site's name."""
    if not isinstance(name, str) or not name:
        raise DsgError(
            f"{where} does not say which hook it was trained on (metadata.hook_name).",
            "Add it to cfg.json, for example blocks.3.hook_resid_post; a wrong guess would silently do nothing.",
        )
    if (match := re.fullmatch(r"blocks\.([0-9]{1,9})\.(\S+)", name)) and match[2] in POINTS:
        return HookSite(int(match[1]), POINTS[match[2]])
    match = re.fullmatch(r"(?:[A-Za-z_]\w*\.)+([0-9]{1,9})((?:\.\w+)*?)(?:\.(input|output))?", name)
    if match is None or name.startswith("blocks."):
        raise DsgError(
            f"{where} was trained on {name[:200]}, which no module of a Hugging Face model holds as its input or "
            "output.",
            f"Supported: blocks.N. and one of {', '.join(POINTS)}; or the path of a module, such as "
            "model.layers.N.mlp.output (metadata.hf_hook_name).",
        )
    side = match[3] or "output"
    if not match[2]:
        return HookSite(int(match[1]), "resid_pre" if side == "input" else "resid_post")
    return HookSite(int(match[1]), side, match[2].removeprefix("."))


def decoder_of(model: nn.Module) -> nn.Module:
    """The part of a causal language model that runs its layers."""
    get_decoder: Any = getattr(model, "get_decoder", None)
    decoder = get_decoder() if get_decoder is not None else None
    return decoder if isinstance(decoder, nn.Module) else model


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The list of decoder layers, whatever the family calls it."""
    config: Any = getattr(model, "config", None)
    if config is not None and hasattr(config, "get_text_config"):
        n_layers = int(config.get_text_config(decoder=True).num_hidden_layers)
        for module in decoder_of(model).modules():
            if isinstance(module, nn.ModuleList) and len(module) == n_layers:
                return module
    raise DsgError(
        f"The decoder layers of {type(model).__name__} cannot be found.",
        "Guardrails need a causal language model of transformers with one list of decoder layers.",
    )


def find_module(model: nn.Module, site: HookSite) -> tuple[nn.Module, bool]:
    """The module at a site, and whether the site is its input (else its output)."""
    layers = decoder_layers(model)
    if site.layer >= len(layers):
        place = f"{site.name} is at layer {site.layer} (counted from 0)"
        raise DsgError(f"{place}, but the model has {len(layers)} layers.")
    layer = layers[site.layer]
    # Gemma 2 and 3, OLMo 2: norms follow attention and MLP, and what joins the residual stream is their output.
    has_norms_after = hasattr(layer, "post_feedforward_layernorm")
    if site.point in ("resid_pre", "resid_post"):
        return layer, site.point == "resid_pre"
    if site.point == "mlp_out":
        return _child(layer, ("post_feedforward_layernorm",) if has_norms_after else MLP, site), False
    if site.point == "attn_out":
        return _child(layer, ("post_attention_layernorm",) if has_norms_after else ATTENTION, site), False
    if site.point == "attn_z":
        return _child(_child(layer, ATTENTION, site), OUT_PROJECTION, site), True
    if site.point == "mlp_in":
        has_none = has_norms_after and not hasattr(layer, "pre_feedforward_layernorm")
        return _child(layer, MLP if has_none else BEFORE_MLP, site), True
    module: nn.Module = layer
    for part in site.path.split("."):
        module = _child(module, (part,), site)
    return module, site.point == "input"


def edit_site(model: nn.Module, site: HookSite, edit: Callable[[Tensor], Tensor]) -> Any:
    """Put `edit(activation)` in the place of the activation at a site; returns the hook's handle.

    Modules return a tensor in most families and a tuple in a few; both are handled.
    """
    module, is_input = find_module(model, site)
    if is_input:
        return module.register_forward_pre_hook(InputEdit(edit), with_kwargs=True)
    return module.register_forward_hook(OutputEdit(edit))


@dataclass(frozen=True)
class InputEdit:
    """A hook that edits a module's input. Hooks are objects, not closures: a copied model copies them with it."""

    edit: Callable[[Tensor], Tensor]

    def __call__(
        self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (self.edit(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self.edit(kwargs["hidden_states"])}


@dataclass(frozen=True)
class OutputEdit:
    """A hook that edits a module's output, a tensor or the first of a tuple."""

    edit: Callable[[Tensor], Tensor]

    def __call__(self, _module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        if torch.is_tensor(output):
            return self.edit(output)
        return (self.edit(output[0]), *output[1:])


def _child(module: nn.Module, names: tuple[str, ...], site: HookSite) -> nn.Module:
    for name in names:
        if isinstance(child := getattr(module, name, None), nn.Module):
            return child
    raise DsgError(f"{site.name}: {type(module).__name__} has no module named {' or '.join(names)}.")


N_SAMPLED_VALUES = 64


def evenly_spaced(tensor: Tensor, n: int) -> Tensor:
    """Up to `n` evenly spaced values of a tensor, on the CPU."""
    flat = tensor.detach().reshape(-1)
    index = torch.linspace(0, flat.numel() - 1, min(n, flat.numel()), dtype=torch.float64).long()
    return flat[index.to(flat.device)].cpu()


def fingerprint(model: nn.Module, last_layer: int) -> str:
    """A cheap identity of the weights up to and including `last_layer`.

    Hashes the name, the shape and 64 evenly spaced values, rounded to bfloat16, of every parameter of the
    embeddings and of layers 0..last_layer: a cut model, the whole model and either dtype agree.
    """
    layers = decoder_layers(model)
    prefix = next(name for name, module in model.named_modules() if module is layers)
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if name.startswith(f"{prefix}."):
            if int(name[len(prefix) + 1 :].split(".")[0]) > last_layer:
                continue
        elif "embed" not in name and "wte" not in name and "wpe" not in name:
            continue
        values = evenly_spaced(parameter, N_SAMPLED_VALUES).to(torch.bfloat16).view(torch.int16)
        digest.update(f"{name} {tuple(parameter.shape)} {values.tolist()}\n".encode())
    return digest.hexdigest()
