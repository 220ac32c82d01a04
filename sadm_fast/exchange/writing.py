"""Weights for other programs: a folder with the weights, the configuration and a model card."""

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from sadm_fast.config import Config
from sadm_fast.config_tree import without
from sadm_fast.diffusion import VP
from sadm_fast.errors import UserError
from sadm_fast.exchange.card import model_card
from sadm_fast.exchange.diffusers import PIPELINE_NULL_CLASS, fitted_steps, save_pipeline
from sadm_fast.files import write_json, write_text
from sadm_fast.models import Denoiser, DiT
from sadm_fast.models.autoencoder import Autoencoder
from sadm_fast.models.dit import difffit_trains

FORMS = {"diffusers": "", "safetensors": "model.safetensors", "dit": "model.pt"}  # and the file of weights
CONFIG_FILE = "sadm_fast.json"

_OF_THE_TRAINING = ("data.path", "latents.images", "denoiser.weights", "structure_encoder.weights")


def check_export(form: str, config: Config, denoiser: Denoiser, steps: int) -> None:
    """UserError if the weights cannot be had in this form, one of FORMS."""
    if form != "diffusers":
        return
    here = config.sample_shape[1] // config.denoiser.patch
    for fits, problem in (
        (isinstance(denoiser, DiT), f"has no pipeline for a {type(denoiser).__name__}"),
        (config.latents is not None, "its DiTPipeline decodes latents, and this denoiser paints pixels"),
        (
            isinstance(config.process, VP),
            f"its DiTPipeline samples vp, and this is diffusion.process={config.diffusion.process}",
        ),
        (config.denoiser.position_grid in (None, here), "its DiT has no stretched positions (denoiser.position_grid)"),
        (
            denoiser.num_classes <= PIPELINE_NULL_CLASS,
            f"its DiTPipeline takes label {PIPELINE_NULL_CLASS} for no class, here are {denoiser.num_classes} classes",
        ),
    ):
        if not fits:
            raise UserError(f"--to diffusers: {problem}; use --to safetensors")
    if steps:
        try:
            fitted_steps(steps)
        except ValueError as error:
            raise UserError(f"--steps {error}, or 0") from None


def export(
    out: Path,
    form: str,
    config: Config,
    denoiser: Denoiser,
    *,
    classes: Sequence[str],
    autoencoder: Autoencoder | None,
    steps: int,
    scores: Any,
    record: dict[str, Any],
    apart: Mapping[str, str] | None = None,
) -> None:
    """Write the folder `out`, which must be new or empty, as a whole; `check_export` has been asked before.

    apart: only what DiffFit has trained, with these facts of the weights it belongs to (exchange.starting); form is
        safetensors. None: everything.

    Raises:
        UserError: it holds something, cannot be written, or the autoencoder shifts its latents (diffusers).
    """
    tree = without(config.resolved(), _OF_THE_TRAINING)
    file = FORMS[form]
    with _new_folder(out) as folder:
        if form == "diffusers":
            assert isinstance(denoiser, DiT) and autoencoder is not None
            if autoencoder.scale.shift:
                shift = autoencoder.scale.shift
                has = "one for each channel" if isinstance(shift, tuple) else f"{shift:g}"
                raise UserError(
                    f"--to diffusers: its DiTPipeline knows no shift_factor, and {autoencoder.name} has {has}; use --to"
                    " safetensors"
                )
            save_pipeline(folder, denoiser, autoencoder, classes, steps)
        else:
            state = {name: value.cpu().contiguous() for name, value in denoiser.state_dict().items()}
            if form == "dit":
                torch.save(state, folder / file)
            elif apart is None:
                save_file(state, folder / file)
            else:
                trained = {name: value for name, value in state.items() if difffit_trains(name)}
                save_file(trained, folder / file, dict(apart))
        write_json(folder / CONFIG_FILE, tree)
        card = folder / "README.md"
        write_text(card, model_card(form, file, tree, steps, scores, record))
        for path in folder.rglob("*.safetensors"):
            path.chmod(card.stat().st_mode)  # safetensors lets nobody but the owner read


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """Yield a folder beside `out` that takes its place at the end of the block; after an error nothing is left."""
    temporary = out.with_name(f"{out.name}.tmp")
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"--out {out}: is there already; choose another, or remove it")
        shutil.rmtree(temporary, ignore_errors=True)  # of a killed export
        temporary.mkdir(parents=True)
        yield temporary
        os.replace(temporary, out)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror or error})") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
