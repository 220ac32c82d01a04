"""Plan a run before there are GPUs for it: memory, communication, and a labelled prediction of its speed.

    python sadm_fast/plan.py --config configs/imagenet512.json --gpus 64 --gpu h100
    python sadm_fast/plan.py --config configs/imagenet512.json --set train.micro_batch=8 --json plan.json

Parameters, FLOPs, memory and bytes are counted; times are predicted from datasheets and what was measured of them on
one GPU. Nothing is trained or allocated, and the data is only needed if denoiser.num_classes is not given.
docs/planning.md explains.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":  # the repository, not its folder sadm_fast/, whose names could hide other modules
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from sadm_fast import cli
from sadm_fast.planning.gpus import GPUS, find_gpu

if TYPE_CHECKING:  # it takes seconds to import, --help should not
    from sadm_fast.config import Config


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser("plan.py", __doc__)
    parser.add_config()
    parser.add_argument(
        "--gpus", type=cli.whole(1, 2**20), default=8, metavar="N", help="ranks, one a GPU (default: 8)"
    )
    parser.add_argument("--gpu", default="h100", metavar="NAME", help=f"{', '.join(GPUS)} (default: h100)")
    parser.add_argument("--gpus-per-node", type=cli.whole(1, 2**20), default=8, metavar="N", help="default: 8")
    parser.add_argument(
        "--network-gbit", type=cli.real(1e-3, 1e6), default=400.0, metavar="G",
        help="network: Gbit/s in one direction for each GPU, so a node has GPUS_PER_NODE times that (default: 400)",
    )  # fmt: skip
    parser.add_argument(
        "--fraction-of-peak", type=cli.real(1e-3, 1), metavar="F",
        help="share of the peak FLOP/s that the run reaches (default: 0.4, as an H200)",
    )  # fmt: skip
    parser.add_argument(
        "--fraction-of-bandwidth", type=cli.real(1e-3, 1), metavar="F",
        help="share of the bandwidth of memory and links that it reaches (default: 0.78, as an H200's memory)",
    )  # fmt: skip
    parser.add_argument(
        "--launch-us", type=cli.real(0.1, 1e4), metavar="US",
        help="microseconds that a launch takes the host (default: 21, as beside an H200)",
    )  # fmt: skip
    parser.add_argument("--json", type=cli.path, metavar="FILE", help="write the same numbers there")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    return cli.run(lambda _: _plan(parse_arguments(argv)), again="starts again")


def _plan(arguments: argparse.Namespace) -> int:
    if not cli.is_sole_worker("plan.py"):
        return 0
    gpu = find_gpu(arguments.gpu)

    from sadm_fast.config import load_config

    config = load_config(arguments.config, arguments.overrides)

    from sadm_fast.console import Console
    from sadm_fast.files import require_writable, write_json
    from sadm_fast.metrics.run_evaluation import judging
    from sadm_fast.planning.plan import make_plan
    from sadm_fast.planning.roofline import Assumptions
    from sadm_fast.planning.text import plan_text
    from sadm_fast.precision import with_precision

    if config.train.precision == "auto":
        config = with_precision(config, "bf16")  # every GPU in gpus.py is quicker in it
    if arguments.json is not None:
        require_writable(arguments.json, "--json")
    launch = None if arguments.launch_us is None else 1e-6 * arguments.launch_us
    numbers = {
        "fraction_of_peak": arguments.fraction_of_peak,
        "fraction_of_bandwidth": arguments.fraction_of_bandwidth,
        "seconds_a_launch": launch,
    }
    given = {name: value for name, value in numbers.items() if value is not None}
    plan = make_plan(
        config,
        _num_classes(config),
        arguments.gpus,
        Assumptions(gpu, arguments.gpus_per_node, arguments.network_gbit, **given),
        judging(config),
    )
    if arguments.json is not None:
        write_json(arguments.json, plan)
    Console().say(plan_text(plan))
    return 0


def _num_classes(config: "Config") -> int:
    """denoiser.num_classes, or the number of classes in the data if that is null."""
    if config.denoiser.num_classes is not None:
        return config.denoiser.num_classes
    from sadm_fast.console import Console
    from sadm_fast.feed import open_data

    return len(open_data(config, Console(), check=False).classes)


if __name__ == "__main__":
    sys.exit(main())
