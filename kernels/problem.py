"""What a fused backend is given: one rank's rows, the columns they are compared with, and the options."""

from typing import NamedTuple

from torch import Tensor


class Problem(NamedTuple):
    """Rows b against columns n; without a process group or a queue they are the same tensors and `first` is 0.

    The queue's columns are the last ones. Sums are over rows x columns as they stand; gradients are those of a loss
    that counts every pair both ways, (i, j) and (j, i), whoever has row j.
    """

    real: Tensor  # [b, d], contiguous
    fake: Tensor  # [b, d]
    all_real: Tensor  # [n, d]
    all_fake: Tensor  # [n, d]
    first: int  # the column that is row 0 itself
    weight: Tensor | None  # [b], float32 (float64 for float64 features)
    all_weight: Tensor | None  # [n]
    labels: Tensor | None  # [b], int64
    all_labels: Tensor | None  # [n]
    relation: str
    penalty: str
    unit: bool  # rows are scaled to length 1 first
    tau: float
    delta: float
    queued: int = 0  # how many columns are a queue's

    @property
    def without_queue(self) -> "Problem":
        """The same rows against the batch alone."""
        n = len(self.all_real) - self.queued
        return self._replace(
            all_real=self.all_real[:n],
            all_fake=self.all_fake[:n],
            all_weight=None if self.all_weight is None else self.all_weight[:n],
            all_labels=None if self.all_labels is None else self.all_labels[:n],
            queued=0,
        )
