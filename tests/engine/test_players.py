"""The engines against plain autograd: every mode, ZeRO stage, accumulation and world size, in one launch a world size.

engine_worker.py plays the cases of engine_cases.py under DeepSpeed; autograd_reference.py plays them here.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from sadm_fast.build import build_denoiser, build_psi
from sadm_fast.engine.feature_queue import check_queue
from sadm_fast.engine.optimizers import deepspeed_dict, learning_rate
from sadm_fast.engine.players import _or_nan
from sadm_fast.errors import UserError
from tests.support.autograd_reference import Trace, play
from tests.support.engine_cases import (
    BAD_PLAYER,
    CLASSES,
    CLIP,
    ITERATIONS,
    STAGES,
    Case,
    cases,
    compiled_cases,
    matrix,
    micro_batch,
    poisoned_cases,
    see,
    starting_weights,
    traced_cases,
)
from tests.support.ranks import run_once

WORLD_SIZES = (1, 2)

# fp32: a distance d between unit rows comes from 2 - 2ab and is off by about 2 eps / d^2 of itself, eps = 2^-24.
# The closest pairs here are some 0.05 apart: 5e-5. A step is lr g / (|g| + eps_adam), lr = 1e-2, so three steps differ
# by at most 3 * 1e-2 * 5e-5 = 1.5e-6, and about as much again because the next gradients are taken elsewhere. Weights
# move by 1e-2 and more; a loss that is lost or counted twice moves them by more than 1e-3 (there is a test for that).
FP32_WEIGHTS, FP32_NORMS = 5e-6, 3e-4
# bf16: features are rounded to 2^-9 of their length, which is 4% of the distance of rows 0.05 apart; the later steps
# are taken from weights rounded likewise. A lost or doubled term changes an update by a third and more.
BF16_UPDATE, BF16_NORMS = 0.1, 0.15

Results = Callable[[int], list[dict[str, Any]]]


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """results(world size): what each rank found."""
    return cache(lambda world_size: run_once(tmp_path_factory, "tests.support.engine_worker", world_size))


_TRACES: dict[str, Trace] = {}


def reference(case: Case, world_size: int, first: int = 0) -> Trace:
    """Plain autograd's answer to iterations `first` .. ITERATIONS-1; it knows neither stages nor implementations."""
    settings = [case.mode, case.clipping, case.game, case.precision, case.accumulation, case.depth, case.shown]
    settings += [case.unet, case.difffit]
    settings += [world_size, first]
    key = json.dumps(settings)
    if key not in _TRACES:
        config = case.config
        batches = [
            [
                [micro_batch(config, iteration, k, rank, world_size) for rank in range(world_size)]
                for k in range(case.accumulation)
            ]
            for iteration in range(first, ITERATIONS)
        ]
        denoiser, psi = build_denoiser(config, CLASSES), build_psi(config)
        for module, seed in ((denoiser, 1), (psi, 2)):
            starting_weights(module, seed)
            if case.precision == "bf16":
                module.bfloat16()
        _TRACES[key] = play(config, denoiser, psi, batches, *([see] if case.shown else []))
    return _TRACES[key]


def start(case: Case) -> dict[str, dict[str, Tensor]]:
    """Weights before the first step, by player."""
    modules = {"denoiser": build_denoiser(case.config, CLASSES), "discriminator": build_psi(case.config)}
    for seed, module in enumerate(modules.values(), start=1):
        starting_weights(module, seed)
    return {
        player: {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}
        for player, module in modules.items()
    }


def difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Largest difference between two sets of weights."""
    assert a.keys() == b.keys()
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)


def relative_update_error(found: dict[str, Tensor], expected: dict[str, Tensor], before: dict[str, Tensor]) -> float:
    """||found - expected|| / ||expected - before||, over all weights of a player."""
    wrong = sum(float((found[name].double() - expected[name]).square().sum()) for name in expected)
    moved = sum(float((expected[name] - before[name].bfloat16().double()).square().sum()) for name in expected)
    return (wrong / moved) ** 0.5


def weight_problems(case: Case, found: dict[str, dict[str, Tensor]], expected: Trace) -> list[str]:
    """Players whose weights are not those of plain autograd."""
    problems = []
    before = start(case)
    for player, weights in (("denoiser", expected.denoiser), ("discriminator", expected.psi)):
        if player not in found:
            continue
        if case.precision == "bf16":
            error, allowed = relative_update_error(found[player], weights, before[player]), BF16_UPDATE
        else:
            error, allowed = difference(found[player], weights), FP32_WEIGHTS
        if not error <= allowed:
            problems.append(f"{case.name}: {player} off by {error:.1e}, allowed {allowed:.1e}")
    return problems


@pytest.mark.slow
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_weights_equal_plain_autograd(results: Results, world_size: int):
    problems = []
    for case in cases(world_size):
        per_rank = [found["compared"][case.name]["weights"] for found in results(world_size)]
        expected_players = ["denoiser", "discriminator"] if case.mode == "sadm" else ["denoiser"]
        assert list(per_rank[0]) == expected_players
        assert all(difference(per_rank[0][p], other[p]) == 0.0 for other in per_rank for p in other), case.name
        problems += weight_problems(case, per_rank[0], reference(case, world_size))
    assert not problems, "\n".join(problems)


@pytest.mark.soak
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_weights_equal_plain_autograd_in_all_the_matrix(tmp_path_factory: pytest.TempPathFactory, world_size: int):
    ranks = run_once(tmp_path_factory, "tests.support.matrix_worker", world_size, timeout=3600.0)
    problems = []
    for case in matrix(world_size):
        weights = [found[case.name]["weights"] for found in ranks]
        assert all(difference(weights[0][p], other[p]) == 0.0 for other in weights for p in other), case.name
        assert_compiled_once(case, ranks[0][case.name])
        problems += weight_problems(case, weights[0], reference(case, world_size))
    assert not problems, "\n".join(problems)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_gradient_norms_are_those_before_clipping(results: Results, world_size: int):
    problems = []
    for case in cases(world_size):
        expected = reference(case, world_size)
        clipped = 0
        for i, norms in enumerate(results(world_size)[0]["compared"][case.name]["norms"]):
            for player, norm in (("denoiser", expected.denoiser_norms[i]), ("discriminator", expected.psi_norms[i])):
                if player not in norms or norm is None:  # no discriminator, or not its turn yet
                    continue
                clipped += norm > CLIP
                allowed = FP32_NORMS if case.precision == "fp32" else BF16_NORMS
                if not abs(norms[player] - norm) <= allowed * norm:
                    problems.append(f"{case.name}, step {i}: {player} {norms[player]} instead of {norm}")
        assert case.clipping == 0 or clipped == 2 * ITERATIONS, f"{case.name}: nothing to clip"
    assert not problems, "\n".join(problems)


@pytest.mark.slow
def test_logged_losses_are_those_of_plain_autograd(results: Results):
    for case in cases(1):
        if case.precision != "fp32":
            continue
        found, expected = results(1)[0]["compared"][case.name], reference(case, 1)
        for i in range(ITERATIONS):
            # Sums of 64 pixels in fp32, and the distances' own error; see FP32_NORMS.
            assert float(found["loss"][i].mean()) == pytest.approx(expected.losses[i], rel=1e-4), case.name
            assert (found["distance"][i] is None) == (expected.distances[i] is None), case.name
            if expected.distances[i] is not None:
                assert float(found["distance"][i]) == pytest.approx(expected.distances[i], rel=1e-3), case.name


@pytest.mark.slow
def test_the_fast_path_equals_the_reference_path(results: Results):
    compared = results(1)[0]["compared"]
    for fast, slow in (
        ("plain-zero0-accumulation1", "reference-plain"),
        ("structure-zero2-accumulation1", "reference-structure"),
        ("sadm-zero0-accumulation1", "reference-sadm-zero0"),
        ("sadm-zero2-accumulation2", "reference-sadm-zero2-accumulation2"),
    ):
        for player, weights in compared[fast]["weights"].items():
            assert difference(weights, compared[slow]["weights"][player]) <= FP32_WEIGHTS


def test_the_cases_could_tell_a_mistake():
    """Every option of the game, left out, moves some weight by far more than the tolerance."""
    base = Case("", "sadm", 0)
    pairs = [
        (replace(base, name="no discriminator", mode="structure"), base),
        (replace(base, name="no game", mode="plain"), base),
        (replace(base, name="clipped", clipping=CLIP), base),
        (replace(base, name="global", game={"scope": "global"}), base),
        *((case, replace(case, game={})) for case in cases(2) if case.game),
    ]
    for case, without in pairs:
        moved = difference(reference(case, 2).denoiser, reference(without, 2).denoiser)
        assert moved > 100 * FP32_WEIGHTS, case.name
        if case.game.get("queue"):
            without = replace(case, game={name: value for name, value in case.game.items() if name != "queue"})
            moved = difference(reference(case, 2).denoiser, reference(without, 2).denoiser)
            assert moved > 100 * FP32_WEIGHTS, f"{case.name}, without it"


@pytest.mark.slow
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_neither_player_gets_a_gradient_from_the_others_step(results: Results, world_size: int):
    for found in results(world_size):
        for name, players in found["isolated"].items():
            assert all(len(steps) >= 2 for steps in players.values())
            for player, steps in players.items():
                for step in steps:
                    assert step["left"] == 0.0, f"{name}: {player} has a gradient after the other's step"
                    assert step["after"] == step["before"], f"{name}: {player}'s kept gradient changed"


@pytest.mark.slow
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_psi_is_unfrozen_after_an_exception_in_the_denoisers_step(results: Results, world_size: int):
    for found in results(world_size):
        for name, outcome in found["interrupted"].items():
            assert outcome["raised"], name
            assert outcome["asking"] and all(outcome["asking"]), name


@pytest.mark.slow
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_a_nan_in_one_ranks_batch_stops_both_players_on_all_ranks(results: Results, world_size: int):
    for found in results(world_size):
        for name, outcome in found["poisoned"].items():
            assert outcome["raised"], name
            for player, weights in outcome["before"].items():
                assert difference(weights, outcome["after"][player]) == 0.0, f"{name}: {player}"
        for case in poisoned_cases(world_size):
            # The next steps are those of a run that never saw the bad batch.
            weights = found["poisoned"][case.name]["weights"]
            assert not weight_problems(case, weights, reference(case, world_size, first=1)), case.name


@pytest.mark.slow
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_a_gradient_that_is_nan_on_one_rank_is_a_step_of_neither_player(results: Results, world_size: int):
    for found in results(world_size):
        for name, outcome in found["bad_gradients"].items():
            for i, player in enumerate(BAD_PLAYER):
                bad = player is not None
                assert outcome["outcomes"][i] == {"refused": bad, "same": bad}, f"{name}: iteration {i}"
            for player, weights in outcome["weights"].items():
                assert difference(weights, outcome["spared"][player]) == 0.0, f"{name}: {player}"
            queued, spared = outcome["queued"]
            assert queued == spared and (queued > 0) == (name == "queue-zero2"), name


@pytest.mark.slow
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_one_graph_serves_all_blocks_and_a_convolutional_psi_has_none(results: Results, world_size: int):
    graphs = {
        "compiled": 2,  # the trial and a block
        "compiled-accumulation2": 3,  # and a block without gradient
        "compiled-bf16": 2,
        "graphs": 2,
        "graphs-accumulation2": 3,
    }
    for case in compiled_cases(world_size):
        outcome = results(world_size)[0]["compared"][case.name]
        assert outcome["breaks"] == [] and outcome["not_compiled"] is None, case.name
        assert outcome["graphs"] == ITERATIONS * [graphs[case.name]], case.name


@pytest.mark.slow
def test_reduction_starts_while_earlier_blocks_are_still_in_their_backward(results: Results):
    for found in results(2):
        for case in traced_cases(2):
            events = found["traced"][case.name]
            assert [event for event in events if event != "reduce"] == ["block 3", "block 2", "block 1", "block 0"]
            # A flat parameter is smaller than a block, so each block completes one; the next one sends it off.
            assert events[2] == events[4] == "reduce", f"{case.name}: {events}"


def assert_compiled_once(case: Case, outcome: dict[str, Any]) -> None:
    """No graph break, and no graph that the first iteration has not made; none at all without train.compile."""
    first, *later = outcome["graphs"]
    assert set(later) == {first} and outcome["breaks"] == [] and outcome["not_compiled"] is None, case.name
    assert first >= 2 if case.compiled else first == 0, case.name  # the trial and a player


def test_the_learning_rate_warms_up_stays_and_cools_down():
    optimizer = Case("", "sadm", 0).config.denoiser_optimizer.model_copy(update={"lr": 1.0, "warmup_steps": 4})
    assert [learning_rate(optimizer, step, 100) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    cooling = optimizer.model_copy(update={"warmup_steps": 0, "decay_steps": 4})
    assert [learning_rate(cooling, step, 6) for step in range(6)] == [1.0, 1.0, 1.0, 0.75, 0.5, 0.25]


def test_a_queue_has_room_for_a_step_of_all_ranks():
    config = Case("", "sadm", 0, 2, game={"queue": 16}).config
    check_queue(config, world_size=2)
    with pytest.raises(UserError, match=r"^game.queue=16: must be 0, or at least the 24 samples of a step on 3 ranks$"):
        check_queue(config, world_size=3)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("clipping", [0.0, 0.5])
def test_clipping_is_always_told_to_deepspeed(stage: int, clipping: float):
    config = Case("", "sadm", stage, clipping=clipping).config
    derived = deepspeed_dict(config, config.denoiser_optimizer, world_size=2, device_type="cpu")
    # Below stage 3 our own step clips, and twice would be wrong.
    assert derived["gradient_clipping"] == (clipping if stage == 3 else 0.0)
    assert derived["train_batch_size"] == 2 * config.train.micro_batch


def test_a_loss_that_is_not_finite_has_no_finite_gradient() -> None:
    x = torch.tensor([3.0, 1e30], requires_grad=True)
    (of_sum,) = torch.autograd.grad(x.square().sum(), x)  # inf, with a gradient that would be stepped on
    assert of_sum.isfinite().all()
    (of_loss,) = torch.autograd.grad(_or_nan(x.square().sum()), x)
    assert of_loss.isnan().all()
    small = torch.tensor([3.0, 0.1], requires_grad=True)
    loss = small.square().sum()
    assert torch.equal(_or_nan(loss), loss)
    assert torch.equal(*(torch.autograd.grad(f(small.square().sum()), small)[0] for f in (_or_nan, lambda y: y)))
