"""Train a diffusion model with structure-guided adversarial training.

    deepspeed sadm_fast/train.py --config configs/mnist.json        all ranks of this machine
    python sadm_fast/train.py --config configs/mnist.json           one rank

The same command continues an interrupted run.
"""

import argparse
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":  # the repository, not its folder sadm_fast/, whose names could hide other modules
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from sadm_fast import cli
from sadm_fast.ranks import environment
from sadm_fast.ranks.stopping import StopRequest

if TYPE_CHECKING:  # they take seconds to import, --help should not
    from sadm_fast.config import Config
    from sadm_fast.run.folder import RunFolder


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser("train.py", __doc__)
    parser.add_config()
    parser.add_argument("--run-dir", type=cli.path, metavar="DIR", help="the run's folder (default: runs/NAME)")
    parser.add_argument(
        "--dry-run", action="store_true",
        help="print the resolved configuration, parameters, FLOPs and MACs a step and the memory plan; train nothing",
    )  # fmt: skip
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    return cli.run(
        lambda request: _train(parse_arguments(argv), request),
        again="continues from the last checkpoint, if there is one",
    )


def _train(arguments: argparse.Namespace, request: StopRequest) -> int:
    from sadm_fast.config import load_config
    from sadm_fast.precision import kept_precision
    from sadm_fast.run.folder import RunFolder

    config = load_config(arguments.config, arguments.overrides)
    # Checked before the slow imports.
    folder = RunFolder(arguments.run_dir or Path("runs") / config.name)
    config = kept_precision(config, folder.config)
    folder.check(config)
    if arguments.dry_run:
        if environment.rank() == 0:
            _describe(config, folder)
        return 0

    from sadm_fast.api import train

    finished = train(config, run_dir=folder.path, request=request)
    return 0 if finished else cli.EXIT_STOPPED


def _describe(config: "Config", folder: "RunFolder") -> None:
    """Print the --dry-run plan. Needs no data on disk if denoiser.num_classes is set."""
    import torch

    from sadm_fast.build import resolve_classes
    from sadm_fast.console import Console
    from sadm_fast.data import kind_of
    from sadm_fast.feed import count_classes, open_data
    from sadm_fast.metrics.run_evaluation import judging
    from sadm_fast.models.autoencoder import Autoencoder
    from sadm_fast.planning.dry_run import describe
    from sadm_fast.precision import settle_precision
    from sadm_fast.start_checks import check_start, check_weights

    console = Console()
    config, about_bf16 = settle_precision(config, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    path = config.data.path
    there = Path(path).exists() or path.startswith("demo:") or kind_of(path) != "folder"
    if there or config.denoiser.num_classes is None:
        source = open_data(config, console, check=False)
        classes = resolve_classes(config, source)
        check_start(config, source, classes, folder, environment.world_size())
        samples = f"\ndata.path={path}: {len(source)} samples of {count_classes(source, classes)}"
    else:
        classes, samples = config.denoiser.num_classes, ""
        check_weights(config, classes)
        console.say(f"data.path={path} is not there; planned for denoiser.num_classes={classes}\n")
    autoencoder = None if config.latents is None else config.latents.autoencoder
    if config.latents is not None and autoencoder is not None and Path(autoencoder).is_dir():
        Autoencoder.load(autoencoder, scale=config.latents.scale)
    console.say(describe(config, classes, environment.world_size(), judging(config)) + samples)
    if about_bf16 is not None:
        console.say(about_bf16)


class _Callable(ModuleType):
    def __call__(self, *arguments: Any, **options: Any) -> bool:
        from sadm_fast.api import train

        return train(*arguments, **options)


if __name__ == "__main__":
    cli.leave(main())
else:  # whoever imports this module finds it under the name of the function sadm_fast.train
    sys.modules[__name__].__class__ = _Callable
