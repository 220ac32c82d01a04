"""The section about memorisation: samples beside their nearest training images, and what held-out images say."""

from pathlib import Path
from typing import Any

from sadm_fast.files import parse_json
from sadm_fast.report.figures import picture
from sadm_fast.report.markup import escape, figure, missing, show
from sadm_fast.report.reading import JUDGE_OF, Run, number

_TEXT = (
    "If the denoiser painted its training images again, samples would lie nearer to a training image than other images "
    "of the same kind do. A sample counts as a copy if it is as near to one as only 5% of the images compared with: of "
    "{who} 5% are. “Nearer” is the probability that a sample is nearer to its training image than one of these is to "
    "its own: 0.5 if they are alike, more if samples copy, less if they are unlike any image. In brackets: how far it "
    "is from 0.5, in standard deviations of chance."
)
_WHO = {
    True: "the held-out images, which nothing was trained on,",
    False: "the training images, each compared with the others (there were no held-out images: data.held_out),",
}
_GAPS = {
    "loss": "Denoising loss",
    "S": "Structure distance S",
}


def memorisation(run: Run) -> str:
    """What `evaluate.py --memorisation` found, if it was asked."""
    folder = run.path / "memorisation"
    try:
        facts = parse_json((folder / "memorisation.json").read_bytes())
        spaces = {str(name): dict(of) for name, of in facts["spaces"].items()}
        held_out = facts["held_out"] is not None
    except FileNotFoundError:
        return missing(
            "Not looked at yet, since it takes a pass over all training images; to do so: python sadm_fast/evaluate.py"
            f" {run.path} --memorisation"
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return missing("memorisation.json is there but cannot be read.")
    parts = [f"<p>{_TEXT.format(who=_WHO[held_out])}</p>", _shares(spaces)]
    gaps = facts.get("held_out_batches")
    if isinstance(gaps, dict) and gaps:
        parts.append(_gaps(gaps))
    parts += [_neighbours(folder, name, of) for name, of in spaces.items()]
    step, samples, images = (number(facts.get(key)) for key in ("step", "samples", "training_images"))
    if None not in (step, samples, images):
        parts.append(f"<p>Step {step:,.0f}, {samples:,.0f} samples, {images:,.0f} training images.</p>")
    return "".join(parts)


def _neighbours(folder: Path, name: str, of: dict[str, Any]) -> str:
    """The samples nearest to training images in one feature space, beside those."""
    image = picture(folder / f"{name}.png", target_width=1100, most_bytes=250_000)
    if image is None:
        return ""
    threshold = number(of.get("threshold"))
    near = [number(sample.get("distance")) for sample in of.get("nearest", ()) if isinstance(sample, dict)]
    over = "".join(f"<span>{show(d / threshold) if threshold and d is not None else '–'}</span>" for d in near)
    judge = JUDGE_OF.get(name)
    space = escape(name) if judge is None else judge.space
    caption = (
        f"<b>{escape(name)}</b> Above, the samples nearest to a training image in {space}; below, those training "
        "images. Over them, their distance in units of the largest of a copy."
    )
    framed = (
        f'<div class="framed by-column"><div class="asked" style="--count: {len(near)}">{over}</div>'
        f'<img src="{image.uri}" width="{image.width}" height="{image.height}" alt="Nearest in {escape(name)}"></div>'
    )
    return f'<div class="maps">{figure(framed, caption)}</div>'


def _shares(spaces: dict[str, dict[str, Any]]) -> str:
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{_percent(of.get('copies'))}</td><td>{show(number(of.get('nearer')))}"
        f" ({show(number(of.get('deviations')), 2)})</td></tr>"
        for name, of in spaces.items()
    )
    return (
        '<table class="numbers"><thead><tr><th>feature space</th><th>copies</th><th>nearer</th></tr></thead><tbody>'
        f"{rows}<tr><td>if nothing is copied</td><td>5.0%</td><td>0.5 (0)</td></tr></tbody></table>"
    )


def _gaps(gaps: dict[str, Any]) -> str:
    rows = "".join(
        f"<tr><td>{_GAPS.get(name, escape(name))}</td>"
        + "".join(
            f"<td>{show(number(gap.get(key)), 4)}</td>" for key in ("training", "held_out", "difference", "error")
        )
        + "</tr>"
        for name, gap in gaps.items()
        if isinstance(gap, dict)
    )
    return (
        "<p>The averaged denoiser and Ψ on batches of training images, and on batches of held-out images of the same "
        "classes with the same noise. A positive difference is what was learned of single images.</p>"
        '<table class="numbers"><thead><tr><th></th><th>training</th><th>held out</th><th>difference</th>'
        f"<th>standard error</th></tr></thead><tbody>{rows}</tbody></table>"
    )


def _percent(value: object) -> str:
    share = number(value)
    return "–" if share is None else f"{share:.1%}"
