"""The optimizer's one pass, on an engine without ZeRO; ranks and stages are in test_players.py."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sadm_fast.config_training import OptimizerConfig, PowerEMA
from sadm_fast.ema import EMA
from sadm_fast.engine.fused_step import FusedStep
from sadm_fast.engine.masters import owned
from sadm_fast.engine.state import pieces, restore, steps_taken

CONFIG = OptimizerConfig(lr=0.01, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1, gradient_clipping=0.5)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(30, 40), nn.Linear(40, 10, bias=False))


def optimizer(module: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        module.parameters(), CONFIG.lr, CONFIG.betas, CONFIG.eps, CONFIG.weight_decay, fused=True
    )  # fmt: skip


def engine() -> Any:
    """What FusedStep asks of DeepSpeed's engine at stage 0 in fp32, where the wrapper is torch's optimizer itself."""
    module = network()
    return SimpleNamespace(
        module=module,
        optimizer=optimizer(module),
        device=torch.device("cpu"),
        global_rank=0,
        zero_optimization_stage=lambda: 0,
    )


def gradients(module: nn.Module, step: int, scale: float = 1.0) -> None:
    torch.manual_seed(100 + step)
    for parameter in module.parameters():
        parameter.grad = scale * torch.randn_like(parameter)


def weights(module: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def test_it_is_clipping_adamw_and_the_average():
    one, plain = engine(), network()
    step, other = FusedStep(one, CONFIG), optimizer(plain)
    profile = PowerEMA(profile="power", std=0.1)
    inside = EMA(lambda: list(owned(one)), profile)
    inside.join(step)
    beside = EMA(lambda: list(owned(SimpleNamespace(module=plain, optimizer=other))), profile)
    for n in range(4):
        scale = 0.001 if n == 2 else 1.0  # below the norm that is clipped
        gradients(one.module, n, scale)
        gradients(plain, n, scale)
        norm = nn.utils.clip_grad_norm_(plain.parameters(), CONFIG.gradient_clipping)
        other.step()
        beside.update()
        one.optimizer.step()
        step.settle(taken=True)
        inside.update()
        # A sum of 1,600 squares in float32; the clipped gradients differ by as much.
        assert float(step.norm) == pytest.approx(float(norm), rel=1e-5)
    for found, expected in zip(weights(one.module), weights(plain), strict=True):
        # 4 steps of at most lr = 0.01; their sizes agree to the gradients' 1e-5, and sums round at 2^-24 of 1.
        torch.testing.assert_close(found, expected, rtol=0, atol=4 * (1e-7 + 2**-24))
    for a, b in zip(inside.average, beside.average, strict=True):
        torch.testing.assert_close(a.value, b.value, rtol=0, atol=4 * (1e-7 + 2**-24))
    assert inside.updates == beside.updates == steps_taken(one) == 4


@pytest.mark.parametrize("bad", ["gradient", "veto"])
def test_nothing_changes_where_something_is_not_finite(bad: str):
    one, spared = engine(), engine()
    step, other = FusedStep(one, CONFIG), FusedStep(spared, CONFIG)
    ema = EMA(lambda: list(owned(one)), PowerEMA(profile="power", std=0.1))
    ema.join(step)
    for n in range(3):
        gradients(one.module, n)
        before = [value.clone() for value in (*weights(one.module), *(f.value for f in ema.average))]
        if n == 1:
            if bad == "gradient":
                next(one.module.parameters()).grad.view(-1)[5] = math.inf
            else:
                step.veto = torch.tensor(math.nan)
        step()
        taken = math.isfinite(float(step.norm))
        assert taken == (n != 1)
        step.settle(taken)
        step.veto = None
        if taken:
            gradients(spared.module, n)
            other()
            other.settle(taken=True)
        else:
            after = (*weights(one.module), *(f.value for f in ema.average))
            assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    # The step that was not taken does not count in the bias correction either.
    assert steps_taken(one) == steps_taken(spared) == 2
    assert all(torch.equal(a, b) for a, b in zip(weights(one.module), weights(spared.module), strict=True))


def test_it_goes_on_from_a_loaded_state():
    one, other = engine(), engine()
    step, resumed = FusedStep(one, CONFIG), FusedStep(other, CONFIG)
    for n in range(4):
        if n == 2:
            saved = {(p.kind, p.name): p.value.clone() for p in pieces(one)}

            def read(kind: str, name: str, start: int, count: int, saved: dict[Any, Tensor] = saved) -> Tensor:
                return saved[kind, name][start : start + count]

            restore(other, read, steps_taken(one))
        for each, of in ((one, step), (other, resumed)):
            if of is step or n >= 2:
                gradients(each.module, n)
                of()
                of.settle(taken=True)
    assert steps_taken(other) == 4
    assert all(torch.equal(a, b) for a, b in zip(weights(one.module), weights(other.module), strict=True))
