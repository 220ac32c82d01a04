"""The C++ kernel: exactness, every instruction set, threads, memory, and what is said when it is missing."""

import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sadm_kernels import backends, native, structure_loss
from sadm_kernels.capabilities import FUSED
from sadm_kernels.reference import NORMALIZATIONS, PENALTIES
from sadm_kernels.samples import Options, Pairs, Samples

RELATIONS = FUSED["native"].relation  # one that only the reference knows has tests of its own

needs_kernel = pytest.mark.skipif(backends()["native"] != "ok", reason=backends()["native"])
EPS = torch.finfo(torch.float32).eps


def features(size: int, d: int, mean: float = 0.0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    real, fake = torch.randn(2, size, d, dtype=torch.float64, generator=torch.Generator().manual_seed(size)) + mean
    return real.to(dtype), fake.to(dtype)


def evaluate(impl: str, real: Tensor, fake: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    real, fake = real.detach().clone().requires_grad_(True), fake.detach().clone().requires_grad_(True)
    loss = structure_loss(real, fake, impl=impl, **options)
    grad_real, grad_fake = torch.autograd.grad(loss, (real, fake))
    return loss.detach(), grad_real, grad_fake


@needs_kernel
@settings(deadline=None, max_examples=60)
@given(
    size=st.integers(3, 300),
    d=st.integers(1, 140),
    relation=st.sampled_from(RELATIONS),
    penalty=st.sampled_from(PENALTIES),
    normalize=st.sampled_from(NORMALIZATIONS),
    weighted=st.booleans(),
    labelled=st.booleans(),
)
def test_equals_the_reference_at_any_shape(size, d, relation, penalty, normalize, weighted, labelled) -> None:
    # Hundreds of points on a line or in a plane come as near as 1e-5, where the reference's own distances, roots of
    # differences, are good to eps / 1e-10 = 2e-6 only.
    assume(d >= 4 or size <= 12)
    real, fake = features(size, d)
    options: dict[str, Any] = {"relation": relation, "penalty": penalty, "normalize": normalize, "delta": 0.3}
    options["tau"] = 1.0 if normalize != "none" else d**0.5
    options["weight"] = torch.linspace(0, 1, size, dtype=torch.float64) if weighted else None
    options["labels"] = torch.arange(size) % 3 if labelled else None
    expected = evaluate("reference", real, fake, **options)
    for found, value in zip(evaluate("native", real, fake, **options), expected, strict=True):
        # Sums of up to 300 terms of both signs in float64, in another order. At d = 1 unit rows are 1 or -1: what is
        # left of their gradient is rounding, so the floor is absolute.
        torch.testing.assert_close(found, value, rtol=1e-8, atol=1e-11)


@needs_kernel
@pytest.mark.parametrize(("size", "d"), [(1100, 40), (1057, 300)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equals_the_reference_over_several_strips(size: int, d: int, dtype: torch.dtype) -> None:
    """More rows than a strip has, and no multiple of a tile."""
    real, fake = features(size, d, 1.0, dtype)
    options = {"weight": torch.linspace(0, 1, size, dtype=torch.float64), "normalize": "mean"}
    expected = evaluate("reference", real.double(), fake.double(), **options)
    # As below: float32 sums of about a thousand terms; bfloat16 weights and gradients.
    unit = {torch.float64: 1e-12, torch.float32: 64 * EPS, torch.bfloat16: 2 * torch.finfo(torch.bfloat16).eps}[dtype]
    for found, value in zip(evaluate("native", real, fake, **options), expected, strict=True):
        assert float((found.double() - value).norm() / value.norm()) < unit


@needs_kernel
@pytest.mark.parametrize("mean", [0.0, 3.0, 10.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("relation", RELATIONS)
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("size", [64, 200])
def test_is_as_exact_as_eager_float32(mean, dtype, relation, normalize, size) -> None:
    """The error against float64 stays below the eager path's own, in float32, plus one unit of the dtype."""
    real, fake = features(size, 96, mean, dtype)
    options = {"relation": relation, "normalize": normalize, "tau": 1.0 if normalize != "none" else 10.0}
    exact = evaluate("reference", real.double(), fake.double(), **options)
    eager = evaluate("reference", real.float(), fake.float(), **options)
    # float32: sums of a few hundred terms err by some tens of units at most; bfloat16: one rounding of the weights and
    # one of the gradient. The loss of bfloat16 features is summed in float32.
    units = [32 * EPS, *[2 * torch.finfo(dtype).eps if dtype == torch.bfloat16 else 32 * EPS] * 2]
    for found, other, value, unit in zip(evaluate("native", real, fake, **options), eager, exact, units, strict=True):
        error, eager_error = ((x.double() - value).norm() / value.norm() for x in (found, other))
        assert float(error) <= float(eager_error) + unit


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("size", [5, 130, 700])
def test_the_number_of_threads_changes_no_bit(dtype: torch.dtype, size: int) -> None:
    real, fake = features(size, 70, 1.0, dtype)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(evaluate("native", real, fake, normalize="mean", weight=torch.linspace(0, 1, size)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


def test_every_instruction_set_of_this_processor(instruction_set: str) -> None:
    """One build serves them all; SADM_KERNELS_ISA chooses another one than the best."""
    for size, d in ((5, 3), (70, 33), (150, 100)):
        weight, labels = torch.linspace(0.1, 1, size, dtype=torch.float64), torch.arange(size) % 2
        for dtype, unit in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2.0**-6)):
            real, fake = features(size, d, dtype=dtype)
            for relation, penalty, normalize in itertools.product(RELATIONS, ("squared", "huber"), NORMALIZATIONS):
                options: dict[str, Any] = {"relation": relation, "penalty": penalty, "normalize": normalize}
                options |= {"tau": 3.0, "weight": weight, "labels": labels}
                exact = evaluate("reference", real.double(), fake.double(), **options)
                for found, expected in zip(evaluate("native", real, fake, **options), exact, strict=True):
                    assert float((found.double() - expected).norm() / expected.norm()) < unit, (size, dtype, options)


@needs_kernel
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("relation", RELATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_rows_against_all_columns_are_a_part_of_the_whole(relation: str, normalize: str, dtype: torch.dtype) -> None:
    """What a rank of a process group computes, at places that are no multiple of a tile."""
    size, width = 150, 40
    real, fake = features(size, width, dtype=dtype)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    weight, labels = torch.linspace(0, 1, size, dtype=compute), torch.arange(size) % 3

    def part(first: int, end: int) -> Pairs:
        tau = 0.8 if normalize != "none" else width**0.5  # of the order of the distances, or nothing is left of exp
        options = Options(relation, "huber", normalize, tau, delta=0.2)
        return Pairs(Samples(real, fake, weight, labels), range(first, end), options)

    moments = None
    if normalize == "mean" and relation != "cosine":
        sums = native.distance_sums(part(0, size))
        torch.testing.assert_close(
            sums, native.distance_sums(part(0, 37)) + native.distance_sums(part(37, 150)), rtol=1e-6, atol=0
        )
        moments = torch.cat([sums[2] / sums[:2], torch.zeros(2, dtype=torch.float64)])
        slopes = native.slope_sums(part(0, size), moments)
        moments[2:] = slopes[:2] / slopes[2]
    whole = native.loss_and_gradients(part(0, size), moments, True, True)
    pieces = [native.loss_and_gradients(part(a, b), moments, True, True) for a, b in ((0, 37), (37, 138), (138, 150))]
    # The same pair weights, in bfloat16 rounded alike; only the sums over columns run in another order.
    limit = 32 * torch.finfo(compute).eps
    torch.testing.assert_close(sum(piece[0] for piece in pieces), whole[0], rtol=limit, atol=0)
    for x in (1, 2):
        parts = [piece[x] for piece in pieces]
        expected = whole[x]
        assert expected is not None
        difference = torch.cat([g for g in parts if g is not None]) - expected
        assert float(expected.norm()) > 0 and float(difference.norm() / expected.norm()) < limit


@needs_kernel
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_made_by_fork_runs_on_one_thread() -> None:
    """OpenMP's threads stay with the parent: a child that waited for them would never return."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        real, fake = features(700, 70, dtype=torch.float32)
        expected = float(structure_loss(real, fake, impl="native"))
        if (child := os.fork()) == 0:
            signal.alarm(20)  # ends the child, not the test
            # Torch's own operations would wait as well.
            same = float(structure_loss(real, fake.flip(0).flip(0), impl="native")) == expected
            os._exit(0 if same else 1)
        assert os.waitpid(child, 0)[1] == 0
    finally:
        torch.set_num_threads(before)


@needs_kernel
def test_labels_beyond_32_bits_stay_apart() -> None:
    real, fake = features(6, 4, dtype=torch.float32)
    labels = torch.tensor([0, 2**32, 0, 2**32, 5, 5 + 2**40])
    expected = structure_loss(real, fake, labels=torch.tensor([0, 1, 0, 1, 2, 3]), impl="native")
    assert torch.equal(structure_loss(real, fake, labels=labels, impl="native"), expected)


MEMORY = """
import pathlib, resource, torch
from sadm_kernels import structure_loss
def status(name):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024
real, fake = torch.randn(2, 20000, 64)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
before = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (used + (8 << 20), before[1]))
try:
    structure_loss(real, fake, impl="native")
except RuntimeError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_AS, before)
real, fake = torch.randn(2, 4096, 64)
fake.requires_grad_(True)
structure_loss(real[:64], fake[:64], impl="native").backward()
fake.grad = None
pathlib.Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
structure_loss(real, fake, impl="native").backward()
print(status("VmHWM") - before)
"""


@needs_kernel
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's peak counter")
def test_memory_is_no_matrix_of_all_pairs_and_too_little_of_it_is_an_error() -> None:
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    error, peak = done.stdout.splitlines()
    assert 0 < int(peak) < 4096 * 4096 * 4 / 3  # a third of one float32 matrix
    assert error == "structure_loss: not enough memory for 20000 rows of 64 features"


def test_without_the_library_the_reason_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "libstructure.so")
    monkeypatch.setattr(native, "BUILD_FAILURE", tmp_path / "build_failure.txt")
    library, status = native._load()
    assert library is None and status.startswith("not built: libstructure.so is not there; install it with a C++17")
    native.BUILD_FAILURE.write_text("No CMAKE_CXX_COMPILER could be found.\n")
    assert "not built when this was installed: No CMAKE_CXX_COMPILER could be found.; install" in native._load()[1]
    native.LIBRARY.write_text("no library")
    library, status = native._load()
    assert library is None and status.startswith("cannot load libstructure.so: ") and "pip install ." in status


@needs_kernel
def test_a_library_of_another_version_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_INTERFACE", 99)
    library, status = native._load()
    assert library is None and "is of another version (interface 5, not 99)" in status
