"""Draw samples from a trained run, or from weights alone.

python sadm_fast/sample.py runs/mnist                                   a grid, all classes
python sadm_fast/sample.py runs/mnist --classes 3 7 --count 64 --guidance-scale 3 --out threes_and_sevens.png
python sadm_fast/sample.py runs/mnist --count 1000 --folder samples/    one PNG a sample, in class folders
deepspeed --num_gpus 8 sadm_fast/sample.py --weights DiT-XL-2-256x256.pt --config configs/imagenet256.json
    --set sampling.sampler=ddpm --steps 250 --guidance-scale 1.5 --set sampling.guidance_channels=3
    --labels random --count 50000 --out samples.npz                     what the evaluator of ADM reads

The same command continues a drawing that was stopped. A sample is a function of the seed and its number: it is the same
on any number of ranks and in any batch. Beside the samples, in NAME.provenance.json, stands how they were drawn.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":  # the repository, not its folder sadm_fast/, whose names could hide other modules
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from sadm_fast import cli
from sadm_fast.errors import UserError

if TYPE_CHECKING:
    import torch

    from sadm_fast.generation import Trained
    from sadm_fast.ranks.stopping import StopRequest

_COUNT = 80
_PICTURES = (".png", ".jpg", ".jpeg")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser("sample.py", __doc__)
    parser.add_model()
    parser.add_argument("--classes", nargs="+", action="extend", metavar="CLASS", help="class names (default: all)")
    parser.add_argument(
        "--labels", default="in-turn", metavar="HOW",
        help="in-turn: samples go round the classes (default); equal: the same, and equally many of each; random:"
        " uniform by the seed; or a text file with a class a line",
    )  # fmt: skip
    parser.add_argument("--count", type=cli.whole(1), metavar="N", help=f"samples in all (default: {_COUNT})")
    parser.add_argument("--sampler", metavar="NAME", help="sampling.sampler (default: the run's)")
    parser.add_argument(
        "--steps", type=_steps, metavar="N", help="sampling.steps: a number, ddim50 or 10,15,20 (default: the run's)"
    )
    parser.add_argument(
        "--guidance-scale", type=cli.real(0, 10_000), metavar="S", help="sampling.guidance_scale (default: the run's)"
    )
    parser.add_argument(
        "--guide", type=cli.path, metavar="PATH",
        help="autoguidance by a worse model instead of the classifier-free: a run, one of its checkpoints, or a file"
        " of weights for --guide-config",
    )  # fmt: skip
    parser.add_argument("--guide-config", metavar="FILE", help="the configuration of a --guide that is a file")
    parser.add_argument("--seed", type=cli.whole(0, 2**64 - 1), metavar="N", help="of all noise (default: the run's)")
    parser.add_argument("--autoencoder", help="of a model on latents: folder or hub id (default: where the run had it)")
    parser.add_precision()
    parser.add_argument("--batch", type=cli.whole(1), default=250, metavar="N", help="samples at a time, on each rank")
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--out", type=cli.path, metavar="FILE",
        help="a grid, .png or .jpg (default: samples.png in the run's folder); or all samples in .npz, as arr_0",
    )  # fmt: skip
    where.add_argument(
        "--folder", type=cli.path, metavar="DIR",
        help="write every sample to DIR/class/number.png instead; DIR must be new or empty, or begun so",
    )  # fmt: skip
    arguments = parser.parse_args(argv)
    parser.check_model(arguments)
    if arguments.weights is not None and arguments.out is None and arguments.folder is None:
        parser.error("--weights needs --out or --folder")
    if arguments.guide_config is not None and arguments.guide is None:
        parser.error("--guide-config is for a --guide")
    return arguments


def _steps(text: str) -> str:
    """An argparse type: sampling.steps, whose own check is the configuration's."""
    return str(cli.whole(1, 10_000)(text)) if text.removeprefix("-").isdecimal() else text


def main(argv: list[str] | None = None) -> int:
    return cli.run(lambda request: _sample(parse_arguments(argv), request), again="continues")


