"""Costs counted on the meta device, against published numbers and arithmetic."""

from pathlib import Path
from typing import Any

import pytest

from sadm_fast.config import Config, check_config, load_config
from sadm_fast.planning.cost import activations, meta_models, step_flops
from sadm_fast.planning.dry_run import describe
from sadm_fast.planning.memory import Memory, rank_memory
from sadm_fast.planning.players import players


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
    width, patch = denoiser.get_parameter("pos_embed").shape[-1], asked.denoiser.patch
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


def test_activation_checkpointing_is_counted_where_it_is_on():
    costs, peaks = [], []
    for on in (False, True):
        asked = published("DiT-S/4", micro_batch=64, activation_checkpointing=on)
        models = meta_models(asked, 10)
        costs.append(step_flops(asked, *models))
        peaks.append(rank_memory(asked, players(asked, *models), activations(asked, *models), 1).peak)
        whole = rank_memory(asked, players(asked, *models), activations(asked, *models), 1, checkpointing=False).peak
    assert costs[0]["denoiser forward"] == costs[1]["denoiser forward"]
    again = costs[1]["denoiser backward"] - costs[0]["denoiser backward"]
    assert again == pytest.approx(costs[0]["denoiser forward"], rel=0.01)  # but for the first and the last layer
    assert peaks[1] < 0.6 * peaks[0] and whole == peaks[0]


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


def plan(stage: int, world_size: int, precision: str = "fp32") -> Memory:
    asked = config(train={"precision": precision}, deepspeed={"zero_optimization": {"stage": stage}})
    models = meta_models(asked, 10)
    return rank_memory(asked, players(asked, *models), activations(asked, *models), world_size)


def test_zero_divides_what_its_stage_says():
    asked = config()
    denoiser, _ = meta_models(asked, 10)
    trained = sum(p.numel() for p in denoiser.parameters() if p.requires_grad)
    everything = sum(p.numel() for p in denoiser.parameters())
    alone = plan(0, 4)
    assert alone.device["denoiser weights"] == 4 * everything
    assert alone.moments["denoiser's backward"]["denoiser gradients"] == 4 * trained
    assert alone.device["denoiser AdamW moments"] == 8 * trained
    assert alone.device["denoiser fp32 masters"] == 0  # in fp32 the weights are their own
    for stage in (1, 2, 3):
        divided = plan(stage, 4).device
        assert divided["denoiser AdamW moments"] == 8 * trained / 4
        assert divided["EMA"] == trained  # 4 bytes on a fourth
    assert plan(2, 4).device["denoiser weights"] == 4 * everything
    assert plan(3, 4).device["denoiser weights, divided"] == everything  # each of its tensors has a multiple of 4


def test_bf16_halves_weights_and_gradients_and_keeps_fp32_masters():
    full, half = plan(0, 1), plan(0, 1, "bf16")
    gradients = [memory.moments["denoiser's backward"]["denoiser gradients"] for memory in (full, half)]
    assert half.device["denoiser weights"] * 2 == full.device["denoiser weights"]
    assert gradients[1] * 2 == gradients[0]
    assert half.device["denoiser fp32 masters"] == gradients[0]
    assert half.device["denoiser AdamW moments"] == full.device["denoiser AdamW moments"]


def test_activations_grow_with_the_batch():
    sizes = []
    for batch in (8, 16):
        asked = config(train={"micro_batch": batch})
        sizes.append(activations(asked, *meta_models(asked, 10)))
    # Weights are not activations; what does not grow (masks, frequencies) is little.
    assert sizes[1].denoiser == pytest.approx(2 * sizes[0].denoiser, rel=0.01)
    assert sizes[1].discriminator == pytest.approx(2 * sizes[0].discriminator, rel=0.01)


def test_counting_leaves_the_models_as_they_were():
    asked = config()
    denoiser, psi = meta_models(asked, 10)
    first = activations(asked, denoiser, psi)
    assert activations(asked, denoiser, psi) == first
    assert not any("forward" in vars(block) for block in denoiser.blocks)


def test_attention_keeps_no_matrix_of_all_pairs():
    sizes = []
    for side in (32, 64):  # four times the tokens
        larger = config(
            data={"resolution": side, "channels": 3}, denoiser={"name": "DiT-S/4"}, train={"micro_batch": 2}
        )
        sizes.append(activations(larger, *meta_models(larger, 10)).denoiser)
    # A matrix of all pairs would grow 16 times; what is kept for each sample, and not each token, grows less than 4.
    assert 3.5 < sizes[1] / sizes[0] <= 4


def test_the_text_names_flops_and_macs_apart():
    text = describe(published("DiT-S/4"), 1000, world_size=2)
    line = next(line for line in text.splitlines() if "denoiser forward, one sample" in line)
    flop, gigaflop, mac, gigamac = line.split()[-4:]
    assert (gigaflop, gigamac) == ("GFLOP", "GMAC")
    assert float(mac) == pytest.approx(1.41, rel=0.01)
    assert float(flop) == pytest.approx(2 * float(mac), abs=0.002)
    assert "1 samples (2 over 2 rank(s))" in text


# The largest numbers that the configuration accepts, where tensors are as large as they say.
@pytest.mark.parametrize(
    "blocks",
    [
        {"data": {"resolution": 2**14}, "denoiser": {"patch_size": 16}, "game": {"mode": "plain"}},
        {"denoiser": {"hidden_size": 2**16, "num_heads": 2**14}},
        {"denoiser": {"num_classes": 2**24}},
        {"structure_encoder": {"width": 2**13, "feature_dim": 2**16}},
        {"game": {"queue": 2**24, "scope": "global"}},
        {"train": {"micro_batch": 2**20}, "game": {"mode": "plain"}},
        {"train": {"micro_batch": 2, "grad_accumulation": 1024}, "game": {"discriminator_steps": 16}},
        {"latents": {"channels": 1024, "downsample": 1}, "data": {"source": "latents"}},
    ],
    ids=lambda blocks: " ".join(blocks),
)
def test_the_largest_numbers_can_be_planned(blocks: dict[str, Any]):
    blocks = {"train": {"micro_batch": 2}, "sampling": {"rows": 1, "columns": 1}, "structure_encoder": {}} | blocks
    blocks["structure_encoder"] = blocks["structure_encoder"] | {"pretrain": {"batch": 2}}
    asked = config(evaluate={"batch": 1, "judge": {"batch": 1}}, **blocks)
    assert "Memory of one rank" in describe(asked, asked.denoiser.num_classes or 10, 1)


def test_a_psi_that_sees_pixels_is_counted_at_their_size_and_its_decoder_is_named_as_left_out() -> None:
    posttrain = Path(__file__).parents[2] / "configs/imagenet256_posttrain.json"
    narrow = [
        "denoiser.name=null", "denoiser.hidden_size=16", "denoiser.depth=1", "denoiser.num_heads=2",
        "train.micro_batch=2", "train.compile=off",
    ]  # fmt: skip
    text = describe(load_config(posttrain, narrow), 1000, world_size=1)
    # ResNet-18 at 224 x 224 is 1.81 GMAC with, and 0.0005 less without its classifier; at 256 x 256 (8/7)^2 times that.
    # The structure term is a forward of x0 and xhat0 and a backward to pixels, of 2 samples.
    (line,) = (line for line in text.splitlines() if "structure term" in line)
    assert float(line.split()[-2].replace(",", "")) == pytest.approx(1.814 * (8 / 7) ** 2 * 3 * 2, rel=0.01)
    assert text.splitlines()[-1].startswith("Not counted: the decoder")
