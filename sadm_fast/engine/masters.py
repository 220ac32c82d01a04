"""The fp32 master weights that a rank owns at each ZeRO stage, and whole parameters gathered from them."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sadm_fast.engine.flat import Flat
from sadm_fast.ranks.collectives import rank_and_world_size


class Fragment(NamedTuple):
    """A piece of a parameter that this rank owns."""

    name: str
    start: int  # offset in the flattened parameter
    value: Tensor  # float32 [n]; a view of the optimizer's memory, so it follows every step


def local_masters(engine: Any) -> Iterator[Fragment]:
    """The fp32 fragments this rank owns, by the network's names; over all ranks they cover every trained weight.

    Without ZeRO every rank owns everything. A weight may be absent on a rank at stages 1-3. Ask anew after a
    checkpoint was loaded: the engine may have replaced its tensors.
    """
    return named(engine.module, owned(engine))


def named(module: nn.Module, fragments: Iterable[Fragment]) -> Iterator[Fragment]:
    """Fragments of the module's parameters as fragments of its network's weights: views of the same memory."""
    if not isinstance(module, Flat):
        yield from fragments
        return
    for name, start, value in fragments:
        for place, low, high in module.within(name, start, value.numel()):
            yield Fragment(place.name, low - place.start, value[low - start : high - start])


def owned(engine: Any) -> Iterator[Fragment]:
    """As `local_masters`, but fragments of the parameters that the engine sees, which may be flat: few and large."""
    unsharded = _unsharded_masters(engine.optimizer)
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        if hasattr(parameter, "ds_id"):  # stage 3: equal parts, the last one padded
            from deepspeed.utils import safe_get_local_fp32_param  # importing it prints, and sampling needs none of it

            part = safe_get_local_fp32_param(parameter)
            start = part.numel() * dist.get_rank(parameter.ds_process_group)
            size = min(part.numel(), parameter.ds_numel - start)
            if size > 0:
                yield Fragment(name, start, part.detach()[:size])
        elif hasattr(parameter, "_hp_mapping"):  # stages 1, 2: a range of all parameters laid end to end
            mapping = parameter._hp_mapping
            if mapping is not None:
                yield Fragment(name, mapping.lp_fragment_address.start, mapping.hp_fragment.detach())
        else:  # stage 0
            yield Fragment(name, 0, unsharded.get(parameter, parameter).detach().view(-1))


def _unsharded_masters(optimizer: Any) -> dict[Tensor, Tensor]:
    """Stage 0 in bf16: each bf16 parameter's fp32 master. Empty in fp32, where a parameter is its own master."""
    if hasattr(optimizer, "fp32_groups"):  # DeepSpeed's unfused wrapper: torch.optim.AdamW
        pairs = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
        return {low: high for lows, highs in pairs for low, high in zip(lows, highs, strict=True)}
    if hasattr(optimizer, "fp32_groups_flat"):  # its fused wrapper: one flat master a group
        masters: dict[Tensor, Tensor] = {}
        for lows, flat in zip(optimizer.fp16_groups, optimizer.fp32_groups_flat, strict=True):
            sizes = [low.numel() for low in lows]
            masters.update(zip(lows, flat[: sum(sizes)].split(sizes), strict=True))
        return masters
    return {}


@torch.no_grad()
def refresh_weights(engine: Any, master: Callable[[str, int], Tensor]) -> None:
    """Copy changed masters into the network's weights, rounded to their precision. Collective.

    master(name, size): the whole flattened weight of that name in the network, float32 [size], the same on every rank.
    """
    masters = _unsharded_masters(engine.optimizer)
    for low, high in masters.items():
        low.copy_(high)
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        if hasattr(parameter, "ds_id"):
            part = parameter.ds_tensor
            start = part.numel() * dist.get_rank(parameter.ds_process_group)
            size = min(part.numel(), parameter.ds_numel - start)
            if size > 0:
                part[:size].copy_(master(name, parameter.ds_numel)[start : start + size])
        elif hasattr(parameter, "_hp_mapping"):
            if isinstance(engine.module, Flat):
                for place, first, end in engine.module.within(name, 0, parameter.numel()):
                    parameter[first:end].copy_(master(place.name, end - first))
            else:
                parameter.copy_(master(name, parameter.numel()).view(parameter.shape))
    refresh_whole_copies(engine)


def refresh_whole_copies(engine: Any) -> None:
    """Rebuild the whole copies of small parameters that stage 3 keeps, from all ranks' parts. Collective."""
    persistent = getattr(engine.optimizer, "persistent_parameters", None)
    if persistent:
        persistent[0].partition(persistent)
        persistent[0].all_gather(persistent)


@torch.no_grad()
def undo_trial_step(engine: Any) -> None:
    """Forget the step of zero gradients by which DeepSpeed's bf16 wrappers without ZeRO allocate their state.

    It would decay every weight once, and put AdamW's bias correction one step ahead of the moments it corrects.
    """
    masters = _unsharded_masters(engine.optimizer)
    for low, high in masters.items():
        high.copy_(low)
    if masters:
        engine.optimizer.optimizer.state.clear()
        for group in engine.optimizer.optimizer.param_groups:
            group.pop("step", None)  # where apex counts


@torch.no_grad()
def gather(fragments: Sequence[Fragment], like: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Full float32 parameters of shapes `like`, on every rank, from the fragments of all ranks.

    Raises:
        RuntimeError: some of a parameter belongs to no rank.
    """
    mine: dict[str, list[Fragment]] = {}
    for fragment in fragments:
        mine.setdefault(fragment.name, []).append(fragment)
    device = fragments[0].value.device if fragments else torch.device("cpu")
    rank, world = rank_and_world_size()
    full = {}
    for name, shape in like.items():
        value = torch.zeros(shape, device=device).flatten()
        owner = torch.full_like(value, world, dtype=torch.int32)
        for _, start, piece in mine.get(name, []):
            value[start : start + piece.numel()] = piece
            owner[start : start + piece.numel()] = rank
        if world > 1:
            # Without ZeRO everybody owns everything: the first owner speaks, so that the sum is exact.
            dist.all_reduce(owner, op=dist.ReduceOp.MIN)
            value[owner != rank] = 0.0
            dist.all_reduce(value)
        if bool((owner == world).any()):
            raise RuntimeError(f"parameter {name}: some of it belongs to no rank")
        full[name] = value.reshape(shape)
    return full


def trainable_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and full shapes of the trainable parameters; ask before an engine partitions them."""
    return {name: tuple(p.shape) for name, p in module.named_parameters() if p.requires_grad}
