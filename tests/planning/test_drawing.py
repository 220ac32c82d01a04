"""The memory of drawing samples, counted on fake tensors."""

from pathlib import Path

import torch
from torch import nn

from sadm_fast.config import check_config
from sadm_fast.metrics.evaluator import cost_of_judging
from sadm_fast.metrics.judges import PixelJudge
from sadm_fast.metrics.run_evaluation import judging
from sadm_fast.planning.cost import meta_models
from sadm_fast.planning.drawing import drawing, most_alive
from sadm_fast.planning.dry_run import describe
from tests.support.autoencoders import save_autoencoder


def test_what_is_alive_at_once_is_counted_without_weights() -> None:
    assert most_alive(lambda _: torch.empty(1000).relu().relu().relu()) == 2 * 4000
    network = nn.Sequential(nn.Linear(10, 100), nn.ReLU(), nn.Linear(100, 10))
    assert most_alive(lambda call: call((torch.empty(50, 10),)), network) == 4 * 50 * (10 + 2 * 100)
    assert most_alive(lambda _: torch.empty(1000).view(10, 100)[:5].add_(1.0)) == 4000, "views and changes in place"


def test_decoder_and_judges_are_counted_where_samples_of_latents_are_scored(tmp_path: Path) -> None:
    blocks = {
        "name": "tiny",
        "data": {"source": "latents", "path": str(tmp_path), "resolution": 32, "channels": 3},
        "latents": {"autoencoder": str(save_autoencoder(tmp_path / "autoencoder")), "downsample": 2},
        "denoiser": {"patch_size": 4, "hidden_size": 16, "depth": 1, "num_heads": 2},
        "sampling": {"columns": 2, "rows": 2},
    }
    plain = check_config(blocks)
    scored = check_config(blocks | {"evaluate": {"every": 5, "samples": 64, "batch": 32, "guidance": [1, 2]}})
    denoiser, _ = meta_models(plain, 3)
    without, found = drawing(plain, 3, denoiser), drawing(scored, 3, denoiser, judging(scored))
    assert without.held["autoencoder"] > 0 and without.left_out is None
    assert found.held.keys() == {"autoencoder", "judges"}
    assert found.moments.keys() == {"drawing samples", "decoding samples", "judging samples"}
    # 32 samples, each with and without its class, where the grid draws 4 without guidance
    assert found.moments["drawing samples"] == 16 * without.moments["drawing samples"]
    # eight at a time, and the 32 images of which they are a part; a block's 16 channels at full resolution, twice
    images = 32 * 3 * 32 * 32 * 4
    assert found.moments["decoding samples"] > images + 2 * 8 * 16 * 32 * 32 * 4
    text = describe(scored, 3, 1, judging(scored))
    assert "autoencoder" in text and "judging samples, between iterations" in text and "Not counted" not in text
    away = check_config(blocks | {"latents": {"autoencoder": str(tmp_path / "nowhere"), "downsample": 2}})
    assert "Not counted: the autoencoder, which is not here" in describe(away, 3, 1)


def test_a_judge_holds_its_weights_and_two_covariances() -> None:
    judge = PixelJudge(1, 16, 16)
    held, alive = cost_of_judging([judge], (1, 16, 16), 10)
    assert held == 2 * 8 * 256**2 and alive >= 2 * 10 * 256 * 4
