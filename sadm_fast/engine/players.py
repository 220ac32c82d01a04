"""Denoiser and discriminator with their DeepSpeed engines, and one iteration of the game."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from sadm_fast.config import Config
from sadm_fast.config_training import OptimizerConfig
from sadm_fast.engine.compilation import blocks_of, compile_in_place, why_not
from sadm_fast.engine.feature_queue import FeatureQueue, check_queue
from sadm_fast.engine.flat import Flat, network_of
from sadm_fast.engine.fused_step import FusedStep
from sadm_fast.engine.graphs import graph_in_place
from sadm_fast.engine.masters import undo_trial_step
from sadm_fast.engine.optimizers import build_optimizer, deepspeed_dict, is_fused, learning_rate
from sadm_fast.engine.sharing import SharedComparison
from sadm_fast.engine.state import Snapshot
from sadm_fast.game import (
    Batch,
    Comparison,
    Prediction,
    at_strength,
    denoiser_loss,
    discriminator_loss,
    frozen,
    predict,
    schedule,
    structure_distance,
)
from sadm_fast.ranks.collectives import rank_and_world_size
from sadm_fast.ranks.on_host import OnHost
from sadm_kernels import Queue


class NotFinite(Exception):
    """A loss or gradient of some rank is NaN or infinite: raised on every rank, with both players as before."""


@dataclass
class Outcome:
    """What one iteration did, as device tensors of this rank; nothing here waits for the device."""

    loss_denoise: Tensor  # [B] of every micro-batch
    level: Tensor  # the uniform number behind each sample's t: its quartile is the noise quartile
    structure_distances: Tensor | None  # S of every micro-batch in the denoiser's loss; 0 where no pair counted
    samples: list[Queue]  # what each micro-batch adds to the feature queue
    norm: OnHost  # of the denoiser's gradient; not finite: neither player has stepped
    loss_discriminator: Tensor | None = None  # 0-d, -S of the last discriminator step


class Players:
    """Denoiser and discriminator with their engines.

    In mode "sadm" both have one; in "structure" Psi is a frozen module; in "plain" there is no Psi. Psi looks at
    samples as `see` shows them, for example at the pixels of latents; None: as they are. `fused` holds the steps of the
    players, by name, that do not step as DeepSpeed does. `not_compiled` says why train.compile could not be followed,
    if it could not.
    """

    def __init__(
        self,
        config: Config,
        denoiser: nn.Module,
        psi: nn.Module | None,
        device: torch.device,
        see: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.config = config
        self._see = see
        self._device_type = device.type
        self.process = config.process
        self.mode = config.game.mode
        self.fused: dict[str, FusedStep] = {}
        self._meanwhile: Callable[[], None] = lambda: None
        self.world_size = rank_and_world_size()[1]
        self.denoiser = self._initialize("denoiser", denoiser, config.denoiser_optimizer)
        self.discriminator: Any = None
        self.psi: Any = None
        if self.mode != "plain":
            if psi is None:
                raise ValueError(f"mode {self.mode!r} needs a structure encoder")
            if self.mode == "sadm":
                self.discriminator = self._initialize("discriminator", psi, config.discriminator_optimizer)
                self.psi = self.discriminator.module
                self._before = Snapshot(self.discriminator)
            else:
                dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
                self.psi = psi.to(device=device, dtype=dtype).requires_grad_(False)
        self.not_compiled: str | None = None
        if config.train.compile != "off":
            self.not_compiled = why_not(config.deepspeed.zero_optimization.stage, device)
            if self.not_compiled is None:
                for module in [self.denoiser.module, *([] if self.psi is None else [self.psi])]:
                    compile_in_place(network_of(module))
                    if config.train.compile == "graphs":
                        graph_in_place(module)
        self.compare = self._comparison()
        if self.compare.of_maps and self.psi is not None:
            network_of(self.psi).map_stage = config.game.stage
        self._tokens: Tensor | None = None  # of the denoiser's last forward, [B, T, D]
        if self.mode != "plain" and config.game.look_at == "hidden":
            self._keep_tokens(network_of(self.denoiser.module), network_of(self.psi))
        self.queue: FeatureQueue | None = None
        if config.game.queue:
            check_queue(config, self.world_size)
            self.queue = FeatureQueue(config.game.queue, network_of(self.psi).feature_dim, device)

    def _comparison(self) -> Comparison:
        """S as the configuration wants it, over this rank's samples or those of all."""
        alone = self.config.comparison
        if self.config.game.scope == "global" and self.world_size > 1 and dist.group.WORLD is not None:
            return SharedComparison(**vars(alone), group=dist.group.WORLD)
        return alone

    def _keep_tokens(self, denoiser: Any, psi: Any) -> None:
        """Keep what a block of each forward returns, and let Psi's maps have as many cells."""

        def keep(_: Any, __: Any, output: Tensor) -> None:
            self._tokens = output

        denoiser.units()[self.config.game.block - 1].register_forward_hook(keep)
        psi.map_cells = denoiser.input_size // denoiser.patch_size

    def _initialize(self, player: str, module: nn.Module, optimizer: OptimizerConfig) -> Any:
        zero = self.config.deepspeed.zero_optimization
        if self.config.implementation == "fast" and zero.stage < 3:
            module = Flat(module, zero.buckets(self._device_type)["reduce_bucket_size"], blocks_of(module))
        engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=build_optimizer(optimizer, module),
            config=deepspeed_dict(self.config, optimizer, self.world_size, self._device_type),
            dist_init_required=False,
        )
        undo_trial_step(engine)
        if is_fused(self.config):
            self.fused[player] = FusedStep(engine, optimizer)
        return engine

    @property
    def engines(self) -> dict[str, Any]:
        """The players' engines by name; without a discriminator only the denoiser's."""
        both = {"denoiser": self.denoiser, "discriminator": self.discriminator}
        return {name: engine for name, engine in both.items() if engine is not None}

    def learning_rates(self, step: int) -> dict[str, float]:
        """Learning rates of the players at 0-based iteration `step`.

        In the discriminator's warm-up the denoiser's is 0: its weights rest, while its moments of the gradient warm up
        as well. Its own warm-up, if it has not begun before, begins afterwards.
        """
        game, steps = self.config.game, self.config.train.steps
        before = game.warmup_steps if game.start_step == 0 else 0
        rests = game.start_step <= step < game.start_step + game.warmup_steps
        rates = {
            "denoiser": 0.0 if rests else learning_rate(self.config.denoiser_optimizer, step - before, steps - before),
            "discriminator": learning_rate(self.config.discriminator_optimizer, step, steps),
        }
        return {name: rates[name] for name in self.engines}

    def set_learning_rates(self, step: int) -> None:
        """Set `learning_rates` of iteration `step`."""
        for name, rate in self.learning_rates(step).items():
            for group in self.engines[name].optimizer.param_groups:
                group["lr"] = rate

    def playing(self, step: int) -> bool:
        """Whether iteration `step` belongs to the game; before and after it the training is plain."""
        return self.config.game.playing(step)

    def lambda_s(self, step: int) -> float:
        """Weight of S at 0-based iteration `step`."""
        if not self.playing(step):
            return 0.0
        game = self.config.game
        first = game.start_step + game.warmup_steps
        end = self.config.train.steps if game.stop_step is None else game.stop_step
        return schedule(step, game.lambda_s, first, game.ramp_steps, end, game.decay_steps)

    def iteration(self, batches: Sequence[Batch], step: int) -> Outcome:
        """`launch` an iteration and wait for its end. Collective.

        Raises:
            NotFinite: on every rank; both players and the queue are as they were.
        """
        outcome = self.launch(batches, step)
        if not self.settle(outcome):
            raise NotFinite
        return outcome

    def launch(self, batches: Sequence[Batch], step: int, meanwhile: Callable[[], None] = lambda: None) -> Outcome:
        """One step of both players on this rank's micro-batches, of which the device may still be at work. Collective.

        First the discriminator's turn over all micro-batches, then the denoiser's, so that every micro-batch meets the
        same two players. With one micro-batch the denoiser's forward serves both turns: its weights do not change in
        between. With more, its graph would have to be kept for each, so the discriminator's turn runs it without one.

        Both players step, or neither; `settle` tells. A loss that is not finite makes its own gradient NaN (`_or_nan`),
        and a gradient that is not finite on any rank is no step on all. The discriminator's forbids the denoiser's
        step, and the denoiser's takes back the discriminator's.

        Args:
            batches: `grad_accumulation` micro-batches.
            step: 0-based iteration.
            meanwhile: settles the iteration before, if that is open. Called once, as late as possible: when this one's
                first gradients are on their way, or where past features are needed.
        """
        self._meanwhile = meanwhile
        reuse = self.config.implementation == "fast" and len(batches) == 1
        prediction = predict(self.process, self.denoiser, batches[0]) if reuse else None
        shown = None
        if prediction is not None and self.playing(step):
            shown = self._shown(batches[0], prediction.xhat0)
        veto = loss_discriminator = None
        try:
            if self.mode == "sadm" and self.playing(step):
                self._before.take()
                pairs = self._shown_without_graphs(batches) if shown is None else [shown]
                loss_discriminator, veto = self._discriminator_turn(pairs)
            outcome = self._denoiser_turn(batches, prediction, shown, step, veto)
        except NotFinite:
            if self.mode == "sadm" and self.playing(step):
                self._before.restore()
            nothing = torch.zeros(0)
            return Outcome(nothing, nothing, None, [], OnHost(torch.tensor(torch.nan)))
        if veto is not None and self.fused:
            self._before.restore_unless(self.fused["denoiser"].norm)
        outcome.loss_discriminator = loss_discriminator
        return outcome

    def settle(self, outcome: Outcome) -> bool:
        """Wait for a launched iteration: whether both players have stepped. If not, all is as it was. Collective."""
        taken = math.isfinite(outcome.norm.wait())
        for fused in self.fused.values():
            fused.settle(taken)
        if taken and self.queue is not None and outcome.samples:
            self.queue.push(outcome.samples)
        return taken

    def _discriminator_turn(self, pairs: Sequence[tuple[Batch, Tensor]]) -> tuple[Tensor, Tensor]:
        """Steps that ascend S of `_shown` pairs: the last one's loss -S, and a 0-d that is finite if all were taken."""
        loss = torch.zeros((), device=pairs[0][0].x0.device)
        veto: Tensor | None = None
        for _ in range(self.config.game.discriminator_steps):
            loss = torch.zeros_like(loss)
            for batch, xhat0 in pairs:
                part = discriminator_loss(
                    self.compare, self.process, self.discriminator, batch, xhat0, self._past
                )  # fmt: skip
                self._backward("discriminator", part, veto)
                loss = loss + part.detach() / len(pairs)
            veto = self._norm("discriminator")
        assert veto is not None
        return loss, veto

    def _denoiser_turn(
        self,
        batches: Sequence[Batch],
        prediction: Prediction | None,
        shown: tuple[Batch, Tensor] | None,
        step: int,
        veto: Tensor | None,
    ) -> Outcome:
        """The step that descends L_den + lambda_s S.

        prediction, shown: of the only micro-batch, if there are already.
        """
        lambda_s, playing = self.lambda_s(step), self.playing(step)
        losses, distances, samples = [], [], []
        for batch in batches:
            xhat0, loss = predict(self.process, self.denoiser, batch) if prediction is None else prediction
            tokens, self._tokens = self._tokens, None
            losses.append(loss.detach())
            if playing:
                looked_at, estimate = self._shown(batch, xhat0) if shown is None else shown
                with frozen(self.psi):
                    structure = structure_distance(
                        self.compare, self.process, self.psi, looked_at, estimate, self._past, tokens
                    )  # fmt: skip
                    distance = structure.distance
                    if (strength := self.config.game.strength) != "weight":
                        each = structure.samples.weight if strength == "per_sample" else None
                        distance = at_strength(distance, batch, xhat0, self.process.loss_weight(batch.t), each)
                    self._backward("denoiser", denoiser_loss(loss, distance, lambda_s), veto)
                distances.append(structure.distance.detach())
                samples.append(structure.samples)
            else:
                self._backward("denoiser", denoiser_loss(loss), veto)
        return Outcome(
            torch.cat(losses),
            torch.cat([batch.level for batch in batches]),
            torch.stack(distances) if distances else None,
            samples,
            OnHost(self._norm("denoiser")),
        )

    def _shown(self, batch: Batch, xhat0: Tensor) -> tuple[Batch, Tensor]:
        """What Psi looks at, as `see` shows it: x0 in the batch's place, and xhat0 with its graph."""
        see = self._see
        return (batch, xhat0) if see is None else (batch._replace(x0=see(batch.x0)), see(xhat0))

    @property
    def _past(self) -> Queue | None:
        """The queue before this iteration: it changes at its end only, for all micro-batches and both players."""
        if self.queue is None:
            return None
        self._settle_the_last()
        return self.queue.columns

    @torch.no_grad()
    def _shown_without_graphs(self, batches: Sequence[Batch]) -> list[tuple[Batch, Tensor]]:
        """What Psi looks at in every micro-batch."""
        return [self._shown(batch, predict(self.process, self.denoiser, batch).xhat0) for batch in batches]

    def _backward(self, player: str, loss: Tensor, veto: Tensor | None) -> None:
        """Backward and step; DeepSpeed itself steps only at the last micro-batch.

        veto: if not None and not finite, there is no step.
        """
        engine = self.engines[player]
        engine.backward(_or_nan(loss))
        self._settle_the_last()
        if player in self.fused:
            self.fused[player].veto = veto
        engine.step()

    def _norm(self, player: str) -> Tensor:
        """The norm of the gradient of a player's last step, 0-d on the device: not finite if it was not taken.

        Raises:
            NotFinite: DeepSpeed's own step was not taken, which is known without asking the device.
        """
        if player in self.fused:
            return self.fused[player].norm
        if not self.engines[player].was_step_applied():
            raise NotFinite
        return torch.zeros(())

    def _settle_the_last(self) -> None:
        meanwhile, self._meanwhile = self._meanwhile, lambda: None
        meanwhile()


def _or_nan(loss: Tensor) -> Tensor:
    """The loss 0-d, to the last bit; with a gradient of NaN if it is not finite (inf alone may have a finite one)."""
    return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)


def samples_per_step(config: Config, world_size: int) -> int:
    """Samples of one iteration, over all ranks."""
    return config.train.micro_batch * config.train.grad_accumulation * world_size


def samples_compared(config: Config, world_size: int) -> int | None:
    """Samples that S compares together; None without S. Another division into ranks must leave it as it is."""
    if config.game.mode == "plain":
        return None
    return config.train.micro_batch * (world_size if config.game.scope == "global" else 1)


def gradient_norm(engine: Any) -> float | None:
    """Norm of the last step's gradient before clipping, over all ranks; None where DeepSpeed does not know it."""
    norm = engine.get_global_grad_norm()
    return None if norm is None else float(norm)
