"""What a fused backend is given: one rank's rows, the columns they are compared with, and the options."""

from typing import NamedTuple

from torch import Tensor


class Problem(NamedTuple):
    """Rows b against columns n; without a process group they are the same tensors and `first` is 0."""

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
