"""The weights that a configuration's networks start from."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sadm_fast.build import build_denoiser, build_psi
from sadm_fast.config import Config, check_config
from sadm_fast.errors import UserError
from sadm_fast.exchange.starting import (
    check_denoiser_weights,
    check_psi_weights,
    classes_of_weights,
    load_psi,
    start_from_weights,
)
from sadm_fast.models.dit import sincos_1d

CLASSES = 10
CONFIG = {
    "name": "tiny",
    "data": {"resolution": 28, "channels": 1},
    "denoiser": {"hidden_size": 32, "depth": 1, "num_heads": 2},
    "structure_encoder": {"width": 8, "feature_dim": 8},
}
TABLE = "y_embedder.embedding_table.weight"
BIAS = "x_embedder.proj.bias"


def changed(**blocks: dict[str, Any]) -> Config:
    tree: dict[str, Any] = {name: dict(block) if isinstance(block, dict) else block for name, block in CONFIG.items()}
    for name, block in blocks.items():
        tree[name] |= block
    return check_config(tree)


def state(classes: int = CLASSES, **blocks: dict[str, Any]) -> dict[str, Tensor]:
    """A denoiser's state in which no number is 0."""
    weights = build_denoiser(changed(**blocks), classes).state_dict()
    return {name: torch.full_like(value, 0.5) for name, value in weights.items()}


def started(weights: dict[str, Tensor], tmp_path: Path, **blocks: dict[str, Any]) -> dict[str, Tensor]:
    """The state of a denoiser that starts from `weights`, by way of a file."""
    path = tmp_path / "weights.safetensors"
    save_file(weights, path)
    config = changed(**blocks | {"denoiser": blocks.get("denoiser", {}) | {"weights": str(path)}})
    with torch.device("meta"):
        check_denoiser_weights(config, build_denoiser(config, CLASSES))
    denoiser = build_denoiser(config, CLASSES)
    start_from_weights(config, denoiser)
    return dict(denoiser.state_dict())


def test_a_denoiser_starts_from_a_whole_state(tmp_path: Path) -> None:
    assert all((value == 0.5).all() for value in started(state(), tmp_path).values())


def test_labels_of_another_number_of_classes_start_anew(tmp_path: Path) -> None:
    found = started(state(classes=3), tmp_path)
    drawn = build_denoiser(check_config(CONFIG), CLASSES).state_dict()
    assert torch.equal(found[TABLE], drawn[TABLE])
    assert all((value == 0.5).all() for name, value in found.items() if name != TABLE)


def test_values_that_are_not_drawn_yet_are_not_the_files(tmp_path: Path) -> None:
    save_file(state(classes=3), tmp_path / "weights.safetensors")
    config = changed(denoiser={"weights": str(tmp_path / "weights.safetensors")})
    denoiser = build_denoiser(config, CLASSES)
    torch.nn.init.constant_(denoiser.get_parameter(TABLE), torch.nan)
    start_from_weights(config, denoiser)
    assert (denoiser.get_parameter(BIAS) == 0.5).all()


def test_what_is_fixed_may_be_absent(tmp_path: Path) -> None:
    weights = state()
    del weights["pos_embed"]
    found = started(weights, tmp_path)
    assert torch.equal(found["pos_embed"], build_denoiser(check_config(CONFIG), CLASSES).state_dict()["pos_embed"])
    assert (found[TABLE] == 0.5).all()


