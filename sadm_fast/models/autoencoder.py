"""The autoencoder of latent diffusion: diffusers' AutoencoderKL, with an identity and one place for its scale.

A latent space belongs to one set of weights. `identity` names them by content, so it survives a move or another file
format, and everything that was made with an autoencoder (latents, checkpoints) carries it.
"""

import hashlib
import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sadm_fast.errors import UserError
from sadm_fast.files import expand_home
from sadm_fast.scales import LatentScale

DECODED_AT_ONCE = 8  # latents: a decoder takes some hundred times the memory of its image
_WITH_GRADIENT = 4  # latents decoded at once, of those that get a gradient
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# What has a say in the result beside the weights. Not the whole configuration: versions of diffusers add keys to it.
_ARCHITECTURE = ("act_fn", "norm_num_groups", "block_out_channels", "latent_channels")


class Posterior(NamedTuple):
    """The encoder's answer, a diagonal normal distribution over raw latents."""

    mean: Tensor  # float32 [B, c, h, w]
    std: Tensor  # float32 [B, c, h, w]


class Autoencoder:
    """A frozen AutoencoderKL in eval mode.

    Attributes:
        identity: sha256 (hex) over architecture and weights.
        scale: between raw latents and what a denoiser is trained on.
        image_channels, latent_channels, downsample: C, c, and H / h.
    """

    def __init__(
        self, module: nn.Module, configuration: Mapping[str, Any], *, name: str, scale: float | None = None
    ) -> None:
        self.name = name
        self.module: Any = module.eval().requires_grad_(False)
        self.identity = _identity(module, configuration)
        self.scale = LatentScale(
            float(configuration["scaling_factor"] if scale is None else scale),
            float(configuration.get("shift_factor") or 0.0),
        )
        self.image_channels = int(configuration["in_channels"])
        self.latent_channels = int(configuration["latent_channels"])
        self.downsample = 2 ** (len(configuration["block_out_channels"]) - 1)

    @classmethod
    def load(
        cls, path: str, *, device: torch.device | str = "cpu", precision: str = "fp32", scale: float | None = None
    ) -> "Autoencoder":
        """From a local folder, the local hub cache, or the hub, in that order; only safetensors are read.

        precision: "fp32" or "bf16", of the arithmetic. scale: instead of the configuration's scaling_factor.
        Raises UserError when there is none, it is not an AutoencoderKL in safetensors, its weights are not exactly
        those of its configuration, or it scales latents in a way that is not known here.
        """
        path = expand_home(path)
        from diffusers import AutoencoderKL  # takes seconds to import
        from diffusers.utils import logging

        options: dict[str, Any] = {"use_safetensors": True, "low_cpu_mem_usage": False, "torch_dtype": torch.float32}
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # its warnings about keys are errors here
        try:
            _require_known(_local_first(AutoencoderKL.load_config, path), scale)
            module, keys = _local_first(AutoencoderKL.from_pretrained, path, output_loading_info=True, **options)
            _require_whole(module, keys)
        except Exception as error:  # diffusers raises nearly anything for a damaged configuration
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"latents.autoencoder={path}: cannot be loaded ({reason}); give a folder with config.json and"
                " diffusion_pytorch_model.safetensors of a diffusers AutoencoderKL, or a hub id that is in the cache"
            ) from None
        finally:
            logging.set_verbosity(verbosity)
        loaded = cls(module, module.config, name=path, scale=scale)
        nn.Module.to(module, device=device, dtype=_DTYPES[precision])  # diffusers' own `to` warns about nothing
        return loaded

    @property
    def space(self) -> dict[str, Any]:
        """What latents, manifests and checkpoints of this autoencoder carry."""
        return {"autoencoder": self.identity, **self.scale.to_json()}

    def require_space(self, space: Mapping[str, Any], whose: str) -> None:
        """UserError if latents of `space` would not be decoded to pictures by this autoencoder but to noise.

        Where it is not known which one they were made with, this one takes over their scale.
        """
        if space.get("autoencoder") is None:
            self.scale = LatentScale.of(space)
            channels = len(self.scale.shift) if isinstance(self.scale.shift, tuple) else self.latent_channels
            if channels != self.latent_channels:
                raise UserError(
                    f"latents.autoencoder={self.name}: has {self.latent_channels} channels, and {whose} {channels};"
                    " give the autoencoder that it was made with"
                )
            return
        for key, here in self.space.items():
            there = space.get(key)
            if there != here:
                if key == "autoencoder":
                    here, there = f"sha256 {here[:12]}", f"sha256 {str(there)[:12]}"
                raise UserError(
                    f"latents.autoencoder={self.name}: has {key} {here}, but {whose} was made with {there};"
                    " give the autoencoder that it was made with"
                )

    @torch.no_grad()
    def encode(self, images: Tensor) -> Posterior:
        """The posterior of images float [B, C, H, W] in [-1, 1]; raw latents, not scaled."""
        weights = next(self.module.parameters())
        posterior = self.module.encode(images.to(weights)).latent_dist
        return Posterior(posterior.mean.float(), posterior.std.float())

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images float32 [B, C, H, W], about [-1, 1], of scaled latents [B, c, h, w]."""
        return self._decode(latents)

    def decode_with_gradient(self, latents: Tensor) -> Tensor:
        """As `decode`, with the gradient to `latents`; a few at a time, which the backward pass decodes once more.

        So memory is that of a few images, whatever B is: a decoder keeps some hundred times the memory of its image.
        """
        if not (latents.requires_grad and torch.is_grad_enabled()):
            return torch.cat([self.decode(part) for part in latents.split(_WITH_GRADIENT)])
        parts = latents.split(_WITH_GRADIENT)
        return torch.cat(
            [checkpoint(self._decode, part, use_reentrant=False, preserve_rng_state=False) for part in parts]
        )

    def _decode(self, latents: Tensor) -> Tensor:
        weights = next(self.module.parameters())
        return self.module.decode(self.scale.to_raw(latents).to(weights)).sample.float()


def skeleton(path: str) -> nn.Module | None:
    """The AutoencoderKL of a local folder or of the hub's cache on the meta device; None: its config.json is not here.

    Only that file is read, whatever its weights are.
    """
    from diffusers import AutoencoderKL

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the hub's, about options that diffusers gives it
            configuration = AutoencoderKL.load_config(expand_home(path), local_files_only=True)
        with torch.device("meta"):
            return AutoencoderKL.from_config(configuration).eval()
    except Exception:  # as in Autoencoder.load, which says what is wrong
        return None


def _local_first(load: Callable[..., Any], path: str, **options: Any) -> Any:
    """`load(path)` from a folder or the local hub cache, then from the hub."""
    try:
        return load(path, local_files_only=True, **options)
    except OSError:
        if Path(path).is_dir():
            raise
        return load(path, **options)


def _require_known(configuration: Any, scale: float | None) -> None:
    """ValueError unless config.json is that of an AutoencoderKL whose scale is one factor and one shift."""
    if not isinstance(configuration, Mapping):
        raise ValueError("its config.json holds no JSON object")
    kind = configuration.get("_class_name", "AutoencoderKL")
    if kind != "AutoencoderKL":
        raise ValueError(f"its class is {kind}")
    for key in ("latents_mean", "latents_std"):
        if configuration.get(key) is not None:
            raise ValueError(
                f"its config.json has {key}, a scale for each channel, which is not supported: in a copy of it, remove"
                " latents_mean and latents_std and set scaling_factor and shift_factor for all channels"
            )
    factor = configuration.get("scaling_factor", 1.0) if scale is None else scale
    shift = configuration.get("shift_factor") or 0.0
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in (factor, shift)) or factor <= 0:
        raise ValueError(
            f"its scaling_factor={factor} and shift_factor={shift} must be numbers, the first above 0;"
            " correct its config.json, or give latents.scale"
        )


def _require_whole(module: nn.Module, keys: Mapping[str, Sequence[str]]) -> None:
    """ValueError unless the file held every weight of the model, nothing else, and finite values only."""
    for what, names in (("lacks", keys["missing_keys"]), ("has the unknown", keys["unexpected_keys"])):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(f"its safetensors file {what} {min(names)}{more}: it is damaged or of another model")
    for name, tensor in module.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"its {name} holds values that are not finite: it is damaged")


def _identity(module: nn.Module, configuration: Mapping[str, Any]) -> str:
    architecture = {key: configuration[key] for key in _ARCHITECTURE}
    digest = hashlib.sha256(json.dumps(architecture, sort_keys=True, default=list).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy())
    return digest.hexdigest()
