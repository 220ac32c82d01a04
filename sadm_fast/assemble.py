"""A run put together: networks, engines, checkpoints and pictures of one configuration, handed to its Trainer."""

import copy
import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from hashlib import sha256
from typing import Any

from sadm_fast.build import NONE, Own, Undrawn, build_denoiser, resolve_classes
from sadm_fast.config import Config
from sadm_fast.config_training import PowerEMA
from sadm_fast.console import Console
from sadm_fast.data.latents import LatentSource
from sadm_fast.data.source import Source
from sadm_fast.ema import EMA
from sadm_fast.engine.masters import Fragment, named, owned, trainable_shapes
from sadm_fast.engine.players import Players, samples_compared, samples_per_step
from sadm_fast.exchange.reading import STARTING
from sadm_fast.exchange.starting import start_from_weights, starting_facts
from sadm_fast.files import write_json
from sadm_fast.gallery import Gallery, grid_classes, real_grid
from sadm_fast.metrics.judges import ClassifierJudge
from sadm_fast.metrics.pretrained import without_rank
from sadm_fast.metrics.run_evaluation import RunEvaluation, chosen_judges
from sadm_fast.models import Denoiser, StructureEncoder
from sadm_fast.models.autoencoder import Autoencoder
from sadm_fast.pictures import save_picture
from sadm_fast.planning.cost import meta_models
from sadm_fast.precision import tf32
from sadm_fast.pretrain import prepare_judge, prepare_psi
from sadm_fast.ranks.launch import Place
from sadm_fast.ranks.watchdog import Watchdog
from sadm_fast.run import checkpoint
from sadm_fast.run.checkpoint_writer import CheckpointWriter, Snapshots
from sadm_fast.run.facts import data_changes, run_facts
from sadm_fast.run.folder import RunFolder
from sadm_fast.run.manifest import EMA_FILE, MORE_EMA
from sadm_fast.run.snapshots import snapshot_name
from sadm_fast.trainer import Trainer


def assemble(
    config: Config,
    folder: RunFolder,
    source: Source,
    autoencoder: Autoencoder | None,
    place: Place,
    console: Console,
    own: Own = NONE,
) -> Trainer:
    """The trainer of a claimed folder, at its newest whole checkpoint or at step 0. Collective.

    autoencoder: of the latents in `source`, on rank 0, which makes the pictures, and on every rank if Psi sees pixels
        or there are evaluations; None elsewhere.
    own: networks that the caller gives.

    Raises:
        UserError: the folder's checkpoint belongs to another run, or Psi or the judge cannot be had.
    """
    rank, device = place.rank, place.device
    num_classes = resolve_classes(config, source)
    difffit = config.denoiser.train == "difffit"
    starting = starting_facts(config) if difffit else {}
    identity = _identity(config, source, place.world_size, num_classes, own, starting)
    # A checkpoint that does not belong here is found before any training.
    remedies = {
        "data": f"is not what it was: {data_changes(folder.facts, source)}; bring the old one back, or start another"
        f" run (--run-dir) with it, from these weights if you like (--set denoiser.weights=.../{EMA_FILE})",
        "starting_weights": f"are not those of denoiser.weights={config.denoiser.weights} any more; bring the file"
        " back, or start another run (--run-dir)",
        "networks": "has other weights than the denoiser and Psi that are given now; give the same, or start another"
        " run (run_dir)",
    }
    found = checkpoint.find(
        folder.checkpoints,
        identity,
        console.say,
        first={"configuration": config.first_fingerprint()},
        remedies=remedies,
    )
    found = checkpoint.agreed(found, identity)

    psi: StructureEncoder | None = None
    psi_facts: dict[str, Any] = {}
    if config.game.mode != "plain":
        psi, psi_facts = prepare_psi(config, source, folder.pretrained, device, console, own)
    evaluation, judge_facts = _evaluation(config, folder, source, autoencoder, place, console)
    with nullcontext() if found is None else Undrawn():
        denoiser = build_denoiser(config, num_classes, own)
    if found is None or difffit:  # a checkpoint of DiffFit's lacks what is frozen
        start_from_weights(config, denoiser, source.classes if found is None else None)
    fixed = {name: p.detach().clone() for name, p in denoiser.named_parameters() if not p.requires_grad}
    # fp32 networks to look through, only where somebody looks: rank 0 draws, all ranks evaluate.
    viewer: Denoiser | None = None
    if rank == 0 or evaluation is not None:
        with Undrawn():
            viewer = build_denoiser(config, num_classes, own).to(device).eval().requires_grad_(False)
            viewer.load_state_dict(fixed, strict=False)  # the rest is loaded whenever somebody looks
    psi_viewer: StructureEncoder | None = None
    shapes = {"denoiser": trainable_shapes(denoiser)}
    if psi is not None:
        if rank == 0:
            psi_viewer = copy.deepcopy(psi).to(device).eval().requires_grad_(False)
        psi.train()
        shapes["discriminator"] = trainable_shapes(psi)

    with Watchdog(config.train.patience, rank, "starting the engines"):
        see = None
        if psi is not None and config.structure_encoder.input == "pixels":
            assert autoencoder is not None
            see = autoencoder.decode_with_gradient
        players = Players(config, denoiser, psi, device, see)
        engine = players.denoiser
        emas = {}
        for number, profile in enumerate(config.train.profiles):
            ema = EMA(lambda: list(owned(engine)), profile, lambda fragments: named(engine.module, fragments))
            if players.fused:
                ema.join(players.fused["denoiser"])
            emas[f"{MORE_EMA}{profile.label}.safetensors" if number else EMA_FILE] = ema
        writer = CheckpointWriter(
            folder.checkpoints,
            players.engines,
            {name: partial(_average, ema) for name, ema in emas.items()},
            shapes["denoiser"],
            identity=identity,
            fixed=None if difffit else fixed,
            metadata=starting,
            queue=players.queue,
            keep_last=config.train.keep_last,
            keep_every=config.train.keep_every,
            snapshots=_snapshots(config, folder, list(emas)),
            say=console.complain,
        )
    if players.not_compiled is not None:
        console.say(f"train.compile: running eagerly, {players.not_compiled}")
    gallery = Gallery(
        config,
        folder,
        source,
        players,
        {
            profile.label: partial(_average, ema)
            for profile, ema in zip(config.train.profiles, emas.values(), strict=True)
        },
        shapes,
        viewer=viewer,
        psi_viewer=psi_viewer,
        autoencoder=autoencoder,
        evaluation=evaluation,
        device=device,
        console=console,
    )
    trainer = Trainer(
        config, folder, source, players, emas, writer, gallery,
        num_classes=num_classes, null_class=denoiser.null_class, device=device, console=console, own=own,
    )  # fmt: skip
    if found is not None:
        trainer.resume(found)
    if rank == 0:
        folder.rewind(trainer.step, console.say)
        shown = grid_classes(source.filled, config.sampling.columns)
        facts = run_facts(config, source, shapes, psi_facts, judge_facts, place.world_size, shown)
        write_json(folder.facts, facts)
        if config.paints:
            save_picture(real_grid(config, source, device, autoencoder), folder.real_grid)
    return trainer


