"""A part of engine_worker.py: trains a few steps at every stage and precision, and looks at the fp32 masters."""

from typing import Any

from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor, nn

from sadm_fast.config_training import ExponentialEMA, PowerEMA
from sadm_fast.ema import EMA
from sadm_fast.engine.flat import Flat
from sadm_fast.engine.masters import gather, local_masters
from sadm_fast.ranks.launch import Place
from tests.support.engine_cases import Case, stages
from tests.support.engine_game import Game

STEPS = 3


def weights_in(module: nn.Module, of: Any = lambda parameter: parameter) -> dict[str, Tensor]:
    """What `of` gives of each trained parameter, [its shape], by the network's names: cut apart where it is flat."""
    found = {name: of(p) for name, p in module.named_parameters() if p.requires_grad}
    if not isinstance(module, Flat):
        return found
    return {
        place.name: found[name][low:high].view(place.shape)
        for name in found
        for place, low, high in module.within(name, 0, found[name].numel())
    }


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

    def whole(parameter: Any) -> Tensor:
        if hasattr(parameter, "ds_id"):
            parameter.all_gather([parameter])
        value = parameter.detach().float().clone()
        if hasattr(parameter, "ds_id"):
            parameter.partition([parameter])
        return value

    low = weights_in(engine.module, whole)
    deepspeeds = weights_in(engine.module, safe_get_full_fp32_param) if case.stage else {}
    return {
        "owned": sum(fragment.value.numel() for fragment in own()),
        "views": all(a.value.data_ptr() == b.value.data_ptr() for a, b in zip(first, own(), strict=True)),
        "history": history,
        "averages": full,
        "loaded": gather(again.average, shapes),
        "updates": again.updates,
        "module": low,
        "deepspeed": {name: value.clone() for name, value in deepspeeds.items()},
    }


def masters(place: Place) -> dict[str, Any]:
    """What is looked at in test_masters.py, by case."""
    return {
        f"zero{stage}-{precision}": looked_at(Case("", "plain", stage, precision=precision), place)
        for stage in stages(place.world_size)
        for precision in ("fp32", "bf16")
    }
