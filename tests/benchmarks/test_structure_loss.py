"""The benchmark of the structure loss: fair peers, a floor that is what it claims, honest times and memory."""

import csv
import itertools
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import measure, peers, report, structure_loss
from benchmarks.peers import Case, GemmFloor, Unavailable, loss_of, value_and_gradients
from sadm_kernels.capabilities import FUSED
from sadm_kernels.reference import NORMALIZATIONS, PENALTIES

RELATIONS = FUSED["native"].relation  # one that only the reference knows has tests of its own

linux = pytest.mark.skipif(sys.platform != "linux", reason="the kernel counts the peak on Linux only")


def assert_agrees_with_reference(name: str, case: Case) -> None:
    real, fake = case.features()
    exact = loss_of("reference", case)
    want, want_grads = value_and_gradients(lambda f, g: exact(f.double(), g.double()), real, fake)
    got, got_grads = value_and_gradients(loss_of(name, case), real, fake)
    # float32 sums over B pairs of a row, each with a distance of some 10 roundings
    tolerance = 32 * torch.finfo(torch.float32).eps
    assert len(got_grads) == len(want_grads) == (2 if case.grads == "both" else 1)
    for mine, theirs in zip((got, *got_grads), (want, *want_grads), strict=True):
        assert (mine - theirs).norm() <= tolerance * theirs.norm()


@pytest.mark.parametrize(
    ("relation", "penalty", "normalize"), list(itertools.product(RELATIONS, PENALTIES, NORMALIZATIONS))
)
@pytest.mark.parametrize("name", ["gram", "cdist"])
def test_eager_peers_compute_the_same_loss(name: str, relation: str, penalty: str, normalize: str) -> None:
    if (name, relation) == ("cdist", "cosine"):
        with pytest.raises(Unavailable, match="cosine is not a distance"):
            loss_of(name, Case(4, 3, relation=relation))
    else:
        for grads in ("fake", "both"):
            assert_agrees_with_reference(name, Case(40, 9, torch.float32, grads, relation, penalty, normalize))


@pytest.mark.soak
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
def test_compiled_peer_computes_the_same_loss() -> None:
    assert_agrees_with_reference("compile", Case(40, 9))


@pytest.mark.slow
@pytest.mark.parametrize("relation", RELATIONS)
def test_keops_computes_the_same_loss(relation: str) -> None:
    pytest.importorskip("pykeops")
    assert_agrees_with_reference("keops", Case(40, 9, relation=relation, normalize="mean", penalty="huber"))


def test_peers_keep_float32_for_bfloat16_features() -> None:
    value, (gradient,) = value_and_gradients(
        loss_of("gram", Case(8, 4)), *Case(8, 4, torch.bfloat16, "fake").features()
    )
    assert value.dtype == torch.float32
    assert gradient.dtype == torch.bfloat16


def test_a_provider_for_another_device_says_so() -> None:
    with pytest.raises(Unavailable):
        loss_of("triton", Case(8, 4))


def counted(case: Case) -> int:
    floor = GemmFloor(case, *case.features())
    with FlopCounterMode(display=False) as counter:
        floor()
    return counter.get_total_flops()


