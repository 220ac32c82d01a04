"""Where kernels can run: every instruction set of this processor, and Triton's strict interpreter."""

import shutil
from pathlib import Path

import pytest

from sadm_kernels import backends, native
from tests.kernels.triton.strict_interpreter import strict

__all__ = ["instruction_set", "strict"]


@pytest.fixture(params=["baseline", "avx2", "avx512", "avx512bf16"])
def instruction_set(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The native kernel on one instruction set: a copy of the library, which chooses when it is first called."""
    if backends()["native"] != "ok":
        pytest.skip(backends()["native"])
    copy = shutil.copy(native.LIBRARY, tmp_path)
    monkeypatch.setattr(native, "LIBRARY", Path(copy))
    monkeypatch.setenv("SADM_KERNELS_ISA", request.param)
    monkeypatch.setattr(native, "_library", native._load()[0])
    if native.instruction_set() != request.param:
        pytest.skip(f"this processor or build has no {request.param}")
    return request.param
