"""A network whose weights are views of flat parameters, against the network itself."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sadm_fast.engine.flat import Flat, network_of


class Network(nn.Module):
    """Layers of several kinds, a weight that is not trained and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 7)
        self.inner = nn.Sequential(nn.Linear(7, 7, bias=False), nn.LayerNorm(7))
        self.scale = nn.Parameter(torch.rand(7))
        self.fixed = nn.Parameter(torch.rand(7), requires_grad=False)
        self.register_buffer("shift", torch.rand(7))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.first(x).tanh()) * self.scale * self.fixed + self.shift


def both(size: int, in_blocks: bool = False) -> tuple[Network, Flat]:
    torch.manual_seed(0)
    plain = Network()
    torch.manual_seed(0)
    network = Network()
    return plain, Flat(network, size, [network.first, network.inner] if in_blocks else [])


@settings(max_examples=20, deadline=None)
@given(size=st.integers(1, 200), in_blocks=st.booleans())
def test_values_and_gradients_are_the_networks_own(size: int, in_blocks: bool):
    plain, flat = both(size, in_blocks)
    x = torch.randn(3, 5)
    expected, found = plain(x), flat(x)
    assert found.equal(expected)
    expected.square().sum().backward()
    found.square().sum().backward()
    gradients = {
        place.name: p.grad[low:high].view(place.shape)
        for name, p in flat.named_parameters()
        if p.grad is not None
        for place, low, high in flat.within(name, 0, p.numel())
    }
    own = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    assert gradients.keys() == own.keys()
    assert all(gradients[name].equal(own[name]) for name in own)


def test_flat_parameters_keep_the_order_and_no_more_than_size_unless_one_weight_is_larger():
    plain, flat = both(size=45)
    sizes = [parameter.numel() for parameter in flat.flat]
    assert sizes == [7 + 35, 7, 49, 7 + 7]
    names = [place.name for places in flat.places for place in places]
    assert sorted(names) == sorted(name for name, p in plain.named_parameters() if p.requires_grad)
    assert [name for name, p in flat.named_parameters() if not p.requires_grad] == ["network.fixed"]
    assert [name for name, _ in flat.named_buffers()] == ["network.shift"]


def test_a_range_of_a_flat_parameter_in_the_networks_names():
    _, flat = both(size=45)
    found = [(place.name, low, high) for place, low, high in flat.within("flat.3", 5, 4)]
    last = [place.name for place in flat.places[3]]
    assert found == [(last[0], 5, 7), (last[1], 7, 9)]
    assert list(flat.within("flat.3", 14, 10)) == []


def test_a_frozen_network_gets_no_gradient_and_another_precision_is_followed():
    _, flat = both(size=1000)
    x = torch.randn(3, 5, requires_grad=True)
    flat.requires_grad_(False)
    flat(x).sum().backward()
    assert x.grad is not None and all(p.grad is None for p in flat.parameters())
    assert flat.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    assert network_of(flat) is flat.network and network_of(flat.network) is flat.network


def test_a_flat_parameter_has_its_gradient_when_the_first_block_in_it_has_run_backward():
    blocks = [nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)) for _ in range(3)]
    flat = Flat(nn.Sequential(nn.Linear(4, 4), *blocks, nn.Linear(4, 4)), 60, blocks)
    assert [[place.name for place in places] for places in flat.places] == [
        ["0.weight", "0.bias"],
        ["1.0.weight", "1.0.bias", "1.2.weight", "1.2.bias", "2.0.weight", "2.0.bias"],
        ["2.2.weight", "2.2.bias", "3.0.weight", "3.0.bias", "3.2.weight", "3.2.bias"],
        ["4.weight", "4.bias"],
    ]
    events: list[str] = []
    for index, block in enumerate(blocks, start=1):
        block.register_full_backward_hook(lambda *_, index=index: events.append(f"block {index}"))
    for index, parameter in enumerate(flat.flat):
        parameter.register_post_accumulate_grad_hook(lambda _, index=index: events.append(f"gradient {index}"))
    flat(torch.randn(2, 4, requires_grad=True)).sum().backward()
    assert events == ["block 3", "block 2", "gradient 2", "block 1", "gradient 1", "gradient 3", "gradient 0"]
