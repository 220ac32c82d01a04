"""The structure loss over a process group: real gloo ranks must give what one process with the whole batch gives."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from sadm_kernels import backends, structure_loss

WORKER = Path(__file__).with_name("group_worker.py")


def _load_worker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("group_worker", WORKER)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


worker = _load_worker()
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of the three ranks wrote; one launch serves every test."""
    folder = tmp_path_factory.mktemp("group")
    program = subprocess.run([sys.executable, str(WORKER), str(folder)], capture_output=True, text=True, timeout=240)
    assert program.returncode == 0, program.stdout + program.stderr
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in range(worker.WORLD)]


@pytest.fixture(params=["reference", "native"])
def impl(request: pytest.FixtureRequest) -> str:
    if backends()[request.param] != "ok":
        pytest.skip(backends()[request.param])
    return str(request.param)


@pytest.fixture(params=["two", "three"])
def group(
    request: pytest.FixtureRequest, ranks: list[dict[str, Any]], impl: str
) -> list[dict[Any, tuple[Tensor, ...]]]:
    """The results of a group's members, in the order of the group."""
    return [ranks[rank][f"{request.param}, {impl}"] for rank in worker.GROUPS[request.param]]


def whole(size: int, case: tuple[Any, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and both gradients of one process with all rows."""
    real, fake, weight, labels = worker.whole_batch(size)
    real.requires_grad_(True), fake.requires_grad_(True)
    relation, penalty, normalize, weighted, labelled = case
    loss = structure_loss(
        real,
        fake,
        relation=relation,
        penalty=penalty,
        normalize=normalize,
        weight=weight if weighted else None,
        labels=labels if labelled else None,
        impl="reference",
        **worker.SHAPES,
    )
    grad_real, grad_fake = torch.autograd.grad(loss, (real, fake))
    return loss.detach(), grad_real, grad_fake


def test_loss_and_gradients_equal_one_process_with_the_whole_batch(group) -> None:
    for case in worker.CASES:
        loss, *gradients = whole(worker.SHARE * len(group), case)
        for rank, results in enumerate(group):
            own = slice(rank * worker.SHARE, (rank + 1) * worker.SHARE)
            # The gradients come twice: the second time through the same graph.
            expected = [loss, *(grad[own] for grad in 2 * gradients)]
            for found, value in zip(results[case], expected, strict=True):
                # float64 sums of at most 81 terms in another order
                assert torch.allclose(found, value, rtol=1e-10, atol=1e-13), (case, rank, found, value)


def test_with_a_queue_loss_and_gradients_equal_one_process_with_the_whole_batch(group) -> None:
    real, fake, weight, labels = worker.whole_batch(worker.SHARE * len(group))
    real.requires_grad_(True), fake.requires_grad_(True)
    for relation, normalize, weighted in worker.QUEUE_CASES:
        options = {"relation": relation, "normalize": normalize, "impl": "reference", **worker.SHAPES}
        given = {"weight": weight if weighted else None, "labels": labels, "queue": worker.past(weighted)}
        loss = structure_loss(real, fake, **given, **options)
        gradients = torch.autograd.grad(loss, (real, fake))
        for rank, results in enumerate(group):
            own = slice(rank * worker.SHARE, (rank + 1) * worker.SHARE)
            expected = [loss.detach(), *(grad[own] for grad in gradients)]
            for found, value in zip(results["queue", relation, normalize, weighted], expected, strict=True):
                # float64 sums of at most 144 terms in another order
                torch.testing.assert_close(found, value, rtol=1e-10, atol=1e-13)


def test_features_sent_ahead_change_no_bit(group) -> None:
    for case in worker.QUEUE_CASES:
        for results in group:
            loss, _, grad = results["queue", *case]
            for check in (True, False):
                early_loss, early_grad = results["early", *case, check]
                assert torch.equal(early_loss, loss) and torch.equal(early_grad, grad)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's peak counter")
@pytest.mark.skipif(backends()["native"] != "ok", reason=backends()["native"])
def test_memory_of_a_rank_grows_with_the_batch_and_not_with_its_square(ranks) -> None:
    for rank in worker.GROUPS["two"]:
        (small, large), (eager,) = ranks[rank]["memory"]["native"], ranks[rank]["memory"]["reference"]
        # A rank's share of one float32 matrix of all pairs; the definition needs several of them.
        matrices = [columns // 2 * columns * 4 for columns in worker.COLUMNS["native"]]
        assert small < matrices[0] < eager and large < matrices[1] / 2
        assert large < 3 * small  # it doubles with the columns; their square would be 4 times as large


def test_where_no_rank_has_a_pair_that_counts_loss_and_gradients_are_zero(group) -> None:
    assert not any(value.any() for results in group for value in results["no pair"])


def test_only_ratios_of_all_ranks_weights_count(group) -> None:
    """One rank's are zero here."""
    for results in group:
        assert all(torch.equal(a, b) for a, b in zip(results["small weight"], results["weight"], strict=True))


def test_the_gradient_of_one_input_alone_is_complete(group) -> None:
    size = worker.SHARE * len(group)
    real, fake, *_ = worker.whole_batch(size)
    real.requires_grad_(True)
    (expected,) = torch.autograd.grad(structure_loss(real, fake, normalize="mean", impl="reference"), real)
    found = torch.cat([results["real only"][1] for results in group])
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)


def test_widths_and_dtypes_of_their_own_go_through_the_group(ranks, impl: str) -> None:
    real, fake = (x.requires_grad_(True) for x in worker.unlike(worker.SHARE * worker.WORLD))
    loss = structure_loss(real, fake, normalize="mean", impl="reference")
    grad_real, grad_fake = torch.autograd.grad(loss, (real, fake))
    for rank, results in enumerate(ranks):
        own = slice(rank * worker.SHARE, (rank + 1) * worker.SHARE)
        found = results[f"unlike, {impl}"]
        # float64 sums in another order; the gradient of real is rounded to float32
        torch.testing.assert_close(found["together"][::2], (loss.detach(), grad_fake[own]), rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(found["together"][1], grad_real[own], rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(found["early"], found["together"][::2], rtol=1e-10, atol=1e-13)


def test_compiled_without_a_graph_break_it_is_the_same(ranks, impl: str) -> None:
    for results in ranks:
        found = results[f"compiled, {impl}"]
        torch.testing.assert_close(found["compiled"], found["eager"], rtol=1e-10, atol=1e-13)


def test_with_data_parallelism_the_loss_times_the_ranks_trains_as_one_process_does(ranks) -> None:
    for results in ranks:
        whole, parallel = results["ddp"]
        torch.testing.assert_close(parallel, whole, rtol=1e-10, atol=1e-13)


def test_a_gathers_gradient_sums_what_all_ranks_ask_and_leaves_their_tensors_alone(ranks) -> None:
    for rank, results in enumerate(ranks):
        grad, asked = results["gather"]
        assert grad.tolist() == [[111.0, 111.0]] and asked.unique().tolist() == [10.0**rank]


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("uneven", "ValueError: real.shape on the ranks of group: (3, 4), (2, 4), (3, 4); must be the same on all"),
        ("empty", "ValueError: real.shape on the ranks of group: (0, 4), (3, 4), (3, 4); must be the same on all"),
        ("width", "ValueError: real.shape on the ranks of group: (3, 3), (3, 4), (3, 3); must be the same on all"),
        (
            "dtype",
            "ValueError: real.dtype on the ranks of group: torch.bfloat16, torch.float32, torch.float32;"
            " must be the same on all",
        ),
        (
            "fake",
            "ValueError: fake.shape on the ranks of group: (3, 3), (3, 4), (3, 3); must be the same on all",
        ),
        ("relation", "ValueError: relation on the ranks of group: gaussian, cosine, cosine; must be the same on all"),
        ("tau", "ValueError: tau on the ranks of group: 1.0, 2.0, 3.0; must be the same on all"),
        pytest.param(
            "impl",
            "ValueError: impl on the ranks of group: reference, native, native; must be the same on all",
            marks=pytest.mark.skipif(backends()["native"] != "ok", reason=backends()["native"]),
        ),
        ("queue", "ValueError: rows of queue on the ranks of group: 0, 2, 3; must be the same on all"),
        ("labels", "ValueError: labels given on the ranks of group: False, True, True; must be the same on all"),
        ("weight", "ValueError: weight: all are zero on every rank of group, at least one must be positive"),
        ("nothing", ""),
    ],
)
def test_ranks_that_disagree_all_get_the_same_clear_error(ranks, mistake: str, message: str) -> None:
    assert [results["mistakes"][mistake] for results in ranks] == [message] * worker.WORLD


def test_a_second_derivative_through_the_group_is_refused(ranks, impl: str) -> None:
    remedy = "use group=None" if impl == "reference" else "use impl='reference'"
    for results in ranks:
        message = results["mistakes"][f"second derivative, {impl}"]
        assert message.startswith("RuntimeError: structure_loss") and message.endswith(remedy)
