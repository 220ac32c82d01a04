"""Training and sampling from Python: with a denoiser, a structure encoder or data of your own (docs/extending.md)."""

import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from sadm_fast.build import Own, resolve_classes
from sadm_fast.config import Config, check_config, load_config
from sadm_fast.console import Console
from sadm_fast.data.latents import LatentSource
from sadm_fast.data.samples import SampleSource
from sadm_fast.data.source import Source
from sadm_fast.encoding import check_autoencoder
from sadm_fast.feed import count_classes, open_data
from sadm_fast.generation import Trained, load_trained
from sadm_fast.models import Denoiser, StructureEncoder
from sadm_fast.models.autoencoder import Autoencoder
from sadm_fast.precision import kept_precision, settle_precision
from sadm_fast.ranks import environment
from sadm_fast.ranks.collectives import barrier, first_on_rank_zero, only_on_rank_zero
from sadm_fast.ranks.launch import distributed, own_device
from sadm_fast.ranks.stopping import StopRequest
from sadm_fast.run.folder import RunFolder

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # that a StopRequest hears


def train(
    config: Config | Mapping[str, Any] | str | Path,
    *,
    denoiser: Callable[[int], Denoiser] | None = None,
    psi: Callable[[], StructureEncoder] | None = None,
    data: Source | None = None,
    run_dir: str | Path | None = None,
    request: StopRequest | None = None,
) -> bool:
    """Train a run, or continue it: what train.py does, with parts of your own. Every rank calls it alike.

    Call it in the main thread; started by `deepspeed` or `torchrun`, a program that calls it trains on all ranks.

    Args:
        config: a Config, the same as nested dictionaries, or the path of its JSON file.
        denoiser: makes the denoiser for a number of classes, each time anew and alike: it is called with torch's seed
            set to the run's, and under torch.device("meta") to count its cost. None: what config.denoiser says.
        psi: makes the structure encoder, likewise. None: what config.structure_encoder says.
        data: an Arrays, or another Source, the same on every rank. None: what config.data says.
        run_dir: the run's folder. None: runs/NAME.
        request: how it is asked to stop. None: by SIGTERM, SIGUSR1 or Ctrl-C, during this call.

    Returns:
        True when the last step is reached; False when it was asked to stop: the same call continues.

    Raises:
        UserError: what is wrong with the configuration, the data, the networks or the folder, in one line.
        LostRank: another rank is gone.
    """
    own = Own(denoiser, psi)
    config = _completed(config, own, data)
    folder = RunFolder(run_dir or Path("runs") / config.name)
    config = kept_precision(config, folder.config)
    folder.check(config)
    with _heard(request) as request, distributed() as place:
        from sadm_fast.assemble import assemble  # DeepSpeed must not be imported before `distributed`
        from sadm_fast.start_checks import check_memory, check_start

        console = Console(place.rank)
        config, about_bf16 = settle_precision(config, place.device)
        source = first_on_rank_zero(lambda: open_data(config, console, check=place.rank == 0, own=data))
        num_classes = resolve_classes(config, source)
        autoencoder = None
        looks = config.structure_encoder.input == "pixels" and config.game.mode != "plain"
        everywhere = looks or config.evaluate.every is not None
        latents = config.latents
        if latents is not None and latents.autoencoder is not None and (place.rank == 0 or everywhere):
            # Rank 0 makes the pictures; Psi may look through it on all, and all draw for evaluations.
            assert isinstance(source, LatentSource)
            autoencoder = Autoencoder.load(
                latents.autoencoder,
                device=place.device,
                precision="bf16" if looks and config.train.precision == "bf16" else "fp32",
                scale=latents.scale,
            )
            autoencoder.require_space(source.space, f"data.path={source.where}")
            check_autoencoder(config, autoencoder)
        check_start(config, source, num_classes, folder, place.world_size, own)
        # Rank 0, which draws the pictures, needs most.
        only_on_rank_zero(
            lambda: check_memory(config, num_classes, place.world_size, place.device, environment.ranks_here(), own)
        )
        pictures = config.paints
        barrier()  # nobody takes the folder while another rank still checks it
        with folder.held(config, console.say):
            of = f"{'images' if pictures else 'samples'} of {count_classes(source, num_classes)}"
            console.say(
                f"{config.name}: {config.game.mode}, {len(source)} {of}, "
                f"{place.world_size} rank(s) on {place.device}, into {folder.path}"
            )
            if about_bf16 is not None:
                console.say(about_bf16)
            trainer = assemble(config, folder, source, autoencoder, place, console, own)
            finished = trainer.run(request)
        if finished:
            last = folder.samples / f"step-{trainer.step:06d}-ema"
            console.say(f"pictures: {last}.png" if pictures else f"samples: {last}.npz")
        else:
            console.say(f"stopped at step {trainer.step} of {config.train.steps}; the same command continues")
        console.say(f"report: {folder.path / 'report.html'}")
    return finished


def load(
    run: str | Path,
    *,
    denoiser: Callable[[int], Denoiser] | None = None,
    ema: str | None = None,
    device: torch.device | None = None,
) -> Trained:
    """Load a run's averaged denoiser; `Trained.sample` draws from it.

    Args:
        run: the run's folder, or that of one of its checkpoints.
        denoiser: as given to `train`.
        ema: which average, as sample.py's --ema; None: the first.
        device: None: a GPU if there is one.

    Raises:
        UserError: as generation.load_trained.
    """
    where = own_device() if device is None else device
    return load_trained(Path(run), where, Console(environment.rank()).complain, ema=ema, own=Own(denoiser))


def _completed(config: Config | Mapping[str, Any] | str | Path, own: Own, data: Source | None) -> Config:
    """The configuration with what the caller gives in it: `own` where it is its own, and the shape of a sample."""
    if isinstance(config, str | Path):
        config = load_config(config)
    raw = config.resolved() if isinstance(config, Config) else dict(config)
    given: dict[str, dict[str, Any]] = {
        "denoiser": {} if own.denoiser is None else {"architecture": "own"},
        "structure_encoder": {} if own.psi is None else {"architecture": "own"},
        "data": {} if data is None else {"source": "own", "path": data.where},
    }
    if isinstance(data, SampleSource):
        picture = len(data.shape) == 3 and data.shape[0] in (1, 3) and data.shape[1] == data.shape[2] >= 8
        given["data"] |= (
            {"channels": data.shape[0], "resolution": data.shape[1], "shape": None}
            if picture
            else {"shape": list(data.shape)}
        )
    for block, fields in given.items():
        there = raw.get(block, {})
        if fields and isinstance(there, Mapping):
            raw[block] = {**there, **fields}
    return check_config(raw)


@contextmanager
def _heard(request: StopRequest | None) -> Iterator[StopRequest]:
    """`request`, or one that hears signals until the end of the block."""
    if request is not None:
        yield request
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    try:
        yield StopRequest()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
