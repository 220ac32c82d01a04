"""Draw samples from a trained run.

python sadm_fast/sample.py runs/mnist                                   a grid, all classes
python sadm_fast/sample.py runs/mnist --classes 3 7 --count 64 --guidance-scale 3 --out threes_and_sevens.png
python sadm_fast/sample.py runs/mnist --count 1000 --folder samples/    one PNG a sample, in class folders
"""

import argparse
import sys
from pathlib import Path

# Started as a script, Python puts sadm_fast/ itself on the path, where a name could hide somebody else's module.
if sys.path and Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from sadm_fast.errors import UserError


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="sample.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="the run's folder, for example runs/mnist")
    parser.add_argument("--classes", nargs="+", metavar="CLASS", help="class names (default: all)")
    parser.add_argument("--count", type=int, default=80, help="samples in all; they go round the classes (default: 80)")
    parser.add_argument("--steps", type=int, help="sampler steps (default: the run's)")
    parser.add_argument("--guidance-scale", type=float, help="classifier-free guidance (default: the run's)")
    parser.add_argument("--seed", type=int, help="of the starting noise (default: the run's)")
    parser.add_argument("--autoencoder", help="of a run on latents: folder or hub id (default: where the run had it)")
    parser.add_argument("--batch", type=int, default=250, help="samples at a time")
    parser.add_argument("--out", type=Path, help="the picture of the grid (default: samples.png in the run's folder)")
    parser.add_argument("--folder", type=Path, help="write every sample to FOLDER/class/number.png instead of a grid")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    try:
        print(_sample(arguments))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _sample(arguments: argparse.Namespace) -> Path:
    import torch

    from sadm_fast.ranks.launch import choose_accelerator

    device = torch.device("cuda" if choose_accelerator() else "cpu")

    from sadm_fast.console import Console
    from sadm_fast.files import expand_home
    from sadm_fast.gallery import picture_grid, save_picture
    from sadm_fast.generation import generate, load_trained, to_images
    from sadm_fast.scales import float_to_pixels

    trained = load_trained(arguments.run, device)
    autoencoder = trained.autoencoder(device, arguments.autoencoder)
    names = list(arguments.classes or trained.classes)
    unknown = [name for name in names if name not in trained.classes]
    if unknown:
        raise UserError(f"--classes {unknown[0]}: the run has {', '.join(trained.classes[:20])}")
    if arguments.count < 1 or arguments.batch < 1:
        raise UserError(f"--count {arguments.count} --batch {arguments.batch}: must be at least 1")

    config = trained.config
    if arguments.seed is not None:
        config = config.model_copy(update={"seed": arguments.seed})
    steps = arguments.steps if arguments.steps is not None else config.sampling.steps
    scale = arguments.guidance_scale if arguments.guidance_scale is not None else config.sampling.guidance_scale
    if steps < 1:
        raise UserError(f"--steps {steps}: must be at least 1")
    ids = torch.arange(arguments.count, device=device)
    labels = torch.tensor([trained.classes.index(name) for name in names], device=device)[ids % len(names)]
    images = []
    with Console().bar("sampling", arguments.count) as bar:
        for chosen in ids.split(arguments.batch):
            batch = generate(config, trained.model, labels[chosen], chosen, steps=steps, guidance_scale=scale)
            images.append(to_images(batch, autoencoder).cpu())
            bar.at(int(chosen[-1]) + 1)
    pictures = torch.cat(images)
    try:
        if arguments.folder is None:
            out = Path(expand_home(arguments.out or Path(arguments.run, "samples.png")))
            save_picture(picture_grid(pictures, min(len(names), arguments.count)), out)
            return out
        folder = Path(expand_home(arguments.folder))
        for i, image in enumerate(pictures):
            path = folder / names[i % len(names)] / f"{i:06d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            save_picture(float_to_pixels(image), path)
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be written ({error.strerror})") from None
    return folder


if __name__ == "__main__":
    sys.exit(main())
