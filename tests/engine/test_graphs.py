"""A module replayed against itself called, on a CPU by tests/support/cuda_graphs.py, and on a device."""

import copy

import pytest
import torch
from torch import Tensor, nn

from sadm_fast.engine.graphs import graph_in_place
from tests.support.cuda_graphs import recorded_on_cpu


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    if request.param == "cpu":
        monkeypatch.setattr("sadm_fast.engine.graphs.record", recorded_on_cpu)
    elif not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device(request.param)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.last(self.first(x).tanh() * y[:, None])


def both(device: torch.device) -> tuple[Network, Network]:
    torch.manual_seed(0)
    eager = Network().to(device)
    graphed = copy.deepcopy(eager)
    graph_in_place(graphed)
    return eager, graphed


def arguments(device: torch.device, seed: int, rows: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 4, generator=generator).to(device), torch.arange(rows, device=device)


def test_outputs_and_gradients_follow_inputs_and_weights(device: torch.device):
    eager, graphed = both(device)
    assert list(graphed.state_dict()) == list(eager.state_dict())
    kept = []
    for step in range(3):
        for micro_batch in range(2):  # gradients add up
            outputs = [network(*arguments(device, 2 * step + micro_batch)) for network in (eager, graphed)]
            torch.testing.assert_close(*outputs)
            kept.append((outputs[0].detach(), outputs[1].detach()))
            for output in outputs:
                output.square().sum().backward()
        for a, b in zip(eager.parameters(), graphed.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad)
        for network in (eager, graphed):
            optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
            optimizer.step()
            optimizer.zero_grad()
    for a, b in kept:  # no later replay has changed them
        torch.testing.assert_close(a, b)


def test_each_way_of_calling_has_a_graph_of_its_own(device: torch.device):
    eager, graphed = both(device)
    for rows in (3, 5, 3):
        with torch.no_grad():
            outputs = [network(*arguments(device, 0, rows)) for network in (eager, graphed)]
        assert not outputs[1].requires_grad
        torch.testing.assert_close(*outputs)
    gradients = []
    for network in (eager, graphed):
        own = network(*arguments(device, 1))  # its backward comes after that of the frozen way
        x, y = arguments(device, 2)
        network.requires_grad_(False)
        network(x.requires_grad_(), y).sum().backward()
        network.requires_grad_(True)
        assert all(p.grad is None for p in network.parameters())
        own.sum().backward()
        gradients.append([x.grad, *(p.grad for p in network.parameters())])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_a_backward_whose_activations_are_gone_is_refused(device: torch.device):
    _, graphed = both(device)
    first = graphed(*arguments(device, 0))
    graphed(*arguments(device, 1))
    with pytest.raises(RuntimeError, match="were overwritten by a later forward"):
        first.sum().backward()
