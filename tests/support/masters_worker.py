"""One rank of test_masters.py: trains a few steps at every stage and precision, and looks at the fp32 masters."""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor

from sadm_fast.config import ExponentialEMA, PowerEMA
from sadm_fast.ema import EMA
from sadm_fast.engine.masters import gather, local_masters
from sadm_fast.ranks.launch import Place, distributed
from tests.support.engine_cases import STAGES, Case
from tests.support.engine_worker import Game

STEPS = 3


def looked_at(case: Case, place: Place) -> dict[str, Any]:
    """Masters before and after every step, DeepSpeed's own view of them, and averages of them."""
    game = Game(case, place)
    engine, shapes = game.players.denoiser, game.shapes["denoiser"]

    def own() -> list[Any]:
        return list(local_masters(engine))

    first = own()
    profiles: dict[str, PowerEMA | ExponentialEMA] = {
        "power": PowerEMA(profile="power", std=0.2),
        "exponential": ExponentialEMA(profile="exponential", decay=0.3),
    }
    averages = {name: EMA(own, profile) for name, profile in profiles.items()}
    history: list[dict[str, Tensor]] = [game.weights()["denoiser"]]
    for step in range(STEPS):
        game.play(step)
        history.append(game.weights()["denoiser"])
        for average in averages.values():
            average.update()
    full = {name: gather(average.average, shapes) for name, average in averages.items()}
    again = EMA(own, profiles["power"])
    again.load(full["power"], averages["power"].updates)
    low = {}
    for name, parameter in engine.module.named_parameters():
        if name in shapes:
            if hasattr(parameter, "ds_id"):
                parameter.all_gather([parameter])
            low[name] = parameter.detach().float().clone()
            if hasattr(parameter, "ds_id"):
                parameter.partition([parameter])
    deepspeeds = {name: safe_get_full_fp32_param(p) for name, p in engine.module.named_parameters() if name in shapes}
    return {
        "owned": sum(fragment.value.numel() for fragment in own()),
        "views": all(a.value.data_ptr() == b.value.data_ptr() for a, b in zip(first, own(), strict=True)),
        "history": history,
        "averages": full,
        "loaded": gather(again.average, shapes),
        "updates": again.updates,
        "module": low,
        "deepspeed": {name: None if value is None else value.clone() for name, value in deepspeeds.items()},
    }


def main(folder: Path) -> None:
    found = {}
    with distributed() as place:
        for stage in STAGES:
            for precision in ("fp32", "bf16"):
                found[f"zero{stage}-{precision}"] = looked_at(Case("", "plain", stage, precision=precision), place)
        torch.save(found, folder / f"rank-{place.rank}.pt")
        dist.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