def _sample(arguments: argparse.Namespace, request: "StopRequest") -> int:
    from sadm_fast.console import Console
    from sadm_fast.drawing import draw, labels_at_random, labels_in_file, labels_in_turn
    from sadm_fast.pictures import ClassFolders, GridFile, NpzFile, Output
    from sadm_fast.ranks import environment
    from sadm_fast.ranks.launch import distributed, own_device

    trained, guide = _load(arguments, own_device(), Console(environment.rank()).complain)
    names: list[str] | None = arguments.classes
    classes, count = len(names or trained.filled), arguments.count
    if arguments.labels in ("in-turn", "equal"):
        labels, count = labels_in_turn(trained, names), count or _COUNT
        if arguments.labels == "equal" and count % classes:
            raise UserError(f"--count {count}: --labels equal needs a multiple of the {classes} classes")
    elif arguments.labels == "random":
        labels, count = labels_at_random(trained, names), count or _COUNT
    else:
        if names:
            raise UserError(f"--labels {arguments.labels}: names the classes itself; leave --classes out")
        labels, lines = labels_in_file(trained, Path(arguments.labels))
        count = count or lines
        if count > lines:
            raise UserError(f"--count {count}: {arguments.labels} has {lines} lines")

    data = trained.config.data
    if not trained.config.paints and arguments.autoencoder is None:
        raise UserError(f"{arguments.run}: its samples are no pictures; sadm_fast.load(...).sample draws from Python")
    shape = (data.channels, data.resolution, data.resolution)
    out = arguments.out or arguments.run and arguments.run / "samples.png"
    output: Output
    if arguments.folder is not None:
        output = ClassFolders(arguments.folder, trained.classes, count)
    elif out.suffix.lower() == ".npz":
        output = NpzFile(out, count, shape)
    elif out.suffix.lower() in _PICTURES:
        columns = classes if arguments.labels in ("in-turn", "equal") else 10
        output = GridFile(out, count, min(columns, count), shape)
    else:
        raise UserError(f"--out {out}: must end in {', '.join(_PICTURES)} or .npz")

    with distributed(deepspeed=False) as place:
        draw(
            trained,
            labels,
            count,
            output,
            batch=arguments.batch,
            guide=guide,
            autoencoder=trained.autoencoder(place.device, arguments.autoencoder),
            place=place,
            console=Console(place.rank),
            asked_to_stop=lambda: request.asked,
        )
    return 0


def _load(
    arguments: argparse.Namespace, device: "torch.device", say: Callable[[str], None]
) -> "tuple[Trained, Trained | None]":
    """The model to draw from, with the settings of the command line, and the worse one that guides it, if any."""
    from sadm_fast.config import load_config
    from sadm_fast.generation import load_alone, load_trained

    settings = {
        "sampling.sampler": arguments.sampler,
        "sampling.steps": arguments.steps,
        "sampling.guidance_scale": arguments.guidance_scale,
        "seed": arguments.seed,
    }
    overrides = [*arguments.overrides, *(f"{key}={value}" for key, value in settings.items() if value is not None)]
    if arguments.weights is None:
        trained = load_trained(arguments.run, device, say, overrides, arguments.ema)
    else:
        weights = [f"denoiser.weights={arguments.weights}"]
        trained = load_alone(load_config(arguments.config, [*overrides, *weights]), device)
    trained = trained.at(arguments.precision, say)
    if arguments.guide is None:
        return trained, None
    if trained.config.sampling.guidance_scale == 1.0:
        raise UserError(f"--guide {arguments.guide}: --guidance-scale 1 guides nothing; use another, for example 2")
    if arguments.guide_config is None:
        guide = load_trained(arguments.guide, device, say)
    else:
        config = load_config(arguments.guide_config, [f"denoiser.weights={arguments.guide}"])
        guide = load_alone(config, device)
    for what, own, other in (
        ("diffusion", trained.config.diffusion, guide.config.diffusion),
        ("samples [C, H, W]", trained.config.sample_shape, guide.config.sample_shape),
        ("classes", trained.model.num_classes, guide.model.num_classes),
    ):
        if own != other:
            raise UserError(f"--guide {arguments.guide}: must have the same {what}: {own}, not {other}")
    return trained, guide.at(arguments.precision)


if __name__ == "__main__":
    sys.exit(main())
