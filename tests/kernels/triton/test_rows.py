"""What float32 rows lose on their way to the kernels, whose own work is done exactly here."""

import pytest
import torch

from sadm_kernels import structure_loss
from sadm_kernels.samples import Options, Pairs, Samples
from sadm_kernels.triton.rows import prepared
from tests.kernels.triton.test_device_code import by_definition, features


@pytest.mark.parametrize("mean", [0.0, 1000.0])
def test_rows_of_length_1_keep_their_small_differences(mean: float) -> None:
    """With a mean of a thousand deviations, elements near the centre are smaller than the rounding of long rows."""
    real, fake = features(333, 200, torch.float32, mean=mean)
    exact, eager = (by_definition(real, fake, dtype, normalize="unit") for dtype in (torch.float64, torch.float32))
    rows = prepared(Pairs(Samples(real, fake), range(333), Options()))
    wide = [x.double().requires_grad_(True) for x in rows.pairs.samples[:2]]
    loss = structure_loss(*wide, normalize="none", impl="reference")
    gradients = torch.autograd.grad(loss, wide)
    for side, gradient in enumerate(gradients):
        found = rows.gradient(side, gradient.float())
        assert found is not None
        error, expected = ((x - exact[1 + side]).abs().max() for x in (found, eager[1 + side]))
        assert error <= 2 * expected + 2.0**-23 * exact[1 + side].abs().max()