@tf32(False)
def _evaluation(
    config: Config,
    folder: RunFolder,
    source: Source,
    autoencoder: Autoencoder | None,
    place: Place,
    console: Console,
) -> tuple[RunEvaluation | None, dict[str, Any]]:
    """The real images as the judges see them, if there are evaluations, and what is known of the judge. Collective."""
    if config.evaluate.every is None:
        return None, {}
    classifier: ClassifierJudge | None = None
    facts: dict[str, Any] = {}
    if "classifier" in config.judges:
        classifier, facts = prepare_judge(config, source, folder.pretrained, place.device, console)
    judges = chosen_judges(config, classifier)
    if few := without_rank(judges, config.evaluate.samples):
        console.say(few)
    return RunEvaluation(config, source, judges, source.filled, place.device, autoencoder=autoencoder), facts


def _average(ema: EMA) -> list[Fragment]:
    return ema.average


def _snapshots(config: Config, folder: RunFolder, files: Sequence[str]) -> Snapshots | None:
    every = config.train.ema_snapshot_every
    if every is None:
        return None
    kept = {
        file: snapshot_name(profile.std)
        for file, profile in zip(files, config.train.profiles, strict=True)
        if isinstance(profile, PowerEMA)
    }
    return Snapshots(folder.snapshots, every, kept)


def _identity(
    config: Config, source: Source, world_size: int, num_classes: int, own: Own, starting: Mapping[str, str]
) -> dict[str, Any]:
    """What a checkpoint must agree with to be continued here; JSON values."""
    given = {"starting_weights": starting[STARTING[-1]]} if starting else {}
    if own != NONE:
        shapes = [
            {} if player is None else trainable_shapes(player) for player in meta_models(config, num_classes, own)
        ]
        given["networks"] = sha256(json.dumps(shapes, sort_keys=True).encode()).hexdigest()
    latents = {"latent_space": source.space} if isinstance(source, LatentSource) else {}
    return {
        "configuration": config.fingerprint(),
        "data": source.fingerprint(),
        **latents,
        **given,
        "samples_per_step": samples_per_step(config, world_size),
        "samples_compared": samples_compared(config, world_size),
    }
