"""FLOP/s and MFU of a running training."""

import pytest
import torch

from sadm_fast.config import check_config
from sadm_fast.planning.gpus import GPUS, of_device
from sadm_fast.planning.speed import StepSpeed


def test_a_step_before_the_game_counts_the_denoiser_only():
    config = check_config({"name": "tiny", "data": {"path": "nowhere", "resolution": 16}, "train": {"micro_batch": 2}})
    speed = StepSpeed.of(config, 10, torch.device("cpu"))
    assert 0 < speed.plain < speed.game and speed.peak is None
    assert speed.achieved(2.0, playing=False) == {"flops_per_s": 2.0 * speed.plain, "mfu": None}
    assert speed.achieved(2.0, playing=True) == {"flops_per_s": 2.0 * speed.game, "mfu": None}
    assert StepSpeed(10, 20, peak=100.0).achieved(2.0, playing=True)["mfu"] == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("NVIDIA H200", "h200"), ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA A100-SXM4-40GB", "a100-40g"),
        ("NVIDIA A100-SXM4-80GB", "a100"), ("NVIDIA L40S", "l40s"), ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA B200", "b200"),
    ],
)  # fmt: skip
def test_a_device_is_found_by_the_name_that_it_has(name: str, key: str):
    assert of_device(name) is GPUS[key]
    assert of_device("NVIDIA T4") is None
    assert of_device("NVIDIA H100 PCIe") is None  # slower than the table's
