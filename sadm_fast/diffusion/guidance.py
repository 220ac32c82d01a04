"""The denoiser that a sampler walks with: a network, guided, as a function of x_t and t."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from sadm_fast.diffusion.process import Process

# x_t [B, C, H, W] and t [B] to xhat0; with a learned variance (VP.learn_sigma) to [xhat0 | v], 2C channels.
Denoise = Callable[[Tensor, Tensor], Tensor]


def denoise(process: Process, model: nn.Module, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    """Compute xhat0 [B, C, H, W] by the network `model(x, time, labels)` at noise levels t [B]."""
    x_in, time = process.model_input(x_t, t)
    return process.to_x0(model(x_in, time, labels), x_t, t)


def guided(
    process: Process,
    model: nn.Module,
    labels: Tensor,
    null_class: int | None,
    guidance_scale: float = 1.0,
    *,
    channels: int | None = None,
    interval: tuple[float, float] | None = None,
    guide: nn.Module | None = None,
    clip: bool = False,
) -> Denoise:
    """Guide: xhat0 = other + scale (xhat0_label - other).

    `other` is the network's estimate without a label (classifier-free guidance, Ho & Salimans 2022), or that of
    `guide`, a worse network, with the label (autoguidance, Karras et al. 2024). Scale 1, and any scale outside the
    interval, calls the network once a step with B samples. A learned variance is never guided.

    Args:
        labels: int64 [B]; null_class stands for none, where the network knows one.
        channels: guide so many, the first ones, as DiT's release guides 3 of 4; None: all.
        interval: guide at low <= t <= high only (Kynkaanniemi et al. 2024), t in the process's own unit: sigma of
            EDM, 0 to 1 of flow, 0 to 999 of VP. None: everywhere.
        clip: bring xhat0 into [-1, 1] after guidance (clip_denoised of improved DDPM).

    Raises:
        ValueError: there is neither a null class nor a guide, and the scale is not 1.
    """
    both = labels
    if guide is None and guidance_scale != 1.0:
        if null_class is None:
            raise ValueError(f"guidance_scale={guidance_scale:g}: the network knows no null class; use 1, or a guide")
        both = torch.cat([labels, torch.full_like(labels, null_class)])

    def predict(network: nn.Module, x: Tensor, t: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """xhat0 and what else the network puts out, [B, 0 or C, H, W]."""
        x_in, time = process.model_input(x, t)
        output = network(x_in, time, labels)
        return process.to_x0(output, x, t), output[:, x.shape[1] :]

    def call(x: Tensor, t: Tensor) -> Tensor:
        off = interval is not None and not interval[0] <= t[0].item() <= interval[1]
        if guidance_scale == 1.0 or off:
            x0, rest = predict(model, x, t, labels)
        else:
            if guide is not None:
                x0, rest = predict(model, x, t, labels)
                other, _ = predict(guide, x, t, labels)
            else:
                pair, rests = predict(model, torch.cat([x, x]), t.repeat(2), both)
                (x0, other), rest = pair.chunk(2), rests[: len(x)]
            towards = other + guidance_scale * (x0 - other)
            x0 = towards if channels is None else torch.cat([towards[:, :channels], x0[:, channels:]], dim=1)
        x0 = x0.clamp(-1.0, 1.0) if clip else x0
        return torch.cat([x0, rest], dim=1) if rest.shape[1] else x0

    return call
