"""The fp32 masters of every ZeRO stage, precision and world size, and averages of their fragments."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sadm_fast.engine.masters import Fragment, gather
from tests.support.ranks import run_once


@pytest.fixture(scope="session", params=[1, 2], ids=["one rank", "two ranks"])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank of engine_worker.py found of the masters, by case."""
    found = run_once(tmp_path_factory, "tests.support.engine_worker", request.param)
    return [rank["masters"] for rank in found]


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.slow
def test_the_masters_are_deepspeeds_own_and_train(ranks: list[dict[str, Any]]):
    for case in ranks[0]:
        for found in (rank[case] for rank in ranks):
            before, *_, now = found["history"]
            moved = max(float((now[name] - before[name]).abs().max()) for name in now)
            assert moved > 1e-3, case
            assert same(now, ranks[0][case]["history"][-1]), f"{case}: ranks differ"
            if not case.startswith("zero0"):  # DeepSpeed has no view of its own without ZeRO
                assert same(found["deepspeed"], now), case


@pytest.mark.slow
def test_the_networks_weights_are_the_masters_rounded(ranks: list[dict[str, Any]]):
    for case in ranks[0]:
        found = ranks[0][case]
        masters = found["history"][-1]
        if case.endswith("fp32"):
            assert same(found["module"], masters), case
        else:
            rounded = {name: value.bfloat16().float() for name, value in masters.items()}
            assert same(found["module"], rounded), case
            assert not same(rounded, masters), f"{case}: the masters are no finer than bf16"


@pytest.mark.slow
def test_a_rank_owns_its_share_and_the_fragments_stay_views(ranks: list[dict[str, Any]]):
    for case in ranks[0]:
        total = sum(value.numel() for value in ranks[0][case]["history"][0].values())
        owned = [rank[case]["owned"] for rank in ranks]
        if case.startswith("zero0"):
            assert owned == [total] * len(ranks), case
        else:
            assert sum(owned) == total, case
            assert max(owned) <= total // len(ranks) + len(ranks), f"{case}: not divided evenly: {owned}"
        assert all(rank[case]["views"] for rank in ranks), f"{case}: training replaced the masters' memory"


def plain_average(history: list[dict[str, Tensor]], profile: str) -> dict[str, np.ndarray]:
    """The average of full weights after each step but the first entry, in float64."""
    gamma = float(np.roots([1.0, 7.0, 16.0 - 0.2**-2, 12.0 - 0.2**-2]).real.max())  # EDM2's for std 0.2
    average: dict[str, np.ndarray] = {}
    for n, weights in enumerate(history[1:], start=1):
        decay = (1 - 1 / n) ** (gamma + 1) if profile == "power" else min(0.3, (n - 1) / (n + 9))
        for name, value in weights.items():
            old = average.get(name, np.zeros(value.shape))
            average[name] = decay * old + (1 - decay) * value.double().numpy()
    return average


@pytest.mark.slow
def test_averages_of_fragments_equal_averages_of_full_weights(ranks: list[dict[str, Any]]):
    for case in ranks[0]:
        found = ranks[0][case]
        assert found["updates"] == len(found["history"]) - 1
        for profile, average in found["averages"].items():
            for name, expected in plain_average(found["history"], profile).items():
                # Each update rounds twice to 2^-24 of weights below 2: three updates stay under 1e-6.
                np.testing.assert_allclose(average[name].numpy(), expected, rtol=0, atol=1e-6, err_msg=f"{case} {name}")


@pytest.mark.slow
def test_an_average_taken_from_full_weights_is_the_same_bit_for_bit(ranks: list[dict[str, Any]]):
    for rank in ranks:
        for case in ranks[0]:
            assert same(rank[case]["loaded"], rank[case]["averages"]["power"]), case


def test_gather_puts_fragments_where_they_belong():
    pieces = [Fragment("b", 0, torch.tensor([7.0])), Fragment("a", 4, torch.ones(2)), Fragment("a", 0, torch.zeros(4))]
    full = gather(pieces, {"a": (2, 3), "b": (1,)})
    assert torch.equal(full["a"], torch.tensor([[0.0, 0.0, 0.0], [0.0, 1.0, 1.0]]))
    assert torch.equal(full["b"], torch.tensor([7.0]))


def test_gather_names_a_parameter_of_which_something_is_missing():
    with pytest.raises(RuntimeError, match="blocks.0.weight"):
        gather([Fragment("blocks.0.weight", 0, torch.ones(5))], {"blocks.0.weight": (2, 3)})
