import pytest
import torch
from torch import Tensor

from sadm_fast.metrics.judges import JUDGES, ClassifierJudge, Judge, PixelJudge, RandomJudge, bounded, judges_of


def images(count: int, channels: int, height: int, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, channels, height, width, generator=generator) * 2.0 - 1.0


def judges(channels: int, height: int, width: int) -> list[Judge]:
    return [ClassifierJudge(channels), RandomJudge(channels), PixelJudge(channels, height, width)]


@pytest.mark.parametrize(
    ("channels", "height", "width"),
    [(1, 28, 28), (3, 32, 32), (3, 256, 192), (1, 4, 4), (4, 17, 1), (1, 1, 300)],
)
@pytest.mark.parametrize("index", range(3))
def test_any_size_and_channels_give_float32_features(channels: int, height: int, width: int, index: int):
    judge = judges(channels, height, width)[index].eval()
    features = judge(images(3, channels, height, width))
    assert features.shape == (3, judge.feature_dim)
    assert features.dtype == torch.float32
    assert features.isfinite().all()


@pytest.mark.parametrize("index", range(3))
def test_bf16_images_are_judged_in_float32(index: int):
    judge = judges(1, 28, 28)[index].eval()
    batch = images(2, 1, 28, 28).bfloat16()
    assert torch.equal(judge(batch), judge(batch.float()))


@pytest.mark.parametrize("index", range(3))
def test_features_of_an_image_do_not_depend_on_its_batch(index: int):
    judge = judges(3, 28, 28)[index].eval()
    batch = images(5, 3, 28, 28)
    # Other batch sizes take other kernels: float32 sums of about a thousand terms in another order.
    torch.testing.assert_close(judge(batch)[2:3], judge(batch[2:3]), rtol=1e-4, atol=1e-5)


def test_a_run_has_one_judge_of_each_kind_with_a_name_and_texts_of_its_own():
    assert [type(judge) for judge in judges_of(1, 28, ClassifierJudge(1))] == list(JUDGES)
    assert [judge.metric for judge in JUDGES] == ["fid_classifier", "fid_random", "fid_pixels"]
    for text in ("metric", "space", "text"):
        assert len({getattr(judge, text) for judge in JUDGES}) == len(JUDGES)


def test_bounded_averages_down_in_proportion_and_leaves_small_images_alone():
    small = images(2, 1, 28, 20)
    assert torch.equal(bounded(small), small)
    large = images(2, 3, 256, 128)
    assert bounded(large).shape == (2, 3, 64, 32)
    torch.testing.assert_close(bounded(large)[0, 1, 3, 5], large[0, 1, 12:16, 20:24].mean())


def test_random_judge_has_no_other_source_of_randomness():
    torch.manual_seed(1)
    first = RandomJudge(3).state_dict()
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = RandomJudge(3).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("channels", "checksums"), [(1, (-1.467296, 4.509962, 8.73023)), (3, (-5.532292, 4.509962, 8.73023))]
)
def test_random_judge_is_the_same_for_ever(channels: int, checksums: tuple[float, ...]):
    # A change here makes every fid_random ever recorded incomparable: undo the change, keep the numbers.
    for filters, expected in zip(RandomJudge(channels).buffers(), checksums, strict=True):
        index = torch.arange(filters.numel(), dtype=torch.float64)
        checksum = float((filters.double().flatten() * (index * 0.1).sin()).sum())
        assert checksum == pytest.approx(expected, abs=1e-4)


def test_random_judge_is_blind_to_brightness_inside_and_sees_contrast():
    judge = RandomJudge(1)
    flat = torch.full((1, 1, 64, 64), 0.7)
    # Filters have zero mean, so only the zero padding at the border is an edge in a flat image.
    inside = torch.nn.functional.conv2d(flat, judge.get_buffer("filters0"))
    torch.testing.assert_close(inside, torch.zeros_like(inside), rtol=0.0, atol=1e-5)
    assert judge(images(1, 1, 64, 64)).sum() > 2 * judge(flat).sum()


def test_pixel_judge_averages_blocks():
    batch = images(2, 1, 28, 28)
    expected = batch.view(2, 14, 2, 14, 2).mean(dim=(2, 4)).flatten(1)
    torch.testing.assert_close(PixelJudge(1, 28, 28)(batch), expected)


@pytest.mark.parametrize(("channels", "side", "expected"), [(1, 16, 256), (3, 8, 192), (3, 32, 300), (3, 256, 507)])
def test_pixel_judge_keeps_at_most_512_values(channels: int, side: int, expected: int):
    assert PixelJudge(channels, side, side).feature_dim == expected
