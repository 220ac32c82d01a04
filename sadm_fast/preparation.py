"""What has to exist before the game: the models, a well-trained Psi, and the judge of the demo's evaluation."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sadm_fast.config import ClassifierTraining, Config, StructureEncoderConfig
from sadm_fast.console import Console
from sadm_fast.data.source import Source, split
from sadm_fast.errors import UserError
from sadm_fast.feed import load_samples, make_feed
from sadm_fast.metrics.judges import ClassifierJudge
from sadm_fast.models import DiT, ResNet18, SmallCNN, StructureEncoder
from sadm_fast.models.structure_encoder import collect_statistics
from sadm_fast.pretrain import accuracy, load_or_train, train_classifier

_HELD_OUT = 0.1  # share of the images that tells the accuracy of Psi and of the judge
_HELD_OUT_AT_MOST = 5000
_JUDGE_SEED = 7919  # added to the run's seed: the judge is not Psi's twin


_DRAWS = {Tensor.uniform_, Tensor.normal_, nn.init.uniform_, nn.init.normal_, nn.init.kaiming_uniform_}


class Undrawn(TorchFunctionMode):
    """Modules that are built inside do not draw their weights, because somebody loads all of them at once."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _DRAWS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def build_denoiser(config: Config, num_classes: int) -> DiT:
    """The denoiser with weights drawn from the run's seed; on the CPU (or the default device)."""
    denoiser = config.denoiser
    channels, side, _ = config.sample_shape
    torch.manual_seed(config.seed)
    common: dict[str, Any] = {
        "input_size": side,
        "in_channels": channels,
        "out_channels": config.process.output_channels(channels),
        "num_classes": num_classes,
        "activation_checkpointing": config.train.activation_checkpointing,
    }
    if denoiser.name is not None:
        return DiT.from_name(denoiser.name, **common)
    return DiT(
        patch_size=denoiser.patch_size,
        hidden_size=denoiser.hidden_size,
        depth=denoiser.depth,
        num_heads=denoiser.num_heads,
        **common,
    )


def start_from_weights(config: Config, denoiser: DiT) -> None:
    """Load denoiser.weights, if given: a whole DiT state in safetensors, for fine-tuning.

    A label table for another number of classes is left as it was drawn, which is what fine-tuning on another dataset
    wants. Raises UserError for a file that cannot be read or does not fit otherwise.
    """
    path = config.denoiser.weights
    if path is None:
        return
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"denoiser.weights={path}: cannot be read as safetensors ({error})") from None
    table = "y_embedder.embedding_table.weight"
    own = denoiser.state_dict()
    if table in state and state[table].shape[1:] == own[table].shape[1:] and len(state[table]) != len(own[table]):
        state[table] = own[table]
    try:
        denoiser.load_state_dict(state, strict=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"denoiser.weights={path}: does not fit this configuration's denoiser ({reason})") from None


def build_psi(config: Config) -> StructureEncoder:
    """An untrained structure encoder; weights from the run's seed."""
    psi, channels = config.structure_encoder, config.sample_shape[0]
    torch.manual_seed(config.seed)
    if psi.architecture == "resnet18":
        return ResNet18(channels, psi.stem, psi.norm)
    return SmallCNN(channels, psi.width, psi.feature_dim)


def resolve_classes(config: Config, images: Source) -> int:
    """num_classes of the run; UserError if the configuration asks for fewer than there are folders."""
    there, asked = len(images.classes), config.denoiser.num_classes
    if asked is not None and asked < there:
        raise UserError(
            f"denoiser.num_classes={asked}: data.path={images.where} has {there} classes; use {there} or null"
        )
    return there if asked is None else asked


def check_psi(config: Config, images: Source) -> None:
    """UserError if Psi cannot be what it has to be: its weights do not fit, or there is nothing to train it on."""
    if config.game.mode == "plain":
        return
    if config.structure_encoder.weights is not None:
        _load_psi(build_psi(config), Path(config.structure_encoder.weights))
    elif len(images.classes) < 2:
        raise UserError(
            f"structure_encoder.weights=null: Psi is trained to tell classes apart, and data.path={images.where} has"
            " only one; give the weights of an encoder trained elsewhere (docs/data.md), or use game.mode=plain"
        )


def check_judge(config: Config, images: Source) -> None:
    """UserError if there is nothing to train the evaluations' judge on."""
    if config.evaluate.every is not None and len(images.classes) < 2:
        raise UserError(
            f"evaluate.every={config.evaluate.every}: its judge is trained to tell classes apart, and"
            f" data.path={images.where} has only one; use evaluate.every=null and score the samples afterwards"
        )


def prepare_psi(
    config: Config, images: Source, pretrained: Path, device: torch.device, console: Console
) -> tuple[nn.Module, dict[str, Any]]:
    """Psi, trained as a classifier on the run's own data or loaded; and what is known of it. Collective."""
    psi = config.structure_encoder
    if psi.weights is not None:
        return _load_psi(build_psi(config), Path(psi.weights)), {"weights": psi.weights}
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
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

    def train(module: Any) -> dict[str, Any]:
        rest, held_out = split(images, _HELD_OUT, config.seed)
        loader = make_feed(
            config,
            rest,
            seed=seed,
            micro_batch=max(1, training.batch // world),
            rank=rank,
            world_size=world,
            device=device,
        )
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


def _load_psi(module: nn.Module, path: Path) -> nn.Module:
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"structure_encoder.weights={path}: cannot be read as safetensors ({error})") from None
    state = {name: value for name, value in state.items() if not name.startswith("fc.")}
    try:
        module.load_state_dict(state, strict=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"structure_encoder.weights={path}: does not fit {type(module).__name__} ({reason});"
            " torchvision's resnet18 needs architecture=resnet18, stem=imagenet, norm=frozen, channels=3"
        ) from None
    return module.eval()
