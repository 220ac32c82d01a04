"""Judges from files: random weights of the published layouts, and what is said of a file that does not fit."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sadm_fast.errors import UserError
from sadm_fast.metrics import pretrained
from sadm_fast.metrics.judges import JUDGES
from sadm_fast.metrics.pretrained import PRETRAINED, ResNetJudge, pretrained_judge, published_name, without_rank
from sadm_fast.models import EfficientNetLite, ResNet18, ViT
from sadm_fast.models.efficientnet import SameConv2d


def test_every_judge_has_a_name_and_texts_of_its_own() -> None:
    everyone = [*JUDGES, *PRETRAINED.values()]
    for text in ("metric", "space", "text"):
        assert len({getattr(judge, text) for judge in everyone}) == len(everyone)


def test_a_vit_and_a_resnet_are_read_from_either_format_and_take_grey_images(tmp_path: Path) -> None:
    vit = ViT(3, patch_size=14, width=64, depth=1, position_grid=2, input_size=28)
    save_file(vit.state_dict(), tmp_path / "vit.safetensors")
    classifier = {"fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)}
    torch.save(ResNet18(3, "imagenet", "frozen").state_dict() | classifier, tmp_path / "resnet.pt")
    for name, file, width in (("vit", "vit.safetensors", 64), ("resnet18", "resnet.pt", 512)):
        judge = pretrained_judge(name, tmp_path / file)
        features = judge(torch.rand(2, 1, 20, 20) * 2 - 1)
        assert features.shape == (2, width) == (2, judge.feature_dim) and not judge.training


@pytest.mark.slow
def test_efficientnet_pads_as_tensorflow_and_gives_features_of_its_width(tmp_path: Path) -> None:
    torch.manual_seed(0)
    torch.save(EfficientNetLite(0).state_dict() | {"_fc.weight": torch.zeros(2, 2)}, tmp_path / "lite.pth")
    judge = pretrained_judge("efficientnet_lite0", tmp_path / "lite.pth")
    assert judge(torch.rand(2, 1, 28, 28)).shape == (2, 1280)


@pytest.mark.parametrize(
    ("length", "kernel", "stride", "first"), [(4, 3, 2, 0), (4, 5, 2, 1), (7, 5, 2, 2), (5, 3, 1, 1)]
)
def test_the_odd_pixel_of_padding_is_at_the_end(length: int, kernel: int, stride: int, first: int) -> None:
    layer = SameConv2d(1, 1, kernel, stride)
    torch.nn.init.ones_(layer.weight)
    out = layer(torch.ones(1, 1, length, length))
    assert out.shape[-1] == -(-length // stride)
    assert float(out.detach()[0, 0, 0, 0].sqrt()) == pytest.approx(
        min(kernel - first, length)
    )  # the window's part in the image


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("dreamsim", "--judges dreamsim: must be one of inception, efficientnet_lite0, efficientnet_lite1"),
        ("inception", "--judges inception: needs pt_inception-2015-12-05-6726825d.pth, of the releases"),
        ("efficientnet_lite0", "--judges efficientnet_lite0: needs efficientnet-lite0-57934424.pth, which PyPI's"),
    ],
)
def test_a_judge_without_its_file_is_one_line(name: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained, "installed_efficientnet", lambda lite: None)
    with pytest.raises(UserError) as found:
        pretrained_judge(name, None)
    assert words in str(found.value) and "\n" not in str(found.value)


def test_too_few_samples_for_a_covariance_are_said() -> None:
    judge = ResNetJudge(ResNet18(3))
    line = without_rank([judge], 512)
    assert line is not None and line.startswith("512 samples are fewer than the features of fd_resnet18 (512) plus one")
    assert without_rank([judge], 513) is None


def test_a_file_of_something_else_is_one_line(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(3)}, tmp_path / "a.pt")
    for name, words in (
        ("inception", "its sha256 begins with "),
        ("vit", "does not fit (is not of a ViT"),
        ("resnet18", "does not fit (it lacks bn1.bias and"),
        ("efficientnet_lite0", "does not fit (it lacks"),
    ):
        with pytest.raises(UserError) as found:
            pretrained_judge(name, tmp_path / "a.pt")
        assert words in str(found.value) and f"--judges {name}=" in str(found.value)
    state = ResNet18(3, "imagenet", "frozen").state_dict()
    state["bn1.bias"][0] = torch.nan
    torch.save(state, tmp_path / "nan.pt")
    with pytest.raises(UserError, match=r"bn1\.bias holds values that are not finite"):
        pretrained_judge("resnet18", tmp_path / "nan.pt")


def test_fid_is_named_with_its_count_and_fid_50k_only_at_50_000() -> None:
    names = [published_name("fid_inception", samples) for samples in (49_999, 50_000, 50_001, 10_000)]
    assert names == ["FID(49999)", "FID-50K", "FID(50001)", "FID(10000)"]
    assert published_name("sfid_inception", 50_000) == "sFID-50K"
    assert published_name("fd_vit", 50_000) == "fd_vit" and published_name("fid_classifier", 50_000) == "fid_classifier"
