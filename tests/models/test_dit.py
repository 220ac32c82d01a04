"""DiT against the facts of the official release: sizes, names, layouts, and the behaviour at initialisation."""

import ast
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import sadm_fast.models.dit
from sadm_fast.models import DiT
from sadm_fast.models.dit import Attention, timestep_frequencies, without_gammas

SOURCES = Path(sadm_fast.models.dit.__file__).parents[1]

# 256 pixels (32 x 32 latents), 1000 classes: all parameters, trainable ones, tensors.
PUBLISHED = {
    "DiT-S/2": (32_963_360, 32_865_056, 132),
    "DiT-S/4": (32_945_024, 32_920_448, 132),
    "DiT-S/8": (33_148_160, 33_142_016, 132),
    "DiT-B/2": (130_512_416, 130_315_808, 132),
    "DiT-B/4": (130_475_648, 130_426_496, 132),
    "DiT-B/8": (130_881_536, 130_869_248, 132),
    "DiT-L/2": (458_102_816, 457_840_672, 252),
    "DiT-L/4": (458_053_760, 457_988_224, 252),
    "DiT-L/8": (458_594_816, 458_578_432, 252),
    "DiT-XL/2": (675_129_632, 674_834_720, 292),
    "DiT-XL/4": (675_074_432, 675_000_704, 292),
    "DiT-XL/8": (675_683_072, 675_664_640, 292),
}
HEADS = 2  # of the tiny model
DEPTH_WIDTH = {"S": (12, 384), "B": (12, 768), "L": (24, 1024), "XL": (28, 1152)}


def tiny(**sizes: Any) -> DiT:
    arguments: dict[str, Any] = {
        "input_size": 8,
        "patch_size": 2,
        "in_channels": 3,
        "hidden_size": 24,
        "depth": 2,
        "num_heads": HEADS,
        "num_classes": 5,
    }
    return DiT(**(arguments | sizes))