@pytest.mark.parametrize("grads", ["fake", "both"])
@pytest.mark.parametrize("batch", [64, 256, 1024, 4096])
def test_floor_multiplies_two_half_grams_and_one_product_a_gradient(batch: int, grads: str) -> None:
    case = Case(batch, 2, grads=grads)
    rows = min(batch, max(128, batch // 16))
    half_gram = batch * (batch + rows) * case.dim  # 2 FLOP for half of the entries, and for the other half of a block
    gradients = 2 if grads == "both" else 1
    assert counted(case) == 2 * half_gram + gradients * 2 * batch**2 * case.dim
    assert case.flops == (2 + 2 * gradients) * batch**2 * case.dim


def test_floor_takes_any_batch() -> None:
    case = Case(1001, 3)
    assert 1 <= counted(case) / case.flops < 1.1


def test_floor_computes_the_upper_triangle_and_products_of_the_strip() -> None:
    case = Case(300, 4, grads="fake")
    real, fake = case.features()
    floor = GemmFloor(case, real, fake)
    floor()
    last = fake[256:] @ fake[256:].T
    assert torch.allclose(floor.block[: last.numel()].view_as(last), last, atol=1e-5)
    assert torch.allclose(floor.product, floor.strip @ fake, atol=1e-3)


def test_floor_holds_no_square_matrix() -> None:
    case = Case(4096, 2)
    floor = GemmFloor(case, *case.features())
    assert floor.block.numel() + floor.strip.numel() < case.batch**2 / 4


def test_providers_take_turns_and_each_repeat_begins_with_another(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[object, int]] = []
    durations = {"a": 1e-3, "b": 1.0, "c": 2e-3}

    def seconds(call: measure.Call, times: int, device: str) -> float:
        ran.append((call(), times))
        return durations[str(call())]

    monkeypatch.setattr(measure, "seconds", seconds)
    samples = measure.interleaved({"a": lambda: "a", "b": lambda: "b", "c": lambda: "c"}, 3, "cpu")
    assert samples == {name: [duration] * 3 for name, duration in durations.items()}
    calibration, repeats = ran[:3], ran[3:]
    assert [times for _, times in calibration] == [1, 1, 1]
    assert "".join(str(name) for name, _ in repeats) == "abcbcacab"
    assert {times for name, times in repeats if name == "a"} == {5}  # 5 ms a sample at least
    assert {times for name, times in repeats if name == "b"} == {1}


def test_seconds_are_of_one_call() -> None:
    calls: list[None] = []
    assert 0 < measure.seconds(lambda: calls.append(None), 1000, "cpu") < 1e-3
    assert len(calls) == 1000


def test_ratios_are_taken_within_a_repeat() -> None:
    slow_machine_in_the_middle = [1.0, 10.0, 2.0]
    assert measure.ratio(slow_machine_in_the_middle, [2.0, 20.0, 4.0]) == 0.5


def test_spread_is_the_middle_three_fifths() -> None:
    assert measure.spread(range(101)) == (20.0, 50.0, 80.0)


@linux
def test_peak_memory_of_a_known_allocation() -> None:
    """In one block, and in small blocks that the process has used and freed before: the allocator keeps those."""

    def allocate(blocks: int) -> None:
        parts = [torch.ones(2**22 // blocks) for _ in range(blocks)]
        del parts

    for blocks in (1, 1000):
        allocate(blocks)
        assert measure.peak_of_call_mb(partial(allocate, blocks)) == pytest.approx(16, abs=2)
    assert measure.peak_of_call_mb(lambda: None) == pytest.approx(0, abs=1)  # an earlier peak does not stay


@linux
def test_peak_memory_of_eager_code_is_some_square_matrices() -> None:
    case = Case(1024, 8)
    peak = measure.peak_extra_mb("gram", case, 1)
    assert peak is not None
    assert 4 < peak / (4 * case.batch**2 / 2**20) < structure_loss.DENSE_MATRICES


def test_what_would_not_fit_into_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "available_bytes", lambda device: 1e6)
    with pytest.raises(Unavailable, match="may take 1.3 GB of memory, 0.0 GB are free"):
        structure_loss.admit("gram", Case(4096, 8), 1, 60.0)
    structure_loss.admit("gram", Case(64, 8), 1, 60.0)


def test_a_peer_that_fails_is_left_out_with_its_reason_and_our_own_failure_ends_the_benchmark(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], one_thread: object
) -> None:
    def fails(name: str) -> Callable[..., Any]:
        def call(provider: str, *rest: Any) -> Any:
            if provider == name:
                raise RuntimeError("not\ntraceable")
            return 1.0 if name == "cdist" else loss_of(provider, *rest)

        return call

    monkeypatch.setattr(peers, "loss_of", fails("compile"))
    monkeypatch.setattr(measure, "peak_extra_mb", fails("cdist"))
    rows = run(
        tmp_path, "--sizes", "8", "--dims", "4", "--dtypes", "float32", "--providers", "compile", "cdist", "gram"
    )
    assert [row["provider"] for row in rows] == 2 * ["cdist", "gram", "gemm_floor"]
    assert [row["peak_extra_mb"] for row in rows] == 2 * ["", "1.0", ""]
    where = "at B=8 d=4 float32 fake, B=8 d=4 float32 both: fails here: RuntimeError: not traceable"
    printed = capsys.readouterr().out
    assert f"Left out: compile {where}" in printed and f"Left out: memory and errors of cdist {where}" in printed
    monkeypatch.setattr(peers, "loss_of", fails("native"))
    with pytest.raises(RuntimeError, match="not\ntraceable"):
        structure_loss.admit("native", Case(8, 4), 1, 60.0)


def test_what_would_take_too_long_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    durations = iter([30.0, 2.0])  # compiling, then running
    monkeypatch.setattr(measure, "seconds", lambda call, times, device: next(durations))
    with pytest.raises(Unavailable, match="40 repeats would take 80.0 s, over --time-limit 60"):
        structure_loss.admit("gram", Case(8, 4), 40, 60.0)
    monkeypatch.setattr(measure, "seconds", lambda call, times, device: 61.0)
    with pytest.raises(Unavailable, match="the first call took 61.0 s, over --time-limit 60"):
        structure_loss.admit("gram", Case(8, 4), 1, 60.0)


def test_roofline_share_is_of_the_named_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(4096, 512, torch.bfloat16, "both", device="cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    assert structure_loss.roofline_share(case, case.flops / 989e12) == pytest.approx(1)
    exact = Case(4096, 512, torch.float32, "both", device="cuda")
    assert structure_loss.roofline_share(exact, case.flops / 494e12) == pytest.approx(3)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "another GPU")
    assert structure_loss.roofline_share(case, 1.0) == ""
    assert structure_loss.roofline_share(Case(8, 4), 1.0) == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sizes", "64", "1"], "--sizes [64, 1]: must be at least 2"),
        (["--repeats", "0"], "--repeats 0: must be at least 1"),
        (["--providers", "jax"], "invalid choice: 'jax'"),
    ],
)
def test_bad_arguments_are_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        structure_loss.main(arguments)
    assert message in capsys.readouterr().err


