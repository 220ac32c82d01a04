"""One graph for all blocks; where torch.compile cannot be had, one line says why and the run goes on."""

import copy
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from sadm_fast.config import check_config
from sadm_fast.engine.compilation import blocks_of, check_compilation, compile_in_place, why_not
from sadm_fast.engine.flat import Flat
from sadm_fast.errors import UserError
from sadm_fast.models import Denoiser, DiT, ResNet18, SmallCNN, UNet, ViT

CPU = torch.device("cpu")


class WithoutBlocks(Denoiser):
    """A denoiser of somebody's own that has no `blocks`."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor, *_: Tensor) -> Tensor:
        return self.layer(x)


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    torch._dynamo.reset()


def test_graphs_without_a_cuda_device_are_refused_in_one_line() -> None:
    for value in (False, True, "off", "on"):
        check_compilation(check_config({"name": "a", "train": {"compile": value}}))
    with pytest.raises(UserError, match=r"^train.compile=graphs: needs a CUDA device, and there is none; use on$"):
        check_compilation(check_config({"name": "a", "train": {"compile": "graphs"}}))


def test_stage_3_stays_eager() -> None:
    reason = why_not(3, CPU)
    assert reason is not None and "stage 3" in reason


def test_without_a_compiler_the_reason_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (None, "no-such-compiler"))
    reason = why_not(1, CPU)
    assert reason is not None and reason.startswith("a trial failed: ") and "\n" not in reason
    assert "compiler" in reason


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_with_a_compiler_it_works_and_names_stay() -> None:
    assert why_not(1, CPU) is None
    module = WithoutBlocks()
    before = list(module.state_dict())
    counters.clear()
    compile_in_place(module)
    assert list(module.state_dict()) == before
    expected = nn.functional.linear(torch.ones(2, 3), module.layer.weight, module.layer.bias)
    torch.testing.assert_close(module(torch.ones(2, 3)), expected)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize(
    ("network", "inputs"),
    [
        (lambda: DiT(8, 4, hidden_size=16, depth=3, num_heads=2, num_classes=3), ((2, 4, 8, 8), (2,), None)),
        (lambda: ViT(3, patch_size=8, width=16, depth=3, position_grid=2, input_size=16), ((2, 3, 16, 16),)),
    ],
    ids=["DiT", "ViT"],
)
@pytest.mark.parametrize("flat", [False, True])
def test_one_graph_of_a_pass_at_any_depth_in_train_and_eval(
    network: Callable[[], nn.Module], inputs: tuple[tuple[int, ...] | None, ...], flat: bool, monkeypatch
) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch.manual_seed(0)
    eager = network()
    with torch.no_grad():
        for parameter in eager.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    compiled = copy.deepcopy(eager)
    compile_in_place(compiled)
    called = Flat(compiled, 500, blocks_of(compiled)) if flat else compiled
    arguments = [torch.tensor([0, 2]) if shape is None else torch.rand(shape) for shape in inputs]
    expected = eager(*arguments)
    counters.clear()
    for training in (True, False, True):
        called.train(training)
        # Sums of a few dozen products of order 1, in fp32, in another order.
        torch.testing.assert_close(called(*arguments), expected, rtol=1e-5, atol=1e-5)
        called(*arguments).sum().backward()
    assert counters["stats"]["unique_graphs"] == 1
    with torch.no_grad():
        called(*arguments)
    assert counters["stats"]["unique_graphs"] == 2


@pytest.mark.parametrize("psi", [SmallCNN(1, width=8, feature_dim=4), ResNet18(1, "small")])
def test_a_convolutional_psi_stays_eager(psi: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda *_, **__: pytest.fail("compiled"))
    compile_in_place(psi)
    assert psi(torch.rand(2, 1, 8, 8)).shape == (2, psi.feature_dim)


@pytest.mark.slow
def test_a_u_nets_levels_are_a_graph_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch.manual_seed(0)
    eager = UNet(8, 1, 1, 3, channels=8, multipliers=(1,), depth=1, attention_resolutions=(), dropout=0.2)
    with torch.no_grad():
        for parameter in eager.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    compiled = copy.deepcopy(eager)
    compile_in_place(compiled)
    called = Flat(compiled, 500, blocks_of(compiled))
    counters.clear()
    for first in (0, 2):
        ids = torch.arange(first, first + 2)
        arguments = torch.rand(2, 1, 8, 8), torch.rand(2), ids % 3, ids
        # Sums of a few dozen products of order 1, in fp32, in another order; dropout is the sample's own.
        torch.testing.assert_close(called(*arguments), eager(*arguments), rtol=1e-4, atol=1e-4)
        called(*arguments).sum().backward()
    assert counters["stats"]["unique_graphs"] == 3 and not counters["graph_break"]
