"""A finished (or stopped) run, for use: its configuration, classes and averaged denoiser; samples drawn from it."""

from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sadm_fast.build import NONE, Own, Undrawn, build_denoiser, load_weights
from sadm_fast.config import Config, check_config
from sadm_fast.config_tree import override
from sadm_fast.counters import Purpose, normal
from sadm_fast.diffusion import guided, sample
from sadm_fast.diffusion.process import Steps
from sadm_fast.diffusion.samplers import sampler_name
from sadm_fast.errors import UserError
from sadm_fast.exchange.reading import STARTING, find_weights
from sadm_fast.exchange.starting import classes_of_weights, start_from_weights, starting_facts
from sadm_fast.files import parse_json
from sadm_fast.models import Denoiser
from sadm_fast.models.autoencoder import DECODED_AT_ONCE, Autoencoder
from sadm_fast.models.dit import without_gammas
from sadm_fast.precision import allow_tf32, slow_bf16
from sadm_fast.run import checkpoint
from sadm_fast.run.folder import RunFolder
from sadm_fast.run.manifest import EMA_FILE, MORE_EMA, Damaged, OtherFormat, step_of
from sadm_fast.run.snapshots import reconstructed


class Trained(NamedTuple):
    """What sampling and evaluation need of a run, or of weights alone."""

    config: Config
    classes: list[str]
    filled: list[int]  # the labels that it was trained on, of those of `classes`
    model: Denoiser  # averaged weights, eval mode
    step: int | None  # None: weights alone, of which it is not known
    latent_space: dict[str, Any] | None  # of the autoencoder it was trained with; None: not known, or it paints pixels
    checkpoint: Path  # its folder, or the file of weights
    sha256: str  # of the file of the weights; of their values where they are made of several
    ema: dict[str, Any] | None  # the profile of the average; None: weights alone, of which it is not known
    precision: str = "fp32"  # of the network's arithmetic
    starting_weights: str | None = None  # the sha256 of what DiffFit started from; None: there is no such part

    def at(self, precision: str, say: Callable[[str], None] | None = None) -> "Trained":
        """The same in another arithmetic; the network is converted in place.

        "fp32"; "tf32": fp32 with GPUs' TF32, for all that the process computes; "bf16": the network as a training in
        bf16 calls it. The sampler's own arithmetic stays. Raises UserError for tf32 where there is no GPU.

        say: told if bf16 is slower than fp32 here.
        """
        device = next(self.model.parameters()).device
        if precision == "bf16" and say is not None and (slow := slow_bf16(device)):
            say(slow)
        if precision == "tf32" and device.type != "cuda":
            raise UserError("--precision tf32: only GPUs have it; use fp32 or bf16")
        allow_tf32(precision == "tf32")
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        return self._replace(model=self.model.to(dtype), precision=precision)

    def autoencoder(self, device: torch.device, path: str | None = None) -> Autoencoder | None:
        """What turns its samples into images, from `path` or where the run had it; None if they are images.

        Raises UserError if it cannot be loaded or is not the one of the training.
        """
        latents = self.config.latents
        if latents is None:
            if path is not None:
                raise UserError(f"--autoencoder {path}: {self.checkpoint} paints pixels; leave it out")
            return None
        path = path or latents.autoencoder
        if path is None:
            raise UserError(f"{self.checkpoint}: paints latents, and the run had no autoencoder; give --autoencoder")
        loaded = Autoencoder.load(path, device=device, scale=latents.scale)
        if self.latent_space is not None:
            loaded.require_space(self.latent_space, f"checkpoint {self.checkpoint}")
        return loaded

    def sample(self, labels: Sequence[int] | np.ndarray | Tensor, *, first: int = 0, batch: int = 250) -> Tensor:
        """Draw samples number `first`, `first` + 1, ... of `labels` [N] as config.sampling says, `batch` at a time.

        Returns float32 [N, C, ...] on the CPU: images in about [-1, 1], scaled latents, or what the data were.
        """
        device, sampling = next(self.model.parameters()).device, self.config.sampling
        wanted = torch.as_tensor(labels, dtype=torch.long, device=device)
        ids = torch.arange(first, first + len(wanted), device=device)
        drawn = [
            generate(
                self.config, self.model, of_batch, numbers,
                steps=sampling.steps, guidance_scale=sampling.guidance_scale,
            ).cpu()
            for of_batch, numbers in zip(wanted.split(batch), ids.split(batch), strict=True)
        ]  # fmt: skip
        return torch.cat(drawn)

    def facts(self) -> dict[str, Any]:
        """Which weights these are and how they are used, for the record beside what is made with them."""
        file = str(self.checkpoint)
        facts = {
            "file": file, "sha256": self.sha256, "step": self.step, "ema": self.ema, "precision": self.precision
        }  # fmt: skip
        return facts if self.starting_weights is None else {**facts, "starting_weights": self.starting_weights}


