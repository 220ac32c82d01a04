"""What has to exist before the game: the models, a well-trained Psi, and the judge of the demo's evaluation."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sadm_fast.build import build_psi, load_psi
from sadm_fast.classifier import accuracy, train_classifier
from sadm_fast.config import ClassifierTraining, Config, StructureEncoderConfig
from sadm_fast.console import Console
from sadm_fast.data import MicroBatchPlan, make_loader
from sadm_fast.data.source import Source, split
from sadm_fast.errors import UserError
from sadm_fast.feed import load_samples, loader_spec
from sadm_fast.files import replacing
from sadm_fast.metrics.judges import ClassifierJudge
from sadm_fast.models import StructureEncoder
from sadm_fast.models.structure_encoder import collect_statistics
from sadm_fast.ranks.collectives import broadcast_json, broadcast_state, is_rank_zero, rank_and_world_size

_HELD_OUT = 0.1  # share of the images that tells the accuracy of Psi and of the judge
_HELD_OUT_AT_MOST = 5000
_JUDGE_SEED = 7919  # added to the run's seed: the judge is not Psi's twin


def check_psi(config: Config, images: Source) -> None:
    """UserError if Psi cannot be what it has to be: its weights do not fit, or there is nothing to train it on."""
    if config.game.mode == "plain":
        return
    if config.structure_encoder.weights is not None:
        load_psi(build_psi(config), Path(config.structure_encoder.weights))
    elif len(images.filled) < 2:
        raise UserError(
            f"structure_encoder.weights=null: Psi is trained to tell classes apart, and data.path={images.where} has"
            " images of only one; give the weights of an encoder trained elsewhere (docs/data.md), or use"
            " game.mode=plain"
        )


def check_judge(config: Config, images: Source) -> None:
    """UserError if there is nothing to train the evaluations' judge on."""
    if config.evaluate.every is not None and len(images.filled) < 2:
        raise UserError(
            f"evaluate.every={config.evaluate.every}: its judge is trained to tell classes apart, and"
            f" data.path={images.where} has images of only one; use evaluate.every=null and score the samples"
            " afterwards"
        )


def prepare_psi(
    config: Config, images: Source, pretrained: Path, device: torch.device, console: Console
) -> tuple[StructureEncoder, dict[str, Any]]:
    """Psi, trained as a classifier on the run's own data or loaded; and what is known of it. Collective."""
    psi = config.structure_encoder
    if psi.weights is not None:
        return load_psi(build_psi(config), Path(psi.weights)), {"weights": psi.weights}
    return _trained(
        "structure encoder", lambda: build_psi(config), psi.pretrain, psi, config, config.seed, images,
        pretrained / "structure_encoder.safetensors", device, console,
    )  # fmt: skip


def prepare_judge(
    config: Config, images: Source, pretrained: Path, device: torch.device, console: Console
) -> tuple[ClassifierJudge, dict[str, Any]]:
    """The classifier whose features `fid_classifier` compares: another architecture and seed than Psi's. Collective."""
    seed = config.seed + _JUDGE_SEED

    def build() -> nn.Module:
        torch.manual_seed(seed)
        return ClassifierJudge(config.sample_shape[0])

    return _trained(
        "judge", build, config.evaluate.judge, None, config, seed, images,
        pretrained / "judge.safetensors", device, console,
    )  # fmt: skip


