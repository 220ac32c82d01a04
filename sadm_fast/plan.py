"""Plan a run before there are GPUs for it: memory, communication, and a labelled prediction of its speed.

    python sadm_fast/plan.py --config configs/imagenet512.json --gpus 64 --gpu h100
    python sadm_fast/plan.py --config configs/imagenet512.json --set train.micro_batch=8 --json plan.json

Parameters, FLOPs, memory and bytes are counted; times are predicted from datasheets and two assumed fractions. Nothing
is trained or allocated, and the data is only needed if denoiser.num_classes is not given. docs/planning.md explains.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

# Started as a script, Python puts sadm_fast/ itself on the path, where a name could hide somebody else's module.
if sys.path and Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from sadm_fast.errors import UserError
from sadm_fast.planning.gpus import GPUS, find_gpu

if TYPE_CHECKING:  # it takes seconds to import, --help should not
    from sadm_fast.config import Config


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="plan.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="a JSON file as in configs/")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
        help="change a field of the configuration, for example --set train.micro_batch=8; may be repeated",
    )  # fmt: skip
    parser.add_argument("--gpus", type=int, default=8, metavar="N", help="ranks, one a GPU (default: 8)")
    parser.add_argument("--gpu", default="h100", metavar="NAME", help=f"{', '.join(GPUS)} (default: h100)")
    parser.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="default: 8")
    parser.add_argument(
        "--network-gbit", type=float, default=400.0, metavar="G",
        help="network: Gbit/s in one direction for each GPU, so a node has GPUS_PER_NODE times that (default: 400)",
    )  # fmt: skip
    parser.add_argument(
        "--fraction-of-peak", type=float, default=0.4, metavar="F",
        help="share of the peak FLOP/s that the run is assumed to reach (default: 0.4)",
    )  # fmt: skip
    parser.add_argument(
        "--fraction-of-bandwidth", type=float, default=0.75, metavar="F",
        help="share of the bandwidth of memory and links that it is assumed to reach (default: 0.75)",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the same numbers there")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    try:
        print(_plan(arguments))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _plan(arguments: argparse.Namespace) -> str:
    gpu = find_gpu(arguments.gpu)
    for option in ("gpus", "gpus_per_node"):
        if getattr(arguments, option) < 1:
            raise UserError(f"--{option.replace('_', '-')} {getattr(arguments, option)}: must be at least 1")
    if not 0 < arguments.network_gbit < float("inf"):
        raise UserError(f"--network-gbit {arguments.network_gbit:g}: must be a positive number")
    for option in ("fraction_of_peak", "fraction_of_bandwidth"):
        if not 0 < getattr(arguments, option) <= 1:
            raise UserError(
                f"--{option.replace('_', '-')} {getattr(arguments, option):g}: must be above 0 and at most 1"
            )

    from sadm_fast.config import load_config

    config = load_config(arguments.config, arguments.overrides)

    from sadm_fast.files import expand_home, write_json
    from sadm_fast.planning.plan import make_plan
    from sadm_fast.planning.roofline import Assumptions
    from sadm_fast.planning.text import plan_text

    plan = make_plan(
        config,
        _num_classes(config),
        arguments.gpus,
        Assumptions(
            gpu,
            arguments.gpus_per_node,
            arguments.network_gbit,
            arguments.fraction_of_peak,
            arguments.fraction_of_bandwidth,
        ),
    )
    if arguments.json is not None:
        try:
            write_json(Path(expand_home(arguments.json)), plan)
        except OSError as error:
            raise UserError(f"--json {arguments.json}: cannot be written ({error.strerror})") from None
    return plan_text(plan)


def _num_classes(config: "Config") -> int:
    """What denoiser.num_classes says, or else the data."""
    if config.denoiser.num_classes is not None:
        return config.denoiser.num_classes
    from sadm_fast.console import Console
    from sadm_fast.feed import open_data

    return len(open_data(config, Console(), check=False).classes)


if __name__ == "__main__":
    sys.exit(main())