def perturb(model: nn.Module, seed: int = 0) -> None:
    """Give every trainable parameter, those that start at zero too, a small random push."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def inputs(model: DiT, size: int = 3, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, model.in_channels, model.input_size, model.input_size, generator=generator)
    return x, torch.linspace(0, 999, size), torch.arange(size) % (model.num_classes + 1)


def sizes(model: nn.Module) -> tuple[int, int, int]:
    parameters = list(model.parameters())
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    return sum(p.numel() for p in parameters), trainable, len(model.state_dict())


def test_only_the_position_embedding_grows_with_the_image() -> None:
    with torch.device("meta"):
        assert sizes(DiT.from_name("DiT-XL/2", input_size=64)) == (676_014_368, 674_834_720, 292)


def expected_shapes(
    *, depth: int, width: int, patch: int, grid: int, channels: int, out: int, classes: int
) -> dict[str, tuple[int, ...]]:
    """The official state_dict, from the list of its names."""
    linears: dict[str, tuple[int, int]] = {
        "t_embedder.mlp.0": (width, 256),
        "t_embedder.mlp.2": (width, width),
        "final_layer.linear": (patch * patch * out, width),
        "final_layer.adaLN_modulation.1": (2 * width, width),
    }
    for i in range(depth):
        linears |= {
            f"blocks.{i}.attn.qkv": (3 * width, width),
            f"blocks.{i}.attn.proj": (width, width),
            f"blocks.{i}.mlp.fc1": (4 * width, width),
            f"blocks.{i}.mlp.fc2": (width, 4 * width),
            f"blocks.{i}.adaLN_modulation.1": (6 * width, width),
        }
    shapes: dict[str, tuple[int, ...]] = {
        "pos_embed": (1, grid * grid, width),
        "x_embedder.proj.weight": (width, channels, patch, patch),
        "x_embedder.proj.bias": (width,),
        "y_embedder.embedding_table.weight": (classes + 1, width),
    }
    for name, shape in linears.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_have_the_official_names_shapes_and_parameter_counts(name: str) -> None:
    size, patch = name.removeprefix("DiT-").split("/")
    depth, width = DEPTH_WIDTH[size]
    with torch.device("meta"):
        model = DiT.from_name(name)
    expected = expected_shapes(
        depth=depth, width=width, patch=int(patch), grid=32 // int(patch), channels=4, out=8, classes=1000
    )
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == expected
    assert sizes(model) == PUBLISHED[name]


def test_an_official_state_dict_loads_strictly_and_is_used() -> None:
    model = tiny()
    shapes = expected_shapes(depth=2, width=24, patch=2, grid=4, channels=3, out=6, classes=5)
    generator = torch.Generator().manual_seed(0)
    official = {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    model.load_state_dict(official, strict=True)
    for name, value in model.state_dict().items():
        assert torch.equal(value, official[name])
    other = tiny()
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(model(*inputs(model)), other(*inputs(model)))


def test_only_the_position_embedding_is_frozen() -> None:
    assert [name for name, p in tiny().named_parameters() if not p.requires_grad] == ["pos_embed"]


@settings(deadline=None, max_examples=15)
@given(
    channels=st.integers(1, 5),
    classes=st.integers(1, 12),
    patch=st.sampled_from([1, 2, 4]),
    learned=st.booleans(),
    heads=st.sampled_from([1, 2, 3]),
)
def test_any_channels_and_classes_and_exactly_zero_at_first(
    channels: int, classes: int, patch: int, learned: bool, heads: int
) -> None:
    out = 2 * channels if learned else channels
    model = tiny(in_channels=channels, out_channels=out, num_classes=classes, patch_size=patch, num_heads=heads)
    x, t, _ = inputs(model)
    labels = torch.tensor([0, classes - 1, model.null_class])
    found = model(x, t, labels)
    assert found.shape == (3, out, 8, 8) and not found.any()
    perturb(model)
    assert model(x, t, labels).isfinite().all()


def test_output_has_twice_the_channels_unless_said_otherwise() -> None:
    assert tiny().out_channels == 6 and tiny(out_channels=3).out_channels == 3
    with torch.device("meta"):
        assert DiT.from_name("DiT-S/8").out_channels == 8


def test_initial_weights_follow_the_release() -> None:
    model = DiT(input_size=8, patch_size=2, in_channels=4, hidden_size=192, depth=1, num_heads=3, num_classes=300)
    state = model.state_dict()

    def xavier(fan_in: int, fan_out: int) -> float:
        return (6 / (fan_in + fan_out)) ** 0.5

    bounds = {
        "blocks.0.attn.qkv": xavier(192, 3 * 192),  # q, k, v as one matrix
        "blocks.0.attn.proj": xavier(192, 192),
        "blocks.0.mlp.fc1": xavier(192, 768),
        "blocks.0.mlp.fc2": xavier(768, 192),
        "x_embedder.proj": xavier(4 * 2 * 2, 192),  # the convolution as a matrix
    }
    for name, bound in bounds.items():
        weight = state[f"{name}.weight"]
        # The largest of thousands of uniform numbers is within 1% of the bound, and never above it.
        assert 0.99 * bound < float(weight.abs().max()) <= bound * (1 + 1e-6)
        assert float(weight.std()) == pytest.approx(bound / 3**0.5, rel=0.05)
    for name in ("t_embedder.mlp.0", "t_embedder.mlp.2", "y_embedder.embedding_table"):
        assert float(state[f"{name}.weight"].std()) == pytest.approx(0.02, rel=0.05)
    zeros = [name for name in state if name.endswith("bias") or "adaLN_modulation" in name or "final_layer" in name]
    assert len(zeros) == 13
    assert not any(state[name].any() for name in zeros)


@pytest.mark.parametrize(("dim", "grid"), [(24, 4), (16, 3), (384, 16)])
def test_position_embedding_encodes_the_column_first(dim: int, grid: int) -> None:
    model = DiT(input_size=2 * grid, patch_size=2, hidden_size=dim, depth=1, num_heads=2)
    found = model.pos_embed[0].double().numpy()
    omega = 1.0 / 10000.0 ** (np.arange(dim // 4) / (dim // 4))
    for token in range(grid * grid):
        row, column = divmod(token, grid)
        expected = np.concatenate(
            [np.sin(column * omega), np.cos(column * omega), np.sin(row * omega), np.cos(row * omega)]
        )
        np.testing.assert_allclose(found[token], expected, rtol=0, atol=1e-7)  # one rounding to float32


def test_timestep_features_are_cosines_then_sines() -> None:
    t = torch.tensor([0.0, 1.0, 17.0, 999.0, 0.25])
    found = timestep_frequencies(t).double().numpy()
    frequencies = 10000.0 ** (-np.arange(128) / 128)
    angles = t.double().numpy()[:, None] * frequencies
    # Angles up to 999 in float32 are known to 1e-4.
    np.testing.assert_allclose(found, np.concatenate([np.cos(angles), np.sin(angles)], axis=1), rtol=0, atol=3e-4)
    assert timestep_frequencies(torch.tensor([5])).dtype == torch.float32


def test_patches_are_read_row_by_row() -> None:
    model = tiny(in_channels=1)
    with torch.no_grad():
        model.x_embedder.proj.weight.zero_()
        for i in range(4):
            model.x_embedder.proj.weight[i, 0, i // 2, i % 2] = 1.0
    image = torch.arange(64.0).view(1, 1, 8, 8)
    tokens = model.x_embedder(image)[0, :, :4]
    for token in range(16):
        row, column = divmod(token, 4)
        patch = image[0, 0, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        assert tokens[token].tolist() == patch.flatten().tolist()


def test_every_block_reads_and_writes_features_of_a_token_side_by_side() -> None:
    model = tiny()
    strides = []
    for block in (*model.blocks, model.final_layer):
        block.register_forward_pre_hook(lambda module, inputs: strides.append(inputs[0].stride()))
    with torch.no_grad():
        model(torch.randn(2, model.in_channels, 8, 8), torch.rand(2), torch.tensor([0, 1]))
    _, tokens, width = model.pos_embed.shape
    assert strides == [(tokens * width, width, 1)] * (len(model.blocks) + 1)


@pytest.mark.parametrize(("patch", "channels"), [(1, 3), (2, 3), (4, 1), (2, 8)])
def test_within_a_token_the_channel_runs_fastest(patch: int, channels: int) -> None:
    model = tiny(patch_size=patch, out_channels=channels)
    image = torch.arange(2.0 * channels * 64).view(2, channels, 8, 8)
    grid = 8 // patch
    tokens = torch.stack(
        [
            image[:, :, i * patch : (i + 1) * patch, j * patch : (j + 1) * patch].permute(0, 2, 3, 1).flatten(1)
            for i in range(grid)
            for j in range(grid)
        ],
        dim=1,
    )
    assert torch.equal(model.unpatchify(tokens), image)


def by_hand(model: DiT, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """The forward pass of the paper (adaLN-Zero), spelled out on the state_dict."""
    w = model.state_dict()
    width = model.pos_embed.shape[-1]
    heads = HEADS

    def linear(name: str, value: Tensor) -> Tensor:
        return value @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def silu(value: Tensor) -> Tensor:
        return value / (1 + (-value).exp())

    def norm(value: Tensor) -> Tensor:
        centred = value - value.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def gelu(value: Tensor) -> Tensor:
        return 0.5 * value * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (value + 0.044715 * value**3)))

    p = model.patch_size
    patches = x.unfold(2, p, p).unfold(3, p, p).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    tokens = patches @ w["x_embedder.proj.weight"].flatten(1).T + w["x_embedder.proj.bias"] + w["pos_embed"]
    c = linear("t_embedder.mlp.2", silu(linear("t_embedder.mlp.0", timestep_frequencies(t))))
    c = c + w["y_embedder.embedding_table.weight"][y]
    for i in range(len(model.blocks)):
        name = f"blocks.{i}"
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = (
            part[:, None] for part in linear(f"{name}.adaLN_modulation.1", silu(c)).split(width, dim=1)
        )
        q, k, v = linear(f"{name}.attn.qkv", norm(tokens) * (1 + scale_a) + shift_a).split(width, dim=-1)
        mixed = []
        for h in range(heads):
            own = slice(h * width // heads, (h + 1) * width // heads)
            scores = q[..., own] @ k[..., own].transpose(1, 2) * (width // heads) ** -0.5
            mixed.append(scores.softmax(-1) @ v[..., own])
        tokens = tokens + gate_a * linear(f"{name}.attn.proj", torch.cat(mixed, dim=-1))
        hidden = gelu(linear(f"{name}.mlp.fc1", norm(tokens) * (1 + scale_m) + shift_m))
        tokens = tokens + gate_m * linear(f"{name}.mlp.fc2", hidden)
    shift, scale = (part[:, None] for part in linear("final_layer.adaLN_modulation.1", silu(c)).split(width, dim=1))
    return model.unpatchify(linear("final_layer.linear", norm(tokens) * (1 + scale) + shift))


def test_the_forward_pass_is_the_papers() -> None:
    model = tiny()
    perturb(model)
    arguments = inputs(model)
    expected = by_hand(model, *arguments)
    assert float(expected.detach().std()) > 0.05
    # Some hundred float32 operations on values of order 1.
    torch.testing.assert_close(model(*arguments), expected, rtol=1e-4, atol=1e-5)


def test_gradient_reaches_every_trainable_parameter() -> None:
    model = tiny(num_classes=2)
    perturb(model)
    model(*inputs(model)).square().sum().backward()
    for name, parameter in model.named_parameters():
        if name == "pos_embed":
            assert parameter.grad is None
        elif name.endswith("qkv.bias"):
            # A bias of the keys adds the same to all scores of a query: softmax does not see it.
            q, _, v = parameter.grad.chunk(3)  # type: ignore[union-attr]
            assert q.all() and v.all(), name
        else:
            assert parameter.grad is not None and parameter.grad.all(), name


def test_activation_checkpointing_changes_no_bit_and_keeps_less() -> None:
    model = tiny()
    perturb(model)
    kept: list[int] = []
    results: list[list[Tensor]] = []
    for model.activation_checkpointing in (False, True):
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: (s.append(t.nbytes), t)[1], lambda t: t):  # type: ignore[misc]
            out = model(*inputs(model))
        out.square().sum().backward()
        results.append([out.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
        kept.append(sum(sizes))
        model.zero_grad()
    assert len(results[0]) == len(results[1]) > 10
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert kept[1] < 0.5 * kept[0]


def test_at_first_only_the_last_layer_learns() -> None:
    model = tiny()
    (model(*inputs(model)) - 1).square().sum().backward()
    learning = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert learning == {"final_layer.linear.weight", "final_layer.linear.bias"}


def test_samples_do_not_see_each_other() -> None:
    model = tiny()
    perturb(model)
    x, t, y = inputs(model, size=4)
    together = model(x, t, y)
    torch.testing.assert_close(torch.cat([model(*(v[i : i + 1] for v in (x, t, y))) for i in range(4)]), together)


def test_image_time_and_label_matter() -> None:
    model = tiny()
    perturb(model)
    x, t, y = inputs(model, size=1)
    base = model(x, t, y)
    for changed in ((x + 0.1, t, y), (x, t + 300, y), (x, t, y + 1)):
        assert float((model(*changed) - base).detach().abs().max()) > 1e-3


def test_bf16() -> None:
    model = tiny()
    perturb(model)
    x, t, y = inputs(model)
    expected = model(x, t, y)
    found = model.bfloat16()(x, t, y)
    assert found.dtype == torch.bfloat16
    # 8 bits of mantissa, some tens of roundings in a row, a few per cent of the largest value.
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=0.05 * float(expected.detach().abs().max()))


def test_a_state_without_the_fixed_position_embedding_loads_strictly() -> None:
    model = tiny()
    perturb(model)
    trained = {name: value for name, value in model.state_dict().items() if name != "pos_embed"}
    other = tiny()
    other.load_state_dict(trained, strict=True)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))
    wrapped = nn.Sequential(tiny())
    wrapped.load_state_dict({f"0.{name}": value for name, value in trained.items()}, strict=True)
    with pytest.raises(RuntimeError, match=r"Missing key.*x_embedder\.proj\.bias"):
        other.load_state_dict({name: value for name, value in trained.items() if name != "x_embedder.proj.bias"})


def test_a_position_embedding_of_another_resolution_is_one_line_that_says_what_to_do() -> None:
    with pytest.raises(ValueError) as caught:
        tiny(input_size=16).load_state_dict(tiny().state_dict())
    assert str(caught.value) == (
        "pos_embed: is for 4 x 4 tokens, this network has 8 x 8; use input_size=8, or delete pos_embed there:"
        " this network's own is taken then"
    )


@pytest.mark.parametrize("classes", [1, 10, 1000])
def test_the_null_class_is_the_last_row_of_the_label_table(classes: int) -> None:
    model = tiny(num_classes=classes, depth=1)
    assert model.null_class == classes == len(model.y_embedder.embedding_table.weight) - 1
    with pytest.raises(IndexError):
        model(*inputs(model)[:2], torch.full((3,), classes + 1))
    with pytest.raises(AttributeError):
        model.null_class = 3  # type: ignore[misc]


def default_sizes(tree: ast.AST) -> set[int]:
    """Positions (ids) of constants that are the default of a parameter or field of these names."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            arguments = [*node.args.posonlyargs, *node.args.args][::-1]
            defaults: list[tuple[ast.arg, ast.expr | None]] = list(
                zip(arguments, node.args.defaults[::-1], strict=False)
            )
            defaults += zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
            found |= {id(value) for argument, value in defaults if argument.arg in ("num_classes", "num_steps")}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            if node.target.id in ("num_classes", "num_steps"):
                found.add(id(node.value))
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "PIPELINE_NULL_CLASS":
            found.add(id(node.value))  # another program's
    return found


