"""Psi and the judge before the game: two networks trained as classifiers on the run's own data, and kept.

A share of every class is held out, and tells the accuracy that the report shows.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sadm_fast.build import NONE, Own, Undrawn, build_psi
from sadm_fast.classifier import accuracy, train_classifier
from sadm_fast.config import Config
from sadm_fast.config_block import ClassifierTraining, PsiTraining
from sadm_fast.config_tree import without_later
from sadm_fast.console import Console
from sadm_fast.counters import Purpose, uniform
from sadm_fast.data import MicroBatchPlan, make_loader
from sadm_fast.data.batch import ImageBatch
from sadm_fast.data.order import SampleOrder
from sadm_fast.data.source import Source, split
from sadm_fast.errors import UserError
from sadm_fast.exchange.starting import load_psi
from sadm_fast.feed import load_samples, loader_spec
from sadm_fast.metrics.judges import ClassifierJudge
from sadm_fast.models import StructureEncoder
from sadm_fast.models.structure_encoder import collect_statistics
from sadm_fast.ranks.collectives import rank_and_world_size
from sadm_fast.run.checkpoint import load_player
from sadm_fast.train_once import load_or_train

PSI_FILE, JUDGE_FILE = "structure_encoder.safetensors", "judge.safetensors"

_HELD_OUT = 0.1  # share of each class that tells the accuracy
_HELD_OUT_AT_MOST = 5000  # images that are classified for it
_JUDGE_SEED = 7919  # added to the run's seed, modulo 2^64: the judge is not Psi's twin


@dataclass(frozen=True)
class _Classifier:
    """One of the two networks, and what its weights depend on."""

    what: str  # its name in messages
    build: Callable[[], Any]  # a module with `feature_dim`
    training: ClassifierTraining
    seed: int
    architecture: dict[str, Any] | None  # fields of the configuration; None: it has none


def prepare_psi(
    config: Config, images: Source, pretrained: Path, device: torch.device, console: Console, own: Own = NONE
) -> tuple[StructureEncoder, dict[str, Any]]:
    """Load Psi, or train it on the run's own data; return it with what is known about it. Collective."""
    psi = config.structure_encoder
    if psi.weights is not None:
        return load_psi(config, psi.weights, own), {"weights": psi.weights}
    tree = without_later({"structure_encoder": psi.model_dump(exclude={"weights", "pretrain"})})
    architecture = tree["structure_encoder"]
    if psi.architecture == "own":
        with Undrawn():
            architecture["network"] = str(build_psi(config, own))
    network = _Classifier("structure encoder", lambda: build_psi(config, own), psi.pretrain, config.seed, architecture)
    return _prepare(network, pretrained / PSI_FILE, config, images, device, console)


def psi_after_the_game(
    config: Config, images: Source, pretrained: Path, checkpoint: Path, device: torch.device, console: Console
) -> StructureEncoder | None:
    """Psi in eval mode, as the training left it in a checkpoint. Collective.

    None where S is no function of xhat0: in plain training and with game.look_at=hidden.

    Raises:
        UserError: the checkpoint holds no discriminator, or another one.
    """
    game = config.game
    if game.mode == "plain" or game.look_at != "estimate":
        return None
    psi, _ = prepare_psi(config, images, pretrained, device, console)
    if game.mode == "sadm":
        load_player(checkpoint, "discriminator", psi)
    if config.comparison.of_maps:
        psi.map_stage = game.stage
    return psi.to(device).eval()


def prepare_judge(
    config: Config, images: Source, pretrained: Path, device: torch.device, console: Console
) -> tuple[ClassifierJudge, dict[str, Any]]:
    """Load or train the judge of `fid_classifier`: of another architecture and seed than Psi. Collective."""
    seed = (config.seed + _JUDGE_SEED) % 2**64

    def build() -> ClassifierJudge:
        torch.manual_seed(seed)
        return ClassifierJudge(config.sample_shape[0])

    network = _Classifier("judge", build, config.evaluate.judge, seed, None)
    return _prepare(network, pretrained / JUDGE_FILE, config, images, device, console)


