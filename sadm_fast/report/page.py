"""runs/NAME/report.html: one self-contained page that shows what a training run has done so far."""

import math
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from sadm_fast.errors import UserError
from sadm_fast.files import replacing
from sadm_fast.report import sections, texts
from sadm_fast.report.markup import change, count, duration, escape, missing, show
from sadm_fast.report.memorisation import memorisation
from sadm_fast.report.reading import JUDGE_OF, Run, number, read_run
from sadm_fast.report.style import style_sheet

# The page needs nothing but itself, and says so to the browser: no scripts, no requests.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def write_report(run_dir: Path) -> Path:
    """Write run_dir/report.html from the files in the folder so far, and return its path.

    An earlier report is replaced as a whole. A file that is missing or unreadable becomes a sentence on the page.
    Raises UserError if the folder is missing or cannot be written.
    """
    if not run_dir.is_dir():
        raise UserError(f"run folder {run_dir}: there is no such folder; train first or name another one")
    page = render(read_run(run_dir))
    target = run_dir / "report.html"
    try:
        with replacing(target, by_several=True) as temporary:
            # a lone surrogate, legal in JSON, is not legal in UTF-8
            temporary.write_text(page, encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"report {target}: cannot be written ({error.strerror})") from error
    return target


def render(run: Run) -> str:
    """The whole page as HTML."""
    contents: tuple[tuple[str, str, Callable[[Run], str]], ...] = (
        ("about", "What this page shows", sections.about),
        ("samples", "Samples", sections.samples),
        ("scores", "Distance to real images", sections.scores),
        ("losses", "Training curves", sections.losses),
        ("relations", texts.relations_title(run.mode), sections.relations),
        ("memorisation", "Copies of training images", memorisation),
        ("speed", "Speed and memory", sections.speed),
        ("settings", "Settings", sections.settings),
        ("origin", "Where it ran", sections.origin),
    )
    links = "".join(f'<a href="#{key}">{title}</a>' for key, title, _ in contents)
    body = "".join(f'<section id="{key}"><h2>{title}</h2>{content(run)}</section>' for key, title, content in contents)
    written = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(run.name)} · SADM training report</title>\n"
        f"<style>{style_sheet()}</style>\n</head>\n<body>\n"
        f"<header>{_headline(run)}<nav>{links}</nav></header>\n<main>{body}</main>\n"
        f"<footer>Written {written} by sadm_fast from the files of this run's folder.</footer>\n"
        "</body>\n</html>\n"
    )


def _headline(run: Run) -> str:
    mode = f'<span class="badge">{texts.MODE_NAMES[run.mode]}</span> ' if run.mode else ""
    last = run.metrics[-1] if run.metrics else {}
    facts = [_progress(run)]
    if (seen := number(last.get("samples_seen"))) is not None:
        facts.append(f"{seen:,.0f} images seen")
    if (seconds := number(last.get("wall_s"))) is not None and math.isfinite(seconds):
        facts.append(duration(seconds))
    sizes = run.facts.get("parameters")
    amounts = {k: number(v) for k, v in sizes.items()} if isinstance(sizes, dict) else {}
    if known := [f"{escape(player)} {count(size)}" for player, size in amounts.items() if size is not None]:
        facts.append(f"parameters: {', '.join(known)}")
    alerts = [missing(sentence) for sentence in run.unreadable]
    losses = [number(row.get("loss_denoise")) for row in run.metrics]
    if bad := sum(loss is not None and not math.isfinite(loss) for loss in losses):
        alerts.append(missing(f"At {bad} logged steps the denoising loss was not a finite number."))
    return (
        f"<h1>{escape(run.name)}</h1><p>{mode}{' · '.join(facts)}</p>"
        f'<p class="verdict">{_verdict(run)}</p>{"".join(alerts)}{_tiles(run)}'
    )


def _progress(run: Run) -> str:
    if run.step is None:
        return "no step logged yet"
    if run.planned_steps is None:
        return f"step {run.step:,}"
    if run.step >= run.planned_steps:
        return f"all {run.planned_steps:,} steps done"
    return f"step {run.step:,} of {run.planned_steps:,}, unfinished when this page was written"


def _verdict(run: Run) -> str:
    """Say the run in one sentence: the distance of the first judge, then and now, against the floor."""
    metric = next(iter(run.scored), None)
    scored = [] if metric is None else _scored(run, metric)
    if metric is None or not scored:
        return "The samples of this run have not been evaluated yet."
    (first_step, first), (last_step, last) = scored[0], scored[-1]
    judge = JUDGE_OF.get(metric)
    compared = escape(f"as {metric} measures it" if judge is None else f"in {judge.space}")
    distance = f"The Frechet distance between samples and real images, {compared},"
    if len(scored) == 1:
        sentence = f"{distance} is {show(last)} at step {last_step:,}, the only evaluation so far"
    else:
        sentence = (
            f"{distance} went from {show(first)} at step {first_step:,} to {show(last)} at step "
            f"{last_step:,}: {change(first, last)}"
        )
    floor = run.floor.get(metric)
    return f"{sentence}." if floor is None else f"{sentence}. Real images against real ones: {show(floor)}."


def _tiles(run: Run) -> str:
    tiles = []
    for metric in run.scored:
        scored = _scored(run, metric)
        if not scored:
            continue
        (first_step, first), (last_step, last) = scored[0], scored[-1]
        lines = [f"at step {last_step:,}"]
        if len(scored) > 1:
            lines.append(
                f"<strong>{change(first, last)}</strong> than {show(first)} at step {first_step:,}"
                if change(first, last) != "unchanged"
                else f"unchanged since step {first_step:,}"
            )
        floor = run.floor.get(metric)
        lines.append("no floor recorded" if floor is None else f"floor, real versus real: {show(floor)}")
        tiles.append(
            f'<div class="tile"><h3>{escape(metric)}</h3><div class="score">{show(last)}</div>'
            f"<p>{'<br>'.join(lines)}</p></div>"
        )
    return f'<div class="tiles">{"".join(tiles)}</div>' if tiles else ""


def _scored(run: Run, metric: str) -> list[tuple[int, float]]:
    """Return step and score of every evaluation with a finite score in this metric."""
    scores = [(row["step"], number(row.get(metric))) for row in run.evaluations]
    return [(step, score) for step, score in scores if score is not None and math.isfinite(score)]
