"""The loop of a run: data, one iteration, counters, log, pictures, checkpoints, signals.

What an iteration computes is in game.py; how the two engines step is in engine/players.py.
"""

import math
import time
from collections.abc import Mapping
from typing import Any

import torch

from sadm_fast.build import NONE, Own
from sadm_fast.config import Config
from sadm_fast.console import Console
from sadm_fast.data import MicroBatchPlan, make_loader
from sadm_fast.data.batch import Loader
from sadm_fast.data.source import Source
from sadm_fast.ema import EMA
from sadm_fast.engine.players import Outcome, Players, gradient_norm, samples_per_step
from sadm_fast.errors import UserError
from sadm_fast.feed import draw_batch, loader_spec
from sadm_fast.files import append_json
from sadm_fast.gallery import Gallery
from sadm_fast.planning.speed import StepSpeed
from sadm_fast.ranks.collectives import barrier, max_over_ranks, rank_and_world_size
from sadm_fast.ranks.stopping import Stopped, StopRequest
from sadm_fast.ranks.vote import Vote
from sadm_fast.ranks.watchdog import Watchdog
from sadm_fast.report import write_report
from sadm_fast.run import checkpoint, divergence
from sadm_fast.run.checkpoint_writer import CheckpointWriter
from sadm_fast.run.folder import RunFolder
from sadm_fast.run.log import Interval, TrainingLog, peak_memory
from sadm_fast.run.loggers import loggers
from sadm_fast.run.state import TrainState

# So many skipped iterations in a row are not bad luck.
_SKIPS_IN_A_ROW = 10


