"""Train a diffusion model with structure-guided adversarial training.

    deepspeed sadm_fast/train.py --config configs/mnist.json        all ranks of this machine
    python sadm_fast/train.py --config configs/mnist.json           one rank

The same command continues an interrupted run.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

# Started as a script, Python puts sadm_fast/ itself on the path, where a name could hide somebody else's module.
if sys.path and Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from sadm_fast.errors import LostRank, UserError, print_error, speaks_for_machine
from sadm_fast.ranks.stopping import Stopped, StopRequest

if TYPE_CHECKING:  # it takes seconds to import, --help should not
    from sadm_fast.config import Config

# Exit codes: 0 finished, 2 something for the user to change, 75 (EX_TEMPFAIL) stopped before the end and resumable,
# 1 another rank is gone or hangs (or a bug, with its traceback).
EXIT_LOST = 1
EXIT_USER_ERROR = 2
EXIT_STOPPED = 75


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="train.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config", "--deepspeed_config", required=True, metavar="FILE", help="a JSON file as in configs/"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
        help="change a field of the configuration, for example --set train.steps=100; may be repeated",
    )  # fmt: skip
    parser.add_argument("--run-dir", metavar="DIR", help="the run's folder (default: runs/NAME)")
    parser.add_argument(
        "--dry-run", action="store_true",
        help="print the resolved configuration, parameters, FLOPs and MACs a step and the memory plan; train nothing",
    )  # fmt: skip
    parser.add_argument("--local_rank", type=int, default=None, help=argparse.SUPPRESS)  # from the launcher
    parser.add_argument("--deepspeed", action="store_true", help=argparse.SUPPRESS)  # out of habit
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    request = StopRequest()
    try:
        try:
            return _train(arguments, request)
        finally:
            request.defer()
    except UserError as error:
        print_error(error)
        return EXIT_USER_ERROR
    except LostRank as error:
        print(f"error: {error}; the same command continues from the last checkpoint", file=sys.stderr)
        return EXIT_STOPPED if request.asked else EXIT_LOST
    except Stopped:
        print("asked to stop before the training had begun; the same command starts it again", file=sys.stderr)
        return EXIT_STOPPED
    except KeyboardInterrupt:
        if speaks_for_machine():
            print("interrupted; the same command continues from the last checkpoint", file=sys.stderr)
        return 130


def _train(arguments: argparse.Namespace, request: StopRequest) -> int:
    from sadm_fast.config import load_config
    from sadm_fast.run.folder import RunFolder

    config = load_config(arguments.config, arguments.overrides)
    if arguments.dry_run:
        if int(os.environ.get("RANK", "0")) == 0:
            _describe(config)
        return 0

    # What a person may have got wrong is found before the slow imports.
    folder = RunFolder(Path(arguments.run_dir or Path("runs") / config.name))
    folder.check(config)

    from sadm_fast.console import Console
    from sadm_fast.ranks.collectives import barrier, first_on_rank_zero
    from sadm_fast.ranks.launch import distributed

    with distributed() as place:
        from sadm_fast.assemble import assemble
        from sadm_fast.build import resolve_classes
        from sadm_fast.data.latents import LatentSource
        from sadm_fast.engine.feature_queue import check_queue
        from sadm_fast.engine.optimizers import check_optimizers
        from sadm_fast.feed import open_data
        from sadm_fast.models.autoencoder import Autoencoder
        from sadm_fast.pretrain import check_judge, check_psi

        console = Console(place.rank)
        source = first_on_rank_zero(lambda: open_data(config, console, check=place.rank == 0))
        resolve_classes(config, source)
        autoencoder = None
        if isinstance(source, LatentSource) and config.latents is not None and place.rank == 0:  # it makes the pictures
            autoencoder = Autoencoder.load(
                config.latents.autoencoder, device=place.device, scale=config.latents.scale
            )  # fmt: skip
            autoencoder.require_space(source.encoding.space, f"data.path={source.where}")
        check_psi(config, source)
        check_judge(config, source)
        check_optimizers(config)
        check_queue(config, place.world_size)
        barrier()  # nobody claims the folder while another rank still checks it
        if place.rank == 0:
            folder.claim(config)
        barrier()
        console.say(
            f"{config.name}: {config.game.mode}, {len(source)} images of {len(source.classes)} classes, "
            f"{place.world_size} rank(s) on {place.device}, into {folder.path}"
        )
        trainer = assemble(config, folder, source, autoencoder, place, console)
        finished = trainer.run(request)
        if finished:
            console.say(f"pictures: {folder.samples / f'step-{trainer.step:06d}-ema.png'}")
        else:
            console.say(f"stopped at step {trainer.step} of {config.train.steps}; the same command continues")
        console.say(f"report: {folder.path / 'report.html'}")
    return 0 if finished else EXIT_STOPPED


def _describe(config: "Config") -> None:
    """--dry-run; without the data too, if denoiser.num_classes says what they would."""
    from sadm_fast.build import resolve_classes
    from sadm_fast.console import Console
    from sadm_fast.feed import open_data
    from sadm_fast.planning.dry_run import describe

    there = Path(config.data.path).exists() or config.data.path.startswith("demo:")
    if there or config.denoiser.num_classes is None:
        classes = resolve_classes(config, open_data(config, Console(), check=False))
    else:
        classes = config.denoiser.num_classes
        print(f"data.path={config.data.path} is not there; planned for denoiser.num_classes={classes}\n")
    print(describe(config, classes, int(os.environ.get("WORLD_SIZE", "1"))))


if __name__ == "__main__":
    sys.exit(main())
