"""Draw samples from a trained run.

python sadm_fast/sample.py runs/mnist                                   a grid, all classes
python sadm_fast/sample.py runs/mnist --classes 3 7 --count 64 --guidance-scale 3 --out threes_and_sevens.png
python sadm_fast/sample.py runs/mnist --count 1000 --folder samples/    one PNG a sample, in class folders
"""

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":  # the repository, not its folder sadm_fast/, whose names could hide other modules
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from sadm_fast import cli
from sadm_fast.errors import UserError


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser("sample.py", __doc__)
    parser.add_argument("run", type=cli.path, help="the run's folder, for example runs/mnist")
    parser.add_argument("--classes", nargs="+", action="extend", metavar="CLASS", help="class names (default: all)")
    parser.add_argument(
        "--count", type=cli.whole(1), default=80, metavar="N",
        help="samples in all; they go round the classes (default: 80)",
    )  # fmt: skip
    parser.add_argument("--steps", type=cli.whole(1, 10_000), metavar="N", help="sampler steps (default: the run's)")
    parser.add_argument(
        "--guidance-scale", type=cli.real(0, 10_000), metavar="S", help="classifier-free guidance (default: the run's)"
    )
    parser.add_argument(
        "--seed", type=cli.whole(0, 2**64 - 1), metavar="N", help="of the starting noise (default: the run's)"
    )
    parser.add_argument("--autoencoder", help="of a run on latents: folder or hub id (default: where the run had it)")
    parser.add_argument("--batch", type=cli.whole(1), default=250, metavar="N", help="samples at a time")
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--out", type=cli.path, metavar="FILE", help="the grid, .png or .jpg (default: samples.png in the run's folder)"
    )
    where.add_argument(
        "--folder", type=cli.path, metavar="DIR",
        help="write every sample to DIR/class/number.png instead of a grid; DIR must be new or empty",
    )  # fmt: skip
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    return cli.run(lambda _: _sample(parse_arguments(argv)), again="starts again")


def _sample(arguments: argparse.Namespace) -> int:
    if not cli.is_sole_worker("sample.py"):
        return 0
    import torch

    from sadm_fast.console import Console
    from sadm_fast.generation import generate, load_trained, to_images
    from sadm_fast.pictures import ClassFolders, GridFile
    from sadm_fast.ranks.launch import own_device

    device = own_device()
    console = Console()
    trained = load_trained(arguments.run, device, console.complain)
    there = [trained.classes[label] for label in trained.filled]
    names = list(arguments.classes or there)
    unknown = [name for name in names if name not in there]
    if unknown:
        raise UserError(f"--classes {unknown[0]}: the run was trained on images of {', '.join(there[:20])}")
    config, count = trained.config, arguments.count
    if arguments.seed is not None:
        config = config.model_copy(update={"seed": arguments.seed})
    steps = arguments.steps or config.sampling.steps
    scale = config.sampling.guidance_scale if arguments.guidance_scale is None else arguments.guidance_scale
    shape = (config.data.channels, config.data.resolution, config.data.resolution)
    output: ClassFolders | GridFile
    if arguments.folder is not None:
        output = ClassFolders(arguments.folder, names[:count])
    else:
        out = arguments.out or arguments.run / "samples.png"
        output = GridFile(out, count, min(len(names), count), shape)

    autoencoder = trained.autoencoder(device, arguments.autoencoder)
    labels = torch.tensor([trained.classes.index(name) for name in names], device=device)
    with console.bar("sampling", count) as bar:
        for first in range(0, count, arguments.batch):
            ids = torch.arange(first, min(first + arguments.batch, count), device=device)
            samples = generate(config, trained.model, labels[ids % len(names)], ids, steps=steps, guidance_scale=scale)
            if not bool(torch.isfinite(samples).all()):
                raise UserError(
                    f"{trained.checkpoint}: draws samples that are not finite at --guidance-scale {scale:g}, --steps"
                    f" {steps}; try others, or an earlier checkpoint"
                )
            output.add(first, to_images(samples, autoencoder))
            bar.at(first + len(ids))
    output.finish()
    console.say(str(output.path))
    return 0


if __name__ == "__main__":
    sys.exit(main())