def _trained(
    what: str,
    build: Callable[[], Any],
    training: ClassifierTraining,
    architecture: StructureEncoderConfig | None,
    config: Config,
    seed: int,
    images: Source,
    path: Path,
    device: torch.device,
    console: Console,
) -> tuple[Any, dict[str, Any]]:
    rank, world = rank_and_world_size()

    def train(module: Any) -> dict[str, Any]:
        rest, held_out = split(images, _HELD_OUT, config.seed)
        plan = MicroBatchPlan(
            num_images=len(rest),
            seed=seed,
            flip=config.data.flip,
            micro_batch=max(1, training.batch // world),
            rank=rank,
            world_size=world,
        )
        loader = make_loader(rest, plan, loader_spec(config), device)
        console.say(f"Training the {what} on {len(rest)} images ({len(held_out)} held out), {training.steps} steps")
        try:
            with console.bar(what, training.steps) as bar, collect_statistics(module):
                head = train_classifier(
                    module,
                    module.feature_dim,
                    len(images.classes),
                    loader,
                    steps=training.steps,
                    lr=training.lr,
                    weight_decay=training.weight_decay,
                    seed=seed,
                    device=device,
                    progress=lambda done, _, loss: bar.at(done, f"loss {loss:.3f}"),
                )
        finally:
            loader.close()
        info: dict[str, Any] = {"steps": training.steps, "held_out_images": len(held_out), "accuracy": None}
        if len(held_out):
            chosen = list(range(0, len(held_out), -(-len(held_out) // _HELD_OUT_AT_MOST)))
            labels = torch.from_numpy(held_out.labels[chosen])
            info["accuracy"] = accuracy(module, head, load_samples(config, held_out, chosen), labels)
        return info

    described = {
        "data": images.fingerprint(),
        "pixels": config.data.model_dump(include={"resolution", "channels", "flip"}),
        "architecture": None if architecture is None else architecture.model_dump(exclude={"weights", "pretrain"}),
        "training": training.model_dump(),
        "seed": seed,
    }
    fingerprint = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
    module, info = load_or_train(path, build, train, fingerprint)
    known = "" if info.get("accuracy") is None else f", accuracy {info['accuracy']:.1%} on held-out images"
    console.say(f"The {what}{known}" + (f" (from {path})" if info["cached"] else ""))
    return module, info


_FORMAT = "sadm_fast.pretrain/1"


def _digest(state: dict[str, Tensor]) -> str:
    """SHA-256 over names, shapes, dtypes and bytes of the tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _read(path: Path, fingerprint: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Weights and info of a sound file with this fingerprint, else None; UserError for a foreign file."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (FileNotFoundError, SafetensorError):
        return None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error}); move it away or fix its permissions") from error
    if metadata.get("format") != _FORMAT:
        raise UserError(f"{path}: exists but was not written by this program; move it away")
    try:
        info = json.loads(metadata["info"])
        sound = metadata["sha256"] == _digest(state)
    except (KeyError, json.JSONDecodeError):
        return None
    return (state, info) if sound and metadata.get("fingerprint") == fingerprint else None


def _write(path: Path, module: nn.Module, info: dict[str, Any], fingerprint: str) -> None:
    """Write weights and info as one safetensors file that appears complete or not at all."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}
    metadata = {
        "format": _FORMAT,
        "fingerprint": fingerprint,
        "info": json.dumps(info),
        "sha256": _digest(state),
    }
    with replacing(path) as temporary:
        save_file(state, temporary, metadata)


def _prepare_folder(path: Path) -> None:
    """Fail before the training, not after it, if the result could not be kept."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        temporary.unlink()
    except OSError as error:
        raise UserError(f"{path.parent}: cannot be written ({error}); choose a writable folder") from error


def load_or_train(
    path: Path, build: Callable[[], nn.Module], train: Callable[[nn.Module], dict[str, Any]], fingerprint: str
) -> tuple[nn.Module, dict[str, Any]]:
    """The module of `build` with the weights kept at `path`, or trained by `train` and then kept there.

    `train` changes the module in place and returns what is to be known about it, for example {"accuracy":
    0.98}: JSON values only. `fingerprint` names everything the weights depend on (architecture, data, seed,
    steps): a file with another one, a damaged or a missing file mean training again. The file is safetensors
    with that dictionary in its header, so nothing is unpickled. Returns the module in eval mode and the
    dictionary plus "cached": True or False.

    Under torch.distributed every rank calls this (and `train` on a miss); rank 0 alone reads and writes, and
    all ranks get its weights and its dictionary. Raises UserError, on all ranks and before any training, when
    `path` holds a file of other origin or its folder cannot be written.
    """
    found: tuple[dict[str, Tensor], dict[str, Any]] | None = None
    problem: str | None = None
    if is_rank_zero():
        try:
            found = _read(path, fingerprint)
            if found is None:
                _prepare_folder(path)
        except UserError as error:
            problem = str(error)
    hit, info, problem = broadcast_json([found is not None, found[1] if found else {}, problem])
    if problem is not None:
        raise UserError(problem)

    module = build()
    if hit:
        if found is not None:
            module.load_state_dict(found[0], strict=True)
    else:
        info = broadcast_json(train(module))
        if is_rank_zero():
            try:
                _write(path, module, info, fingerprint)
            except (OSError, SafetensorError) as error:
                problem = f"{path}: cannot be written ({error}); free some space or choose another folder"
        problem = broadcast_json(problem)
        if problem is not None:
            raise UserError(problem)
    broadcast_state((module,))
    return module.eval(), {**info, "cached": hit}
