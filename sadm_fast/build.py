"""The networks of a run, built from its configuration or by the caller of sadm_fast.train."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sadm_fast import augmentation
from sadm_fast.config import Config
from sadm_fast.config_game import EFFICIENTNETS
from sadm_fast.data.source import Source
from sadm_fast.errors import UserError
from sadm_fast.models import (
    Denoiser,
    DiT,
    EfficientNetLite,
    ResNet18,
    SmallCNN,
    StructureEncoder,
    UNet,
    ViT,
)

_DRAWS = {Tensor.uniform_, Tensor.normal_, nn.init.uniform_, nn.init.normal_, nn.init.kaiming_uniform_}


class Own(NamedTuple):
    """The networks that the configuration leaves to the caller of sadm_fast.train: architecture=own."""

    denoiser: Callable[[int], Denoiser] | None = None  # of num_classes
    psi: Callable[[], StructureEncoder] | None = None


NONE = Own()
_NOT_HERE = "architecture=own: is given to sadm_fast.train or sadm_fast.load from Python (docs/extending.md)"


class Undrawn(TorchFunctionMode):
    """A context in which modules are built without drawing their weights: the caller loads all of them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _DRAWS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def build_denoiser(config: Config, num_classes: int, own: Own = NONE) -> Denoiser:
    """The denoiser with weights drawn from the run's seed; on the CPU (or the default device)."""
    denoiser = config.denoiser
    torch.manual_seed(config.seed)
    if denoiser.architecture == "own":
        return _own_denoiser(config, num_classes, own)
    channels, side, _ = config.sample_shape
    common: dict[str, Any] = {
        "input_size": side,
        "in_channels": channels,
        "out_channels": config.process.output_channels(channels),
        "num_classes": num_classes,
        "activation_checkpointing": config.train.activation_checkpointing,
    }
    if denoiser.architecture == "unet":
        # EDM gives its networks ln(sigma) / 4; the other processes' times are made for sinusoids as they are.
        natural = 0.25 / config.process.time_scale if config.diffusion.process == "edm" else 1.0
        return UNet(
            channels=denoiser.channels,
            multipliers=denoiser.channel_multipliers,
            depth=denoiser.depth,
            attention_resolutions=denoiser.attention_resolutions,
            time_factor=natural,
            conditional=denoiser.conditional,
            augmentation_labels=augmentation.LABELS if denoiser.augment else 0,
            dropout=denoiser.dropout,
            seed=config.seed,
            **common,
        )
    common |= {"position_grid": denoiser.position_grid, "difffit": denoiser.train == "difffit"}
    if denoiser.name is not None:
        return DiT.from_name(denoiser.name, **common)
    return DiT(
        patch_size=denoiser.patch_size,
        hidden_size=denoiser.hidden_size,
        depth=denoiser.depth,
        num_heads=denoiser.num_heads,
        **common,
    )


def _own_denoiser(config: Config, num_classes: int, own: Own) -> Denoiser:
    if own.denoiser is None:
        raise UserError(f"denoiser.{_NOT_HERE}")
    model = own.denoiser(num_classes)
    if model.num_classes != num_classes:
        raise UserError(f"{type(model).__name__}.num_classes={model.num_classes}: the data have {num_classes}")
    if config.train.activation_checkpointing:
        if not model.units():
            raise UserError(
                f"train.activation_checkpointing=true: {type(model).__name__} has no `blocks` to compute anew"
            )
        model.activation_checkpointing = True
    return model


def build_psi(config: Config, own: Own = NONE) -> StructureEncoder:
    """An untrained structure encoder; weights from the run's seed."""
    psi, channels = config.structure_encoder, config.psi_shape[0]
    torch.manual_seed(config.seed)
    if psi.architecture == "own":
        if own.psi is None:
            raise UserError(f"structure_encoder.{_NOT_HERE}")
        return own.psi()
    if psi.architecture == "vit":
        return ViT(
            channels, psi.patch_size, psi.width, psi.depth, psi.position_grid, psi.input_size, psi.registers
        )  # fmt: skip
    if psi.architecture in EFFICIENTNETS:
        return EfficientNetLite(EFFICIENTNETS.index(psi.architecture), psi.input_size)
    if psi.architecture == "resnet18":
        return ResNet18(channels, psi.stem, psi.norm)
    return SmallCNN(channels, psi.width, psi.feature_dim)


def resolve_classes(config: Config, images: Source) -> int:
    """num_classes of the run; UserError if the configuration asks for fewer than there are folders."""
    there, asked = len(images.classes), config.denoiser.num_classes
    if asked is not None and asked < there:
        raise UserError(
            f"denoiser.num_classes={asked}: data.path={images.where} has {there} classes; use {there} or null"
        )
    return there if asked is None else asked


def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load trainable parameters from full tensors by name; what does not train may be absent, and stays as built."""
    missing, unexpected = model.load_state_dict(dict(weights), strict=False)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    if unexpected or trainable & set(missing):
        raise RuntimeError(f"weights do not fit: unexpected {unexpected}, missing {sorted(trainable & set(missing))}")
