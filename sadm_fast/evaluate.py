"""Score a trained run: Frechet distances of its samples to the real images, in several feature spaces.

    python sadm_fast/evaluate.py runs/mnist [--samples 5000]

The numbers are not the FID of papers. Each is named after its feature space, for example fid_classifier: the features
of a classifier trained on the run's own images. Together with each stands its floor, real images against real ones.
"""

import argparse
import json
import sys
from pathlib import Path

if __name__ == "__main__":  # the repository, not its folder sadm_fast/, whose names could hide other modules
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from sadm_fast import cli
from sadm_fast.errors import UserError


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser("evaluate.py", __doc__)
    parser.add_argument("run", type=cli.path, help="the run's folder, for example runs/mnist")
    parser.add_argument("--samples", type=cli.whole(2), metavar="N", help="generated samples (default: the run's)")
    parser.add_argument("--steps", type=cli.whole(1, 10000), metavar="N", help="sampler steps (default: the run's)")
    parser.add_argument("--data", type=cli.path, metavar="DIR", help="real images to compare with (default: the run's)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    return cli.run(lambda _: _evaluate(parse_arguments(argv)), again="starts again")


def _evaluate(arguments: argparse.Namespace) -> int:
    from sadm_fast.console import Console
    from sadm_fast.feed import open_data, other_classes
    from sadm_fast.generation import load_trained
    from sadm_fast.metrics.run_evaluation import RunEvaluation
    from sadm_fast.pretrain import prepare_judge
    from sadm_fast.ranks import environment
    from sadm_fast.ranks.collectives import first_on_rank_zero
    from sadm_fast.ranks.launch import distributed, own_device
    from sadm_fast.run.folder import RunFolder

    changes = {"samples": arguments.samples, "steps": arguments.steps}
    # Checked before the ranks meet.
    trained = load_trained(arguments.run, own_device(), Console(environment.rank()).say)
    evaluate = trained.config.evaluate.model_copy(update={k: v for k, v in changes.items() if v is not None})
    config = trained.config.model_copy(update={"evaluate": evaluate})
    if config.latents is not None:
        raise UserError(
            f"{arguments.run}: is trained on latents, which the judges do not know; write images with"
            " sample.py --folder and score those"
        )
    with distributed(deepspeed=False) as place:
        console = Console(place.rank)
        images = first_on_rank_zero(lambda: open_data(config, console, check=place.rank == 0, path=arguments.data))
        if other := other_classes([trained.classes[label] for label in trained.filled], images):
            console.say(other)
        judge, facts = prepare_judge(config, images, RunFolder(arguments.run).pretrained, place.device, console)
        try:
            evaluation = RunEvaluation(config, images, judge, trained.filled, place.device)
            scores = evaluation.score(trained.model, trained.step or 0)
        except ValueError as error:  # too few real images, samples that are not finite
            raise UserError(f"{arguments.run}: cannot be scored: {error}") from None
        console.say(json.dumps(scores | {"judge_accuracy": facts.get("accuracy")}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
