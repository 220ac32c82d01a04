"""A player's forward and backward as CUDA graphs: two launches instead of thousands.

Each way of calling a player (own step, frozen, without gradient) is recorded at its first call and replayed from then
on. Inputs are copied into the recorded ones; weights are read where they lie, and they stay there in training. Each way
has memory of its own: the discriminator's whole turn lies between the denoiser's forward and its backward, and the
common memory of torch.compile(mode="reduce-overhead") is given to others at the first backward of anybody.

All gradients of a pass arrive together, so no reduction overlaps the backward. On a CPU tests replace `record` by one
that computes anew into the recorded memory.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_WARM_UPS = 3  # before recording: compilation, cuDNN's choices, cuBLAS's workspaces

Work = Callable[[], Any]


def graph_in_place(module: nn.Module) -> None:
    """Let a module, of tensors to one tensor, be recorded at its next calls, and replayed. Names do not change."""
    module.forward = Replayed(module.forward, list(module.parameters()))


class Replayed:
    """`call`, a function of its arguments and of `weights`, replayed. A new shape or a frozen weight is recorded anew.

    Raises:
        RuntimeError: a backward whose forward is not the latest of its kind: its activations are gone.
    """

    def __init__(self, call: Callable[..., Tensor], weights: list[nn.Parameter]) -> None:
        self._call, self._weights = call, weights
        self._passes: dict[Any, _Pass] = {}

    def __call__(self, *inputs: Tensor) -> Tensor:
        trained = [weight for weight in self._weights if weight.requires_grad]
        kind = (torch.is_grad_enabled(), len(trained), *((x.shape, x.dtype, x.requires_grad) for x in inputs))
        if kind not in self._passes:
            self._passes[kind] = _Pass(self._call, inputs, trained)
        output: Tensor = _Replay.apply(self._passes[kind], *inputs, *trained)
        return output


class _Pass:
    """One way of calling: a recorded forward and, where something wants a gradient, a recorded backward."""

    def __init__(self, call: Callable[..., Tensor], inputs: tuple[Tensor, ...], trained: list[nn.Parameter]) -> None:
        self._call = call
        self._inputs = [x.detach().clone().requires_grad_(x.requires_grad) for x in inputs]
        wanted = [x.requires_grad and torch.is_grad_enabled() for x in (*inputs, *trained)]
        self._wanted = [x for x, want in zip((*self._inputs, *trained), wanted, strict=True) if want]
        self._positions = [i for i, want in enumerate(wanted) if want]
        self._none: list[Tensor | None] = [None] * len(wanted)
        self._gradient: Tensor | None = None  # of the output
        self._forwards = 0
        works = [self._compute, self._differentiate] if any(wanted) else [self._compute]
        (self._replay_forward, self._output), *backward = record(*works)
        if backward:
            self._replay_backward, self._gradients = backward[0]

    def _compute(self) -> Tensor:
        self._latest = self._call(*self._inputs)
        if self._gradient is None:
            self._gradient = torch.zeros_like(self._latest)
        return self._latest.detach()

    def _differentiate(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self._latest, self._wanted, self._gradient)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, int]:
        """The output for inputs and weights, and the number that `backward` asks for."""
        for recorded, given in zip(self._inputs, tensors, strict=False):  # only inputs: weights are where they were
            recorded.detach().copy_(given)
        self._replay_forward()
        self._forwards += 1
        return self._output.clone(), self._forwards

    def backward(self, gradient: Tensor, forward: int) -> list[Tensor | None]:
        """Gradients of inputs and weights, None where none is wanted."""
        if forward != self._forwards:
            raise RuntimeError("the activations that this backward needs were overwritten by a later forward")
        assert self._gradient is not None
        self._gradient.copy_(gradient)
        self._replay_backward()
        gradients = self._none.copy()
        for position, value in zip(self._positions, self._gradients, strict=True):
            gradients[position] = value.clone()  # autograd adds into what it is given; the next replay writes there
        return gradients


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, recorded: _Pass, *tensors: Tensor) -> Tensor:
        ctx.recorded = recorded
        output, ctx.number = recorded.forward(*tensors)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.recorded.backward(gradient, ctx.number)


def record(*works: Work) -> list[tuple[Callable[[], None], Any]]:
    """Record functions, run one after another, in one pool of memory: of each a replay, and what that fills anew."""
    warming = torch.cuda.Stream()
    warming.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warming):
        for _ in range(_WARM_UPS):
            for work in works:
                work()
    torch.cuda.current_stream().wait_stream(warming)
    pool = torch.cuda.graph_pool_handle()
    recorded = []
    for work in works:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):  # the loader's threads go on
            result = work()
        recorded.append((graph.replay, result))
    return recorded
