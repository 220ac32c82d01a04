"""The peer of a training step: a plain DiT, tuned with what PyTorch ships, in few lines and without DeepSpeed.

bf16 autocast, torch.compile, fused AdamW, a foreach average of the weights. Noise comes from torch.randn. Its blocks
are DiT's by definition: they never call our kernels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.latent_game import CLASSES, made_up, with_noise
from benchmarks.measure import Call
from sadm_fast.build import build_denoiser
from sadm_fast.config import Config
from sadm_fast.game import predict
from sadm_fast.models.dit import Block, DiT, FinalLayer


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


class PlainBlock(Block):
    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_a[:, None] * self.attn(modulated(x, shift_a, scale_a))
        return x + gate_m[:, None] * self.mlp(modulated(x, shift_m, scale_m))


class PlainFinalLayer(FinalLayer):
    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return self.linear(modulated(x, *self.adaLN_modulation(c).chunk(2, dim=1)))


def plain(network: DiT) -> DiT:
    """The same network, with the same weights, without our kernels."""
    for module in network.modules():
        if isinstance(module, Block | FinalLayer):
            module.__class__ = PlainBlock if isinstance(module, Block) else PlainFinalLayer
    return network


def iteration(config: Config, device: torch.device) -> Call:
    """Return the call that is timed: one step of plain training on made-up latents, that keeps its loss unread."""
    network = build_denoiser(config, CLASSES)
    assert isinstance(network, DiT)
    network = plain(with_noise(network)).to(device)
    weights = [weight for weight in network.parameters() if weight.requires_grad]
    averages = [weight.detach().clone() for weight in weights]
    optimizer = torch.optim.AdamW(weights, lr=1e-4, weight_decay=0.0, fused=True)
    compiled = torch.compile(network, fullgraph=True, dynamic=False)
    batch = made_up(config, 0).each(lambda value: value.to(device))
    process, dropout = config.process, config.denoiser.label_dropout

    def denoiser(*inputs: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return compiled(*inputs).float()

    def step() -> None:
        level, dropped = torch.rand(2, len(batch.x0), device=device, dtype=torch.float64)
        condition = batch.labels.masked_fill(dropped < dropout, CLASSES)
        noise, t = torch.randn_like(batch.x0), process.sample_t(level)
        drawn = batch._replace(condition=condition, noise=noise, t=t, level=level)
        predict(process, denoiser, drawn).loss.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        torch._foreach_lerp_(averages, [weight.detach() for weight in weights], 1e-4)

    return step
