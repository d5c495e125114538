"""Copies of a model whose weights an attack may change."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dsg_cli.attacks.target import SIDES, Material, Target, of_forget
from dsg_cli.data.batches import pad_rows
from dsg_cli.data.tokens import encode_pair, special_ids
from dsg_cli.errors import DsgError
from dsg_cli.evals.questions import Question
from dsg_cli.guardrail.guarded import guarded, last_decisions
from dsg_cli.guardrail.runtime.guardrail import GuardrailModule
from dsg_cli.guardrail.runtime.sites import HookSite, decoder_layers, decoder_of
from dsg_cli.intervals import wilson
from dsg_cli.models.language_model import devices_of, final_norm
from dsg_cli.models.residuals import replace_residual
from dsg_cli.workspace.results import Json


def copied(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model."""
    if len(devices_of(model)) > 1:
        raise DsgError(
            "A model that is spread over several devices cannot be copied, so its weights cannot be attacked here.",
            "Take a device that holds it whole.",
        )
    return copy.deepcopy(model)


def edited(target: Target, edit: Callable[[PreTrainedModel], PreTrainedModel]) -> dict[str, PreTrainedModel]:
    """The models of both sides after an edit of their weights; one copy where they are the same."""
    guarded = edit(copied(target.of("unlearned")))
    return {"unlearned": guarded, "base": guarded if target.base is None else edit(copied(target.base))}


def linear_layers(model: PreTrainedModel) -> Iterator[tuple[nn.Module, Tensor, int]]:
    """Of every linear layer in the decoder, so without the head: the module, its weight, and which of the two
    dimensions of the weight counts its outputs."""
    for module in decoder_of(model).modules():
        if isinstance(module, nn.Linear):
            yield module, module.weight, 0
        elif isinstance(module, Conv1D):
            yield module, module.weight, 1


def attack_quantize(target: Target, material: Material, *, bits: Sequence[int]) -> list[Json]:
    """Round the decoder's linear weights, and ask under the guard that was made for the others.

    Args:
        target: What is attacked.
        material: `forget` and, if there is any, `utility` are asked.
        bits: Of a rounded weight, a point of the curve each.
    """
    return [
        target.point(
            n,
            material.forget,
            models=edited(target, functools.partial(quantized, bits=n)),
            utility=material.utility,
        )
        for n in bits
    ]


@torch.no_grad()
def quantized(model: PreTrainedModel, bits: int) -> PreTrainedModel:
    """The model, its linear weights rounded to so many bits and back."""
    for _, weight, outputs in linear_layers(model):
        weight.copy_(rounded(weight, bits, outputs))
    return model


