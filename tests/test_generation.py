"""Samples of a configuration: their noise belongs to the sample, and each setting reaches the sampler."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sadm_fast.build import build_denoiser
from sadm_fast.config import Config, check_config
from sadm_fast.generation import generate

CLASSES = 3


def config(process: str, **sampling: Any) -> Config:
    return check_config(
        {
            "name": "tiny",
            "data": {"resolution": 8, "channels": 3},
            "diffusion": {"process": process} | ({"learn_sigma": True} if process == "vp" else {}),
            "denoiser": {"hidden_size": 16, "depth": 1, "num_heads": 2},
            "sampling": {"steps": 4} | sampling,
        }
    )


def draw(settings: Config, ids: list[int], **options: Any) -> Tensor:
    """Samples of a network whose weights are far from the zeros it starts with."""
    model = build_denoiser(settings, CLASSES)
    for i, parameter in enumerate(model.parameters()):
        nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(i))
    n = torch.tensor(ids)
    chosen = {"steps": settings.sampling.steps, "guidance_scale": settings.sampling.guidance_scale} | options
    return generate(settings, model, n % CLASSES, n, **chosen)


@pytest.mark.parametrize(
    ("process", "sampling"),
    [
        ("vp", {"sampler": "ddpm", "guidance_scale": 2.0}),
        ("vp", {"sampler": "ddim", "eta": 1.0}),
        ("edm", {"sampler": "heun", "churn": 10.0}),
        ("flow", {"sampler": "sde"}),
    ],
    ids=lambda value: value if isinstance(value, str) else value["sampler"],
)
def test_a_sample_is_the_same_in_any_batch_where_steps_draw_noise_too(process: str, sampling: dict[str, Any]) -> None:
    settings = config(process, **sampling)
    ids = [5, 0, 2**40, 3]
    together = draw(settings, ids)
    assert together.isfinite().all()
    for i, n in enumerate(ids):
        # Matrix products of other sizes round differently; other noise would differ by about 1. The first step of VP
        # divides by alpha(999) = 1/159, which makes 3e-4 of 16 eps; what samplers then do with it leaves a few of them.
        torch.testing.assert_close(
            draw(settings, [n]), together[i : i + 1], rtol=1e-4, atol=1e-3 if process == "vp" else 1e-4
        )
    still = draw(settings.model_copy(update={"sampling": config(process).sampling}), ids)
    assert (together - still).abs().amax(dim=(1, 2, 3)).min() > 0.1
    assert not torch.equal(draw(settings.model_copy(update={"seed": 1}), ids), together)


@pytest.mark.parametrize(
    ("process", "sampling"),
    [
        ("vp", {"sampler": "ddpm", "variance": "small"}),
        ("vp", {"sampler": "ddim", "eta": 0.5}),
        ("vp", {"steps": "ddim4"}),
        ("edm", {"churn": 5.0}),
        ("edm", {"churn": 5.0, "churn_noise": 1.1}),
        ("edm", {"churn": 5.0, "churn_t_min": 1.0}),
        ("edm", {"churn": 5.0, "churn_t_max": 1.0}),
        ("flow", {"sampler": "sde", "sde_noise": 2.0}),
        ("flow", {"sampler": "sde", "sde_last_step": 0.2}),
        ("edm", {"clip_denoised": True}),
        ("edm", {"guidance_scale": 2.0, "guidance_interval": [0.1, 2.0]}),
        ("edm", {"guidance_scale": 2.0, "guidance_channels": 2}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_every_setting_changes_the_samples(process: str, sampling: dict[str, Any]) -> None:
    last = list(sampling)[-1]
    without = {name: value for name, value in sampling.items() if name != last}
    changed, base = draw(config(process, **sampling), [0, 1]), draw(config(process, **without), [0, 1])
    assert (changed - base).abs().max() > 1e-3


def test_a_worse_network_guides() -> None:
    settings = config("edm", guidance_scale=2.0)
    guide = build_denoiser(settings, CLASSES)
    assert not torch.equal(draw(settings, [0]), draw(settings, [0], guide=guide))
