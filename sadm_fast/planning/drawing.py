"""Memory of drawing samples during training: by the denoiser, through the autoencoder's decoder, and by the judges.

Counted on fake CPU tensors like activations, but without a graph: what is alive at once.
"""

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sadm_fast.config import Config
from sadm_fast.models import Denoiser
from sadm_fast.models.autoencoder import DECODED_AT_ONCE, skeleton
from sadm_fast.planning.memory import Drawing

_FP32 = 4


class _Alive(TorchDispatchMode):
    """Counts the bytes of the storages that operations make, while each is alive."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._now = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._known | given:  # a view, or a change in place, makes none
                    self._known.add(storage._cdata)
                    self._now += storage.nbytes()
                    weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self._now)
        return result

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._now -= size


def most_alive(use: Callable[[Any], object], module: nn.Module | None = None) -> int:
    """Most bytes that are alive at once of the fake tensors that `use` makes, without a graph.

    use: gets what calls `module` with fp32 weights, which do not count; nor do those of other modules that it calls.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        call = None if module is None else partial(functional_call, module, _fp32(module))
        with _Alive() as alive:
            use(call)
    return alive.peak


def _fp32(module: nn.Module) -> dict[str, Tensor]:
    return {name: torch.empty(x.shape) for name, x in (*module.named_parameters(), *module.named_buffers())}


def drawing(config: Config, num_classes: int, denoiser: Denoiser, judging: tuple[int, int] | None = None) -> Drawing:
    """Count what rank 0 needs to draw grids and evaluations, beside its fp32 copy of the denoiser.

    Args:
        denoiser: on meta.
        judging: bytes that the judges hold, and most that they have alive besides; None: no evaluations.
    """
    held, moments, left_out = {}, {}, None
    sampling, evaluate = config.sampling, config.evaluate
    samples = min(num_classes, sampling.columns) * sampling.rows
    at_once = samples * (1 + (sampling.guidance_scale != 1.0))
    if evaluate.every is not None:
        batch = min(evaluate.batch, evaluate.samples)
        at_once = max(at_once, batch * (1 + any(scale != 1.0 for scale in evaluate.guidance)))
        samples = max(samples, batch)
    shape = config.sample_shape
    moments["drawing samples"] = most_alive(
        lambda call: call((torch.empty(at_once, *shape), torch.empty(at_once), torch.zeros(at_once).long())), denoiser
    )
    if config.latents is not None and config.latents.autoencoder is not None:
        autoencoder = skeleton(config.latents.autoencoder)
        if autoencoder is None:
            left_out = f"the autoencoder, which is not here ({config.latents.autoencoder})"
        else:
            low = config.train.precision == "bf16" and config.structure_encoder.input == "pixels"
            width = 2 if low and config.game.mode != "plain" else _FP32
            held["autoencoder"] = width * sum(p.numel() for p in autoencoder.parameters())
            images = samples * config.data.channels * config.data.resolution**2 * _FP32
            together = min(samples, DECODED_AT_ONCE)
            part = most_alive(lambda call: call((torch.empty(together, *shape),)), _Decoder(autoencoder))
            moments["decoding samples"] = images + part * width // _FP32
    if judging is not None:
        held["judges"], moments["judging samples"] = judging
    return Drawing(held, moments, left_out)


class _Decoder(nn.Module):
    def __init__(self, autoencoder: Any) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, latents: Tensor) -> Tensor:
        return self.autoencoder.decode(latents).sample
