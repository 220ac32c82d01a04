"""Where torch.compile cannot be had, one line says why and the run goes on."""

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from sadm_fast.config import check_config
from sadm_fast.engine.compilation import check_compilation, compile_in_place, why_not
from sadm_fast.errors import UserError

CPU = torch.device("cpu")


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
    module = nn.Linear(3, 3)
    before = list(module.state_dict())
    compile_in_place(module)
    assert list(module.state_dict()) == before
    expected = nn.functional.linear(torch.ones(2, 3), module.weight, module.bias)
    torch.testing.assert_close(module(torch.ones(2, 3)), expected)
