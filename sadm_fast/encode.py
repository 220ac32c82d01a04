"""Prepare data: images to cached latents; find broken files; measure how fast samples can be read.

    deepspeed sadm_fast/encode.py --config configs/imagenet512.json --set latents.images=/data/imagenet/train
    python sadm_fast/encode.py --check /data/imagenet/train
    python sadm_fast/encode.py --bench /data/imagenet/train --resolution 256

Encoding writes what data.path of the configuration names, with as many ranks as the launcher starts. The same command
continues an interrupted run. --check and --bench take an image folder (class/name.jpg), a folder of WebDataset tar
or MDS shards, tables of Hugging Face (Parquet, Arrow), or cached latents; --check prints one line a problem and ends
with 1 if there is one.
"""

import argparse
import os
import sys
from pathlib import Path

if __name__ == "__main__":  # the repository, not its folder sadm_fast/, whose names could hide other modules
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from sadm_fast import cli


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser("encode.py", __doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    parser.add_config(what, required=False)
    what.add_argument(
        "--check", type=cli.path, metavar="PATH", help="decode every image, or hash every shard of latents"
    )
    what.add_argument("--bench", type=cli.path, metavar="PATH", help="images a second of each loader, alone")
    parser.add_argument(
        "--threads", type=cli.whole(1, 1024), default=os.cpu_count() or 1, metavar="N", help="with --check and --bench"
    )
    parser.add_argument(
        "--resolution", type=cli.whole(8, 8192), default=256, metavar="N",
        help="with --bench: side of the crop (default: 256)",
    )  # fmt: skip
    parser.add_argument(
        "--micro-batch", type=cli.whole(1, 65536), default=64, metavar="N", help="with --bench (default: 64)"
    )
    parser.add_argument(
        "--rounds", type=cli.whole(1), default=3, metavar="N", help="with --bench: measurements of each (default: 3)"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    return cli.run(lambda _: _run(parse_arguments(argv)), again="continues")


def _run(arguments: argparse.Namespace) -> int:
    if arguments.config is not None:
        return _encode(arguments)
    option = "--check" if arguments.check is not None else "--bench"
    if not cli.is_sole_worker(f"encode.py {option}"):
        return 0
    return _check(arguments) if arguments.check is not None else _bench(arguments)


def _encode(arguments: argparse.Namespace) -> int:
    from sadm_fast.config import load_config

    config = load_config(arguments.config, arguments.overrides)

    from sadm_fast.console import Console
    from sadm_fast.ranks.collectives import first_on_rank_zero
    from sadm_fast.ranks.launch import distributed

    with distributed(deepspeed=False) as place:
        from sadm_fast.encoding import check_autoencoder, encode
        from sadm_fast.feed import open_images_to_encode
        from sadm_fast.models.autoencoder import Autoencoder

        console = Console(place.rank)
        images = first_on_rank_zero(lambda: open_images_to_encode(config, console, check=place.rank == 0))
        latents = config.latents
        assert latents is not None and latents.autoencoder is not None  # or the line before would have said so
        autoencoder = Autoencoder.load(
            latents.autoencoder, device=place.device, precision=latents.precision, scale=latents.scale
        )
        check_autoencoder(config, autoencoder)
        encode(config, images, autoencoder, place, console)
    return 0


def _check(arguments: argparse.Namespace) -> int:
    from sadm_fast.console import Console
    from sadm_fast.data import open_any
    from sadm_fast.data.checking import checked, forget
    from sadm_fast.data.latents import LatentSource, check_shards
    from sadm_fast.feed import asked_as

    console = Console()
    with asked_as("--check"), console.progress("listing shards") as progress:
        source = open_any(str(arguments.check), progress)
    with console.progress("checking") as progress:
        if isinstance(source, LatentSource):
            problems = check_shards(source, threads=arguments.threads, progress=progress)
            what = f"{len(source)} {source.described()}"
        else:
            forget(source)
            report = checked(source, threads=arguments.threads, progress=progress)
            problems = [f"{name}: {reason}" for name, reason in report.problems]
            what = f"{len(source)} images of {len(source.classes)} classes"
            if report.smallest_name:
                what += f", shortest side {report.smallest_side} pixels ({report.smallest_name})"
    for problem in problems:
        console.say(problem)
    console.say(f"{arguments.check}: {what}; " + (f"{len(problems)} broken" if problems else "all whole"))
    return 1 if problems else 0


def _bench(arguments: argparse.Namespace) -> int:
    from sadm_fast.console import Console
    from sadm_fast.data import open_any
    from sadm_fast.data.throughput import bench_table
    from sadm_fast.feed import asked_as

    console = Console()
    with asked_as("--bench"), console.progress("listing shards") as progress:
        source = open_any(str(arguments.bench), progress)
    for line in bench_table(
        source,
        resolution=arguments.resolution,
        micro_batch=arguments.micro_batch,
        threads=arguments.threads,
        rounds=arguments.rounds,
    ):
        console.say(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
