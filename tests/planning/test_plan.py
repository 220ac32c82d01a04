"""plan.py as a person uses it, and the arithmetic of what it predicts."""

import json
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sadm_fast.config import Config, check_config, load_config
from sadm_fast.errors import UserError
from sadm_fast.plan import main
from sadm_fast.planning.communication import LOG_LINE, VOTE, Transfer, transfers
from sadm_fast.planning.cost import meta_models
from sadm_fast.planning.gpus import GPUS, find_gpu
from sadm_fast.planning.measured import launches
from sadm_fast.planning.plan import make_plan
from sadm_fast.planning.players import players
from sadm_fast.planning.roofline import Assumptions, step_time, update_bytes
from sadm_fast.planning.text import plan_text
from sadm_fast.ranks import vote
from sadm_fast.run import log

CONFIGS = Path(__file__).parents[2] / "configs"
IMAGENET = {
    "name": "imagenet512",
    "data": {"source": "latents", "path": "nowhere", "resolution": 512, "channels": 3},
    "latents": {},
    "denoiser": {"name": "DiT-XL/2", "num_classes": 1000},
    "structure_encoder": {"architecture": "resnet18", "stem": "small"},
    "game": {"scope": "global"},
    "train": {"micro_batch": 4, "precision": "bf16"},
    "deepspeed": {"zero_optimization": {"stage": 2}},
}
SMALL = {
    **IMAGENET,
    "name": "small",
    "data": {"source": "latents", "path": "nowhere", "resolution": 64, "channels": 3},
    "denoiser": {"patch_size": 2, "hidden_size": 64, "depth": 2, "num_heads": 4, "num_classes": 10},
}


def written(folder: Path, tree: dict[str, Any]) -> str:
    path = folder / "config.json"
    path.write_text(json.dumps(tree))
    return str(path)


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """The text and the JSON of DiT-XL/2 at 512 pixels on 64 H100."""
    folder = tmp_path_factory.mktemp("plan")
    out = folder / "plan.json"
    with redirect_stdout(StringIO()) as said:
        assert main(["--config", written(folder, IMAGENET), "--gpus", "64", "--json", str(out)]) == 0
    return said.getvalue(), json.loads(out.read_text())


def test_the_largest_dit_has_its_published_size(imagenet: tuple[str, dict[str, Any]]):
    _, plan = imagenet
    # 675,129,632 at 256 pixels with its own channels (Peebles & Xie 2022); here 64 x 64 latents have 768 more
    # positions of 1,152, and a last layer without the learned variance.
    assert plan["parameters"]["denoiser"]["all"] == 675_129_632 + 768 * 1152 - 16 * 1153
    # 524.6 GMAC a sample, four samples.
    assert plan["flops"]["denoiser forward"] / 2e9 == pytest.approx(4 * 524.6, rel=0.001)


def test_every_part_of_the_plan_is_printed_within_120_columns(imagenet: tuple[str, dict[str, Any]]):
    text, plan = imagenet
    for gpu in GPUS.values():
        other = {**plan, "assumptions": {**plan["assumptions"], "gpu": gpu._asdict()}}
        assert max(map(len, plan_text(other).splitlines())) <= 120, gpu.name
    for part in ("Parameters (counted)", "GMAC", "Memory of one rank", "Communication of one rank", "PREDICTED time"):
        assert part in text
    assert "activation checkpointing would add" in text and "(train.activation_checkpointing)" in text
    for row in plan["scaling"]:
        assert f" {row['world_size']:>5} {row['nodes']:>5} {row['global_batch']:>12,} " in text


