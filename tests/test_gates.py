"""Gate statistics against plain loops: whole, in chunks, padded and packed."""

from __future__ import annotations

import math

import pytest
import torch

from dsg_cli.guardrail.runtime.gates import CAUSAL_FORMS, CUSUM_CAP, FORMS, Gate, latched_at


def plain(form, signal, counted, window=4):
    """The statistic after each token of one sequence, by the definition."""
    if form == "cusum":
        return plain_cusum(signal, counted)
    values = [s for s, is_counted in zip(signal, counted, strict=True) if is_counted]
    if form == "token":
        return [
            max((s for s, c in zip(signal[: end + 1], counted, strict=False) if c), default=0.0)
            for end in range(len(signal))
        ]
    if form == "mean":
        return [sum(values) / max(len(values), 1)] * len(signal)
    seen, best, found = [], 0.0, []
    for value, is_counted in zip(signal, counted, strict=True):
        if is_counted:
            seen.append(value)
            share = sum(seen) / max(len(seen), window) if form == "causal-mean" else sum(seen[-window:]) / window
            best = max(best, share)
        found.append(best)
    return found


def plain_cusum(signal, counted):
    total, best, found = 0.0, 0.0, []
    for value, is_counted in zip(signal, counted, strict=True):
        if is_counted:
            total = max(0.0, total + round((value - 1) * 256) / 256)
            best = max(best, total)
        found.append(best)
    return found


def example(form, seed, n=23):
    generator = torch.Generator().manual_seed(seed)
    signal = torch.rand(3, n, generator=generator)
    score, _ = FORMS[form]
    signal = (signal > 0.6).float() if score == "active" else 3 * signal * (signal > 0.5)
    return signal, torch.rand(3, n, generator=generator) > 0.2


@pytest.mark.parametrize("form", ["mean", *CAUSAL_FORMS])
def test_equals_the_definition(form):
    gate = Gate(form, 0.5)
    for seed in range(5):
        signal, counted = example(form, seed)
        found, states = gate.scan(signal, counted, gate.initial_state(3, signal.device))
        assert states.shape == (3, 23, gate.state_size)
        for row in range(3):
            assert found[row].tolist() == pytest.approx(plain(form, signal[row].tolist(), counted[row].tolist()))


@pytest.mark.parametrize("window", [1, 2, 4, 30])
@pytest.mark.parametrize("form", CAUSAL_FORMS)
def test_chunks_give_the_same_numbers_bit_for_bit(form, window):
    gate = Gate(form, 0.5, window)
    signal, counted = example(form, 7)
    whole, states = gate.scan(signal, counted, gate.initial_state(3, signal.device))
    for sizes in ([1] * 23, [10, 13], [3, 1, 1, 18], [22, 1]):
        state, parts, start = gate.initial_state(3, signal.device), [], 0
        for size in sizes:
            part = slice(start, start + size)
            statistic, after = gate.scan(signal[:, part], counted[:, part], state)
            parts.append(statistic)
            state, start = after[:, -1], start + size
        assert torch.equal(torch.cat(parts, -1), whole) and torch.equal(state, states[:, -1])


@pytest.mark.parametrize("form", ["mean", *CAUSAL_FORMS])
def test_padding_on_either_side_moves_nothing(form):
    gate = Gate(form, 0.5)
    signal, counted = example(form, 3)
    alone, _ = gate.scan(signal, counted, gate.initial_state(3, signal.device))
    noise, off = torch.full((3, 5), 9.0), torch.zeros(3, 5, dtype=torch.bool)
    for left in (True, False):
        order = (noise, signal) if left else (signal, noise)
        mask = (off, counted) if left else (counted, off)
        found, _ = gate.scan(torch.cat(order, -1), torch.cat(mask, -1), gate.initial_state(3, signal.device))
        assert torch.equal(found[:, 5:] if left else found[:, :-5], alone)


