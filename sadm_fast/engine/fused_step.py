"""The optimizer step of an engine at ZeRO stages 0 to 2: one pass over the memory, and no wait for the device.

It takes the place of the `step` of DeepSpeed's wrapper (tested set: constraints.txt), which waits for the gradient's
norm several times a step and passes over the memory once for each of: widening, scaling, AdamW, rounding, averaging.
Everything around it stays DeepSpeed's: what is reduced when, who owns what, and the gathering of weights.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from sadm_fast.config_training import OptimizerConfig
from sadm_fast.engine.masters import owned
from sadm_fast.engine.state import MOMENTS, OptimizerState
from sadm_fast.ranks.collectives import is_distributed
from sadm_kernels.adamw import adamw_step, total_norm


class _Piece(NamedTuple):
    """Equally long ranges of the flat memory of one parameter, [n]."""

    parameter: Tensor  # of the module, whole
    master: Tensor  # float32
    weight: Tensor | None  # what the network computes with; None: it is the master
    moments: tuple[Tensor, Tensor]  # float32


class FusedStep:
    """Called as `engine.optimizer.step`; writes nothing where the gradient is not finite on any rank.

    Attributes:
        norm: of the last gradient before clipping, over all ranks, 0-d float32 on the device; not finite: no step.
        veto: if not None, a 0-d float32: no step where it is not finite either.
    """

    def __init__(self, engine: Any, config: OptimizerConfig) -> None:
        self._engine, self._wrapper = engine, engine.optimizer
        self._config = config
        self._state = OptimizerState(engine)
        self._pieces: list[_Piece] = []
        self._known: tuple[Tensor, ...] = ()  # the moments that `_pieces` are parts of
        self._launched = 0  # steps of which it is not known yet whether they were taken
        self._taken = 0
        self._averages: dict[int, list[Tensor]] = {}  # by the address of their masters
        self._decays: list[Callable[[], float]] = []
        self.norm = torch.zeros((), device=engine.device)
        self.veto: Tensor | None = None
        self.prepare()
        engine.optimizer.step = self

    def average(self, averages: Sequence[Tensor], masters: Sequence[Tensor], decay: Callable[[], float]) -> None:
        """Also move averages [n] of this rank's masters [n] in each step: decay() of them stays, asked at the step."""
        for master, value in zip(masters, averages, strict=True):
            self._averages.setdefault(master.data_ptr(), []).append(value)
        self._decays.append(decay)

    def prepare(self) -> None:
        """Find the memory again, if a checkpoint has been loaded since."""
        if not self._state.moments_of_owners():
            self._state.count_once()
            self._state.allocate_moments(0)
        moments = self._state.moments_of_owners()
        if len(moments) == len(self._known) and all(a is b for a, b in zip(moments, self._known, strict=True)):
            return
        self._known = moments
        self._taken, self._launched = self._state.steps_taken(), 0
        parameters = dict(self._engine.module.named_parameters())
        self._pieces = []
        for name, _, master in owned(self._engine):
            first, second = (self._state.moments(master)[moment] for moment in MOMENTS)
            self._pieces.append(
                _Piece(parameters[name], master, self._weight(parameters[name], master), (first, second))
            )

    def _weight(self, parameter: Any, master: Tensor) -> Tensor | None:
        """The part of the network's weights that follows a part of the masters."""
        if hasattr(parameter, "_hp_mapping"):
            return parameter._hp_mapping.lp_fragment.detach().view(-1)
        return None if parameter.data_ptr() == master.data_ptr() else parameter.detach().view(-1)

    @torch.no_grad()
    def __call__(self, closure: object = None) -> None:
        self.prepare()
        gradients = self._gradients()
        self._launched += 1
        self.norm = self._norm(gradients)
        self._wrapper._global_grad_norm = self.norm
        n = self._taken + self._launched
        (group,) = self._wrapper.param_groups
        for piece, gradient in zip(self._pieces, gradients, strict=True):
            averages = self._averages.get(piece.master.data_ptr(), [])
            adamw_step(
                piece.master,
                gradient,
                *piece.moments,
                averages,
                piece.weight,
                norm=self.norm,
                max_norm=self._config.gradient_clipping,
                lr=group["lr"],
                betas=self._config.betas,
                eps=self._config.eps,
                weight_decay=self._config.weight_decay,
                step=n,
                decays=[decay() for decay in self._decays[: len(averages)]],
            )  # fmt: skip
        self._finish()

    def settle(self, taken: bool) -> None:
        """Count the launched steps as taken or not, once that is known."""
        self._taken += self._launched if taken else 0
        self._launched = 0
        self._state.set_steps_taken(self._taken)

    def _gradients(self) -> list[Tensor]:
        """The reduced gradient of each piece, [n]; of the masters' or the weights' precision."""
        if not self._engine.zero_optimization_stage():
            return [
                torch.zeros_like(p.master) if p.parameter.grad is None else p.parameter.grad.view(-1)
                for p in self._pieces
            ]
        (averaged,) = self._wrapper.averaged_gradients.values()
        found = [gradient.view(-1) for gradient in averaged if not getattr(gradient, "_zero_padding", False)]
        sizes, expected = [g.numel() for g in found], [p.master.numel() for p in self._pieces]
        if sizes[: len(expected)] != expected:
            raise RuntimeError(f"DeepSpeed's gradients have {sizes} elements, the masters {expected}")
        return found[: len(expected)]  # behind them lies what fills a partition up, not always marked

    def _norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """The norm over all ranks, NaN where the veto is not finite: 0-d float32."""
        norm = total_norm(gradients, self.norm.device)
        if self._engine.zero_optimization_stage() and is_distributed():
            square = norm.square()
            dist.all_reduce(square)
            norm = square.sqrt()
        norm = norm.float()
        return norm if self.veto is None else norm + 0.0 * self.veto

    def _finish(self) -> None:
        """What DeepSpeed's step does besides: drop the gradients, send each rank's new weights to all."""
        if not self._engine.zero_optimization_stage():
            return
        from deepspeed.runtime.utils import all_gather_dp_groups

        wrapper = self._wrapper
        wrapper.micro_step_id = -1
        for i in range(len(wrapper.bit16_groups)):
            wrapper.free_grad_in_param_list(wrapper.params_not_in_partition[i])
            wrapper.free_grad_in_param_list(wrapper.params_in_partition[i])
            wrapper.averaged_gradients[i] = wrapper.all_grad_tensors[i] = None
        all_gather_dp_groups(
            groups_flat=wrapper.bit16_groups_flat,
            partitioned_param_groups=wrapper.parallel_partitioned_bit16_groups,
            dp_process_group=wrapper.real_dp_process_group,
            start_alignment_factor=wrapper.nccl_start_alignment_factor,
            allgather_bucket_size=wrapper.allgather_bucket_size,
        )