def test_the_table_goes_to_1024_ranks_with_the_micro_batch_fixed(imagenet: tuple[str, dict[str, Any]]):
    _, plan = imagenet
    assert [row["world_size"] for row in plan["scaling"]] == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]
    assert [row["nodes"] for row in plan["scaling"]] == [1, 1, 1, 1, 2, 4, 8, 16, 32, 64, 128]
    assert all(row["global_batch"] == 4 * row["world_size"] for row in plan["scaling"])
    peaks = [row["memory_peak"] for row in plan["scaling"]]
    assert peaks == sorted(peaks, reverse=True)
    assert plan["scaling"][0]["predicted"]["efficiency"] == 1
    assert all(0 < row["predicted"]["efficiency"] <= row["predicted"]["efficiency_if_overlapped"] * 1.2
               for row in plan["scaling"])  # fmt: skip


def test_offload_moves_the_optimizer_to_the_host(imagenet: tuple[str, dict[str, Any]]):
    _, plan = imagenet
    rows = {(row["zero_stage"], row["offload"]): row for row in plan["memory"]}
    assert len(rows) == 8
    for stage in (1, 2, 3):
        here, there = rows[stage, "none"], rows[stage, "optimizer"]
        assert there["peak"] < here["peak"]
        moments = "denoiser AdamW moments"
        assert there["host"][moments] == here["resident"][moments]
        assert here["host"] == {}
    whole = rows[3, "optimizer and parameters"]
    assert whole["host"]["denoiser weights, divided"] == rows[3, "none"]["resident"]["denoiser weights, divided"]


def test_checkpointing_helps_where_activations_are_the_most(imagenet: tuple[str, dict[str, Any]]):
    _, plan = imagenet
    for row in plan["memory"]:
        assert row["peak_with_checkpointing"] <= row["peak"]
        if row["zero_stage"] > 0:  # without ZeRO the optimizer's step needs more than any backward
            assert row["peak_with_checkpointing"] < row["peak"]


def test_an_override_and_a_world_that_is_no_power_of_two(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = written(tmp_path, SMALL)
    arguments = ["--config", config, "--gpus", "24", "--gpu", "l40s", "--gpus-per-node", "4"]
    assert main([*arguments, "--set", "deepspeed.zero_optimization.stage=3"]) == 0
    out = capsys.readouterr().out
    assert "ZeRO stage 3" in out
    assert "*    24     6" in out
    assert "PCIe 4.0 x16" in out


def test_one_rank_alone_sends_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["--config", written(tmp_path, SMALL), "--gpus", "1"]) == 0
    assert "none: one rank is alone" in capsys.readouterr().out


