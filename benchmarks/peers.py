"""The peers of the fused loss: the same loss as others would write it, and its matrix products alone.

Peers compute in float32 for any input dtype, as the fused loss does: in bfloat16 the small differences between two
relations, of which the loss is the mean, are lost to rounding.
"""

import importlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sadm_kernels import backends, structure_loss

Loss = Callable[[Tensor, Tensor], Tensor]

OURS = ("native", "triton")
PEERS = ("gram", "cdist", "compile", "keops")
FLOOR = "gemm_floor"
PROVIDERS = (*OURS, "reference", *PEERS)
DENSE = ("reference", "gram", "cdist", "compile")  # hold B x B matrices


class Unavailable(Exception):
    """A provider cannot run a case here; the message says why."""


@dataclass(frozen=True)
class Case:
    """One problem of the table. `grads`: "fake" as in the denoiser's turn, or "both" as in the discriminator's."""

    batch: int
    dim: int
    dtype: torch.dtype = torch.float32
    grads: str = "both"
    relation: str = "euclidean"
    penalty: str = "squared"
    normalize: str = "unit"
    device: str = "cpu"

    def __str__(self) -> str:
        return f"B={self.batch} d={self.dim} {self.dtype_name} {self.grads}"

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def options(self) -> dict[str, Any]:
        return {"relation": self.relation, "penalty": self.penalty, "normalize": self.normalize}

    @property
    def flops(self) -> int:
        """The least FLOPs of matrix products: half a Gram matrix twice (B^2 d each), and 2 B^2 d for each gradient."""
        return (2 + 2 * (1 + (self.grads == "both"))) * self.batch**2 * self.dim

    def features(self, mean: float = 0.0) -> tuple[Tensor, Tensor]:
        """Draw real features [B, d] of this mean and deviation 1, and fakes: the same plus noise of deviation 0.5."""
        noise = torch.randn(2, self.batch, self.dim, generator=torch.Generator().manual_seed(0))
        real, fake = ((mean + x).to(self.device, self.dtype) for x in (noise[0], noise[0] + 0.5 * noise[1]))
        return real.requires_grad_(self.grads == "both"), fake.requires_grad_()


def _mean_of_pairs(matrix: Tensor) -> Tensor:
    return (matrix.sum() - matrix.diagonal().sum()) / (len(matrix) * (len(matrix) - 1))


def _from_distance(distance: Tensor, case: Case) -> Tensor:
    if case.normalize == "mean":
        distance = distance / _mean_of_pairs(distance)
    return distance if case.relation == "euclidean" else torch.exp(-0.5 * distance.square())


def _gram_relation(x: Tensor, case: Case) -> Tensor:
    unit = case.relation == "cosine" or case.normalize == "unit"
    x = F.normalize(x, dim=1) if unit else x
    product = x @ x.T
    if case.relation == "cosine":
        return product
    if unit:
        d2 = 2.0 - 2.0 * product
    else:
        squared = x.square().sum(1)
        d2 = squared[:, None] + squared - 2.0 * product
    d2 = d2.clamp_min(1e-12)  # the gradient of sqrt at 0 is infinite
    if case.relation == "gaussian" and case.normalize != "mean":
        return torch.exp(-0.5 * d2)
    return _from_distance(d2.sqrt(), case)


def _cdist_relation(x: Tensor, case: Case) -> Tensor:
    x = F.normalize(x, dim=1) if case.normalize == "unit" else x
    return _from_distance(torch.cdist(x, x), case)


def _eager(relation: Callable[[Tensor, Case], Tensor], case: Case) -> Loss:
    """Make the loss as the mean penalty of two B x B relations; threshold and bandwidth are 1, the defaults."""

    def loss(real: Tensor, fake: Tensor) -> Tensor:
        difference = relation(fake.float(), case) - relation(real.float(), case)
        difference = difference.fill_diagonal_(0.0)
        if case.penalty == "squared":
            total = difference.square().sum()
        elif case.penalty == "absolute":
            total = difference.abs().sum()
        else:
            total = F.huber_loss(difference, difference.new_zeros(()).expand_as(difference), reduction="sum")
        return total / (len(difference) * (len(difference) - 1))

    return loss


def _need_compiler(case: Case) -> None:
    compiler = os.environ.get("CXX", "g++")
    if case.device == "cpu" and shutil.which(compiler) is None:
        raise Unavailable(f"no C++ compiler: {compiler} is not on the path")