@pytest.mark.parametrize("form", ["mean", *CAUSAL_FORMS])
def test_packed_sequences_are_decided_on_alone(form):
    gate = Gate(form, 0.5)
    signal, counted = example(form, 11)
    segment = torch.tensor([0] * 6 + [1] * 9 + [2] * 8).expand(3, -1)
    packed, _ = gate.scan(signal, counted, gate.initial_state(3, signal.device), segment)
    for part in (slice(0, 6), slice(6, 15), slice(15, 23)):
        alone, _ = gate.scan(signal[:, part], counted[:, part], gate.initial_state(3, signal.device))
        torch.testing.assert_close(packed[:, part], alone, rtol=0, atol=0)


@pytest.mark.parametrize("form", ["mean", *CAUSAL_FORMS])
def test_an_infinite_signal_is_never_forgotten(form):
    gate = Gate(form, 0.5)
    signal, counted = torch.zeros(1, 9), torch.ones(1, 9, dtype=torch.bool)
    signal[0, 4] = math.inf
    found, states = gate.scan(signal, counted, gate.initial_state(1, signal.device))
    assert (found[0, 4:] == math.inf).all()
    if form != "mean":
        later, _ = gate.scan(torch.zeros(1, 40), torch.ones(1, 40, dtype=torch.bool), states[:, -1])
        assert (later == math.inf).all()


@pytest.mark.parametrize("form", CAUSAL_FORMS)
def test_the_statistic_at_a_token_is_that_of_its_prefix(form):
    """What a gate has decided is what it would have decided had the text ended there: no look ahead."""
    gate = Gate(form, 0.5)
    signal, counted = example(form, 5)
    whole, _ = gate.scan(signal, counted, gate.initial_state(3, signal.device))
    for end in range(1, 24):
        prefix, _ = gate.scan(signal[:, :end], counted[:, :end], gate.initial_state(3, signal.device))
        assert torch.equal(prefix[:, -1], whole[:, end - 1])


def test_without_a_gate_every_active_token_and_all_after_it_exceed_the_threshold():
    """And none before it: whatever is active is clamped, and a sequence is told apart from one with no active token."""
    gate = Gate("token", 0.5)
    active = torch.tensor([[0, 0, 1, 0, 1], [0, 0, 0, 0, 0], [1, 0, 0, 0, 0]]).float()
    counted = torch.ones(3, 5, dtype=torch.bool)
    counted[2, 0] = False  # Active, but BOS.
    found, states = gate.scan(active, counted, gate.initial_state(3, active.device))
    assert (found > gate.threshold).tolist() == [[False, False, True, True, True], [False] * 5, [False] * 5]
    assert [latched_at(row > gate.threshold) for row in found] == [2, None, None]
    assert gate.state_size == 1 and gate.is_causal and gate.peak(states[:, -1]).tolist() == [1.0, 0.0, 0.0]


def test_token_scores():
    active, weighted = torch.tensor([[True, False]]), torch.tensor([[3.0, -30.0]])
    assert Gate("mean", 0.5).score(active, weighted).tolist() == [[1.0, 0.0]]
    assert Gate("window", 0.5).score(active, weighted).tolist() == [[3.0, -30.0]]
    assert Gate("cusum", 0.5, clip=2.0).score(active, weighted).tolist() == [[2.0, -30.0]]
    probe = Gate("probe", 0.5, bias=-1.0, clip=8.0)
    assert probe.score(active, weighted).tolist() == [[10.0, 0.0]]  # clip(3 - 1) + 8, and the floor
    assert probe.score(active, torch.full((1, 2), 99.0)).max() == 16.0


def test_a_cusum_that_is_full_counts_as_infinite():
    gate = Gate("cusum", 5.0)
    signal, counted = torch.full((1, 5000), 17.0), torch.ones(1, 5000, dtype=torch.bool)
    found, states = gate.scan(signal, counted, gate.initial_state(1, signal.device))
    assert found[0, 10] == 176.0 and found[0, -1] == math.inf and states[0, -1, 0] == CUSUM_CAP
