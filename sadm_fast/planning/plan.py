"""The plan of a run as one dictionary of plain numbers: text.py prints it, --json writes it unchanged."""

from dataclasses import asdict
from typing import Any

from sadm_fast.config import Config
from sadm_fast.planning.communication import transfers
from sadm_fast.planning.cost import activations, meta_models, step_flops
from sadm_fast.planning.drawing import drawing
from sadm_fast.planning.measured import launches
from sadm_fast.planning.memory import Memory, Offload, offload_of, rank_memory
from sadm_fast.planning.players import players
from sadm_fast.planning.roofline import Assumptions, step_time

WORLD_SIZES = tuple(2**i for i in range(11))  # 1 to 1024
STAGES = (0, 1, 2, 3)
_OFFLOADS: dict[int, tuple[Offload, ...]] = {
    0: ("none",),
    1: ("none", "optimizer"),
    2: ("none", "optimizer"),
    3: ("none", "optimizer", "optimizer and parameters"),
}


def make_plan(
    config: Config, num_classes: int, gpus: int, assumptions: Assumptions, judging: tuple[int, int] | None = None
) -> dict[str, Any]:
    """Compute the plan for `gpus` ranks, in elements, bytes, FLOPs and seconds; JSON values only.

    Scaling is weak: a rank's micro-batch is the configuration's for any number of ranks.

    judging: as planning.drawing.drawing.
    """
    denoiser, psi = meta_models(config, num_classes)
    both = players(config, denoiser, psi)
    flops = step_flops(config, denoiser, psi)
    kept = activations(config, denoiser, psi)
    looking = drawing(config, num_classes, denoiser, judging)
    feature_dim = 0 if psi is None else psi.feature_dim
    stage = config.deepspeed.zero_optimization.stage
    train = config.train
    launched = launches(config, len(denoiser.units()), sum(len(player.parameters) for player in both))
    samples = train.micro_batch * train.grad_accumulation

    def memory(n: int, stage: int, offload: Offload, checkpointing: bool | None = None) -> Memory:
        return rank_memory(
            config, both, kept, n, stage=stage, offload=offload, checkpointing=checkpointing, feature_dim=feature_dim,
            drawing=looking,
        )  # fmt: skip

    def scaled(n: int) -> dict[str, Any]:
        moved = transfers(config, both, feature_dim, n)
        time = step_time(config, both, sum(flops.values()), moved, assumptions, n, stage, launched)
        return {
            "world_size": n,
            "nodes": -(-n // assumptions.gpus_per_node),
            "global_batch": samples * n,
            "memory_peak": memory(n, stage, offload_of(config)).peak,
            "payload": sum(transfer.payload for transfer in moved),
            "wire": sum(transfer.wire(n) for transfer in moved),
            "predicted": {
                "compute_s": time.compute,
                "update_s": time.update,
                "communication_s": time.communication,
                "host_s": time.host,
                "step_s": time.exposed,
                "images_per_s": samples * n / time.exposed,
                "step_s_if_overlapped": time.hidden,
                "images_per_s_if_overlapped": samples * n / time.hidden,
            },
        }

    table = [scaled(n) for n in sorted({*WORLD_SIZES, gpus})]
    alone = table[0]["predicted"]
    for row in table:
        predicted = row["predicted"]
        for way in ("", "_if_overlapped"):
            gain = predicted[f"images_per_s{way}"] / alone[f"images_per_s{way}"]
            predicted[f"efficiency{way}"] = gain / row["world_size"]
    return {
        "name": config.name,
        "mode": config.game.mode,
        "implementation": config.implementation,
        "precision": train.precision,
        "scope": config.game.scope,
        "zero_stage": stage,
        "offload": offload_of(config),
        "gpus": gpus,
        "micro_batch": train.micro_batch,
        "grad_accumulation": train.grad_accumulation,
        "num_classes": num_classes,
        "parameters": {player.name: {"all": player.everything, "trained": player.trained} for player in both},
        "flops": flops,
        "launches": launched,
        "activation_checkpointing": train.activation_checkpointing,
        "flops_added_by_checkpointing": flops["denoiser forward"],
        "memory_left_out": looking.left_out,
        "memory": [
            {
                "zero_stage": s,
                "offload": offload,
                **_memory_record(memory(gpus, s, offload)),
                "peak_with_checkpointing": memory(gpus, s, offload, checkpointing=True).peak,
            }
            for s in STAGES
            for offload in _OFFLOADS[s]
        ],
        "communication": [
            {
                "zero_stage": s,
                "transfers": [
                    asdict(transfer) | {"wire": transfer.wire(gpus)}
                    for transfer in transfers(config, both, feature_dim, gpus, stage=s)
                ],
            }
            for s in STAGES
        ],
        "assumptions": asdict(assumptions)
        | {
            "gpu": assumptions.gpu._asdict(),
            "peak_flops": assumptions.peak(config),
            "links": assumptions.links(gpus),
        },
        "scaling": table,
    }


def _memory_record(memory: Memory) -> dict[str, Any]:
    return {
        "resident": memory.device,
        "host": memory.host,
        "moments": memory.moments,
        "fullest_moment": memory.fullest,
        "peak": memory.peak,
        "peak_by_kind": memory.peak_by_kind,
    }
