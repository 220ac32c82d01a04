"""ViT in DINOv2's layout, against its formulas written out naively."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sadm_fast.models.vit import ViT


def network(**options: int) -> ViT:
    sizes = {"patch_size": 4, "width": 128, "depth": 2, "position_grid": 3, "input_size": 12}
    vit = ViT(**sizes | options).double().eval()
    for parameter in vit.parameters():
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())) * 0.3
        parameter.data = parameter.data.double()
    return vit


def images(side: int = 12, channels: int = 3) -> Tensor:
    return torch.rand(2, channels, side, side, generator=torch.Generator().manual_seed(1)).double() * 2 - 1


def naive(w: dict[str, Tensor], image: Tensor, patch: int, heads: int) -> Tensor:
    """The class token of one image [C, H, W] on the table's own grid, patch by patch and head by head."""
    grid, tokens = image.shape[1] // patch, [w["cls_token"][0, 0] + w["pos_embed"][0, 0]]
    for i in range(grid * grid):
        row, column = divmod(i, grid)
        cell = image[:, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
        filters = w["patch_embed.proj.weight"]
        tokens.append((filters * cell).sum((1, 2, 3)) + w["patch_embed.proj.bias"] + w["pos_embed"][0, 1 + i])
    x = torch.stack([tokens[0], *w.get("register_tokens", w["cls_token"][:, :0])[0], *tokens[1:]])

    def norm(name: str, x: Tensor) -> Tensor:
        z = (x - x.mean(1, keepdim=True)) / (x.var(1, unbiased=False, keepdim=True) + 1e-6).sqrt()
        return z * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    for b in ("blocks.0", "blocks.1"):
        qkv = linear(f"{b}.attn.qkv", norm(f"{b}.norm1", x)).chunk(3, dim=1)
        of_heads = []
        for q, k, v in zip(*(part.chunk(heads, dim=1) for part in qkv), strict=True):
            of_heads.append((q @ k.T / q.shape[1] ** 0.5).softmax(1) @ v)
        x = x + w[f"{b}.ls1.gamma"] * linear(f"{b}.attn.proj", torch.cat(of_heads, 1))
        hidden = linear(f"{b}.mlp.fc1", norm(f"{b}.norm2", x))
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
        x = x + w[f"{b}.ls2.gamma"] * linear(f"{b}.mlp.fc2", hidden)
    return norm("norm", x)[0]


@pytest.mark.parametrize("registers", [0, 4])
def test_it_is_the_formulas_of_the_papers(registers: int) -> None:
    vit, x = network(registers=registers), images()
    mean, std = torch.tensor([0.485, 0.456, 0.406]).double(), torch.tensor([0.229, 0.224, 0.225]).double()
    normed = (((x + 1) / 2).movedim(1, -1) - mean) / std
    wanted = torch.stack([naive(dict(vit.state_dict()), image.movedim(-1, 0), 4, heads=2) for image in normed])
    with torch.no_grad():  # float32 constants of ImageNet
        torch.testing.assert_close(vit(x), wanted, rtol=1e-6, atol=1e-6)


def test_it_is_built_from_a_file_s_shapes_and_ignores_what_only_training_needs() -> None:
    vit = network(registers=2, in_channels=4)
    state = dict(vit.state_dict())
    more = {"mask_token": torch.zeros(1, 128), "head.weight": torch.zeros(10, 128), "head.bias": torch.zeros(10)}
    again = ViT.from_state(state | more, input_size=12).double()
    assert not again.training and again.feature_dim == 128 and again.registers == 2
    with torch.no_grad():
        torch.testing.assert_close(again(images(channels=4)), vit(images(channels=4)), rtol=1e-5, atol=1e-5)


def test_a_file_without_layer_scale_scales_by_one() -> None:
    state = {name: value for name, value in network().state_dict().items() if ".gamma" not in name}
    found = ViT.from_state(state, input_size=12).state_dict()
    gammas = [value for name, value in found.items() if ".gamma" in name]
    assert len(gammas) == 4 and all((value == 1).all() for value in gammas)


@pytest.mark.parametrize("change", ["conv1.weight", "norm.weight", "blocks.0.extra"])
def test_a_state_of_another_network_is_refused(change: str) -> None:
    state = dict(network().state_dict())
    if change == "conv1.weight":
        state = {change: torch.zeros(1)}
    elif change == "norm.weight":
        del state[change]
    else:
        state[change] = torch.zeros(1)
    with pytest.raises(ValueError, match="is not of a ViT"):
        ViT.from_state(state)


def test_positions_of_another_grid_are_resampled_as_in_the_release() -> None:
    vit = network(input_size=20)
    table = vit.state_dict()["pos_embed"][:, 1:].unflatten(1, (3, 3)).permute(0, 3, 1, 2)
    wanted = F.interpolate(table.float(), scale_factor=5.1 / 3, mode="bicubic").flatten(2).transpose(1, 2)
    found = vit._positions()
    assert found.shape == (1, 26, 128) and torch.equal(found[:, 1:], wanted.double())
    assert torch.equal(found[:, :1], vit.pos_embed[:, :1])


def test_images_of_another_side_are_resized_and_samples_do_not_mix() -> None:
    vit, x = network(), images(side=30).requires_grad_()
    features = vit(x)
    alone = F.interpolate(x[:1], (12, 12), mode="bicubic", antialias=True)
    torch.testing.assert_close(features[:1], vit(alone), rtol=1e-6, atol=1e-6)
    (gradient,) = torch.autograd.grad(features[0].sum(), x)
    assert gradient[0].abs().sum() > 0 and (gradient[1] == 0).all()


def test_an_input_that_is_no_multiple_of_a_patch_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^input_size=100: must be a multiple of patch_size=14$"):
        ViT(input_size=100)


def test_a_blocks_patches_are_returned_as_tokens() -> None:
    vit = ViT(1, patch_size=4, width=16, depth=2, position_grid=4, input_size=16, registers=2)
    seen: list[Tensor] = []
    vit.blocks[0].register_forward_hook(lambda *args: seen.append(args[-1]))
    x = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    vit.map_stage = 1
    assert torch.equal(vit(x), seen[0][:, 3:]) and seen[0].shape == (2, 1 + 2 + 16, 16)
