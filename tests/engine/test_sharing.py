"""S over a process group: what travels while what is computed, and what is agreed on how often."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from sadm_fast.diffusion import EDM
from sadm_fast.engine.sharing import SharedComparison
from sadm_fast.game import Batch, Comparison, discriminator_loss, draw, frozen, structure_distance
from sadm_kernels import Queue, backends

SIZE, WIDTH = 6, 5


@pytest.fixture
def group() -> Iterator[Any]:
    """A group of this process alone, whose collectives are those of a larger one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


class Psi(nn.Module):
    """Notes when it runs."""

    def __init__(self, events: list[str]) -> None:
        super().__init__()
        self.layer, self._events = nn.Linear(16, WIDTH), events

    def forward(self, x: Tensor) -> Tensor:
        self._events.append("Psi")
        return self.layer(x.flatten(1))


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happens, in order: collectives begin and are waited for."""
    found: list[str] = []
    gather = dist.all_gather

    class Watched:
        def __init__(self, work: Any, name: str) -> None:
            self._work, self._name = work, name

        def wait(self) -> None:
            found.append(f"wait for {self._name}")
            self._work.wait()

    def watched(parts: list[Tensor], own: Tensor, group: Any = None, async_op: bool = False) -> Any:
        name = "features" if own.dim() == 2 else "weights" if own.is_floating_point() else "labels"
        if not async_op:
            found.append("check")
            return gather(parts, own, group=group)
        found.append(f"send {name}")
        return Watched(gather(parts, own, group=group, async_op=True), name)

    monkeypatch.setattr(dist, "all_gather", watched)
    return found


def batch() -> Batch:
    ids = torch.arange(SIZE)
    x0 = torch.randn(SIZE, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    return draw(EDM(), x0, ids % 2, ids, seed=0, null_class=2, label_dropout=0.1)


def xhat0() -> Tensor:
    return torch.randn(SIZE, 1, 4, 4, generator=torch.Generator().manual_seed(1)).requires_grad_(True)


def queue() -> Queue:
    real, fake = torch.randn(2, 9, WIDTH, generator=torch.Generator().manual_seed(2))
    return Queue(real, fake, torch.linspace(0.1, 1, 9), torch.arange(9) % 2)


@pytest.mark.skipif(backends()["native"] != "ok", reason=backends()["native"])
def test_real_features_travel_while_psi_runs_on_the_generated_samples(group: Any, events: list[str]) -> None:
    psi = Psi(events)
    compare = SharedComparison(group=group, gate_log_snr=0.0, same_class=True)
    with frozen(psi):
        structure_distance(compare, EDM(), psi, batch(), xhat0())
    sent = ["send features", "send weights", "send labels"]
    assert events[:2] == ["Psi", "check"] and events[2:5] == sent and events[5:7] == ["Psi", "send features"]
    # Nothing is waited for before everything is on its way.
    assert all(event.startswith("wait") for event in events[7:]) and len(events) == 11


@pytest.mark.skipif(backends()["native"] != "ok", reason=backends()["native"])
def test_ranks_agree_once_on_what_stays_the_same(group: Any, events: list[str]) -> None:
    psi, compare = Psi(events), SharedComparison(group=group)
    for _ in range(3):
        discriminator_loss(compare, EDM(), psi, batch(), xhat0())
        structure_distance(compare, EDM(), psi, batch(), xhat0())
    assert events.count("check") == 1
    smaller = batch().each(lambda x: x[:4])
    structure_distance(compare, EDM(), psi, smaller, xhat0()[:4])
    assert events.count("check") == 2


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("past", [False, True])
@pytest.mark.parametrize("gate", [None, 0.0])
def test_a_group_of_one_changes_no_bit_of_the_fused_loss(group: Any, impl: str, past: bool, gate: float | None) -> None:
    results = []
    for ranks in (None, group):
        psi = Psi([])
        torch.manual_seed(0)
        psi.layer.reset_parameters()
        fields: dict[str, Any] = {"normalize": "mean", "gate_log_snr": gate, "same_class": True, "impl": impl}
        compare = Comparison(**fields) if ranks is None else SharedComparison(**fields, group=ranks)
        estimate, extra = xhat0(), queue() if past else None
        loss = discriminator_loss(compare, EDM(), psi, batch(), estimate, extra)
        of_psi = torch.autograd.grad(loss, list(psi.parameters()))
        with frozen(psi):
            structure = structure_distance(compare, EDM(), psi, batch(), estimate, extra)
        (of_estimate,) = torch.autograd.grad(structure.distance, estimate)
        results.append([loss.detach(), *of_psi, structure.distance.detach(), of_estimate])
    for alone, shared in zip(*results, strict=True):
        if impl == "reference":  # its gradient of a row comes along two ways, added up in another order: two roundings
            torch.testing.assert_close(shared, alone, rtol=4 * 2.0**-23, atol=1e-6)
        else:
            assert torch.equal(alone, shared)