def test_no_source_takes_1000_for_the_null_class() -> None:
    """The integer may be the default of num_classes or num_steps and nothing else: for other uses write 1000.0, 1e3.

    Other programs have it in their formats, which exchange/ reads and writes.
    """
    found, defaults = [], 0
    for path in sorted(set(SOURCES.rglob("*.py")) - set((SOURCES / "exchange").rglob("*.py"))):
        tree = ast.parse(path.read_text())
        allowed = default_sizes(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and type(node.value) is int and node.value in (999, 1000, 1001):
                defaults += id(node) in allowed
                if id(node) not in allowed:
                    found.append(f"{path.relative_to(SOURCES)}:{node.lineno}")
    assert found == []
    assert defaults >= 2  # DiT's num_classes, VP's num_steps: the search does see them


@pytest.mark.parametrize("name", ["DiT-M/2", "DiT-XL/3", "DiT-XL", "XL/2", "dit-xl/2", "DiT-XL/2 ", "DiT-S/02", ""])
def test_an_unknown_name_is_answered_with_the_known_ones(name: str) -> None:
    with pytest.raises(ValueError, match="must be one of DiT-S/2, .*DiT-XL/8") as caught:
        DiT.from_name(name)
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"input_size": 9}, "input_size=9: must be a multiple of patch_size=2"),
        ({"hidden_size": 25}, "hidden_size=25: must be a multiple of num_heads=2 and of 4"),
        ({"hidden_size": 26}, "hidden_size=26"),
        ({"num_heads": 5}, "num_heads=5"),
    ],
)
def test_sizes_that_do_not_divide_are_named(wrong: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**wrong)


