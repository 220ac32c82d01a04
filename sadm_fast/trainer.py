"""The loop: counters, averages, logs, pictures, checkpoints, signals. A step: game.py and engine/players.py."""

import copy
import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cached_property
from typing import Any

import torch
from torch import nn

from sadm_fast.build import Undrawn, build_denoiser, load_weights, resolve_classes, start_from_weights
from sadm_fast.config import Config
from sadm_fast.console import Console
from sadm_fast.data import MicroBatchPlan, make_loader
from sadm_fast.data.batch import Loader
from sadm_fast.data.latents import LatentSource
from sadm_fast.data.source import Source
from sadm_fast.ema import EMA
from sadm_fast.engine.masters import Fragment, gather, local_masters, trainable_shapes
from sadm_fast.engine.optimizers import learning_rate
from sadm_fast.engine.players import Players, gradient_norm
from sadm_fast.errors import UserError
from sadm_fast.feed import loader_spec
from sadm_fast.files import append_json, write_json
from sadm_fast.gallery import RelationView, grid_classes, real_grid, sample_grid, save_picture
from sadm_fast.game import draw
from sadm_fast.metrics.evaluation import Evaluator
from sadm_fast.metrics.evaluator import build_evaluator, evaluation_images
from sadm_fast.models import DiT
from sadm_fast.models.autoencoder import Autoencoder
from sadm_fast.pretrain import prepare_judge, prepare_psi
from sadm_fast.ranks.collectives import barrier, rank_and_world_size
from sadm_fast.ranks.stopping import StopRequest
from sadm_fast.ranks.vote import NotFinite, Vote
from sadm_fast.ranks.watchdog import Watchdog
from sadm_fast.report import write_report
from sadm_fast.run import checkpoint
from sadm_fast.run.checkpoint_writer import CheckpointWriter
from sadm_fast.run.facts import run_facts
from sadm_fast.run.folder import RunFolder
from sadm_fast.run.log import Interval, TrainingLog, peak_memory

# So many skipped iterations in a row are not bad luck.
_SKIPS_IN_A_ROW = 10


