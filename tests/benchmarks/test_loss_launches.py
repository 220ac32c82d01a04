"""What a call of the structure loss launches on a GPU, held where it is."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import loss_launches

# Forward and backward, kernels and torch's operations: a change that needs more has to say why, here.
AT_MOST = {
    "bfloat16": 3, "float32": 3, "36 features": 3, "normalize=mean": 39, "queue of 1024": 24, "group of one rank": 19
}  # fmt: skip


@pytest.mark.slow
def test_each_variant_launches_as_few_as_before(one_rank: None) -> None:
    rows = {name: loss_launches.measured(name, call, 1) for name, call in loss_launches.variants(8, 48).items()}
    assert list(rows) == list(AT_MOST)
    for name, row in rows.items():
        assert 3 <= row["kernels"] + row["operations"] + row["collectives"] <= AT_MOST[name], row


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()