class Trainer:
    """A run from its first step to its report; assemble.assemble makes one.

    emas: by the names of their files in a checkpoint.
    null_class: the label that stands for "no class"; None: the denoiser is told no labels.
    own: networks of the caller's, whose FLOPs are counted.
    """

    def __init__(
        self,
        config: Config,
        folder: RunFolder,
        source: Source,
        players: Players,
        emas: Mapping[str, EMA],
        writer: CheckpointWriter,
        gallery: Gallery,
        *,
        num_classes: int,
        null_class: int | None,
        device: torch.device,
        console: Console,
        own: Own = NONE,
    ) -> None:
        self.config, self.folder, self.source = config, folder, source
        self.players, self.emas, self.writer, self.gallery = players, emas, writer, gallery
        self.num_classes, self.null_class, self._own = num_classes, null_class, own
        self.device, self.console = device, console
        self.rank, self.world_size = rank_and_world_size()
        self.samples_per_step = samples_per_step(config, self.world_size)
        self.state = TrainState()  # without the iteration that is on its way
        self._on_its_way: tuple[Outcome, Interval] | None = None  # launched, but not known to be taken or skipped
        self._saved_step = 0
        self._finite_step = 0  # the last one that was taken, or the one of the checkpoint that the run goes on from
        self._resumed_step = 0
        self._skipped_in_a_row = 0
        self._speed: StepSpeed | None = None
        self._noted = 0  # of the loader's broken images
        self._started = time.perf_counter()

    def resume(self, found: checkpoint.Found) -> None:
        """Continue from a whole checkpoint. Collective."""
        with self._watched(f"loading {found.folder}"):
            averages, self.state = checkpoint.load(found, self.players.engines, self.players.queue, list(self.emas))
        for ema, average in zip(self.emas.values(), averages, strict=True):
            ema.load(average, self.state.ema_updates)
        self._saved_step = self._finite_step = self._resumed_step = self.step
        self.console.say(f"Continuing {self.folder.path} at step {self.step}")

    @property
    def step(self) -> int:
        """Iterations so far, taken, skipped or on their way."""
        return self.state.step + (self._on_its_way is not None)

    @property
    def seconds(self) -> float:
        """Time in the loop, over all the stops of this run."""
        return self.state.seconds + time.perf_counter() - self._started

    def run(self, request: StopRequest) -> bool:
        """Train to the last step; True when it is reached, False when asked to stop before."""
        train = self.config.train
        vote = Vote(lambda: request.asked, self.writer.status)
        log = self._log()
        self._speed = StepSpeed.of(self.config, self.num_classes, self.device, self._own) if self.rank == 0 else None
        loader = self._loader()
        self._started = time.perf_counter()
        first, taken_before = self.step, self.state.ema_updates
        stop = False
        try:
            with (
                request.deferred(),
                self._watched("starting to train") as watchdog,
                self.console.bar("training", train.steps, self.step) as bar,
            ):
                self.gallery.rehearse(self.step)
                if self.gallery.evaluates_after(self.step):  # it may have been stopped before its end
                    stop = self._evaluate(log, request, watchdog)
                interval = Interval(self.device)
                while self.step < train.steps and not stop:
                    watchdog.alive(f"in step {self.step + 1}")
                    self._iteration(loader, interval)
                    stop, writing, write_failed = vote.ask()
                    self.writer.decide(writing, write_failed)
                    if stop or self._due():
                        self._settle()
                    if train.due(self.step, train.log_every):
                        self._note_broken(loader)
                        line = self._log_line(interval, len(loader.broken))
                        log.write(line)
                        bar.at(self.step, _note(line))
                        interval = Interval(self.device)
                    watchdog.alive(f"making pictures after step {self.step}")
                    if self.gallery.look(self.step, log):
                        interval = Interval(self.device)  # looking is not training: keep it out of the throughput
                    watchdog.alive(f"saving after step {self.step}")
                    if train.due(self.step, train.checkpoint_every) and not self._skipped_in_a_row:
                        self._save()
                        vote.start_anew()  # nobody has been asked about this save yet
                        interval = Interval(self.device)
                    if self.gallery.evaluates_after(self.step) and not stop:
                        self.writer.finish()  # an evaluation may take long: what is saved is safe before it
                        vote.start_anew()
                        stop = self._evaluate(log, request, watchdog)
                        interval = Interval(self.device)
                if stop:
                    self.console.say(f"asked to stop: saving a checkpoint of step {self.step}")
                self._save()
                self.writer.finish()
                if self.step >= train.steps and not self._skipped_in_a_row:
                    self.writer.followed(self.step + 1)  # no step will tell more
        finally:
            self.writer.close()
            loader.close()
            log.close()
        with self._watched("writing the report"):
            if self.rank == 0:
                write_report(self.folder.path)
            barrier()  # the launcher ends the others as soon as one has ended with 75
        finished = self.step >= train.steps and not (stop and self.gallery.evaluates_after(self.step))
        taken = self.state.ema_updates
        if finished and (not taken or (self.step > first and taken == taken_before)):
            raise UserError(
                f"{self.folder.path}: every step was skipped, because its loss or gradient was not finite: nothing was"
                " trained; look at the data (encode.py --check) or lower the learning rate, and start with another"
                " --run-dir"
            )
        return finished

    def _evaluate(self, log: TrainingLog, request: StopRequest, watchdog: Watchdog) -> bool:
        """Score the averages as they are; True if a rank was asked to stop meanwhile. Collective."""

        def turn(drawn: int) -> None:
            watchdog.alive(f"in an evaluation after step {self.step}, {drawn} samples drawn")
            if max_over_ranks(torch.tensor(int(request.asked))):
                raise Stopped

        try:
            turn(0)
            self.gallery.evaluate(self.step, log, turn)
        except Stopped:
            return True
        return False

    def _log(self) -> TrainingLog:
        if self.rank != 0:
            return TrainingLog(self.folder, writing=False)
        made = loggers(self.config.logging, self.folder, self.config.resolved(), self.step)
        return TrainingLog(self.folder, writing=True, loggers=made)

    def _loader(self) -> Loader:
        """This rank's micro-batches from the samples on that the run has not seen; close it."""
        plan = MicroBatchPlan(
            num_images=len(self.source),
            seed=self.config.seed,
            flip=self.config.data.flip,
            micro_batch=self.config.train.micro_batch,
            grad_accumulation=self.config.train.grad_accumulation,
            rank=self.rank,
            world_size=self.world_size,
            first_sample=self.state.samples_seen,
        )
        return make_loader(self.source, plan, loader_spec(self.config), self.device)

    def _watched(self, doing: str) -> Watchdog:
        """A context that ends this rank if what it does takes longer than the run's patience."""
        return Watchdog(self.config.train.patience, self.rank, doing)

    def _iteration(self, loader: Loader, interval: Interval) -> None:
        """One step of both players, taken or skipped, and of the counters. Collective."""
        config = self.config
        started = time.perf_counter()
        micro_batches = [next(loader) for _ in range(config.train.grad_accumulation)]
        interval.waited(time.perf_counter() - started)
        batches = [
            draw_batch(config, batch.images, batch.labels, batch.sample_ids, self.null_class, self.samples_per_step)
            for batch in micro_batches
        ]
        self.players.set_learning_rates(self.step)
        outcome = self.players.launch(batches, self.step, self._settle)
        self._on_its_way = outcome, interval
        interval.step_done()

    def _due(self) -> bool:
        """Whether something is made or saved after this step, so that its end must be known."""
        train, evaluate = self.config.train, self.config.evaluate
        each = (train.log_every, train.sample_every, train.checkpoint_every, evaluate.every)
        return any(every is not None and train.due(self.step, every) for every in each)

    def _settle(self) -> None:
        """Count the iteration on its way, once the device has told whether it is taken or skipped. Collective."""
        if self._on_its_way is None:
            return
        (outcome, interval), self._on_its_way = self._on_its_way, None
        taken = self.players.settle(outcome)
        self.state.advance(self.samples_per_step, taken=taken)
        if not taken:
            self._skipped()
            return
        for ema in self.emas.values():
            ema.update()
        self._skipped_in_a_row = 0
        self._finite_step = self.step
        self.writer.followed(self.step)
        interval.add(outcome)

    def _skipped(self) -> None:
        self._skipped_in_a_row += 1
        self.console.say(f"step {self.step}: a loss or gradient is not finite; both players skip it")
        if self._skipped_in_a_row >= _SKIPS_IN_A_ROW:
            self.writer.finish()
            way_on = divergence.way_on(
                self.folder.checkpoints, self._finite_step, self._resumed_step, tidy=self.rank == 0
            )
            raise UserError(
                f"{self._skipped_in_a_row} steps in a row, up to step {self.step}, had a loss or gradient that is not"
                f" finite; {way_on}"
            )

    def _note_broken(self, loader: Loader) -> None:
        """Images that were replaced because they cannot be read: counted in the log, named in broken.jsonl."""
        for name, reason in list(loader.broken.items())[self._noted :]:
            self.console.say(f"broken image replaced by another: {name}: {reason}")
            append_json(self.folder.broken, {"step": self.step, "rank": self.rank, "image": name, "reason": reason})
        self._noted = len(loader.broken)

    def _log_line(self, interval: Interval, broken_images: int) -> dict[str, Any]:
        means = interval.reduce(self.samples_per_step, broken_images)
        discriminator = self.players.discriminator if self.players.playing(self.step - 1) else None
        rates = self.players.learning_rates(self.step - 1)
        return {
            "step": self.step,
            "samples_seen": self.state.samples_seen,
            **means,
            **self._achieved(means["samples_per_s"]),
            "grad_norm_denoiser": gradient_norm(self.players.denoiser),
            "grad_norm_discriminator": None if discriminator is None else gradient_norm(discriminator),
            "lr": rates["denoiser"],
            "lr_discriminator": None if discriminator is None else rates["discriminator"],
            "memory_bytes": peak_memory(self.device),
            "skipped_steps": self.state.skipped_steps,
            "wall_s": self.seconds,
        }

    def _achieved(self, samples_per_s: Any) -> dict[str, float | None]:
        """FLOP/s of one rank, and their share of its GPU's peak."""
        if self._speed is None:
            return {"flops_per_s": None, "mfu": None}
        return self._speed.achieved(samples_per_s / self.samples_per_step, self.players.playing(self.step - 1))

    def _save(self) -> None:
        if self.step == self._saved_step or not self.state.ema_updates:  # nothing is worth saving before the first step
            return
        self.state.seconds, self._started = self.seconds, time.perf_counter()
        self.writer.save(self.state)
        self._saved_step = self.step


def _note(line: dict[str, Any]) -> str:
    def number(key: str) -> str:
        value = line[key]
        return "-" if value is None or not math.isfinite(value) else f"{value:.4g}"

    game = "" if line["structure_distance"] is None else f" S {number('structure_distance')}"
    if line["structure_undefined"]:
        game += f" (no pair to compare in {line['structure_undefined']} micro-batches)"
    wait = f"{line['data_wait_fraction']:.1%}"
    speed = ""
    if (flops := line["flops_per_s"]) is not None:
        speed = f", {flops / 1e12:.3g} TFLOP/s a rank" if flops >= 1e12 else f", {flops / 1e9:.3g} GFLOP/s a rank"
    speed += "" if line["mfu"] is None else f" ({line['mfu']:.0%} MFU)"
    return f"loss {number('loss_denoise')}{game} {number('samples_per_s')} samples/s{speed}, data wait {wait}"
