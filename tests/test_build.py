"""What is built before the game; whole runs are in test_train.py."""

import torch

from sadm_fast.build import Undrawn, build_denoiser
from sadm_fast.config import check_config

CLASSES = 10
CONFIG = {
    "name": "tiny",
    "data": {"resolution": 28, "channels": 1},
    "denoiser": {"hidden_size": 32, "depth": 1, "num_heads": 2},
    "structure_encoder": {"width": 8, "feature_dim": 8},
}


def test_weights_that_will_be_loaded_are_not_drawn_and_all_others_are_right() -> None:
    config = check_config(CONFIG)
    drawn = build_denoiser(config, CLASSES)
    after_drawing = torch.get_rng_state()
    with Undrawn():
        undrawn = build_denoiser(config, CLASSES)
        untouched = torch.get_rng_state()
    torch.manual_seed(config.seed)
    assert torch.equal(untouched, torch.get_rng_state()) and not torch.equal(untouched, after_drawing)
    kept = {name for name, parameter in drawn.named_parameters() if not parameter.requires_grad}
    kept |= {name for name, _ in drawn.named_buffers()}
    assert kept
    for name in kept:  # the others come from the checkpoint
        assert torch.equal(drawn.state_dict()[name], undrawn.state_dict()[name])