def load_trained(
    run: Path,
    device: torch.device,
    say: Callable[[str], None],
    overrides: Sequence[str] = (),
    ema: str | None = None,
    own: Own = NONE,
) -> Trained:
    """Averaged weights of a run's newest whole checkpoint; damaged ones are named by `say`.

    Args:
        run: the run's folder, or that of one of its checkpoints.
        overrides: as --set, of `seed` and `sampling` only, and for DiffFit of `denoiser.weights`, which may have moved.
        ema: which average: the label of one that the run keeps, or a number, the relative width of a power-function
            average, which is made of the run's snapshots if the checkpoint does not hold it. None: train.ema.
        own: the denoiser of a run whose caller gave it.

    Raises:
        UserError: the folder holds no run, no checkpoint that is whole, or no such average.
    """
    asked = run if step_of(run) is not None and run.parent.name == "checkpoints" else None
    folder = RunFolder(run.parent.parent if asked else run)
    try:
        raw = parse_json(folder.config.read_bytes())
        moved = ("denoiser.weights=",) if check_config(raw).denoiser.train == "difffit" else ()
        for text in overrides:
            if not text.startswith(("sampling.", "seed=", *moved)):
                raise UserError(f"--set {text}: of a trained run only sampling.* can be changed")
            override(raw, text)
        config = check_config(raw)
        facts = parse_json(folder.facts.read_bytes())
        classes = [str(name) for name in facts["classes"]]
        empty = set(facts.get("empty_classes", ()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{run}: holds no run that can be read ({error})") from None
    found = next(checkpoint.whole(folder.checkpoints, say), None) if asked is None else _whole(asked)
    if found is None:
        raise UserError(f"{run}: has no whole checkpoint yet; train first")
    with Undrawn():
        model = build_denoiser(config, config.denoiser.num_classes or len(classes), own)
    model = model.to(device).eval().requires_grad_(False)
    if config.denoiser.train == "difffit":
        _start_again(config, found, model)
    space = found.manifest.latent_space
    state, digest, profile = _average(config, folder, found, ema)
    try:
        load_weights(model, state)
        if config.latents is not None and space is None:
            raise RuntimeError("it does not say which autoencoder it was trained with")
    except RuntimeError as error:
        raise UserError(f"{found.folder}: does not fit the run's config.json ({error})") from None
    filled = [label for label in range(len(classes)) if label not in empty]
    return Trained(
        config, classes, filled, model, found.manifest.step, space, found.folder, digest, profile,
        starting_weights=found.manifest.starting_weights,
    )  # fmt: skip


def _start_again(config: Config, found: checkpoint.Found, model: Denoiser) -> None:
    """Load what DiffFit has left as it was; UserError if the starting weights are gone, or others."""
    if starting_facts(config)[STARTING[-1]] != found.manifest.starting_weights:
        raise UserError(
            f"denoiser.weights={config.denoiser.weights}: is not what {found.folder} was trained on; its sha256 is"
            f" {found.manifest.starting_weights}: give that file (--set denoiser.weights=...)"
        )
    start_from_weights(config, model)


def merged(trained: Trained) -> Trained:
    """The same network without DiffFit's scale factors, to rounding: a plain one, and its configuration."""
    if trained.config.denoiser.train != "difffit":
        return trained
    config = _plain(trained.config)
    with Undrawn():
        model = build_denoiser(config, trained.model.num_classes)
    model.load_state_dict(without_gammas(trained.model.state_dict()))
    return trained._replace(config=config, model=model.eval().requires_grad_(False))


def _plain(config: Config) -> Config:
    """The configuration of a whole denoiser, however it was trained."""
    denoiser = config.denoiser.model_copy(update={"train": "all", "label_map": None})
    return config.model_copy(update={"denoiser": denoiser})


def _average(
    config: Config, run: RunFolder, found: checkpoint.Found, ema: str | None
) -> tuple[dict[str, Tensor], str, dict[str, Any]]:
    """The state of an average (`load_trained`), its sha256, and its profile; UserError if there is none such."""
    profiles = {profile.label: profile for profile in config.train.profiles}
    label = config.train.ema.label if ema is None else ema
    std = _number(label)
    if std is not None:
        label = f"power-{std:g}"
    if label in profiles:
        name = EMA_FILE if label == config.train.ema.label else f"{MORE_EMA}{label}.safetensors"
        try:
            state = load_file(found.folder / name)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{found.folder / name}: cannot be read ({error})") from None
        return state, found.manifest.files[name], profiles[label].model_dump(mode="json")
    if std is None or not 1e-3 <= std < 0.28:
        raise UserError(f"--ema {ema}: must be one of {', '.join(profiles)}, or a number from 0.001 to 0.28")
    state = reconstructed(run.snapshots, found.manifest.step, std)
    digest = sha256()
    for name in sorted(state):
        digest.update(name.encode() + state[name].numpy().tobytes())
    return state, digest.hexdigest(), {"profile": "power", "std": std, "made_of": "snapshots"}


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _whole(folder: Path) -> checkpoint.Found:
    """The checkpoint in `folder`; UserError if it is not whole."""
    try:
        return checkpoint.Found(folder, checkpoint.read(folder))
    except (Damaged, OtherFormat) as problem:
        raise UserError(f"checkpoint {folder}: cannot be used ({problem})") from None


def load_alone(config: Config, device: torch.device) -> Trained:
    """The weights of denoiser.weights, as they are, without a run; its classes are named by their numbers.

    Raises:
        UserError: as exchange.starting, or their label table is for another number of classes than asked for.
    """
    path = config.denoiser.weights
    assert path is not None
    config = _plain(config)
    classes = classes_of_weights(config)
    with Undrawn():
        model = build_denoiser(config, classes)
    start_from_weights(config, model)
    model = model.to(device).eval().requires_grad_(False)
    names, file = [str(label) for label in range(classes)], find_weights("denoiser.weights", path)
    return Trained(config, names, list(range(classes)), model, None, None, file, checkpoint.sha256(file), None)


def sampling_facts(config: Config) -> dict[str, Any]:
    """How samples are drawn, every setting that has a say, for the record beside them."""
    sampling = config.sampling
    name = sampler_name(sampling.sampler, config.process)
    return {
        "process": config.diffusion.model_dump(mode="json"),
        "sampler": {"name": name, "steps": sampling.steps, **sampling.options(name)},
        "guidance": {
            "scale": sampling.guidance_scale,
            "channels": sampling.guidance_channels,
            "interval": sampling.guidance_interval,
        },
        "clip_denoised": sampling.clip_denoised,
        "seed": config.seed,
    }


def to_images(samples: Tensor, autoencoder: Autoencoder | None) -> Tensor:
    """Samples as images float32 [B, C, H, W] in about [-1, 1]: decoded if they are latents (of this autoencoder)."""
    if autoencoder is None:
        return samples
    return torch.cat([autoencoder.decode(part) for part in samples.split(DECODED_AT_ONCE)])


def generate(
    config: Config,
    model: Denoiser,
    labels: Tensor,
    ids: Tensor,
    *,
    steps: Steps,
    guidance_scale: float,
    guide: Denoiser | None = None,
) -> Tensor:
    """Samples of `labels` [B], drawn as config.sampling says but for steps and guidance: float32 [B, C, ...].

    All noise, the steps' too, is a function of (seed, id): a sample is the same in any batch and on any rank.

    guide: of autoguidance; None: guidance is classifier-free.
    """
    sampling, process, shape = config.sampling, config.process, config.sample_shape
    denoise = guided(
        process,
        model,
        labels,
        model.null_class,
        guidance_scale,
        channels=sampling.guidance_channels,
        interval=sampling.guidance_interval,
        guide=guide,
        clip=sampling.clip_denoised,
    )
    name = sampler_name(sampling.sampler, process)
    return sample(
        process,
        denoise,
        normal(config.seed, Purpose.SAMPLE_NOISE, ids, shape),
        steps,
        name,
        lambda step: normal(config.seed, Purpose.STEP_NOISE, ids, shape, step),
        **sampling.options(name),
    )
