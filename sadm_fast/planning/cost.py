"""Costs of a step, counted without running it: FLOPs, and bytes of activations.

Models live on the meta device, so nothing is allocated. PyTorch's FlopCounterMode counts matrix products and
convolutions; a multiply-add is two FLOPs and one MAC. Papers on diffusion transformers write "Gflops" and mean MACs.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.hooks import RemovableHandle

from sadm_fast.build import NONE, Own, build_denoiser, build_psi
from sadm_fast.config import Config
from sadm_fast.game import Batch, frozen, predict
from sadm_fast.models import Denoiser, StructureEncoder
from sadm_fast.planning.memory import Activations
from sadm_kernels import structure_loss

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def _flops(run: Callable[[], Any]) -> tuple[int, Any]:
    """What `run` costs, and what it returns."""
    with FlopCounterMode(display=False) as counter:
        result = run()
    return int(counter.get_total_flops()), result


def meta_models(config: Config, num_classes: int, own: Own = NONE) -> tuple[Denoiser, StructureEncoder | None]:
    """Build both players on the meta device, in the run's dtype; Psi is None in plain mode."""
    with torch.device("meta"):
        dtype = _DTYPES[config.train.precision]
        psi = None if config.game.mode == "plain" else build_psi(config, own).to("meta", dtype)
        return build_denoiser(config, num_classes, own).to("meta", dtype), psi


def _denoise(config: Config, denoiser: Denoiser) -> Tensor:
    b, shape = config.train.micro_batch, config.sample_shape
    x = torch.empty(b, *shape, device="meta")
    y = torch.zeros(b, dtype=torch.long, device="meta")
    return denoiser(x, torch.empty(b, device="meta"), y)[:, : shape[0]]


def step_flops(config: Config, denoiser: Denoiser, psi: nn.Module | None) -> dict[str, int]:
    """Count the FLOPs of one rank's step, by purpose."""
    accumulation = config.train.grad_accumulation
    forward, xhat0 = _flops(lambda: _denoise(config, denoiser))
    backward, _ = _flops(lambda: xhat0.sum().backward())
    parts = {"denoiser forward": forward, "denoiser backward": backward}
    if psi is not None:
        leaf = xhat0.new_empty(len(xhat0), *config.psi_shape).requires_grad_(True)

        def structure() -> None:
            with frozen(psi):
                with torch.no_grad():
                    f = psi(leaf.detach())
                structure_loss(f, psi(leaf)).backward()

        parts["structure term"], _ = _flops(structure)
        if config.game.mode == "sadm":

            def discriminate() -> None:
                f, g = psi(torch.cat([leaf.detach(), leaf.detach()])).chunk(2)
                structure_loss(f, g).backward()

            parts["discriminator"] = config.game.discriminator_steps * _flops(discriminate)[0]
            if config.implementation == "reference" or accumulation > 1:
                parts["denoiser forward, again for the discriminator"] = parts["denoiser forward"]
    return {what: flops * accumulation for what, flops in parts.items()}


def activations(config: Config, denoiser: Denoiser, psi: nn.Module | None) -> Activations:
    """Count the bytes that autograd keeps of one micro-batch; models from `meta_models`.

    The tensors are fake CPU ones. On meta, attention would keep a matrix of all pairs of tokens; the fused kernels of
    CPUs and GPUs do not.
    """
    samples, shape, process = config.train.micro_batch, config.sample_shape, config.process
    with FakeTensorMode(allow_non_fake_inputs=True):
        x, labels = torch.empty(samples, *shape), torch.zeros(samples, dtype=torch.long)
        level = torch.empty(samples, dtype=torch.float64)
        more = (labels,) if config.denoiser.dropout else ()
        batch = Batch(x, labels, labels, torch.empty_like(x), process.sample_t(level), level, more)
        blocks: dict[nn.Module, int] = {}
        with _checkpointing(denoiser, False):
            whole = _kept(denoiser, lambda denoise: predict(process, denoise, batch), inside=blocks)
        checkpointed = whole
        if blocks:
            with _checkpointing(denoiser, True):
                inputs = _kept(denoiser, lambda denoise: predict(process, denoise, batch))
            checkpointed = inputs + max(blocks.values())
        structure = discriminator = 0
        if psi is not None:
            seen = torch.empty(samples, *config.psi_shape, requires_grad=True)
            with frozen(psi):
                structure = _kept(psi, lambda encode: encode(seen))
            if config.game.mode == "sadm":
                both = torch.empty(2 * samples, *config.psi_shape)
                discriminator = _kept(psi, lambda encode: encode(both))
    return Activations(whole, checkpointed, structure, discriminator)


@contextmanager
def _checkpointing(denoiser: Denoiser, on: bool) -> Iterator[None]:
    """Switch activation checkpointing on or off inside the block."""
    before = denoiser.activation_checkpointing
    denoiser.activation_checkpointing = on
    try:
        yield
    finally:
        denoiser.activation_checkpointing = before


def _kept(module: nn.Module, use: Callable[[Callable[..., Tensor]], object], inside: Any = None) -> int:
    """Count the bytes that use(module) keeps for its backward pass: each storage once, parameters not at all.

    Call it inside FakeTensorMode.

    inside: a dictionary that gets what each of a Denoiser's blocks keeps, its inputs not counted.
    """
    weights: dict[str, Any] = {
        name: nn.Parameter(torch.empty(p.shape, dtype=p.dtype), requires_grad=p.requires_grad)
        for name, p in module.named_parameters()
    }
    weights |= {name: torch.empty(buffer.shape, dtype=buffer.dtype) for name, buffer in module.named_buffers()}
    own = {weight.untyped_storage()._cdata for weight in weights.values()}
    kept: dict[int, Tensor] = {}
    entered: list[dict[int, Tensor]] = []  # what was kept, with the inputs, when the block that runs began

    def pack(tensor: Tensor) -> Tensor:
        key = tensor.untyped_storage()._cdata
        if key not in own:
            kept[key] = tensor  # hold it: a freed storage could give its address to another
        return tensor

    def enter(_: nn.Module, inputs: Any) -> None:
        entered.append(kept | {x.untyped_storage()._cdata: x for x in tree_leaves(inputs)})

    def leave(block: nn.Module, _: object, __: object) -> None:
        before = entered.pop()
        inside[block] = sum(tensor.untyped_storage().nbytes() for key, tensor in kept.items() if key not in before)

    hooks: list[RemovableHandle] = []
    for block in module.units() if inside is not None and isinstance(module, Denoiser) else ():
        hooks += [block.register_forward_pre_hook(enter), block.register_forward_hook(leave)]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = use(lambda *inputs: functional_call(module, weights, inputs))
    for hook in hooks:
        hook.remove()
    total = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    del out
    return total
