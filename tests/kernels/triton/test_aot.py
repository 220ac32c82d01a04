"""The kernels compiled for GPUs that are not there, against a committed budget.

After a change of the kernels: python -m sadm_kernels.triton.aot --write tests/kernels/triton/budget.json, and read the
difference. It takes each version of Triton that the budget has.
"""

import json
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

from sadm_kernels.triton import aot, launch

BUDGETS = json.loads(Path(__file__).with_name("budget.json").read_text())
cases = [(name, capability) for name in aot.VARIANTS for capability in aot.ARCHITECTURES]
compiled = cache(aot.compiled)


@pytest.fixture(scope="module")
def budget() -> dict[str, dict[str, dict]]:
    if find_spec("triton") is None:
        pytest.skip(f"needs triton {' or '.join(BUDGETS)}, none is installed")
    import triton

    if triton.__version__ not in BUDGETS:
        pytest.skip(f"triton {triton.__version__}: the budget is for {' and '.join(BUDGETS)}; see above")
    return BUDGETS[triton.__version__]


# One generation in `make test`; the others, a second or less for each kernel, in `make test-faults`.
@pytest.mark.parametrize(
    ("name", "capability"),
    [pytest.param(*case, marks=[] if case[1] == 90 else pytest.mark.soak) for case in cases],
)
def test_a_kernel_takes_what_the_budget_says(budget, name: str, capability: int) -> None:
    assert aot.usage_of(*compiled(name, capability))._asdict() == budget[name][f"sm_{capability}"]


@pytest.mark.parametrize("name", ["loss bf16", "gradient bf16"])
def test_no_product_is_contracted_into_a_sum(budget, name: str) -> None:
    """Or equal batches would differ (see launch._launch). Exact divisions, which these have not, contain some."""
    code = aot.disassembled(compiled(name, 90)[0])
    assert "FADD" in code and "FFMA" not in code


@pytest.mark.parametrize("version", BUDGETS)
def test_the_budget(version: str) -> None:
    """No spills, not more shared memory than there is, and matrix instructions of the generation."""
    assert {(name, f"sm_{c}") for name, c in cases} == {
        (name, arch) for name, archs in BUDGETS[version].items() for arch in archs
    }
    for name, capability in cases:
        usage = aot.Usage(**BUDGETS[version][name][f"sm_{capability}"])
        assert usage.stack == usage.local == 0, (name, capability)
        assert usage.shared <= aot.SHARED_LIMIT[capability], (name, capability)
        variant = aot.VARIANTS[name]
        if variant.kernel in ("weight_sums", "weigh_strip", "finish_strip", "few_sums"):
            continue
        # Blocks of 32 rows are too short for the instructions of a whole warp group.
        few = variant.kernel != "row_norms" and variant.size <= launch.FEW_ROWS
        expected = "HMMA" if few else {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}[capability]
        assert usage.matrix == [expected], (name, capability)


def test_every_tile_of_the_table_is_compiled() -> None:
    pytest.importorskip("triton")
    for capability in aot.ARCHITECTURES:
        compiled = set()
        for variant in aot.VARIANTS.values():
            work = aot.record(variant, capability)
            if work.kernel in ("row_gradient", "pair_sums"):
                k, words = work.keywords, ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages")
                compiled.add((*(k[word] for word in words), k.get("BLOCK_D", 0), variant.dtype.itemsize))
        for (_, size), tile in launch.TILES[capability].items():
            assert (tile.m, tile.n, tile.k, tile.warps, tile.stages, tile.d, size) in compiled
