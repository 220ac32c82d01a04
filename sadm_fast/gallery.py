"""Looking at a model in training: sample grids, the discriminator's view of a fixed batch, Frechet distances."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sadm_fast.build import load_weights
from sadm_fast.config import Config
from sadm_fast.console import Console
from sadm_fast.counters import Purpose, normal
from sadm_fast.data.source import Source
from sadm_fast.engine.masters import Fragment, gather, local_masters
from sadm_fast.engine.players import Players
from sadm_fast.errors import UserError
from sadm_fast.feed import load_samples
from sadm_fast.files import replacing
from sadm_fast.game import Batch, predict
from sadm_fast.generation import generate, to_images
from sadm_fast.metrics.run_evaluation import RunEvaluation, Turn
from sadm_fast.metrics.tables import losses_line, one_line, table, variant
from sadm_fast.models import Denoiser, StructureEncoder
from sadm_fast.models.autoencoder import Autoencoder
from sadm_fast.pictures import picture_grid, save_picture
from sadm_fast.precision import tf32
from sadm_fast.ranks.collectives import broadcast_json, rank_and_world_size
from sadm_fast.report import write_report
from sadm_fast.run.folder import RunFolder
from sadm_fast.run.log import TrainingLog
from sadm_kernels import relation_matrix

_RELATION_IMAGES = 60
_PAIRS = 6  # that are shown as pictures
# The fixed batch is noisier than most of what is trained on: there the denoiser has to guess structure.
_RELATION_LEVEL = 0.8


def grid_classes(classes: Sequence[int], columns: int) -> list[int]:
    """The classes shown in a grid's columns: all of `classes`, or `columns` of them evenly chosen."""
    shown = min(len(classes), columns)
    return [classes[i * len(classes) // shown] for i in range(shown)]


def grid_samples(
    config: Config, model: Denoiser, classes: Sequence[int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """The samples of the grid [N, C, ...], row by row, and their labels [N].

    A column is a class of (some of) `classes`, a row a starting noise.
    """
    classes = grid_classes(classes, config.sampling.columns)
    ids = torch.arange(len(classes) * config.sampling.rows, device=device)
    labels = torch.tensor(classes, device=device).repeat(config.sampling.rows)
    samples = generate(
        config, model, labels, ids, steps=config.sampling.steps, guidance_scale=config.sampling.guidance_scale
    )
    return samples, labels


def real_grid(config: Config, source: Source, device: torch.device, autoencoder: Autoencoder | None) -> Tensor:
    """Real images of the same classes in the same arrangement; latents are decoded."""
    classes = grid_classes(source.filled, config.sampling.columns)
    members = [np.flatnonzero(source.labels == c) for c in classes]
    chosen = [int(of_class[row % len(of_class)]) for row in range(config.sampling.rows) for of_class in members]
    samples = load_samples(config, source, chosen)
    return picture_grid(to_images(samples.to(device), autoencoder), len(classes))


class RelationView:
    """What the discriminator sees: relations of a fixed real batch, and of its xhat0."""

    def __init__(self, config: Config, source: Source, device: torch.device) -> None:
        self._config = config
        classes = grid_classes(source.filled, _RELATION_IMAGES)
        per_class = max(1, _RELATION_IMAGES // len(source.filled))
        chosen = [int(i) for c in classes for i in np.flatnonzero(source.labels == c)[:per_class]]
        x0 = load_samples(config, source, chosen).to(device)
        labels = torch.from_numpy(source.labels[chosen]).long().to(device)
        ids = torch.arange(len(x0), device=device) + (1 << 33)  # noise that no training sample has
        level = torch.full((len(x0),), _RELATION_LEVEL, dtype=torch.float64, device=device)
        noise = normal(config.seed, Purpose.NOISE, ids, x0.shape[1:])
        self._batch = Batch(x0, labels, labels, noise, config.process.sample_t(level), level)

    @torch.no_grad()
    def save(
        self,
        path: Path,
        denoiser: nn.Module,
        psi: Callable[[Tensor], Tensor],
        as_images: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """relations/step-N.npz: real and fake relation matrices [B, B], labels [B], log_snr [B], pairs [P, 2].

        pairs: the images whose relation differs most between the two, the largest difference first.
        as_images: of samples; then step-N.png shows a pair in each column: both of x0, then both of xhat0.
        """
        game, batch = self._config.game, self._batch
        xhat0 = predict(self._config.process, denoiser, batch).xhat0

        def matrix(x: Tensor) -> np.ndarray:
            relation = relation_matrix(psi(x), relation=game.relation, normalize=game.normalize, tau=game.tau)
            return relation.cpu().numpy()

        real, fake = matrix(batch.x0), matrix(xhat0)
        pairs = most_changed(real, fake, _PAIRS)
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(
                file,
                real=real,
                fake=fake,
                pairs=pairs,
                labels=batch.labels.cpu().numpy(),
                log_snr=self._config.process.log_snr(batch.t).cpu().numpy(),
            )
        if as_images is not None:
            rows = [samples[torch.from_numpy(of)] for samples in (batch.x0, xhat0) for of in pairs.T]
            save_picture(picture_grid(as_images(torch.cat(rows)), len(pairs)), path.with_suffix(".png"))


def most_changed(real: np.ndarray, fake: np.ndarray, count: int) -> np.ndarray:
    """The `count` pairs i < j with the largest |fake - real| of two matrices [B, B], largest first: int64 [P, 2].

    What is not finite comes last.
    """
    pairs = np.stack(np.triu_indices(len(real), 1), axis=1)
    change = np.nan_to_num(np.abs(fake - real), nan=-1.0, posinf=-1.0)[tuple(pairs.T)]
    return pairs[np.argsort(-change, kind="stable")[:count]]


class Gallery:
    """What a run shows of itself while it trains: sample grids, relation matrices, evaluations.

    Rank 0 draws. All ranks take part where weights are put together, and in evaluations.

    Args:
        players: the engines.
        averages: this rank's fragments of the averaged denoisers by the labels of their profiles, train.ema's first.
        shapes: full shapes of the trained parameters by player.
        viewer, psi_viewer: fp32 networks that take up the weights to look through, in eval mode; None on a rank
            that does not look.
        autoencoder: of the latents, on rank 0 and where `evaluation` is; None for pixels.
        evaluation: on every rank, or on none.
    """

    def __init__(
        self,
        config: Config,
        folder: RunFolder,
        source: Source,
        players: Players,
        averages: Mapping[str, Callable[[], Sequence[Fragment]]],
        shapes: Mapping[str, Mapping[str, tuple[int, ...]]],
        *,
        viewer: Denoiser | None,
        psi_viewer: StructureEncoder | None,
        autoencoder: Autoencoder | None,
        evaluation: RunEvaluation | None,
        device: torch.device,
        console: Console,
    ) -> None:
        self._config, self._folder, self._players, self._averages = config, folder, players, averages
        self._shapes, self._classes = shapes, source.filled
        self._viewer, self._psi_viewer, self._autoencoder = viewer, psi_viewer, autoencoder
        self._evaluation, self._device, self._console = evaluation, device, console
        self._rank = rank_and_world_size()[0]
        self._relations = RelationView(config, source, device) if psi_viewer is not None else None

    @tf32(False)
    def look(self, step: int, log: TrainingLog) -> bool:
        """Make the pictures that are due after `step` steps; False if none are. Collective."""
        config = self._config
        if not config.train.due(step, config.train.sample_every):
            return False
        name = f"step-{step:06d}"
        self._take_up(list(local_masters(self._players.denoiser)), "denoiser", self._viewer)
        self._save_grid(log, step, name, "samples/raw")
        self._take_up_average(config.train.ema.label)
        self._save_grid(log, step, f"{name}-ema", "samples/ema")
        if self._players.discriminator is not None:
            self._take_up(list(local_masters(self._players.discriminator)), "discriminator", self._psi_viewer)
        if self._relations is not None and self._viewer is not None and self._psi_viewer is not None:
            path = self._folder.relations / f"{name}.npz"
            with self._optional(path):
                images = partial(to_images, autoencoder=self._autoencoder)
                self._relations.save(path, self._viewer, self._looks, images if config.paints else None)
        return True

    def evaluates_after(self, step: int) -> bool:
        """Whether scores are due after `step` steps."""
        every, train = self._config.evaluate.every, self._config.train
        return self._evaluation is not None and every is not None and step > 0 and train.due(step, every)

    @tf32(False)
    def rehearse(self, step: int) -> None:
        """Try an evaluation out with one batch, and say how long it will take. Collective.

        UserError before the first step, a line after it: its images cannot be scored.
        """
        if self._evaluation is None or self._viewer is None or step >= self._config.train.steps:
            return
        evaluate, averages = self._config.evaluate, self._config.scored_averages
        self._take_up_average(averages[0].label)
        try:
            seconds = self._evaluation.rehearse(self._viewer, max(evaluate.guidance))
        except ValueError as error:
            message = f"evaluate.every={evaluate.every}: samples of step {step} cannot be scored ({error})"
            if step == 0:
                raise UserError(message) from None
            self._console.say(f"{message}; training goes on")
            return
        lines = len(averages) * len(evaluate.guidance)
        self._console.say(
            f"An evaluation every {evaluate.every} steps: {lines} x {evaluate.samples} samples, up to"
            f" about {lines * seconds:.0f} s"
        )

    @tf32(False)
    def evaluate(self, step: int, log: TrainingLog, turn: Turn | None = None) -> None:
        """Score what evaluations.jsonl does not hold yet of `step`, each average at each guidance scale. Collective.

        turn: called before each batch, on every rank.
        """
        assert self._evaluation is not None and self._viewer is not None  # on every rank, where there are evaluations
        config, viewer, started = self._config, self._viewer, time.perf_counter()

        def averages() -> Iterator[tuple[Denoiser, dict[str, Any]]]:
            for profile in config.scored_averages:
                self._take_up_average(profile.label)
                yield viewer, {"ema": profile.model_dump(mode="json")}

        known = broadcast_json(self._folder.evaluations_of(step) if self._rank == 0 else [])
        rows: list[dict[str, Any]] = []
        try:
            for row in self._evaluation.rows(averages(), step, config.evaluate.guidance, known=known, turn=turn):
                log.write_evaluation(row, self._name(row))
                rows.append(row)
        except ValueError as error:  # samples that are not finite, on all ranks alike: a diverged average
            self._console.say(f"step {step}: no evaluation ({error}); training goes on")
        if not rows:
            return
        seconds = time.perf_counter() - started
        drawn = sum(row["samples"] for row in rows)
        cost = f"{seconds:.0f} s, {drawn / seconds:.4g} images/s"
        if len(rows) == 1:
            self._console.say(f"step {step}: {one_line(rows[0])}, {losses_line(rows[0])} ({cost})")
        else:
            shown = table([{**variant(row), **row} for row in rows], ["guidance", "ema"])
            self._console.say(f"step {step}: an evaluation ({cost})\n{shown}")
        if self._rank == 0 and step < config.train.steps:
            write_report(self._folder.path)

    def _name(self, row: dict[str, Any]) -> str:
        """What a line's numbers stand below in the loggers: the first variant's as if it were the only one."""
        ema, scale = row["weights"]["ema"], row["sampling"]["guidance"]["scale"]
        first = self._config.scored_averages[0].model_dump(mode="json"), self._config.evaluate.guidance[0]
        if (ema, scale) == first:
            return "evaluation"
        return f"evaluation/{ema['profile']}-{ema.get('std', ema.get('decay')):g}-guidance-{scale:g}"

    def _take_up_average(self, label: str) -> None:
        self._take_up(self._averages[label](), "denoiser", self._viewer)

    def _take_up(self, fragments: Sequence[Fragment], player: str, viewer: nn.Module | None) -> None:
        """Put weights that all ranks own together into a viewer; a rank without one takes part. Collective."""
        whole = gather(fragments, self._shapes[player])
        if viewer is not None:
            load_weights(viewer, whole)

    def _looks(self, samples: Tensor) -> Tensor:
        """Features [B, d] of samples, by the viewer of Psi."""
        assert self._psi_viewer is not None
        pixels = self._config.structure_encoder.input == "pixels"
        return self._psi_viewer(to_images(samples, self._autoencoder) if pixels else samples)

    def _save_grid(self, log: TrainingLog, step: int, name: str, tag: str) -> None:
        """samples/NAME.png; of samples that are no pictures NAME.npz, samples float32 [N, C, ...] and labels [N]."""
        if self._rank != 0 or self._viewer is None:
            return
        samples, labels = grid_samples(self._config, self._viewer, self._classes, self._device)
        if not self._config.paints:
            path = self._folder.samples / f"{name}.npz"
            with self._optional(path), replacing(path) as temporary, temporary.open("wb") as file:
                np.savez_compressed(file, samples=samples.cpu().numpy(), labels=labels.cpu().numpy())
            return
        columns = len(grid_classes(self._classes, self._config.sampling.columns))
        picture = picture_grid(to_images(samples, self._autoencoder), columns)
        path = self._folder.samples / f"{name}.png"
        with self._optional(path):
            save_picture(picture, path)
        log.image(tag, picture, step)

    @contextmanager
    def _optional(self, path: Path) -> Iterator[None]:
        """Go on without a picture that cannot be written: the disk is full, or a folder has its name."""
        try:
            yield
        except OSError as error:
            self._console.complain(f"{path}: not written ({error.strerror or error}); training goes on")
