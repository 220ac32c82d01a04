"""The one container of feature rows, from the caller's queue to the kernels, and what is asked of it."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sadm_kernels.scaling import weight_in_range


def compute_dtype(*features: Tensor) -> torch.dtype:
    """The dtype sums are kept in: float64 if any features are float64, float32 if all are narrower."""
    return torch.float64 if any(x.dtype == torch.float64 for x in features) else torch.float32


class Samples(NamedTuple):
    """Features of n samples, row i of everything belonging to sample i: a batch, a queue, or both as columns.

    As a queue they are samples of earlier batches, without a gradient. S then runs over all ordered pairs with at
    least one sample of the batch B: each of its two sums is sum_{i, j in B, i != j} + 2 sum_{i in B, k in Q}. Pairs
    inside the queue do not depend on the batch: left out.
    """

    real: Tensor  # [n, d], any float dtype; a queue's are converted to the batch's
    fake: Tensor  # [n, e]; width and dtype need not be real's, for only [n, n] matrices are compared
    weight: Tensor | None = None  # [n], non-negative; None: ones
    labels: Tensor | None = None  # integers [n]; a queue has them if and only if the batch does

    def alike(self) -> "Samples":
        """What a fused backend takes: contiguous features of one dtype and width, scaled weights, int64 labels.

        Zeros behind the narrower features change no length, distance or product.
        """
        real, fake, weight, labels = self
        if real.dtype != fake.dtype:
            dtype = torch.promote_types(real.dtype, fake.dtype)
            real, fake = real.to(dtype), fake.to(dtype)
        if real.shape[1] != fake.shape[1]:
            width = max(real.shape[1], fake.shape[1])
            real, fake = (F.pad(x, (0, width - x.shape[1])) for x in (real, fake))
        return Samples(
            real.contiguous(),
            fake.contiguous(),
            None if weight is None else weight_in_range(weight, compute_dtype(real, fake)).contiguous(),
            None if labels is None else labels.long().contiguous(),
        )

    def first(self, n: int) -> "Samples":
        """The first n samples, as views."""
        weight, labels = (None if x is None else x[:n] for x in self[2:])
        return Samples(self.real[:n], self.fake[:n], weight, labels)

    def followed_by(self, queue: "Samples") -> "Samples":
        """These samples and behind them a queue's, whose features are converted to their dtypes."""
        weight, labels = self.weight, self.labels
        if weight is not None or queue.weight is not None:
            now, past = (
                x.real.new_ones(len(x.real), dtype=torch.float32) if x.weight is None else x.weight
                for x in (self, queue)
            )
            weight = torch.cat([now, past])  # in the wider of both dtypes
        if labels is not None and queue.labels is not None:
            labels = torch.cat([labels.long(), queue.labels.long()])
        real = torch.cat([self.real, queue.real.to(self.real.dtype)])
        fake = torch.cat([self.fake, queue.fake.to(self.fake.dtype)])
        return Samples(real, fake, weight, labels)


Queue = Samples


class Options(NamedTuple):
    """How relations are compared; the meaning of each is in `sadm_kernels.structure_loss`."""

    relation: str = "euclidean"
    penalty: str = "squared"
    normalize: str = "unit"
    tau: float = 1.0
    delta: float = 1.0

    @property
    def unit(self) -> bool:
        """Whether rows are scaled to length 1 first."""
        return self.normalize == "unit" or self.relation == "cosine"

    def operands(self) -> tuple[str, str, str, Tensor | None, Tensor | None]:
        """The options as an operator takes them: tau and delta as 0-d float64 tensors, None where they are not used.

        torch.compile compiles again for each value of an operator's float, and gives up after a few.
        """
        one = torch.ones((), dtype=torch.float64, device="cpu")
        tau = one * self.tau if self.relation == "gaussian" else None
        delta = one * self.delta if self.penalty == "huber" else None
        return self.relation, self.penalty, self.normalize, tau, delta


def options_of(relation: str, penalty: str, normalize: str, tau: Tensor | None, delta: Tensor | None) -> Options:
    """The options from `Options.operands`."""
    return Options(relation, penalty, normalize, *(1.0 if x is None else float(x) for x in (tau, delta)))


class Pairs(NamedTuple):
    """What a fused backend is asked for: sums over the pairs of this rank's rows with all samples.

    Sums are over own x samples as they stand, a row's pair with itself excepted; gradients are those of a loss that
    counts every pair both ways, (i, j) and (j, i), whichever rank has row j.
    """

    samples: Samples  # n: the batch of all ranks, and behind it a queue; as `Samples.alike` makes them
    own: range  # which of them are this rank's rows
    options: Options = Options()
    queued: int = 0  # how many samples at the end are a queue's

    @property
    def without_queue(self) -> "Pairs":
        """The same rows against the batch alone."""
        return self._replace(samples=self.samples.first(len(self.samples.real) - self.queued), queued=0)
