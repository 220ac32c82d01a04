"""Memory and bytes of the plan against real runs: two ranks at every ZeRO stage, and one real forward."""

from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sadm_fast.build import build_denoiser, build_psi
from sadm_fast.config import Config, check_config
from sadm_fast.game import draw, frozen, predict
from sadm_fast.planning.communication import LOG_LINE, VOTE, Transfer, transfers
from sadm_fast.planning.cost import activations, meta_models
from sadm_fast.planning.memory import Memory, rank_memory
from sadm_fast.planning.players import players
from sadm_kernels import backends
from tests.support.plan_cases import CASES, CLASSES, QUICK, WORLD_SIZE
from tests.support.ranks import run_once

WITHIN = 0.05  # what the planner promises


NAMES = [name if name in QUICK else pytest.param(name, marks=pytest.mark.soak) for name in CASES]


@pytest.fixture
def ranks(tmp_path_factory: pytest.TempPathFactory, name: str) -> list[dict[str, Any]]:
    """What each rank of plan_worker.py found, by case; of the part of the cases that `name` belongs to."""
    part = "quick" if name in QUICK else "rest"
    return run_once(tmp_path_factory, "tests.support.plan_worker", WORLD_SIZE, part=part, timeout=1800.0)


@cache
def planned(name: str) -> tuple[Memory, list[Transfer]]:
    """The memory of a case, and what an iteration of it sends."""
    config = CASES[name].config
    denoiser, psi = meta_models(config, CLASSES)
    both, feature_dim = players(config, denoiser, psi), 0 if psi is None else psi.feature_dim
    kept = activations(config, denoiser, psi)
    memory = rank_memory(config, both, kept, WORLD_SIZE, feature_dim=feature_dim)
    return memory, transfers(config, both, feature_dim, WORLD_SIZE)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_rank_holds_what_is_planned(ranks: list[dict[str, Any]], name: str):
    memory, _ = planned(name)
    # As the denoiser's optimizer is about to step. The copies for pictures belong to the trainer, which is not here.
    held = [*memory.device.items(), *memory.host.items()]
    expected = sum(size for what, size in held if "pictures" not in what)
    expected += memory.moments["denoiser's update"].get("denoiser gradients", 0)
    for rank in ranks:
        assert rank[name]["alive"] == pytest.approx(expected, rel=WITHIN)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_each_purpose_takes_what_is_planned(ranks: list[dict[str, Any]], name: str):
    memory, _ = planned(name)
    everything = [*memory.device.items(), *memory.host.items()]
    for rank in ranks:
        for purpose, size in rank[name]["held"].items():
            expected = sum(there for what, there in everything if what.startswith(purpose))
            assert size == pytest.approx(expected, rel=WITHIN), purpose


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_buckets_are_as_large_as_planned(ranks: list[dict[str, Any]], name: str):
    memory, _ = planned(name)
    at_once = max(
        sum(size for what, size in (memory.device | moment).items() if memory.kinds[what] == "buckets")
        for moment in memory.moments.values()
    )
    for rank in ranks:
        assert rank[name]["buckets"] == at_once


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_an_iteration_moves_what_is_planned(ranks: list[dict[str, Any]], name: str):
    config = CASES[name].config
    if config.implementation == "fast" and config.game.scope == "global" and backends()["native"] != "ok":
        pytest.skip("the fused kernel is planned, and not built here")
    expected: dict[str, float] = {}
    for transfer in planned(name)[1]:
        expected[transfer.operation] = expected.get(transfer.operation, 0) + transfer.payload
    # The trainer's part, which these ranks leave out; test_plan.py has its sizes.
    expected["all-reduce"] -= VOTE + LOG_LINE / config.train.log_every
    for rank in ranks:
        assert rank[name]["payload"].keys() == expected.keys()
        for operation, size in rank[name]["payload"].items():
            assert size == pytest.approx(expected[operation], rel=WITHIN), operation


def small(precision: str, **denoiser: Any) -> Config:
    sizes = {"patch_size": 4, "hidden_size": 64, "depth": 4, "num_heads": 4, **denoiser}
    return check_config(
        {
            "name": "activations",
            "data": {"resolution": 32, "channels": 3},
            "denoiser": sizes,
            "structure_encoder": {"architecture": "resnet18", "stem": "small"},
            "train": {"micro_batch": 2, "precision": precision},
        }
    )


def models(config: Config) -> tuple[Any, Any]:
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    return build_denoiser(config, CLASSES).to(dtype), build_psi(config).to(dtype)


def inputs(config: Config) -> Any:
    ids = torch.arange(config.train.micro_batch)
    x0 = torch.zeros(len(ids), *config.sample_shape)
    return draw(config.process, x0, ids, ids, seed=0, null_class=CLASSES, label_dropout=0.0)


class Saved:
    """Bytes of what autograd saves inside the block, each storage once, parameters not."""

    def __init__(self, *modules: nn.Module) -> None:
        self._own = {p.data_ptr() for module in modules for p in module.parameters()}
        self._kept: dict[int, Tensor] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in self._own:
            self._kept[address] = tensor
        return tensor

    def __enter__(self) -> "Saved":
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)

    @property
    def bytes(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in self._kept.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_forward_keeps_the_activations_that_are_planned(precision: str):
    config = small(precision)
    denoiser, psi = models(config)
    plan = activations(config, *meta_models(config, CLASSES))
    batch = inputs(config)
    with Saved(denoiser) as saved:
        prediction = predict(config.process, denoiser, batch)
    assert saved.bytes == pytest.approx(plan.denoiser, rel=WITHIN)
    xhat0 = prediction.xhat0.detach()
    with Saved(psi) as saved:
        psi(torch.cat([batch.x0, xhat0]))
    assert saved.bytes == pytest.approx(plan.discriminator, rel=WITHIN)
    with frozen(psi), Saved(psi) as saved:
        psi(xhat0.requires_grad_(True))
    assert saved.bytes == pytest.approx(plan.structure, rel=WITHIN)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_checkpointed_blocks_keep_what_is_planned(precision: str):
    config = small(precision)
    denoiser, _ = models(config)
    batch = inputs(config)
    # At its fullest: what all blocks keep from outside, and the insides of the one that is being recomputed.
    inside: list[int] = []
    for block in denoiser.blocks:
        block.forward = partial(checkpoint, partial(_recomputed, block.forward, denoiser, inside), use_reentrant=False)
    with Saved(denoiser) as saved:
        prediction = predict(config.process, denoiser, batch)
    inside.clear()
    prediction.loss.sum().backward()
    assert len(inside) == len(denoiser.blocks)
    plan = activations(config, *meta_models(config, CLASSES))
    assert saved.bytes + max(inside) == pytest.approx(plan.denoiser_checkpointed, rel=WITHIN)
    assert plan.denoiser_checkpointed < 0.6 * plan.denoiser


def _recomputed(forward: Any, denoiser: nn.Module, inside: list[int], x: Tensor, c: Tensor) -> Tensor:
    """A block's forward under checkpoint; when it is recomputed, notes what it keeps besides its inputs."""
    recomputing = torch._C._current_graph_task_id() != -1
    if not recomputing:
        return forward(x, c)
    kept: dict[int, int] = {}
    saved = {p.data_ptr() for p in denoiser.parameters()} | {x.data_ptr(), c.data_ptr()}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in saved:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    # An own graph of the same forward: checkpoint's own hooks already have this one.
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        own = forward(x.detach().requires_grad_(True), c.detach().requires_grad_(True))
    inside.append(sum(kept.values()))
    del own
    return forward(x, c)
