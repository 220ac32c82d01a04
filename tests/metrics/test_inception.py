"""Inception-v3 with random weights: what can be known of it without the released file."""

import numpy as np
import pytest
import torch

from sadm_fast.metrics.inception import InceptionV3, MixedA, MixedE, resized


def test_resizing_is_tensorflow_1s() -> None:
    image = torch.rand(1, 2, 5, 7, generator=torch.Generator().manual_seed(0))
    pixels = image.double().numpy()[0]
    found = resized(image, 11)[0]
    for c in range(2):
        for y in range(11):
            for x in range(11):
                v, u = y * 5 / 11, x * 7 / 11
                top, left = int(v), int(u)
                bottom, right = min(top + 1, 4), min(left + 1, 6)
                rows = [
                    pixels[c, r, left] + (pixels[c, r, right] - pixels[c, r, left]) * (u - left) for r in (top, bottom)
                ]
                expected = rows[0] + (rows[1] - rows[0]) * (v - top)
                # positions in float32: of at most 7, so their shares are off by at most 7 eps
                assert float(found[c, y, x]) == pytest.approx(expected, abs=7 * float(np.finfo(np.float32).eps))


def test_an_image_of_its_size_stays_as_it_is() -> None:
    image = torch.rand(1, 3, 13, 13, generator=torch.Generator().manual_seed(0))
    assert torch.equal(resized(image, 13), image)


def test_average_pooling_does_not_count_the_padding_and_the_last_block_pools_by_maximum() -> None:
    # A flat map stays flat where the padding is not counted. Its maximum over the border is not zero either.
    flat = torch.full((1, 192, 5, 5), 3.0)
    block = MixedA(192, 32).eval()
    pooled = block(flat)[:, -32:]
    torch.testing.assert_close(pooled, pooled[..., 2:3, 2:3].expand_as(pooled))
    spike = torch.zeros(1, 2048, 5, 5)
    spike[..., 2, 2] = 9.0
    average, maximum = (MixedE(2048, maximum=m).eval() for m in (False, True))
    maximum.load_state_dict(average.state_dict())
    wanted = average.branch_pool(torch.full((1, 2048, 1, 1), 1.0))[..., 0, 0]  # a ninth of 9
    torch.testing.assert_close(average(spike)[:, -192:, 1, 1], wanted)
    torch.testing.assert_close(maximum(spike)[:, -192:, 1, 1], average.branch_pool(spike[..., 2:3, 2:3])[..., 0, 0])


@pytest.mark.slow
def test_it_tells_features_of_the_published_sizes_for_any_image() -> None:
    torch.manual_seed(0)
    network = InceptionV3().eval()
    state = network.state_dict()
    assert len(state) == 566 and sum(p.numel() for p in network.parameters()) == 23_850_960
    with torch.no_grad():
        seen = network(torch.rand(2, 1, 20, 30) * 2 - 1)
    assert [tuple(part.shape) for part in seen] == [(2, 2048), (2, 17 * 17 * 7), (2, 1008)]
    assert all(part.isfinite().all() for part in seen)
    torch.testing.assert_close(seen.probabilities.sum(dim=1), torch.ones(2))
