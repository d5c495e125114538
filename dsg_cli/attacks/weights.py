"""Attacks of whoever holds the weights: the guard taken off, weights rounded or pruned, the residual stream read."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dsg_cli.attacks.target import BASE, SIDES, UNLEARNED, AttackerKnowledge, Target
from dsg_cli.data.batches import pad_rows
from dsg_cli.data.tokens import encode_pair, special_ids
from dsg_cli.errors import DsgError
from dsg_cli.evals.questions import Question
from dsg_cli.guardrail.guarded import guarded, last_decisions
from dsg_cli.guardrail.runtime.sites import HookSite, decoder_layers
from dsg_cli.inference.scoring import GuardedModel
from dsg_cli.intervals import wilson
from dsg_cli.models.language_model import devices_of, final_norm, linear_layers
from dsg_cli.models.residuals import replace_residual
from dsg_cli.settings import AttackSection
from dsg_cli.workspace.body import Json


def attack_unhook(target: Target, knowledge: AttackerKnowledge, _settings: AttackSection) -> list[Json]:
    """Unhooking: the guard is taken off. What comes back is all that the base model knows: the weights still hold it.

    One point, the same on both sides.
    """
    side = target.measure(target.base, knowledge.forget, "unhooked")
    return [{"x": "guard taken off", "variant": "", UNLEARNED: side, BASE: side}]


def attack_quantize(target: Target, knowledge: AttackerKnowledge, settings: AttackSection) -> list[Json]:
    """Quantisation: weights are rounded to a few bits, and activations move, perhaps below the gate's threshold.

    A point for each of `quantize_bits`, of the decoder's linear weights, under the guard that was made for the others.
    """
    return _curve_of_edits(target, knowledge, quantized, settings.quantize_bits)


def attack_prune(target: Target, knowledge: AttackerKnowledge, settings: AttackSection) -> list[Json]:
    """Pruning: the smallest weights are set to 0, and activations move, perhaps below the gate's threshold.

    A point for each of `prune_shares`, of each of the decoder's linear weights; 0 is plain evaluation.
    """
    return _curve_of_edits(target, knowledge, pruned, settings.prune_shares)


def _curve_of_edits(
    target: Target,
    knowledge: AttackerKnowledge,
    edit: Callable[[PreTrainedModel, Any], PreTrainedModel],
    xs: Sequence[float],
) -> list[Json]:
    """A point for each x, at which a copy of each model is edited; one copy where they are the same."""
    curve = []
    for x in xs:
        model = edit(copied(target.unlearned.model), x)
        base = model if target.is_same_model else edit(copied(target.base.model), x)
        models = {UNLEARNED: replace(target.unlearned, model=model), BASE: replace(target.base, model=base)}
        curve.append(target.point(x, knowledge.forget, models=models, utility=knowledge.utility))
    return curve


def copied(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model, whose weights an attack may change."""
    if len(devices_of(model)) > 1:
        raise DsgError(
            "A model that is spread over several devices cannot be copied, so its weights cannot be attacked here.",
            "Take a device that holds it whole.",
        )
    return copy.deepcopy(model)