def _keops(case: Case) -> Loss:
    os.environ.setdefault("PYKEOPS_VERBOSE", "0")  # its messages would stand in our table
    try:
        lazy: Any = importlib.import_module("pykeops.torch").LazyTensor
    except ImportError as error:
        raise Unavailable(f"pykeops cannot be imported: {error}") from None
    _need_compiler(case)

    def distance2(x: Tensor) -> Any:
        return lazy(x[:, None, :]).sqdist(lazy(x[None, :, :]))

    def relation(x: Tensor) -> Any:
        if case.relation == "cosine" or case.normalize == "unit":
            x = F.normalize(x, dim=1)
        if case.relation == "cosine":
            return lazy(x[:, None, :]) | lazy(x[None, :, :])
        if case.normalize == "mean":  # distances scale with the features
            x = x / (distance2(x).sqrt().sum(dim=1).sum() / (len(x) * (len(x) - 1)))
        return distance2(x).sqrt() if case.relation == "euclidean" else (-0.5 * distance2(x)).exp()

    def loss(real: Tensor, fake: Tensor) -> Tensor:
        difference = relation(fake.float()) - relation(real.float())  # its diagonal is 0
        if case.penalty == "squared":
            value = difference.square()
        elif case.penalty == "absolute":
            value = difference.abs()
        else:
            inner = difference.abs().clamp(0, 1)
            value = inner * (difference.abs() - 0.5 * inner)
        total: Tensor = value.sum(dim=1).sum()
        return total / (len(fake) * (len(fake) - 1))

    return loss


def _compiled(case: Case) -> Loss:
    _need_compiler(case)
    torch.compiler.reset()  # the cache holds few shapes, and fullgraph raises when it is full
    compiled: Loss = torch.compile(
        partial(structure_loss, **case.options, impl="reference"), fullgraph=True, dynamic=False
    )
    return compiled


def _ours(case: Case, impl: str) -> Loss:
    status = backends()[impl]
    if status != "ok":
        raise Unavailable(status)
    if impl in OURS and (impl == "native") != (case.device == "cpu"):
        raise Unavailable(f"not for {case.device} tensors")
    return partial(structure_loss, **case.options, impl=impl)


def loss_of(name: str, case: Case) -> Loss:
    """Return this provider's loss, a function of features [B, d] and [B, d]; raises Unavailable."""
    if name in (*OURS, "reference"):
        return _ours(case, name)
    if name == "gram":
        return _eager(_gram_relation, case)
    if name == "cdist":
        if case.relation == "cosine":
            raise Unavailable("cosine is not a distance")
        return _eager(_cdist_relation, case)
    return {"compile": _compiled, "keops": _keops}[name](case)


class GemmFloor:
    """The matrix products alone, which no implementation can avoid: in the inputs' dtype, into preallocated memory.

    - The Gram matrices of real and of fake, upper triangle: rows i to i + n against all columns from i on. Blocks of
      `gram_rows` rows cost B^2 d (1 + n/B) FLOP instead of B^2 d; one buffer takes every block.
    - For each gradient, B x B by B x d. The left factor is one strip of at most `strip_rows` rows, reused: its values
      do not change the time, and a B x B matrix does not fit into every memory.
    """

    strip_rows = 512

    def __init__(self, case: Case, real: Tensor, fake: Tensor) -> None:
        self.inputs = [real.detach(), fake.detach()]
        self.gradients = [x.detach() for x in (real, fake) if x.requires_grad]
        self.gram_rows = max(128, -(-case.batch // 16))  # smaller blocks save work but run slower
        self.block = torch.empty(min(self.gram_rows, case.batch) * case.batch, dtype=case.dtype, device=case.device)
        self.strip = torch.rand(min(self.strip_rows, case.batch), case.batch, device=case.device).to(case.dtype)
        self.product = torch.empty_like(fake, requires_grad=False)

    def __call__(self) -> None:
        for x in self.inputs:
            for start in range(0, len(x), self.gram_rows):
                rows, columns = x[start : start + self.gram_rows], x[start:]
                out = self.block[: len(rows) * len(columns)].view(len(rows), len(columns))
                torch.mm(rows, columns.T, out=out)
        for x in self.gradients:
            for out in self.product.split(self.strip_rows):
                torch.mm(self.strip[: len(out)], x, out=out)


def value_and_gradients(loss: Loss, real: Tensor, fake: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return the loss, and its gradient with respect to each input that requires one."""
    value = loss(real, fake)
    return value, torch.autograd.grad(value, [x for x in (real, fake) if x.requires_grad])