def test_attention_copies_nothing_but_its_three_gradients_into_one() -> None:
    found: list[str] = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found.append(str(function.overloadpacket))
            return function(*args, **(kwargs or {}))

    attention, x = Attention(64, 4), torch.randn(2, 16, 64, requires_grad=True)
    with Record():
        attention(x).sum().backward()
    assert not {"aten.clone", "aten.contiguous", "aten.copy_", "aten.cat", "aten._to_copy"} & set(found)
    assert found.count("aten.stack") == 1


# DiffFit


def test_difffit_trains_as_many_parameters_as_the_paper_says() -> None:
    with torch.device("meta"):
        model = DiT.from_name("DiT-XL/2", num_classes=101, difffit=True)  # Food-101's
    counts = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    gammas = sum(count for name, count in counts.items() if name.endswith(".gamma"))
    table, biases = counts["y_embedder.embedding_table.weight"], sum(n for k, n in counts.items() if "bias" in k)
    trained, whole = sum(counts.values()), sum(p.numel() for p in model.parameters()) - gammas
    assert trained == gammas + table + biases == 832_928
    assert gammas == 28 * 7 * 1152 and table == 102 * 1152 and biases == 28 * 15 * 1152 + 5 * 1152 + 32
    assert round(trained / 1e6, 2) == 0.83 and round(100 * trained / whole, 2) == 0.12


def test_difffit_begins_as_the_network_that_it_is_put_on() -> None:
    plain, tuned = tiny(), tiny(difffit=True)
    perturb(plain)
    missing, unexpected = tuned.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected and missing == [f"blocks.{k}.{part}.gamma" for k in range(2) for part in ("attn", "mlp")]
    assert torch.equal(tuned(*inputs(tuned)), plain(*inputs(plain)))


def test_scale_factors_multiplied_into_their_layers_leave_the_same_network() -> None:
    tuned, plain = tiny(difffit=True).double(), tiny().double()
    for parameter in tuned.parameters():
        parameter.requires_grad_(True)
    perturb(tuned)
    plain.load_state_dict(without_gammas(tuned.state_dict()), strict=True)
    # One rounding more of each weight, in float64.
    torch.testing.assert_close(plain(*inputs(plain)), tuned(*inputs(tuned)), rtol=1e-12, atol=1e-12)
