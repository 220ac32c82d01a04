"""Psi: torchvision's ResNet-18 by name and shape, and no layer that mixes samples."""

import pytest
import torch
from torch import Tensor, nn

from sadm_fast.models.structure_encoder import FrozenBatchNorm2d, ResNet18, SmallCNN, collect_statistics


def torchvision_resnet18() -> dict[str, tuple[int, ...]]:
    """state_dict of torchvision.models.resnet18() without fc: names and shapes, from the architecture."""
    shapes: dict[str, tuple[int, ...]] = {}

    def convolution(name: str, out: int, into: int, kernel: int) -> None:
        shapes[f"{name}.weight"] = (out, into, kernel, kernel)

    def batch_norm(name: str, channels: int) -> None:
        for part in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.{part}"] = (channels,)
        shapes[f"{name}.num_batches_tracked"] = ()

    convolution("conv1", 64, 3, 7)
    batch_norm("bn1", 64)
    into = 64
    for layer, channels in enumerate((64, 128, 256, 512), start=1):
        for block in (0, 1):
            name = f"layer{layer}.{block}"
            convolution(f"{name}.conv1", channels, into, 3)
            batch_norm(f"{name}.bn1", channels)
            convolution(f"{name}.conv2", channels, channels, 3)
            batch_norm(f"{name}.bn2", channels)
            if into != channels:
                convolution(f"{name}.downsample.0", channels, into, 1)
                batch_norm(f"{name}.downsample.1", channels)
            into = channels
    return shapes


def images(size: int, channels: int = 3, side: int = 32, seed: int = 0) -> Tensor:
    return torch.rand(size, channels, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def randomized(encoder: nn.Module) -> nn.Module:
    """Norms with affine parameters and statistics unlike their defaults."""
    generator = torch.Generator().manual_seed(1)
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
            tensors: list[Tensor | None] = [module.weight, module.bias]
            if isinstance(module, nn.BatchNorm2d):
                tensors += [module.running_mean, module.running_var]
            with torch.no_grad():
                for tensor in tensors:
                    assert tensor is not None
                    tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
    return encoder


def test_names_and_shapes_are_torchvisions() -> None:
    found = {name: tuple(value.shape) for name, value in ResNet18(norm="frozen").state_dict().items()}
    expected = torchvision_resnet18()
    assert found == expected and len(expected) == 120


@pytest.mark.parametrize("norm", ["frozen", "group"])
def test_parameter_count_is_torchvisions_without_the_classifier(norm: str) -> None:
    # torchvision: 11,689,512 with fc of 512 * 1000 + 1000
    assert sum(p.numel() for p in ResNet18(norm=norm).parameters()) == 11_689_512 - 513_000 == 11_176_512


def test_torchvisions_weights_load_strictly_and_are_used() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = {name: 0.05 * torch.rand(shape, generator=generator) for name, shape in torchvision_resnet18().items()}
    encoder = ResNet18(norm="frozen")
    encoder.load_state_dict(weights, strict=True)
    assert encoder(images(1, side=64)).isfinite().all()
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, weights[name].to(value.dtype))


