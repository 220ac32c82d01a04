"""The sections of the report: each function takes a run and returns the HTML below its heading."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sadm_fast.config_tree import flatten
from sadm_fast.metrics.tables import score_columns
from sadm_fast.report import texts
from sadm_fast.report.figures import (
    HALF_WIDTH,
    LARGEST_MATRIX,
    THIRD_WIDTH,
    Curve,
    line_chart,
    picture,
    printable,
    relation_maps,
    relation_scales,
)
from sadm_fast.report.markup import duration, escape, figure, inline, missing, show, table
from sadm_fast.report.pairs import changed_most
from sadm_fast.report.reading import (
    JUDGE_OF,
    Relations,
    Run,
    evenly_chosen,
    number,
    read_relations,
    series,
    variant_of,
)

FILM_STEPS = 7  # and the real images: two rows of four
TABLE_ROWS = 40
MOST_VARIANTS = 8  # lines of a chart
VARIANT_ROLES, VARIANT_DASHES = ("denoiser", "discriminator", "structure", "floor"), ("-", ":")
_PARTS = ("least noise", "second quarter", "third quarter", "most noise")
QUARTILES = [(f"loss_denoise_q{part}", name, f"q{part}") for part, name in enumerate(_PARTS, start=1)]


def about(run: Run) -> str:
    """The method in a paragraph, what this run did, how to read the page."""
    return f'<div class="two"><p>{texts.METHOD}</p><p>{texts.MODE[run.mode]} {texts.HOW_TO_READ}</p></div>'


def samples(run: Run) -> str:
    """The last grid, large, beside real images; then grids of earlier steps."""
    if isinstance(shape := run.setting("data.shape"), list):
        of = " x ".join(map(str, shape))
        return missing(f"Samples are arrays of {of} numbers, no pictures: samples/step-*-ema.npz hold them.")
    if isinstance(latents := run.config.get("latents"), dict) and latents.get("autoencoder", "") is None:
        return missing("Samples are latents without an autoencoder: samples/step-*-ema.npz hold them.")
    if not run.ema_grids and not run.raw_grids:
        real = _grid(run, run.real_grid, "Real images", "The training data.", 1400, 500_000)
        return missing("No samples have been drawn yet.") + real
    grids, weights = (run.ema_grids, "EMA") if run.ema_grids else (run.raw_grids, "raw")
    last = max(grids)
    parts = [f"<p>{texts.SAMPLES}</p>"]
    if run.sample_grid is None and run.classes:
        shown = ", ".join(map(escape, run.classes[:40])) + (", …" if len(run.classes) > 40 else "")
        parts.append(f"<p>The classes are {shown}.</p>")
    large = _grid(run, grids[last], f"Step {last:,}, {weights} weights", texts.WEIGHTS[weights], 1400, 500_000)
    aside = _grid(run, run.real_grid, "Real images", "What the samples should look like.", 700, 200_000)
    if weights == "EMA" and last in run.raw_grids:
        raw = run.raw_grids[last]
        aside += _grid(run, raw, f"Step {last:,}, raw weights", texts.WEIGHTS["raw"], 700, 200_000)
    if run.real_grid is None:
        aside += missing("No grid of real images was written.")
    parts.append(f'<div class="stage">{large}<div class="aside">{aside}</div></div>')
    if len(grids) > 1:
        film = [(f"Step {step:,}", grids[step]) for step in evenly_chosen(list(grids), FILM_STEPS)]
        film += [("Real images", run.real_grid)] if run.real_grid else []
        strip = "".join(_grid(run, path, title, "", 560, 110_000, asked=False) for title, path in film)
        parts.append(f"<h3>How they came about ({weights} weights)</h3><p>{texts.FILM}</p>")
        parts.append(f'<div class="strip">{strip}</div>')
    return "".join(parts)


def _grid(
    run: Run,
    path: Path | None,
    title: str,
    caption: str,
    target_width: int,
    most_bytes: int,
    *,
    asked: bool = True,
) -> str:
    """A sample grid with its title, and with the class asked for in each column or row if run.json names them."""
    if path is None:
        return ""
    image = picture(path, target_width=target_width, most_bytes=most_bytes)
    if image is None:
        return f"<figure>{missing(f'{title}: {path.name} cannot be read.')}</figure>"
    frame, names, listed = "", "", ""
    if asked and run.sample_grid is not None:
        columns, labels = run.sample_grid
        rows = [labels[start : start + columns] for start in range(0, len(labels), columns)]
        if all(row == rows[0][: len(row)] for row in rows):
            frame, names = "by-column", _asked(run, rows[0])
        elif all(len(set(row)) == 1 for row in rows):
            frame, names = "by-row", _asked(run, [row[0] for row in rows])
        elif len(labels) <= 64:
            listed = " Asked for, row by row: " + "; ".join(
                ", ".join(escape(run.class_name(label)) for label in row) for row in rows
            )
    return (
        f'<figure><div class="framed {frame}">{names}<img src="{image.uri}" width="{image.width}" '
        f'height="{image.height}" alt="{escape(title)}"></div>'
        f"<figcaption><b>{escape(title)}</b> {caption}{listed}</figcaption></figure>"
    )


def _asked(run: Run, labels: Sequence[int]) -> str:
    names = "".join(
        f'<span title="{escape(run.class_name(label))}">{escape(run.class_name(label))}</span>' for label in labels
    )
    return f'<div class="asked" style="--count: {len(labels)}">{names}</div>'


def scores(run: Run) -> str:
    """The judges' scores over training, each with its floor; which variant is best; what evaluate.py wrote here."""
    swept = "".join(_sweep(name, rows) for name, rows in run.sweeps.items())
    if not run.scores:
        if run.setting("data.shape") is not None:
            return missing("The judges compare images; samples of another kind need one of their own.")
        return missing("No evaluation has been recorded yet.") + swept
    variants = dict(list(run.variants.items())[:MOST_VARIANTS])
    several = len(variants) > 1
    charts = []
    for index, metric in enumerate(run.scored):
        curves = []
        for place, (name, rows) in enumerate(variants.items()):
            steps, values = series(rows, metric)
            if np.isfinite(values).any():
                role, dashes = VARIANT_ROLES[place % len(VARIANT_ROLES)], VARIANT_DASHES[place // len(VARIANT_ROLES)]
                curves.append(Curve(steps, values, printable(name) if several else "samples", role, dashes))
        if not curves:
            charts.append(f"<figure>{missing(f'{metric} was not measured.')}</figure>")
            continue
        chart = line_chart(
            f"metric{index}",
            curves,
            y_label=f"{printable(metric)} (lower is better)",
            log=True,
            size=HALF_WIDTH if several else THIRD_WIDTH,
            smooth=False,
            floor=run.floor.get(metric),
        )
        judge = JUDGE_OF.get(metric)
        charts.append(figure(chart, f"<b>{escape(metric)}</b> {'' if judge is None else judge.text}"))
    charts += _losses_of_averages(run)
    last = run.evaluations[-1]
    sampling = last.get("sampling")
    how = f"{number(last.get('samples')) or 0:,.0f} samples" if last.get("samples") else "samples"
    drawn = f" ({inline(sampling)})" if isinstance(sampling, dict) and sampling else ""
    cost = number(last.get("seconds"))
    took = "" if cost is None else f" It took {duration(cost)}, {show(number(last.get('images_per_s')))} images/s."
    return (
        f"<p>{texts.FRECHET} The last evaluation used {how}{drawn}.{took}</p>"
        f'<div class="{"two" if several else "three"}">{"".join(charts)}</div>'
        f"{_best_variant(run)}{_evaluation_table(run)}{swept}"
    )


def _losses_of_averages(run: Run) -> list[str]:
    """A chart of the averaged denoiser's loss by noise level over the evaluations; none if it was not measured."""
    curves = []
    for key, name, role in QUARTILES:
        steps, values = series(run.evaluations, key)
        if np.isfinite(values).any():
            curves.append(Curve(steps, values, name, role))
    if not curves:
        return []
    label = "loss of the averaged denoiser"
    chart = line_chart("evaluated-noise", curves, y_label=label, log=True, size=HALF_WIDTH, smooth=False)
    return [figure(chart, texts.LOSS_AVERAGED)]


def _best_variant(run: Run) -> str:
    """The variants of the last evaluation side by side; "" if there is one only."""
    last = run.scores[-1]["step"]
    found = {name: rows[-1] for name, rows in run.variants.items() if rows[-1]["step"] == last}
    if len(found) < 2:
        return ""
    shown = _table_of_scores(list(found), list(found.values()))
    return f"<h3>Averages and guidance at step {last:,}</h3><p>{texts.BEST}</p>{shown}"


def _sweep(file: str, rows: Sequence[dict[str, Any]]) -> str:
    """What evaluate.py wrote into the run's folder."""
    names = [", ".join(filter(None, (variant_of(row), _sampler_steps(row)))) or "–" for row in rows]
    steps = {row.get("step") for row in rows}
    of = f" of step {steps.pop():,}" if len(steps) == 1 and all(isinstance(step, int) for step in steps) else ""
    return f"<h3>{escape(file)}: scores{of}</h3><p>{texts.BEST}</p>{_table_of_scores(names, rows)}"


def _sampler_steps(row: dict[str, Any]) -> str:
    sampling = row.get("sampling")
    sampler = sampling.get("sampler") if isinstance(sampling, dict) else None
    steps = sampler.get("steps") if isinstance(sampler, dict) else None
    return f"{steps} steps" if isinstance(steps, int) else ""


def _table_of_scores(names: Sequence[str], rows: Sequence[dict[str, Any]]) -> str:
    """A line for each of `rows`; the best of a column is bold, with a star."""
    columns = score_columns(rows)
    lines = []
    for place, name in enumerate(names):
        cells = []
        for column in columns:
            text = show(column.values[place], 4)
            best = len(rows) > 1 and place in column.best
            cells.append(f"<td><b>{text} *</b></td>" if best else f"<td>{text}</td>")
        lines.append(f"<tr><td>{escape(name)}</td>{''.join(cells)}</tr>")
    head = "".join(f"<th>{escape(column.name)}</th>" for column in columns)
    return (
        f'<div class="wide"><table class="numbers"><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _evaluation_table(run: Run) -> str:
    several = len(run.variants) > 1
    scored = [*run.scored, *(["loss_denoise"] if any("loss_denoise" in row for row in run.scores) else [])]
    rows = "".join(
        f"<tr><td>{row['step']:,}</td>"
        + (f"<td>{escape(variant_of(row))}</td>" if several else "")
        + "".join(f"<td>{show(value, 5)}</td>" for value in (number(row.get(s)) for s in scored))
        + "</tr>"
        for row in evenly_chosen(run.scores, TABLE_ROWS)
    )
    floor = "".join(f"<td>{show(run.floor.get(metric), 5)}</td>" for metric in scored)
    head = ("<th></th>" if several else "") + "".join(f"<th>{escape(metric)}</th>" for metric in scored)
    few = f" ({TABLE_ROWS} of {len(run.scores)})" if len(run.scores) > TABLE_ROWS else ""
    return (
        f"<details><summary>Evaluations as a table{few}</summary>"
        f'<table class="numbers"><thead><tr><th>step</th>{head}</tr></thead>'
        f"<tbody>{rows}<tr><td>floor</td>{'<td></td>' if several else ''}{floor}</tr></tbody></table></details>"
    )


def losses(run: Run) -> str:
    """Both players over training: losses, structure distance, gradient norms and learning rates."""
    if not run.metrics:
        return missing("No training step has been logged yet.")
    denoiser, discriminator = ("denoiser", "denoiser"), ("discriminator", "discriminator")
    charts = [
        _chart(run, "loss", [("loss_denoise", *denoiser)], "denoising loss", texts.LOSS_DENOISE),
        _chart(run, "noise", QUARTILES, "denoising loss", texts.LOSS_QUARTILES),
    ]
    if run.mode != "plain":
        distance = [("structure_distance", "structure distance", "structure")]
        charts.append(_chart(run, "structure", distance, "structure distance S", texts.DISTANCE[run.mode]))
    if run.mode not in ("plain", "structure"):
        loss = [("loss_discriminator", *discriminator)]
        charts.append(_chart(run, "opponent", loss, "discriminator loss", texts.LOSS_DISCRIMINATOR, log=False))
    norms = [("grad_norm_denoiser", *denoiser), ("grad_norm_discriminator", *discriminator)]
    rates = [("lr", *denoiser), ("lr_discriminator", *discriminator)]
    charts += [
        _chart(run, "gradients", norms, "gradient norm", texts.GRADIENTS),
        _chart(run, "rates", rates, "learning rate", texts.RATES, smooth=False),
    ]
    absent = missing(texts.NO_GAME[run.mode]) if run.mode in texts.NO_GAME else ""
    return f'{absent}<div class="two">{"".join(charts)}</div>'


def _chart(
    run: Run,
    key: str,
    lines: Sequence[tuple[str, str, str]],
    y_label: str,
    caption: str,
    *,
    log: bool = True,
    smooth: bool = True,
    scale: float = 1.0,
    size: tuple[float, float] = HALF_WIDTH,
    from_zero: bool = False,
) -> str:
    """Draw fields of metrics.jsonl over steps; a line is (field, legend, role of its colour)."""
    curves = []
    for field, name, role in lines:
        steps, values = series(run.metrics, field)
        if np.isfinite(values).any():
            curves.append(Curve(steps, values * scale, name, role))
    if not curves:
        return f"<figure>{missing(f'No {y_label} has been logged yet.')}</figure>"
    chart = line_chart(key, curves, y_label=y_label, log=log, smooth=smooth, size=size, from_zero=from_zero)
    return figure(chart, caption)


def relations(run: Run) -> str:
    """R(F), R(G) and their difference, early and late; then the accuracy of Psi and of the judge."""
    if run.mode == "plain":
        return missing(texts.PLAIN_RELATIONS) + _accuracies(run)
    ends = dict.fromkeys((min(run.relations), max(run.relations))) if run.relations else {}
    read = {step: read_relations(run.relations[step], step) for step in ends}
    found = [item for item in read.values() if item is not None]
    meaning = texts.relation_meaning(run.setting("game.relation"))
    parts = [f"<p>{texts.RELATIONS} {meaning}</p>"]
    if not run.relations:
        parts.append(missing("No relation matrices have been written yet."))
    for step, item in read.items():
        parts.append(f"<h3>Step {step:,}</h3>")
        if item is None:
            parts.append(missing(f"{run.relations[step].name} cannot be read."))
            continue
        maps = relation_maps(f"relations-{step}", item, run.classes, relation_scales(found))
        parts.append(f'<div class="maps">{figure(maps, _relation_caption(item))}</div>')
        parts.append(changed_most(run, step))
    if len(read) == 1:
        parts.append(missing("There is one step so far; early beside late comes with the next one."))
    return "".join(parts) + _accuracies(run)


def _relation_caption(item: Relations) -> str:
    off_diagonal = ~np.eye(item.labels.size, dtype=bool)
    gap = np.abs(item.fake - item.real)[off_diagonal]
    same = (item.labels[:, None] == item.labels[None, :]) & off_diagonal
    sentences = [f"Mean absolute difference of two relations: <b>{show(float(np.mean(gap)))}</b>."]
    if same.any() and (off_diagonal & ~same).any():
        within = [show(float(matrix[same].mean())) for matrix in (item.real, item.fake)]
        between = [show(float(matrix[off_diagonal & ~same].mean())) for matrix in (item.real, item.fake)]
        sentences.append(
            f"Mean relation inside a class: {within[0]} of x0, {within[1]} of x̂0; "
            f"between classes: {between[0]} of x0, {between[1]} of x̂0."
        )
    if np.isfinite(item.log_snr).all():
        sentences.append(
            f"Log-SNR of the noise: {item.log_snr.max():.1f} to {item.log_snr.min():.1f}; "
            "in each class the least noisy image comes first."
        )
    if item.labels.size > LARGEST_MATRIX:
        sentences.append(f"Drawn: {LARGEST_MATRIX} of the {item.labels.size} images, evenly chosen.")
    return " ".join(sentences)


def _accuracies(run: Run) -> str:
    parts = []
    for key, name in texts.CLASSIFIERS:
        if key == "structure_encoder" and run.mode == "plain":
            continue
        facts = run.facts.get(key)
        if not isinstance(facts, dict) or not facts:
            parts.append(f"<section><h3>{name}</h3>{missing('Nothing was recorded about it.')}</section>")
            continue
        accuracy = number(facts.get("accuracy"))
        right = "" if accuracy is None else f" It was right on <b>{accuracy:.1%}</b> of its test images."
        rest = {path: value for path, value in flatten(facts).items() if path != "accuracy"}
        parts.append(
            f"<section><h3>{name}</h3><p>{texts.classifier_role(key, facts)}{right}</p>{table(rest)}</section>"
        )
    return f'<div class="two">{"".join(parts)}</div>'


def speed(run: Run) -> str:
    """Throughput, data wait and memory."""
    if not run.metrics:
        return missing("No training step has been logged yet.")
    charts = [
        _usage(run, "samples_per_s", "images per second", _median(run, "samples_per_s", "{:,.0f} images/s")),
        _usage(
            run,
            "data_wait_fraction",
            "data wait (% of a step)",
            _median(run, "data_wait_fraction", "{:.2%} of a step spent waiting for images"),
            scale=100,
        ),
        _usage(
            run,
            "memory_bytes",
            "memory (GiB)",
            f"Highest logged: {_highest(run, 'memory_bytes') / 2**30:.2f} GiB.",
            scale=2**-30,
        ),
    ]
    skipped = _highest(run, "skipped_steps")
    note = f"<p>{skipped:,.0f} steps were skipped because a gradient was not finite.</p>" if skipped else ""
    return f'<div class="three">{"".join(charts)}</div>{note}'


def _usage(run: Run, field: str, y_label: str, caption: str, scale: float = 1.0) -> str:
    lines = [(field, y_label, "denoiser")]
    return _chart(run, field, lines, y_label, caption, log=False, scale=scale, size=THIRD_WIDTH, from_zero=True)


def settings(run: Run) -> str:
    """The resolved config, one table a block."""
    if not run.config:
        return missing("config.json has not been written yet.")
    blocks: dict[str, dict[str, Any]] = {}
    for path, value in flatten(run.config).items():
        block, _, key = path.rpartition(".")
        blocks.setdefault(block or "general", {})[key] = value
    tables = (f"<section><h3>{escape(name)}</h3>{table(block)}</section>" for name, block in blocks.items())
    return f'<div class="settings">{"".join(tables)}</div>'


def origin(run: Run) -> str:
    """Command, commit, versions and machine."""
    if not run.facts:
        return missing("run.json has not been written yet.")
    command = run.facts.get("command")
    parts = [f"<h3>Command</h3><pre>{escape(command)}</pre>" if command else missing("The command is not recorded.")]
    parts.append(table({"commit": run.facts.get("commit") or "not recorded"}))
    for key in ("versions", "machine"):
        value = run.facts.get(key)
        shown = table(flatten(value)) if isinstance(value, dict) and value else escape(value or "not recorded")
        parts.append(f"<section><h3>{key.capitalize()}</h3>{shown}</section>")
    return f'{parts[0]}{parts[1]}<div class="two">{"".join(parts[2:])}</div>'


def _median(run: Run, field: str, form: str) -> str:
    values = series(run.metrics, field)[1]
    values = values[np.isfinite(values)]
    return f"Median: {form.format(np.median(values))}." if values.size else ""


def _highest(run: Run, field: str) -> float:
    values = series(run.metrics, field)[1]
    return float(np.nanmax(values, initial=0.0)) if np.isfinite(values).any() else 0.0