@torch.no_grad()
def quantized(model: PreTrainedModel, bits: int) -> PreTrainedModel:
    """The model, its linear weights rounded to so many bits (at least 2) and back: to the nearest of 2^bits - 1 values
    around 0, evenly spaced up to the largest magnitude of each output channel."""
    largest = 2 ** (bits - 1) - 1
    for module in linear_layers(model).values():
        weight, inputs = module.weight, 0 if isinstance(module, Conv1D) else 1
        size = weight.float().abs().amax(inputs, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        step = size / largest
        weight.copy_(((weight.float() / step).round() * step).to(weight.dtype))
    return model


@torch.no_grad()
def pruned(model: PreTrainedModel, share: float) -> PreTrainedModel:
    """The model, with that share of each linear weight matrix, its smallest magnitudes, set to 0."""
    for module in linear_layers(model).values():
        n_pruned = int(share * module.weight.numel())
        smallest = module.weight.abs().flatten().argsort(stable=True)[:n_pruned]
        module.weight.view(-1)[smallest] = 0.0
    return model


def attack_probe(target: Target, knowledge: AttackerKnowledge, settings: AttackSection) -> list[Json]:
    """Probing: is the knowledge hidden inside, or only not said?

    At every layer, from 0, the answer is read from the residual at the end of the question, after the guard's edit
    where there is one: as the model's own head would read it there (logit lens), and by a linear map that an attacker
    fits on `known` questions (linear probe), with the penalty `probe_ridge`. Choices are told apart by their first
    token. Points of the probe also hold `n_known`.
    """
    lens: dict[str, list[Json]] = {}
    probe: dict[str, list[Json]] = {}
    for side, model in target.models.items():
        norm, head = _reader(model.model)
        known, forget = (_read_residuals(model, questions) for questions in (knowledge.known, knowledge.forget))
        n_layers = len(forget.resid_END)
        lens[side], probe[side] = [], []
        for layer in range(n_layers):
            with torch.no_grad():
                lens_NV = head(norm(forget.resid_END[layer].to(head.weight))).float()
            lens[side].append(_accuracy(lens_NV, forget))
            answer_ND = head.weight.float()[known.words_NC.gather(1, known.answer_N[:, None])[:, 0]]
            read = ridge_regression(known.resid_END[layer], answer_ND, settings.probe_ridge)
            probe_NV = read(forget.resid_END[layer]) @ head.weight.float().T
            probe[side].append(_accuracy(probe_NV, forget) | {"n_known": len(knowledge.known)})
            target.job.progress(f"probing, {side}, layers", layer + 1, n_layers)
    return [
        {"x": layer, "variant": variant, **{side: accuracies[side][layer] for side in SIDES}}
        for variant, accuracies in (("logit lens", lens), ("linear probe", probe))
        for layer in range(len(accuracies[BASE]))
    ]


@dataclass(frozen=True)
class _QuestionResiduals:
    """What was read while questions were put; N questions, E layers, C choices."""

    resid_END: Tensor
    """After each layer, at the last token of the question, float32."""
    words_NC: Tensor
    """First token of each choice; the shortest list's end is repeated."""
    answer_N: Tensor
    gated_N: list[bool]


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
def _read_residuals(model: GuardedModel, questions: Sequence[Question]) -> _QuestionResiduals:
    """Put the questions, without any answer."""
    tokenizer, device = model.tokenizer, model.device
    pairs = [[encode_pair(tokenizer, q.context, choice, bos=model.bos) for choice in q.choices] for q in questions]
    rows = [list(choices[0].context)[-model.max_length :] for choices in pairs]
    n_layers = len(decoder_layers(model.model))
    resid: list[list[Tensor]] = [[] for _ in range(n_layers)]
    gated: list[bool] = []
    with guarded(model.model, model.guardrails, allow_mismatch=True), ExitStack() as hooks:
        # Hooks run in the order in which they were put on: these see what the guard made of the residual.
        for layer in range(n_layers):
            site = HookSite(layer, "resid_post")
            hooks.enter_context(replace_residual(model.model, site, functools.partial(_keep, resid[layer])))
        for start in range(0, len(rows), model.batch_size):
            part = rows[start : start + model.batch_size]
            batch = pad_rows(part, tokenizer.pad_token_id or 0, special_ids(tokenizer), device)
            model.model(input_ids=batch.ids_BL, attention_mask=batch.mask_BL.long(), use_cache=False)
            last_B = batch.mask_BL.sum(-1) - 1
            for kept in resid:
                whole_BLD = kept.pop()
                row_B = torch.arange(len(part), device=whole_BLD.device)
                kept.append(whole_BLD[row_B, last_B.to(whole_BLD.device)].float().to(device))
            gated += [is_gated for _, is_gated, _ in last_decisions(model.guardrails)] if model.guardrails else []
    longest = max(map(len, pairs))
    words = [[pair.continuation[0] for pair in choices] for choices in pairs]
    return _QuestionResiduals(
        torch.stack([torch.cat(kept) for kept in resid]),
        torch.tensor([[*own, *own[-1:] * (longest - len(own))] for own in words], device=device),
        torch.tensor([question.answer for question in questions], device=device),
        gated,
    )


def _keep(kept: list[Tensor], resid_BLD: Tensor) -> Tensor:
    kept.append(resid_BLD)
    return resid_BLD


def ridge_regression(known_ND: Tensor, answer_ND: Tensor, ridge: float) -> Callable[[Tensor], Tensor]:
    """A linear map from residuals to the directions of right answers.

    In its dual form, for there are fewer questions than dimensions: with X and Y without their means,
    W = X' (X X' + ridge * trace(X X') / N * I)^-1 Y.
    """
    mean_D, answer_mean_D = known_ND.mean(0), answer_ND.mean(0)
    centred_ND = known_ND - mean_D
    gram_NN = centred_ND @ centred_ND.T
    penalty = ridge * gram_NN.diagonal().mean().clamp(min=torch.finfo(gram_NN.dtype).tiny)
    eye_NN = torch.eye(len(gram_NN), device=gram_NN.device, dtype=gram_NN.dtype)
    map_DD = centred_ND.T @ torch.linalg.solve(gram_NN + penalty * eye_NN, answer_ND - answer_mean_D)
    return lambda resid_ND: (resid_ND - mean_D) @ map_DD + answer_mean_D


def _accuracy(logits_NV: Tensor, questions: _QuestionResiduals) -> Json:
    """How often the right choice's word has the largest logit."""
    n, gated = len(questions.answer_N), questions.gated_N
    n_right = int((logits_NV.gather(1, questions.words_NC).argmax(1) == questions.answer_N).sum())
    low, high = wilson(n_right, n)
    measured: Json = {"forget_acc": n_right / n, "forget_low": low, "forget_high": high, "n": n}
    return measured | ({"gate_rate": sum(gated) / len(gated)} if gated else {})