def test_by_default_the_devices_own_kernel_meets_all_peers() -> None:
    assert structure_loss.parse([]).providers == ["native", *peers.PEERS]


def run(folder: Path, *arguments: str) -> list[dict[str, str]]:
    assert structure_loss.main([*arguments, "--repeats", "2", "--threads", "1", "--out", str(folder)]) == 0
    with (folder / "structure_loss.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def one_thread(monkeypatch: pytest.MonkeyPatch) -> object:
    before = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
def test_script_writes_table_csv_and_picture(
    tmp_path: Path, one_thread: object, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = run(tmp_path, "--sizes", "16", "8", "--dims", "4", "--error-size", "8", "--providers", "triton", "gram")
    assert tuple(rows[0]) == structure_loss.COLUMNS
    problems = list(itertools.product(("8", "16"), ("float32", "bfloat16"), ("fake", "both")))
    found = [(row["B"], row["dtype"], row["grads"], row["provider"]) for row in rows]
    assert found == [(*problem, name) for problem in problems for name in ("gram", "gemm_floor")]
    for row in rows:
        assert row["torch"] == torch.__version__
        assert row["commit"] and row["machine"] and (row["device"], row["threads"]) == ("cpu", "1")
        assert 0 < float(row["p20_ms"]) <= float(row["median_ms"]) <= float(row["p80_ms"])
        if row["provider"] == "gram":
            assert float(row["ratio_to_best_peer"]) == 1
            assert (row["peak_extra_mb"] != "") == (sys.platform == "linux")
        else:
            assert float(row["ratio_to_floor"]) == 1
        for mean in report.MEANS:
            errors = row[f"loss_error_mean{mean}"], row[f"grad_error_mean{mean}"]
            if row["provider"] == "gram" and row["B"] == "8":
                # a gradient comes in the dtype of the features; at mean 10 float32 loses 3 of its 7 digits
                assert 0 <= float(errors[0]) < 1e-3
                assert 0 < float(errors[1]) < (1e-3 if row["dtype"] == "float32" else torch.finfo(torch.bfloat16).eps)
            else:
                assert errors == ("", "")
    assert (tmp_path / "structure_loss.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert rows[0]["machine"] in printed
    assert "euclidean, squared, unit; forward + backward, median of 2 interleaved repeats" in printed
    assert "measured up to B = 8" in printed
    assert "Left out: triton at B=8 d=4 float32 fake, B=8 d=4 float32 both" in printed


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_script_on_a_gpu(tmp_path: Path, one_thread: object) -> None:
    rows = run(tmp_path, "--sizes", "64", "--dims", "32", "--device", "cuda", "--providers", "triton", "gram", "cdist")
    assert {row["machine"] for row in rows} == {torch.cuda.get_device_name()}
    assert all(float(row["peak_extra_mb"]) > 0 for row in rows if row["provider"] != "gemm_floor")


def test_table_leaves_out_empty_columns_and_knows_markdown() -> None:
    row: report.Row = dict.fromkeys(structure_loss.COLUMNS, "")
    row |= {"B": 64, "d": 128, "dtype": "float32", "grads": "fake", "provider": "gram"}
    row |= {"median_ms": 1.2345, "p20_ms": 1.0, "p80_ms": 2.0, "ratio_to_floor": 3.456}
    assert report.table([row]).splitlines() == [
        "B   d    dtype    grads  provider  ms (p20-p80)  / floor",
        "64  128  float32  fake   gram      1.23 (1-2)    3.46",
    ]
    assert report.table([row], markdown=True).splitlines()[1:] == [
        "| -- | --- | ------- | ----- | -------- | ------------ | ------- |",
        "| 64 | 128 | float32 | fake  | gram     | 1.23 (1-2)   | 3.46    |",
    ]
