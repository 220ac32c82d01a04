"""A network whose trained weights are views of a few large parameters, which is all that its engine sees.

DeepSpeed and optimizers run some twenty small kernels for each parameter, and a DiT-XL/2 has 291. Here each flat
parameter is cut by one `split`, whose backward is one `cat`, and the views are put where the layers look for their
weights. Stage 3 gathers a layer's weights when it runs, so it keeps the network's own parameters.

A flat parameter is cut when the first block that needs it is called. Autograd runs what was recorded last first: so
its `cat` runs as soon as that block's backward has ended, and not after the whole network's, as it would if everything
were cut at the beginning. Then its reduction overlaps the backward of the blocks before, and the views' gradients are
free.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn


class Place(NamedTuple):
    """Where a weight of the network lies in its flat parameter."""

    name: str  # in the network
    shape: torch.Size
    start: int  # the first element
    end: int  # one after the last


class Flat(nn.Module):
    """`network`, called as before, with its trained weights in `flat`; what is not trained stays where it is.

    Args:
        network: its trained parameters leave it. It has no values of them until the next forward.
        size: the most elements of a flat parameter, unless one weight alone is larger. Several flat parameters let
            the reduction of late blocks' gradients begin while early blocks are still in their backward.
        blocks: parts of the network, in the order in which it calls them. The rest has flat parameters of its own.
    """

    def __init__(self, network: nn.Module, size: int, blocks: Iterable[nn.Module] = ()) -> None:
        super().__init__()
        order = list(blocks)
        block_of = {parameter: block for block in order for parameter in block.parameters()}
        groups: list[list[tuple[str, nn.Parameter]]] = []
        firsts: list[nn.Module | None] = []  # the first block that needs the group; None: outside of all blocks
        room = 0
        for name, parameter in _in_order_of_calls(network, order):
            if not parameter.requires_grad:
                continue
            block = block_of.get(parameter)
            if parameter.numel() > room or (block is None) != (firsts[-1] is None):
                groups.append([])
                firsts.append(block)
                room = size
            groups[-1].append((name, parameter))
            room -= parameter.numel()
        self.flat = nn.ParameterList(
            nn.Parameter(torch.cat([p.detach().flatten() for _, p in group])) for group in groups
        )
        self.places: list[list[Place]] = []
        self._sizes: list[list[int]] = []
        self._homes: list[list[tuple[nn.Module, str, torch.Size]]] = []  # (layer, attribute, shape) of each view
        for group in groups:
            start, places, homes = 0, [], []
            for name, parameter in group:
                owner, _, attribute = name.rpartition(".")
                layer = network.get_submodule(owner)
                del layer._parameters[attribute]
                places.append(Place(name, parameter.shape, start, start + parameter.numel()))
                homes.append((layer, attribute, parameter.shape))
                start += parameter.numel()
            self.places.append(places)
            self._sizes.append([place.end - place.start for place in places])
            self._homes.append(homes)
        self._outside = [index for index, first in enumerate(firsts) if first is None]
        for index, first in enumerate(firsts):
            if first is not None:
                first.register_forward_pre_hook(lambda *_, index=index: self._cut(index))
        self.network = network

    def forward(self, *arguments: Any) -> Any:
        for index in self._outside:
            self._cut(index)
        return self.network(*arguments)

    def _cut(self, index: int) -> None:
        """Put the views of a flat parameter into the layers."""
        parts = self.flat[index].split(self._sizes[index])
        for part, (layer, attribute, shape) in zip(parts, self._homes[index], strict=True):
            layer.__dict__[attribute] = part.view(shape)  # where setattr would put it, after checks

    def within(self, name: str, start: int, count: int) -> Iterator[tuple[Place, int, int]]:
        """The weights that lie in elements start .. start + count of this module's parameter `name`, cut to that range.

        Yields (place, low, high): elements low .. high of the flat parameter belong to the weight at `place`.
        """
        for place in self.places[int(name.rpartition(".")[2])]:
            low, high = max(start, place.start), min(start + count, place.end)
            if low < high:
                yield place, low, high


def network_of(module: Any) -> Any:
    """The network itself, of a module that may be a `Flat` of it."""
    return module.network if isinstance(module, Flat) else module


def _in_order_of_calls(network: nn.Module, blocks: Sequence[nn.Module]) -> Iterator[tuple[str, nn.Parameter]]:
    """The network's parameters, those of blocks in the order of the blocks, whichever was registered first."""
    names = {parameter: name for name, parameter in network.named_parameters()}
    of_blocks = [parameter for block in blocks for parameter in block.parameters()]
    among, following = set(of_blocks), iter(of_blocks)
    for parameter in names:
        parameter = next(following) if parameter in among else parameter
        yield names[parameter], parameter