class Trainer:
    """A run from its folder to its report."""

    def __init__(
        self,
        config: Config,
        folder: RunFolder,
        source: Source,
        autoencoder: Autoencoder | None,
        device: torch.device,
        console: Console,
    ) -> None:
        """autoencoder: of the latents in `source`, on rank 0, which makes the pictures; None elsewhere."""
        self.config, self.folder, self.device, self.console = config, folder, device, console
        self.source, self.autoencoder = source, autoencoder
        self.rank, self.world_size = rank_and_world_size()
        self.num_classes = resolve_classes(config, source)
        self.samples_per_step = config.train.micro_batch * config.train.grad_accumulation * self.world_size

        # A checkpoint that does not belong here is found before any training.
        found = checkpoint.find(folder.checkpoints, self.identity, console.say)
        self._found = checkpoint.agreed(found, self.identity)
        self.psi_facts: dict[str, Any] = {}
        psi: nn.Module | None = None
        if config.game.mode != "plain":
            psi, self.psi_facts = prepare_psi(config, source, folder.pretrained, device, console)
        self.evaluator: Evaluator | None = None
        self.judge_facts: dict[str, Any] = {}
        if config.evaluate.every is not None:
            judge, self.judge_facts = prepare_judge(config, source, folder.pretrained, device, console)
            self.evaluator = build_evaluator(config, source, judge, device)

        with nullcontext() if self._found is None else Undrawn():
            denoiser = build_denoiser(config, self.num_classes)
        if self._found is None:
            start_from_weights(config, denoiser)
        # fp32 models to look through, only where somebody looks: rank 0 draws, all ranks evaluate.
        self.viewer: DiT | None = None
        if self.rank == 0 or self.evaluator is not None:
            with Undrawn():
                self.viewer = build_denoiser(config, self.num_classes).to(device).eval().requires_grad_(False)
        self.psi_viewer: nn.Module | None = None
        self.relation_view: RelationView | None = None
        if psi is not None:
            if self.rank == 0:
                self.psi_viewer = copy.deepcopy(psi).to(device).eval().requires_grad_(False)
                self.relation_view = RelationView(config, source, device)
            psi.train()
        self.shapes = {"denoiser": trainable_shapes(denoiser)}
        if psi is not None:
            self.shapes["discriminator"] = trainable_shapes(psi)
        with self._watched("starting the engines"):
            self.players = Players(config, denoiser, psi, device)
            if self.players.not_compiled is not None:
                console.say(f"train.compile: running eagerly, {self.players.not_compiled}")
            self.ema = EMA(lambda: list(local_masters(self.players.denoiser)), config.train.ema)
            self.writer = CheckpointWriter(
                folder.checkpoints,
                self.players.engines,
                lambda: self.ema.average,
                self.shapes["denoiser"],
                identity=self.identity,
                queue=self.players.queue,
                keep_last=config.train.keep_last,
                keep_every=config.train.keep_every,
                say=console.complain,
            )
        self.step = 0
        self.samples_seen = 0  # global: the position in the data, whatever the number of ranks
        self.skipped_steps = 0
        self._saved_step = 0  # nothing is worth saving before the first step
        self._skipped_in_a_row = 0
        self._noted = 0  # of the loader's broken images
        self._seconds_before = 0.0
        self._started = time.perf_counter()

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What a checkpoint must agree with to be continued here."""
        latents = {"latent_space": self.source.encoding.space} if isinstance(self.source, LatentSource) else {}
        return {
            "configuration": self.config.fingerprint(),
            "data": self.source.fingerprint(),
            **latents,
            "samples_per_step": self.samples_per_step,
            "samples_compared": self._samples_compared,
        }

    @property
    def _samples_compared(self) -> int | None:
        """How many samples S looks at together: another division into ranks must leave it as it is."""
        game, micro_batch = self.config.game, self.config.train.micro_batch
        if game.mode == "plain":
            return None
        return micro_batch * (self.world_size if game.scope == "global" else 1)

    def _watched(self, doing: str) -> Watchdog:
        """A context that ends this rank if what it does takes longer than the run's patience."""
        return Watchdog(self.config.train.patience, self.rank, doing)

    def resume(self) -> None:
        """Continue from the newest whole checkpoint, if there is one. Collective."""
        if self._found is not None:
            with self._watched(f"loading {self._found}"):
                averages, state = checkpoint.load(self._found, self.players.engines, self.players.queue)
            self.ema.load(averages, state["ema_updates"])
            self.step, self.samples_seen = state["step"], state["samples_seen"]
            self.skipped_steps = state["skipped_steps"]
            self._seconds_before = state["seconds"]
            self._saved_step = self.step
            self.console.say(f"Continuing {self.folder.path} at step {self.step}")
        if self.rank == 0:
            self.folder.rewind(self.step)
            facts = run_facts(
                self.config, self.source, self.shapes, self.psi_facts, self.judge_facts, self.world_size,
                grid_classes(self.num_classes, self.config.sampling.columns),
            )  # fmt: skip
            write_json(self.folder.facts, facts)
            real = real_grid(self.config, self.source, self.device, self.autoencoder)
            save_picture(real, self.folder.samples / "real.png")

    @property
    def seconds(self) -> float:
        """Time in the loop, over all the stops of this run."""
        return self._seconds_before + time.perf_counter() - self._started

    def run(self, request: StopRequest) -> bool:
        """Train to the last step; True when it is reached, False when asked to stop before."""
        config = self.config
        vote = Vote(lambda: request.asked, self.writer.status)
        log = TrainingLog(self.folder, self.rank, self.step)
        plan = MicroBatchPlan(
            num_images=len(self.source),
            seed=config.seed,
            flip=config.data.flip,
            micro_batch=config.train.micro_batch,
            grad_accumulation=config.train.grad_accumulation,
            rank=self.rank,
            world_size=self.world_size,
            first_sample=self.samples_seen,
        )
        loader = make_loader(self.source, plan, loader_spec(config), self.device)
        self._started = time.perf_counter()
        interval = Interval(self.device)
        try:
            with (
                request.deferred(),
                self._watched("starting to train") as watchdog,
                self.console.bar("training", config.train.steps, self.step) as bar,
            ):
                while self.step < config.train.steps and not vote.stop:
                    watchdog.alive(f"in step {self.step + 1}")
                    self._iteration(loader, vote, interval)
                    self.writer.decide(vote.writing, vote.write_failed)
                    if self._due(config.train.log_every):
                        self._note_broken(loader)
                        line = self._log_line(interval, len(loader.broken))
                        log.write(line)
                        bar.at(self.step, _note(line))
                        interval = Interval(self.device)
                    watchdog.alive(f"making pictures or an evaluation after step {self.step}")
                    if self._look(log):
                        interval = Interval(self.device)  # looking is not training: keep it out of the throughput
                    watchdog.alive(f"saving after step {self.step}")
                    if self._due(config.train.checkpoint_every) and self.step < config.train.steps:
                        self._save()
                        interval = Interval(self.device)
                if vote.stop:
                    self.console.say(f"asked to stop: saving a checkpoint of step {self.step}")
                self._save()
                self.writer.finish()
        finally:
            self.writer.close()
            loader.close()
            log.close()
        with self._watched("writing the report"):
            if self.rank == 0:
                write_report(self.folder.path)
            barrier()  # the launcher ends the others as soon as one has ended with 75
        return self.step >= config.train.steps

    def _due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.config.train.steps

    def _iteration(self, loader: Loader, vote: Vote, interval: Interval) -> None:
        config = self.config
        started = time.perf_counter()
        micro = [next(loader) for _ in range(config.train.grad_accumulation)]
        interval.waited(time.perf_counter() - started)
        batches = [
            draw(
                self.players.process,
                batch.images,
                batch.labels,
                batch.sample_ids,
                seed=config.seed,
                null_class=self.num_classes,
                label_dropout=config.denoiser.label_dropout,
            )
            for batch in micro
        ]
        self.players.set_learning_rates(self.step)
        try:
            outcome = self.players.iteration(batches, self.step, agree_finite=vote.agree_finite)
        except NotFinite:
            self._skip()
        else:
            self.ema.update()
            self._skipped_in_a_row = 0
            interval.add(outcome)
        self.step += 1
        self.samples_seen += self.samples_per_step
        interval.step_done()

    def _skip(self) -> None:
        step = self.step + 1
        self.skipped_steps += 1
        self._skipped_in_a_row += 1
        self.console.say(f"step {step}: a loss or gradient is not finite; both players skip it")
        if self._skipped_in_a_row >= _SKIPS_IN_A_ROW:
            self.writer.finish()
            whole = checkpoint.completed(self.folder.checkpoints)
            last = f"the last good checkpoint is {whole[-1]}" if whole else "there is no checkpoint yet"
            raise UserError(
                f"{self._skipped_in_a_row} steps in a row, up to step {step}, had a loss or gradient that is not"
                f" finite; {last}; lower the learning rate"
            )

    def _note_broken(self, loader: Loader) -> None:
        """Images that were replaced because they cannot be read: counted in the log, named in broken.jsonl."""
        for name, reason in list(loader.broken.items())[self._noted :]:
            self.console.say(f"broken image replaced by another: {reason}")
            append_json(self.folder.broken, {"step": self.step, "rank": self.rank, "image": name, "reason": reason})
        self._noted = len(loader.broken)

    def _log_line(self, interval: Interval, broken_images: int) -> dict[str, Any]:
        means = interval.reduce(self.samples_per_step, broken_images)
        discriminator = self.players.discriminator if self.players.playing(self.step - 1) else None
        return {
            "step": self.step,
            "samples_seen": self.samples_seen,
            **means,
            "grad_norm_denoiser": gradient_norm(self.players.denoiser),
            "grad_norm_discriminator": None if discriminator is None else gradient_norm(discriminator),
            "lr": learning_rate(self.config.denoiser_optimizer, self.step - 1, self.config.train.steps),
            "lr_discriminator": None
            if discriminator is None
            else learning_rate(self.config.discriminator_optimizer, self.step - 1, self.config.train.steps),
            "memory_bytes": peak_memory(self.device),
            "skipped_steps": self.skipped_steps,
            "wall_s": self.seconds,
        }

    def _look(self, log: TrainingLog) -> bool:
        """Sample grids, relation matrices and evaluations where they are due. Collective."""
        config = self.config
        picture_due = self._due(config.train.sample_every)
        evaluation_due = self.evaluator is not None and self._due(config.evaluate.every or 1)
        if not (picture_due or evaluation_due):
            return False
        name = f"step-{self.step:06d}"
        if picture_due:
            self._show(list(local_masters(self.players.denoiser)), "denoiser", self.viewer)
            self._save_grid(log, name, "samples/raw")
        self._show(self.ema.average, "denoiser", self.viewer)
        if picture_due:
            self._save_grid(log, f"{name}-ema", "samples/ema")
            if self.players.discriminator is not None:
                self._show(list(local_masters(self.players.discriminator)), "discriminator", self.psi_viewer)
            if self.relation_view is not None and self.viewer is not None and self.psi_viewer is not None:
                self.relation_view.save(self.folder.relations / f"{name}.npz", self.viewer, self.psi_viewer)
        if evaluation_due and self.evaluator is not None and self.viewer is not None:
            started = time.perf_counter()
            scores = self.evaluator.score(evaluation_images(config, self.viewer, self.num_classes, self.device))
            sampler = {
                "steps": config.evaluate.steps,
                "guidance_scale": 1.0,
                "weights": "ema",
                "seed": config.seed,
            }
            log.write_evaluation({"step": self.step, **scores, "sampler": sampler})
            self.console.say(
                f"step {self.step}: fid_classifier {scores['fid_classifier']:.4g}, fid_random"
                f" {scores['fid_random']:.4g}, fid_pixels {scores['fid_pixels']:.4g} of {scores['samples']} samples"
                f" ({time.perf_counter() - started:.0f} s)"
            )
            if self.rank == 0 and self.step < config.train.steps:
                write_report(self.folder.path)
        return True

    def _show(self, fragments: Sequence[Fragment], player: str, viewer: nn.Module | None) -> None:
        """Put weights that all ranks own together into a viewer; a rank without one takes part. Collective."""
        whole = gather(fragments, self.shapes[player])
        if viewer is not None:
            load_weights(viewer, whole)

    def _save_grid(self, log: TrainingLog, name: str, tag: str) -> None:
        if self.rank == 0 and self.viewer is not None:
            picture = sample_grid(self.config, self.viewer, self.num_classes, self.device, self.autoencoder)
            save_picture(picture, self.folder.samples / f"{name}.png")
            log.image(tag, picture, self.step)

    def _save(self) -> None:
        if self.step == self._saved_step:
            return
        state = {
            "step": self.step,
            "samples_seen": self.samples_seen,
            "skipped_steps": self.skipped_steps,
            "ema_updates": self.ema.updates,
            "seconds": self.seconds,
        }
        self.writer.save(self.step, state)
        self._saved_step = self.step


def _note(line: dict[str, Any]) -> str:
    def number(key: str) -> str:
        value = line[key]
        return "-" if value is None or not math.isfinite(value) else f"{value:.4g}"

    game = "" if line["structure_distance"] is None else f" S {number('structure_distance')}"
    wait = f"{line['data_wait_fraction']:.1%}"
    return f"loss {number('loss_denoise')}{game} {number('samples_per_s')} samples/s, data wait {wait}"