def why_no_classifier(config: Config, images: Source) -> str | None:
    """Say why these images cannot train and test a classifier; None if they can."""
    if len(images.filled) < 2:
        return f"data.path={images.where} has images of only one class"
    try:
        split(images, _HELD_OUT, config.seed)
    except UserError as error:
        return str(error)
    return None


def _prepare(
    network: _Classifier, path: Path, config: Config, images: Source, device: torch.device, console: Console
) -> tuple[Any, dict[str, Any]]:
    """Load the network from `path`, or train it and keep it there. Collective."""
    depends_on = {
        "data": images.fingerprint(),
        "pixels": config.data.model_dump(include={"resolution", "channels", "flip"})
        | ({} if config.data.shape is None else {"shape": config.data.shape}),
        "architecture": network.architecture,
        "training": _told(network.training),
        "seed": network.seed,
    }
    fingerprint = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()

    def train(module: Any) -> dict[str, Any]:
        return _train(network, module, config, images, device, console)

    module, info = load_or_train(path, network.build, train, fingerprint)
    known = "" if info.get("accuracy") is None else f", accuracy {info['accuracy']:.1%} on held-out images"
    if not network.training.steps:
        known = ", untrained"
    console.say(f"The {network.what}{known}" + (f" (from {path})" if info["cached"] else ""))
    return module, info


def _train(
    network: _Classifier, module: Any, config: Config, images: Source, device: torch.device, console: Console
) -> dict[str, Any]:
    """Train `module` in place on all but the held-out images; return what is known about it then. Collective."""
    training = network.training
    if not training.steps:
        module.to(device)
        return {"steps": 0, "accuracy": None}
    rank, world_size = rank_and_world_size()
    rest, held_out = split(images, _HELD_OUT, config.seed)
    plan = MicroBatchPlan(
        num_images=len(rest),
        seed=network.seed,
        flip=config.data.flip,
        micro_batch=max(1, training.batch // world_size),
        rank=rank,
        world_size=world_size,
    )
    loader = make_loader(rest, plan, loader_spec(config), device)
    wrong = _shuffled(training)
    batches = _with_shuffled_labels(loader, rest, network.seed) if wrong else loader
    on = f"{len(rest)} images{' with shuffled labels' if wrong else ''} ({len(held_out)} held out)"
    console.say(f"Training the {network.what} on {on}, {training.steps} steps")
    try:
        with console.bar(network.what, training.steps) as bar, collect_statistics(module):
            head = train_classifier(
                module,
                module.feature_dim,
                len(images.classes),
                batches,
                steps=training.steps,
                lr=training.lr,
                weight_decay=training.weight_decay,
                seed=network.seed,
                device=device,
                shift=config.data.shape is None,
                progress=lambda done, _, loss: bar.at(done, f"loss {loss:.3f}"),
            )
    finally:
        loader.close()
    chosen = list(range(0, len(held_out), -(-len(held_out) // _HELD_OUT_AT_MOST)))
    labels = torch.from_numpy(held_out.labels[chosen])
    return {
        "steps": training.steps,
        **({"labels": "shuffled"} if wrong else {}),
        "held_out_images": len(held_out),
        "accuracy": accuracy(module, head, load_samples(config, held_out, chosen), labels),
    }


def _shuffled(training: ClassifierTraining) -> bool:
    return isinstance(training, PsiTraining) and training.labels == "shuffled"


def _told(training: ClassifierTraining) -> dict[str, Any]:
    """The training as a part of a fingerprint; `labels` is younger than many files, so its default is left out."""
    return training.model_dump(exclude=None if _shuffled(training) else {"labels"})


def _with_shuffled_labels(batches: Iterable[ImageBatch], images: Source, seed: int) -> Iterator[ImageBatch]:
    """The batches of a plan over `images` with this seed, each image with the label of one drawn for it.

    The labels are permuted by (seed, image number): classes keep their sizes, and all ranks and epochs agree.
    """
    draw = uniform(seed, Purpose.LABEL_SHUFFLE, torch.arange(len(images)))[:, 0]
    labels = torch.from_numpy(images.labels[np.argsort(draw.numpy(), kind="stable")])
    order = SampleOrder(len(images), seed)
    for batch in batches:
        numbers = torch.from_numpy(order.images(batch.sample_ids.cpu().numpy()))
        yield batch._replace(labels=labels[numbers].to(batch.labels.device))