def rounded(weight: Tensor, bits: int, outputs: int) -> Tensor:
    """The nearest of 2^bits - 1 values around 0, evenly spaced up to the largest magnitude of each output channel.

    Args:
        weight: A matrix.
        bits: At least 2.
        outputs: The dimension that counts output channels.
    """
    largest = 2 ** (bits - 1) - 1
    step = weight.float().abs().amax(1 - outputs, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / largest
    return ((weight.float() / step).round() * step).to(weight.dtype)


def attack_prune(target: Target, material: Material, *, shares: Sequence[float]) -> list[Json]:
    """Prune the decoder's linear weights by magnitude, and ask under the guard that was made for the others.

    Args:
        target: What is attacked.
        material: `forget` and, if there is any, `utility` are asked.
        shares: Of each weight matrix, what is set to 0: a point of the curve each. 0 is plain evaluation.
    """
    return [
        target.point(
            share,
            material.forget,
            models=edited(target, functools.partial(pruned, share=share)),
            utility=material.utility,
        )
        for share in shares
    ]


@torch.no_grad()
def pruned(model: PreTrainedModel, share: float) -> PreTrainedModel:
    """The model, with that share of each linear weight matrix, its smallest magnitudes, set to 0."""
    for _, weight, _ in linear_layers(model):
        n_pruned = int(share * weight.numel())
        smallest = weight.abs().flatten().argsort(stable=True)[:n_pruned]
        weight.view(-1)[smallest] = 0.0
    return model


def attack_unhook(target: Target, material: Material) -> list[Json]:
    """Ask the model without its guard: one point, the same on both sides.

    Args:
        target: What is attacked.
        material: Its `forget` is asked.
    """
    found = of_forget(target.ask(material.forget, name="unhooked", is_guarded=False))
    return [{"x": "guard taken off", "variant": "", "unlearned": found, "base": found}]


@dataclass(frozen=True)
class _Read:
    """What was read while questions were put; N questions, E layers."""

    resid_END: Tensor
    """After each layer, at the last token of the question, float32."""
    words_NC: Tensor
    """First token of each choice; the shortest list's end is repeated."""
    answer_N: Tensor
    gated_N: list[bool]


def attack_probe(target: Target, material: Material, *, ridge: float) -> list[Json]:
    """Read the choices from every layer, of the guarded and of the unguarded model.

    Choices are told apart by their first token.

    Args:
        target: What is attacked.
        material: The probe is fitted on `known` and tried, like the lens, on `forget`.
        ridge: Penalty of the probe, relative to the mean squared length of what it is fitted on.

    Returns:
        Points whose x is the layer, from 0; those of the probe also hold `n_known`, what it was fitted on.
    """
    found: dict[str, list[tuple[Json, Json]]] = {}
    for side in SIDES:
        guards, model = (target.guardrails if side == "unlearned" else ()), target.of(side)
        norm, head = _reader(model)
        known, asked = (_read(target, model, questions, guards) for questions in (material.known, material.forget))
        found[side] = []
        for layer in range(len(asked.resid_END)):
            with torch.no_grad():
                lens_NV = head(norm(asked.resid_END[layer].to(head.weight))).float()
            wanted_ND = head.weight.float()[known.words_NC.gather(1, known.answer_N[:, None])[:, 0]]
            probe_ND = fitted(known.resid_END[layer], wanted_ND, ridge)(asked.resid_END[layer])
            probed = _accuracy(probe_ND @ head.weight.float().T, asked) | {"n_known": len(material.known)}
            found[side].append((_accuracy(lens_NV, asked), probed))
            target.report(f"probing, {side}, layers", layer + 1, len(asked.resid_END))
    return [
        {"x": layer, "variant": variant, **{side: found[side][layer][number] for side in SIDES}}
        for number, variant in enumerate(("logit lens", "linear probe"))
        for layer in range(len(found["unlearned"]))
    ]


def _reader(model: PreTrainedModel) -> tuple[nn.Module, nn.Linear]:
    """What stands between the last layer and the logits."""
    norm, head = final_norm(model), model.get_output_embeddings()
    if norm is None or not isinstance(head, nn.Linear):
        raise DsgError(
            f"The last norm or the head of {type(model).__name__} is not known, so its layers cannot be read.",
            "Leave `probe` out.",
        )
    return norm, head


@torch.inference_mode()
def _read(
    target: Target, model: PreTrainedModel, questions: Sequence[Question], guards: Sequence[GuardrailModule]
) -> _Read:
    """Put the questions, without any answer."""
    pairs = [[encode_pair(target.tokenizer, q.context, c, bos=target.bos) for c in q.choices] for q in questions]
    rows = [list(several[0].context)[-target.max_length :] for several in pairs]
    n_layers = len(decoder_layers(model))
    resid: list[list[Tensor]] = [[] for _ in range(n_layers)]
    gated: list[bool] = []
    with guarded(model, guards, allow_mismatch=True), ExitStack() as hooks:
        # Hooks run in the order in which they were put on: these see what the guard made of the residual.
        for layer in range(n_layers):
            site = HookSite(layer, "resid_post")
            hooks.enter_context(replace_residual(model, site, functools.partial(_keep, resid[layer])))
        for start in range(0, len(rows), target.batch_size):
            part = rows[start : start + target.batch_size]
            batch = pad_rows(part, target.tokenizer.pad_token_id or 0, special_ids(target.tokenizer), target.device)
            model(input_ids=batch.ids_BL, attention_mask=batch.mask_BL.long(), use_cache=False)
            last_B = batch.mask_BL.sum(-1) - 1
            for kept in resid:
                whole_BLD = kept.pop()
                row_B = torch.arange(len(part), device=whole_BLD.device)
                kept.append(whole_BLD[row_B, last_B.to(whole_BLD.device)].float().to(target.device))
            gated += [is_gated for _, is_gated, _ in last_decisions(guards)] if guards else []
    longest = max(map(len, pairs))
    words = [[pair.continuation[0] for pair in several] for several in pairs]
    return _Read(
        torch.stack([torch.cat(kept) for kept in resid]),
        torch.tensor([[*own, *own[-1:] * (longest - len(own))] for own in words], device=target.device),
        torch.tensor([question.answer for question in questions], device=target.device),
        gated,
    )


def _keep(kept: list[Tensor], resid_BLD: Tensor) -> Tensor:
    kept.append(resid_BLD)
    return resid_BLD


def fitted(known_ND: Tensor, wanted_ND: Tensor, ridge: float) -> Callable[[Tensor], Tensor]:
    """Ridge regression from residuals to the directions of right answers.

    In its dual form, for there are fewer questions than dimensions: with X and Y without their means,
    W = X' (X X' + ridge * trace(X X') / N * I)^-1 Y.
    """
    mean_D, wanted_mean_D = known_ND.mean(0), wanted_ND.mean(0)
    centred_ND = known_ND - mean_D
    gram_NN = centred_ND @ centred_ND.T
    penalty = ridge * gram_NN.diagonal().mean().clamp(min=torch.finfo(gram_NN.dtype).tiny)
    eye_NN = torch.eye(len(gram_NN), device=gram_NN.device, dtype=gram_NN.dtype)
    map_DD = centred_ND.T @ torch.linalg.solve(gram_NN + penalty * eye_NN, wanted_ND - wanted_mean_D)
    return lambda resid_ND: (resid_ND - mean_D) @ map_DD + wanted_mean_D


def _accuracy(logits_NV: Tensor, asked: _Read) -> Json:
    """How often the right choice's word has the largest logit."""
    n_right = int((logits_NV.gather(1, asked.words_NC).argmax(1) == asked.answer_N).sum())
    low, high = wilson(n_right, len(asked.answer_N))
    found: Json = {"forget_acc": n_right / len(asked.answer_N), "forget_low": low, "forget_high": high}
    gate = {"gate_rate": sum(asked.gated_N) / len(asked.gated_N)} if asked.gated_N else {}
    return found | {"n": len(asked.answer_N)} | gate
