"""Hand on a trained denoiser: to diffusers, as safetensors, or with the names of DiT's release.

python sadm_fast/export.py runs/imagenet256 --to diffusers --out exported    what DiTPipeline.from_pretrained loads
python sadm_fast/export.py runs/imagenet256 --to safetensors --out exported  model.safetensors, for sample.py --weights
python sadm_fast/export.py --weights ema.pt --config configs/imagenet256.json --to dit --out exported

The folder also holds the configuration (sadm_fast.json) and a model card (README.md) with scores and provenance. The
way back: denoiser.weights, and --weights of sample.py, take any of these files and folders.
"""

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":  # the repository, not its folder sadm_fast/, whose names could hide other modules
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from sadm_fast import cli

_STEPS = 50  # what DiTPipeline takes by default


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser("export.py", __doc__)
    parser.add_model()
    parser.add_argument("--to", choices=("diffusers", "safetensors", "dit"), required=True, help="for which program")
    parser.add_argument("--out", type=cli.path, required=True, metavar="DIR", help="what to write; new or empty")
    parser.add_argument(
        "--steps", type=cli.whole(0), default=_STEPS, metavar="N",
        help="diffusers: the steps of DDIM at which it draws the same latents without a change to its code; 0: the"
        f" weights as they are, for any steps, and the line of code is in the model card (default: {_STEPS})",
    )  # fmt: skip
    parser.add_argument(
        "--apart", action="store_true",
        help="safetensors, of a run with denoiser.train=difffit: only what it has trained, to go with the weights that"
        " it started from; without, both are merged into the network of any other run",
    )  # fmt: skip
    parser.add_argument("--autoencoder", help="diffusers: folder or hub id (default: where the run had it)")
    arguments = parser.parse_args(argv)
    parser.check_model(arguments)
    if arguments.apart and (arguments.to != "safetensors" or arguments.run is None):
        parser.error("--apart: is for a run, and --to safetensors")
    return arguments


def main(argv: list[str] | None = None) -> int:
    return cli.run(lambda _: _export(parse_arguments(argv)), again="starts again")


def _export(arguments: argparse.Namespace) -> int:
    if not cli.is_sole_worker("export.py"):
        return 0
    import torch

    from sadm_fast.config import load_config
    from sadm_fast.console import Console
    from sadm_fast.errors import UserError
    from sadm_fast.exchange.card import scores_at
    from sadm_fast.exchange.starting import starting_facts
    from sadm_fast.exchange.writing import check_export, export
    from sadm_fast.generation import load_alone, load_trained, merged, sampling_facts
    from sadm_fast.run.facts import program
    from sadm_fast.run.folder import RunFolder

    console, device = Console(), torch.device("cpu")
    scores = apart = None
    if arguments.weights is None:
        trained = load_trained(arguments.run, device, console.complain, arguments.overrides, arguments.ema)
        if arguments.apart and trained.config.denoiser.train != "difffit":
            raise UserError(f"--apart: {arguments.run} has trained the whole network; leave it out")
        if arguments.apart:
            apart = starting_facts(trained.config)
        else:
            trained = merged(trained)
        if arguments.ema is None:  # the average that the run evaluates
            scores = scores_at(RunFolder(trained.checkpoint.parent.parent).evaluations, trained.step)
    else:
        overrides = [*arguments.overrides, f"denoiser.weights={arguments.weights}"]
        trained = load_alone(load_config(arguments.config, overrides), device)
    check_export(arguments.to, trained.config, trained.model, arguments.steps)
    autoencoder = trained.autoencoder(device, arguments.autoencoder) if arguments.to == "diffusers" else None
    weights = trained.facts()
    record = {
        "weights": weights | {"file": Path(weights["file"]).name},
        "autoencoder": autoencoder.identity if autoencoder is not None else trained.latent_space,
        **sampling_facts(trained.config),
        **program(),
    }
    export(
        arguments.out,
        arguments.to,
        trained.config,
        trained.model,
        classes=trained.classes,
        autoencoder=autoencoder,
        steps=arguments.steps,
        scores=scores,
        record=record,
        apart=apart,
    )
    console.say(str(arguments.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
