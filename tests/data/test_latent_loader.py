"""Micro-batches of latents: the order, the flip and the draw are functions of the sample counter."""

from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch

from sadm_fast.counters import Purpose, normal
from sadm_fast.data.batch import ImageBatch
from sadm_fast.data.latents import LatentCache, LatentSource
from sadm_fast.data.order import MicroBatchPlan
from tests.data.latent_caches import make_encoding, make_moments, write_cache
from tests.data.loaders import open_loader


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> LatentSource:
    return LatentCache.open(write_cache(tmp_path_factory.mktemp("latents") / "cache"))


def plan(**changes: Any) -> MicroBatchPlan:
    return MicroBatchPlan(**{"num_images": 11, "seed": 7, "flip": True, "micro_batch": 4} | changes)


def batches(source: LatentSource, count: int, threads: int = 2, prefetch: int = 2, **changes: Any) -> list[ImageBatch]:
    with open_loader(source, seed=7, threads=threads, prefetch=prefetch, **changes) as loader:
        return list(islice(loader, count))


def joined(parts: list[ImageBatch]) -> ImageBatch:
    return ImageBatch(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def assert_same(a: ImageBatch, b: ImageBatch) -> None:
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_sample_is_drawn_from_its_own_posterior_and_scaled(source: LatentSource) -> None:
    moments, labels = make_moments(make_encoding())
    for position, batch in enumerate(batches(source, 6)):
        wanted = plan()[position]
        assert batch.sample_ids.tolist() == wanted.sample_ids.tolist()
        assert batch.labels.tolist() == labels[wanted.indices].tolist() and batch.labels.dtype == torch.int64
        mean, std = torch.from_numpy(moments[wanted.indices, wanted.mirror.astype(int)]).unbind(1)
        drawn = mean + std * normal(7, Purpose.LATENT, batch.sample_ids, (4, 4, 4))
        assert batch.images.dtype == torch.float32 and batch.images.shape == (4, 4, 4, 4)
        # one rounding may differ: a multiply-add may be fused
        torch.testing.assert_close(batch.images, (drawn - 0.25) * 0.5, rtol=1e-6, atol=1e-6)


def test_every_epoch_draws_anew_and_flips_anew(source: LatentSource) -> None:
    all_epochs = joined(batches(source, 33, micro_batch=11, flip=True))  # 33 epochs of 11
    shown = np.concatenate([plan(micro_batch=11)[epoch].indices for epoch in range(33)])
    of_one = all_epochs.images[shown == 5]
    assert len(of_one) == 33 and len({tuple(image.flatten().tolist()) for image in of_one}) == 33
    mirrored = np.concatenate([plan(micro_batch=11)[epoch].mirror for epoch in range(33)])[shown == 5]
    assert 5 < mirrored.sum() < 28  # 16.5 +- 2.9: four standard deviations


def test_threads_and_prefetch_change_nothing(source: LatentSource) -> None:
    expected = joined(batches(source, 7, threads=1, prefetch=1))
    assert_same(joined(batches(source, 7, threads=3, prefetch=5)), expected)


@pytest.mark.parametrize("world_size, grad_accumulation, micro_batch", [(1, 1, 4), (2, 1, 2), (2, 2, 1), (3, 1, 8)])
def test_resume_at_any_world_size_goes_on_with_the_next_sample(
    source: LatentSource, world_size: int, grad_accumulation: int, micro_batch: int
) -> None:
    whole = joined(batches(source, 18))  # samples 0..71
    first = 24  # in the middle of the third epoch of 11
    ranks = [
        batches(
            source, 2 * grad_accumulation, first_sample=first, rank=rank, world_size=world_size,
            micro_batch=micro_batch, grad_accumulation=grad_accumulation,
        )
        for rank in range(world_size)
    ]  # fmt: skip
    together = joined([ranks[rank][step] for step in range(2 * grad_accumulation) for rank in range(world_size)])
    count = len(together.sample_ids)
    assert_same(together, ImageBatch(*(tensor[first : first + count] for tensor in whole)))


def test_batches_are_the_callers_own(source: LatentSource) -> None:
    with open_loader(source) as loader:
        first = next(loader)
        kept = first.images.clone()
        for _ in range(5):
            next(loader).images.zero_()
        assert torch.equal(first.images, kept)


def test_after_close_the_iteration_is_over(source: LatentSource) -> None:
    with open_loader(source) as loader:
        next(loader)
    assert list(loader) == []
    loader.close()