def by_hand(weights: dict[str, Tensor], x: Tensor, stem: str) -> Tensor:
    """The network of He et al. on a state_dict, with torch's plain functions."""
    f = nn.functional

    def norm(name: str, value: Tensor) -> Tensor:
        mean, var, scale, shift = (
            weights[f"{name}.{part}"].view(1, -1, 1, 1) for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (value - mean) / (var + 1e-5).sqrt() * scale + shift

    mean, deviation = (torch.tensor(v).view(1, 3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    x = ((x + 1) / 2 - mean) / deviation
    if stem == "imagenet":
        x = f.max_pool2d(norm("bn1", f.conv2d(x, weights["conv1.weight"], stride=2, padding=3)).relu(), 3, 2, 1)
    else:
        x = norm("bn1", f.conv2d(x, weights["conv1.weight"], padding=1)).relu()
    for layer in range(1, 5):
        for block in range(2):
            name, stride = f"layer{layer}.{block}", 2 if layer > 1 and block == 0 else 1
            y = norm(f"{name}.bn1", f.conv2d(x, weights[f"{name}.conv1.weight"], stride=stride, padding=1)).relu()
            y = norm(f"{name}.bn2", f.conv2d(y, weights[f"{name}.conv2.weight"], padding=1))
            if f"{name}.downsample.0.weight" in weights:
                x = norm(f"{name}.downsample.1", f.conv2d(x, weights[f"{name}.downsample.0.weight"], stride=stride))
            x = (x + y).relu()
    return x.mean(dim=(2, 3))


@pytest.mark.parametrize("stem", ["imagenet", "small"])
def test_the_forward_pass_is_that_of_resnet18(stem: str) -> None:
    encoder = randomized(ResNet18(stem=stem, norm="frozen"))
    x = images(2, side=32)
    with torch.no_grad():
        expected = by_hand(encoder.state_dict(), x, stem)
        # 18 layers in float32
        torch.testing.assert_close(encoder(x), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("stem", "norm", "channels", "side"),
    [
        ("small", "group", 1, 16),
        ("imagenet", "frozen", 3, 32),
        ("small", "frozen", 4, 32),
        ("imagenet", "group", 3, 65),
    ],
)
def test_resnet_features(stem: str, norm: str, channels: int, side: int) -> None:
    encoder = ResNet18(in_channels=channels, stem=stem, norm=norm)
    features = encoder(images(2, channels, side))
    assert features.shape == (2, 512) and encoder.feature_dim == 512
    assert features.isfinite().all() and (features[0] != features[1]).any()


@pytest.mark.parametrize(("stem", "reduction"), [("imagenet", 4), ("small", 1)])
def test_the_small_stem_keeps_the_resolution(stem: str, reduction: int) -> None:
    sides: list[int] = []
    encoder = ResNet18(stem=stem)
    encoder.get_submodule("layer1").register_forward_pre_hook(lambda _, args: sides.append(args[0].shape[-1]))
    encoder(images(1, side=32))
    assert sides == [32 // reduction]


@pytest.mark.parametrize(("channels", "side"), [(1, 16), (3, 28), (4, 9)])
@pytest.mark.parametrize(("width", "feature_dim"), [(8, 5), (32, 64)])
def test_small_cnn_features(channels: int, side: int, width: int, feature_dim: int) -> None:
    encoder = SmallCNN(in_channels=channels, width=width, feature_dim=feature_dim)
    features = encoder(images(3, channels, side))
    assert features.shape == (3, feature_dim) and encoder.feature_dim == feature_dim
    assert features.isfinite().all() and (features[0] != features[1]).any()


ENCODERS = {
    "resnet18-group": lambda: ResNet18(norm="group", stem="small"),
    "resnet18-frozen": lambda: ResNet18(norm="frozen", stem="small"),
    "cnn": lambda: SmallCNN(in_channels=3),
}
every_encoder = pytest.mark.parametrize("make", ENCODERS.values(), ids=ENCODERS)


@every_encoder
def test_a_samples_features_do_not_depend_on_its_batch(make) -> None:
    encoder = randomized(make()).train()  # eval mode is the same, as the next test shows
    x = images(4, side=16)
    state = {name: value.clone() for name, value in encoder.state_dict().items()}
    with torch.no_grad():
        together = encoder(x)
        alone = torch.cat([encoder(row) for row in x.split(1)])
        among_others = encoder(torch.cat([x[:1], 5 * images(3, side=16, seed=9)]))[:1]
    scale = float(together.abs().max())
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-5 * scale)  # another order of float32 sums
    torch.testing.assert_close(among_others, together[:1], rtol=0, atol=1e-5 * scale)
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, state[name]), f"{name} changed in a forward"


@every_encoder
def test_train_and_eval_mode_are_the_same(make) -> None:
    encoder, x = randomized(make()), images(2, side=16)
    with torch.no_grad():
        assert torch.equal(encoder.train()(x), encoder.eval()(x))


@every_encoder
def test_gradient_reaches_the_image_and_every_parameter(make) -> None:
    encoder, x = randomized(make()), images(2, side=16).requires_grad_(True)
    encoder(x).square().sum().backward()
    assert x.grad is not None and (x.grad != 0).float().mean() > 0.99
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


@every_encoder
def test_images_in_float32_enter_an_encoder_in_bf16(make) -> None:
    encoder, x = randomized(make()), images(2, side=16)
    with torch.no_grad():
        expected = encoder(x)
        found = encoder.bfloat16()(x)
    assert found.dtype == torch.bfloat16
    # 8 bits of mantissa through up to 18 layers
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=0.1 * float(expected.abs().max()))


def test_three_channels_are_brought_to_imagenets_statistics() -> None:
    encoder = ResNet18(norm="frozen")
    seen: list[Tensor] = []
    encoder.conv1.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    encoder((2 * mean - 1).view(1, 3, 1, 1).expand(1, 3, 32, 32))
    encoder((2 * (mean + deviation) - 1).view(1, 3, 1, 1).expand(1, 3, 32, 32))
    torch.testing.assert_close(seen[0], torch.zeros(1, 3, 32, 32), rtol=0, atol=1e-6)
    torch.testing.assert_close(seen[1], torch.ones(1, 3, 32, 32), rtol=0, atol=1e-5)


def test_statistics_are_collected_inside_the_block_only() -> None:
    encoder, x = ResNet18(norm="frozen", stem="small"), images(8, side=16)
    layers = [m for m in encoder.modules() if isinstance(m, FrozenBatchNorm2d)]
    assert len(layers) == 20

    def statistics() -> list[Tensor]:
        return [b.clone() for layer in layers for b in (layer.running_mean, layer.running_var) if b is not None]

    before = statistics()
    with torch.no_grad():
        encoder(x)
        assert all(map(torch.equal, statistics(), before))
        with collect_statistics(encoder):
            encoder(x)
        collected = statistics()
        assert not any(map(torch.equal, collected, before))
        encoder(x)
    assert all(map(torch.equal, statistics(), collected))


def test_inside_the_block_a_frozen_norm_is_an_ordinary_batch_norm() -> None:
    frozen, ordinary = FrozenBatchNorm2d(3), nn.BatchNorm2d(3)
    for seed in range(3):
        x = 2 * images(4, side=8, seed=seed) + 1
        with collect_statistics(frozen):
            assert torch.equal(frozen(x), ordinary.train()(x))
    for name in ("running_mean", "running_var"):
        assert torch.equal(getattr(frozen, name), getattr(ordinary, name))
    assert torch.equal(frozen(x), ordinary.eval()(x))


def test_a_block_left_by_an_error_collects_no_longer() -> None:
    layer = FrozenBatchNorm2d(3)
    with pytest.raises(RuntimeError), collect_statistics(layer):
        raise RuntimeError
    before = layer.running_mean.clone()  # type: ignore[union-attr]
    layer(images(4) + 3)
    assert torch.equal(layer.running_mean, before)  # type: ignore[arg-type]


def test_weights_in_bf16_beside_statistics_in_fp32_are_what_an_engine_may_leave() -> None:
    psi = ResNet18(4, stem="small", norm="frozen")
    for parameter in psi.parameters():
        parameter.data = parameter.data.bfloat16()
    features = psi(torch.randn(2, 4, 8, 8))
    assert features.dtype == torch.bfloat16 and features.isfinite().all()


@pytest.mark.parametrize(
    ("psi", "stage", "layers", "side"),
    [
        (SmallCNN(3, width=8, feature_dim=8), 1, "layers.2", 16),
        (SmallCNN(3, width=8, feature_dim=8), 2, "layers.5", 8),
        (SmallCNN(3, width=8, feature_dim=8), 3, "layers.8", 4),
        (ResNet18(3, "small"), 1, "layer1", 32),
        (ResNet18(3, "imagenet"), 2, "layer2", 4),
    ],
    ids=["cnn1", "cnn2", "cnn3", "resnet18-1", "resnet18-2"],
)
def test_a_stages_map_is_returned_as_tokens_of_at_most_8x8_cells(
    psi: SmallCNN | ResNet18, stage: int, layers: str, side: int
) -> None:
    maps: list[Tensor] = []
    x = images(2)
    psi.get_submodule(layers).register_forward_hook(lambda *args: maps.append(args[-1]))
    pooled = psi(x)
    psi.map_stage = stage
    tokens = psi(x)
    assert pooled.shape == (2, psi.feature_dim) and maps[0].shape[-1] == side
    cells = nn.functional.adaptive_avg_pool2d(maps[0], min(side, 8))
    assert torch.equal(tokens, cells.flatten(2).transpose(1, 2))
