"""Costs counted on the meta device, against published numbers and arithmetic."""

from typing import Any

import pytest

from sadm_fast.config import Config, check_config
from sadm_fast.cost import activation_bytes, describe, memory_plan, meta_models, step_flops


def config(**changes: Any) -> Config:
    """The defaults, with blocks changed."""
    return check_config({"name": "cost", **changes})


def published(name: str, **train: Any) -> Config:
    """A DiT of the paper's, with its learned variance, on images as large as the latents of 256 pixels."""
    return config(
        data={"resolution": 32, "channels": 3},
        diffusion={"process": "vp", "learn_sigma": True},
        denoiser={"name": name},
        game={"mode": "plain"},
        train={"micro_batch": 1, **train},
    )


# Parameters with position embedding and GMAC of a forward at 4 channels (Peebles & Xie 2022; counted from shapes).
@pytest.mark.parametrize(
    ("name", "parameters", "gmac"),
    [("DiT-S/4", 32_945_024, 1.41), ("DiT-B/2", 130_512_416, 23.01), ("DiT-XL/2", 675_129_632, 118.62)],
)
def test_published_sizes_have_the_published_cost(name: str, parameters: int, gmac: float):
    asked = published(name)
    denoiser, psi = meta_models(asked, num_classes=1000)
    assert psi is None
    width, patch = denoiser.pos_embed.shape[-1], asked.denoiser.patch
    # Three channels instead of four: one input filter fewer, and two outputs (mean and variance) with their biases.
    missing = width * patch**2 + (width + 1) * 2 * patch**2
    assert sum(p.numel() for p in denoiser.parameters()) == parameters - missing
    flops = step_flops(asked, denoiser, None)
    # A MAC is two FLOPs. Besides rounding, the missing channel is 0.02% of XL/2 and 0.2% of S/4.
    assert flops["denoiser forward"] / 2e9 == pytest.approx(gmac, rel=0.01)
    # Backward makes two products of each one; the first layer needs no gradient of its input.
    assert flops["denoiser backward"] == pytest.approx(2 * flops["denoiser forward"], rel=0.01)


def test_a_steps_cost_is_that_of_its_samples():
    asked = published("DiT-S/4")
    denoiser, _ = meta_models(asked, 10)
    one = step_flops(asked, denoiser, None)
    more = step_flops(published("DiT-S/4", micro_batch=2, grad_accumulation=3), denoiser, None)
    assert more == {what: 6 * flops for what, flops in one.items()}


def test_the_game_costs_what_its_passes_do():
    game = {"mode": "sadm"}
    structure, sadm = config(game={"mode": "structure"}), config(game=game)
    twice = config(game={**game, "discriminator_steps": 2})
    reference = config(game=game, implementation="reference")
    costs = [step_flops(asked, *meta_models(asked, 10)) for asked in (structure, sadm, twice, reference)]
    assert "discriminator" not in costs[0]
    assert costs[1]["structure term"] == costs[0]["structure term"]
    assert costs[2]["discriminator"] == 2 * costs[1]["discriminator"]
    # The reference implementation runs the denoiser once more for the discriminator.
    assert sum(costs[3].values()) - sum(costs[1].values()) == costs[1]["denoiser forward"]
    # Psi sees as many images in both terms; the discriminator has gradients of all its weights for all of them.
    assert costs[1]["discriminator"] > costs[1]["structure term"] > 0


def plan(stage: int, world_size: int, precision: str = "fp32") -> dict[str, int]:
    asked = config(train={"precision": precision}, deepspeed={"zero_optimization": {"stage": stage}})
    return memory_plan(asked, *meta_models(asked, 10), world_size)


def test_zero_divides_what_its_stage_says():
    asked = config()
    denoiser, _ = meta_models(asked, 10)
    trained = sum(p.numel() for p in denoiser.parameters() if p.requires_grad)
    everything = sum(p.numel() for p in denoiser.parameters())
    alone = plan(0, 4)
    assert alone["denoiser weights"] == 4 * everything
    assert alone["denoiser gradients"] == 4 * trained
    assert alone["denoiser AdamW moments"] == 8 * trained
    assert alone["denoiser fp32 masters"] == 0  # in fp32 the weights are their own
    for what, first_stage in (("AdamW moments", 1), ("gradients", 2), ("weights", 3)):
        for player in ("denoiser", "Psi"):
            for stage in (1, 2, 3):
                divided = 4 if stage >= first_stage else 1
                # whole bytes: what is left over of a division is lost
                assert plan(stage, 4)[f"{player} {what}"] == alone[f"{player} {what}"] // divided
    assert plan(1, 4)["EMA"] == trained  # 4 bytes on a fourth
    assert sum(plan(3, 4).values()) < sum(plan(2, 4).values()) < sum(plan(1, 4).values())


def test_bf16_halves_weights_and_gradients_and_keeps_fp32_masters():
    full, half = plan(0, 1), plan(0, 1, "bf16")
    assert half["denoiser weights"] * 2 == full["denoiser weights"]
    assert half["denoiser gradients"] * 2 == full["denoiser gradients"]
    assert half["denoiser fp32 masters"] == full["denoiser gradients"]
    assert half["denoiser AdamW moments"] == full["denoiser AdamW moments"]


def test_activations_grow_with_the_batch():
    sizes = []
    for batch in (8, 16):
        asked = config(train={"micro_batch": batch})
        sizes.append(activation_bytes(asked, meta_models(asked, 10)[0]))
    # Weights are not activations; what does not grow (masks, frequencies) is little.
    assert sizes[1] == pytest.approx(2 * sizes[0], rel=0.01)


def test_the_text_names_flops_and_macs_apart():
    text = describe(published("DiT-S/4"), 1000, world_size=2)
    line = next(line for line in text.splitlines() if "denoiser forward, one sample" in line)
    flop, gigaflop, mac, gigamac = line.split()[-4:]
    assert (gigaflop, gigamac) == ("GFLOP", "GMAC")
    assert float(mac) == pytest.approx(1.41, rel=0.01)
    assert float(flop) == pytest.approx(2 * float(mac), abs=0.002)
    assert "1 samples (2 over 2 rank(s))" in text