def without_name(weights: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {name: value for name, value in weights.items() if name not in names}


BAD_STATES = {
    "another network": ({"conv1.weight": torch.ones(3)}, "(it lacks blocks.0.adaLN_modulation.1.bias and "),
    "a name less": (without_name(state(), BIAS), f"(it lacks {BIAS})"),
    "a name more": (state() | {"blocks.7.x": torch.ones(1)}, "(it has the unknown blocks.7.x)"),
    "other sizes": (state(denoiser={"depth": 2}), "(it has the unknown blocks.1.adaLN_modulation.1.bias and "),
    "another width": (
        state() | {"x_embedder.proj.bias": torch.ones(8)},
        "x_embedder.proj.bias is [8], here it is [32]",
    ),
    "another table": (state() | {TABLE: torch.ones(11, 8)}, "embedding_table.weight is [11, 8], here it is [11, 32]"),
    "another resolution": (
        state(data={"resolution": 56}),
        "tokens, here are 7 x 7; use data.resolution=56, or denoiser.position_grid=14, which stretches its positions",
    ),
    "whole numbers": (state() | {BIAS: torch.ones(32, dtype=torch.int64)}, f"{BIAS} holds int64, not"),
    "not finite": (
        state() | {"x_embedder.proj.bias": torch.full((32,), torch.nan)},
        "x_embedder.proj.bias holds values",
    ),
}


@pytest.mark.parametrize("case", BAD_STATES)
def test_weights_that_do_not_fit_are_one_line(tmp_path: Path, case: str) -> None:
    weights, message = BAD_STATES[case]
    with pytest.raises(UserError) as caught:
        started(weights, tmp_path)
    text = str(caught.value)
    assert text.startswith(f"denoiser.weights={tmp_path}/weights.safetensors: ") and message in text
    assert "\n" not in text


def test_a_file_that_is_no_weights_is_one_line_for_both_networks(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"\x80" + bytes(200))
    config = changed(denoiser={"weights": str(path)}, structure_encoder={"weights": str(path)})
    with pytest.raises(UserError, match=rf"^denoiser.weights={path}: cannot be read as weights \(.+\)$"):
        check_denoiser_weights(config, build_denoiser(config, CLASSES))
    with pytest.raises(UserError, match=rf"^structure_encoder.weights={path}: cannot be read as weights \(.+\)$"):
        check_psi_weights(config, build_psi(config))


def test_psi_loads_without_the_classifier_of_its_file(tmp_path: Path) -> None:
    path = tmp_path / "psi.safetensors"
    weights = build_psi(changed()).state_dict()
    save_file({**{name: torch.ones_like(value) for name, value in weights.items()}, "fc.bias": torch.ones(3)}, path)
    config = changed(structure_encoder={"weights": str(path)})
    psi = load_psi(config, str(path))
    assert not psi.training and all((value == 1).all() for value in psi.state_dict().values())
    save_file(without_name(dict(weights), "head.bias"), path)
    with pytest.raises(UserError, match=r"^structure_encoder.weights=.*does not fit SmallCNN \(it lacks head.bias\);"):
        load_psi(config, str(path))


def test_the_classes_of_weights_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(state(classes=3), path)
    assert classes_of_weights(changed(denoiser={"weights": str(path)})) == 3
    with pytest.raises(UserError, match=r"^denoiser.num_classes=4: the label table of .* knows 3$"):
        classes_of_weights(changed(denoiser={"weights": str(path), "num_classes": 4}))
    save_file(without_name(state(), TABLE), path)
    with pytest.raises(UserError, match="has no label table"):
        classes_of_weights(changed(denoiser={"weights": str(path)}))


@pytest.mark.parametrize("resolution", [56, 28], ids=["theirs", "own, from a run that stretched them"])
def test_weights_of_another_resolution_are_taken_with_stretched_positions(tmp_path: Path, resolution: int) -> None:
    found = started(state(data={"resolution": resolution}), tmp_path, denoiser={"position_grid": 14})
    assert (found["x_embedder.proj.bias"] == 0.5).all()
    centres = torch.arange(7) * 2 + 0.5  # of 7 tokens a side, each as large as 2 of the 14
    columns = found["pos_embed"][0, :7, :16]
    torch.testing.assert_close(columns, sincos_1d(centres, 16).float(), rtol=0, atol=0)


def test_a_learned_variance_that_is_not_asked_for_is_left_out(tmp_path: Path) -> None:
    vp = {"process": "vp"}
    config = check_config({**CONFIG, "diffusion": vp | {"learn_sigma": True}})
    both = build_denoiser(config, CLASSES)
    for parameter in both.parameters():
        parameter.data = torch.randn_like(parameter)
    save_file(both.state_dict(), tmp_path / "both.safetensors")
    weights = {**CONFIG["denoiser"], "weights": str(tmp_path / "both.safetensors")}  # type: ignore[dict-item]
    config = check_config({**CONFIG, "diffusion": vp, "denoiser": weights})
    with torch.device("meta"):
        check_denoiser_weights(config, build_denoiser(config, CLASSES))
    mean = build_denoiser(config, CLASSES)
    start_from_weights(config, mean)
    x, t, y = torch.randn(2, 1, 28, 28), torch.tensor([3.0, 700.0]), torch.tensor([1, 10])
    with torch.no_grad():
        torch.testing.assert_close(mean(x, t, y), both(x, t, y)[:, :1])


def test_torchvision_s_resnet18_is_read_as_it_is_downloaded(tmp_path: Path) -> None:
    path = tmp_path / "resnet18-f37072fd.pth"
    psi = {"architecture": "resnet18", "norm": "frozen", "weights": str(path)}
    config = changed(data={"channels": 3}, structure_encoder=psi)
    weights = {name: torch.full_like(value, 2) for name, value in build_psi(config).state_dict().items()}
    assert weights["bn1.num_batches_tracked"].dtype == torch.int64
    torch.save(weights | {"fc.weight": torch.ones(1000, 512), "fc.bias": torch.ones(1000)}, path)
    with torch.device("meta"):
        check_psi_weights(config, build_psi(config))
    found = load_psi(config, str(path)).state_dict()
    assert all((value == 2).all() for name, value in found.items() if "num_batches" not in name)


def test_a_vit_in_dinov2_s_layout_is_psi_with_the_sizes_of_its_weights(tmp_path: Path) -> None:
    psi = {"architecture": "vit", "width": 64, "depth": 2, "position_grid": 5, "input_size": 28}
    weights = {name: value + 1 for name, value in build_psi(changed(structure_encoder=psi)).state_dict().items()}
    torch.save(weights | {"mask_token": torch.zeros(1, 64)}, tmp_path / "dinov2.pth")
    config = changed(structure_encoder=psi | {"weights": str(tmp_path / "dinov2.pth")})
    found = load_psi(config, str(tmp_path / "dinov2.pth"))
    assert all(torch.equal(value, weights[name]) for name, value in found.state_dict().items())
    other = changed(structure_encoder=psi | {"depth": 3, "weights": str(tmp_path / "dinov2.pth")})
    with pytest.raises(UserError, match=r"does not fit ViT \(it lacks blocks.2.*a vit needs its own width, depth"):
        check_psi_weights(other, build_psi(other))


def mapped(tmp_path: Path, label_map: Any, classes: list[str], there: str = "weights.safetensors") -> dict[str, Tensor]:
    """The state of a denoiser of `classes` on weights of three, whose rows are their numbers."""
    weights = state(classes=3)
    weights[TABLE] = torch.arange(4.0)[:, None].expand(4, 32).contiguous()
    (tmp_path / there).parent.mkdir(parents=True, exist_ok=True)
    save_file(weights, tmp_path / there)
    given = {"weights": str(tmp_path / there.partition("/checkpoints")[0]), "label_map": label_map}
    config = changed(denoiser=given)
    with torch.device("meta"):
        check_denoiser_weights(config, build_denoiser(config, len(classes)), classes)
    denoiser = build_denoiser(config, len(classes))
    start_from_weights(config, denoiser, classes)
    return dict(denoiser.state_dict())


def test_a_file_maps_classes_to_rows_of_the_label_table(tmp_path: Path) -> None:
    (tmp_path / "map.json").write_text('{"owl": 2, "cat": 0}')
    table = mapped(tmp_path, str(tmp_path / "map.json"), ["ant", "cat", "owl", "pig", "yak"])[TABLE]
    drawn = build_denoiser(changed(), 5).state_dict()[TABLE]
    assert (table[2] == 2).all() and (table[1] == 0).all() and (table[-1] == 3).all()  # the last: no class
    assert torch.equal(table[[0, 3, 4]], drawn[[0, 3, 4]])


@pytest.mark.parametrize("kind", ["run", "pipeline"])
def test_classes_take_the_rows_of_their_names(tmp_path: Path, kind: str) -> None:
    names = ["owl", "bee", "cat"]
    folder = tmp_path / "from"
    folder.mkdir()
    there = "from/checkpoints/step-000001/ema.safetensors"
    if kind == "run":
        (folder / "run.json").write_text(json.dumps({"classes": names}))
    else:
        (folder / "model_index.json").write_text(json.dumps({"id2label": dict(enumerate(names))}))
    (folder / "checkpoints/step-000001").mkdir(parents=True)
    (folder / "checkpoints/step-000001/COMPLETE").write_text("")
    table = mapped(tmp_path, "names", ["ant", "cat", "owl"], there)[TABLE]
    assert table[:, 0].tolist()[1:] == [2.0, 0.0, 3.0]  # as many classes, but others


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[0, 1]", "must hold one JSON object, {class here: its number there}"),
        ("{", "cannot be read ("),
        ("{}", "names no class of the data; use null, and all start anew"),
        ('{"dog": 1}', "dog is no class of the data, which begin with ant, cat"),
        ('{"cat": 3}', "cat is 3; must be a number from 0 to 2"),
        ('{"cat": "bee"}', 'cat is "bee"; must be a number from 0 to 2'),
        (None, "names no classes (a run or a pipeline does); use a file"),
    ],
)
def test_a_label_map_that_cannot_be_is_one_line(tmp_path: Path, content: str | None, said: str) -> None:
    (tmp_path / "map.json").write_text(content or "")
    with pytest.raises(UserError, match=r"^denoiser.label_map=") as caught:
        mapped(tmp_path, "names" if content is None else str(tmp_path / "map.json"), ["ant", "cat"])
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_difffit_keeps_a_learned_variance(tmp_path: Path) -> None:
    vp = {"process": "vp"}
    both = build_denoiser(check_config({**CONFIG, "diffusion": vp | {"learn_sigma": True}}), CLASSES)
    save_file(both.state_dict(), tmp_path / "both.safetensors")
    with pytest.raises(UserError, match="has a learned variance, which denoiser.train=difffit cannot leave out"):
        config = changed(denoiser={"weights": str(tmp_path / "both.safetensors"), "train": "difffit"})
        config = config.model_copy(update={"diffusion": check_config({**CONFIG, "diffusion": vp}).diffusion})
        check_denoiser_weights(config, build_denoiser(config, CLASSES))
