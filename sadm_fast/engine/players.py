"""Two DeepSpeed engines, and the one legal way to step them against each other.

The rules (each was measured; breaking one gives silently wrong gradients at some ZeRO stage):
- A player's own step goes through its engine, with ONE engine forward a backward.
- The other player is called through `.module`, frozen, and unfrozen in a `finally`.
- Nothing is frozen before `deepspeed.initialize`, because ZeRO drops parameters that need no gradient.
- One summed loss a backward: a second backward before the step would replace the first one's gradients.
- `gradient_clipping` is always given: DeepSpeed's default clips at 1.0.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from sadm_fast.config import Config, OptimizerConfig
from sadm_fast.engine.compilation import compile_in_place, why_not
from sadm_fast.engine.feature_queue import FeatureQueue, check_queue
from sadm_fast.engine.masters import undo_trial_step
from sadm_fast.engine.optimizers import build_optimizer, deepspeed_dict, is_guarded, learning_rate
from sadm_fast.engine.state import Snapshot
from sadm_fast.game import Batch, Rules, discriminator_loss, frozen, predict, structure_distance
from sadm_fast.ranks.collectives import rank_and_world_size
from sadm_fast.ranks.vote import NotFinite
from sadm_kernels import Queue


@dataclass
class Outcome:
    """What one iteration did, as device tensors of this rank; nothing here waits for the device."""

    loss_denoise: Tensor  # [B] of every micro-batch
    level: Tensor  # the uniform number behind each sample's t: its quartile is the noise quartile
    structure_distance: Tensor | None  # 0-d, S in the denoiser's loss
    loss_discriminator: Tensor | None  # 0-d, of the last discriminator step


class Players:
    """Denoiser and discriminator with their engines.

    In mode "sadm" both have one; in "structure" Psi is a frozen module; in "plain" there is no Psi. `not_compiled` says
    why train.compile could not be followed, if it could not.
    """

    def __init__(self, config: Config, denoiser: nn.Module, psi: nn.Module | None, device: torch.device) -> None:
        self.config = config
        self._device_type = device.type
        self.process = config.process
        self.mode = config.game.mode
        self.world_size = rank_and_world_size()[1]
        self.denoiser = self._initialize(denoiser, config.denoiser_optimizer)
        self.discriminator: Any = None
        self.psi: Any = None
        if self.mode != "plain":
            if psi is None:
                raise ValueError(f"mode {self.mode!r} needs a structure encoder")
            if self.mode == "sadm":
                self.discriminator = self._initialize(psi, config.discriminator_optimizer)
                self.psi = self.discriminator.module
                self._before = Snapshot(self.discriminator)
            else:
                dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
                self.psi = psi.to(device=device, dtype=dtype).requires_grad_(False)
        self.not_compiled: str | None = None
        if config.train.compile:
            self.not_compiled = why_not(config.deepspeed.zero_optimization.stage, device)
            if self.not_compiled is None:
                compile_in_place([self.denoiser.module, *([] if self.psi is None else [self.psi])])
        game = config.game
        fields = (
            "relation",
            "penalty",
            "normalize",
            "tau",
            "delta",
            "gate_log_snr",
            "gate_slope",
            "same_class",
        )
        self.rules = Rules(
            **{name: getattr(game, name) for name in fields},
            impl="reference" if config.implementation == "reference" else "auto",
            group=dist.group.WORLD if game.scope == "global" and self.world_size > 1 else None,
        )
        self.queue: FeatureQueue | None = None
        if game.queue:
            check_queue(config, self.world_size)
            self.queue = FeatureQueue(game.queue, self.psi.feature_dim, device)

    def _initialize(self, module: nn.Module, optimizer: OptimizerConfig) -> Any:
        engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=build_optimizer(optimizer, module, is_guarded(self.config)),
            config=deepspeed_dict(self.config, optimizer, self.world_size, self._device_type),
            dist_init_required=False,
        )
        undo_trial_step(engine)
        return engine

    @property
    def engines(self) -> dict[str, Any]:
        """The engines there are, by player."""
        both = {"denoiser": self.denoiser, "discriminator": self.discriminator}
        return {name: engine for name, engine in both.items() if engine is not None}

    def set_learning_rates(self, step: int) -> None:
        """Learning rates of iteration `step` (0-based), as `learning_rate` says."""
        optimizers = {
            "denoiser": self.config.denoiser_optimizer,
            "discriminator": self.config.discriminator_optimizer,
        }
        for name, engine in self.engines.items():
            for group in engine.optimizer.param_groups:
                group["lr"] = learning_rate(optimizers[name], step, self.config.train.steps)

    def playing(self, step: int) -> bool:
        """Whether iteration `step` belongs to the game; before it the training is plain."""
        return self.mode != "plain" and step >= self.config.game.start_step

    def lambda_s(self, step: int) -> float:
        """Weight of S at iteration `step`: 0 before the game, then a linear ramp."""
        game = self.config.game
        if not self.playing(step):
            return 0.0
        return game.lambda_s * min(1.0, (step - game.start_step + 1) / max(1, game.ramp_steps))

    def iteration(self, batches: Sequence[Batch], step: int, *, agree_finite: Any) -> Outcome:
        """One step of both players on this rank's micro-batches.

        The order is: discriminator over all micro-batches and step, then denoiser over all micro-batches and step, so
        that every micro-batch of an iteration meets the same two players. With one micro-batch the denoiser's forward
        serves both (its weights do not change in between); with more, its graph would have to be kept for each, so the
        discriminator's pass recomputes it without one.

        Both players step, or neither does. A bad loss is seen before either has a gradient (or, where the discriminator
        has no pass of its own, a NaN follows the bad one of several micro-batches into the sum, and the engine drops
        it). A bad gradient of the discriminator is seen before the denoiser's pass; one of the denoiser's takes back
        the discriminator's steps, which it needed to be computed.

        Args:
            batches: `grad_accumulation` micro-batches.
            step: 0-based iteration.
            agree_finite: called with this rank's losses; raises NotFinite on every rank if one is bad on any.

        Raises:
            NotFinite: on every rank; both players are as they were.
        """
        lambda_s = self.lambda_s(step)
        playing = self.playing(step)
        reuse = self.config.implementation == "fast" and len(batches) == 1
        shared = predict(self.process, self.denoiser, batches[0]) if reuse else None
        if shared is not None:
            agree_finite(shared.loss)

        discriminated = None
        if playing and self.mode == "sadm":
            restored = [shared.xhat0] if shared is not None else self._restore(batches, agree_finite)
            self._before.take()
            for _ in range(self.config.game.discriminator_steps):
                discriminated = self._discriminator_step(batches, restored)
                if not self.discriminator.was_step_applied():
                    self._before.restore()
                    raise NotFinite

        asked = shared is not None or discriminated is not None
        losses, distances, samples = [], [], []
        for batch in batches:
            prediction = shared if shared is not None else predict(self.process, self.denoiser, batch)
            losses.append(prediction.loss.detach())
            loss = prediction.loss.mean()
            if not asked and batch is batches[-1]:
                try:
                    agree_finite(torch.cat(losses))
                except NotFinite:
                    if len(batches) == 1:
                        raise
                    loss = loss * torch.nan
            if playing:
                with frozen(self.psi):
                    structure = structure_distance(
                        self.rules, self.process, self.psi, batch, prediction.xhat0, self._past
                    )
                    self._backward(self.denoiser, loss + lambda_s * structure.distance)
                distances.append(structure.distance.detach())
                samples.append(structure.samples)
            else:
                self._backward(self.denoiser, loss)
        if not self.denoiser.was_step_applied():
            if discriminated is not None:
                self._before.restore()
            raise NotFinite
        if self.queue is not None and samples:
            self.queue.push(samples)
        return Outcome(
            torch.cat(losses),
            torch.cat([batch.level for batch in batches]),
            torch.stack(distances).mean() if distances else None,
            discriminated,
        )

    @property
    def _past(self) -> Queue | None:
        """The queue before this iteration: it changes at its end only, for all micro-batches and both players."""
        return None if self.queue is None else self.queue.columns

    @torch.no_grad()
    def _restore(self, batches: Sequence[Batch], agree_finite: Any) -> list[Tensor]:
        """xhat0 of every micro-batch, without graphs."""
        predictions = [predict(self.process, self.denoiser, batch) for batch in batches]
        agree_finite(torch.cat([prediction.loss for prediction in predictions]))
        return [prediction.xhat0 for prediction in predictions]

    def _discriminator_step(self, batches: Sequence[Batch], restored: Sequence[Tensor]) -> Tensor:
        total = torch.zeros((), device=batches[0].x0.device)
        for batch, xhat0 in zip(batches, restored, strict=True):
            loss = discriminator_loss(self.rules, self.process, self.discriminator, batch, xhat0, self._past)
            self._backward(self.discriminator, loss)
            total = total + loss.detach()
        return total / len(batches)

    @staticmethod
    def _backward(engine: Any, loss: Tensor) -> None:
        """Backward and step: DeepSpeed itself steps only at the last micro-batch."""
        engine.backward(loss)
        engine.step()


def gradient_norm(engine: Any) -> float | None:
    """Norm of the last step's gradient before clipping, over all ranks; None where DeepSpeed does not know it."""
    norm = engine.get_global_grad_norm()
    return None if norm is None else float(norm)
