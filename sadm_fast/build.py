"""The networks of a run, built from its configuration, and the weights they start from."""

from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sadm_fast.config import Config
from sadm_fast.data.source import Source
from sadm_fast.errors import UserError
from sadm_fast.models import Denoiser, DiT, ResNet18, SmallCNN, StructureEncoder
from sadm_fast.models.dit import position_grid

_DRAWS = {Tensor.uniform_, Tensor.normal_, nn.init.uniform_, nn.init.normal_, nn.init.kaiming_uniform_}


_TABLE = "y_embedder.embedding_table.weight"
_CLASSIFIER = "fc."  # of torchvision's networks


class Undrawn(TorchFunctionMode):
    """A context in which modules are built without drawing their weights: the caller loads all of them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _DRAWS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def build_denoiser(config: Config, num_classes: int) -> Denoiser:
    """The denoiser with weights drawn from the run's seed; on the CPU (or the default device)."""
    denoiser = config.denoiser
    channels, side, _ = config.sample_shape
    torch.manual_seed(config.seed)
    common: dict[str, Any] = {
        "input_size": side,
        "in_channels": channels,
        "out_channels": config.process.output_channels(channels),
        "num_classes": num_classes,
        "activation_checkpointing": config.train.activation_checkpointing,
    }
    if denoiser.name is not None:
        return DiT.from_name(denoiser.name, **common)
    return DiT(
        patch_size=denoiser.patch_size,
        hidden_size=denoiser.hidden_size,
        depth=denoiser.depth,
        num_heads=denoiser.num_heads,
        **common,
    )


def check_denoiser_weights(config: Config, denoiser: Denoiser) -> None:
    """Check denoiser.weights, if given, by its header. `denoiser` may be on meta.

    A label table for another number of classes fits: `start_from_weights` leaves it as drawn. So does a file without
    what is fixed, like a DiT's pos_embed.

    Raises:
        UserError: the file cannot be read, or holds other names or shapes.
    """
    path = config.denoiser.weights
    if path is None:
        return
    there = _header("denoiser.weights", path)
    own = {name: tuple(value.shape) for name, value in denoiser.state_dict().items()}
    if _is_other_table(there.get(_TABLE), own.get(_TABLE)):
        there[_TABLE] = own[_TABLE]
    fixed = {name for name, p in denoiser.named_parameters() if not p.requires_grad}
    grid, here = position_grid(there.get("pos_embed", ())), config.sample_shape[1] // config.denoiser.patch
    if grid not in (None, here):
        raise UserError(
            f"denoiser.weights={path}: its pos_embed is for {grid} x {grid} tokens, here are {here} x {here}; use"
            f" data.resolution={config.data.resolution * grid // here}, or a copy of the file without pos_embed"
        )
    problem = _misfit({name: own[name] for name in fixed} | there, own)
    if problem is not None:
        raise UserError(f"denoiser.weights={path}: does not fit this configuration's denoiser ({problem})")


def start_from_weights(config: Config, denoiser: Denoiser) -> None:
    """Load denoiser.weights, if given: a whole state of the denoiser in safetensors, for fine-tuning.

    A label table for another number of classes stays as it was drawn, which is what fine-tuning on another dataset
    wants.

    Raises:
        UserError: as `check_denoiser_weights`, or a value in the file is not finite.
    """
    path = config.denoiser.weights
    if path is None:
        return
    check_denoiser_weights(config, denoiser)
    state = _load("denoiser.weights", path)
    own = denoiser.state_dict()
    if _TABLE in own and _is_other_table(tuple(state[_TABLE].shape), tuple(own[_TABLE].shape)):
        state[_TABLE] = own[_TABLE]
    denoiser.load_state_dict(state, strict=True)


def _is_other_table(there: tuple[int, ...] | None, own: tuple[int, ...] | None) -> bool:
    """Whether both are shapes of label tables of one width, for different numbers of classes."""
    return there is not None and own is not None and there[1:] == own[1:] and there != own


def _header(key: str, path: str) -> dict[str, tuple[int, ...]]:
    """Read the shapes of a safetensors file from its header; UserError in the name of the field `key`."""
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            for name, value in slices.items():
                if not value.get_dtype().startswith(("F", "BF")):
                    raise ValueError(f"{name} holds {value.get_dtype()}, not floating-point numbers")
            return {name: tuple(value.get_shape()) for name, value in slices.items()}
    except (OSError, SafetensorError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{key}={path}: cannot be read as safetensors ({reason})") from None


def _load(key: str, path: str) -> dict[str, Tensor]:
    """Read all tensors of a safetensors file whose header has been checked; UserError if one is not finite."""
    state = load_file(path)
    for name, value in state.items():
        if not torch.isfinite(value).all():
            raise UserError(f"{key}={path}: {name} holds values that are not finite; the file is damaged")
    return state


def _misfit(there: Mapping[str, tuple[int, ...]], own: Mapping[str, tuple[int, ...]]) -> str | None:
    """Say in which names or shapes two states differ; None if in none."""
    for what, names in (("lacks", own.keys() - there.keys()), ("has the unknown", there.keys() - own.keys())):
        if names:
            return f"it {what} {min(names)}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
    for name, shape in own.items():
        if there[name] != shape:
            return f"its {name} is {list(there[name])}, here it is {list(shape)}"
    return None


def build_psi(config: Config) -> StructureEncoder:
    """An untrained structure encoder; weights from the run's seed."""
    psi, channels = config.structure_encoder, config.sample_shape[0]
    torch.manual_seed(config.seed)
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


def check_psi_weights(config: Config, psi: StructureEncoder) -> None:
    """Check structure_encoder.weights, if given, by its header. `psi` may be on meta.

    Raises:
        UserError: the file cannot be read, or holds other names or shapes. A classifier (fc.*) may be there.
    """
    path = config.structure_encoder.weights
    if path is None:
        return
    there = _header("structure_encoder.weights", path)
    there = {name: shape for name, shape in there.items() if not name.startswith(_CLASSIFIER)}
    problem = _misfit(there, {name: tuple(value.shape) for name, value in psi.state_dict().items()})
    if problem is not None:
        raise UserError(
            f"structure_encoder.weights={path}: does not fit {type(psi).__name__} ({problem});"
            " torchvision's resnet18 needs architecture=resnet18, stem=imagenet, norm=frozen, channels=3"
        )


def load_psi(config: Config, path: str) -> StructureEncoder:
    """Build Psi with the weights of structure_encoder.weights=`path`, in eval mode; UserError if they do not fit."""
    psi = build_psi(config)
    check_psi_weights(config, psi)
    state = _load("structure_encoder.weights", path)
    psi.load_state_dict({name: value for name, value in state.items() if not name.startswith(_CLASSIFIER)}, strict=True)
    return psi.eval()


def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load trainable parameters from full tensors by name; what does not train may be absent, and stays as built."""
    missing, unexpected = model.load_state_dict(dict(weights), strict=False)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    if unexpected or trainable & set(missing):
        raise RuntimeError(f"weights do not fit: unexpected {unexpected}, missing {sorted(trainable & set(missing))}")