@pytest.mark.parametrize("mode", ["plain", "structure", "sadm"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_mode_can_be_planned(tmp_path: Path, capsys: pytest.CaptureFixture[str], mode: str, precision: str):
    tree = {**SMALL, "game": {"mode": mode}, "train": {"micro_batch": 2, "precision": precision}}
    assert main(["--config", written(tmp_path, tree)]) == 0
    out = capsys.readouterr().out
    assert ("Psi  " in out) == (mode != "plain")
    assert ("Psi gradients" in out) == (mode == "sadm")
    assert ("TF32 is off" in out) == (precision == "fp32")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "h10"], "--gpu h10: unknown GPU; did you mean h100? there are a100-40g, a100,"),
        (["--gpu", "cpu"], "--gpu cpu: unknown GPU; there are a100-40g"),
        (["--gpus", "0"], "--gpus 0: must be at least 1"),
        (["--gpus-per-node", "-1"], "--gpus-per-node -1: must be at least 1"),
        (["--network-gbit", "0"], "--network-gbit 0: must be from 0.001 to"),
        (["--network-gbit", "nan"], "--network-gbit nan: must be from 0.001 to"),
        (["--fraction-of-peak", "1.5"], "--fraction-of-peak 1.5: must be from 0.001 to 1"),
        (["--fraction-of-bandwidth", "0"], "--fraction-of-bandwidth 0: must be from 0.001 to 1"),
        (["--set", "train.micro_batch=0"], "train.micro_batch=0:"),
        (["--json", "~no-such-user/plan.json"], "~no-such-user/plan.json: there is no home folder"),
        (["--json", "there/is/no/such/folder.json"], "--json there/is/no/such/folder.json: cannot be written"),
        (["--set", "denoiser.num_classes=null"], "nowhere"),
    ],
)
def test_a_mistake_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str):
    assert main(["--config", written(tmp_path, SMALL), *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1
    assert message in err


def test_a_gpu_is_found_in_any_case_of_letters():
    assert find_gpu("H100") is GPUS["h100"]
    with pytest.raises(UserError, match="did you mean rtx4090"):
        find_gpu("4090")


def test_a_ring_sends_each_tensor_twice_for_a_sum_and_once_for_its_parts():
    assert Transfer("x", "all-reduce", 800).wire(8) == 2 * 7 / 8 * 800
    assert Transfer("x", "all-gather", 800).wire(8) == 700
    assert Transfer("x", "reduce-scatter", 800).wire(8) == 700


def test_the_links_of_a_large_world_are_its_nodes_adapters():
    h100 = Assumptions(find_gpu("h100"))
    assert h100.links(8) == 450e9
    assert h100.links(16) == 8 * 50e9  # 8 adapters of 400 Gbit/s
    assert Assumptions(find_gpu("h100"), network_gbit=1600.0).links(16) == 450e9  # the ring still runs over NVLink
    assert Assumptions(find_gpu("h100"), gpus_per_node=1, network_gbit=100.0).links(2) == 12.5e9


def tiny(**changes: Any) -> Config:
    return check_config({**SMALL, **changes})


def test_the_prediction_is_its_formula():
    config = tiny()
    both = players(config, *meta_models(config, 10))
    assumptions = Assumptions(find_gpu("a100"), fraction_of_peak=0.5, fraction_of_bandwidth=0.5)
    moved = [Transfer("x", "all-reduce", 3e9)]
    time = step_time(config, both, 312e12, moved, assumptions, 4, 1, launched=1000)
    assert time.compute == pytest.approx(2.0)
    assert time.communication == pytest.approx(2 * 3 / 4 * 3e9 / 150e9)
    # bf16: master and both moments read and written, gradient read twice, weight written; the denoiser's average too.
    denoiser, psi = (player.trained for player in both)
    assert update_bytes(config, both, 4, 1) == pytest.approx((30 * (denoiser + psi) + 8 * denoiser) / 4)
    assert time.update == pytest.approx(update_bytes(config, both, 4, 1) / (0.5 * 2039e9))
    assert time.exposed == time.compute + time.update + time.communication
    assert time.hidden == time.compute + time.update
    assert time.host == pytest.approx(1000 * 54e-6)
    slow = step_time(config, both, 312e12, moved, replace(assumptions, seconds_a_launch=1.0), 4, 1, launched=1000)
    assert slow.exposed == slow.hidden == slow.host == 1000.0


def test_the_prediction_meets_what_its_numbers_were_measured_on():
    """DiT-XL/2 at 256 pixels on an H200: 522 images/s, where the host decides; 103 ms of kernels."""
    config = load_config(
        CONFIGS / "imagenet256.json",
        ["game.mode=plain", "train.micro_batch=64", "train.grad_accumulation=1", "deepspeed.zero_optimization.stage=1"],
    )
    assert config.train.compile == "on"
    assumptions = Assumptions(find_gpu("h200"))
    plan = make_plan(config, 1000, 1, assumptions)
    assert plan["scaling"][0]["predicted"]["images_per_s"] == pytest.approx(522, rel=0.03)
    both = players(config, *meta_models(config, 1000))
    kernels = step_time(config, both, sum(plan["flops"].values()), [], assumptions, 1, 1, launched=0)
    assert kernels.exposed == pytest.approx(0.103, rel=0.03)


def test_launches_grow_with_depth_and_fall_with_compilation():
    plain = tiny(game={"mode": "plain"})
    assert launches(plain, 28, 300) == 28 * 59 + 52 + 225
    assert launches(plain, 28, 300) - launches(plain, 27, 300) == 59
    compiled = tiny(game={"mode": "plain"}, train={"micro_batch": 2, "compile": "on"})
    assert launches(compiled, 28, 300) == 28 * 71 + 52 + 225
    graphs = tiny(game={"mode": "plain"}, train={"micro_batch": 2, "compile": "graphs"})
    assert launches(graphs, 28, 300) == 24 + 225
    sharded = tiny(game={"mode": "plain"}, deepspeed={"zero_optimization": {"stage": 3}})
    assert launches(sharded, 28, 300) == launches(plain, 28, 300) + 20 * 300


def test_what_was_measured_is_told_from_what_is_assumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = written(tmp_path, SMALL)
    assert main(["--config", config, "--gpu", "h200", "--fraction-of-bandwidth", "0.5"]) == 0
    out = capsys.readouterr().out
    assert "0.475 [m] x" in out and "0.5 [a] x" in out and "54 us [m]" in out
    assert "[m] measured: one H200, DiT-XL/2 at 256 pixels" in out
    assert main(["--config", config, "--gpu", "a100"]) == 0
    out = capsys.readouterr().out
    assert "0.475 [a] x" in out and "0.85 [a] x" in out and "54 us [a]" in out


def test_fp32_is_predicted_without_tensor_cores():
    gpu = find_gpu("a100")
    assert Assumptions(gpu).peak(tiny(train={"micro_batch": 2})) == gpu.fp32
    assert Assumptions(gpu).peak(tiny()) == gpu.bf16


def test_what_travels_at_each_stage():
    config = tiny(game={})
    both = players(config, *meta_models(config, 10))
    denoiser = both[0].trained
    travelling: list[dict[str, tuple[str, float]]] = [
        {t.purpose: (t.operation, t.payload) for t in transfers(config, both, 512, 8, stage=stage)}
        for stage in range(4)
    ]
    gradients = [stage["denoiser gradients"] for stage in travelling]
    assert gradients == 3 * [("all-reduce", 2 * denoiser)] + [("reduce-scatter", 2 * denoiser)]
    assert "denoiser weights" not in travelling[0]
    for stage in (1, 2):
        assert travelling[stage]["denoiser weights"] == ("all-gather", 2 * denoiser)
    assert not transfers(config, both, 512, 1, stage=2)


def test_vote_and_log_line_are_as_large_as_planned(monkeypatch: pytest.MonkeyPatch):
    sizes: list[int] = []

    def count(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel() * tensor.element_size())
        return tensor

    monkeypatch.setattr(vote, "is_distributed", lambda: True)
    monkeypatch.setattr(vote, "communication_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(vote, "sum_over_ranks", count)
    monkeypatch.setattr(log, "sum_over_ranks", count)
    vote.Vote().ask()
    log.Interval(torch.device("cpu")).reduce(8, 0)
    assert sizes == [VOTE, LOG_LINE]


def test_global_scope_gathers_the_features_of_all_ranks():
    config = tiny(game={"scope": "global"})
    both = players(config, *meta_models(config, 10))
    found = {t.purpose: t for t in transfers(config, both, 512, 8)}["features of S"]
    # Two calls (one in each player's step) of real and generated: 8 ranks x 4 rows of 512 in bf16.
    assert found.payload == 2 * (2 * 8 * 4 * 512 * 2)


def test_a_queue_takes_the_features_of_all_ranks_once():
    config = tiny(game={"queue": 100})
    both = players(config, *meta_models(config, 10))
    found = {t.purpose: t for t in transfers(config, both, 512, 8)}["feature queue"]
    # 8 ranks x 4 samples: real, generated, weight and label in float32.
    assert found.operation == "all-gather" and found.payload == 8 * 4 * (512 + 512 + 2) * 4
